"""Both networks in NumPy, and the whole detector on them: backend `numpy`, and the oracle.

One segment at a time. The dtype of the input is kept: float32 to score, float64 as the oracle of
everything else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax import dsp_numpy, texture
from artifactnet_jax.dsp_numpy import sigmoid
from artifactnet_jax.forward import Forward
from artifactnet_jax.layers import Layer
from artifactnet_jax.operators import apply, depth_to_space, evaluate, space_to_depth
from artifactnet_jax.passes import folded

if TYPE_CHECKING:
    from jaxtyping import Float

Pair = tuple[int, int]  # along H and W
Padding = tuple[Pair, Pair]  # (top, bottom), (left, right)

COLUMN_VALUES = 2**18  # of a convolution's input laid out at a time, for the caches


@functools.cache
def _erfcx_series(degree: int) -> np.ndarray:
    """Chebyshev series of erfc(x) exp(x^2), 0 <= x <= 6, in (16 / (2 + x) - 5) / 3."""

    def scaled(t: np.ndarray) -> np.ndarray:
        return np.array([math.erfc(x) * math.exp(x * x) for x in 16 / (3 * t + 5) - 2])

    return np.polynomial.chebyshev.chebinterpolate(scaled, degree)


def erf(x: np.ndarray) -> np.ndarray:
    """Error function, to about the precision of the dtype; NumPy has none."""
    size: np.ndarray = np.minimum(np.abs(x), 6)
    series = _erfcx_series(9 if x.dtype == np.float32 else 19).astype(x.dtype)
    tail = np.polynomial.chebyshev.chebval((16 / (2 + size) - 5) / 3, series)
    signed: np.ndarray = np.copysign(1 - tail * np.exp(-size * size), x)
    return signed


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)) that never overflows."""
    out: np.ndarray = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    return out


def _gelu(x: np.ndarray, approximate: str) -> Any:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))


def _expm1(x: np.ndarray) -> Any:
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
    x: Float[np.ndarray, "H W C"],
    kernel: Float[np.ndarray, "kh kw I O"],
    bias: Float[np.ndarray, " O"] | None = None,
    strides: Pair = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    dilations: Pair = (1, 1),
    groups: int = 1,
) -> Float[np.ndarray, "H2 W2 O"]:
    """Convolution with zero padding; I = C / groups.

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
        out: np.ndarray = x[::sh, ::sw] @ kernel[0, 0]
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


def _patch_conv(
    x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None, strides: Pair, padding: Padding
) -> np.ndarray:
    """Convolution whose kernel is a multiple of its stride: one of stride 1 over patches."""
    (kh, kw, i, o), (sh, sw) = kernel.shape, strides
    x = np.pad(x, (*padding, (0, 0)))
    x = space_to_depth(x[: len(x) // sh * sh, : x.shape[1] // sw * sw], sh, sw)
    kernel = kernel.reshape(kh // sh, sh, kw // sw, sw, i, o).transpose(0, 2, 1, 3, 4, 5)
    kernel = kernel.reshape(kh // sh, kw // sw, sh * sw * i, o)
    rows, cols = x.shape[0] - kh // sh + 1, x.shape[1] - kw // sw + 1
    out = np.zeros(o, x.dtype) if bias is None else bias
    for r in range(kh // sh):
        for c in range(kw // sw):
            out = out + x[r : r + rows, c : c + cols] @ kernel[r, c]
    return out


def _grouped_conv(
    x: np.ndarray,
    kernel: np.ndarray,
    bias: np.ndarray | None,
    strides: Pair,
    padding: Padding,
    dilations: Pair,
    groups: int,
) -> np.ndarray:
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
    x: Float[np.ndarray, "H W I"],
    kernel: Float[np.ndarray, "kh kw I O"],
    bias: Float[np.ndarray, " O"] | None = None,
    strides: Pair = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    output_padding: Pair = (0, 0),
) -> Float[np.ndarray, "H2 W2 O"]:
    """Transposed convolution; see `layers`."""
    (h, w, i), (kh, kw, _, o), (sh, sw) = x.shape, kernel.shape, strides
    (top, bottom), (left, right) = padding
    stamps: np.ndarray = x @ kernel.transpose(2, 0, 1, 3).reshape(i, kh * kw * o)
    out: np.ndarray
    if (kh, kw) == (sh, sw) and not any((top, bottom, left, right, *output_padding)):
        out = depth_to_space(stamps, kh, kw, "DCR")  # the stamps do not overlap
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
    layers: tuple[Layer, ...],
    tensors: Mapping[str, np.ndarray],
    x: np.ndarray,
    prefix: str = "",
) -> np.ndarray:
    """Run a network on one example: [H, W, C] or [C] -> its output in the same layout.

    `tensors` by `prefix` + "layer.leaf", in the dtype of x.
    """

    def compute(layer: Layer, inputs: list[Any], spare: bool) -> Any:
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
        return apply(layer, inputs, own, np)

    # The logarithm of an empty bin is -inf in the graph too, which then clips it.
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        out: np.ndarray = evaluate(layers, x, compute)
    return out


class NumpyNetwork(Forward):
    """The detector in NumPy: the stages of `Forward` for one segment, folded, in any float dtype.

    `stft` may be a `dsp_numpy.StreamStft`.
    """

    lib = dsp_numpy

    def __init__(
        self, config: cfg.Config, tensors: Mapping[str, np.ndarray], dtype: Any = np.float32
    ):
        self.config = config
        self.stft = dsp_numpy.stft_magnitude
        self.networks, self.tensors = folded(config, tensors, dtype)
        self.window, self.mel = (tensors.get(f"front_end.{name}") for name in ("window", "mel"))

    def mask(self, magnitude: Float[np.ndarray, "F T"]) -> Float[np.ndarray, "F T"]:
        """Magnitude -> mask in [0, mask_max]."""
        mask = run(self.networks["unet"], self.tensors, magnitude[..., None], "unet.")
        return mask[..., 0]

    def classify(
        self, channels: Float[np.ndarray, "C M T"], rngs: None = None
    ) -> Float[np.ndarray, ""]:
        """Channels -> the CNN's logit; there is no training here."""
        x = np.ascontiguousarray(np.moveaxis(channels, 0, -1))
        return run(self.networks["cnn"], self.tensors, x, "cnn.").reshape(())

    def texture_head(self, statistics: Float[np.ndarray, " K"]) -> Float[np.ndarray, ""]:
        """Statistics -> what is added to the CNN's logit."""
        assert self.config.texture is not None
        logit: np.ndarray = texture.logit(statistics, self.config.texture, self.tensors, dsp_numpy)
        return logit

    def __call__(self, audio: Float[np.ndarray, " N"]) -> Float[Any, ""]:
        """P(AI) of one segment by itself, in [0, 1]."""
        return sigmoid(self.logit(audio))
