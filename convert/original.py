"""The original graph, run by onnxruntime where that is installed, else by our own operators."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from artifactnet_jax.backends import cpu_count
from artifactnet_jax.convert.graph import ConvertError, Graph
from artifactnet_jax.text import brief


def session(model: bytes | str, threads: int | None = None, optimise: bool = True) -> Any:
    """An onnxruntime session on the CPU. Raises ConvertError when it cannot load the model."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or cpu_count()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception classes are not public
        raise ConvertError(f"onnxruntime cannot load it: {brief(error)}") from error


def to_model(graph: Graph, outputs: Sequence[str] | None = None) -> bytes:
    """The graph as one ONNX file again, any of its tensors as outputs."""
    import onnx
    from onnx import helper, numpy_helper

    def attribute(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return numpy_helper.from_array(value)
        return proto(value, [v.name for v in value.outputs]) if isinstance(value, Graph) else value

    def proto(part: Graph, names: Sequence[str]) -> Any:
        nodes = [
            helper.make_node(
                node.op,
                node.inputs,
                node.outputs,
                **{key: attribute(value) for key, value in node.attributes.items()},
            )
            for node in part.nodes
        ]
        inputs = [
            helper.make_tensor_value_info(
                value.name,
                helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype)),
                value.shape,
            )
            for value in part.inputs
        ]
        constants = [numpy_helper.from_array(array, name) for name, array in part.constants.items()]
        # Outputs without a type: the runtime infers it.
        ends = [onnx.ValueInfoProto(name=name) for name in names]
        return helper.make_graph(nodes, "graph", inputs, ends, constants)

    names = [value.name for value in graph.outputs] if outputs is None else outputs
    opset = helper.make_opsetid("", graph.opset)
    model = helper.make_model(proto(graph, names), opset_imports=[opset])
    model.ir_version = min(model.ir_version, 10)
    return bytes(model.SerializeToString())


def tensors_of(
    graph: Graph, feeds: Mapping[str, np.ndarray], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Values of some of a graph's tensors. Raises ConvertError when the graph does not run."""
    given = {name: feeds[name] for name in names if name in feeds}
    wanted = [name for name in names if name not in feeds]
    if not wanted:
        return given
    if importlib.util.find_spec("onnxruntime") is None:
        from artifactnet_jax.convert.operators import evaluate

        computed = evaluate(graph, feeds, wanted)
        return given | {name: np.asarray(value) for name, value in computed.items()}
    run = session(to_model(graph, wanted), optimise=False)
    try:
        values = run.run(wanted, dict(feeds))
    except Exception as error:  # as above
        raise ConvertError(f"onnxruntime cannot run it: {brief(error)}") from error
    return given | dict(zip(wanted, values, strict=True))
