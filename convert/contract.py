"""How a foreign graph is called: what its input is, and which of its outputs is the score."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax.convert.graph import ConvertError, Graph
from artifactnet_jax.convert.inline import aliased, inlined
from artifactnet_jax.convert.node_call import written
from artifactnet_jax.convert.operators import evaluate, x64
from artifactnet_jax.convert.original import tensors_of, to_model
from artifactnet_jax.convert.trace import Trace, probe_audio

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

    def shaped(self, audio: np.ndarray) -> np.ndarray:
        """Audio [n, samples] in the shape and dtype of the graph's input."""
        sizes = {"n": len(audio), "samples": self.samples, "1": 1}
        return audio.reshape([sizes[axis] for axis in self.axes]).astype(self.dtype)


def examine(
    graph: Graph, output: str | None = None, *, several: bool = True
) -> tuple[Contract, Trace]:
    """Find out how the graph is called, and run it once on the probe. Raises ConvertError.

    With `several` False a graph that takes any number of segments is given one at a time.
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
    trials = [segments] if segments is not None else [PROBE_SEGMENTS, 1][not several :]
    for attempt, n in enumerate(trials):
        try:
            trace = run_probe(graph, contract, n)
        except ConvertError:
            if attempt + 1 == len(trials):
                raise
            continue
        found, song = _score_output(graph, trace, output)
        if segments is None and n == 1:
            segments = 1
        elif n == 1:
            song = False
        return dataclasses.replace(contract, segments=segments, output=found, song=song), trace
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


def _score_output(graph: Graph, trace: Trace, wanted: str | None) -> tuple[str, bool]:
    """Name of the output that is a score, and whether it is one for all segments."""
    names = [value.name for value in graph.outputs]
    if wanted is not None and wanted not in names:
        raise ConvertError(f"it has no output {wanted!r}: it has {', '.join(names)}")
    n = trace.segments
    problems, found = [], []
    for name in names if wanted is None else [wanted]:
        if name in trace.static:
            problems.append(f"{name} does not depend on the audio")
            continue
        values = trace.values.get(name)
        size = math.prod(trace.shapes[name])
        if values is None or size not in (1, n):
            problems.append(f"{name} has {size / n:g} values for each segment, not one score")
        elif not np.all(np.isfinite(values)):
            problems.append(f"{name} is not finite on ordinary audio")
        elif values.min() < -1e-6 or values.max() > 1 + 1e-6:
            number = values.reshape(-1)[np.argmax(np.abs(values))]
            problems.append(f"{name} is {number:.3g} on a probe: not a probability")
        else:
            found.append((name, size == 1 and n > 1))
    if not found:
        raise ConvertError(f"its output is not a score: {'; '.join(problems)}")
    if len(found) > 1:
        several = ", ".join(name for name, _ in found)
        raise ConvertError(
            f"outputs {several} could each be the score: choose one with --score-output"
        )
    return found[0]


def sample_rate(graph: Graph) -> int:
    """Hz, from the metadata; a graph itself does not tell, and ArtifactNet's is 44,100."""
    stated = graph.metadata.get("sample_rate", "")
    return int(stated) if stated.isdigit() and int(stated) > 0 else cfg.FrontEnd().sample_rate
