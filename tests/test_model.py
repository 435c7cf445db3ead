"""The network: layers against scipy and hand-worked cases, JAX against NumPy, precision."""

import dataclasses

import numpy as np
import pytest
import scipy.signal

from artifactnet_jax import dsp_numpy, numpy_network
from artifactnet_jax.config import CNN, Config, FrontEnd, UNet
from artifactnet_jax.layers import layer
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.operators import apply, depth_to_space, space_to_depth
from artifactnet_jax.presets import Figure, parameter_shapes
from artifactnet_jax.weights import Weights, random_tensors

jax = pytest.importorskip("jax")
jnp = jax.numpy
nnx = pytest.importorskip("flax.nnx")
from artifactnet_jax import model as m  # noqa: E402
from artifactnet_jax.backends.xla import build_model  # noqa: E402

SMALL = Config(
    "small",
    FrontEnd(segment_samples=22_050),
    UNet(widths=(4, 6), bottleneck=8),
    CNN(widths=(4, 6, 8, 10), hidden=5),
)
SMALL_PATCH = dataclasses.replace(
    SMALL,
    unet=UNet(patch=(4, 2), stem=5, widths=(4, 6), bottleneck=8, input_scale="log"),
)


def weights(config: Config, seed: int = 0) -> Weights:
    return Weights("random", config, random_tensors(config, seed), "", "", {})


def audio(config: Config, n: int = 2, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(config.front_end.segment_samples) / 44_100
    tones = np.sin(2 * np.pi * rng.uniform(100, 8000, (n, 1)) * t)
    return (0.2 * tones + 0.05 * rng.standard_normal((n, t.size))).astype(np.float32)


def scipy_conv(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Zero-padded 'same' cross-correlation [H, W, I], [kh, kw, I, O] -> [H, W, O]."""
    out = np.zeros((*x.shape[:2], kernel.shape[-1]))
    for i in range(kernel.shape[2]):
        for o in range(kernel.shape[3]):
            out[..., o] += scipy.signal.correlate2d(x[..., i], kernel[..., i, o], mode="same")
    return out


def test_conv_in_numpy_is_a_correlation():
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.standard_normal(s) for s in ((9, 7, 3), (3, 3, 3, 4), (4,)))
    ours = numpy_network.conv(x, kernel, bias, padding=((1, 1), (1, 1)))
    np.testing.assert_allclose(ours, scipy_conv(x, kernel) + bias, atol=1e-12)


def test_down_in_numpy_is_a_strided_correlation():
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.standard_normal(s) for s in ((8, 6, 3), (4, 4, 3, 3), (3,)))
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    expected = np.empty((4, 3, 3))
    for r in range(4):
        for c in range(3):
            window = padded[2 * r : 2 * r + 4, 2 * c : 2 * c + 4]
            expected[r, c] = np.einsum("hwi,hwio->o", window, kernel) + bias
    ours = numpy_network.conv(x, kernel, bias, (2, 2), ((1, 1), (1, 1)))
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def drawn(block: str, *sizes: int) -> m.ListNetwork:
    """One block of the figure, and its Flax module."""
    figure = Figure()
    getattr(figure, block)("x", *sizes)
    return m.ListNetwork(tuple(figure.layers), rngs=nnx.Rngs(0))


def test_up_is_a_transposed_convolution():
    up = drawn("up", 3, 5)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 6, 3)).astype(np.float32)
    up.x.bias[...] = jnp.asarray(rng.standard_normal(5), jnp.float32)
    kernel = np.asarray(up.x.conv.kernel[...]).reshape(3, 2, 2, 5)
    # The definition: every input position stamps kernel * value on its own 2x2 output square.
    expected = np.zeros((1, 8, 12, 5))
    for r in range(4):
        for c in range(6):
            stamp = np.einsum("i,ihwo->hwo", x[0, r, c], kernel)
            expected[0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] += stamp
    expected += np.asarray(up.x.bias[...])
    np.testing.assert_allclose(jax.jit(lambda x: up.run(x))(jnp.asarray(x)), expected, atol=1e-5)


def test_depth_to_space_puts_row_column_feature_in_order():
    x = np.arange(2 * 3 * 8).reshape(1, 2, 3, 8)
    out = np.asarray(depth_to_space(jnp.asarray(x), 2, 2))
    assert out.shape == (1, 4, 6, 2)
    assert out[0, 0, 0].tolist() == [0, 1]
    assert out[0, 0, 1].tolist() == [2, 3]
    assert out[0, 1, 0].tolist() == [4, 5]
    np.testing.assert_array_equal(depth_to_space(x[0], 2, 2, "DCR"), out[0])
    np.testing.assert_array_equal(space_to_depth(out[0], 2, 2), x[0])


def test_max_pool_drops_the_odd_edge():
    x = np.arange(5 * 7, dtype=np.float32).reshape(1, 5, 7, 1)
    expected = x[0, :4, :6, 0].reshape(2, 2, 3, 2).max(axis=(1, 3))
    pool = layer("p", "max_pool", ["input"], {"kernel": (2, 2), "strides": (2, 2)})
    np.testing.assert_array_equal(apply(pool, [jnp.asarray(x)], {}, jnp)[0, :, :, 0], expected)


def batch_norm(h, norm):
    mean, var = np.asarray(norm.mean[...]), np.asarray(norm.var[...])
    scaled = (h - mean) / np.sqrt(var + 1e-5)
    return scaled * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def two_convs(x, block):
    h = scipy_conv(x, np.asarray(block.conv1.kernel[...]))
    h = np.maximum(batch_norm(h, block.norm1), 0)
    return batch_norm(scipy_conv(h, np.asarray(block.conv2.kernel[...])), block.norm2)


@pytest.mark.parametrize("block", ["residual_block", "gated_block"])
def test_blocks_against_scipy(block):
    network = drawn(block, *((2, 3) if block == "residual_block" else (2,)))
    own, c = network.x, 3 if block == "residual_block" else 2
    own.norm1.mean[...] = jnp.asarray([0.1, -0.2, 0.3][:c])
    own.norm2.var[...] = jnp.asarray([0.5, 2.0, 1.5][:c])
    x = np.random.default_rng(0).standard_normal((6, 5, 2))
    h = two_convs(x, own)
    if block == "residual_block":
        shortcut = x @ np.asarray(own.shortcut.kernel[...])[0, 0]
        expected = np.maximum(h + shortcut + np.asarray(own.shortcut.bias[...]), 0)
    else:
        gate = h @ np.asarray(own.gate.kernel[...])[0, 0] + np.asarray(own.gate.bias[...])
        expected = np.maximum(x + h / (1 + np.exp(-gate)), 0)
    np.testing.assert_allclose(
        network.run(jnp.asarray(x, jnp.float32)[None])[0], expected, atol=1e-5
    )


@pytest.mark.parametrize("config", [Config.v94(), Config.edge()], ids=lambda c: c.preset)
def test_module_tree_is_what_the_weights_file_expects(config):
    model = nnx.eval_shape(lambda: m.ArtifactNet(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model, (nnx.Param, nnx.BatchStat, m.Given))
    shapes = {".".join(map(str, p)): v.shape for p, v in nnx.to_flat_state(state)}
    assert shapes == parameter_shapes(config)
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert (
        sum(int(np.prod(v.shape)) for _, v in params)
        == {"v94": 4027490, "edge": 4160706}[config.preset]
    )


@pytest.mark.parametrize("config", [SMALL, SMALL_PATCH], ids=["plain", "patch"])
def test_jax_and_numpy_agree_stage_by_stage(config):
    w, x = weights(config), audio(config)
    network = NumpyNetwork(config, w.tensors, np.float64)
    model = build_model(w)
    stages = network.stages(x[0].astype(np.float64))
    magnitude, mask = stages["magnitude"], stages["mask"]
    np.testing.assert_array_equal(
        magnitude, dsp_numpy.stft_magnitude(x[0].astype(np.float64), config.front_end)
    )
    np.testing.assert_allclose(
        jax.jit(lambda x: model.unet(x))(jnp.asarray(magnitude, jnp.float32)[None])[0],
        mask,
        atol=1e-4,
    )
    assert mask.shape == magnitude.shape
    assert 0 <= mask.min() < mask.max() <= 0.5
    np.testing.assert_allclose(
        jax.jit(lambda x: model.cnn(x))(jnp.asarray(stages["channels"], jnp.float32)[None])[0],
        stages["logit"],
        rtol=1e-4,
        atol=1e-4,
    )
    scores = np.asarray(jax.jit(lambda a: model(a))(jnp.asarray(x)))
    for score, segment in zip(scores, x, strict=True):
        assert score == pytest.approx(network(segment.astype(np.float64)), abs=1e-4)
        single = NumpyNetwork(config, w.tensors)(segment)
        assert single.dtype == np.float32
        assert score == pytest.approx(single, abs=1e-4)


@pytest.mark.parametrize("scale", ["magnitude", "log"])
def test_the_mask_is_bounded_for_any_input(scale):
    config = dataclasses.replace(SMALL, unet=dataclasses.replace(SMALL.unet, input_scale=scale))
    model = build_model(weights(config))
    unet = jax.jit(lambda x: model.unet(x))
    for gain in (0.0, 1e-6, 1.0, 1e4):
        mask = np.asarray(unet(jnp.full((1, 1025, 44), gain)))
        assert np.isfinite(mask).all()
        assert mask.min() >= 0.0
        assert mask.max() <= 0.5


def test_scores_are_finite_and_in_range_on_hard_input():
    model = build_model(weights(SMALL_PATCH))
    n = SMALL_PATCH.front_end.segment_samples
    cases = np.zeros((4, n), np.float32)
    cases[1] = 1.0
    cases[2, n // 2] = 1.0
    cases[3] = np.where(np.arange(n) % 2, 1.0, -1.0)
    network = NumpyNetwork(SMALL_PATCH, weights(SMALL_PATCH).tensors)
    for scores in (
        np.asarray(jax.jit(lambda a: model(a))(cases)),
        np.array([network(c) for c in cases]),
    ):
        assert np.isfinite(scores).all()
        assert ((scores >= 0) & (scores <= 1)).all()


def test_bfloat16_convolutions_keep_a_float32_front_end():
    w, x = weights(SMALL_PATCH), jnp.asarray(audio(SMALL_PATCH))
    half = build_model(w, "bfloat16")
    text = str(jax.make_jaxpr(lambda a: half(a))(x))
    fft = [line for line in text.splitlines() if " fft[" in line]
    assert fft
    assert all("f32" in line or "c64" in line for line in fft)
    assert any("conv_general_dilated" in line and "bf16" in line for line in text.splitlines())
    full = build_model(w)
    scores = jax.jit(lambda a: half(a))(x)
    np.testing.assert_allclose(scores, jax.jit(lambda a: full(a))(x), atol=0.1)
    assert scores.dtype == jnp.float32


def test_gradients_reach_the_first_layer_and_are_finite():
    config = dataclasses.replace(
        SMALL_PATCH, front_end=dataclasses.replace(SMALL.front_end, segment_samples=11_025)
    )
    model = build_model(weights(config))
    graph, params, rest = nnx.split(model, nnx.Param, nnx.BatchStat)
    x = audio(config)
    for batch in (x, np.zeros_like(x)):

        def loss(p, batch=batch):
            return jnp.sum(nnx.merge(graph, p, rest).logit(jnp.asarray(batch)))

        grads = jax.jit(jax.grad(loss))(params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        if batch.any():
            assert np.abs(np.asarray(grads["unet"]["stem"]["kernel"][...])).max() > 0
