"""Running median along one axis, as straight-line programs of elementwise min and max.

ArtifactNet separates harmonic from percussive energy by median filtering its spectrogram over
31 frames and over 31 frequency bins (HPSS). A median by min and max alone takes the same steps
whatever the data, so the same program runs on NumPy planes, in one fused XLA loop, or in a GPU
kernel, and is exact: every output is one of the inputs. One exception is not the program's: XLA on
a CPU may take a denormal number (below 1.2e-38 in float32) for 0.
"""

from __future__ import annotations

import functools
import importlib
import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Shaped

Value = tuple[int, int]  # a plane and the rows by which it is read further on


class Program(NamedTuple):
    """Min/max program that yields `tile` consecutive medians per row.

    Sample n of the mirrored axis lies in plane n % tile, row n // tile. Step k defines plane
    tile + k, row i, as op(plane a at row i, plane b at row i + shift), from (op, a, b, shift)
    with shift >= 0. Output r of row i is outputs[r] = (plane, shift), read at row i + shift.
    """

    tile: int
    steps: tuple[tuple[str, int, int, int], ...]
    outputs: tuple[Value, ...]


@functools.cache
def median_program(size: int, tile: int) -> Program:
    """Program for the median of an odd window `size`, for 1 <= tile <= size outputs per row.

    The samples that all windows of a row share are sorted once, by Batcher's odd-even merges of
    ever longer runs. The row is then halved again and again: each half shares more samples, which
    are merged in as a sorted run, and everything that can no longer be the median is dropped. A
    step that equals another one up to a shift of rows is taken once, so neighbouring rows (with
    tile 1: neighbouring outputs) share their sorted runs; what no output needs is left out.
    """
    nodes: list[tuple[str, int, int, int]] = []
    known: dict[tuple[str, int, int, int], int] = {}

    def emit(op: str, u: Value, v: Value) -> Value:
        (a, first), (b, second) = sorted((u, v), key=lambda value: value[::-1])
        node = (op, a, b, second - first)
        if node not in known:
            known[node] = tile + len(nodes)
            nodes.append(node)
        return known[node], first

    def merge(a: tuple[Value, ...], b: tuple[Value, ...]) -> tuple[Value, ...]:
        if not a or not b:
            return a or b
        if len(a) == len(b) == 1:
            return emit("min", a[0], b[0]), emit("max", a[0], b[0])
        even, odd = merge(a[::2], b[::2]), merge(a[1::2], b[1::2])
        merged = [even[0]]
        for low, high in zip(odd, even[1:], strict=False):
            merged += [emit("min", low, high), emit("max", low, high)]
        common = (len(merged) - 1) // 2
        return (*merged, *odd[common:], *even[1 + common :])

    @functools.cache
    def run(start: int, stop: int) -> tuple[Value, ...]:
        if stop - start <= 1:
            return tuple((n % tile, n // tile) for n in range(start, stop))
        middle = (start + stop) // 2
        return merge(run(start, middle), run(middle, stop))

    outputs: dict[int, Value] = {}

    def solve(first: int, count: int, core: tuple[Value, ...], below: int) -> None:
        # `core`: the sorted candidates among the samples shared by the windows of the outputs
        # first ... first + count - 1; `below` smaller shared samples are dropped already.
        shared = size - count + 1
        start, stop = max(0, size // 2 - count + 1), min(shared, size // 2 + 1)
        core = core[start - below : stop - below]
        if count == 1:
            outputs[first] = core[0]
            return
        left = (count + 1) // 2
        right = count - left
        before = run(first + left - 1, first + count - 1)
        solve(first, left, merge(core, before), start)
        after = run(first + size, first + size + left)
        solve(first + left, right, merge(core, after), start)

    solve(0, tile, run(tile - 1, size), 0)

    live: set[int] = set()
    todo = [plane for plane, _ in outputs.values()]
    while todo:
        plane = todo.pop()
        if plane >= tile and plane not in live:
            live.add(plane)
            todo += nodes[plane - tile][1:3]
    order = [*range(tile), *sorted(live)]
    index = {plane: k for k, plane in enumerate(order)}
    steps = (nodes[plane - tile] for plane in order[tile:])
    return Program(
        tile,
        tuple((op, index[a], index[b], shift) for op, a, b, shift in steps),
        tuple((index[outputs[r][0]], outputs[r][1]) for r in range(tile)),
    )


def _module(name: str) -> Callable[[], Callable[..., Any]]:
    return lambda: importlib.import_module(name, __package__).median_filter


# Name -> loader of a function (array, odd size > 1, axis >= 0) -> array. Loading imports what
# the implementation needs, so that the NumPy path runs where JAX is not installed.
IMPLEMENTATIONS: dict[str, Callable[[], Callable[..., Any]]] = {
    "numpy": _module(".median_numpy"),
    "xla": _module(".median_xla"),
    "pallas": _module(".median_pallas"),
}


def median_filter(
    x: Shaped[Any, "*d"], size: int, axis: int, *, implementation: str | None = None
) -> Shaped[Any, "*d"]:
    """Running median of an odd window along one axis.

    Equal to `scipy.ndimage.median_filter` with a window that is `size` along `axis` and 1
    elsewhere, and mode="mirror": the axis is continued by reflection about its edge samples,
    which are not repeated, as often as the window needs on a short axis. The sign of a zero is
    not kept track of; a window that holds a NaN yields NaN.

    Args:
        x: numpy.ndarray, or JAX array or tracer, of any shape and of any floating or integer
            dtype (not bool, not complex).
        size: window, odd and positive; ArtifactNet's HPSS uses 31.
        axis: the filtered axis, negative counted from the end.
        implementation: "numpy", "xla" or "pallas" (a GPU kernel, interpreted elsewhere); by
            default "numpy" or "xla", by the type of `x`. Those of JAX work under jit and vmap, and
            jax.grad routes each output's cotangent to the samples that equal the median, in equal
            parts (a subgradient, finite at ties); forward mode and second derivatives in `x` are
            not defined.

    Returns:
        An array of the shape and dtype of `x`, and of the implementation's array type.

    Raises:
        TypeError: for a dtype that has no median, for an `x` that is no array, or one that the
            named implementation cannot take as it is.
        ValueError: for a size that is even or not positive, an axis out of range, or an unknown
            implementation.
        ImportError: when the named implementation needs a package that is not installed.
    """
    name = implementation or _default_implementation(x)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}: choose from {sorted(IMPLEMENTATIONS)}")
    size, axis = operator.index(size), operator.index(axis)
    if size < 1 or size % 2 == 0:
        raise ValueError(f"the median window must be odd and positive, not {size}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is out of range for an array of {x.ndim} dimensions")
    return IMPLEMENTATIONS[name]()(x, size, axis % x.ndim)


def _default_implementation(x: Any) -> str:
    import numpy as np

    if isinstance(x, np.ndarray):
        return "numpy"
    # A JAX array can only exist where JAX is imported already.
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(x, jax.Array):
        return "xla"
    raise TypeError(f"expected a NumPy or JAX array, not {type(x).__name__}")
