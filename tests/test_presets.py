"""The networks as lists, and their passes, against tables that an earlier commit left behind.

tests/networks.json was written by commit c339728, whose networks were Flax modules, folded lists
and names of tensors, each written out by itself. By network: "shapes", name and shape of every
tensor in their order; "layers", the lists that are run, or their digests; "folded", digest of the
float64 tensors of those lists; "graph", digest of the exported graph; "flops".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifactnet_jax.config import CNN, Config, FrontEnd, Imported, Texture, UNet
from artifactnet_jax.layers import INPUT, Layer, layer, shapes
from artifactnet_jax.numpy_network import run
from artifactnet_jax.passes import fold, folded, sized
from artifactnet_jax.presets import (
    BOTTLENECK,
    cnn_layers,
    flops,
    input_shapes,
    networks,
    parameter_shapes,
    unet_layers,
)
from artifactnet_jax.weights import Weights, load_weights
from networks import PATCH, SMALL, as_layers, zoo
from tiny_model import TINY

TABLES = json.loads((Path(__file__).parent / "networks.json").read_text())
GIVEN = FrontEnd(window="given", mel_scale="given")


CONFIGS = {
    # Its texture head has been widened since.
    "edge": dataclasses.replace(Config.edge(), texture=Texture(hidden=(13, 13))),
    "v94": Config.v94(),
    "tiny": TINY,
    "small": SMALL,
    "patch": PATCH,
    "zoo": zoo(),
    "patch as layers": as_layers(PATCH),
    "given": dataclasses.replace(Config.v94(), front_end=GIVEN),
}


def drawn(sizes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Tensors that depend on their own names only."""
    out = {}
    for name, shape in sizes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        out[name] = rng.uniform(0.1, 1.0, shape).astype(np.float32)
    return out


def plain(layers: tuple[Layer, ...]) -> Any:
    rows = [[x.name, x.op, x.inputs, dict(x.attributes), dict(x.tensors)] for x in layers]
    return json.loads(json.dumps(rows))


@pytest.fixture(params=CONFIGS)
def known(request: pytest.FixtureRequest) -> tuple[Config, Any]:
    return CONFIGS[request.param], TABLES[request.param]


def test_names_and_shapes_of_all_tensors_are_those_of_the_files(known):
    config, table = known
    found = [[name, *shape] for name, shape in parameter_shapes(config).items()]
    if isinstance(config.unet, Imported):
        found.sort()
    assert found == table["shapes"]


def test_what_is_run_is_what_was_run(known):
    config, table = known
    parts, tensors = folded(config, drawn(parameter_shapes(config)), np.float64)
    assert parts == folded(config)[0]
    for part, layers in parts.items():
        rows = plain(layers)
        text = json.dumps(rows, sort_keys=True).encode()
        assert table["layers"][part] in (rows, hashlib.sha256(text).hexdigest())
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + str(value.shape).encode() + value.tobytes())
    assert digest.hexdigest() == table["folded"]
    assert flops(config) == table["flops"]


def exported(weights: Weights, **how: Any) -> str:
    """Digest of a graph: of its nodes, and of the tensors that come from the weights.

    The constants of the front end are computed by NumPy, to the last bit of this machine.
    """
    from artifactnet_jax.convert.export import build_onnx

    digest = hashlib.sha256()
    graph = build_onnx(weights, **how).graph
    for node in graph.node:
        digest.update(node.SerializeToString(deterministic=True))
    for tensor in graph.initializer:
        digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
        computed = tensor.name.endswith((".first", ".second"))
        if not computed and tensor.name.startswith(("unet.", "cnn.", "texture.")):
            digest.update(tensor.raw_data)
    return digest.hexdigest()


@pytest.mark.parametrize("name", [name for name in CONFIGS if "graph" in TABLES[name]])
def test_exported_graphs_are_the_same_bytes(name):
    pytest.importorskip("onnx")
    config = CONFIGS[name]
    tensors = drawn(parameter_shapes(config))
    weights = Weights(name, config, tensors, "0" * 64, "none", {})
    assert exported(weights) == TABLES[name]["graph"]


def test_the_embedded_weights_are_the_same_bytes_in_and_out():
    weights = load_weights()
    assert weights.sha256 == TABLES["embedded"]["sha256"]
    pytest.importorskip("onnx")
    assert exported(weights) == TABLES["embedded"]["graph"]
    assert exported(weights, stages=True) == TABLES["embedded"]["stages"]


@pytest.mark.parametrize("patch", [(1, 1), (4, 2)])
@pytest.mark.parametrize("size", [(9, 11), (16, 8), (13, 16)])
def test_sizes_are_written_in_where_they_are_needed(patch, size):
    """One list for every input; the sized one has the same shapes and gives the same values."""
    unet = UNet(patch=patch, stem=3, widths=(2,), bottleneck=3)
    layers = unet_layers(unet)
    fixed = sized(layers, *size)
    assert not {"pad_to_multiple", "crop_to"} & {x.op for x in fixed}
    assert shapes(layers, (1, *size))["mask"] == shapes(fixed, (1, *size))["mask"] == (1, *size)
    tensors = drawn({f"{x.name}.{leaf}": s for x in layers for leaf, s in x.tensors})
    x = np.random.default_rng(0).uniform(0.1, 1, (*size, 1)).astype(np.float32)
    np.testing.assert_array_equal(run(layers, tensors, x), run(fixed, tensors, x))


def norm(name: str, of: str, features: int) -> Layer:
    leaves = dict.fromkeys(("scale", "bias", "mean", "var"), (features,))
    return layer(name, "batch_norm", [of], {"epsilon": 1e-3}, leaves)


FOLDS = {
    "a bias is made": (
        [layer("c", "conv", ["input"], {}, {"kernel": (2, 2, 2, 3)}), norm("n", "c", 3)],
        ["conv"],
    ),
    "of a transposed convolution": (
        [
            layer("c", "conv_transpose", ["input"], {}, {"kernel": (2, 3, 2, 3), "bias": (3,)}),
            norm("n", "c", 3),
            layer("r", "relu", ["n"]),
        ],
        ["conv_transpose", "relu"],
    ),
    "twice": (
        [
            layer("c", "conv", ["input"], {}, {"kernel": (1, 1, 2, 3)}),
            norm("n", "c", 3),
            norm("m", "n", 3),
        ],
        ["conv"],
    ),
    "not where the product is read again": (
        [
            layer("c", "conv", ["input"], {}, {"kernel": (1, 1, 2, 3)}),
            norm("n", "c", 3),
            layer("s", "add", ["n", "c"]),
        ],
        ["conv", "batch_norm", "add"],
    ),
    "nor through a dropout": (
        [
            layer("c", "conv", ["input"], {}, {"kernel": (1, 1, 2, 3)}),
            layer("d", "dropout", ["c"], {"rate": 0.5}),
            norm("n", "d", 3),
            layer("s", "add", ["n", "c"]),
        ],
        ["conv", "batch_norm", "add"],
    ),
    "not after an activation": (
        [
            layer("c", "conv", ["input"], {}, {"kernel": (1, 1, 2, 3)}),
            layer("r", "relu", ["c"]),
            norm("n", "r", 3),
        ],
        ["conv", "relu", "batch_norm"],
    ),
    "a dropout is nothing": (
        [
            layer("r", "relu", ["input"]),
            layer("d", "dropout", ["r"], {"rate": 0.5}),
            layer("s", "add", ["d", "input"]),
        ],
        ["relu", "add"],
    ),
    "sub-pixel": (
        [
            layer("c", "conv", ["input"], {}, {"kernel": (1, 1, 2, 12)}),
            layer("d", "depth_to_space", ["c"], {"rows": 2, "cols": 3}),
            layer("b", "bias", ["d"], {}, {"bias": (2,)}),
        ],
        ["conv_transpose"],
    ),
    "no sub-pixel of another order": (
        [
            layer("c", "conv", ["input"], {}, {"kernel": (1, 1, 2, 12)}),
            layer("d", "depth_to_space", ["c"], {"rows": 2, "cols": 3, "order": "CRD"}),
            layer("b", "bias", ["d"], {}, {"bias": (2,)}),
        ],
        ["conv", "depth_to_space", "bias"],
    ),
    "no sub-pixel that is read in between": (
        [
            layer("c", "conv", ["input"], {}, {"kernel": (1, 1, 2, 12)}),
            layer("d", "depth_to_space", ["c"], {"rows": 2, "cols": 3}),
            layer("b", "bias", ["d"], {}, {"bias": (2,)}),
            layer("s", "add", ["b", "d"]),
        ],
        ["conv", "depth_to_space", "bias", "add"],
    ),
}


@pytest.mark.parametrize("case", FOLDS)
def test_folding_keeps_the_function(case):
    layers, left = FOLDS[case]
    tensors = drawn({f"p.{x.name}.{leaf}": shape for x in layers for leaf, shape in x.tensors})
    short, changed = fold(tuple(layers), tensors, "p.")
    assert [x.op for x in short] == left
    assert {f"p.{x.name}.{leaf}" for x in short for leaf, _ in x.tensors} == set(changed)
    assert short == fold(tuple(layers), {})[0]
    wide = {name: value.astype(np.float64) for name, value in tensors.items()}
    x = np.random.default_rng(1).standard_normal((4, 5, 2))
    np.testing.assert_allclose(
        run(short, changed, x, "p."), run(tuple(layers), wide, x, "p."), rtol=1e-12
    )


def test_the_figure_is_the_papers():
    """Widths and sizes of v94 by hand: an eighth of 1032 x 352 at the bottleneck."""
    found = shapes(unet_layers(UNet()), (1, 1025, 345))
    assert found["pad"] == (1, 1032, 352)
    assert found["encoder.0.relu2"] == (32, 1032, 352)
    assert found["down.2"] == (128, 129, 44)
    assert found[BOTTLENECK] == (256, 129, 44)
    assert found["decoder.0.concat"] == (256, 258, 88)
    assert found["mask"] == found[INPUT] == (1, 1025, 345)
    found = shapes(cnn_layers(CNN(), 7), (7, 128, 345))
    assert found["relu.3"] == (256, 16, 43)
    assert found["out"] == (1,)
    assert input_shapes(Config.edge()) == {"unet": (1, 1025, 345), "cnn": (7, 128, 345)}
    assert set(networks(TINY)) == {"unet", "cnn"}
