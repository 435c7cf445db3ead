"""Running median: both implementations against scipy, the min/max programs, and gradients."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from artifactnet_jax.kernels import median_filter
from artifactnet_jax.kernels.median import IMPLEMENTATIONS, median_program

NAMES = ["numpy", "xla"]


@pytest.fixture(autouse=True)
def strict_jax():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def reference(x, size, axis):
    # scipy has no float16; the median is one of the samples, so float64 is exact. The added axis
    # keeps scipy from its path for one dimension, which is wrong for a single sample.
    window = [1] * (x.ndim + 1)
    window[axis % x.ndim] = size
    wide = x.astype(np.float64)[..., None]
    return ndimage.median_filter(wide, tuple(window), mode="mirror")[..., 0].astype(x.dtype)


def run(name, x, size, axis):
    if name == "xla":
        with jax.enable_x64(x.dtype.itemsize == 8):
            result = median_filter(jnp.asarray(x), size, axis)
            assert isinstance(result, jax.Array)
    else:
        result = median_filter(x, size, axis)
        assert isinstance(result, np.ndarray)
        assert result.flags.c_contiguous
    assert result.dtype == x.dtype
    return np.asarray(result)


def sample(shape, dtype=np.float32, ties=False, seed=0):
    x = np.random.default_rng(seed).normal(0, 3, shape)
    return (np.round(x) if ties else x).astype(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [*range(1, 34, 2), 63])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_scipy_at_every_width(name, size, ties):
    x = sample((3, 70, 2), ties=ties, seed=size)
    np.testing.assert_array_equal(run(name, x, size, 1), reference(x, size, 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int16", "int32", "uint8"])
@pytest.mark.parametrize("axis", [0, -1])
def test_keeps_the_dtype(name, dtype, axis):
    x = np.abs(sample((40, 33), dtype)) if dtype == "uint8" else sample((40, 33), dtype)
    np.testing.assert_array_equal(run(name, x, 7, axis), reference(x, 7, axis))


def test_bfloat16_on_xla():
    x = jnp.asarray(sample((40, 33))).astype(jnp.bfloat16)
    result = median_filter(x, 9, 0)
    assert result.dtype == jnp.bfloat16
    expected = reference(np.asarray(x.astype(jnp.float32)), 9, 0)
    np.testing.assert_array_equal(np.asarray(result.astype(jnp.float32)), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17])
def test_short_axes_mirror_as_often_as_needed(name, length):
    x = sample((4, length))
    np.testing.assert_array_equal(run(name, x, 31, 1), reference(x, 31, 1))
    np.testing.assert_array_equal(run(name, x.T, 31, 0), reference(x.T, 31, 0))


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15, derandomize=True)
@given(data=st.data())
def test_equals_scipy_on_any_shape(name, data):
    lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)
    shape = data.draw(lengths.filter(lambda s: np.prod(s) < 9000))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = 2 * data.draw(st.integers(0, 17)) + 1
    ties = data.draw(st.booleans())
    x = sample(shape, ties=ties, seed=data.draw(st.integers(0, 99)))
    x = np.asarray(x)[..., :: data.draw(st.sampled_from([1, -1]))]
    np.testing.assert_array_equal(run(name, x, size, axis), reference(x, size, axis))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tiles_of_the_numpy_path(axis, monkeypatch):
    from artifactnet_jax.kernels import median_numpy

    x = sample((9, 50, 11))
    for size_of_plane in (4, 100, 900):
        monkeypatch.setattr(median_numpy, "PLANE_BYTES", size_of_plane)
        np.testing.assert_array_equal(median_filter(x, 7, axis), reference(x, 7, axis))


@pytest.mark.parametrize("name", NAMES)
def test_nan_marks_every_window_that_holds_it(name):
    x = sample((60,))
    x[[3, 40]] = np.nan
    x[20], x[21] = np.inf, -np.inf
    held = np.isnan(np.lib.stride_tricks.sliding_window_view(np.pad(x, 4, "reflect"), 9)).any(-1)
    result = run(name, x, 9, 0)
    np.testing.assert_array_equal(np.isnan(result), held)
    clean = reference(np.nan_to_num(x), 9, 0)
    np.testing.assert_array_equal(result[~held], clean[~held])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (3, 5, 0)])
def test_empty_arrays(name, shape):
    assert run(name, np.zeros(shape, np.float32), 5, len(shape) // 2).shape == shape


def test_op_counts():
    assert len(median_program(31, 1).steps) <= 180
    program = median_program(31, 16)
    assert len(program.steps) / program.tile <= 27
    assert len(program.outputs) == 16


@pytest.mark.parametrize(("size", "tile"), [(3, 1), (5, 3), (9, 8), (15, 8), (31, 16), (33, 20)])
def test_program_is_a_median(size, tile):
    x = np.random.default_rng(1).permutation(6 * tile + size)
    program = median_program(size, tile)

    @functools.cache
    def value(plane, row):
        if plane < tile:
            return x[row * tile + plane]
        op, a, b, shift = program.steps[plane - tile]
        assert shift >= 0
        return {"min": min, "max": max}[op](value(a, row), value(b, row + shift))

    for row in range(2):
        for r, (plane, shift) in enumerate(program.outputs):
            start = row * tile + r
            assert value(plane, row + shift) == np.median(x[start : start + size])


def test_jit_and_vmap_and_batch():
    x = sample((3, 50, 40))
    expected = reference(x, 31, 1)
    jitted = jax.jit(lambda v: median_filter(v, 31, -2))
    np.testing.assert_array_equal(jitted(x), expected)
    np.testing.assert_array_equal(jitted(x[1:2]), expected[1:2])
    mapped = jax.jit(jax.vmap(lambda v: median_filter(v, 31, 0), in_axes=2, out_axes=2))
    np.testing.assert_array_equal(mapped(np.moveaxis(x, 0, 2)), np.moveaxis(expected, 0, 2))


@pytest.mark.parametrize(
    ("shape", "size", "axis"), [((12, 3), 5, 0), ((3, 40), 31, 1), ((4,), 9, 0)]
)
def test_gradient_against_finite_differences(shape, size, axis):
    rng = np.random.default_rng(2)
    x = rng.permutation(np.prod(shape)).reshape(shape) / 7.0
    weight = rng.normal(size=shape)

    def loss(v):
        return np.sum(median_filter(v, size, axis) * weight)

    numeric = np.zeros(shape)
    for index in np.ndindex(shape):
        step = np.zeros(shape)
        step[index] = 0.01
        numeric[index] = (loss(x + step) - loss(x - step)) / 0.02
    with jax.enable_x64(True):
        gradient = jax.grad(lambda v: jnp.sum(median_filter(v, size, axis) * weight))(
            jnp.asarray(x)
        )
    np.testing.assert_allclose(gradient, numeric, rtol=1e-9, atol=1e-9)


def test_gradient_at_ties_is_shared_and_finite():
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(median_filter(v, 31, 1))))
    np.testing.assert_allclose(gradient(jnp.zeros((2, 50))).sum(), 100, rtol=1e-5)
    x = jnp.asarray(sample((2, 50), ties=True))
    assert np.isfinite(gradient(x)).all()
    np.testing.assert_allclose(gradient(x).sum(), 100, rtol=1e-5)
    # The window 0 0 1 has its median at either zero: half each.
    middle = jax.grad(lambda v: median_filter(v, 3, 0)[1])(jnp.asarray([0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(middle, [0.5, 0.5, 0])


def test_gradient_under_vmap_equals_the_batched_one():
    x = jnp.asarray(sample((3, 30, 5)))
    single = jax.grad(lambda v: jnp.sum(jnp.square(median_filter(v, 7, 0))))
    batched = jax.grad(lambda v: jnp.sum(jnp.square(median_filter(v, 7, 1))))
    np.testing.assert_array_equal(jax.vmap(single)(x), batched(x))


@pytest.mark.parametrize("name", NAMES)
def test_errors(name):
    x = sample((4, 5)) if name == "numpy" else jnp.asarray(sample((4, 5)))
    for size in (0, -3, 4):
        with pytest.raises(ValueError, match="odd and positive"):
            median_filter(x, size, 0)
    for axis in (2, -3):
        with pytest.raises(ValueError, match="out of range"):
            median_filter(x, 3, axis)
    for dtype in ("bool", "complex64"):
        with pytest.raises(TypeError, match="floating and integer"):
            median_filter(x.astype(dtype), 3, 0)
    with pytest.raises(TypeError):
        median_filter(x, 3.0, 0)
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        median_filter(x, 3, 0, implementation="fast")


def test_implementations():
    assert list(IMPLEMENTATIONS) == [*NAMES, "pallas"]
    x = sample((6, 20))
    for name in NAMES:
        named = median_filter(x, 5, 1, implementation=name)
        np.testing.assert_array_equal(named, reference(x, 5, 1))
    with pytest.raises(TypeError, match="expected a NumPy or JAX array"):
        median_filter([1.0, 2.0], 3, 0)
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(lambda v: median_filter(v, 3, 0, implementation="numpy"))(x)
    with pytest.raises(TypeError, match="enable x64"):
        median_filter(x.astype(np.float64), 3, 0, implementation="xla")


def test_numpy_path_leaves_jax_alone():
    code = (
        "import sys, numpy as np\n"
        "from artifactnet_jax.kernels import median_filter\n"
        "median_filter(np.ones((4, 9)), 5, 1)\n"
        "assert 'jax' not in sys.modules and 'scipy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the Pallas kernel ---------------------------------------------------------------------------


def pallas(x, size, axis):
    return median_filter(x, size, axis, implementation="pallas")


@pytest.mark.parametrize(
    ("shape", "size", "axis"),
    [((2, 33, 5), 9, 1), ((2, 5, 33), 7, 2), ((40,), 5, 0), ((3, 4), 5, 1), ((4, 300), 3, 0)],
)
def test_the_kernel_interpreted_equals_scipy(shape, size, axis):
    x = sample(shape)
    x.flat[1] = x.flat[2]
    np.testing.assert_array_equal(pallas(jnp.asarray(x), size, axis), reference(x, size, axis))


def test_the_kernel_with_nans_vmap_and_gradients():
    x = sample((2, 20))
    batched = jax.vmap(lambda row: pallas(row, 5, 0))(jnp.asarray(x))
    np.testing.assert_array_equal(batched, reference(x, 5, 1))

    def weighted(filtered):
        return lambda v: jnp.sum(filtered(v, 5, 1) * jnp.asarray(sample((2, 20), seed=1)))

    gradients = (jax.grad(weighted(each))(jnp.asarray(x)) for each in (pallas, median_filter))
    np.testing.assert_array_equal(*gradients)
    x[1, 10] = np.nan
    held = np.zeros_like(x, bool)
    held[1, 8:13] = True
    np.testing.assert_array_equal(np.isnan(pallas(jnp.asarray(x), 5, 1)), held)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_kernel_is_lowered_for_cuda_without_a_gpu(axis, dtype):
    x = jax.ShapeDtypeStruct((2, 1025, 345), jnp.dtype(dtype))
    traced = jax.jit(lambda v: pallas(v, 31, axis)).trace(x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 1
    assert "stablehlo.while" not in text  # that would be the interpreter


def test_the_kernel_names_itself_in_errors():
    with pytest.raises(TypeError, match="the Pallas median takes floating and integer arrays"):
        pallas(jnp.zeros((3, 4), bool), 3, 0)
