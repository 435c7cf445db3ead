"""The whole pipeline in NumPy: DSP, network and the `numpy` backend's forward pass. No jax.

The same maths as `artifactnet_jax.dsp` and `artifactnet_jax.model`, one segment at a time. The
dtype of the input is kept: float32 to score, float64 as the oracle of everything else. Batch norm
of the presets is folded into the convolutions once, in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax import layers as nets
from artifactnet_jax import texture
from artifactnet_jax.filterbank import analysis_window, mel_filterbank
from artifactnet_jax.kernels import median_filter

FFT_SAMPLES = 2**16  # at a time: they and their spectra fit the L2 cache, at twice the speed

COLUMN_VALUES = 2**18  # of a convolution's input laid out at a time, for the caches too


def stft_magnitude(
    audio: np.ndarray, front_end: cfg.FrontEnd, window: np.ndarray | None = None
) -> np.ndarray:
    """Spectrogram: [N] -> [n_bins, n_frames]; `window` [n_fft] is that of window "given"."""
    return _magnitude(_frames(audio, front_end), front_end, window)


class StreamStft:
    """`stft_magnitude` for overlapping windows of one stream, the same bits.

    Set `start`, the position in the stream of the window's first sample, before each window. Frames
    that lie whole in both this window and the one before are taken over, if the windows are a
    multiple of the hop apart; those that hold mirrored samples at an edge are of one window only.
    """

    def __init__(self) -> None:
        self.start = 0
        self._last: dict[cfg.FrontEnd, tuple[int, np.ndarray]] = {}

    def __call__(
        self, audio: np.ndarray, front_end: cfg.FrontEnd, window: np.ndarray | None = None
    ) -> np.ndarray:
        """As `stft_magnitude`, of the window at `start`; N and `window` never change."""
        frames = _frames(audio, front_end)
        hop, pad = front_end.hop, front_end.stft_pad
        first = -(-pad // hop)  # frames before it, and from `end` on, reach beyond the window
        end = (len(audio) + pad - front_end.n_fft) // hop + 1
        start, known = self._last.get(front_end, (self.start, None))
        shift, rest = divmod(self.start - start, hop)
        if known is None or rest or not 0 < shift < end - first:
            out = _magnitude(frames, front_end, window)
        else:
            kept = known[:, first + shift : end]
            before = _magnitude(frames[:first], front_end, window)
            after = _magnitude(frames[end - shift :], front_end, window)
            out = np.concatenate([before, kept, after], axis=1)
        self._last[front_end] = self.start, out
        return out


def _frames(audio: np.ndarray, front_end: cfg.FrontEnd) -> np.ndarray:
    """Frames of a segment [n_frames, n_fft], as a view of it and its padding."""
    padded = np.pad(audio, front_end.stft_pad, mode=front_end.stft_edge)
    return np.lib.stride_tricks.sliding_window_view(padded, front_end.n_fft)[:: front_end.hop]


def _magnitude(
    frames: np.ndarray, front_end: cfg.FrontEnd, window: np.ndarray | None
) -> np.ndarray:
    """Frames [n, n_fft], each by itself -> [n_bins, n]."""
    window = analysis_window(front_end) if window is None else window
    window = window.astype(frames.dtype)
    power = np.empty((front_end.n_bins, len(frames)), frames.dtype)
    step = max(1, FFT_SAMPLES // front_end.n_fft)
    for k in range(0, len(frames), step):
        parts = np.fft.rfft(frames[k : k + step] * window).view(frames.dtype)
        parts *= parts
        np.add(parts[:, ::2].T, parts[:, 1::2].T, out=power[:, k : k + step])
    if front_end.spectrum_eps:
        power += frames.dtype.type(front_end.spectrum_eps)
    magnitude = np.sqrt(power, out=power)
    if front_end.spectrum_scale != 1:
        magnitude *= frames.dtype.type(front_end.spectrum_scale)
    return power_of(magnitude, front_end.spectrum_power)


def power_of(x: np.ndarray, power: float) -> np.ndarray:
    """x**power; a whole power takes products, not logarithms."""
    return x ** (int(power) if float(power).is_integer() else power)


def running_median(x: np.ndarray, width: int, axis: int, edge: str) -> np.ndarray:
    """Median of `width` samples along an axis that goes on as `edge` says; same shape."""
    if edge == "reflect":
        return median_filter(x, width, axis=axis)
    half = [(width // 2, width // 2) if k == axis else (0, 0) for k in range(x.ndim)]
    wide = median_filter(np.pad(x, half, mode=edge), width, axis=axis)  # type: ignore[call-overload]
    inner = slice(width // 2, width // 2 + x.shape[axis])
    return wide[tuple(inner if k == axis else slice(None) for k in range(x.ndim))]


def hpss(residual: np.ndarray, front_end: cfg.FrontEnd) -> tuple[np.ndarray, np.ndarray]:
    """Harmonic and percussive parts of a magnitude: [F, T] -> two [F, T]."""
    edge, power = front_end.hpss_edge, front_end.hpss_power
    h = power_of(running_median(residual, front_end.hpss_width, 1, edge), power)
    p = power_of(running_median(residual, front_end.percussive_width, 0, edge), power)
    total = h + p + residual.dtype.type(front_end.hpss_eps)
    share = np.zeros_like(residual)  # a part is exactly 0 where both medians are 0
    np.divide(h, total, out=share, where=total > 0)
    harmonic = residual * share
    share[:] = 0
    np.divide(p, total, out=share, where=total > 0)
    return harmonic, residual * share


def mel_db(
    magnitude: np.ndarray, front_end: cfg.FrontEnd, mel: np.ndarray | None = None
) -> np.ndarray:
    """Mel power in dB: [F, T] -> [n_mels, T], floored by `amin`, no top-dB clamp.

    `mel` [n_mels, n_bins] is that of mel_scale "given".
    """
    mel = mel_filterbank(front_end) if mel is None else mel
    bands = mel.astype(magnitude.dtype) @ power_of(magnitude, front_end.mel_power)
    amin = magnitude.dtype.type(front_end.amin)
    floored = np.maximum(bands, amin) if front_end.amin_rule == "max" else bands + amin
    return magnitude.dtype.type(front_end.db_factor) * np.log10(floored)


def delta(x: np.ndarray) -> np.ndarray:
    """First difference along the last axis with a zero first frame: [..., T] -> [..., T]."""
    return np.diff(x, axis=-1, prepend=x[..., :1])


def mel_views(
    residual: np.ndarray, front_end: cfg.FrontEnd, mel: np.ndarray | None = None
) -> np.ndarray:
    """Residual [F, T] -> dB of residual, harmonic, percussive part [3, n_mels, T], no clamp."""
    parts = (residual, *hpss(residual, front_end))
    return np.stack([mel_db(part, front_end, mel) for part in parts])


def loudest(views: np.ndarray, front_end: cfg.FrontEnd) -> np.ndarray:
    """What `channels` clamps below, for a segment by itself: views [3, n_mels, T] -> dB [3]."""
    peaks = views.max(axis=(1, 2))
    return peaks if front_end.joint.endswith("view") else np.full_like(peaks, peaks.max())


def channels(views: np.ndarray, front_end: cfg.FrontEnd, peaks: np.ndarray) -> np.ndarray:
    """Views [3, n_mels, T] and their maxima [3] -> features [C, n_mels, T] (paper, Table I)."""
    if front_end.top_db is not None:
        floor = peaks - views.dtype.type(front_end.top_db)
        views = np.maximum(views, floor[:, None, None])
    mel_res, mel_h, mel_p = views
    d = delta(mel_res)
    named = {
        "mel_res": lambda: mel_res,
        "mel_H": lambda: mel_h,
        "mel_P": lambda: mel_p,
        "delta": lambda: d,
        "delta2": lambda: delta(d),
        "ratio": lambda: mel_h - mel_p,
        "flux": lambda: np.abs(d),
    }
    return np.stack([named[name]() for name in front_end.channels])


def seven_channels(
    residual: np.ndarray, front_end: cfg.FrontEnd, mel: np.ndarray | None = None
) -> np.ndarray:
    """Forensic features of one segment: residual magnitude [F, T] -> [C, n_mels, T]."""
    views = mel_views(residual, front_end, mel)
    return channels(views, front_end, loudest(views, front_end))


def effective_bandwidth(energy: np.ndarray, rate: int) -> float:
    """Smallest upper bound in Hz with 95 % of the energy [bins, 0 Hz to rate / 2]; 0 of none.

    Of a residual's energy it is the figure of the paper's appendix C.
    """
    total = np.cumsum(energy, dtype=np.float64)
    if not total[-1]:
        return 0.0
    return float(np.searchsorted(total, 0.95 * total[-1])) * rate / 2 / (len(energy) - 1)


def texture_statistics(
    audio: np.ndarray,
    magnitude: np.ndarray,
    config: cfg.Config,
    stft: Callable[..., np.ndarray] = stft_magnitude,
) -> np.ndarray:
    """What the texture head reads [K]: audio [N], its magnitude [n_bins, n_frames]."""
    head, rate = config.texture, config.front_end.sample_rate
    assert head is not None
    spectrograms = texture.spectrograms(audio, magnitude, config, stft)
    return np.concatenate([texture.statistics(m, n, head, rate) for n, m in spectrograms])


def texture_logit(
    audio: np.ndarray,
    magnitude: np.ndarray,
    config: cfg.Config,
    tensors: Mapping[str, np.ndarray],
    stft: Callable[..., np.ndarray] = stft_magnitude,
) -> np.ndarray:
    """What the texture head adds to the CNN's logit: audio [N], its magnitude -> scalar array."""
    assert config.texture is not None
    statistics = texture_statistics(audio, magnitude, config, stft)
    return texture.logit(statistics, config.texture, tensors)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function that never overflows; same shape and dtype."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


@functools.cache
def _erfcx_series(degree: int) -> np.ndarray:
    """Chebyshev series of erfc(x) exp(x^2), 0 <= x <= 6, in (16 / (2 + x) - 5) / 3."""

    def scaled(t: np.ndarray) -> np.ndarray:
        return np.array([math.erfc(x) * math.exp(x * x) for x in 16 / (3 * t + 5) - 2])

    return np.polynomial.chebyshev.chebinterpolate(scaled, degree)


def erf(x: np.ndarray) -> np.ndarray:
    """Error function, to about the precision of the dtype; NumPy has none."""
    size = np.minimum(np.abs(x), 6)
    series = _erfcx_series(9 if x.dtype == np.float32 else 19).astype(x.dtype)
    tail = np.polynomial.chebyshev.chebval((16 / (2 + size) - 5) / 3, series)
    return np.copysign(1 - tail * np.exp(-size * size), x)


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)) that never overflows."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _gelu(x: np.ndarray, approximate: str) -> np.ndarray:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))


def _expm1(x: np.ndarray) -> np.ndarray:
    return np.expm1(np.minimum(x, 0))  # without overflow where the result is not used


# By operator: (x, **attributes) -> array of the same shape.
ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "softplus": softplus,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "mish": lambda x: x * np.tanh(softplus(x)),
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "reciprocal": lambda x: 1 / x,
    "abs": np.abs,
    "neg": np.negative,
    "erf": erf,
    "leaky_relu": lambda x, alpha: np.where(x >= 0, x, alpha * x),
    "elu": lambda x, alpha: np.where(x > 0, x, alpha * _expm1(x)),
    "celu": lambda x, alpha: np.maximum(x, 0) + np.minimum(alpha * _expm1(x / alpha), 0),
    "selu": lambda x, alpha, gamma: gamma * np.where(x > 0, x, alpha * _expm1(x)),
    "hard_sigmoid": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
    "gelu": _gelu,
}


def conv(
    x: np.ndarray,
    kernel: np.ndarray,
    bias: np.ndarray | None = None,
    strides: tuple[int, int] = (1, 1),
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
    dilations: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> np.ndarray:
    """Convolution with zero padding: [H, W, I], [kh, kw, I / groups, O] -> [H', W', O].

    The columns of the window are laid side by side, some rows at a time; each row of the window is
    then one matrix product over a slice (a contiguous one where the stride is 1), so that BLAS does
    all the work without an im2col of the whole window.
    """
    h, w, i = x.shape
    kh, kw, _, o = kernel.shape
    (top, bottom), (left, right) = padding
    (sh, sw), (dh, dw) = strides, dilations
    if groups > 1:
        return _grouped_conv(x, kernel, bias, strides, padding, dilations, groups)
    if (kh, kw) == (1, 1) and not any((top, bottom, left, right)):
        out = x[::sh, ::sw] @ kernel[0, 0]
        return out if bias is None else out + bias
    if (sh, sw) != (1, 1) and kh % sh == 0 == kw % sw and (dh, dw) == (1, 1):
        return _patch_conv(x, kernel, bias, strides, padding)
    rows, cols = (
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in ((h, kh, sh, padding[0], dh), (w, kw, sw, padding[1], dw))
    )
    span = (kh - 1) * dh + 1
    step = min(rows, max(1, COLUMN_VALUES // (cols * kw * i)))
    columns = np.zeros(((step - 1) * sh + span, cols, kw, i), x.dtype)
    out = np.empty((rows, cols, o), x.dtype)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        offset = start * sh - top  # row of x that is row 0 of the columns
        height = (count - 1) * sh + span
        low, high = max(offset, 0), max(min(offset + height, h), offset, 0)
        columns[: low - offset] = 0
        columns[high - offset : height] = 0
        for k in range(kw):
            shift = k * dw - left  # column of x under the window's column k, at output column 0
            first = max(0, -(shift // sw))
            last = min(cols, (w - 1 - shift) // sw + 1)
            if first < last:
                source = slice(shift + first * sw, shift + (last - 1) * sw + 1, sw)
                columns[low - offset : high - offset, first:last, k] = x[low:high, source]
        target = out[start : start + count].reshape(count * cols, o)
        for k in range(kh):
            window = columns[k * dh : k * dh + (count - 1) * sh + 1 : sh]
            window = window.reshape(count * cols, kw * i)
            if k == 0:
                np.matmul(window, kernel[k].reshape(kw * i, o), out=target)
            else:
                target += window @ kernel[k].reshape(kw * i, o)
        if bias is not None:
            target += bias
    return out


def _patch_conv(x, kernel, bias, strides, padding) -> np.ndarray:
    """Convolution whose kernel is a multiple of its stride: one of stride 1 over patches."""
    (kh, kw, i, o), (sh, sw) = kernel.shape, strides
    x = np.pad(x, (*padding, (0, 0)))
    x = nets.patches(x[: len(x) // sh * sh, : x.shape[1] // sw * sw], sh, sw)
    kernel = kernel.reshape(kh // sh, sh, kw // sw, sw, i, o).transpose(0, 2, 1, 3, 4, 5)
    kernel = kernel.reshape(kh // sh, kw // sw, sh * sw * i, o)
    rows, cols = x.shape[0] - kh // sh + 1, x.shape[1] - kw // sw + 1
    out = np.zeros(o, x.dtype) if bias is None else bias
    for r in range(kh // sh):
        for c in range(kw // sw):
            out = out + x[r : r + rows, c : c + cols] @ kernel[r, c]
    return out


def _grouped_conv(x, kernel, bias, strides, padding, dilations, groups) -> np.ndarray:
    """Depthwise ones tap by tap, others group by group."""
    kh, kw, i, o = kernel.shape
    if i > 1 or o != groups:
        each = o // groups
        parts = [
            conv(
                x[..., g * i : (g + 1) * i],
                kernel[..., g * each : (g + 1) * each],
                None,
                strides,
                padding,
                dilations,
            )
            for g in range(groups)
        ]
        out = np.concatenate(parts, axis=-1)
    else:
        (sh, sw), (dh, dw) = strides, dilations
        x = np.pad(x, (*padding, (0, 0)))
        rows, cols = (x.shape[0] - dh * (kh - 1) - 1) // sh, (x.shape[1] - dw * (kw - 1) - 1) // sw
        out = np.zeros((rows + 1, cols + 1, o), x.dtype)
        for r in range(kh):
            for c in range(kw):
                a, b = r * dh, c * dw
                taps = x[a : a + rows * sh + 1 : sh, b : b + cols * sw + 1 : sw]
                out += taps * kernel[r, c, 0]
    return out if bias is None else out + bias


def conv_transpose(
    x: np.ndarray,
    kernel: np.ndarray,
    bias: np.ndarray | None = None,
    strides: tuple[int, int] = (1, 1),
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
    output_padding: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """Transposed convolution: [H, W, I], [kh, kw, I, O] -> [H', W', O]; see `layers`."""
    (h, w, i), (kh, kw, _, o), (sh, sw) = x.shape, kernel.shape, strides
    (top, bottom), (left, right) = padding
    stamps = x @ kernel.transpose(2, 0, 1, 3).reshape(i, kh * kw * o)
    if (kh, kw) == (sh, sw) and not any((top, bottom, left, right, *output_padding)):
        out = nets.rearrange(stamps, kh, kw, "DCR")  # the stamps do not overlap
    else:
        stamps = stamps.reshape(h, w, kh, kw, o)
        tall, wide = sh * (h - 1) + kh, sw * (w - 1) + kw
        full = np.zeros((tall + output_padding[0], wide + output_padding[1], o), x.dtype)
        for r in range(kh):
            for c in range(kw):
                full[r : r + sh * h : sh, c : c + sw * w : sw][:h, :w] += stamps[:, :, r, c]
        out = full[top : len(full) - bottom, left : full.shape[1] - right]
    return out if bias is None else out + bias


def run(
    layers: tuple[nets.Layer, ...],
    tensors: Mapping[str, np.ndarray],
    x: np.ndarray,
    prefix: str = "",
) -> np.ndarray:
    """Run a network on one example: [H, W, C] or [C] -> its output in the same layout.

    `tensors` by `prefix` + "layer.leaf", in the dtype of x.
    """

    def compute(layer: nets.Layer, inputs: list[Any], spare: bool) -> np.ndarray:
        x, attrs = inputs[0], layer.attrs
        own: dict[str, Any] = {
            leaf: tensors[f"{prefix}{layer.name}.{leaf}"] for leaf, _ in layer.tensors
        }
        if layer.op == "conv":
            return conv(x, **own, **attrs)
        if layer.op == "conv_transpose":
            return conv_transpose(x, **own, **attrs)
        if layer.op == "linear":
            out = x @ own["kernel"]
            return out + own["bias"] if "bias" in own else out
        if spare and layer.op == "relu":
            return np.maximum(x, 0, out=x)
        if spare and layer.op == "add" and len(inputs) == 2 and x.shape == inputs[1].shape:
            return np.add(x, inputs[1], out=x)
        if layer.op in ELEMENTWISE:
            return ELEMENTWISE[layer.op](x, **attrs)
        return nets.apply(layer, inputs, own, np)

    # The logarithm of an empty bin is -inf in the graph too, which then clips it.
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return nets.evaluate(layers, x, compute)


class Network:
    """The whole detector over a config's layers; a method per stage, as `model.ArtifactNet` has.

    `stft` is how spectrograms are taken: `stft_magnitude`, or a `StreamStft`.
    """

    def __init__(self, config: cfg.Config, tensors: Mapping[str, np.ndarray], dtype=np.float32):
        self.config = config
        self.stft: Callable[..., np.ndarray] = stft_magnitude
        self.unet, self.cnn = nets.preset_layers(config)
        self.tensors = nets.preset_tensors(config, tensors, dtype)
        self.window, self.mel = (tensors.get(f"front_end.{name}") for name in ("window", "mel"))

    def magnitude(self, audio: np.ndarray) -> np.ndarray:
        """Audio [N] -> magnitude [n_bins, n_frames]."""
        return self.stft(audio, self.config.front_end, self.window)

    def mask(self, magnitude: np.ndarray) -> np.ndarray:
        """Magnitude [n_bins, n_frames] -> mask in [0, mask_max], same shape."""
        return run(self.unet, self.tensors, magnitude[..., None], "unet.")[..., 0]

    def views(self, residual: np.ndarray) -> np.ndarray:
        """Residual magnitude [n_bins, n_frames] -> dB of its three views [3, n_mels, T]."""
        return mel_views(residual, self.config.front_end, self.mel)

    def classify(self, views: np.ndarray, loudest: np.ndarray) -> np.ndarray:
        """Views and the maxima to clamp below [3] (see `loudest`) -> logit, a scalar array."""
        return self.logit(channels(views, self.config.front_end, loudest))

    def logit(self, channels: np.ndarray) -> np.ndarray:
        """Channels [C, n_mels, T] -> logit, a scalar array."""
        x = np.ascontiguousarray(np.moveaxis(channels, 0, -1))
        return run(self.cnn, self.tensors, x, "cnn.").reshape(())

    def texture(self, audio: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        """What the texture head adds to the CNN's logit: audio, its magnitude -> scalar array.

        0 where there is no such head.
        """
        if self.config.texture is None:
            return np.zeros((), audio.dtype)
        return texture_logit(audio, magnitude, self.config, self.tensors, self.stft)

    def segment_views(self, audio: np.ndarray) -> np.ndarray:
        """Audio [N] -> `views` of its residual."""
        magnitude = self.magnitude(audio)
        return self.views(self.mask(magnitude) * magnitude)

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """P(AI) of one segment by itself: audio [N] -> scalar array in [0, 1]."""
        magnitude = self.magnitude(audio)
        views = self.views(self.mask(magnitude) * magnitude)
        logit = self.classify(views, loudest(views, self.config.front_end))
        return sigmoid(logit + self.texture(audio, magnitude))
