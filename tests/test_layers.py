"""Networks of layers: every operator in both executors against onnxruntime, shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from artifactnet_jax import layers as nets
from artifactnet_jax import numpy_network
from artifactnet_jax.config import Config
from artifactnet_jax.layers import Layer, layer, shapes
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.operators import evaluate
from artifactnet_jax.passes import folded
from artifactnet_jax.presets import flops, parameter_shapes
from artifactnet_jax.weights import Weights, parameter_counts, random_tensors

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
jax = pytest.importorskip("jax")
jnp = jax.numpy
nnx = pytest.importorskip("flax.nnx")
from artifactnet_jax import model as m  # noqa: E402
from artifactnet_jax.backends.xla import build_model  # noqa: E402
from networks import PATCH, SMALL, as_layers, noise, zoo  # noqa: E402

Array = np.ndarray
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
sizes = st.integers(1, 9)
pads = st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2)
seeds = st.integers(0, 2**32 - 1)


def pair(values: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(values, values)


def onnx_pads(padding: Any) -> list[int]:
    return [padding[0][0], padding[1][0], padding[0][1], padding[1][1]]


def in_onnxruntime(nodes: list[tuple], x: Array, constants: dict[str, Array], opset: int) -> Array:
    """Output "y" of nodes (op, inputs, output, attributes) on input "x", float32, NCHW."""
    made = [onnx.helper.make_node(op, i, [o], **attrs) for op, i, o, attrs in nodes]
    graph = onnx.helper.make_graph(
        made,
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(["y"], {"x": x.astype(np.float32)})[0]


def in_flax(layers: tuple[Layer, ...], tensors: dict[str, Array], dtype: Any = jnp.float32) -> Any:
    """The network as a Flax module filled with these tensors."""
    network = m.ListNetwork(layers, rngs=nnx.Rngs(0), dtype=dtype, flat=True)
    for name, value in tensors.items():
        network.variable(name)[...] = jnp.asarray(value, jnp.float32)
    return network


def nchw(network: Any, x: Any) -> Any:
    """The module's value of maps [B, C, H, W], or of vectors [B, C]."""
    return jnp.moveaxis(network.run(jnp.moveaxis(x, 1, -1)), -1, 1)


def in_numpy(layers: tuple[Layer, ...], tensors: dict[str, Array], x: Array, dtype: Any) -> Array:
    """One example [C, H, W] or [C] through the NumPy executor."""
    tensors = {name: value.astype(dtype) for name, value in tensors.items()}
    out = numpy_network.run(layers, tensors, np.moveaxis(x, 0, -1).astype(dtype))
    assert out.dtype == dtype
    return np.moveaxis(out, -1, 0)


def check(
    one: Layer,
    x: Array,
    nodes: list[tuple],
    tensors: dict[str, Array] | None = None,
    constants: dict[str, Array] | None = None,
    opset: int = 18,
    atol: float = 2e-5,
    flax: bool = True,
) -> None:
    """A layer on x [B, C, ...] in both executors, against ONNX nodes from "x" to "y".

    Without `flax` in NumPy only: for the many shapes of what both share, each of which jax would
    compile anew.
    """
    named = {f"{one.name}.{leaf}": value for leaf, value in (tensors or {}).items()}
    expected = in_onnxruntime(nodes, x, constants or {}, opset)
    assert expected.shape[1:] == shapes([one], x.shape[1:])[one.name]
    scale = max(1.0, float(np.abs(expected).max()))
    for dtype in (np.float32, np.float64):
        ours = np.stack([in_numpy((one,), named, each, dtype) for each in x])
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=atol * scale)
    if flax:
        out = nchw(in_flax((one,), named), jnp.asarray(x, jnp.float32))
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=atol * scale)


def draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def possible(one: Layer, shape: tuple[int, ...]) -> bool:
    try:
        return bool(shapes([one], shape))
    except ValueError:
        return False


@few
@given(
    *[st.integers(1, 12)] * 2,
    pair(st.integers(1, 5)),
    pair(st.integers(1, 3)),
    pads,
    pair(st.integers(1, 2)),
    st.sampled_from([(1, 3, 2), (1, 1, 4), (2, 2, 3), (4, 1, 1), (3, 1, 2)]),
    st.booleans(),
    seeds,
)
@example(9, 8, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 3, 2), True, 0)
@example(9, 8, (3, 2), (2, 1), ((0, 2), (1, 0)), (1, 2), (2, 2, 3), False, 0)
@example(9, 8, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (3, 1, 1), True, 0)
def test_conv(h, w, kernel, strides, padding, dilations, channels, bias, seed):
    groups, i, each = channels
    o = groups * each
    tensors = {"kernel": draw(seed, *kernel, i, o)} | ({"bias": draw(seed, o)} if bias else {})
    attrs = {"strides": strides, "padding": padding, "dilations": dilations, "groups": groups}
    one = layer("l", "conv", ["input"], attrs, {k: v.shape for k, v in tensors.items()})
    assume(possible(one, (groups * i, h, w)))
    constants = {"k": tensors["kernel"].transpose(3, 2, 0, 1)}
    constants |= {"b": tensors["bias"]} if bias else {}
    node = {
        "strides": strides,
        "pads": onnx_pads(padding),
        "dilations": dilations,
        "group": groups,
    }
    x = draw(seed + 1, 2, groups * i, h, w)
    nodes = [("Conv", ["x", *constants], "y", node)]
    check(one, x, nodes, tensors, constants, flax=seed == 0)


@few
@given(
    *[st.integers(1, 7)] * 2,
    pair(st.integers(1, 5)),
    pair(st.integers(1, 3)),
    pads,
    pair(st.integers(0, 2)),
    st.booleans(),
    st.booleans(),
    seeds,
)
@example(4, 3, (2, 2), (2, 2), ((0, 0), (0, 0)), (0, 0), True, True, 0)
@example(4, 3, (4, 4), (2, 2), ((1, 1), (1, 1)), (0, 0), False, True, 0)
@example(4, 3, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), False, True, 0)
@example(4, 3, (1, 5), (3, 2), ((0, 0), (0, 2)), (2, 1), False, False, 0)
def test_conv_transpose(h, w, kernel, strides, padding, more, square, bias, seed):
    if square:  # the fast form
        kernel, padding, more = strides, ((0, 0), (0, 0)), (0, 0)
    assume(all(a < s for a, s in zip(more, strides, strict=True)))
    tensors = {"kernel": draw(seed, *kernel, 3, 2)} | ({"bias": draw(seed, 2)} if bias else {})
    attrs = {"strides": strides, "padding": padding, "output_padding": more}
    one = layer("l", "conv_transpose", ["input"], attrs, {k: v.shape for k, v in tensors.items()})
    assume(possible(one, (3, h, w)))
    constants = {"k": tensors["kernel"].transpose(2, 3, 0, 1)}
    constants |= {"b": tensors["bias"]} if bias else {}
    node = {"strides": strides, "pads": onnx_pads(padding), "output_padding": more}
    x = draw(seed + 1, 2, 3, h, w)
    nodes = [("ConvTranspose", ["x", *constants], "y", node)]
    check(one, x, nodes, tensors, constants, flax=seed == 0)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    tensors = {"kernel": draw(0, 5, 3)} | ({"bias": draw(1, 3)} if bias else {})
    one = layer("l", "linear", ["input"], {}, {k: v.shape for k, v in tensors.items()})
    constants = {"k": tensors["kernel"]} | ({"b": tensors["bias"]} if bias else {})
    check(one, draw(2, 2, 5), [("Gemm", ["x", *constants], "y", {})], tensors, constants)


@pytest.mark.parametrize("shape", [(6, 5, 4), (6,)])
def test_batch_norm(shape):
    tensors = {leaf: np.abs(draw(k, 6)) for k, leaf in enumerate(("scale", "bias", "mean", "var"))}
    one = layer("l", "batch_norm", ["input"], {"epsilon": 1e-3}, dict.fromkeys(tensors, (6,)))
    node = ("BatchNormalization", ["x", *tensors], "y", {"epsilon": 1e-3})
    check(one, draw(9, 2, *shape), [node], tensors, tensors)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(groups, affine):
    tensors = {"scale": draw(0, 6), "bias": draw(1, 6)} if affine else {}
    attrs = {"groups": groups, "epsilon": 1e-4}
    one = layer("l", "group_norm", ["input"], attrs, {k: v.shape for k, v in tensors.items()})
    constants = {
        "scale": tensors.get("scale", np.ones(6, np.float32)),
        "bias": tensors.get("bias", np.zeros(6, np.float32)),
    }
    node = {"num_groups": groups, "epsilon": 1e-4}
    x = 3 + draw(2, 2, 6, 5, 7)
    nodes = [("GroupNormalization", ["x", *constants], "y", node)]
    check(one, x, nodes, tensors, constants, opset=21)


@pytest.mark.parametrize("size", [1, 4])
def test_prelu(size):
    slope = draw(0, size)
    one = layer("l", "prelu", ["input"], {}, {"slope": (size,)})
    constants = {"s": slope.reshape(size, 1, 1)}
    x = draw(1, 2, 4, 3, 5)
    check(one, x, [("PRelu", ["x", "s"], "y", {})], {"slope": slope}, constants)


POOL = (8, 7, (3, 2), (2, 1), ((1, 2), (0, 1)))


@few
@given(
    *[st.integers(1, 12)] * 2,
    pair(st.integers(1, 5)),
    pair(st.integers(1, 3)),
    pads,
    st.sampled_from(["max_pool", "avg_pool"]),
    st.booleans(),
    seeds,
)
@example(*POOL, "max_pool", False, 0)
@example(*POOL, "avg_pool", False, 0)
@example(*POOL, "avg_pool", True, 0)
def test_pools(h, w, kernel, strides, padding, op, include, seed):
    attrs: dict[str, Any] = {"kernel": kernel, "strides": strides, "padding": padding}
    node = {"kernel_shape": kernel, "strides": strides, "pads": onnx_pads(padding)}
    if op == "avg_pool":
        attrs["count_include_pad"] = include
        node["count_include_pad"] = int(include)
    one = layer("l", op, ["input"], attrs)
    assume(possible(one, (3, h, w)))
    name = {"max_pool": "MaxPool", "avg_pool": "AveragePool"}[op]
    check(one, draw(seed, 2, 3, h, w) - 2, [(name, ["x"], "y", node)], flax=seed == 0)


@pytest.mark.parametrize("op", ["mean", "max", "sum"])
@pytest.mark.parametrize("axes", ["hw", "chw", "c", "w"])
def test_reductions(op, axes):
    one = layer("l", op, ["input"], {"axes": axes})
    constants = {"a": np.array([1 + "chw".index(letter) for letter in axes], np.int64)}
    node = ({"mean": "ReduceMean", "max": "ReduceMax", "sum": "ReduceSum"}[op], ["x", "a"], "y", {})
    check(one, draw(0, 2, 3, 5, 7), [node], None, constants)


def resizes(function):
    """Cases for jax too, seed 0: every form that the code has."""
    modes = ("half_pixel", "align_corners", "asymmetric")
    for coordinates in modes:
        for size in ((4, 15), (7, 2)):
            function = example((2, 5), size, False, 2.0, "linear", coordinates, "floor", 0)(
                function
            )
    for coordinates, rounding in (("asymmetric", "floor"), ("half_pixel", "round_prefer_ceil")):
        function = example((2, 5), (4, 7), False, 2.0, "nearest", coordinates, rounding, 0)(
            function
        )
    return function


@settings(few, max_examples=200)
@resizes
@given(
    pair(sizes),
    pair(st.integers(1, 20)),
    st.booleans(),
    st.sampled_from([1.5, 2.0, 3.0, 0.5, 1.37]),
    st.sampled_from(["nearest", "linear"]),
    st.sampled_from(["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]),
    st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]),
    seeds,
)
def test_resize(size_in, size, by_scale, scale, mode, coordinates, rounding, seed):
    scales = tuple(b / a for a, b in zip(size_in, size, strict=True))
    if by_scale:
        scales = (scale, scale)
        size = tuple(int(np.floor(np.float32(n) * np.float32(scale))) for n in size_in)
        assume(min(size) > 0)
    attrs = {"size": size, "scales": scales, "mode": mode, "coordinates": coordinates}
    one = layer("l", "resize", ["input"], {**attrs, "rounding": rounding})
    node: dict[str, Any] = {
        "mode": mode,
        "coordinate_transformation_mode": coordinates,
        "nearest_mode": rounding,
    }
    x = draw(seed, 2, 2, *size_in)
    if by_scale:
        constants = {"s": np.array([1, 1, *scales], np.float32)}
        inputs = ["x", "", "s"]
    else:
        constants = {"s": np.array([2, 2, *size], np.int64)}
        inputs = ["x", "", "", "s"]
    nodes = [("Resize", inputs, "y", node)]
    check(one, x, nodes, None, constants, flax=seed == 0 and not by_scale)


@few
@given(pair(st.integers(3, 6)), pads, st.sampled_from(["constant", "reflect", "edge"]), seeds)
def test_pad(size, padding, mode, seed):
    one = layer("l", "pad", ["input"], {"padding": padding, "mode": mode, "value": -0.5})
    flat = np.array([0, 0, padding[0][0], padding[1][0], 0, 0, padding[0][1], padding[1][1]])
    constants = {"p": flat, "v": np.array(-0.5, np.float32)}
    x = draw(seed, 2, 3, *size)
    check(one, x, [("Pad", ["x", "p", "v"], "y", {"mode": mode})], None, constants, flax=seed == 0)


@pytest.mark.parametrize(
    ("axis", "start", "stop", "step"), [("c", 1, 3, 1), ("h", 0, 9, 2), ("w", 2, 6, 3)]
)
def test_slice(axis, start, stop, step):
    one = layer("l", "slice", ["input"], {"axis": axis, "start": start, "stop": stop, "step": step})
    constants = {
        "b": np.array([start]),
        "e": np.array([stop]),
        "a": np.array([1 + "chw".index(axis)]),
        "s": np.array([step]),
    }
    check(one, draw(0, 2, 4, 7, 8), [("Slice", ["x", *constants], "y", {})], None, constants)


@pytest.mark.parametrize("axis", ["c", "h", "w"])
def test_concat_and_softmax(axis):
    at = 1 + "chw".index(axis)
    x = draw(0, 2, 3, 4, 5)
    one = layer("l", "concat", ["input", "input"], {"axis": axis})
    check(one, x, [("Concat", ["x", "x"], "y", {"axis": at})])
    check(
        layer("l", "softmax", ["input"], {"axis": axis}),
        5 * x,
        [("Softmax", ["x"], "y", {"axis": at})],
    )


@pytest.mark.parametrize("order", ["DCR", "CRD"])
def test_depth_to_space_and_back(order):
    attrs = {"rows": 2, "cols": 2, "order": order}
    x = draw(0, 2, 8, 3, 5)
    one = layer("l", "depth_to_space", ["input"], attrs)
    check(one, x, [("DepthToSpace", ["x"], "y", {"blocksize": 2, "mode": order})])
    back = layer("b", "space_to_depth", ["l"], attrs)
    np.testing.assert_array_equal(in_numpy((one, back), {}, x[0], np.float32), x[0])
    np.testing.assert_array_equal(nchw(in_flax((one, back), {}), jnp.asarray(x)), x)
    if order == "DCR":
        one = layer("l", "space_to_depth", ["input"], attrs)
        x = draw(0, 2, 3, 4, 6)
        check(one, x, [("SpaceToDepth", ["x"], "y", {"blocksize": 2})])


def test_depth_to_space_of_oblong_patches():
    # PixelShuffle's order by hand: out[c, h * 2 + r, w * 3 + s] = in[c * 6 + r * 3 + s, h, w].
    x = draw(0, 12, 2, 2)
    one = layer("l", "depth_to_space", ["input"], {"rows": 2, "cols": 3, "order": "CRD"})
    out = in_numpy((one,), {}, x, np.float32)
    for c, r, s in np.ndindex(2, 2, 3):
        np.testing.assert_array_equal(out[c, r::2, s::3], x[c * 6 + r * 3 + s])
    np.testing.assert_array_equal(nchw(in_flax((one,), {}), jnp.asarray(x)[None])[0], out)


def test_transpose_and_flatten():
    x = draw(0, 2, 3, 4, 5)
    one = layer("l", "transpose_hw", ["input"])
    check(one, x, [("Transpose", ["x"], "y", {"perm": (0, 1, 3, 2)})])
    check(layer("l", "flatten", ["input"]), x, [("Flatten", ["x"], "y", {"axis": 1})])


ELEMENTWISE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "relu": ("Relu", {}, {}),
    "sigmoid": ("Sigmoid", {}, {}),
    "tanh": ("Tanh", {}, {}),
    "softplus": ("Softplus", {}, {}),
    "softsign": ("Softsign", {}, {}),
    "hard_swish": ("HardSwish", {}, {}),
    "mish": ("Mish", {}, {}),
    "exp": ("Exp", {}, {}),
    "log": ("Log", {}, {}),
    "sqrt": ("Sqrt", {}, {}),
    "reciprocal": ("Reciprocal", {}, {}),
    "abs": ("Abs", {}, {}),
    "neg": ("Neg", {}, {}),
    "erf": ("Erf", {}, {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.3}, {"alpha": 0.3}),
    "elu": ("Elu", {"alpha": 0.7}, {"alpha": 0.7}),
    "celu": ("Celu", {"alpha": 0.7}, {"alpha": 0.7}),
    "selu": ("Selu", {"alpha": 1.5, "gamma": 1.1}, {"alpha": 1.5, "gamma": 1.1}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, {"alpha": 0.3, "beta": 0.4}),
    "gelu": ("Gelu", {"approximate": "tanh"}, {"approximate": "tanh"}),
    "gelu ": ("Gelu", {}, {}),
    "leaky_relu ": ("LeakyRelu", {}, {}),  # the defaults
    "elu ": ("Elu", {}, {}),
    "celu ": ("Celu", {}, {}),
    "selu ": ("Selu", {}, {}),
    "hard_sigmoid ": ("HardSigmoid", {}, {}),
}


@pytest.mark.parametrize("op", ELEMENTWISE)
@pytest.mark.parametrize("shape", [(3, 4, 5), (60,)])
def test_elementwise(op, shape):
    name, attrs, node = ELEMENTWISE[op]
    x = np.linspace(-7, 7, 120, dtype=np.float32).reshape(2, *shape)
    x = np.abs(x) if op in ("log", "sqrt", "reciprocal") else x
    one = layer("l", op.strip(), ["input"], attrs)
    check(one, x, [(name, ["x"], "y", node)], opset=22 if name == "HardSwish" else 20, atol=1e-6)


def test_every_operator_of_the_table_is_tested_and_known_to_both_executors():
    assert set(nets.ELEMENTWISE) == {op.strip() for op in ELEMENTWISE}
    assert set(nets.ELEMENTWISE) == set(numpy_network.ELEMENTWISE) == set(m.ELEMENTWISE)


@pytest.mark.parametrize(("low", "high"), [(None, 0.5), (-0.5, None), (-0.5, 0.5)])
def test_clip(low, high):
    one = layer("l", "clip", ["input"], {"low": low, "high": high})
    ends = {"low": low, "high": high}
    constants = {name: np.array(v, np.float32) for name, v in ends.items() if v is not None}
    inputs = ["x", *(name if v is not None else "" for name, v in ends.items())]
    check(one, draw(0, 2, 3, 4, 5), [("Clip", inputs, "y", {})], None, constants)


ARITHMETIC = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "pow": "Pow",
    "maximum": "Max",
    "minimum": "Min",
}


@pytest.mark.parametrize("op", ARITHMETIC)
@pytest.mark.parametrize("reverse", [False, True])
def test_arithmetic_with_a_constant(op, reverse):
    for shape in ((3, 4, 5), (5,)):
        x = 0.5 + np.abs(draw(0, 2, *shape))
        for value in (2.0, 0.7):
            one = layer("l", op, ["input"], {"value": value, "reverse": reverse})
            inputs = ["v", "x"] if reverse else ["x", "v"]
            check(
                one,
                x,
                [(ARITHMETIC[op], inputs, "y", {})],
                None,
                {"v": np.array(value, np.float32)},
            )
    for shape in ((), (1,), (5,), (4, 1), (3, 1, 1), (3, 4, 5), (1, 1, 5)):
        value = 0.5 + np.abs(draw(1, *shape))
        x = 0.5 + np.abs(draw(0, 2, 3, 4, 5))
        one = layer("l", op, ["input"], {"reverse": reverse}, {"value": shape})
        inputs = ["v", "x"] if reverse else ["x", "v"]
        node = (ARITHMETIC[op], inputs, "y", {})
        check(one, x, [node], {"value": value}, {"v": value})
    value = 0.5 + np.abs(draw(1, 5))
    one = layer("l", op, ["input"], {"reverse": reverse}, {"value": (5,)})
    x = 0.5 + np.abs(draw(0, 2, 5))
    node = (ARITHMETIC[op], ["v", "x"] if reverse else ["x", "v"], "y", {})
    check(one, x, [node], {"value": value}, {"v": value})


@pytest.mark.parametrize("op", ARITHMETIC)
def test_arithmetic_of_two_maps(op):
    x = 0.5 + np.abs(draw(0, 2, 3, 4, 5))
    net = (
        layer("a", "mean", ["input"], {"axes": "hw"}),
        layer("b", op, ["input", "a"]),
        layer("c", op, ["a", "b"]),
    )
    nodes = [
        ("GlobalAveragePool", ["x"], "a", {}),
        (ARITHMETIC[op], ["x", "a"], "b", {}),
        (ARITHMETIC[op], ["a", "b"], "y", {}),
    ]
    expected = in_onnxruntime(nodes, x, {}, 18)
    np.testing.assert_allclose(in_numpy(net, {}, x[0], np.float32), expected[0], rtol=1e-5)
    np.testing.assert_allclose(nchw(in_flax(net, {}), jnp.asarray(x)), expected, rtol=1e-5)


def test_erf_to_the_last_digits():
    import math

    x = np.concatenate([np.linspace(-8, 8, 4001), [0.0, 1e-30, -1e-9]])
    exact = np.array([math.erf(v) for v in x])
    np.testing.assert_allclose(numpy_network.erf(x), exact, atol=4e-15)
    np.testing.assert_allclose(numpy_network.erf(x.astype(np.float32)), exact, atol=3e-7)


def test_no_value_is_overwritten_while_it_is_needed():
    # `a` is read again after its ReLU, once as it is and once through a view.
    tensors = {"a.kernel": draw(0, 1, 1, 2, 2), "b.kernel": draw(1, 1, 1, 2, 2)}
    net = (
        layer("a", "conv", ["input"], {}, {"kernel": (1, 1, 2, 2)}),
        layer("v", "slice", ["a"], {"axis": "w", "start": 0, "stop": 4}),
        layer("r", "relu", ["a"]),
        layer("b", "conv", ["r"], {}, {"kernel": (1, 1, 2, 2)}),
        layer("s", "add", ["b", "a"]),
        layer("t", "add", ["s", "s"]),
        layer("u", "relu", ["t"]),
        layer("w", "add", ["u", "v"]),
    )
    x = draw(2, 2, 3, 4)
    a = np.einsum("chw,co->ohw", x, tensors["a.kernel"][0, 0])
    b = np.einsum("chw,co->ohw", np.maximum(a, 0), tensors["b.kernel"][0, 0])
    expected = np.maximum(2 * (a + b), 0) + a
    before = x.copy()
    np.testing.assert_allclose(in_numpy(net, tensors, x, np.float32), expected, atol=1e-5)
    np.testing.assert_array_equal(x, before)
    spares: dict[str, bool] = {}
    evaluate(net, x, lambda one, inputs, spare: spares.setdefault(one.name, spare) and x)
    assert {name for name, spare in spares.items() if spare} == {"s", "u"}


BAD = [
    (layer("q", "wavelet", ["input"]), r"'q' \(wavelet\): no such operator"),
    (layer("q", "relu", ["p"]), "reads 'p'"),
    (layer("input", "relu", ["input"]), "has this name"),
    (layer("q", "conv", ["input"], {}, {"kernel": (3, 3, 2, 4)}), "does not fit 3 inputs"),
    (layer("q", "conv", ["input"], {}, {"kernel": (9, 3, 3, 4)}), "would be empty"),
    (layer("q", "conv", ["input"]), "kernel must have 4 axes"),
    (layer("q", "linear", ["input"], {}, {"kernel": (3, 4)}), "takes a vector"),
    (layer("q", "batch_norm", ["input"], {}, {"scale": (3,)}), "no tensor 'bias'"),
    (layer("q", "prelu", ["input"], {}, {"slope": (2,)}), r"shape \(2,\), not \(3,\)"),
    (layer("q", "relu", ["input"], {}, {"kernel": (3,)}), "unexpected tensor 'kernel'"),
    (layer("q", "slice", ["input"], {"axis": "h", "start": -1, "stop": 2}), "negative"),
    (layer("q", "slice", ["input"], {"axis": "t", "start": 0, "stop": 2}), "no axis 't'"),
    (layer("q", "add", ["input"]), "two inputs, or one and a constant"),
    (layer("q", "add", ["input"], {}, {"value": (2, 1, 1)}), "do not broadcast"),
    (layer("q", "group_norm", ["input"], {"groups": 2}), "divide into 2 groups"),
    (layer("q", "pad", ["input"], {"padding": ((0, 6), (0, 0)), "mode": "reflect"}), "reflects"),
    (layer("q", "depth_to_space", ["input"], {"rows": 2, "cols": 2}), "2x2 patches"),
    (layer("q", "max_pool", ["input"], {}), "no attribute 'kernel'"),
    (layer("q", "concat", ["input"], {"axis": "z"}), "no axis"),
]


@pytest.mark.parametrize(
    ("bad", "message"), BAD, ids=[f"{b.op}-{k}" for k, (b, _) in enumerate(BAD)]
)
def test_impossible_layers_are_named(bad, message):
    with pytest.raises(ValueError, match=message) as caught:
        shapes([bad], (3, 6, 7))
    assert repr(bad.name) in str(caught.value)


def test_flops_by_hand():
    net = (
        layer("a", "conv", ["input"], {"strides": (2, 2)}, {"kernel": (2, 2, 3, 5)}),
        layer("b", "conv_transpose", ["a"], {"strides": (2, 2)}, {"kernel": (2, 2, 5, 7)}),
        layer("m", "mean", ["b"], {"axes": "hw"}),
        layer("f", "flatten", ["m"]),
        layer("l", "linear", ["f"], {}, {"kernel": (7, 2)}),
    )
    assert nets.layer_flops(net, (3, 4, 6)) == 2 * (6 * 12 * 5 + 6 * 5 * 28 + 14)


def imported(config: Config) -> tuple[Config, dict[str, Array]]:
    """A preset written as layers, and its tensors."""
    return as_layers(config), folded(config, random_tensors(config, 3))[1]


@pytest.mark.parametrize("config", [SMALL, PATCH], ids=["plain", "patch"])
def test_presets_as_layers_equal_the_modules(config):
    again, tensors = imported(config)
    assert {name: value.shape for name, value in tensors.items()} == parameter_shapes(again)
    network = build_model(Weights("l", again, tensors, "", "", {}))
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(network))}
    assert names == set(parameter_shapes(again))
    audio = noise(config, 1)
    exact = NumpyNetwork(again, tensors, np.float64)
    magnitude = exact.magnitude(audio[0].astype(np.float64))
    mask = exact.mask(magnitude)
    channels = noise(config, 1)[0, : 7 * 16 * 32].reshape(7, 16, 32)
    own = Weights("m", config, random_tensors(config, 3), "", "", {})
    with jax.enable_x64(True):  # the modules themselves in float64, but for norms and sigmoid
        modules = build_model(own, "float64")
        theirs = jax.jit(lambda x: modules.mask(x))(jnp.asarray(magnitude)[None])
    np.testing.assert_allclose(theirs[0], mask, atol=3e-6)
    single = jnp.asarray(magnitude, jnp.float32)[None]
    ours = jax.jit(lambda x: network.mask(x))(single)
    np.testing.assert_allclose(ours[0], mask, atol=2e-5)
    logit = jax.jit(lambda x: network.classify(x))(channels[None])
    np.testing.assert_allclose(logit[0], exact.classify(channels.astype(np.float64)), atol=1e-4)
    assert flops(again) == flops(config)
    assert Config.from_dict(again.to_dict()) == again
    hash(again)


def test_an_imported_unet_with_a_preset_cnn():
    again, tensors = imported(SMALL)
    mixed = dataclasses.replace(again, cnn=SMALL.cnn)
    own = random_tensors(SMALL, 3)
    tensors = {k: v for k, v in tensors.items() if k.startswith("unet.")} | {
        k: v for k, v in own.items() if k.startswith("cnn.")
    }
    assert {k: v.shape for k, v in tensors.items()} == parameter_shapes(mixed)
    audio = noise(SMALL, 1)
    expected = NumpyNetwork(SMALL, own)(audio[0])
    assert NumpyNetwork(mixed, tensors)(audio[0]) == expected
    model = build_model(Weights("x", mixed, tensors, "", "", {}))
    np.testing.assert_allclose(jax.jit(lambda a: model(a))(audio)[0], expected, atol=1e-5)


def test_an_imported_network_with_given_tensors():
    config = zoo()
    tensors = random_tensors(config)
    model = build_model(Weights("z", config, tensors, "", "", {}))
    state = nnx.to_flat_state(nnx.state(model))
    assert {".".join(map(str, path)): leaf.shape for path, leaf in state} == parameter_shapes(
        config
    )
    trained = {".".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert "front_end.mel" not in trained
    assert "front_end.window" not in trained
    assert parameter_counts(config)["cnn"] == 9 * 3 * 6 + 6 + 6 + 1
    audio = noise(config, 3)
    exact = NumpyNetwork(config, tensors, np.float64)
    expected = [float(exact(each.astype(np.float64))) for each in audio]
    np.testing.assert_allclose(jax.jit(lambda a: model(a))(audio), expected, atol=1e-5)
    single = NumpyNetwork(config, tensors)
    np.testing.assert_allclose([single(each) for each in audio], expected, atol=1e-5)


def test_gradients_through_imported_networks_are_finite():
    config = zoo()
    model = build_model(Weights("z", config, random_tensors(config), "", "", {}))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(p, audio):
        return jnp.sum(nnx.merge(graph, p, rest).logit(audio))

    slope = jax.jit(jax.grad(loss))
    for audio in (noise(config, 2), np.zeros((2, config.front_end.segment_samples), np.float32)):
        grads = slope(params, audio)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        if audio.any():
            assert np.abs(np.asarray(grads["unet"]["in.kernel"][...])).max() > 0


def test_an_imported_network_computes_in_float64():
    x = np.linspace(-1, 1, 24).reshape(1, 3, 4, 2) + 1e-12
    net = (
        layer("c", "conv", ["input"], {}, {"kernel": (1, 1, 2, 3)}),
        layer("n", "batch_norm", ["c"], {}, dict.fromkeys(("scale", "bias", "mean", "var"), (3,))),
        layer("r", "relu", ["n"]),
        layer("m", "mean", ["r"], {"axes": "hw"}),
    )
    with jax.enable_x64(True):
        network = in_flax(net, {"c.kernel": np.ones((1, 1, 2, 3))})
        out = np.asarray(network.run(jnp.asarray(x)))
    assert out.dtype == np.float64
    expected = np.maximum(x.sum(-1) / np.sqrt(1 + 1e-5), 0).mean()
    np.testing.assert_allclose(out, expected, rtol=1e-12)


def test_resize_slices_have_the_gradient_of_their_matrix():
    # Linear in x, so the cotangent of x is the transposed interpolation matrix times that of y.
    for coordinates in ("half_pixel", "asymmetric", "align_corners"):
        attrs = {"size": (6, 1), "scales": (2.0, 1.0), "mode": "linear", "coordinates": coordinates}
        network = in_flax((layer("l", "resize", ["input"], attrs),), {})
        matrix = np.asarray(nchw(network, jnp.eye(3)[:, None, :, None]))[:, 0, :, 0].T
        y = draw(0, 1, 1, 6, 1)
        slope = jax.grad(lambda x: jnp.sum(nchw(network, x) * y))(jnp.zeros((1, 1, 3, 1)))  # noqa: B023
        np.testing.assert_allclose(slope[0, 0, :, 0], matrix.T @ y[0, 0, :, 0], atol=1e-6)


def test_batch_norm_in_training_mode_is_that_of_flax():
    one = layer(
        "n", "batch_norm", ["input"], {}, dict.fromkeys(("scale", "bias", "mean", "var"), (3,))
    )
    ours = in_flax((one,), {})
    theirs = nnx.BatchNorm(3, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))
    x = jnp.asarray(2 + draw(0, 2, 3, 4, 5))
    for mode in ("train", "train", "eval"):
        getattr(ours, mode)()
        getattr(theirs, mode)()
        expected = jnp.moveaxis(theirs(jnp.moveaxis(x, 1, -1)), -1, 1)
        np.testing.assert_allclose(nchw(ours, x), expected, atol=1e-4)
    for leaf in ("mean", "var"):
        running = ours.variable(f"n.{leaf}")[...]
        np.testing.assert_allclose(running, getattr(theirs, leaf)[...], rtol=1e-5)


def test_bfloat16_is_for_the_products_and_the_rest_stays_float32():
    config = zoo()
    weights = Weights("z", config, random_tensors(config), "", "", {})
    half, full = build_model(weights, "bfloat16"), build_model(weights)
    audio = jnp.asarray(noise(config, 1))
    text = str(jax.make_jaxpr(lambda a: half(a))(audio)).splitlines()
    convs = [line for line in text if "conv_general_dilated" in line]
    assert convs
    assert all("bf16" in line for line in convs)
    assert not any("bf16" in line for line in text if " log " in line or " fft[" in line)
    scores = jax.jit(lambda a: half(a))(audio)
    np.testing.assert_allclose(scores, jax.jit(lambda a: full(a))(audio), atol=0.05)
    assert scores.dtype == jnp.float32
