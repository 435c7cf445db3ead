"""How a foreign graph is called: what its input is, and which of its outputs is the score."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax.convert.graph import ConvertError, Graph, Node, Value
from artifactnet_jax.convert.inline import aliased, inlined
from artifactnet_jax.convert.node_call import written
from artifactnet_jax.convert.operators import evaluate, x64
from artifactnet_jax.convert.original import tensors_of, to_model
from artifactnet_jax.convert.trace import Trace, probe, probe_audio

SEGMENT_SAMPLES = cfg.FrontEnd().segment_samples  # where a graph leaves the number open
PROBE_SEGMENTS = 3


@dataclasses.dataclass(frozen=True)
class Contract:
    """How a graph is called."""

    input: str
    dtype: str
    axes: tuple[str, ...]  # "n" segments, "samples", "1"
    samples: int
    segments: int | None  # number that every call must have; None: any
    output: str
    song: bool  # one score for all segments together, not one for each
    # Where the score is made of an output of the file, see `scored`.
    of: str = ""
    column: int | None = None
    logit: bool = False

    def shaped(self, audio: np.ndarray) -> np.ndarray:
        """Audio [n, samples] in the shape and dtype of the graph's input."""
        sizes = {"n": len(audio), "samples": self.samples, "1": 1}
        return audio.reshape([sizes[axis] for axis in self.axes]).astype(self.dtype)


def scored(graph: Graph, wanted: str | None, logit: bool) -> tuple[Graph, dict[str, Any]]:
    """The graph with a score made of one of its outputs, and `of`, `column`, `logit`.

    wanted: NAME or NAME:COLUMN. Of a column, the score is that of the last axis; of a logit, its
    sigmoid; of a column of logits, that of their softmax. Raises ConvertError.
    """
    names = [value.name for value in graph.outputs]
    name, column = wanted, None
    if wanted is not None and wanted not in names:
        name, _, digits = wanted.rpartition(":")
        column = int(digits) if digits.isdecimal() else None
        if name not in names or column is None:
            raise ConvertError(f"it has no output {wanted!r}: it has {', '.join(names)}")
    if column is None and not logit:
        return graph, {}
    if name is None:
        if len(names) > 1:
            raise ConvertError(
                f"it has outputs {', '.join(names)}: name the logit with --score-output"
            )
        (name,) = names
    count = next(value.shape[-1:] for value in graph.outputs if value.name == name)
    if column is not None and count and isinstance(count[0], int) and column >= count[0]:
        raise ConvertError(f"{name}:{column}: this output has {count[0]} columns, from 0")
    nodes, constants = list(graph.nodes), dict(graph.constants)
    made = name if column is None else f"{name}:{column}"
    if logit:
        op, attributes = ("Sigmoid", {}) if column is None else ("Softmax", {"axis": -1})
        made = f"P({made})"
        last = made if column is None else f"P({name})"
        nodes.append(Node(op, made, (name,), (last,), attributes))
    if column is not None:
        constants[f"{made}/column"] = np.asarray(column, np.int64)
        source = f"P({name})" if logit else name
        inputs = (source, f"{made}/column")
        nodes.append(Node("Gather", made, inputs, (made,), {"axis": -1}))
    outputs = (Value(made, "", ()),)
    graph = dataclasses.replace(graph, nodes=tuple(nodes), constants=constants, outputs=outputs)
    return graph, {"of": name, "column": column, "logit": logit}


def examine(
    graph: Graph,
    output: str | None = None,
    *,
    logit: bool = False,
    several: bool = True,
) -> tuple[Graph, Contract, Trace]:
    """Find out how the graph is called, and run it once on the probe. Raises ConvertError.

    `output` and `logit` say what the score is made of: see `scored`, which also gives the graph
    that is returned. With `several` False a graph that takes any number of segments is given one at
    a time.
    """
    if len(graph.inputs) != 1:
        names = ", ".join(value.name for value in graph.inputs)
        raise ConvertError(
            f"it has {len(graph.inputs)} inputs ({names}); a detector has one: audio"
        )
    given = graph.inputs[0]
    shape = " x ".join("?" if size is None else str(size) for size in given.shape)
    if not given.dtype.startswith("float"):
        raise ConvertError(f"its input {given.name} is {given.dtype}, not floating-point audio")
    long = [k for k, size in enumerate(given.shape) if isinstance(size, int) and size >= 4096]
    open_ = [k for k, size in enumerate(given.shape) if not isinstance(size, int) or size < 0]
    rank = len(given.shape)
    if not long and open_ and rank <= 3 and open_[-1] == rank - 1:
        long = [rank - 1]  # the number of samples is left open
    if len(long) != 1 or not 1 <= rank <= 3:
        raise ConvertError(f"its input {given.name} is {shape}, not audio [segments, samples]")
    size = given.shape[long[0]]
    samples = size if isinstance(size, int) and size > 0 else SEGMENT_SAMPLES
    axes = ["1"] * rank
    axes[long[0]] = "samples"
    others = [k for k in range(rank) if k != long[0]]
    large = [k for k in others if k in open_ or given.shape[k] != 1]
    if len(large) > 1 and not set(large) <= set(open_):
        raise ConvertError(f"its input {given.name} is {shape}, not audio [segments, samples]")
    for k in (large or others)[:1]:
        axes[k] = "n"
    segments: int | None = 1
    if large:
        count = given.shape[large[0]]
        segments = None if large[0] in open_ or not isinstance(count, int) else count
    contract = Contract(given.name, given.dtype, tuple(axes), samples, segments, "", False)
    graph, made = scored(graph, output, logit)
    output = graph.outputs[0].name if made else output
    contract = dataclasses.replace(contract, **made)
    trials = [segments] if segments is not None else [PROBE_SEGMENTS, 1][not several :]
    for attempt, n in enumerate(trials):
        try:
            trace = run_probe(graph, contract, n)
        except ConvertError:
            if attempt + 1 == len(trials):
                raise
            continue
        found, song = _score_output(graph, contract, trace, output)
        if segments is None and n == 1:
            segments = 1
        elif n == 1:
            song = False
        contract = dataclasses.replace(contract, segments=segments, output=found, song=song)
        return graph, contract, trace
    raise ConvertError("it neither scores each segment nor gives one score for all of them")


def run_probe(graph: Graph, contract: Contract, n: int) -> Trace:
    """Run the graph on `n` segments of the probe and keep what the recogniser reads."""
    audio = probe_audio(n, contract.samples)
    feed = contract.shaped(audio)
    stored = frozenset((*graph.constants, *(out for node in graph.nodes for out in node.outputs)))
    while True:
        static, shapes, dtypes = _facts(graph, contract, feed)
        plain = inlined(graph, static, shapes)
        if plain is graph:
            break
        graph = plain
    _as_inferred(graph, contract, shapes)
    graph = aliased(graph, dtypes)
    run = tuple(node for node in graph.nodes if any(out in shapes for out in node.outputs))
    graph = dataclasses.replace(graph, nodes=run)
    made = [out for node in run for out in node.outputs if out in dtypes and out not in static]
    small = [contract.input, *(out for out in made if math.prod(shapes[out]) <= 8 * audio.size)]
    values = tensors_of(graph, {contract.input: feed}, small)
    return Trace(graph, n, static, shapes, values, stored, np.dtype(np.float16) in dtypes.values())


def _facts(
    graph: Graph, contract: Contract, feed: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]], dict[str, Any]]:
    """Static values, and shapes and dtypes of all tensors, without computing anything."""
    static: dict[str, np.ndarray] = dict(graph.constants)
    shapes: dict[str, tuple[int, ...]] = {name: x.shape for name, x in static.items()}
    dtypes: dict[str, Any] = {name: x.dtype for name, x in static.items()}
    shapes[contract.input], dtypes[contract.input] = feed.shape, feed.dtype

    def observe(name: str, value: Any) -> None:
        if isinstance(value, list):  # a sequence
            return
        shapes[name], dtypes[name] = tuple(value.shape), value.dtype
        if isinstance(value, np.ndarray):
            static[name] = value

    with x64():
        jax.eval_shape(lambda x: evaluate(graph, {contract.input: x}, observe=observe), feed)
    return static, shapes, dtypes


def _as_inferred(graph: Graph, contract: Contract, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold the shapes of a run against ONNX's own inference.

    Raises ConvertError, naming the first node whose output has another shape than the standard
    gives it: what follows would be computed from something else than the model's author meant.
    """
    import onnx

    entry = dataclasses.replace(graph.inputs[0], shape=shapes[contract.input])
    model = onnx.load_model_from_string(to_model(dataclasses.replace(graph, inputs=(entry,))))
    stated = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    expected = {value.name: value.type.tensor_type for value in stated.value_info}
    expected |= {value.name: value.type.tensor_type for value in stated.output}
    for node in graph.nodes:
        for name in node.outputs:
            if name not in shapes or not (name in expected and expected[name].HasField("shape")):
                continue
            dims = expected[name].shape.dim
            known = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
            got = shapes[name]
            if len(got) != len(known) or any(
                n not in (None, m) for n, m in zip(known, got, strict=True)
            ):
                raise ConvertError(
                    f"node {node.name!r} ({node.op}) gives {written(got)} here, and ONNX's shape "
                    f"inference says {written(known)}: a mistake of this converter; please report "
                    "it, and export the model with another form of this layer"
                )


def _score_output(
    graph: Graph, contract: Contract, trace: Trace, wanted: str | None
) -> tuple[str, bool]:
    """Name of the output that is a score, and whether it is one for all segments."""
    n = trace.segments
    problems, found = [], []
    for name in [value.name for value in graph.outputs] if wanted is None else [wanted]:
        if name in trace.static:
            problems.append(f"{name} does not depend on the audio")
            continue
        values = trace.values.get(name)
        size = math.prod(trace.shapes[name])
        if values is None or size not in (1, n):
            problems.append(_too_many(trace, name))
        elif not np.all(np.isfinite(values)):
            problems.append(f"{name} is not finite on ordinary audio")
        elif problem := _no_probability(trace, name, values):
            problems.append(problem)
        else:
            found.append((name, size == 1 and n > 1))
    chosen = []
    for name, song in found:
        for label, values in _on_other_audio(graph, contract, name, n):
            if problem := _no_probability(trace, name, values[np.isfinite(values)], f" on {label}"):
                problems.append(problem)
                break
        else:
            chosen.append((name, song))
    if not chosen:
        raise ConvertError(f"its output is not a score: {'; '.join(problems)}")
    if contract.logit and (bounded := _bounded(trace, contract.of)):
        raise ConvertError(f"--logit: {contract.of} is no logit: it is the output of {bounded}")
    if len(chosen) > 1:
        several = ", ".join(name for name, _ in chosen)
        raise ConvertError(
            f"outputs {several} could each be the score: choose one with --score-output"
        )
    return chosen[0]


def _too_many(trace: Trace, name: str) -> str:
    """Why an output of several values for each segment is no score, and the cure."""
    values, shape = trace.values.get(name), trace.shapes[name]
    each = math.prod(shape) / trace.segments
    said = f"{name} has {each:g} values for each segment, not one score"
    if values is None or not shape or shape[-1] != each or not 2 <= each <= 16:
        return said
    columns = "" if each == 2 else ", and so on"
    cure = f"name the column of AI with --score-output {name}:0 or {name}:1{columns}"
    inside = values.min() >= -1e-3 and values.max() <= 1 + 1e-3
    if inside and np.allclose(values.sum(axis=-1), 1, atol=1e-2):
        return f"{said}: {cure}"
    return f"{said}: {cure}; with --logit, where they are logits"


_MOVES = {"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Gather", "Slice"}
_MOVES |= {"Split", "Transpose"}


def _last(trace: Trace, name: str) -> Node | None:
    """The node that computes an output, past those that only move its values."""
    node = trace.producer.get(name)
    while node is not None and node.op in _MOVES:
        node = trace.producer.get(node.inputs[0])
    return node


def _bounded(trace: Trace, name: str) -> str:
    """The node that keeps an output in [0, 1] by itself, or nothing."""
    node = _last(trace, name)
    kept = node is not None and node.op in ("Sigmoid", "Softmax", "HardSigmoid")
    return f"{node.op} node {node.name!r}" if node is not None and kept else ""


def _no_probability(trace: Trace, name: str, values: np.ndarray, where: str = "") -> str:
    """Why an output is no probability, of values for some audio; or nothing."""
    cure = "if it is a logit, convert the model with --logit"
    if values.size and (values.min() < -1e-6 or values.max() > 1 + 1e-6):
        number = values.reshape(-1)[np.argmax(np.abs(values - 0.5))]
        return f"{name} is {number:.3g} on a probe{where}: not a probability; {cure}"
    node = _last(trace, name)
    linear = node is not None and node.op in ("Gemm", "MatMul", "Conv")
    if node is not None and node.op == "Add":  # of a bias
        before = [trace.producer.get(x) for x in node.inputs if x not in trace.static]
        linear = len(before) == 1 and before[0] is not None and before[0].op in ("MatMul", "Conv")
        node = before[0] if linear else node
    if linear and node is not None:
        weight = trace.static.get(node.inputs[1])
        mean = weight is not None and weight.min() >= 0 and weight.sum() <= 1 + 1e-4
        if weight is not None and not mean:
            return (
                f"{name} comes from a linear layer ({node.op} node {node.name!r}) with nothing "
                f"that keeps it in [0, 1]: not a probability; {cure}"
            )
    return ""


def _on_other_audio(
    graph: Graph, contract: Contract, name: str, n: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Values of an output for loud, quiet, sparse and silent audio, by what the audio is."""
    found = [x for x in probe(contract.samples).items() if not x[0].startswith("music ")]
    for start in range(0, len(found), n):
        some = (found[start : start + n] * n)[:n]
        feed = {contract.input: contract.shaped(np.stack([audio for _, audio in some]))}
        yield " and ".join(dict(some)), tensors_of(graph, feed, [name])[name]


def sample_rate(graph: Graph) -> int:
    """Hz, from the metadata; a graph itself does not tell, and ArtifactNet's is 44,100."""
    stated = graph.metadata.get("sample_rate", "")
    return int(stated) if stated.isdigit() and int(stated) > 0 else cfg.FrontEnd().sample_rate
