"""Every figure of the detector, with its unit, in one place.

A `Config` is frozen and hashable: it is a static argument of jitted functions, the header of a
weights file and the answer to "where does that number come from". Presets are data (`Config.v94()`,
`Config.edge()`), not subclasses. Nothing here imports more than the standard library.

Sources, as named in the comments: "paper" is the ArtifactNet paper, "runner" the public benchmark
runner of the released v9.4 model, "raw-song graph" the later whole-song export. What no source
states is marked "inferred".
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import reprlib
import sys
import types
import typing
from typing import Annotated, Any, Literal

from artifactnet_jax.layers import Layer, shapes

# What a value may be: its type, the rule in words, the rule.
Count = Annotated[int, "above 0", lambda x: x > 0]
Natural = Annotated[int, "at least 0", lambda x: x >= 0]
Odd = Annotated[int, "above 0 and odd", lambda x: x > 0 and x % 2 == 1]
Positive = Annotated[float, "above 0", lambda x: x > 0]
From0 = Annotated[float, "at least 0", lambda x: x >= 0]
Share = Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1]
Rising = Annotated[
    tuple[Positive, ...], "two or more, rising", lambda x: len(x) > 1 and list(x) == sorted(set(x))
]
From0Rising = Annotated[tuple[From0, ...], "rising", lambda x: list(x) == sorted(set(x))]
Size = Annotated[int, "from 1 to 1048576", lambda x: 0 < x <= 1 << 20]  # of a map that is made
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_WORDS |= {dict: "a table", type(None): "none"}


class Checked:
    """A dataclass whose fields hold what their annotations allow."""

    def __post_init__(self) -> None:
        """ValueError naming the first field that does not, its value, and what is allowed."""
        section: Any = type(self)  # hashable, though a type checker doubts it
        for name, hint in _hints(section).items():
            require(name, getattr(self, name), hint)


@functools.cache
def _hints(section: Any) -> dict[str, Any]:
    return typing.get_type_hints(section, include_extras=True)


def require(name: str, value: Any, hint: Any) -> None:
    """ValueError naming what has a value that an annotation does not allow."""
    if words := _allowed(value, hint):
        raise ValueError(f"{name}={reprlib.repr(value)}: it must be {words}")


def _allowed(value: Any, hint: Any) -> str:
    """What an annotation allows, in words, if the value is not of it; else empty.

    An int may stand for a float; a bool is no number, and no number is infinite or NaN.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        words, (rule, holds) = _allowed(value, args[0]), hint.__metadata__
        return "" if not words and holds(value) else f"{words} {rule}".strip()
    if origin is Literal:
        return "" if value in args else f"one of {', '.join(args)}"
    if origin in (typing.Union, types.UnionType):
        every = [_allowed(value, one) for one in args]
        return " or ".join(every) if all(every) else ""
    if origin is tuple:
        if not isinstance(value, tuple):
            return "a list"
        hints = args[:1] * len(value) if args[1:] == (...,) else args
        if len(hints) != len(value):
            return f"a list of {len(hints)}"
        return next((f"a list, each {words}" for words in map(_allowed, value, hints) if words), "")
    if hint in (int, float):
        fits = isinstance(value, (int, hint)) and abs(value) <= sys.float_info.max
        return "" if fits and not isinstance(value, bool) else _WORDS[hint]
    return "" if hint is Any or isinstance(value, hint) else _WORDS.get(hint, hint.__name__)


# Regression rule of the paper: a rise of the FPR, and a fall of the TPR, that is worse.
REGRESSION = (0.03, 0.05)
# Paper, Table I: in this order. "ratio" is mel_H - mel_P in dB, "flux" is |delta|.
Channel = Literal["mel_res", "mel_H", "mel_P", "delta", "delta2", "ratio", "flux"]
CHANNELS: tuple[Channel, ...] = typing.get_args(Channel)


@dataclasses.dataclass(frozen=True)
class FrontEnd(Checked):
    """From audio to the seven channels (paper III-C; runner for what the paper leaves open).

    The defaults are the presets' conventions; other values come from converted graphs.
    """

    sample_rate: Count = 44_100  # Hz
    segment_samples: Count = 176_400  # 4.0 s
    # What a segment is divided by before its spectrum: its peak or RMS, plus level_eps, or the
    # larger of the two, or the root of its square plus level_eps.
    level: Literal["none", "peak", "rms"] = "none"
    level_rule: Literal["add", "max", "root"] = "add"
    level_eps: From0 = 0.0
    centred: bool = False  # whether the segment's mean is taken off before that
    n_fft: Count = 2048  # samples
    hop: Count = 512  # samples
    window: Literal["hann", "given"] = "hann"  # periodic Hann; tensor front_end.window [n_fft]
    stft_pad: Natural = 1024  # samples added at both ends: n_fft / 2 centres the frames
    stft_edge: Literal["reflect", "edge", "constant"] = "reflect"  # what they hold
    spectrum_power: Positive = 1.0  # of the spectrogram: 1 magnitude, 2 power
    spectrum_scale: Positive = 1.0  # factor on the magnitude
    spectrum_eps: From0 = 0.0  # added to re^2 + im^2 (before any scale)
    hpss_width: Odd = 31  # frames; median along time, harmonic
    percussive_width: Odd = 31  # bins; median along frequency, percussive
    hpss_edge: Literal["reflect", "edge", "constant"] = "reflect"  # "reflect" repeats no sample
    hpss_power: Positive = 2.0  # of the soft masks
    hpss_eps: From0 = 0.0  # added to h^2 + p^2; the raw-song graph has 1e-10, v9.4 behaves as 0
    n_mels: Count = 128  # bands, 0 Hz to Nyquist
    mel_scale: Literal["slaney", "htk", "given"] = "slaney"  # inferred; "given": front_end.mel
    mel_norm: Literal["slaney", "none"] = "slaney"  # "slaney" gives every band unit area
    mel_power: Positive = 2.0  # of the magnitude, before the bands are summed
    amin: Positive = 1e-10  # power floor before the logarithm
    amin_rule: Literal["max", "add"] = "max"  # log of max(power, amin), or of power + amin
    db_factor: Positive = 10.0  # dB are db_factor * log10(power)
    top_db: Positive | None = 80.0  # dB kept below the maximum; None: no clamp
    # What that maximum is over: residual, H and P of a segment together, each view by itself, or
    # all views (or each view) of all segments of a song.
    joint: Literal["segment", "view", "song", "song_view"] = "segment"
    channels: Annotated[tuple[Channel, ...], "one or more", len] = CHANNELS

    def __post_init__(self) -> None:
        """ValueError for a wrong field, and for a segment that holds no frame."""
        super().__post_init__()
        if self.n_frames < 1:
            raise ValueError(f"n_fft={self.n_fft}: more than segment_samples + 2 * stft_pad")

    @property
    def segment_s(self) -> float:
        """Segment length in seconds."""
        return self.segment_samples / self.sample_rate

    @property
    def n_bins(self) -> int:
        """Frequency bins of the STFT (1025)."""
        return self.n_fft // 2 + 1

    @property
    def n_frames(self) -> int:
        """STFT frames of a segment (345)."""
        return (self.segment_samples + 2 * self.stft_pad - self.n_fft) // self.hop + 1


_LATER = ("level", "level_rule", "level_eps", "centred")  # fields that older weights lack


@dataclasses.dataclass(frozen=True)
class UNet(Checked):
    """ArtifactUNet: magnitude [n_bins, n_frames] -> mask in [0, mask_max] (paper III-B).

    The layout of v94 is inferred: it is the one whose parameter count is the published
    3,603,937. With `patch` larger than (1, 1) a strided convolution turns each patch of the
    spectrogram into one position, and a sub-pixel head turns positions back into patches, so that
    no convolution runs at full resolution.
    """

    patch: tuple[Count, Count] = (1, 1)  # bins, frames
    stem: Count = 1  # features of a patch position; the patch's own size keeps all of its content
    widths: tuple[Count, ...] = (32, 64, 128)  # features of each encoder level
    bottleneck: Count = 256  # features; one residual block, one gated residual block
    input_scale: Literal["magnitude", "log"] = "magnitude"
    log_floor: Positive = 1e-3  # magnitude floor of "log": natural log less the segment's mean
    mask_max: Share = 0.5  # paper III-B

    @property
    def stride(self) -> tuple[int, int]:
        """Bins and frames that the input is padded to a multiple of."""
        down = 2 ** len(self.widths)
        return self.patch[0] * down, self.patch[1] * down


@dataclasses.dataclass(frozen=True)
class CNN(Checked):
    """Forensic CNN on the seven channels: exactly 423,553 parameters (runner; layout inferred)."""

    widths: tuple[Count, ...] = (32, 64, 128, 256)  # the last one without pooling
    hidden: Count = 128
    dropout: Share = 0.3  # training only; inferred


@dataclasses.dataclass(frozen=True)
class Texture(Checked):
    """The texture head (ours): statistics of spectrograms, and a small network on them.

    Its logit is added to the CNN's. What the statistics are: `artifactnet_jax.texture`.
    """

    resolutions: tuple[tuple[Count, Count], ...] = (  # n_fft, hop
        *((256, 64), (512, 128), (1024, 256)),
        *((2048, 512), (4096, 1024), (8192, 2048)),
    )
    edges: Rising = (  # Hz, of the bands
        *(100.0, 400.0, 800.0, 1300.0, 2000.0, 3000.0, 4000.0, 5500.0),
        *(7000.0, 8500.0, 10_000.0, 12_000.0, 14_000.0, 16_000.0),
    )
    lags: tuple[tuple[Natural, int], ...] = (  # bins and frames from a bin to the one it goes with
        *((0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (0, 8)),
        *((1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (8, 0)),
        *((1, 1), (1, -1), (1, 2), (1, -2), (2, 1), (2, -1), (2, 2), (2, -2)),
    )
    floor: From0 = 1e-5  # of the largest magnitude, added before the logarithm: -100 dB
    frame_floor: From0 = 1e-6  # of the loudest frame's power; quieter frames do not count
    limit: From0 = 6.0  # standard deviations that a statistic is clipped at
    hidden: tuple[Count, ...] = (32,)  # features of the hidden layers


_ATTRIBUTES: dict[str, Any] = {  # of layers; what they mean together, `shapes` checks
    **dict.fromkeys(("strides", "dilations", "kernel"), tuple[Count, Count]),
    **dict.fromkeys(("groups", "step", "rows", "cols"), Count),
    **{"start": Natural, "stop": Natural, "output_padding": tuple[Natural, Natural]},
    **dict.fromkeys(("alpha", "beta", "gamma", "value"), float),
    **{"epsilon": From0, "scales": tuple[Positive, Positive], "size": tuple[Size, Size]},
    **{"low": float | None, "high": float | None, "count_include_pad": bool, "reverse": bool},
    **dict.fromkeys(("axis", "axes", "order", "coordinates", "rounding"), str),
    "padding": tuple[tuple[Natural, Natural], tuple[Natural, Natural]],
    "mode": Literal["constant", "reflect", "edge", "nearest", "linear"],
    "approximate": Literal["none", "tanh"],
}


@dataclasses.dataclass(frozen=True)
class Imported(Checked):
    """A UNet or CNN read from a foreign graph, layer by layer.

    As UNet: map (1, n_bins, n_frames) of the magnitude -> mask of the same shape, its final sigmoid
    and scale included. As CNN: map (len(channels), n_mels, n_frames) -> the logit, a vector (1,) or
    a map (1, 1, 1).
    """

    layers: tuple[Layer, ...]
    mask_max: From0 | None = None  # UNet: bound of the mask that the layers guarantee, if any

    def __post_init__(self) -> None:
        """ValueError for a wrong field, of the layers too; `Config` checks how they fit."""
        super().__post_init__()
        hints = _hints(Layer) | _ATTRIBUTES
        for layer in self.layers:
            for name, value in (vars(layer) | dict(layer.attributes)).items():
                if name not in hints:
                    raise ValueError(f"layers.{layer.name} has an unknown attribute {name!r}")
                require(f"layers.{layer.name}.{name}", value, hints[name])


@dataclasses.dataclass(frozen=True)
class Decision(Checked):
    """From segment scores to a song's verdict (paper III-D, runner, raw-song graph)."""

    threshold: Share = 0.5  # paper; AI when score >= threshold
    # Further thresholds by name, from calibration sources: "fpr1", "fpr2" and "fpr5" call 1, 2
    # and 5 % of their real tracks AI, "balanced" judges the largest share of both right.
    operating_points: tuple[tuple[str, Share], ...] = ()
    # "unclear" are scores from here up to the threshold; none where it is the threshold.
    lower: Share | None = None
    # Or: half-width in log-odds of the band around the threshold whose scores are "unclear".
    margin: From0 = 0.0
    # Paper and runner: "median"; raw-song graph: "rms"; "mean" only in converted graphs.
    aggregate: Literal["median", "rms", "mean"] = "median"
    segments: Literal["all", "first60"] = "all"  # raw-song graph: "first60"
    least_segments: Count = 1  # ours, of "all": a shorter recording has overlapping ones, so many
    least_hop_s: Positive = 1.0  # s between the starts of those at least
    runner_segments: Count = 7  # runner: evenly spaced starts
    first_s: Positive = 60.0  # raw-song graph: seconds read
    min_tail_s: From0 = 2.0  # raw-song graph: a shorter tail is dropped, a longer one zero-padded
    rms_eps: From0 = 1e-9  # raw-song graph: weights are rms / (sum + rms_eps)
    silence_peak: From0 = 10 ** (-90 / 20)  # full scale; a segment that never exceeds it is silent


@dataclasses.dataclass(frozen=True)
class Fusion(Checked):
    """From what the witnesses say of a track to one calibrated probability (ours): `decision`.

    The weights of the log-odds have a value for each class of length, and a last one for tracks
    without a logit of the fine spectrum.
    """

    lengths_s: From0Rising = (0.0, 12.0, 40.0)  # s; a class begins, as of `fine_head.LENGTHS`
    bias: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    segments: tuple[From0, ...] = (1.0, 1.0, 1.0, 1.0)
    fine: tuple[From0, ...] = (0.0, 0.0, 0.0, 0.0)
    decoder: tuple[From0, ...] = (0.0, 0.0, 0.0, 0.0)  # of a power of ten of p
    limit: Positive = 6.0  # log-odds that a witness is clipped at
    from_p: Share = 0.1  # of the nearest decoder: above, it says nothing
    most_lines: Positive = 3.0  # powers of ten below `from_p` that count
    sure_p: Share = 1e-4  # below, a match decides by itself:
    decides: float = 4.6  # log-odds that it gives at least
    # Of the scan for stretches, by segment: weights of its log-odds and of those of the fine
    # spectrum around it, which with the bias are its evidence; what is taken off that; what a
    # stretch must sum up to then, and segments it has.
    span_segments: From0 = 0.5
    span_fine: From0 = 0.0
    span_bias: float = 0.0
    span_drift: From0 = 0.0
    span_least: Positive = 8.0
    span_shortest: Count = 5

    def __post_init__(self) -> None:
        """ValueError for a wrong field, or weights of another number of classes."""
        super().__post_init__()
        for name in ("bias", "segments", "fine", "decoder"):
            if len(getattr(self, name)) != len(self.lengths_s) + 1:
                raise ValueError(f"{name}: {len(self.lengths_s) + 1} values are needed")

    def row(self, length_s: float, fine: bool) -> int:
        """The class of a track: its place among the weights."""
        if not fine:
            return len(self.lengths_s)
        return sum(length_s >= begin for begin in self.lengths_s[1:])


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """The whole detector."""

    preset: str
    front_end: FrontEnd = FrontEnd()
    unet: UNet | Imported = UNet()
    cnn: CNN | Imported = CNN()
    verdict: Decision = Decision()
    texture: Texture | None = None
    fusion: Fusion | None = None

    def __post_init__(self) -> None:
        """ValueError for parts that do not fit together."""
        super().__post_init__()
        fe, texture = self.front_end, self.texture
        if texture is not None and fe.joint.startswith("song"):
            raise ValueError("a texture head judges segments one by one: no joint rule of a song")
        if texture is not None and texture.edges[-1] > fe.sample_rate / 2:
            raise ValueError(f"texture.edges={texture.edges}: above half of front_end.sample_rate")
        if isinstance(self.cnn, Imported) and self.cnn.mask_max is not None:
            raise ValueError(
                f"cnn.mask_max={self.cnn.mask_max}: it must be none, a CNN has no mask"
            )
        plane, channels = (1, fe.n_bins, fe.n_frames), (len(fe.channels), fe.n_mels, fe.n_frames)
        logit = ((1,), (1, 1, 1))
        for key, given, wanted in (("unet", plane, (plane,)), ("cnn", channels, logit)):
            part = getattr(self, key)
            if isinstance(part, Imported):
                try:
                    *_, (name, shape) = shapes(part.layers, given).items()
                    if shape not in wanted:
                        raise ValueError(f"{name!r} has shape {shape}, not {wanted[0]}")
                except ValueError as error:
                    raise ValueError(f"{key}.layers: {error}") from None

    @classmethod
    def v94(cls) -> Config:
        """The published model's size: 4,027,490 parameters, 132 GFLOP per segment."""
        return cls(preset="v94")

    @classmethod
    def edge(cls) -> Config:
        """Same residual, bottleneck and mask on 8x8 patches, 4 GFLOP; and the texture head."""
        unet = UNet(patch=(8, 8), stem=64, input_scale="log")
        return cls(preset="edge", unet=unet, texture=Texture())

    @classmethod
    def from_preset(cls, name: str) -> Config:
        """Config of a preset; ValueError for an unknown name."""
        if name not in ("v94", "edge"):
            raise ValueError(f"unknown preset {name!r}: use 'v94' or 'edge'")
        return cls.v94() if name == "v94" else cls.edge()

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as stored in a weights file."""
        data = dataclasses.asdict(self)
        for key in _LATER:  # at their defaults: older weights keep their digests
            if data["front_end"][key] == getattr(FrontEnd, key):
                del data["front_end"][key]
        for key in ("unet", "cnn"):
            part = getattr(self, key)
            if isinstance(part, Imported):
                data[key]["layers"] = [layer.to_dict() for layer in part.layers]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Config:
        """Inverse of `to_dict`; a key that an older file lacks takes its default.

        ValueError names an unknown or missing section, an unknown key, or a key whose value is not
        allowed.
        """
        require("config", data, dict)
        parts: dict[str, Any] = {"front_end": FrontEnd, "unet": UNet, "cnn": CNN}
        parts["verdict"] = Decision
        optional = {"texture": Texture, "fusion": Fusion}
        parts |= {key: part for key, part in optional.items() if data.get(key) is not None}
        data = {key: value for key, value in data.items() if key in parts or value is not None}
        if set(data) != set(parts) | {"preset"}:
            raise ValueError(f"config has keys {sorted(data)}, not preset and {sorted(parts)}")
        values = {}
        for key, part in parts.items():
            require(key, data[key], dict)
            if key in optional and not data[key]:
                raise ValueError(f"config section {key!r} is empty")
            if key in ("unet", "cnn") and "layers" in data[key]:
                part = Imported
            names = {field.name for field in dataclasses.fields(part)}
            if unknown := sorted(set(data[key]) - names):
                raise ValueError(f"config section {key!r} has unknown keys {unknown}")
            pairs = {k: _tuples(v) for k, v in data[key].items()}
            try:
                if part is Imported:
                    pairs["layers"] = _layers(pairs["layers"])
                values[key] = part(**pairs)
            except ValueError as error:
                raise ValueError(f"{key}.{error}") from None
        return cls(preset=data["preset"], **values)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def _tuples(value: Any) -> Any:
    """Lists of JSON as the tuples they were; the layers of `Imported` are read by themselves."""
    if not isinstance(value, list):
        return value
    return tuple(tuple(v) if isinstance(v, list) else v for v in value)


def _layers(tables: Any) -> tuple[Layer, ...]:
    try:
        return tuple(map(Layer.from_dict, tables))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"layers: {error!r}") from error
