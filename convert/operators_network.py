"""ONNX operators of neural networks: convolutions, pooling, products, norms, recurrent layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from artifactnet_jax.convert.node_call import DTYPES, HIGHEST, Call, Operator, cut
from artifactnet_jax.convert.operators_arithmetic import mean as mean_over

# --- Convolution and pooling --------------------------------------------------------------------


def _padding(
    op: Call, sizes: Sequence[int], window: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Samples to add along each spatial axis; `window` is the kernel's extent."""
    rank, auto = len(sizes), op.get("auto_pad", "NOTSET")
    if auto == "VALID":
        return [(0, 0)] * rank
    if auto.startswith("SAME"):
        pairs = []
        for n, size, stride in zip(sizes, window, strides, strict=True):
            total = max(0, (-(-n // stride) - 1) * stride + size - n)
            less, more = total // 2, total - total // 2
            pairs.append((less, more) if auto == "SAME_UPPER" else (more, less))
        return pairs
    pads = op.get("pads", (0,) * 2 * rank)
    return list(zip(pads[:rank], pads[rank:], strict=True))


def _extent(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    return [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]


def _conv(op: Call, x: Any, w: Any, bias: Any = None) -> Any:
    rank = x.ndim - 2
    strides, dilations = op.get("strides", (1,) * rank), op.get("dilations", (1,) * rank)
    pads = _padding(op, x.shape[2:], _extent(w.shape[2:], dilations), strides)
    y = lax.conv_general_dilated(
        op.array(x),
        op.array(w),
        strides,
        pads,
        rhs_dilation=dilations,
        feature_group_count=op.get("group", 1),
        precision=HIGHEST,
    )
    return _biased(op, y, bias)


def _biased(op: Call, y: Any, bias: Any) -> Any:
    return y if bias is None else y + op.array(bias).reshape((1, -1) + (1,) * (y.ndim - 2))


def _conv_transpose(op: Call, x: Any, w: Any, bias: Any = None) -> Any:
    # A convolution for each phase of the output and an interleaving: XLA's own way, a convolution
    # over an input spread with zeros, is many times slower on a CPU.
    rank, groups = x.ndim - 2, op.get("group", 1)
    strides, dilations = op.get("strides", (1,) * rank), op.get("dilations", (1,) * rank)
    more = op.get("output_padding", (0,) * rank)
    window = _extent(w.shape[2:], dilations)
    sizes = [(n - 1) * s + k for n, s, k in zip(x.shape[2:], strides, window, strict=True)]
    pads = _transposed_pads(op, x.shape[2:], sizes, strides, more)

    xp = np if isinstance(w, np.ndarray) else jnp
    _, outs, *_ = w.shape
    taps = [-(-k // s) for k, s in zip(window, strides, strict=True)]
    kernel = xp.zeros((*w.shape[:2], *(t * s for t, s in zip(taps, strides, strict=True))), w.dtype)
    spread = (
        slice(None),
        slice(None),
        *(slice(0, k, d) for k, d in zip(window, dilations, strict=True)),
    )
    if xp is np:
        kernel[spread] = w
    else:
        kernel = kernel.at[spread].set(w)
    split = [n for pair in zip(taps, strides, strict=True) for n in pair]
    kernel = kernel.reshape(groups, -1, outs, *split)
    # (group, in, out, tap, phase, tap, phase, ...) -> (group, phases, out, in, taps)
    phases, steps = range(4, 4 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
    kernel = kernel.transpose(0, *phases, 2, 1, *steps)
    kernel = kernel.reshape(groups * math.prod(strides) * outs, -1, *taps)
    kernel = xp.flip(kernel, tuple(range(2, 2 + rank)))
    y = lax.conv_general_dilated(
        op.array(x),
        op.array(np.ascontiguousarray(kernel) if xp is np else kernel),
        (1,) * rank,
        [(t - 1, t - 1) for t in taps],
        feature_group_count=groups,
        precision=HIGHEST,
    )
    n, _, *spatial = y.shape
    y = y.reshape(n, groups, *strides, outs, *spatial)
    order = [
        i
        for pair in zip(range(3 + rank, 3 + 2 * rank), range(2, 2 + rank), strict=True)
        for i in pair
    ]
    y = y.transpose(0, 1, 2 + rank, *order)
    y = y.reshape(n, groups * outs, *(m * s for m, s in zip(spatial, strides, strict=True)))
    for axis, (before, after), size, extra in zip(
        range(2, 2 + rank), pads, sizes, more, strict=True
    ):
        stop = size - after + extra
        if stop > y.shape[axis]:
            widths = [(0, 0, 0)] * y.ndim
            widths[axis] = (0, stop - y.shape[axis], 0)
            y = lax.pad(y, jnp.zeros((), y.dtype), widths)
        y = cut(y, axis, before, stop)
    return _biased(op, y, bias)


def _transposed_pads(
    op: Call,
    sizes: Sequence[int],
    full: Sequence[int],
    strides: Sequence[int],
    more: Sequence[int],
) -> list[tuple[int, int]]:
    """Samples that a transposed convolution drops at each side of its full output.

    Below 0: samples that it adds.
    """
    auto, wanted = op.get("auto_pad", "NOTSET"), op.get("output_shape")
    if wanted is None and not auto.startswith("SAME"):
        return _padding(op, sizes, sizes, strides)
    wanted = wanted or [n * s for n, s in zip(sizes, strides, strict=True)]
    pairs = []
    for n, extra, target in zip(full, more, wanted[-len(sizes) :], strict=True):
        total = n + extra - target
        if total < 0:  # larger than its natural size: zeros at the end
            pairs.append((0, total))
            continue
        less, rest = total // 2, total - total // 2
        pairs.append((less, rest) if auto == "SAME_UPPER" else (rest, less))
    return pairs


def _windows(op: Call, sizes: Sequence[int]) -> tuple[Any, ...]:
    """Kernel, strides, dilations, padding, and the padding with what `ceil_mode` adds."""
    rank = len(sizes)
    kernel = op.get("kernel_shape")
    strides, dilations = op.get("strides", (1,) * rank), op.get("dilations", (1,) * rank)
    window = _extent(kernel, dilations)
    pads = _padding(op, sizes, window, strides)
    ceil = op.get("ceil_mode", 0) and op.get("auto_pad", "NOTSET") == "NOTSET"
    reach = []
    for n, size, stride, (before, after) in zip(sizes, window, strides, pads, strict=True):
        room = n + before + after - size
        count = (-(-room // stride) if ceil else room // stride) + 1
        if ceil and (count - 1) * stride >= n + before:  # it would start in the padding
            count -= 1
        reach.append((before, max(after, (count - 1) * stride + size - n - before)))
    return kernel, strides, dilations, pads, reach


def _pooled(x: Any, start: Any, function: Any, windows: tuple[Any, ...]) -> Any:
    kernel, strides, dilations, _, reach = windows
    return lax.reduce_window(
        x,
        start,
        function,
        (1, 1, *kernel),
        (1, 1, *strides),
        [(0, 0), (0, 0), *reach],
        window_dilation=(1, 1, *dilations),
    )


def _max_pool(op: Call, x: Any) -> Any:
    if len(op.used) > 1 and op.used[1]:
        cure = "upsample by resizing or a transposed convolution, not by unpooling, and train again"
        raise op.unsupported("the output of indices", cure)
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    return _pooled(op.array(x), x.dtype.type(lowest), lax.max, _windows(op, x.shape[2:])), None


def _average_pool(op: Call, x: Any) -> Any:
    windows = _windows(op, x.shape[2:])
    kernel, strides, dilations, pads, reach = windows
    # What each window holds, as a product over the axes.
    counts = np.ones((1, 1), x.dtype)
    padded = op.get("count_include_pad", 0)
    for n, k, stride, dilation, pad, total in zip(
        x.shape[2:], kernel, strides, dilations, pads, reach, strict=True
    ):
        starts = np.arange(0, n + sum(total) - (k - 1) * dilation, stride) - total[0]
        places = starts[:, None] + dilation * np.arange(k)[None, :]
        low, high = (-pad[0], n + pad[1]) if padded else (0, n)
        held = ((places >= low) & (places < high)).sum(1).astype(x.dtype)
        counts = counts[..., None] * held.reshape((1,) * counts.ndim + (-1,))
    total = _pooled(op.array(x), x.dtype.type(0), lax.add, windows)
    return total / op.array(counts)


def _lp_pool(op: Call, x: Any) -> Any:
    p, x = op.get("p", 2), op.array(x)
    total = _pooled(jnp.abs(x) ** p, x.dtype.type(0), lax.add, _windows(op, x.shape[2:]))
    return total ** (1 / p)


def _global_average_pool(op: Call, x: Any) -> Any:
    return mean_over(jnp, op.array(x), tuple(range(2, x.ndim)), True)


def _global_max_pool(op: Call, x: Any) -> Any:
    return jnp.max(op.array(x), tuple(range(2, x.ndim)), keepdims=True)


def _global_lp_pool(op: Call, x: Any) -> Any:
    p, axes = op.get("p", 2), tuple(range(2, x.ndim))
    return jnp.sum(jnp.abs(op.array(x)) ** p, axes, keepdims=True) ** (1 / p)


# --- Products -----------------------------------------------------------------------------------


def _matmul(op: Call, a: Any, b: Any) -> Any:
    if min(a.ndim, b.ndim) >= 2:
        a, b = op.aligned(a, b)
    else:
        a, b = op.array(a), op.array(b)
    return jnp.matmul(a, b, precision=HIGHEST)


def _gemm(op: Call, a: Any, b: Any, c: Any = None) -> Any:
    a, b = op.array(a), op.array(b)
    a = a.T if op.get("transA", 0) else a
    b = b.T if op.get("transB", 0) else b
    y = jnp.matmul(a, b, precision=HIGHEST)
    if op.get("alpha", 1.0) != 1:
        y = y * op.get("alpha")
    if c is None:
        return y
    y, c = op.aligned(y, c)
    return y + (c if op.get("beta", 1.0) == 1 else c * op.get("beta"))


def _einsum(op: Call, *values: Any) -> Any:
    equation = op.get("equation").replace(" ", "")
    return jnp.einsum(equation, *map(op.array, values), precision=HIGHEST)


# --- Normalisation ------------------------------------------------------------------------------


def _columns(op: Call, x: Any, *values: Any) -> list[Any]:
    """Vectors over channels, as arrays that broadcast against x."""
    return [op.array(value).reshape((1, -1) + (1,) * (x.ndim - 2)) for value in values]


def _batch_norm(op: Call, x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> tuple[Any, ...]:
    if op.get("training_mode", 0):
        raise op.unsupported("batch normalisation in training mode")
    x = op.array(x)
    scale, bias, mean, var = _columns(op, x, scale, bias, mean, var)
    factor = scale / jnp.sqrt(var + op.get("epsilon", 1e-5))
    return ((x * factor + (bias - mean * factor)).astype(x.dtype),)


def _normalised(x: Any, axes: tuple[int, ...], epsilon: float) -> tuple[Any, Any, Any]:
    mean = mean_over(jnp, x, axes, True)
    centred = x - mean
    inverse = 1 / jnp.sqrt(mean_over(jnp, centred * centred, axes, True) + epsilon)
    return centred * inverse, mean, inverse


def _instance_norm(op: Call, x: Any, scale: Any, bias: Any) -> Any:
    x = op.array(x)
    scale, bias = _columns(op, x, scale, bias)
    axes = tuple(range(2, x.ndim))
    return _normalised(x, axes, op.get("epsilon", 1e-5))[0] * scale + bias


def _group_norm(op: Call, x: Any, scale: Any, bias: Any) -> Any:
    x, groups = op.array(x), op.get("num_groups")
    n, c = x.shape[:2]
    parts = x.reshape(n, groups, -1)
    y = _normalised(parts, (2,), op.get("epsilon", 1e-5))[0].reshape(x.shape)
    scale, bias = op.array(scale), op.array(bias)
    if op.opset < 21:  # one for each group
        scale, bias = jnp.repeat(scale, c // groups), jnp.repeat(bias, c // groups)
    scale, bias = _columns(op, x, scale, bias)
    return y * scale + bias


def _layer_norm(op: Call, x: Any, scale: Any, bias: Any = None) -> tuple[Any, ...]:
    x = op.array(x)
    axes = tuple(range(op.axis(op.get("axis", -1), x.ndim), x.ndim))
    stash = DTYPES[op.get("stash_type", 1)]
    y, mean, inverse = _normalised(x.astype(stash), axes, op.get("epsilon", 1e-5))
    y, scale = op.aligned(y.astype(x.dtype), scale)
    y = y * scale
    if bias is not None:
        y, bias = op.aligned(y, bias)
        y = y + bias
    return y, mean, inverse


def _rms_norm(op: Call, x: Any, scale: Any) -> Any:
    x = op.array(x)
    axes = tuple(range(op.axis(op.get("axis", -1), x.ndim), x.ndim))
    wide = x.astype(DTYPES[op.get("stash_type", 1)])
    mean = mean_over(jnp, wide * wide, axes, True)
    y, scale = op.aligned((wide / jnp.sqrt(mean + op.get("epsilon", 1e-5))).astype(x.dtype), scale)
    return y * scale


def _lp_norm(op: Call, x: Any) -> Any:
    x, axis = op.array(x), op.axis(op.get("axis", -1), x.ndim)
    if op.get("p", 2) == 1:
        norm = jnp.sum(jnp.abs(x), axis, keepdims=True)
    else:
        norm = jnp.sqrt(jnp.sum(x * x, axis, keepdims=True))
    return jnp.where(norm == 0, jnp.zeros_like(x), x / norm)


def _lrn(op: Call, x: Any) -> Any:
    x, size = op.array(x), op.get("size")
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    total = lax.reduce_window(
        x * x,
        x.dtype.type(0),
        lax.add,
        (1, size) + (1,) * (x.ndim - 2),
        (1,) * x.ndim,
        [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2),
    )
    base = op.get("bias", 1.0) + op.get("alpha", 1e-4) / size * total
    return x / base ** op.get("beta", 0.75)


def _mean_variance_norm(op: Call, x: Any) -> Any:
    x = op.array(x)
    axes = op.axes(op.get("axes", (0, 2, 3)), x.ndim)
    mean = mean_over(jnp, x, axes, True)
    deviation = jnp.sqrt(mean_over(jnp, x * x, axes, True) - mean * mean)
    return (x - mean) / (deviation + 1e-9)


def _softmax(function: Callable[..., Any]) -> Operator:
    def softmax(op: Call, x: Any) -> Any:
        x = op.array(x)
        if op.opset >= 13:
            return function(x, op.axis(op.get("axis", -1), x.ndim))
        axis = op.axis(op.get("axis", 1), x.ndim)  # and all axes after it
        flat = x.reshape(*x.shape[:axis], -1)
        return function(flat, axis).reshape(x.shape)

    return softmax


# --- Recurrent layers ---------------------------------------------------------------------------


def _recurrent(op: Call, x: Any, w: Any, r: Any, *more: Any) -> tuple[Any, ...]:
    """LSTM, GRU and RNN with their default activations."""
    bias, lengths, first, cell, peepholes, *_ = (*more, None, None, None, None, None)
    plain = "export the layer as PyTorch's, which has none"
    defaults = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}
    kinds = tuple(kind.lower() for kind in op.get("activations", ()))
    x, w, r = op.array(x), op.array(w), op.array(r)
    directions, hidden = w.shape[0], op.get("hidden_size")
    relu = kinds == ("relu",) * directions and op.node.op == "RNN"
    if kinds not in ((), defaults[op.node.op] * directions) and not relu:
        raise op.unsupported(f"activations {kinds}", "export the layer with its default ones")
    if peepholes is not None:
        raise op.unsupported("an LSTM with peepholes", plain)
    if op.get("clip"):
        raise op.unsupported("a clip of its cells", plain)
    if op.get("input_forget", 0):
        raise op.unsupported("a coupled input and forget gate", plain)
    by_batch = op.get("layout", 0)
    x = jnp.swapaxes(x, 0, 1) if by_batch else x
    steps, batch, _ = x.shape
    if lengths is not None and set(op.ints(lengths, "its lengths")) != {steps}:
        raise op.unsupported("sequences of unequal lengths")
    zeros = jnp.zeros((directions, batch, hidden), x.dtype)
    states = [zeros if value is None else op.array(value) for value in (first, cell)]
    if by_batch:
        given = (first, cell)
        states = [
            s if g is None else jnp.swapaxes(s, 0, 1) for s, g in zip(states, given, strict=True)
        ]
    gates = w.shape[1] // hidden
    both = jnp.zeros((directions, 2 * gates * hidden), x.dtype) if bias is None else op.array(bias)
    activate = jax.nn.relu if relu else jnp.tanh
    linear_first = op.get("linear_before_reset", 0)

    def step(d: int, carry: Any, driven: Any) -> Any:
        h, c = carry
        r_bias = both[d, gates * hidden :]
        if op.node.op == "GRU":
            z_r = jnp.matmul(h, r[d, : 2 * hidden].T, precision=HIGHEST)
            z_r = driven[:, : 2 * hidden] + z_r + r_bias[None, : 2 * hidden]
            z, reset = jnp.split(jax.nn.sigmoid(z_r), 2, axis=-1)
            r_h, b_h = r[d, 2 * hidden :].T, r_bias[None, 2 * hidden :]
            if linear_first:
                inner = reset * (jnp.matmul(h, r_h, precision=HIGHEST) + b_h)
            else:
                inner = jnp.matmul(reset * h, r_h, precision=HIGHEST) + b_h
            h = (1 - z) * jnp.tanh(driven[:, 2 * hidden :] + inner) + z * h
            return (h, c), h
        total = driven + jnp.matmul(h, r[d].T, precision=HIGHEST) + r_bias[None]
        if op.node.op == "RNN":
            h = activate(total)
            return (h, c), h
        i, o, f, g = jnp.split(total, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    outputs, lasts, cells = [], [], []
    for d in range(directions):
        backwards = op.get("direction", "forward") == "reverse" or d == 1
        driven = (
            jnp.matmul(x, w[d].T[None], precision=HIGHEST) + both[d, None, None, : gates * hidden]
        )
        (h, c), y = lax.scan(
            functools.partial(step, d),
            (states[0][d], states[1][d]),
            driven,
            reverse=backwards,
        )
        outputs.append(y)
        lasts.append(h)
        cells.append(c)
    y = jnp.stack(outputs, 1)  # steps, directions, batch, hidden
    last, end = jnp.stack(lasts), jnp.stack(cells)
    if by_batch:
        y = y.transpose(2, 0, 1, 3)
        last, end = jnp.swapaxes(last, 0, 1), jnp.swapaxes(end, 0, 1)
    return (y, last, end) if op.node.op == "LSTM" else (y, last)


DEVICE: dict[str, Operator] = {  # JAX only
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "GRU": _recurrent,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalLpPool": _global_lp_pool,
    "GlobalMaxPool": _global_max_pool,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "LSTM": _recurrent,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _softmax(jax.nn.log_softmax),
    "LpNormalization": _lp_norm,
    "LpPool": _lp_pool,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "MeanVarianceNormalization": _mean_variance_norm,
    "RMSNormalization": _rms_norm,
    "RNN": _recurrent,
    "Softmax": _softmax(jax.nn.softmax),
}
