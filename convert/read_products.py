"""ONNX nodes as layers: convolutions, linear layers and norms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from artifactnet_jax.convert.builder import SPATIAL, Builder, Map, Reader
from artifactnet_jax.convert.graph import Node


def geometry(b: Builder, node: Node, value: Map, window: tuple[int, int]) -> dict[str, Any]:
    """strides, padding and dilations of a convolution or pooling, auto_pad resolved."""
    strides = tuple(node.attributes.get("strides", (1, 1)))
    dilations = tuple(node.attributes.get("dilations", (1, 1)))
    pads = tuple(node.attributes.get("pads", (0, 0, 0, 0)))
    auto = node.attributes.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = []
        for size, k, s, d in zip(value.shape[1:], window, strides, dilations, strict=True):
            total.append(max(0, (math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size))
        small = [t // 2 for t in total]
        large = [t - t // 2 for t in total]
        begin, end = (small, large) if auto == "SAME_UPPER" else (large, small)
        pads = (*begin, *end)
    elif auto == "VALID":
        pads = (0, 0, 0, 0)
    padding = ((pads[0], pads[2]), (pads[1], pads[3]))
    return {"strides": strides, "padding": padding, "dilations": dilations}


def _product(
    b: Builder,
    node: Node,
    kind: str,
    value: Map,
    kernel: np.ndarray,
    attributes: dict[str, Any],
    transform: str,
) -> str:
    """A convolution, plain or transposed, and where its kernel and bias came from; its name."""
    tensors = {"kernel": kernel}
    if len(node.inputs) > 2 and node.inputs[2]:
        tensors["bias"] = b.static(node.inputs[2])
    name = b.emit(kind, [value.name], attributes, tensors)
    b.source(f"{name}.kernel", node.inputs[1], transform)
    if "bias" in tensors:
        b.source(f"{name}.bias", node.inputs[2], "same")
    return name


def _conv(b: Builder, node: Node, value: Map) -> None:
    value = b.upright(value)
    weight = b.static(node.inputs[1])
    if weight.ndim != 4:
        raise b.fail("a convolution that is not two-dimensional")
    groups = int(node.attributes.get("group", 1))
    attributes = {**geometry(b, node, value, weight.shape[2:]), "groups": groups}
    name = _product(b, node, "conv", value, weight.transpose(2, 3, 1, 0), attributes, "OIHW")
    b.out(name, SPATIAL, (weight.shape[0], *b.trace.shapes[node.outputs[0]][2:]))


def _conv_transpose(b: Builder, node: Node, value: Map) -> None:
    value = b.upright(value)
    weight = b.static(node.inputs[1])
    if weight.ndim != 4 or int(node.attributes.get("group", 1)) != 1:
        raise b.fail("a transposed convolution in groups, or not two-dimensional")
    if tuple(node.attributes.get("dilations", (1, 1))) != (1, 1):
        raise b.fail("a dilated transposed convolution")
    strides = tuple(node.attributes.get("strides", (1, 1)))
    pads = list(node.attributes.get("pads", (0, 0, 0, 0)))
    extra = list(node.attributes.get("output_padding", (0, 0)))
    got = b.trace.shapes[node.outputs[0]][2:]
    full = [
        (size - 1) * s + k
        for size, s, k in zip(value.shape[1:], strides, weight.shape[2:], strict=True)
    ]
    auto = node.attributes.get("auto_pad", "NOTSET")
    if auto != "NOTSET" or "output_shape" in node.attributes:
        for axis in (0, 1):
            total = full[axis] + extra[axis] - got[axis]
            if total < 0:
                extra[axis] -= total
                total = 0
            less, more = total // 2, total - total // 2
            begin, end = (less, more) if auto == "SAME_UPPER" else (more, less)
            pads[axis], pads[axis + 2] = begin, end
    attributes = {
        "strides": strides,
        "padding": ((pads[0], pads[2]), (pads[1], pads[3])),
        "output_padding": tuple(extra),
    }
    name = _product(
        b, node, "conv_transpose", value, weight.transpose(2, 3, 0, 1), attributes, "IOHW"
    )
    b.out(name, SPATIAL, (weight.shape[1], *got))


def _dense(b: Builder, value: Map, weight: np.ndarray, bias: np.ndarray | None) -> str:
    """Linear layer on a vector, or on the features of every position of a map."""
    tensors = {"kernel": weight} if len(value.shape) == 1 else {"kernel": weight[None, None]}
    if bias is not None:
        tensors["bias"] = bias
    if len(value.shape) == 1:
        return b.emit("linear", [value.name], {}, tensors)
    attributes = {
        "strides": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "dilations": (1, 1),
        "groups": 1,
    }
    return b.emit("conv", [value.name], attributes, tensors)


def _gemm(b: Builder, node: Node, value: Map) -> None:
    if value.spread or value.roles != ("n", "c") or node.attributes.get("transA", 0):
        raise b.fail(f"its input has axes {value.roles}")
    weight = b.static(node.inputs[1])
    transposed = bool(node.attributes.get("transB", 0))
    alpha, beta = node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
    bias = None
    if len(node.inputs) > 2 and node.inputs[2]:
        array = b.static(node.inputs[2])
        outputs = weight.shape[0] if transposed else weight.shape[1]
        bias = np.broadcast_to(array.reshape(-1) * beta, (outputs,))
    kernel = weight.T if transposed else weight
    name = _dense(b, value, kernel * alpha, bias)
    if alpha == 1:
        like = "transpose" if transposed else "same"
        shape = "reshape" if like == "same" else "transpose"
        b.source(f"{name}.kernel", node.inputs[1], shape if len(value.shape) == 3 else like)
    if bias is not None and beta == 1 and array.size == bias.size:
        b.source(f"{name}.bias", node.inputs[2], "same" if array.ndim == 1 else "reshape")
    rest = (1, 1) if len(value.shape) == 3 else ()
    b.out(name, ("n", "c"), (kernel.shape[1], *rest))


def _matmul(b: Builder, node: Node, value: Map) -> None:
    if b.is_static(node.inputs[0]) or not b.is_static(node.inputs[1]):
        raise b.fail("a product of two computed tensors, or along another axis")
    weight = b.static(node.inputs[1])
    if value.spread or value.roles[-1] != "c" or weight.ndim != 2:
        raise b.fail(f"a product along axes {value.roles}")
    name = _dense(b, value, weight, None)
    b.source(f"{name}.kernel", node.inputs[1], "same" if len(value.shape) == 1 else "reshape")
    b.out(name, value.roles, (weight.shape[1], *value.shape[1:]))


def _affine(b: Builder, name: str, node: Node, leaves: Mapping[str, int]) -> None:
    for leaf, index in leaves.items():
        b.source(f"{name}.{leaf}", node.inputs[index], "same")


def _batch_norm(b: Builder, node: Node, value: Map) -> None:
    if value.spread or value.roles[:2] != ("n", "c"):
        raise b.fail(f"its input has axes {value.roles}")
    leaves = {"scale": 1, "bias": 2, "mean": 3, "var": 4}
    tensors = {leaf: b.static(node.inputs[index]) for leaf, index in leaves.items()}
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    name = b.same("batch_norm", value, {"epsilon": epsilon}, tensors)
    _affine(b, name, node, leaves)


def _instance_norm(b: Builder, node: Node, value: Map) -> None:
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    scale, bias = b.static(node.inputs[1]), b.static(node.inputs[2])
    if value.spread and value.spread[0] == "groups":
        # A group norm: [n, C, H, W] as [n, groups, everything else]; its affine part follows.
        if np.any(scale != 1) or np.any(bias != 0):
            raise b.fail("a group norm with a scale for each group")
        name = b.emit("group_norm", [value.name], {"groups": value.spread[1], "epsilon": epsilon})
        b.maps[node.outputs[0]] = dataclasses.replace(value, name=name)
        return
    value = b.upright(value)
    attributes = {"groups": value.shape[0], "epsilon": epsilon}
    name = b.emit("group_norm", [value.name], attributes, {"scale": scale, "bias": bias})
    _affine(b, name, node, {"scale": 1, "bias": 2})
    b.out(name, value.roles, value.shape)


def _group_norm(b: Builder, node: Node, value: Map) -> None:
    value = b.upright(value)
    groups = int(node.attributes["num_groups"])
    attributes = {"groups": groups, "epsilon": float(node.attributes.get("epsilon", 1e-5))}
    scale, bias = b.static(node.inputs[1]), b.static(node.inputs[2])
    by_group = len(scale) == groups != value.shape[0]  # before opset 21
    if by_group:
        scale, bias = (np.repeat(x, value.shape[0] // groups) for x in (scale, bias))
    name = b.emit("group_norm", [value.name], attributes, {"scale": scale, "bias": bias})
    if not by_group:
        _affine(b, name, node, {"scale": 1, "bias": 2})
    b.out(name, value.roles, value.shape)


def _layer_norm(b: Builder, node: Node, value: Map) -> None:
    # Over all of (C, H, W), or over C where that is the last axis.
    axis = int(node.attributes.get("axis", -1)) % len(value.roles)
    axes = "".join(role for role in value.roles[axis:] if role != "1")
    if value.spread or "n" in axes or not axes or node.outputs[1:2] not in ((), ("",)):
        raise b.fail(f"a norm over axes {value.roles[axis:]}")
    axes = "".join(sorted(axes))
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    mean = b.emit("mean", [value.name], {"axes": axes})
    centred = b.emit("sub", [value.name, mean])
    square = b.emit("mul", [centred, centred])
    variance = b.emit("mean", [square], {"axes": axes})
    shifted = b.emit("add", [variance], {"value": epsilon, "reverse": False})
    deviation = b.emit("sqrt", [shifted])
    name = b.emit("div", [centred, deviation])
    for kind, index in (("mul", 1), ("add", 2)):
        if len(node.inputs) > index and node.inputs[index]:
            array = b.constant(b.static(node.inputs[index]), value)
            name = b.emit(kind, [name], {"reverse": False}, {"value": array})
            b.source(f"{name}.value", node.inputs[index], "CHW")
    b.out(name, value.roles, value.shape)


def _prelu(b: Builder, node: Node, value: Map) -> None:
    slope = b.static(node.inputs[1])
    array = b.constant(slope, value)
    if array.size not in (1, value.shape[0]) or array.shape[0] != array.size:
        raise b.fail("a slope that is not one for each feature")
    name = b.same("prelu", value, {}, {"slope": array.reshape(-1)})
    b.source(f"{name}.slope", node.inputs[1], "same" if slope.ndim == 1 else "reshape")


READERS: dict[str, Reader] = {
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "PRelu": _prelu,
}
