"""Operators in JAX against onnxruntime, one by one and in a whole graph."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from artifactnet_jax.convert.graph import ConvertError, Graph, Node, Value, read_graph
from artifactnet_jax.convert.operators import compile_graph, evaluate, supported, x64
from artifactnet_jax.convert.simplify import simplify

F32, I64 = np.float32, np.int64
few = settings(max_examples=12, deadline=None, derandomize=True)


def noise(*shape: int, seed: int = 0, dtype: Any = F32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, I64)


def oracle(
    op: str,
    inputs: Sequence[np.ndarray | None],
    attributes: Mapping[str, Any],
    opset: int,
    outputs: int,
) -> list[np.ndarray]:
    """What onnxruntime makes of one node."""
    names = ["" if value is None else f"i{k}" for k, value in enumerate(inputs)]
    node = helper.make_node(op, names, [f"o{k}" for k in range(outputs)], **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
            )
            for name, value in zip(names, inputs, strict=True)
            if value is not None
        ],
        [onnx.ValueInfoProto(name=f"o{k}") for k in range(outputs)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = {n: v for n, v in zip(names, inputs, strict=True) if v is not None}
    return session.run(None, feeds)


def one_node(
    op: str, inputs: Sequence[np.ndarray | None], attributes: Mapping[str, Any], opset: int, n: int
) -> Graph:
    names = tuple("" if value is None else f"i{k}" for k, value in enumerate(inputs))
    plain = {
        key: tuple(value) if isinstance(value, list) else value for key, value in attributes.items()
    }
    outputs = tuple(f"o{k}" for k in range(n))
    node = Node(op, "the node", names, outputs, plain)
    values = tuple(Value(name, "", ()) for name in outputs)
    return Graph((node,), {}, (), values, opset)


def check(
    op: str,
    *inputs: np.ndarray | None,
    opset: int = 17,
    data: Sequence[int] = (0,),
    outputs: int = 1,
    rtol: float = 2e-6,
    atol: float = 2e-6,
    want: list[np.ndarray] | None = None,
    static: bool = True,
    **attributes: Any,
) -> None:
    """One node against onnxruntime: inputs `data` as data, the rest static; then all `static`."""
    if want is None:
        want = oracle(op, inputs, attributes, opset, outputs)
    graph = one_node(op, inputs, attributes, opset, outputs)
    arrays = {f"i{k}": value for k, value in enumerate(inputs) if value is not None}
    for feeds in ({f"i{k}": arrays[f"i{k}"] for k in data}, {})[: 1 + static]:
        graph.constants = {name: value for name, value in arrays.items() if name not in feeds}
        with x64():  # compiled as a whole: operators one by one take many times longer
            run = jax.jit(lambda feeds: evaluate(graph, feeds)) if feeds else None
            found = run(feeds) if run else evaluate(graph, feeds)
        assert len(found) == len(want)
        for value, expected in zip(found.values(), want, strict=True):
            assert isinstance(value, np.ndarray) or feeds
            assert value.dtype == expected.dtype
            assert value.shape == expected.shape
            np.testing.assert_allclose(np.asarray(value), expected, rtol=rtol, atol=atol)


dynamic = functools.partial(check, static=False)

# fmt: off
UNARY = [
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Cos", "Cosh", "Elu", "Erf",
    "Exp", "Floor", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Neg",
    "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus",
    "Softsign", "Sqrt", "Tan", "Tanh", "ThresholdedRelu", "Celu", "Shrink", "IsNaN", "Not",
    "Mish", "Gelu", "GlobalLpPool",
]
# fmt: on


@pytest.mark.parametrize("op", UNARY)
def test_unary(op: str) -> None:
    x = noise(2, 3, 4)
    if op in ("Acos", "Asin", "Atanh"):
        x = np.tanh(x)
    elif op in ("Log", "Sqrt", "Acosh"):
        x = np.abs(x) + 1
    elif op == "Not":
        x = x > 0
    elif op == "Round":
        x = np.asarray([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.4], F32)
    check(op, x, opset=20 if op == "Gelu" else 18, atol=1e-5 if op == "Tan" else 2e-6)


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("Elu", {"alpha": 0.3}),
        ("Celu", {"alpha": 0.3}),
        ("Selu", {"alpha": 1.2, "gamma": 0.7}),
        ("LeakyRelu", {"alpha": 0.2}),
        ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
        ("ThresholdedRelu", {"alpha": 0.4}),
        ("Shrink", {"bias": 0.2, "lambd": 0.7}),
        ("Gelu", {"approximate": "tanh"}),
    ],
)
def test_unary_attributes(op: str, attributes: dict[str, Any]) -> None:
    check(op, noise(3, 50), opset=20, **attributes)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "PRelu"])
def test_binary_broadcasts(op: str) -> None:
    a, b = noise(2, 3, 4), noise(3, 1, seed=1)
    check(op, a, b)
    check(op, a, b, data=(0, 1))
    check(op, a, np.asarray(0.25, F32).reshape(()))


@pytest.mark.parametrize("op", ["Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"])
def test_compare(op: str) -> None:
    a = ints(1, 2, 3, 4)
    check(op, a, ints(1, 3, 2, 4))
    check(op, a.astype(F32), np.asarray([2], F32), data=(0, 1))


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_logic(op: str) -> None:
    check(op, np.asarray([True, False]), np.asarray([[True], [False]]))


@pytest.mark.parametrize("op", ["BitwiseAnd", "BitwiseOr", "BitwiseXor"])
def test_bits(op: str) -> None:
    check(op, np.arange(8, dtype=np.int32), np.asarray([5], np.int32), opset=18)


def test_bit_shift() -> None:
    x = np.asarray([1, 5, 200], np.uint8)
    check("BitShift", x, np.asarray([1, 2, 3], np.uint8), direction="LEFT")
    check("BitShift", x, np.asarray([1, 2, 3], np.uint8), direction="RIGHT")


def test_integer_division_cuts_off() -> None:
    a, b = ints(7, -7, 7, -7, 6, -6), ints(2, 2, -2, -2, 3, 3)
    check("Div", a, b)
    check("Mod", a, b)
    check("Mod", a, b, fmod=1)
    check("Mod", noise(8), noise(8, seed=1), fmod=1)


@pytest.mark.parametrize(
    ("op", "dtype", "want"),
    [
        *(("ReduceMax", F32, -np.inf), ("ReduceMin", F32, np.inf), ("ReduceMax", I64, -(2**63))),
        *(("ReduceMin", np.int8, 127), ("ReduceMax", np.bool_, False)),
        ("ReduceMin", np.bool_, True),
    ],
)
def test_extremes_of_nothing(op: str, dtype: Any, want: Any) -> None:
    """By the standard: what changes no comparison."""
    for keep, shape in ((1, (2, 1, 4)), (0, (2, 4))):
        expected = [np.full(shape, want, dtype)]
        check(op, np.zeros((2, 0, 4), dtype), ints(1), opset=20, keepdims=keep, want=expected)


@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_swish(alpha: float) -> None:
    x = noise(3, 4)
    check("Swish", x, opset=24, want=[x / (1 + np.exp(-alpha * x))], alpha=alpha)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "int4", "uint2", "float4_e2m1fn"])
def test_casts_to_narrow_types_are_refused(kind: str) -> None:
    """JAX does not saturate as ONNX does."""
    like = np.zeros(1, getattr(ml_dtypes, kind))
    graph = one_node("CastLike", [noise(3), like], {}, 25, 1)
    with pytest.raises(ConvertError, match=f"{kind} is not supported; export the model in float32"):
        evaluate(graph, {"i0": noise(3), "i1": like})
    number = helper.np_dtype_to_tensor_dtype(like.dtype)
    with pytest.raises(ConvertError, match="not supported; export the model in float32"):
        evaluate(one_node("Cast", [noise(3)], {"to": number}, 25, 1), {"i0": noise(3)})


def test_products_in_bfloat16_are_refused() -> None:
    wide = Node("Cast", "wide", ("x",), ("b",), {"to": TensorProto.BFLOAT16})
    graph = tiny(wide, Node("MatMul", "product", ("b", "b"), ("y",), {}))
    with pytest.raises(ConvertError, match=r"'product' \(MatMul\): bfloat16 is not supported; exp"):
        evaluate(graph, {"x": noise(4, 4)})


def test_division_of_nothing_is_not_a_number() -> None:
    zero = np.zeros(3, F32)
    check("Div", zero, zero, data=(0, 1))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 3.0, -1.5])
def test_pow(exponent: float) -> None:
    x = np.abs(noise(3, 4)) + F32(0.1)
    check("Pow", x, np.asarray(exponent, F32), rtol=1e-5)
    check("Pow", x, np.full((1, 4), exponent, F32), rtol=1e-5)


def test_pow_of_another_type() -> None:
    check("Pow", noise(3, 4), np.asarray(2, I64))
    check("Pow", noise(3, 4), ints(2, 3, 2, 1))
    check("Pow", ints(1, 2, 3), np.asarray([2.5], F32))


def test_clip() -> None:
    x = noise(3, 4)
    check("Clip", x, opset=10, min=-0.5, max=0.4)
    check("Clip", x, opset=10, min=-0.5)
    check("Clip", x, np.asarray(-0.5, F32), np.asarray(0.4, F32))
    check("Clip", x, None, np.asarray(0.4, F32))
    check("Clip", ints(1, 5, 9), np.asarray(2, I64))


def test_casts() -> None:
    x = np.asarray([-1.7, -0.2, 0.0, 1.7], F32)
    for kind in (TensorProto.INT64, TensorProto.BOOL, TensorProto.DOUBLE, TensorProto.FLOAT16):
        check("Cast", x, to=kind)
    check("Cast", np.asarray([True, False]), to=TensorProto.FLOAT)
    check("CastLike", x, np.zeros(1, np.float64))


def test_where_and_infinities() -> None:
    a = np.asarray([1, np.inf, -np.inf, np.nan], F32)
    check("IsInf", a)
    check("IsInf", a, detect_negative=0)
    check("IsNaN", a)
    check("Where", np.asarray([[True], [False]]), noise(4), noise(2, 1), data=(0, 1, 2))


def test_64_bits() -> None:
    """Song graphs sum in float64, shapes are int64."""
    check("Add", noise(5, dtype=np.float64), noise(5, seed=1, dtype=np.float64), rtol=1e-15, atol=0)
    check("ReduceSum", noise(5000, dtype=np.float64), rtol=1e-13, atol=0)
    check("Mul", ints(2**40), ints(3))


# --- Shapes -------------------------------------------------------------------------------------


def test_shape_and_size() -> None:
    x = noise(2, 3, 4)
    check("Shape", x)
    check("Shape", x, start=1)
    check("Shape", x, start=-2, end=-1)
    check("Size", x)


@pytest.mark.parametrize("shape", [(0, -1), (4, 6), (-1,), (2, 0, 2, 2)])
def test_reshape(shape: tuple[int, ...]) -> None:
    check("Reshape", noise(2, 3, 4), ints(*shape))


def test_reshape_to_nothing() -> None:
    check("Reshape", noise(0, 3), ints(3, 0), allowzero=1, opset=14)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_flatten(axis: int) -> None:
    check("Flatten", noise(2, 3, 4), axis=axis)


def test_squeeze_and_unsqueeze() -> None:
    x = noise(1, 3, 1, 4)
    check("Squeeze", x)
    check("Squeeze", x, ints(0, -2))
    check("Squeeze", x, opset=11, axes=[2])
    check("Unsqueeze", x, ints(0, -1))
    check("Unsqueeze", x, opset=11, axes=[1, 5])


def test_transpose_and_concat() -> None:
    check("Transpose", noise(2, 3, 4))
    check("Transpose", noise(2, 3, 4), perm=[1, 2, 0])
    check("Concat", noise(2, 3), noise(2, 1), data=(0, 1), axis=1)
    check("Concat", noise(2, 3), noise(1, 3), data=(1,), axis=-2)


def test_split() -> None:
    x = noise(2, 7)
    check("Split", x, ints(3, 4), outputs=2, axis=1)
    check("Split", x, opset=11, outputs=2, axis=1, split=[2, 5])
    check("Split", x, opset=18, outputs=3, axis=1, num_outputs=3)
    check("Split", x, outputs=2, axis=0)


@few
@given(
    starts=st.lists(st.integers(-9, 9), min_size=2, max_size=2),
    ends=st.lists(st.integers(-9, 9) | st.just(-(2**63)), min_size=2, max_size=2),
    steps=st.lists(st.sampled_from([1, 2, 3, -1, -2]), min_size=2, max_size=2),
)
def test_slice(starts: list[int], ends: list[int], steps: list[int]) -> None:
    check("Slice", noise(6, 2, 5), ints(*starts), ints(*ends), ints(0, -1), ints(*steps))


def test_slice_of_old() -> None:
    check("Slice", noise(6, 5), opset=9, starts=[1, -3], ends=[100, -1], axes=[0, 1])
    check("Slice", noise(6, 5), opset=9, starts=[1], ends=[3])
    check("Slice", noise(6, 5), ints(1, 2), ints(3, 4))


def test_gather() -> None:
    x = noise(5, 6, 4)
    check("Gather", x, np.asarray(-2, I64), axis=1)
    check("Gather", x, ints(3, 0, -1), axis=1)
    check("Gather", x, ints(1, 3, 5), axis=1)
    check("Gather", x, np.asarray([[0, 1, 2], [1, 2, 3]], I64), axis=-2)
    check("Gather", x, ints(4, 2), axis=0, data=(0, 1))
    check("GatherElements", x, np.asarray([[[0, -1], [2, 3]]], I64), axis=2, data=(0, 1))
    check("GatherND", x, np.asarray([[0, 1], [4, -1]], I64))
    check("GatherND", x, np.asarray([[0], [1], [2], [3], [-1]], I64), batch_dims=1)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatter(reduction: str) -> None:
    x, reduce = noise(4, 5), {} if reduction == "none" else {"reduction": reduction}
    dynamic("ScatterND", x, np.asarray([[1], [-1]], I64), noise(2, 5, seed=1), opset=18, **reduce)
    places = np.asarray([[0, 2, -1]], I64)
    dynamic("ScatterElements", x, places, noise(1, 3, seed=1), axis=1, opset=18, **reduce)


def test_expand_and_tile() -> None:
    check("Expand", noise(3, 1), ints(2, 1, 4))
    check("Expand", noise(2, 3, 1), ints(4))
    check("Tile", noise(2, 3), ints(2, 1))


@few
@given(
    mode=st.sampled_from(["constant", "reflect", "edge"]),
    pads=st.lists(st.integers(-2, 4), min_size=4, max_size=4),
)
def test_pad(mode: str, pads: list[int]) -> None:
    if mode != "constant":  # onnxruntime crops otherwise than it says
        pads = [abs(n) for n in pads]
    check("Pad", noise(5, 6), ints(*pads), mode=mode)


def test_pad_in_other_forms() -> None:
    x = noise(5, 6)
    check("Pad", x, ints(1, 2), np.asarray(3, F32), ints(-1), opset=18)
    check("Pad", x, opset=10, pads=[1, 0, 2, 3], value=1.5)
    check("Pad", x, ints(1, 2, 3, 4), mode="wrap", opset=19)
    check("Pad", ints(1, 2), ints(1, 1), np.asarray(7, I64))


def test_tensors_from_shapes() -> None:
    check("ConstantOfShape", ints(2, 3), data=())
    three = helper.make_tensor("value", TensorProto.INT64, [1], [3])
    want = oracle("ConstantOfShape", [ints(2)], {"value": three}, 17, 1)
    check("ConstantOfShape", ints(2), data=(), value=ints(3), want=want)
    check("Range", np.asarray(3, I64), np.asarray(-4, I64), np.asarray(-2, I64), data=())
    check("Range", *(np.asarray(n, F32) for n in (0, 1, 0.3)), data=())
    check("EyeLike", noise(3, 4), k=1)
    check("NonZero", np.asarray([[1, 0], [2, 3]], I64), data=())
    check("OneHot", ints(1, -1, 7), ints(3), np.asarray([0.5, 2], F32))
    check("OneHot", ints(1, -1), np.asarray(3, I64), np.asarray([0, 1], F32), axis=0)
    check("Trilu", noise(2, 4, 5))
    check("Trilu", noise(4, 5), np.asarray(1, I64), upper=0)


def test_cumsum() -> None:
    x, axis = noise(3, 5), np.asarray(1, I64)
    check("CumSum", x, axis)
    check("CumSum", x, axis, exclusive=1)
    check("CumSum", x, axis, reverse=1)
    check("CumSum", x, axis, exclusive=1, reverse=1)


def test_depth_and_space() -> None:
    x = noise(2, 8, 2, 3)
    check("DepthToSpace", x, blocksize=2)
    check("DepthToSpace", x, blocksize=2, mode="CRD")
    check("SpaceToDepth", noise(2, 3, 4, 6), blocksize=2)


def test_static_values_of_any_operator() -> None:
    """Also of those that only JAX has, within a trace too."""
    x = noise(4, 3)
    check("MatMul", x, noise(3, 2))
    check("TopK", x, ints(2), outputs=2, axis=0)
    check("ScatterND", x, np.asarray([[1], [-1]], I64), noise(2, 3, seed=1))
    nodes = (
        Node("MatMul", "a", ("w", "w"), ("square",), {}),
        Node("Add", "b", ("square", "x"), ("y",), {}),
    )
    graph = Graph(nodes, {"w": x[:3]}, (Value("x", "float32", (3, 3)),), (Value("y", "", ()),), 17)
    np.testing.assert_allclose(compile_graph(graph, (3, 3))(x[1:]), x[:3] @ x[:3] + x[1:], 1e-5)


def test_dropout_and_sequences() -> None:
    check("Dropout", noise(3, 4))
    x = noise(6, 4)
    nodes = (
        Node("SplitToSequence", "split", ("x", "two"), ("parts",), {"axis": 0}),
        Node("SequenceAt", "at", ("parts", "one"), ("y",), {}),
        Node("SequenceConstruct", "make", ("y", "y"), ("pair",), {}),
        Node("ConcatFromSequence", "join", ("pair",), ("z",), {"axis": 0, "new_axis": 1}),
        Node("SequenceLength", "count", ("parts",), ("n",), {}),
    )
    constants = {"two": np.asarray(2, I64), "one": np.asarray(1, I64)}
    graph = Graph(nodes, constants, (Value("x", "float32", (6, 4)),), (), 17)
    found = evaluate(graph, {"x": x}, ["z", "n"])
    np.testing.assert_array_equal(np.asarray(found["z"]), np.stack([x[2:4], x[2:4]]))
    assert found["n"].item() == 3


# --- Reductions ---------------------------------------------------------------------------------


REDUCTIONS = ["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp"]


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduce(name: str) -> None:
    op, x = f"Reduce{name}", np.abs(noise(2, 3, 4)) + F32(0.5)
    check(op, x, opset=11, rtol=1e-5)
    check(op, x, opset=11, axes=[-1, 0], keepdims=0, rtol=1e-5)
    check(op, x, ints(1), opset=18, keepdims=0, rtol=1e-5)
    check(op, x, opset=18, noop_with_empty_axes=1, rtol=1e-5)


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum"])
def test_long_sums_keep_their_precision(op: str) -> None:
    """A spectrogram's mean, taken off before a network, must not depend on who adds it up."""
    x = np.abs(noise(1, 1000, 400)) + F32(5)
    exact = x.astype(np.float64).mean() if op == "ReduceMean" else x.astype(np.float64).sum()
    dynamic(op, x, want=[exact.astype(F32).reshape(1, 1, 1)], rtol=1e-7, atol=0)


def test_reduce_integers() -> None:
    check("ReduceSum", ints(3, 4), ints(0))
    check("ReduceProd", ints(3, 4), keepdims=0)
    check("ReduceMax", ints(3, 4))


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1])
def test_arg(op: str, last: int) -> None:
    x = np.asarray([[1, 3, 3], [2, 0, 0]], F32)
    check(op, x, axis=1, select_last_index=last)
    check(op, x, axis=-2, keepdims=0, select_last_index=last)


@few
@given(
    axis=st.integers(-3, 2),
    k=st.integers(1, 4),
    largest=st.booleans(),
    outputs=st.integers(1, 2),
    dtype=st.sampled_from([F32, np.float64, np.int64]),
)
def test_top_k(axis: int, k: int, largest: bool, outputs: int, dtype: Any) -> None:
    x = np.random.default_rng(k).integers(-3, 4, (4, 5, 6)).astype(dtype)  # with ties
    wanted = oracle("TopK", [x, ints(k)], {"axis": axis, "largest": int(largest)}, 17, 2)
    want = wanted[:outputs]
    dynamic("TopK", x, ints(k), outputs=outputs, want=want, axis=axis, largest=int(largest))


# --- Convolution and pooling --------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2])
def test_conv(rank: int, group: int) -> None:
    x, w = noise(2, 4, *(9, 8, 7)[:rank]), noise(6, 4 // group, *(3, 2, 3)[:rank], seed=1)
    dynamic("Conv", x, w, noise(6, seed=2), group=group, atol=1e-5)
    dynamic("Conv", x, w, group=group, pads=[1, 0, 2, 1, 2, 0][: 2 * rank], atol=1e-5)
    dynamic("Conv", x, w, group=group, strides=[2] * rank, dilations=[2] * rank, atol=1e-5)
    dynamic("Conv", x, w, data=(0, 1), atol=1e-5, group=group)


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_auto_pad(auto: str, stride: int) -> None:
    x, strides = noise(1, 2, 9, 8), [stride, stride]
    dynamic("Conv", x, noise(3, 2, 3, 4), auto_pad=auto, strides=strides, atol=1e-5)
    dynamic("MaxPool", x, auto_pad=auto, strides=strides, kernel_shape=[3, 2])
    dynamic("AveragePool", x, auto_pad=auto, strides=strides, kernel_shape=[3, 2])


@few
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    group=st.sampled_from([1, 2]),
    pads=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    more=st.tuples(st.integers(0, 1), st.integers(0, 1)),
)
def test_conv_transpose(
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    group: int,
    pads: list[int],
    more: tuple[int, int],
) -> None:
    more = tuple(min(n, s - 1) for n, s in zip(more, strides, strict=True))  # type: ignore[assignment]
    dynamic(
        "ConvTranspose",
        noise(2, 4, 5, 4),
        noise(4, 3, *kernel, seed=1),
        noise(3 * group, seed=2),
        strides=list(strides),
        dilations=list(dilations),
        group=group,
        pads=pads,
        output_padding=list(more),
        atol=1e-5,
    )


def test_conv_transpose_in_other_forms() -> None:
    dynamic("ConvTranspose", noise(1, 2, 7), noise(2, 3, 5), strides=[3], atol=1e-5)
    dynamic(
        "ConvTranspose", noise(1, 2, 3, 4, 2), noise(2, 3, 2, 2, 2), strides=[2, 2, 2], atol=1e-5
    )
    x, w = noise(1, 2, 5, 4), noise(2, 3, 4, 4)
    for wanted in ([10, 9], [12, 10], [9, 10]):
        dynamic("ConvTranspose", x, w, strides=[2, 2], output_shape=wanted, atol=1e-5)
        more = {"output_padding": [1, 0], "auto_pad": "SAME_UPPER", "strides": [2, 2]}
        dynamic("ConvTranspose", x, w, output_shape=wanted, atol=1e-5, **more)
    # Above its natural size, which onnxruntime refuses and the standard's own test has: zeros at
    # the end, and the bias on them too.
    bias = noise(3, seed=2)
    (want,) = oracle("ConvTranspose", [x, w], {"strides": [3, 2]}, 17, 1)
    want = np.pad(want, ((0, 0), (0, 0), (0, 4), (0, 3))) + bias[:, None, None]
    shape = list(want.shape[2:])
    more = {"strides": [3, 2], "output_shape": shape, "want": [want]}
    dynamic("ConvTranspose", x, w, bias, atol=1e-5, **more)
    dynamic("ConvTranspose", x, w, strides=[2, 2], pads=[1, 1, 1, 1], data=(0, 1), atol=1e-5)
    for auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        dynamic("ConvTranspose", x, noise(2, 3, 3, 3), strides=[2, 2], auto_pad=auto, atol=1e-5)


@few
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    pads=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    ceil=st.integers(0, 1),
    padded=st.integers(0, 1),
)
def test_pools(
    kernel: int, stride: int, dilation: int, pads: list[int], ceil: int, padded: int
) -> None:
    common: dict[str, Any] = {
        "kernel_shape": [kernel, kernel],
        "strides": [stride, stride],
        "pads": [min(n, kernel - 1) for n in pads],
        "ceil_mode": ceil,
    }
    x = noise(2, 3, 9, 8)
    dynamic("MaxPool", x, dilations=[dilation, dilation], **common)
    dynamic("AveragePool", x, count_include_pad=padded, opset=19, **common)


def test_other_pools() -> None:
    x = noise(2, 3, 7, 6)
    dynamic("GlobalAveragePool", x)
    dynamic("GlobalMaxPool", x)
    dynamic("LpPool", x, kernel_shape=[3, 3], strides=[2, 2])
    dynamic("LpPool", x, kernel_shape=[2, 2], p=1, pads=[1, 1, 0, 0])
    dynamic("MaxPool", noise(2, 3, 9), kernel_shape=[2], strides=[2])
    dynamic("AveragePool", noise(2, 3, 9), kernel_shape=[2], dilations=[2], opset=19)


# --- Products and norms -------------------------------------------------------------------------


def test_products() -> None:
    dynamic("MatMul", noise(3, 4), noise(2, 4, 5), data=(0, 1))
    dynamic("MatMul", noise(2, 3, 4), noise(4))
    dynamic("MatMul", noise(4), noise(2, 4, 3))
    dynamic("Gemm", noise(3, 4), noise(4, 5), noise(5), alpha=0.5, beta=2.0)
    dynamic("Gemm", noise(4, 3), noise(5, 4), transA=1, transB=1)
    dynamic("Gemm", noise(3, 4), noise(4, 5), np.asarray(1.5, F32))
    dynamic("Einsum", noise(2, 3, 4), noise(2, 4, 5), equation="b i j, b j k -> b i k")


@pytest.mark.parametrize("opset", [9, 15])
def test_batch_norm(opset: int) -> None:
    values = [np.abs(noise(3, seed=n)) + F32(0.1) for n in range(4)]
    dynamic("BatchNormalization", noise(2, 3, 4, 5), *values, opset=opset, epsilon=1e-3)
    dynamic("BatchNormalization", noise(2, 3), *values, opset=opset)


def test_norms() -> None:
    x, scale, bias = noise(2, 6, 4, 5), noise(6, seed=1), noise(6, seed=2)
    dynamic("InstanceNormalization", x, scale, bias, atol=1e-5)
    dynamic("InstanceNormalization", noise(2, 6, 9), scale, bias, epsilon=1e-2, atol=1e-5)
    dynamic("GroupNormalization", x, scale, bias, opset=21, num_groups=3, atol=1e-5)
    dynamic("GroupNormalization", x, scale[:3], bias[:3], opset=18, num_groups=3, atol=1e-5)
    dynamic("LayerNormalization", x, noise(5), noise(5), outputs=3, atol=1e-5)
    dynamic("LayerNormalization", x, noise(4, 5), axis=2, epsilon=1e-3, atol=1e-5)
    dynamic("LpNormalization", x, axis=1)
    dynamic("LpNormalization", x, p=1)
    dynamic("LRN", x, size=3)
    dynamic("LRN", x, size=5, alpha=0.1, beta=0.5, bias=2.0)
    dynamic("MeanVarianceNormalization", x, atol=1e-5)


def test_rms_norm() -> None:
    x, scale = noise(2, 3, 4), noise(4, seed=1)
    want = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale
    dynamic("RMSNormalization", x, scale, opset=23, want=[want.astype(F32)])


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_softmax(op: str) -> None:
    x = noise(2, 3, 4)
    dynamic(op, x)
    dynamic(op, x, axis=1)
    dynamic(op, x, opset=11)
    dynamic(op, x, opset=11, axis=2)


# --- Resizing -----------------------------------------------------------------------------------

COORDINATES = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]


@few
@given(
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    coordinates=st.sampled_from([*COORDINATES, "half_pixel_symmetric"]),
    rounding=st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]),
    scale=st.sampled_from([0.4, 0.5, 1.0, 1.5, 2.0, 3.0]),
    size=st.integers(3, 9),
)
def test_resize(mode: str, coordinates: str, rounding: str, scale: float, size: int) -> None:
    scales = np.asarray([1, 1, scale, 1 if mode == "cubic" and scale == 1 else 2], F32)
    dynamic(
        "Resize",
        noise(1, 2, size, 6),
        None,
        scales,
        opset=19,
        mode=mode,
        coordinate_transformation_mode=coordinates,
        nearest_mode=rounding,
        atol=2e-5,
    )


@few
@given(
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    coordinates=st.sampled_from(COORDINATES),
    rows=st.integers(2, 13),
    columns=st.integers(2, 13),
)
def test_resize_to_a_size(mode: str, coordinates: str, rows: int, columns: int) -> None:
    dynamic(
        "Resize",
        noise(2, 1, 7, 5),
        None,
        None,
        ints(2, 1, rows, columns),
        opset=13,
        mode=mode,
        coordinate_transformation_mode=coordinates,
        atol=2e-5,
    )


def test_resize_in_other_forms() -> None:
    x, scales = noise(1, 2, 4, 6), np.asarray([1, 1, 2, 2], F32)
    dynamic("Resize", x, scales, opset=10)
    dynamic("Resize", x, scales / np.asarray([1, 1, 4, 4], F32), opset=10)
    dynamic("Resize", x, scales, opset=10, mode="linear")
    dynamic("Upsample", x, scales, opset=9)
    dynamic("Upsample", x, opset=8, scales=[1.0, 1.0, 2.0, 3.0], mode="linear")
    dynamic("Resize", x, None, None, ints(7, 9), opset=18, axes=[2, 3], mode="linear")
    for policy in ("not_larger", "not_smaller"):
        dynamic(
            "Resize",
            *(x, None, None, ints(7, 9)),
            opset=18,
            axes=[2, 3],
            keep_aspect_ratio_policy=policy,
        )
    cubic = {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5}
    dynamic("Resize", x, np.zeros(0, F32), scales, opset=11, atol=2e-5, **cubic)
    box = np.asarray([0, 0, 0.2, -0.1, 1, 1, 0.9, 1.2], F32)
    dynamic(
        "Resize",
        *(x, box, None, ints(1, 2, 5, 7)),
        opset=13,
        mode="linear",
        coordinate_transformation_mode="tf_crop_and_resize",
        extrapolation_value=9.0,
        atol=2e-5,
    )
    with pytest.raises(ConvertError, match=r"'the node' \(Resize\): antialias is not supported"):
        dynamic("Resize", x, None, scales, opset=18, antialias=1, mode="linear", want=[x])


# --- Spectra ------------------------------------------------------------------------------------


@pytest.mark.parametrize("hop", [8, 5])
@pytest.mark.parametrize("onesided", [0, 1])
def test_stft(hop: int, onesided: int) -> None:
    x, window = noise(2, 100, 1), np.hanning(16).astype(F32)
    step, size = np.asarray(hop, I64), np.asarray(16, I64)
    dynamic("STFT", x, step, window, onesided=onesided, atol=1e-5)
    dynamic("STFT", x, step, None, size, onesided=onesided, atol=1e-5)


def test_dft() -> None:
    x, z = noise(2, 12, 1), noise(2, 12, 2)
    dynamic("DFT", x, onesided=1, atol=5e-5)
    dynamic("DFT", z, atol=5e-5)
    dynamic("DFT", z, inverse=1, atol=5e-5)
    dynamic("DFT", x, np.asarray(8, I64), atol=5e-5)
    dynamic("DFT", noise(2, 5, 6, 1), axis=2, onesided=1, atol=5e-5)
    dynamic("DFT", x, None, np.asarray(-2, I64), opset=20, onesided=1, atol=5e-5)
    dynamic("DFT", x, opset=20, atol=5e-5)


def half(op: str, *inputs: np.ndarray | None, opset: int = 17, **attributes: Any) -> None:
    """A node of halves against the same in float64, of the same numbers, rounded once."""
    halves = [x if x is None or x.dtype != F32 else x.astype(np.float16) for x in inputs]
    doubles = [x if x is None or x.dtype != np.float16 else x.astype(np.float64) for x in halves]
    with x64():
        exact = evaluate(one_node(op, doubles, attributes, opset, 1), fed(doubles))["o0"]
        found = evaluate(one_node(op, halves, attributes, opset, 1), fed(halves))["o0"]
    assert found.dtype == np.float16
    want = np.asarray(exact, np.float64).astype(np.float16).astype(np.float64)
    step = 2.0**-10 * np.abs(want) + 2.0**-24
    np.testing.assert_array_less(np.abs(np.asarray(found, np.float64) - want), 1.01 * step)


def fed(inputs: Sequence[np.ndarray | None]) -> dict[str, np.ndarray]:
    return {f"i{k}": value for k, value in enumerate(inputs) if value is not None}


def test_halves_are_computed_in_float32() -> None:
    """Spectra, which JAX has none of in half precision, and sums that leave its range inside."""
    x, window = noise(2, 100, 1), np.hanning(16).astype(F32)
    step, size = np.asarray(8, I64), np.asarray(16, I64)
    for graph_side in (window, None):
        names = [x, step, graph_side, size]
        halves = [n if n is None or n.dtype != F32 else n.astype(np.float16) for n in names]
        graph = one_node("STFT", halves, {"onesided": 1}, 17, 1)
        graph.constants = {k: v for k, v in fed(halves).items() if k != "i0"}
        found = evaluate(graph, {"i0": halves[0]})["o0"]
        frames = np.lib.stride_tricks.sliding_window_view(halves[0][..., 0], 16, 1)[:, ::8]
        windowed = frames.astype(float) * (1 if graph_side is None else halves[2].astype(float))
        spectrum = np.fft.rfft(windowed)
        want = np.stack([spectrum.real, spectrum.imag], -1)
        assert found.dtype == np.float16
        np.testing.assert_allclose(np.asarray(found, float), want, rtol=1e-3, atol=1e-3)
    loud = 300 * np.ones((1, 400), F32)
    half("ReduceL2", loud, opset=13)
    half("ReduceMean", loud, opset=13)
    half("LpNormalization", loud)
    half("InstanceNormalization", 300 * noise(1, 2, 400), np.ones(2, F32), np.zeros(2, F32))
    half("LayerNormalization", 300 * noise(2, 400), np.ones(400, F32))
    half("MatMul", 30 * noise(3, 400), noise(400, 2))
    half("Softmax", 5 * noise(3, 40))


def test_one_sided_dft_of_halves() -> None:
    x = noise(2, 12, 1).astype(np.float16)
    for opset, more in ((17, {"axis": 1}), (20, {})):
        graph = one_node("DFT", [x], {"onesided": 1, **more}, opset, 1)
        found = evaluate(graph, {"i0": x})["o0"]
        want = np.fft.rfft(x[..., 0].astype(float))
        assert found.dtype == np.float16
        got = np.asarray(found, float)
        np.testing.assert_allclose(got, np.stack([want.real, want.imag], -1), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "says"),
    [
        ("MaxPool", 1, {"kernel_shape": (2,)}, "indices is not supported; upsample by resizing"),
        ("DFT", 1, {"onesided": 1, "inverse": 1}, "half a spectrum is not supported; invert the w"),
        ("SpaceToDepth", 1, {"blocksize": 2, "mode": "CRD"}, "'CRD' is not supported; export the"),
        ("LSTM", 8, {"hidden_size": 2}, "an LSTM with peepholes is not supported; export the la"),
        ("LSTM", 3, {"hidden_size": 2, "clip": 1.0}, "a clip of its cells is not supported; exp"),
        ("LSTM", 3, {"hidden_size": 2, "input_forget": 1}, "coupled input and forget gate is not"),
        ("GRU", 3, {"hidden_size": 2, "activations": ("Affine",)}, "its default ones"),
    ],
)
def test_what_is_not_supported_names_the_cure(
    op: str, inputs: int, attributes: dict[str, Any], says: str
) -> None:
    rank = {"DFT": 3, "MaxPool": 3}.get(op, 4 if op == "SpaceToDepth" else 3)
    x = noise(*(2,) * rank)
    weights = [noise(1, 8, 2), noise(1, 8, 2), None, None, None, None, noise(1, 6)]
    arrays = [x, *weights[: inputs - 1]]
    graph = one_node(op, arrays, attributes, 20, 2 if op == "MaxPool" else 1)
    with pytest.raises(ConvertError, match=rf"'the node' \({op}\): .*{says}"):
        evaluate(graph, fed(arrays))


@pytest.mark.parametrize("op", ["HannWindow", "HammingWindow", "BlackmanWindow"])
def test_windows(op: str) -> None:
    dynamic(op, np.asarray(9, I64), data=())
    dynamic(op, np.asarray(8, I64), data=(), periodic=0, output_datatype=TensorProto.DOUBLE)


def test_mel_matrix() -> None:
    counts = [np.asarray(n, I64) for n in (8, 64, 16000)]
    dynamic("MelWeightMatrix", *counts, *(np.asarray(f, F32) for f in (0, 8000)), data=())
    dynamic("MelWeightMatrix", *counts, *(np.asarray(f, F32) for f in (100, 7000)), data=())


# --- Recurrent layers ---------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent(op: str, gates: int, direction: str) -> None:
    n, outputs = 2 if direction == "bidirectional" else 1, 3 if op == "LSTM" else 2
    x, w, r = noise(5, 2, 3), noise(n, gates * 4, 3, seed=1), noise(n, gates * 4, 4, seed=2)
    b, h = noise(n, 2 * gates * 4, seed=3), noise(n, 2, 4, seed=4)
    common: dict[str, Any] = {"hidden_size": 4, "direction": direction, "outputs": outputs}
    dynamic(op, x, w, r, **common, atol=1e-5)
    dynamic(op, x, w, r, b, None, h, *((h,) if op == "LSTM" else ()), **common, atol=1e-5)
    if op == "GRU":
        dynamic(op, x, w, r, b, **common, linear_before_reset=1, atol=1e-5)


# --- Graphs -------------------------------------------------------------------------------------


def detector() -> onnx.ModelProto:
    """Audio -> frames -> network -> score, with the shape chains that exporters leave behind."""
    text = """<ir_version: 9, opset_import: ["": 17]>
    g (float[n, 64] audio) => (double[1] score)
       <int64[1] last = {-1}, int64[1] first = {0}, int64 zero = {0}, int64 one = {1},
        int64[1] before = {3}, int64[1] after = {5}, int64 hop = {8}, float two = {2.0},
        int64[1] axis = {1}> {
        shape = Shape (audio)
        rows = Gather <axis = 0> (shape, zero)
        rows_1 = Unsqueeze (rows, first)
        none = ConstantOfShape <value = int64[1] {0}> (axis)
        pads = Concat <axis = 0> (none, before, none, after)
        is_one = Equal (rows, one)
        scaled = If (is_one) <
            then_branch = yes () => (float[n, 64] y) { y = Mul (audio, two) },
            else_branch = no () => (float[n, 64] y) { y = Identity (audio) }
        >
        padded = Pad <mode = "reflect"> (scaled, pads)
        spectrum = STFT <onesided = 1> (padded, hop, window)
        squares = Mul (spectrum, spectrum)
        power = ReduceSum <keepdims = 0> (squares, last)
        flipped = Transpose <perm = [0, 2, 1]> (power)
        maps = Unsqueeze (flipped, axis)
        hidden = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (maps, kernel, bias)
        active = Relu (hidden)
        pooled = GlobalAveragePool (active)
        flat_shape = Concat <axis = 0> (rows_1, last)
        flat = Reshape (pooled, flat_shape)
        logit = Gemm <transB = 1> (flat, matrix)
        p = Sigmoid (logit)
        wide = Cast <to = 11> (p)
        score = ReduceMean <axes = [0], keepdims = 0> (wide)
    }"""
    model = onnx.parser.parse_model(text)
    arrays = {
        "window": np.hanning(16).astype(F32),
        "kernel": noise(40, 1, 3, 3),
        "bias": noise(40),
        "matrix": noise(1, 40),
    }
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return detector()


@pytest.fixture(scope="module")
def graph(model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    path = tmp_path_factory.mktemp("graph") / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return read_graph(path)


@pytest.fixture(scope="module")
def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_graph(graph: Graph, session: onnxruntime.InferenceSession, rows: int) -> None:
    assert supported(graph) == []
    audio = noise(rows, 64)
    (want,) = session.run(None, {"audio": audio})
    found = evaluate(graph, {"audio": audio})["score"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(np.asarray(found), want, atol=1e-7)
    compiled = compile_graph(graph, audio.shape)(audio)
    assert compiled.dtype == np.float64
    np.testing.assert_allclose(compiled, want, atol=1e-7)
    with x64():
        jitted = jax.jit(lambda x: evaluate(graph, {"audio": x})["score"])(audio)
    np.testing.assert_allclose(np.asarray(jitted), want, atol=1e-7)
    assert not jax.config.jax_enable_x64


def test_static_values_are_numbers(graph: Graph) -> None:
    seen: dict[str, Any] = {}
    evaluate(graph, {"audio": noise(2, 64)}, observe=lambda name, value: seen.update({name: value}))
    static = {name for name, value in seen.items() if isinstance(value, np.ndarray)}
    assert {"rows_1", "pads", "is_one", "flat_shape"} <= static
    assert isinstance(seen["power"], jax.Array)
    assert seen["flat_shape"].tolist() == [2, -1]


def test_only_what_is_wanted_runs(graph: Graph) -> None:
    """Between given and wanted tensors, whatever these are."""
    seen: list[str] = []
    power = np.abs(noise(2, 7, 9))
    found = evaluate(graph, {"power": power}, ["hidden"], lambda name, _: seen.append(name))
    assert seen == ["flipped", "maps", "hidden"]
    want = oracle(
        "Conv",
        [power.transpose(0, 2, 1)[:, None], graph.constants["kernel"], graph.constants["bias"]],
        {"pads": [1, 1, 1, 1], "strides": [2, 2]},
        17,
        1,
    )
    np.testing.assert_allclose(np.asarray(found["hidden"]), want[0], atol=1e-5)


def test_large_constants_are_arguments(graph: Graph) -> None:
    """A compiled graph has no weights in its program, also where static operators made them."""
    kernel = np.zeros((40, 1, 3, 3), F32)
    other = Graph(
        graph.nodes, {**graph.constants, "kernel": kernel}, graph.inputs, graph.outputs, 17
    )
    audio = noise(1, 64)
    assert compile_graph(graph, (1, 64))(audio) != compile_graph(other, (1, 64))(audio)


def test_wrong_shape(graph: Graph) -> None:
    with pytest.raises(ConvertError, match=r"'audio' has shape \[n, 64\], not \[1, 65\]"):
        compile_graph(graph, (1, 65))


def tiny(*nodes: Node, **constants: np.ndarray) -> Graph:
    outputs = (Value(nodes[-1].outputs[0], "", ()),)
    return Graph(nodes, constants, (Value("x", "float32", (None, 4)),), outputs, 17)


def test_unsupported_operator_is_named() -> None:
    graph = tiny(Node("Relu", "r", ("x",), ("y",), {}), Node("Bernoulli", "b", ("y",), ("z",), {}))
    assert supported(graph) == ["node 'b': operator Bernoulli is not supported"]
    with pytest.raises(ConvertError, match="node 'b': operator Bernoulli is not supported"):
        evaluate(graph, {"x": noise(2, 4)})


def test_failure_names_the_node() -> None:
    graph = tiny(Node("Reshape", "r", ("x", "shape"), ("y",), {}), shape=ints(3, 3))
    with pytest.raises(
        ConvertError, match=r"^node 'r' \(Reshape\) fails on .* \[2, 4\], \[2\]: .*"
    ):
        evaluate(graph, {"x": noise(2, 4)})


def test_shape_that_depends_on_data() -> None:
    graph = tiny(
        Node("Cast", "c", ("x",), ("i",), {"to": 7}), Node("Reshape", "r", ("x", "i"), ("y",), {})
    )
    with pytest.raises(ConvertError, match=r"node 'r' \(Reshape\): its shape depends on the data"):
        evaluate(graph, {"x": noise(2, 4)})


def test_missing_input() -> None:
    with pytest.raises(ConvertError, match="'x' is neither given nor computed"):
        evaluate(tiny(Node("Relu", "r", ("x",), ("y",), {})), {})


def test_values_are_freed() -> None:
    """Only what is still to be read is kept."""
    import weakref

    refs: list[Any] = []
    nodes = [Node("Exp", f"n{i}", (f"v{i}",), (f"v{i + 1}",), {}) for i in range(4)]
    graph = Graph(tuple(nodes), {}, (Value("v0", "float32", (3,)),), (Value("v4", "", ()),), 17)
    alive: list[int] = []

    def observe(_: str, value: Any) -> None:
        alive.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(value))

    evaluate(graph, {"v0": jnp.zeros(3, F32)}, observe=observe)
    assert max(alive) <= 2


# --- Rewrites -----------------------------------------------------------------------------------


def stacked(form: str, size: int, length: int, keep: bool, largest: int) -> Graph:
    """A median along the last axis but one of x [2, 3, length, 4], as exporters write it."""
    count, k = length - size + 1, size // 2 + 1
    constants = {
        "k": ints(k if keep else size),
        "middle": ints(size // 2) if keep else np.asarray(size // 2, I64),
        "last": ints(-1),
        "axis": ints(2),
        "end": ints(size // 2 + 1),
    }
    nodes = []
    if form == "slices":
        for i in range(size):
            constants |= {f"from{i}": ints(i), f"to{i}": ints(i + count)}
            nodes.append(Node("Slice", "", ("x", f"from{i}", f"to{i}", "axis"), (f"s{i}",), {}))
            nodes.append(Node("Unsqueeze", "", (f"s{i}", "last"), (f"u{i}",), {}))
        names = tuple(f"u{i}" for i in range(size))
        nodes.append(Node("Concat", "", names, ("stack",), {"axis": -1}))
        axis = 4
    else:  # a matrix of indices
        constants["places"] = np.arange(count)[None, :] + np.arange(size)[:, None]
        nodes.append(Node("Gather", "", ("x", "places"), ("stack",), {"axis": 2}))
        axis = 2
    nodes.append(
        Node("TopK", "", ("stack", "k"), ("sorted", "order"), {"axis": axis, "largest": largest})
    )
    if form == "sliced" and keep:
        constants |= {"from": ints(size // 2), "by": ints(axis)}
        nodes.append(Node("Slice", "", ("sorted", "from", "end", "by"), ("y",), {}))
    else:
        nodes.append(Node("Gather", "", ("sorted", "middle"), ("y",), {"axis": axis}))
    x = Value("x", "float32", (2, 3, length, 4))
    return Graph(tuple(nodes), constants, (x,), (Value("y", "float32", ()),), 17)


@pytest.mark.parametrize("form", ["slices", "gather", "sliced"])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("largest", [0, 1])
def test_sorted_medians_become_running_medians(form: str, keep: bool, largest: int) -> None:
    graph = stacked(form, 5, 11, keep, largest)
    simple = simplify(graph, (2, 3, 11, 4))
    assert [node.op for node in simple.nodes] == ["artifactnet.Median"]
    x = noise(2, 3, 11, 4)
    want = np.median(np.lib.stride_tricks.sliding_window_view(x, 5, 2), axis=-1)
    if keep:
        want = np.expand_dims(want, 4 if form == "slices" else 2)
    for each in (graph, simple):
        np.testing.assert_array_equal(np.asarray(evaluate(each, {"x": x})["y"]), want)
    np.testing.assert_array_equal(compile_graph(simple, x.shape)(x), want)


@pytest.mark.parametrize(
    "change",
    [
        {"from2": ints(1), "to2": ints(8)},  # a sample twice
        {"middle": np.asarray(1, I64)},  # not the middle
    ],
)
def test_what_is_no_median_is_left(change: dict[str, np.ndarray]) -> None:
    graph = stacked("slices", 5, 11, False, 0)
    graph.constants |= change
    assert simplify(graph, (2, 3, 11, 4)).nodes == graph.nodes


def test_sorted_values_that_others_read_are_left() -> None:
    graph = stacked("slices", 5, 11, False, 0)
    graph.outputs = (*graph.outputs, Value("order", "int64", ()))
    assert simplify(graph, (2, 3, 11, 4)).nodes == graph.nodes


def bases(size: int, sign: int) -> tuple[np.ndarray, np.ndarray]:
    angles = 2 * np.pi / size * np.outer(np.arange(size // 2 + 1), np.arange(size))
    window = np.hanning(size + 1)[:-1]
    return (window * np.cos(angles)).astype(F32), sign * (window * np.sin(angles)).astype(F32)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", ["two", "joined", "interleaved", "planes", "last", "first"])
def test_dfts_become_ffts(form: str, sign: int) -> None:
    size, hop = 32, 8
    cosine, sine = bases(size, sign)
    shape: tuple[int, ...] = (2, 1, 100)
    if form == "two":
        constants = {"a": cosine[:, None], "b": sine[:, None]}
    else:
        joined = np.concatenate([cosine, sine])
        if form == "interleaved":
            joined = np.stack([cosine, sine], 1).reshape(-1, size)
        constants = {"a": joined[:, None]}
    if form == "planes":
        shape, constants["a"] = (2, 1, 1, 100), constants["a"][:, None]
    if form == "last":
        shape, constants["a"] = (2, 7, size), joined.T
    if form == "first":
        shape, constants["a"] = (2, size, 7), joined
    if form in ("last", "first"):
        names = ("x", "a") if form == "last" else ("a", "x")
        nodes = (Node("MatMul", "", names, ("y",), {}),)
    else:
        strides = {"strides": (1, hop) if form == "planes" else (hop,)}
        nodes = tuple(Node("Conv", "", ("x", name), (f"y{name}",), strides) for name in constants)
    outputs = tuple(Value(node.outputs[0], "float32", ()) for node in nodes)
    graph = Graph(nodes, constants, (Value("x", "float32", shape),), outputs, 17)
    assert simplify(graph, shape).nodes == nodes
    simple = simplify(graph, shape, fft=True)
    assert {node.op for node in simple.nodes} == {"artifactnet.DFT"}
    assert len(simple.constants) == 1  # one window
    x = noise(*shape)
    want, found = evaluate(graph, {"x": x}), evaluate(simple, {"x": x})
    for name in want:
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(np.asarray(found[name]), np.asarray(want[name]), atol=2e-5)


def test_convolutions_that_are_no_dft_are_left() -> None:
    cosine, _ = bases(32, 1)
    for kernel in (noise(17, 1, 32), cosine[::2, None], np.zeros((17, 1, 32), F32)):
        nodes = (Node("Conv", "", ("x", "w"), ("y",), {"strides": (8,)}),)
        x = Value("x", "float32", (2, 1, 100))
        graph = Graph(nodes, {"w": kernel}, (x,), (Value("y", "float32", ()),), 17)
        assert simplify(graph, (2, 1, 100), fft=True).nodes == nodes
