"""ONNX operators of signals: resizing, spectra, and what `simplify` puts in for slower nodes."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from artifactnet_jax.convert.node_call import DTYPES, Call, Operator, cut
from artifactnet_jax.kernels import median_filter

MEDIAN, DFT = "artifactnet.Median", "artifactnet.DFT"  # operators that `simplify` puts in

# --- Resizing -----------------------------------------------------------------------------------


def _resize(op: Call, x: Any, *more: Any) -> Any:
    x = op.array(x)
    roi = sizes = None
    if op.node.op == "Upsample":
        scales = np.asarray(op.get("scales"), np.float32) if not more else more[0]
    elif op.opset < 11:
        scales = more[0]
    else:
        roi, scales, sizes, *_ = (*more, None, None, None)
    if op.get("antialias", 0):
        raise op.unsupported("antialias", "export the model with antialias=False and verify it")
    places = op.axes(op.get("axes", tuple(range(x.ndim))), x.ndim)
    if sizes is not None and sizes.size:
        targets = op.ints(sizes, "its size")
        factors = [np.float32(t / x.shape[a]) for t, a in zip(targets, places, strict=True)]
        policy = op.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            factor = (min if policy == "not_larger" else max)(factors)
            factors = [factor] * len(factors)
            targets = [math.floor(factor * x.shape[a] + 0.5) for a in places]
    else:
        factors = [np.float32(f) for f in op.static(scales, "its scale").reshape(-1)]
        targets = [int(np.float32(x.shape[a]) * f) for a, f in zip(places, factors, strict=True)]
    boxes: list[tuple[float, float]] = [(0.0, 1.0)] * len(places)
    if op.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        corners = op.static(roi, "its region").astype(np.float32).reshape(2, -1)
        boxes = list(zip(corners[0], corners[1], strict=True))
    for axis, target, factor, box in zip(places, targets, factors, boxes, strict=True):
        x = _resize_axis(op, x, axis, target, factor, box)
    return x


def _coordinates(
    op: Call, size: int, target: int, factor: np.float32, box: tuple[float, float]
) -> np.ndarray:
    """Where each output sample lies on an axis of the input, in float32 as onnxruntime has it."""
    old = op.opset < 11 or op.node.op == "Upsample"
    mode = "asymmetric" if old else op.get("coordinate_transformation_mode", "half_pixel")
    at, half, one = np.arange(target, dtype=np.float32), np.float32(0.5), np.float32(1)
    if mode == "asymmetric":
        return at / factor
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and target > 1):
        return (at + half) / factor - half
    if mode == "pytorch_half_pixel":
        return at * 0
    if mode == "align_corners":
        return at * 0 if target == 1 else at * np.float32(size - 1) / np.float32(target - 1)
    if mode == "tf_half_pixel_for_nn":
        return (at + half) / factor
    if mode == "half_pixel_symmetric":
        adjustment = np.float32(target) / (factor * np.float32(size))
        offset = np.float32(size) * half * (one - adjustment)
        return offset + (at + half) / factor - half
    if mode == "tf_crop_and_resize":
        start, end = np.float32(box[0]), np.float32(box[1])
        if target == 1:
            return at + half * (start + end) * np.float32(size - 1)
        span = (end - start) * np.float32(size - 1)
        return start * np.float32(size - 1) + at * span / np.float32(target - 1)
    raise op.unsupported(f"coordinate_transformation_mode {mode!r}")


def _resize_axis(
    op: Call, x: Any, axis: int, target: int, factor: np.float32, box: tuple[float, float]
) -> Any:
    size, mode = x.shape[axis], op.get("mode", "nearest")
    if factor == 1 and target == size and box == (0.0, 1.0):
        return x
    at = _coordinates(op, size, target, factor, box)
    cropped = op.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    outside = (at < 0) | (at > size - 1) if cropped else np.zeros(target, bool)
    column = [1] * x.ndim
    column[axis] = target
    taps: list[tuple[np.ndarray, np.ndarray | None]]
    if mode == "nearest":
        taps = [(_nearest(op, at, factor), None)]
    elif mode == "linear":
        at = np.clip(at, 0, size - 1)
        low = np.floor(at).astype(np.int64)
        part = (at - low).astype(np.float32)
        taps = [(low, 1 - part), (low + 1, part)]
    elif mode == "cubic":
        low = np.floor(at).astype(np.int64)
        part = (at - low).astype(np.float32)
        weights = _cubic(part, op.get("cubic_coeff_a", -0.75))
        near = [low - 1 + i for i in range(4)]
        if op.get("exclude_outside", 0):
            inside = [(place >= 0) & (place < size) for place in near]
            weights = [np.where(ok, w, 0) for ok, w in zip(inside, weights, strict=True)]
            total = np.sum(weights, axis=0)
            weights = [w / total for w in weights]
        taps = list(zip(near, weights, strict=True))
    else:
        raise op.unsupported(f"mode {mode!r}")
    result: Any = None
    for places, weight in taps:
        part = _taken(op, x, np.clip(places, 0, size - 1), axis)
        if weight is not None:
            part = part * op.array(weight.astype(x.dtype).reshape(column))
        result = part if result is None else result + part
    if outside.any():
        fill = jnp.full((), op.get("extrapolation_value", 0.0), x.dtype)
        result = jnp.where(op.array(outside.reshape(column)), fill, result)
    return result


def _taken(op: Call, x: Any, places: np.ndarray, axis: int) -> Any:
    size = x.shape[axis]
    times = len(places) // size
    if times > 1 and np.array_equal(places, np.repeat(np.arange(size), times)):
        shape = (*x.shape[: axis + 1], times, *x.shape[axis + 1 :])
        spread = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
        return spread.reshape(*x.shape[:axis], size * times, *x.shape[axis + 1 :])
    return jnp.take(x, op.array(places), axis, mode="clip")


def _nearest(op: Call, at: np.ndarray, factor: np.float32) -> np.ndarray:
    if op.opset < 11 or op.node.op == "Upsample":
        rule = "ceil" if factor < 1 else "floor"
    else:
        rule = op.get("nearest_mode", "round_prefer_floor")
    if rule == "round_prefer_floor":
        found = np.ceil(at - np.float32(0.5))
    elif rule == "round_prefer_ceil":
        found = np.floor(at + np.float32(0.5))
    else:
        found = np.floor(at) if rule == "floor" else np.ceil(at)
    return found.astype(np.int64)


def _cubic(part: np.ndarray, a: float) -> list[np.ndarray]:
    """Weights of the four samples around a position, for Keys' kernel."""
    t = part.astype(np.float64)

    def near(d: Any) -> Any:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Any) -> Any:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return [far(1 + t), near(t), near(1 - t), far(2 - t)]


# --- Spectra ------------------------------------------------------------------------------------


def frames(x: Any, size: int, step: int) -> Any:
    """Overlapping frames: [..., samples] -> [..., frames, size]."""
    count = (x.shape[-1] - size) // step + 1
    if size % step:
        places = np.arange(count)[:, None] * step + np.arange(size)[None, :]
        return jnp.take(x, places, axis=-1, mode="clip")
    # Shifted views of blocks of `step` samples: no gather.
    n_blocks = count - 1 + size // step
    used = lax.slice_in_dim(x, 0, n_blocks * step, axis=x.ndim - 1)
    blocks = used.reshape(*x.shape[:-1], n_blocks, step)
    shifted = [lax.slice_in_dim(blocks, i, i + count, axis=x.ndim - 1) for i in range(size // step)]
    return jnp.concatenate(shifted, axis=-1)


def _pair(spectrum: Any, dtype: Any) -> Any:
    return jnp.stack([spectrum.real, spectrum.imag], -1).astype(dtype)


def _stft(op: Call, signal: Any, step: Any, window: Any = None, length: Any = None) -> Any:
    x, hop = op.array(signal), op.ints(step, "its hop")[0]
    if length is not None:
        size = op.ints(length, "its frame length")[0]
    elif window is not None:
        size = window.shape[0]
    else:
        raise op.error("it has neither a window nor a frame length")
    complex_input = x.ndim == 3 and x.shape[-1] == 2
    x = lax.complex(x[..., 0], x[..., 1]) if complex_input else x.reshape(x.shape[:2])
    framed = frames(x, size, hop)
    if window is not None:
        if window.shape[0] != size:
            raise op.error(f"its window has {window.shape[0]} samples, its frames have {size}")
        framed = framed * op.array(window).astype(framed.dtype).reshape(1, 1, -1)
    if op.get("onesided", 1) and not complex_input:
        return _pair(jnp.fft.rfft(framed), signal.dtype)
    return _pair(jnp.fft.fft(framed), signal.dtype)


def _dft(op: Call, x: Any, length: Any = None, axis: Any = None) -> Any:
    if op.opset < 20:
        place = op.get("axis", 1)
    else:
        place = -2 if axis is None else op.ints(axis, "its axis")[0]
    x = op.array(x)
    dtype, place = x.dtype, op.axis(place, x.ndim)
    size = x.shape[place] if length is None else op.ints(length, "its length")[0]
    inverse, half = op.get("inverse", 0), op.get("onesided", 0)
    if inverse and half:
        raise op.unsupported("an inverse of half a spectrum", "invert the whole one: onesided=0")
    if x.shape[-1] == 1 and not inverse:
        function = jnp.fft.rfft if half else jnp.fft.fft
        return _pair(function(x[..., 0], size, place), dtype)
    whole = lax.complex(x[..., 0], x[..., 1]) if x.shape[-1] == 2 else x[..., 0]
    spectrum = (jnp.fft.ifft if inverse else jnp.fft.fft)(whole, size, place)
    if half:
        spectrum = cut(spectrum, place, 0, size // 2 + 1)
    return _pair(spectrum, dtype)


def _window(*terms: float) -> Operator:
    def window(op: Call, size: Any) -> Any:
        n = op.ints(size, "its size")[0]
        phase = 2 * np.pi * np.arange(n) / (n if op.get("periodic", 1) else max(1, n - 1))
        parts = [(-1) ** k * term * np.cos(k * phase) for k, term in enumerate(terms)]
        return np.sum(parts, axis=0).astype(DTYPES[op.get("output_datatype", 1)])

    return window


def _mel_matrix(op: Call, *values: Any) -> Any:
    bands, length, rate, low, high = (op.static(v, "its shape").item() for v in values)
    edges = [2595 * math.log10(1 + f / 700) for f in (low, high)]
    step = (edges[1] - edges[0]) / (bands + 2)
    hertz = 700 * (10 ** ((np.arange(bands + 2) * step + edges[0]) / 2595) - 1)
    bins = ((length + 1) * hertz // rate).astype(np.int64)
    matrix = np.zeros((length // 2 + 1, bands))
    for band, (first, centre, last) in enumerate(zip(bins, bins[1:], bins[2:], strict=False)):
        if first == centre:
            matrix[centre, band] = 1
        for k in range(first, centre + 1):
            if centre > first:
                matrix[k, band] = (k - first) / (centre - first)
        for k in range(centre, last):
            matrix[k, band] = (last - k) / (last - centre)
    return matrix.astype(DTYPES[op.get("output_datatype", 1)])


# --- What `simplify` puts in --------------------------------------------------------------------


def _median(op: Call, x: Any) -> Any:
    """Medians of `count` windows of `size` along `axis`; `keep` is an axis of size 1 to add."""
    x, size, axis = op.array(x), op.get("size"), op.get("axis")
    start, count, half = op.get("start"), op.get("count"), size // 2
    y = median_filter(cut(x, axis, start, start + count + size - 1), size, axis)
    y = cut(y, axis, half, half + count)
    return jnp.expand_dims(y, op.get("keep")) if op.get("keep") >= 0 else y


def _real_fft(op: Call, x: Any, window: Any) -> Any:
    """A convolution or product with windowed cosines and sines, by an FFT."""
    x, form, size = op.array(x), op.get("form"), window.shape[0]
    if form == "frames":
        framed = frames(x.reshape(x.shape[0], x.shape[-1]), size, op.get("hop"))
    else:
        framed = x if form == "last" else jnp.swapaxes(x, -1, -2)
    window = op.array(window)
    spectrum = jnp.fft.rfft(framed * window.reshape((1,) * (framed.ndim - 1) + (-1,)))
    rows, layout = op.get("rows"), op.get("layout")
    real, imag = spectrum.real, -op.get("sign") * spectrum.imag
    if layout in ("real", "imag"):
        y = (real if layout == "real" else imag)[..., :rows]
    else:
        real, imag = real[..., : rows // 2], imag[..., : rows // 2]
        if layout == "interleaved":
            y = jnp.stack([real, imag], -1).reshape(*real.shape[:-1], rows)
        else:
            y = jnp.concatenate([real, imag] if layout == "real imag" else [imag, real], -1)
    y = y if form == "last" else jnp.swapaxes(y, -1, -2)
    y = y.astype(x.dtype)
    return y.reshape(*y.shape[:2], *x.shape[2:-1], y.shape[-1]) if form == "frames" else y


# Written against NumPy's and JAX's common interface: static values stay in NumPy.
ANYWHERE: dict[str, Operator] = {
    "BlackmanWindow": _window(0.42, 0.5, 0.08),
    "HammingWindow": _window(25 / 46, 21 / 46),
    "HannWindow": _window(0.5, 0.5),
    "MelWeightMatrix": _mel_matrix,
}

# JAX only.
DEVICE: dict[str, Operator] = {
    "DFT": _dft,
    "Resize": _resize,
    "STFT": _stft,
    "Upsample": _resize,
    DFT: _real_fft,
    MEDIAN: _median,
}
