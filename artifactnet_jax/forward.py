"""From audio to a logit, once for both array libraries and for every reader of a stage.

magnitude -> mask -> residual -> parts (residual, H, P) -> mel dB of each -> channels -> logit, to
which the texture head adds its own. `numpy_network` and `model` bring the networks. `dsp_numpy` and
`dsp_jax` bring the functions in which the array libraries really differ. Two things stay apart on
purpose: the statistics of `texture` and `texture_xla` are two algorithms, and `convert.export`
writes these stages as nodes of a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from artifactnet_jax import config as cfg
from artifactnet_jax.filterbank import mel_filterbank
from artifactnet_jax.kernels import median_filter
from artifactnet_jax.texture import spectrograms

if TYPE_CHECKING:
    from jaxtyping import Float

STAGES = ("magnitude", "mask", "residual", "H", "P", "views", "channels", "logit")


class Forward:
    """The way from audio to a logit, for one segment [N] or a batch [B, N].

    A subclass brings `config`; `lib`, the functions of its array library; `stft`, how spectrograms
    are taken; `window` and `mel`, None or what a foreign graph gives; and the networks `mask`,
    `classify` and `texture_head`.
    """

    config: cfg.Config
    lib: Any
    stft: Callable[..., Any]
    window: Any = None
    mel: Any = None

    def mask(self, magnitude: Float[Any, "*b F T"]) -> Float[Any, "*b F T"]:
        """Magnitude -> mask in [0, mask_max]."""
        raise NotImplementedError

    def classify(self, channels: Float[Any, "*b C M T"], rngs: Any = None) -> Float[Any, "*b"]:
        """Channels -> the CNN's logit; `rngs` gives the dropout key in training."""
        raise NotImplementedError

    def texture_head(self, statistics: Float[Any, "*b K"]) -> Float[Any, "*b"]:
        """Statistics -> what is added to the CNN's logit."""
        raise NotImplementedError

    def magnitude(self, audio: Float[Any, "*b N"]) -> Float[Any, "*b F T"]:
        """Audio -> magnitude."""
        fe = self.config.front_end
        if fe.level == "none" and not fe.centred:
            return self.stft(audio, fe, self.window)
        # By the library's own function: windows of a stream that differ in level share no frames.
        return self.lib.stft_magnitude(levelled(audio, fe, self.lib.xp), fe, self.window)

    def medians(
        self, residual: Float[Any, "*b F T"]
    ) -> tuple[Float[Any, "*b F T"], Float[Any, "*b F T"]]:
        """Residual -> its running medians along time and along frequency."""
        fe, xp = self.config.front_end, self.lib.xp
        time, frequency = residual.ndim - 1, residual.ndim - 2
        along_time = running_median(residual, fe.hpss_width, time, fe.hpss_edge, xp)
        return along_time, running_median(
            residual, fe.percussive_width, frequency, fe.hpss_edge, xp
        )

    def parts(
        self, residual: Float[Any, "*b F T"], medians: tuple[Any, Any] | None = None
    ) -> Float[Any, "*b 3 F T"]:
        """Residual -> residual, H and P (paper III-C).

        H and P are exactly 0 where both medians are 0 and there is no eps.
        """
        h, p = self.medians(residual) if medians is None else medians
        masks = self.lib.soft_masks(h, p, self.config.front_end)
        return self.lib.xp.stack([residual, *(residual * mask for mask in masks)], axis=-3)

    def mel_db(self, parts: Float[Any, "*b F T"]) -> Float[Any, "*b M T"]:
        """Magnitudes -> power in mel bands, in dB; no top-dB clamp."""
        fe, xp = self.config.front_end, self.lib.xp
        mel = mel_filterbank(fe) if self.mel is None else self.mel
        powers = to_power(parts, fe.mel_power, xp)
        bands = self.lib.mel_bands(xp.asarray(mel, powers.dtype), powers)
        amin = bands.dtype.type(fe.amin)
        floored = xp.maximum(bands, amin) if fe.amin_rule == "max" else bands + amin
        return bands.dtype.type(fe.db_factor) * xp.log10(floored)

    def reference_db(self, mel_db: Float[Any, "*b 3 M T"]) -> Float[Any, "*b 3"]:
        """The maxima in dB that `channels` clamps below, of each segment by itself."""
        peaks, xp = mel_db.max(axis=(-2, -1)), self.lib.xp
        if self.config.front_end.joint.endswith("view"):
            return peaks
        return xp.broadcast_to(peaks.max(axis=-1, keepdims=True), peaks.shape)

    def channels(
        self, mel_db: Float[Any, "*b 3 M T"], reference_db: Float[Any, "*b 3"]
    ) -> Float[Any, "*b C M T"]:
        """Mel dB and the maxima to clamp below -> features (paper, Table I)."""
        fe, xp = self.config.front_end, self.lib.xp
        if fe.top_db is not None:
            floor = reference_db - mel_db.dtype.type(fe.top_db)
            mel_db = xp.maximum(mel_db, floor[..., None, None])
        mel_res, mel_h, mel_p = (mel_db[..., k, :, :] for k in range(3))
        d = delta(mel_res, xp)
        named = {
            "mel_res": lambda: mel_res,
            "mel_H": lambda: mel_h,
            "mel_P": lambda: mel_p,
            "delta": lambda: d,
            "delta2": lambda: delta(d, xp),
            "ratio": lambda: mel_h - mel_p,
            "flux": lambda: xp.abs(d),
        }
        return xp.stack([named[name]() for name in fe.channels], axis=-3)

    def segment_db(self, magnitude: Float[Any, "*b F T"]) -> Float[Any, "*b 3 M T"]:
        """Magnitude -> mel dB of residual, H and P."""
        return self.mel_db(self.parts(self.mask(magnitude) * magnitude))

    def logit_of_db(
        self, mel_db: Float[Any, "*b 3 M T"], reference_db: Any = None, rngs: Any = None
    ) -> Float[Any, "*b"]:
        """Mel dB of residual, H and P -> the CNN's logit.

        `reference_db` [..., 3] are the maxima to clamp below, by default each segment's own.
        """
        own = self.reference_db(mel_db) if reference_db is None else reference_db
        return self.classify(self.channels(mel_db, own), rngs)

    def texture_logit(
        self, audio: Float[Any, "*b N"], magnitude: Float[Any, "*b F T"]
    ) -> Float[Any, "*b"]:
        """What the texture head adds to the CNN's logit; 0 without such a head."""
        if self.config.texture is None:
            return self.lib.xp.zeros(magnitude.shape[:-2], magnitude.dtype)
        statistics = texture_statistics(audio, magnitude, self.config, self.lib, self.stft)
        return self.texture_head(statistics)

    def stages(self, audio: Float[Any, "*b N"], rngs: Any = None) -> dict[str, Any]:
        """Every stage of segments scored by themselves: `STAGES`, and what the logit is the sum of.

        magnitude, mask, residual, H, P [..., F, T]; views [..., 3, n_mels, T], in dB before the
        clamp; channels [..., C, n_mels, T]; logit, network_logit, texture_logit [...]. Under jit a
        stage that is not used costs nothing.
        """
        magnitude = self.magnitude(audio)
        mask = self.mask(magnitude)
        residual = mask * magnitude
        parts = self.parts(residual)
        mel_db = self.mel_db(parts)
        channels = self.channels(mel_db, self.reference_db(mel_db))
        own, added = self.classify(channels, rngs), self.texture_logit(audio, magnitude)
        h, p = parts[..., 1, :, :], parts[..., 2, :, :]
        values = (magnitude, mask, residual, h, p, mel_db, channels, own + added)
        return dict(zip(STAGES, values, strict=True)) | {
            "network_logit": own,
            "texture_logit": added,
        }

    def logit(self, audio: Float[Any, "*b N"], rngs: Any = None) -> Float[Any, "*b"]:
        """Audio -> logit of P(AI)."""
        return self.stages(audio, rngs)["logit"]


def levelled(audio: Float[Any, "*b N"], fe: cfg.FrontEnd, xp: Any) -> Float[Any, "*b N"]:
    """Segments as their spectrum is taken of: `FrontEnd.centred`, and divided by `FrontEnd.level`.

    Digital silence, which has no level, stays as it is.
    """
    if fe.centred:
        audio = audio - audio.mean(axis=-1, keepdims=True)
    if fe.level == "none":
        return audio
    eps = audio.dtype.type(fe.level_eps)
    if fe.level == "peak":
        square = None
        level = xp.abs(audio).max(axis=-1, keepdims=True)
    else:
        square = (audio * audio).mean(axis=-1, keepdims=True)
        level = xp.sqrt(square)
    if fe.level_rule == "root":
        level = xp.sqrt((level * level if square is None else square) + eps)
    else:
        level = level + eps if fe.level_rule == "add" else xp.maximum(level, eps)
    return audio / xp.where(level > 0, level, xp.ones_like(level))


def running_median(
    x: Float[Any, "*d"], width: int, axis: int, edge: str, xp: Any
) -> Float[Any, "*d"]:
    """Median of `width` samples along an axis that goes on as `edge` says."""
    if edge == "reflect":
        return median_filter(x, width, axis=axis)
    half = [(width // 2, width // 2) if k == axis else (0, 0) for k in range(x.ndim)]
    wide = median_filter(xp.pad(x, half, mode=edge), width, axis=axis)
    inner = slice(width // 2, width // 2 + x.shape[axis])
    return wide[tuple(inner if k == axis else slice(None) for k in range(x.ndim))]


def to_power(x: Float[Any, "*d"], exponent: float, xp: Any) -> Float[Any, "*d"]:
    """x**exponent for x >= 0. A whole exponent takes products; others have slope 0 at 0."""
    if float(exponent).is_integer():
        return x ** int(exponent)
    empty = x <= 0
    return xp.where(empty, xp.zeros_like(x), xp.where(empty, xp.ones_like(x), x) ** exponent)


def delta(x: Float[Any, "*d T"], xp: Any) -> Float[Any, "*d T"]:
    """First difference along the last axis; that of its first sample is 0."""
    return xp.concatenate([xp.zeros_like(x[..., :1]), x[..., 1:] - x[..., :-1]], axis=-1)


def texture_statistics(
    audio: Float[Any, "*b N"],
    magnitude: Float[Any, "*b F T"],
    config: cfg.Config,
    lib: Any,
    stft: Callable[..., Any] | None = None,
) -> Float[Any, "*b K"]:
    """What the texture head reads, of audio and its magnitude.

    `lib` is `dsp_numpy` or `dsp_jax`; `stft` is how spectrograms are taken, by default the lib's.
    """
    head, rate = config.texture, config.front_end.sample_rate
    found = spectrograms(audio, magnitude, config, stft or lib.stft_magnitude)
    return lib.statistics(found, head, rate)
