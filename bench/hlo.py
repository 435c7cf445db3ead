"""What a compiled program does on a GPU, read from its HLO text: kernels, their work, a roofline.

Text in, figures out: no jax. A kernel is what is launched as one: a fusion, a call of a library, a
copy. Loops count their bodies as often as they run. Work is what the text states, counted once: a
fusion that computes a value again for each of its readers does more.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

SIZES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
SIZES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
# Instructions that launch nothing of their own.
NOTHING = (
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "after-all"),
    *("partition-id", "replica-id", "add-dependency", "optimization-barrier"),
)
# Instructions that move values and compute none.
MOVES = (
    *("copy", "transpose", "broadcast", "slice", "dynamic-slice", "dynamic-update-slice", "pad"),
    *("concatenate", "reshape", "reverse", "gather", "bitcast-convert", "copy-start", "copy-done"),
)
KINDS = ("convolution", "product", "fft", "custom", "reduction", "elementwise", "layout", "other")
STAGES = ("front_end", "unet", "hpss", "cnn", "texture")  # scopes of `model.ArtifactNet`
REST = "rest"

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: its element type and sizes."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """What they take in memory."""
        return self.elements * SIZES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]  # of the result; several of a tuple
    op: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, attribute: str) -> str:
        """Name of the computation that an attribute names; empty without it."""
        found = re.search(rf"\b(?:{attribute})=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def scope(self) -> str:
        """The names that jax gave to where it comes from: "jit(f)/texture/mul"."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def precision(self) -> tuple[str, ...]:
        """Of the operands of a product: "default", "high", "highest"."""
        found = re.search(r"operand_precision=\{([\w,]*)\}", self.attributes)
        return tuple(found[1].split(",")) if found else ()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is launched as one, as often as it is launched in a run."""

    name: str
    kind: str  # of `KINDS`
    stage: str  # of `STAGES`, or `REST`
    flops: int  # of one launch
    bytes: int  # of one launch: what it must read and write, once
    dtype: str = "f32"  # of a product's factors
    exact: bool = True  # no product in it that hardware may round below float32
    times: int = 1


class Program:
    """A compiled module's text, taken apart."""

    def __init__(self, text: str):
        """ValueError where the text has no entry computation."""
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        body: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                body = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                one = _instruction(found[2], found[3], bool(found[1]))
                body[one.name] = one
        if not self.entry:
            raise ValueError("no ENTRY computation: this is no text of a compiled program")

    @functools.cached_property
    def kernels(self) -> list[Kernel]:
        """All kernels of one run, in the order of the schedule."""
        return list(self._kernels(self.entry, 1, REST))

    def _kernels(self, computation: str, times: int, around: str) -> Iterator[Kernel]:
        body = self.computations[computation]
        stages = self._stages(computation, around)
        for one in body.values():
            stage = stages[one.name]
            if one.op in NOTHING:
                continue
            if one.op == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.attributes)
                n = times * int(trips[1] if trips else 1)
                yield from self._kernels(one.called("condition"), n + times, stage)
                yield from self._kernels(one.called("body"), n, stage)
            elif one.op in ("call", "async-start") and (inner := one.called("to_apply|calls")):
                yield from self._kernels(inner, times, stage)
            elif one.op == "conditional":
                branches = re.findall(r"%([\w.\-]+)", one.attributes.partition("branch_")[2])
                for inner in branches[:1]:
                    yield from self._kernels(inner, times, stage)
            elif one.op not in ("async-done", "async-update"):
                yield self._kernel(body, one, stage, times)

    def _stages(self, computation: str, around: str) -> dict[str, str]:
        """Stage of every instruction: its own, else that of what it reads, else `around`."""
        found: dict[str, str] = {}
        for one in self.computations[computation].values():
            inner = self.computations.get(one.called("calls"), {})
            scopes = [one.scope, *(x.scope for x in inner.values() if x.root)]
            scopes += [x.scope for x in inner.values()]
            own = next((s for s in map(stage_of, scopes) if s), "")
            read = (found.get(name, "") for name in one.operands)
            found[one.name] = own or next(filter(None, read), "")
        return {name: stage or around for name, stage in found.items()}

    def _kernel(
        self, body: Mapping[str, Instruction], one: Instruction, stage: str, times: int
    ) -> Kernel:
        inner = self.computations.get(one.called("calls"), {}) if one.op == "fusion" else {}
        if inner:
            flops = sum(self._flops(inner, x) for x in inner.values())
            moved = sum(_read(inner, x) for x in inner.values() if x.op == "parameter")
            written = _written(inner, one)
        else:
            flops = self._flops(body, one)
            moved = sum(shape.bytes for shape in _shapes_of(body, dict.fromkeys(one.operands)))
            # What the libraries of NVIDIA take to work with comes as further results.
            written = one.shapes[:1] if "__cu" in one.attributes else one.shapes
        moved += sum(shape.bytes for shape in written)
        products = [x for x in inner.values() or [one] if x.op == "dot" or _is_convolution(x)]
        factors = [[s.dtype for s in _shapes_of(inner or body, x.operands[:2])] for x in products]
        exact = all(
            x.precision[:2] == ("highest",) * 2 and set(dtypes) == {"f32"}
            for x, dtypes in zip(products, factors, strict=True)
        )
        dtype = factors[0][0] if factors else "f32"
        return Kernel(one.name, _kind(one, inner), stage, flops, moved, dtype, exact, times)

    def _flops(self, body: Mapping[str, Instruction], one: Instruction) -> int:
        """Operations of one instruction: a multiply-add is two, any other one."""
        out = one.shapes[0].elements if one.shapes else 0
        read = _shapes_of(body, one.operands)
        if one.op == "fft" and read:
            lengths = re.search(r"fft_length=\{([\d,]+)\}", one.attributes)
            n = math.prod(map(int, lengths[1].split(","))) if lengths else 1
            real = "fft_type=FFT" not in one.attributes and "fft_type=IFFT" not in one.attributes
            values = max(read[0].elements, out)
            return int((2.5 if real else 5) * values * math.log2(max(n, 2)))
        if one.op == "dot":
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
            axes = [int(k) for k in summed[1].split(",") if k] if summed and read else []
            return 2 * out * math.prod(read[0].sizes[k] for k in axes)
        if _is_convolution(one) and len(read) > 1:
            labels = re.search(r"dim_labels=\w+_(\w+)->", one.attributes)
            features = read[1].sizes[labels[1].index("o")] if labels else 1
            return 2 * out * read[1].elements // max(1, features)
        if one.op == "custom-call" and "gemm" in one.attributes and len(read) > 1:
            return 2 * math.isqrt(read[0].elements * read[1].elements * out)
        if one.op == "reduce":
            return sum(shape.elements for shape in read[: max(1, len(read) // 2)])
        if one.op == "reduce-window":
            window = re.search(r"size=([\dx]+)", one.attributes)
            return out * (math.prod(map(int, window[1].split("x"))) if window else 1)
        if one.op in (*NOTHING, *MOVES, "fusion", "custom-call", "convert"):
            return 0
        return out


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    """From what follows "name = ": a type, an operator, operands in brackets, attributes."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else f"{rest} ".index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    shapes = tuple(
        Shape(dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", kind))
        if dtype in SIZES
    )
    op, _, _ = rest.partition("(")
    close = _closing(rest, len(op))
    inside = rest[len(op) + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) if op != "constant" else ()
    attributes = rest[close + 1 :]
    return Instruction(name, shapes, op, operands, attributes, root)


def _closing(text: str, start: int) -> int:
    """Place of the bracket that closes the one at `start`; the text's end without it."""
    depth = 0
    for k in range(start, len(text)):
        depth += (text[k] in "({[") - (text[k] in ")}]")
        if depth == 0:
            return k
    return len(text)


def stage_of(scope: str) -> str:
    """The stage that a scope lies in; empty where in none."""
    parts = set(re.split(r"[/()]", scope))
    return next((stage for stage in STAGES if stage in parts), "")


def _shapes_of(body: Mapping[str, Instruction], names: Iterable[str]) -> list[Shape]:
    return [body[name].shapes[0] for name in names if name in body and body[name].shapes]


def _read(inner: Mapping[str, Instruction], parameter: Instruction) -> int:
    """Bytes that a fusion reads of one parameter: all, or what slices take of it."""
    readers = [x for x in inner.values() if parameter.name in x.operands]
    cut = ("slice", "dynamic-slice", "gather")
    taken = [x.shapes[0].bytes for x in readers if x.op in cut and x.operands[0] == parameter.name]
    whole = sum(shape.bytes for shape in parameter.shapes)
    return min(whole, sum(taken)) if readers and len(taken) == len(readers) else whole


def _written(inner: Mapping[str, Instruction], one: Instruction) -> Sequence[Shape]:
    """What a fusion writes: of a buffer that it changes in place only the change."""
    root = next((x for x in inner.values() if x.root), None)
    if root is not None and root.op == "dynamic-update-slice":
        return _shapes_of(inner, root.operands[1:2])
    return one.shapes


def _is_convolution(one: Instruction) -> bool:
    return one.op == "convolution" or "__cudnn$conv" in one.attributes


def _kind(one: Instruction, inner: Mapping[str, Instruction]) -> str:
    ops = {x.op for x in inner.values()} or {one.op}
    if _is_convolution(one) or "convolution" in ops:
        return "convolution"
    if "dot" in ops or re.search(r'custom_call_target="__cublas|gemm', one.attributes):
        return "product"
    if one.op in ("fft", "copy"):
        return {"fft": "fft", "copy": "layout"}[one.op]
    if one.op == "custom-call":
        return "custom"
    computing = ops - set(NOTHING) - set(MOVES) - {"convert", "fusion"}
    if not computing:
        return "layout"
    return "reduction" if computing & {"reduce", "reduce-window"} else "elementwise"


# --- what follows of it ---------------------------------------------------------------------------


def count(kernels: Sequence[Kernel], by: str) -> dict[str, int]:
    """Launches of a run by "kind" or "stage", in the order of the table of those."""
    found: Counter[str] = Counter()
    for kernel in kernels:
        found[getattr(kernel, by)] += kernel.times
    return {name: found[name] for name in (*KINDS, *STAGES, REST) if name in found}


def seconds(kernel: Kernel, figures: Mapping[str, float]) -> float:
    """One launch by the roofline: the longer of computing and moving, and the launch itself.

    `figures`: "fp32" and "bf16", operations/s, a multiply-add as two; "bandwidth", bytes/s;
    "launch", s. bfloat16 products run in tensor cores, float32 ones outside them. What is no
    product does one operation where a multiply-add would be two, so half of "fp32" is its peak.
    """
    peak = figures["fp32"] / 2
    if kernel.kind in ("convolution", "product"):
        peak = figures["bf16" if kernel.dtype in ("bf16", "f16") else "fp32"]
    at_work = max(kernel.flops / peak, kernel.bytes / figures["bandwidth"])
    return at_work + figures["launch"]


def total(kernels: Sequence[Kernel], figures: Mapping[str, float]) -> float:
    """Seconds of a run by the roofline: kernels one after the other."""
    return sum(kernel.times * seconds(kernel, figures) for kernel in kernels)


def rounded(kernels: Iterable[Kernel], stages: Iterable[str]) -> list[str]:
    """Kernels of these stages whose products hardware may round: not float32 of "highest"."""
    wanted = set(stages)
    return [kernel.name for kernel in kernels if kernel.stage in wanted and not kernel.exact]
