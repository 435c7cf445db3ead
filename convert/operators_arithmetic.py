"""ONNX operators that work element by element, and reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from artifactnet_jax.convert.node_call import DTYPES, Call, Operator, cut, sum_dtype

# --- Element by element -------------------------------------------------------------------------


def _unary(name: str) -> Operator:
    return lambda op, x: getattr(op.xp, name)(x)


def _binary(name: str) -> Operator:
    return lambda op, a, b: getattr(op.xp, name)(*op.aligned(a, b))


def _variadic(name: str) -> Operator:
    def fold(op: Call, *values: Any) -> Any:
        arrays = op.aligned(*values)
        result = arrays[0]
        for array in arrays[1:]:
            result = getattr(op.xp, name)(result, array)
        return result

    return fold


def _mean_of(op: Call, *values: Any) -> Any:
    return _variadic("add")(op, *values) / len(values)


def _div(op: Call, a: Any, b: Any) -> Any:
    a, b = op.aligned(a, b)
    if a.dtype.kind not in "iu":
        return op.xp.true_divide(a, b)
    quotient = op.xp.floor_divide(a, b)  # rounds down; ONNX cuts off
    inexact = op.xp.not_equal(quotient * b, a) & ((a < 0) != (b < 0))
    return quotient + inexact.astype(quotient.dtype)


def _mod(op: Call, a: Any, b: Any) -> Any:
    return (op.xp.fmod if op.get("fmod", 0) else op.xp.mod)(*op.aligned(a, b))


def _pow(op: Call, x: Any, exponent: Any) -> Any:
    if isinstance(exponent, np.ndarray) and exponent.size == 1 and exponent.ndim <= x.ndim:
        # A product where the exponent allows: exact, and quicker.
        power = exponent.item()
        x = op.array(x)
        if power == 1:
            return x
        if power == 2:
            return x * x
        if power == 3:
            return x * x * x
        if power == 0.5 and x.dtype.kind == "f":
            return op.xp.sqrt(x)
    x, exponent = op.aligned(x, exponent)
    if exponent.dtype != x.dtype:
        both = exponent.dtype if exponent.dtype.kind == "f" and x.dtype.kind != "f" else x.dtype
        return op.xp.power(x.astype(both), exponent.astype(both)).astype(x.dtype)
    return op.xp.power(x, exponent)


def _clip(op: Call, x: Any, low: Any = None, high: Any = None) -> Any:
    x = op.array(x)
    bounds = []
    for name, bound in (("min", low), ("max", high)):
        if bound is None and name in op.node.attributes:  # up to opset 10
            bound = np.asarray(op.get(name)).astype(x.dtype)
        bounds.append(None if bound is None else op.array(bound).reshape(()))
    if bounds[0] is not None:
        x = op.xp.maximum(x, bounds[0])
    return x if bounds[1] is None else op.xp.minimum(x, bounds[1])


def _where(op: Call, condition: Any, a: Any, b: Any) -> Any:
    return op.xp.where(*op.aligned(condition, a, b))


def _cast(op: Call, x: Any) -> Any:
    if op.get("to") not in DTYPES:
        raise op.narrow(f"ONNX type {op.get('to')}")
    return op.array(x).astype(DTYPES[op.get("to")])


def _cast_like(op: Call, x: Any, like: Any) -> Any:
    if like.dtype not in (np.dtype(dtype) for dtype in DTYPES.values()):
        raise op.narrow(str(like.dtype))
    return op.array(x).astype(like.dtype)


def _is_inf(op: Call, x: Any) -> Any:
    up, down = op.get("detect_positive", 1), op.get("detect_negative", 1)
    return op.xp.isinf(x) & (((x > 0) & bool(up)) | ((x < 0) & bool(down)))


def _bit_shift(op: Call, a: Any, b: Any) -> Any:
    shift = op.xp.left_shift if op.get("direction") == "LEFT" else op.xp.right_shift
    return shift(*op.aligned(a, b))


def _relu(op: Call, x: Any) -> Any:
    return op.xp.maximum(x, op.xp.zeros((), x.dtype))


def _gelu(op: Call, x: Any) -> Any:
    return jax.nn.gelu(op.array(x), approximate=op.get("approximate", "none") == "tanh")


def _prelu(op: Call, x: Any, slope: Any) -> Any:
    x, slope = op.aligned(x, slope)
    return jnp.where(x >= 0, x, x * slope)


def _plain(function: Callable[[Any], Any]) -> Operator:
    return lambda op, x: function(op.array(x))


def _scaled(function: Callable[..., Any], **defaults: float) -> Operator:
    """An operator of one input whose attributes are numbers."""

    def scaled(op: Call, x: Any) -> Any:
        return function(op.array(x), **{name: op.get(name, n) for name, n in defaults.items()})

    return scaled


def _shrink(x: Any, bias: float, lambd: float) -> Any:
    moved = jnp.where(x > lambd, x - bias, jnp.zeros_like(x))
    return jnp.where(x < -lambd, x + bias, moved)


# --- Reductions ---------------------------------------------------------------------------------


def _reduce(function: Callable[..., Any]) -> Operator:
    def reduce(op: Call, x: Any, axes: Any = None) -> Any:
        given = op.get("axes") if axes is None else axes
        places = op.axes(given, x.ndim)
        if not places:
            if op.get("noop_with_empty_axes", 0):
                # The step before and after the reduction is still taken, on single elements.
                return function(op.xp, op.array(x)[None], (0,), False)
            places = tuple(range(x.ndim))
        return function(op.xp, op.array(x), places, bool(op.get("keepdims", 1)))

    return reduce


def _sum(xp: Any, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    wide = sum_dtype(x) if x.dtype.kind not in "iu" else x.dtype
    return xp.sum(x, axis=axes, keepdims=keep, dtype=wide).astype(x.dtype)


def mean(xp: Any, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    """Mean of x over axes, in its own type; of integers, cut off."""
    if x.dtype.kind in "iu":
        count = math.prod(x.shape[axis] for axis in axes)
        total = _sum(xp, x, axes, keep)
        return xp.trunc(total / count).astype(x.dtype)
    return xp.mean(x, axis=axes, keepdims=keep, dtype=sum_dtype(x)).astype(x.dtype)


def _log_sum_exp(xp: Any, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    peak = xp.max(x, axis=axes, keepdims=True)
    total = xp.log(_sum(xp, xp.exp(x - peak), axes, True)) + peak
    return total if keep else xp.squeeze(total, axes)


def _extreme(name: str, sign: int) -> Callable[..., Any]:
    """The largest or the least; of nothing, the type's lowest or highest value."""

    def extreme(xp: Any, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
        if all(x.shape[axis] for axis in axes):
            return getattr(xp, name)(x, axis=axes, keepdims=keep)
        kind = x.dtype.kind
        if kind == "b":
            value: Any = sign < 0
        elif kind in "iu":
            value = np.iinfo(x.dtype).min if sign > 0 else np.iinfo(x.dtype).max
        else:
            value = -sign * math.inf
        shape = [1 if axis in axes else n for axis, n in enumerate(x.shape)]
        full = xp.full(shape, value, x.dtype)
        return full if keep else xp.squeeze(full, axes)

    return extreme


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceSum": _sum,
    "ReduceMean": mean,
    "ReduceMax": _extreme("max", 1),
    "ReduceMin": _extreme("min", -1),
    "ReduceProd": lambda xp, x, a, k: xp.prod(x, axis=a, keepdims=k, dtype=x.dtype),
    "ReduceL1": lambda xp, x, a, k: _sum(xp, xp.abs(x), a, k),
    "ReduceL2": lambda xp, x, a, k: xp.sqrt(_sum(xp, x * x, a, k)).astype(x.dtype),
    "ReduceSumSquare": lambda xp, x, a, k: _sum(xp, x * x, a, k),
    "ReduceLogSum": lambda xp, x, a, k: xp.log(_sum(xp, x, a, k)).astype(x.dtype),
    "ReduceLogSumExp": _log_sum_exp,
}


def _cumsum(op: Call, x: Any, axis: Any) -> Any:
    x, place = op.array(x), op.axis(op.ints(axis, "the axis")[0], x.ndim)
    if op.get("reverse", 0):
        x = op.xp.flip(x, place)
    total = op.xp.cumsum(x, place, dtype=x.dtype)
    if op.get("exclusive", 0):
        zero = op.xp.zeros_like(cut(x, place, 0, 1))
        total = op.xp.concatenate([zero, cut(total, place, 0, x.shape[place] - 1)], place)
    return op.xp.flip(total, place) if op.get("reverse", 0) else total


def _arg(name: str) -> Operator:
    def arg(op: Call, x: Any) -> Any:
        x, axis = op.array(x), op.axis(op.get("axis", 0), x.ndim)
        last = op.get("select_last_index", 0)
        found = getattr(op.xp, name)(op.xp.flip(x, axis) if last else x, axis)
        found = found.astype(np.int64)
        found = x.shape[axis] - 1 - found if last else found
        return op.xp.expand_dims(found, axis) if op.get("keepdims", 1) else found

    return arg


def _top_k(op: Call, x: Any, k: Any = None) -> Any:
    x, axis = op.array(x), op.axis(op.get("axis", -1), x.ndim)
    count = op.get("k") if k is None else op.ints(k, "k")[0]
    n, largest = x.shape[axis], op.get("largest", 1)
    if not 0 <= count <= n:
        raise op.error(f"k is {count}, the axis has {n}")
    if len(op.used) < 2 or not op.used[1]:
        ordered = lax.sort(x, dimension=axis, is_stable=False)
        if largest:
            return cut(ordered, axis, n - 1, n - 1 - count, -1), None
        return cut(ordered, axis, 0, count), None
    flip = jnp.invert if x.dtype.kind in "iu" else jnp.negative
    places = lax.broadcasted_iota(np.int64, x.shape, axis)
    ordered, places = lax.sort((flip(x) if largest else x, places), dimension=axis, num_keys=1)
    ordered, places = cut(ordered, axis, 0, count), cut(places, axis, 0, count)
    return flip(ordered) if largest else ordered, places


# --- The tables ---------------------------------------------------------------------------------

# NumPy's and JAX's names, where they are not ONNX's in lower case.
_UNARY = {
    **{op: op.lower() for op in ("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh")},
    **{op: op.lower() for op in ("Ceil", "Cos", "Cosh", "Exp", "Floor", "IsNaN", "Log", "Round")},
    **{op: op.lower() for op in ("Reciprocal", "Sign", "Sin", "Sinh", "Sqrt", "Tan", "Tanh")},
    **{"BitwiseNot": "invert", "Neg": "negative", "Not": "logical_not"},
}
_BINARY = {
    **{"Add": "add", "Sub": "subtract", "Mul": "multiply", "Equal": "equal"},
    **{op: f"logical_{op.lower()}" for op in ("And", "Or", "Xor")},
    **{f"Bitwise{op}": f"bitwise_{op.lower()}" for op in ("And", "Or", "Xor")},
    **{"Greater": "greater", "GreaterOrEqual": "greater_equal"},
    **{"Less": "less", "LessOrEqual": "less_equal"},
}

# Written against NumPy's and JAX's common interface: static values stay in NumPy.
ANYWHERE: dict[str, Operator] = {
    **{op: _unary(name) for op, name in _UNARY.items()},
    **{op: _binary(name) for op, name in _BINARY.items()},
    **{op: _reduce(function) for op, function in _REDUCTIONS.items()},
    "ArgMax": _arg("argmax"),
    "ArgMin": _arg("argmin"),
    "BitShift": _bit_shift,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Clip": _clip,
    "CumSum": _cumsum,
    "Div": _div,
    "IsInf": _is_inf,
    "Max": _variadic("maximum"),
    "Mean": _mean_of,
    "Min": _variadic("minimum"),
    "Mod": _mod,
    "Pow": _pow,
    "Relu": _relu,
    "Sum": _variadic("add"),
    "Where": _where,
}

# JAX only.
_HARD = {"alpha": 0.2, "beta": 0.5}
_SELU = {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875}
DEVICE: dict[str, Operator] = {
    "Celu": _scaled(jax.nn.celu, alpha=1.0),
    "Elu": _scaled(jax.nn.elu, alpha=1.0),
    "Erf": _plain(jax.scipy.special.erf),
    "Gelu": _gelu,
    "HardSigmoid": _scaled(lambda x, alpha, beta: jnp.clip(x * alpha + beta, 0.0, 1.0), **_HARD),
    "HardSwish": _plain(lambda x: x * jnp.clip(x / 6 + 0.5, 0.0, 1.0)),
    "LeakyRelu": _scaled(lambda x, alpha: jnp.where(x >= 0, x, x * alpha), alpha=0.01),
    "Mish": _plain(lambda x: x * jnp.tanh(jax.nn.softplus(x))),
    "PRelu": _prelu,
    "Selu": _scaled(lambda x, alpha, gamma: gamma * jax.nn.elu(x, alpha), **_SELU),
    "Shrink": _scaled(_shrink, bias=0.0, lambd=0.5),
    "Sigmoid": _plain(jax.nn.sigmoid),
    "Softplus": _plain(jax.nn.softplus),
    "Softsign": _plain(lambda x: x / (1 + jnp.abs(x))),
    "Swish": _scaled(lambda x, alpha: x * jax.nn.sigmoid(x * alpha), alpha=1.0),
    "ThresholdedRelu": _scaled(
        lambda x, alpha: jnp.where(x > alpha, x, jnp.zeros_like(x)), alpha=1.0
    ),
    "TopK": _top_k,
}
