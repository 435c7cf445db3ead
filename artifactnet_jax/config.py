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
import hashlib
import json
from typing import Any, Literal

from artifactnet_jax.layers import Layer

# Paper, Table I: in this order. "ratio" is mel_H - mel_P in dB, "flux" is |delta|.
# Regression rule of the paper: a rise of the FPR, and a fall of the TPR, that is worse.
REGRESSION = (0.03, 0.05)
CHANNELS = ("mel_res", "mel_H", "mel_P", "delta", "delta2", "ratio", "flux")


@dataclasses.dataclass(frozen=True)
class FrontEnd:
    """From audio to the seven channels (paper III-C; runner for what the paper leaves open).

    The defaults are the presets' conventions; other values come from converted graphs.
    """

    sample_rate: int = 44_100  # Hz
    segment_samples: int = 176_400  # 4.0 s
    n_fft: int = 2048  # samples
    hop: int = 512  # samples
    window: Literal["hann", "given"] = "hann"  # periodic Hann; tensor front_end.window [n_fft]
    stft_pad: int = 1024  # samples added at both ends: n_fft / 2 centres the frames
    stft_edge: Literal["reflect", "edge", "constant"] = "reflect"  # what they hold
    spectrum_power: float = 1.0  # of the spectrogram: 1 magnitude, 2 power
    spectrum_scale: float = 1.0  # factor on the magnitude
    spectrum_eps: float = 0.0  # added to re^2 + im^2 (before any scale)
    hpss_width: int = 31  # frames; median along time, harmonic
    percussive_width: int = 31  # bins; median along frequency, percussive
    hpss_edge: Literal["reflect", "edge", "constant"] = "reflect"  # "reflect" repeats no sample
    hpss_power: float = 2.0  # of the soft masks
    hpss_eps: float = 0.0  # added to h^2 + p^2; the raw-song graph has 1e-10, v9.4 behaves as 0
    n_mels: int = 128  # bands, 0 Hz to Nyquist
    mel_scale: Literal["slaney", "htk", "given"] = "slaney"  # inferred; "given": front_end.mel
    mel_norm: Literal["slaney", "none"] = "slaney"  # "slaney" gives every band unit area
    mel_power: float = 2.0  # of the magnitude, before the bands are summed
    amin: float = 1e-10  # power floor before the logarithm
    amin_rule: Literal["max", "add"] = "max"  # log of max(power, amin), or of power + amin
    db_factor: float = 10.0  # dB are db_factor * log10(power)
    top_db: float | None = 80.0  # dB kept below the maximum; None: no clamp
    # What that maximum is over: residual, H and P of a segment together, each view by itself, or
    # all views (or each view) of all segments of a song.
    joint: Literal["segment", "view", "song", "song_view"] = "segment"
    channels: tuple[str, ...] = CHANNELS

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


@dataclasses.dataclass(frozen=True)
class UNet:
    """ArtifactUNet: magnitude [n_bins, n_frames] -> mask in [0, mask_max] (paper III-B).

    The layout of v94 is inferred: it is the one whose parameter count is the published
    3,603,937. With `patch` larger than (1, 1) a strided convolution turns each patch of the
    spectrogram into one position, and a sub-pixel head turns positions back into patches, so that
    no convolution runs at full resolution.
    """

    patch: tuple[int, int] = (1, 1)  # bins, frames
    stem: int = 1  # features of a patch position; the patch's own size keeps all of its content
    widths: tuple[int, ...] = (32, 64, 128)  # features of each encoder level
    bottleneck: int = 256  # features; one residual block, one gated residual block
    input_scale: Literal["magnitude", "log"] = "magnitude"
    log_floor: float = 1e-3  # magnitude floor of "log": natural log less the segment's mean
    mask_max: float = 0.5  # paper III-B

    @property
    def stride(self) -> tuple[int, int]:
        """Bins and frames that the input is padded to a multiple of."""
        down = 2 ** len(self.widths)
        return self.patch[0] * down, self.patch[1] * down


@dataclasses.dataclass(frozen=True)
class CNN:
    """Forensic CNN on the seven channels: exactly 423,553 parameters (runner; layout inferred)."""

    widths: tuple[int, ...] = (32, 64, 128, 256)  # the last one without pooling
    hidden: int = 128
    dropout: float = 0.3  # training only; inferred


@dataclasses.dataclass(frozen=True)
class Texture:
    """The texture head (ours): statistics of spectrograms, and a small network on them.

    Its logit is added to the CNN's. What the statistics are: `artifactnet_jax.texture`.
    """

    resolutions: tuple[tuple[int, int], ...] = (  # n_fft, hop
        *((256, 64), (512, 128), (1024, 256)),
        *((2048, 512), (4096, 1024), (8192, 2048)),
    )
    edges: tuple[float, ...] = (  # Hz, of the bands
        *(100.0, 400.0, 800.0, 1300.0, 2000.0, 3000.0, 4000.0, 5500.0),
        *(7000.0, 8500.0, 10_000.0, 12_000.0, 14_000.0, 16_000.0),
    )
    lags: tuple[tuple[int, int], ...] = (  # bins and frames from a bin to the one it goes with
        *((0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (0, 8)),
        *((1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (8, 0)),
        *((1, 1), (1, -1), (1, 2), (1, -2), (2, 1), (2, -1), (2, 2), (2, -2)),
    )
    floor: float = 1e-5  # of the largest magnitude, added before the logarithm: -100 dB
    frame_floor: float = 1e-6  # of the loudest frame's power; quieter frames do not count
    limit: float = 6.0  # standard deviations that a statistic is clipped at
    hidden: tuple[int, ...] = (13, 13)  # features of the hidden layers: keeps edge under 4.1 M


@dataclasses.dataclass(frozen=True)
class Imported:
    """A UNet or CNN read from a foreign graph, layer by layer.

    As UNet: map (1, n_bins, n_frames) of the magnitude -> mask of the same shape, its final sigmoid
    and scale included. As CNN: map (len(channels), n_mels, n_frames) -> the logit, a vector (1,) or
    a map (1, 1, 1).
    """

    layers: tuple[Layer, ...]
    mask_max: float | None = None  # UNet: bound of the mask that the layers guarantee, if any


@dataclasses.dataclass(frozen=True)
class Verdict:
    """From segment scores to a song's verdict (paper III-D, runner, raw-song graph)."""

    threshold: float = 0.5  # paper; AI when score >= threshold
    # Further thresholds by name, from calibration sources: "fpr1", "fpr2" and "fpr5" call 1, 2
    # and 5 % of their real tracks AI, "balanced" judges the largest share of both right.
    operating_points: tuple[tuple[str, float], ...] = ()
    # Half-width in log-odds of the band around the threshold whose tracks are "undecided".
    margin: float = 0.0
    # Paper and runner: "median"; raw-song graph: "rms"; "mean" only in converted graphs.
    aggregate: Literal["median", "rms", "mean"] = "median"
    segments: Literal["all", "first60"] = "all"  # raw-song graph: "first60"
    least_segments: int = 1  # ours, of "all": a shorter recording has overlapping ones, so many
    least_hop_s: float = 1.0  # s between the starts of those at least
    runner_segments: int = 7  # runner: evenly spaced starts
    first_s: float = 60.0  # raw-song graph: seconds read
    min_tail_s: float = 2.0  # raw-song graph: a shorter tail is dropped, a longer one zero-padded
    rms_eps: float = 1e-9  # raw-song graph: weights are rms / (sum + rms_eps)
    silence_peak: float = 10 ** (-90 / 20)  # full scale; a segment that never exceeds it is silent


@dataclasses.dataclass(frozen=True)
class Published:
    """What the authors report for the released model: figures to stand beside, never ours."""

    unet_parameters: int = 3_603_937
    cnn_parameters: int = 423_553
    f1: float = 0.9829  # unseen test partition, n = 2,263, threshold 0.5
    fpr: float = 0.0149
    auc: float = 0.997
    fpr5_threshold: float = 0.28
    cross_codec_delta: float = 0.16
    seconds_per_track: tuple[float, float] = (5.0, 10.0)  # 4-minute track, RTX 4090


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole detector."""

    preset: str
    front_end: FrontEnd = FrontEnd()
    unet: UNet | Imported = UNet()
    cnn: CNN | Imported = CNN()
    verdict: Verdict = Verdict()
    texture: Texture | None = None

    def __post_init__(self) -> None:
        """ValueError for a texture head beside a rule that takes segments of a song together."""
        if self.texture is not None and self.front_end.joint.startswith("song"):
            raise ValueError("a texture head judges segments one by one: no joint rule of a song")

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
        for key in ("unet", "cnn"):
            part = getattr(self, key)
            if isinstance(part, Imported):
                data[key]["layers"] = [layer.to_dict() for layer in part.layers]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Config:
        """Inverse of `to_dict`; ValueError naming an unknown or missing section or an unknown key.

        A key that an older file lacks takes its default.
        """
        parts: dict[str, Any] = {
            "front_end": FrontEnd,
            "unet": Imported if "layers" in data.get("unet", ()) else UNet,
            "cnn": Imported if "layers" in data.get("cnn", ()) else CNN,
            "verdict": Verdict,
        }
        if data.get("texture") is not None:
            parts["texture"] = Texture
        data = {key: value for key, value in data.items() if (key, value) != ("texture", None)}
        if set(data) != set(parts) | {"preset"}:
            raise ValueError(f"config has keys {sorted(data)}, not preset and {sorted(parts)}")
        values = {}
        for key, part in parts.items():
            names = {field.name for field in dataclasses.fields(part)}
            if unknown := sorted(set(data[key]) - names):
                raise ValueError(f"config section {key!r} has unknown keys {unknown}")
            pairs = {k: _tuples(v) for k, v in data[key].items()}
            if part is Imported:
                pairs["layers"] = tuple(map(Layer.from_dict, pairs["layers"]))
            values[key] = part(**pairs)
        return cls(preset=str(data["preset"]), **values)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def _tuples(value: Any) -> Any:
    """Lists of JSON as the tuples they were; the layers of `Imported` are read by themselves."""
    if not isinstance(value, list):
        return value
    return tuple(tuple(v) if isinstance(v, list) else v for v in value)
