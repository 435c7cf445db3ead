"""One node at work: what the functions of `operators` are called with, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from artifactnet_jax.convert.graph import ConvertError, Node

HIGHEST = lax.Precision.HIGHEST

# A function of a node's call and inputs; None where an optional input is left out.
Operator = Callable[..., Any]

# ONNX's numbers of the types that JAX has.
DTYPES: dict[int, Any] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    4: np.uint16,
    5: np.int16,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
    12: np.uint32,
    13: np.uint64,
    16: jnp.bfloat16,
}


def is_static(value: Any) -> bool:
    """Whether a value depends on constants and shapes only."""
    if isinstance(value, list):  # a sequence
        return all(map(is_static, value))
    return value is None or isinstance(value, np.ndarray)


def shape_of(value: Any) -> str:
    """The shape of a value as text."""
    return written(value.shape) if hasattr(value, "shape") else "(none)"


def written(shape: Sequence[Any]) -> str:
    """A shape as text."""
    return f"[{', '.join('?' if n is None else str(n) for n in shape)}]"


class Call:
    """One node at work."""

    def __init__(
        self,
        node: Node,
        opset: int,
        xp: Any,
        used: tuple[bool, ...],
        lift: Callable[[np.ndarray], Any],
    ) -> None:
        self.node = node
        self.opset = opset
        self.xp = xp  # numpy where all inputs are static, else jax.numpy
        self.used = used  # which outputs anything reads
        self.lift = lift

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.node.attributes.get(name, default)

    def array(self, value: Any) -> Any:
        """A value as an array of `xp`."""
        return self.lift(value) if self.xp is jnp and isinstance(value, np.ndarray) else value

    def aligned(self, *values: Any) -> list[Any]:
        """Values as arrays of `xp` and of one rank, leading axes of size 1 being added."""
        rank = max(value.ndim for value in values)
        arrays = map(self.array, values)
        return [x.reshape((1,) * (rank - x.ndim) + x.shape) for x in arrays]

    def static(self, value: Any, what: str) -> np.ndarray:
        """A value that must not depend on data."""
        if not isinstance(value, np.ndarray):
            raise self.error(f"{what} depends on the data; export the model with fixed shapes")
        return value

    def ints(self, value: Any, what: str) -> list[int]:
        """A static value as a list of integers."""
        return [int(n) for n in self.static(value, what).reshape(-1)]

    def axes(self, value: Any, rank: int) -> tuple[int, ...]:
        """A static value, or an attribute, as axes counted from the front."""
        if value is None:
            return ()
        axes = self.ints(value, "its axes") if not isinstance(value, tuple) else value
        return tuple(self.axis(axis, rank) for axis in axes)

    def axis(self, axis: int, rank: int) -> int:
        """An axis counted from the front."""
        if not -rank <= axis < rank:
            raise self.error(f"axis {axis} is out of range for rank {rank}")
        return int(axis) % rank

    def error(self, text: str) -> ConvertError:
        """The error that says so of this node."""
        return ConvertError(f"node {self.node.name!r} ({self.node.op}): {text}")

    def unsupported(self, what: str, cure: str = "export the model without it") -> ConvertError:
        """The error for a variant of an operator that is not supported."""
        return self.error(f"{what} is not supported; {cure}")

    def narrow(self, dtype: str) -> ConvertError:
        """The error for a type that JAX lacks, or rounds in another way than ONNX."""
        return self.unsupported(dtype, "export the model in float32 or float16")


def scan_axes(node: Node) -> tuple[list[int], list[int], list[int], list[int]]:
    """Of a Scan: axes and directions of what it reads, and of what it gives step by step."""
    count = node.attributes["num_scan_inputs"]
    given = len(node.attributes["body"].outputs) - (len(node.inputs) - count)

    def numbers(name: str, length: int) -> list[int]:
        return list(node.attributes.get(name, (0,) * length))

    return (
        numbers("scan_input_axes", count),
        numbers("scan_input_directions", count),
        numbers("scan_output_axes", given),
        numbers("scan_output_directions", given),
    )


def cut(x: Any, axis: int, start: int, stop: int, step: int = 1) -> Any:
    """The samples range(start, stop, step) of an axis."""
    places = range(start, stop, step)
    if isinstance(x, np.ndarray):
        index = slice(start, stop if stop >= 0 else None, step)
        return x[(*(slice(None),) * axis, index if places else slice(0, 0))]
    if not places:
        return lax.slice_in_dim(x, 0, 0, axis=axis)
    low, high = min(places[0], places[-1]), max(places[0], places[-1]) + 1
    if (low, high, step) != (0, x.shape[axis], 1):
        x = lax.slice_in_dim(x, low, high, abs(step), axis)
    return lax.rev(x, (axis,)) if step < 0 else x


def sum_dtype(x: Any) -> Any:
    """A type to sum in: XLA adds one by one on a CPU, which costs float32 its last 10 bits."""
    return {2: np.float32, 4: np.float64}.get(x.dtype.itemsize, x.dtype)
