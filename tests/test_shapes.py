"""The shapes in signatures hold: public functions of signals and networks, checked while they run.

jaxtyping is no dependency of the package, whose annotations are text; here they are resolved.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import Any

import numpy as np
import pytest

from artifactnet_jax import dsp_numpy, filterbank, forward, numpy_network, operators, texture
from artifactnet_jax.config import FrontEnd
from artifactnet_jax.kernels import median_filter
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.weights import random_tensors
from tiny_model import SMALL

jaxtyping = pytest.importorskip("jaxtyping")
beartype = pytest.importorskip("beartype")
jax = pytest.importorskip("jax")
jnp = jax.numpy
nnx = pytest.importorskip("flax.nnx")
from artifactnet_jax import dsp_jax, model, texture_xla  # noqa: E402

FE = FrontEnd(segment_samples=4_096, n_fft=256, hop=128, stft_pad=128, n_mels=16, hpss_width=5)
HEAD = SMALL.texture
CONFIG = dataclasses.replace(
    SMALL, front_end=dataclasses.replace(SMALL.front_end, segment_samples=44_100)
)
RNG = np.random.default_rng(0)


def checked(function: Any) -> Any:
    """The function with its annotations enforced."""
    plain = inspect.unwrap(function)
    names = {**vars(jaxtyping), **plain.__globals__, "Array": jax.Array}
    copy = types.FunctionType(
        plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    copy.__kwdefaults__ = plain.__kwdefaults__
    copy.__annotations__ = typing.get_type_hints(plain, names)
    return jaxtyping.jaxtyped(typechecker=beartype.beartype)(copy)


def has_shapes(function: Any) -> bool:
    text = str(getattr(inspect.unwrap(function), "__annotations__", ""))
    return any(f"{kind}[" in text for kind in ("Float", "Float64", "Int", "Shaped", "Complex"))


def draw(*shape: int) -> np.ndarray:
    return RNG.uniform(0.1, 1.0, shape).astype(np.float32)


def jax_array(*shape: int) -> Any:
    return jnp.asarray(draw(*shape))


CALLS: dict[Any, tuple[Any, ...]] = {
    dsp_numpy.stft_magnitude: (draw(4_096), FE),
    dsp_numpy.soft_masks: (draw(9, 8), draw(9, 8), FE),
    dsp_numpy.effective_bandwidth: (draw(9), 100),
    dsp_numpy.sigmoid: (draw(9),),
    dsp_jax.stft: (jax_array(2, 4_096), FE),
    dsp_jax.stft_magnitude: (jax_array(2, 4_096), FE),
    dsp_jax.magnitude: (jax.lax.complex(jax_array(2, 5, 6), jax_array(2, 5, 6)), FE),
    dsp_jax.soft_masks: (jax_array(9, 8), jax_array(9, 8), FE),
    dsp_jax.flat_share: (jax_array(9, 8), jax_array(9, 8), FE),
    filterbank.hann: (16,),
    filterbank.analysis_window: (FE,),
    filterbank.hz_to_mel: (np.array([100.0, 2000.0]), "htk"),
    filterbank.mel_to_hz: (np.array([100.0, 2000.0]), "slaney"),
    filterbank.mel_filterbank: (FE,),
    texture.band_rows: (HEAD, 512, 44_100),
    texture.band_matrix: (np.array([1, 3, 5]), 9),
    texture.statistics: (draw(257, 60), 512, HEAD, 44_100),
    texture_xla.statistics: ([(512, jax_array(1, 257, 60))], HEAD, 44_100),
    dsp_numpy.statistics: ([(512, draw(257, 60))], HEAD, 44_100),
    operators.depth_to_space: (draw(2, 3, 4, 12), 2, 3),
    operators.space_to_depth: (draw(4, 6, 2), 2, 3, "CRD"),
    operators.sampling: (4, 8, 2.0, "linear", "half_pixel", "floor"),
    median_filter: (draw(9, 8), 3, 0),
    numpy_network.conv: (
        draw(9, 8, 4),
        draw(3, 3, 2, 6),
        draw(6),
        (1, 1),
        ((1, 1), (0, 0)),
        (1, 1),
        2,
    ),
    numpy_network.conv_transpose: (draw(9, 8, 4), draw(2, 2, 4, 6), draw(6), (2, 2)),
    model.transposed_conv: (
        jax_array(1, 5, 4, 3),
        jax_array(3, 2, 3, 2),
        {"strides": (2, 2), "padding": ((0, 1), (0, 0)), "output_padding": (0, 0)},
        None,
    ),
    forward.levelled: (draw(2, 9), dataclasses.replace(FE, centred=True, level="peak"), np),
    forward.to_power: (draw(3, 4), 1.5, np),
    forward.running_median: (draw(9, 8), 3, 1, "edge", np),
    forward.delta: (draw(3, 9), np),
    forward.texture_statistics: (draw(44_100), draw(1025, 87), CONFIG, dsp_numpy),
}


def name_of(function: Any) -> str:
    return f"{function.__module__.split('.')[-1]}.{function.__name__}"


@pytest.mark.parametrize("function", CALLS, ids=name_of)
def test_the_shapes_of_a_signature_hold(function):
    assert has_shapes(function)
    if name_of(function).startswith(("dsp_jax", "texture_xla", "model")):
        jax.eval_shape(lambda: checked(function)(*CALLS[function]))
    else:
        checked(function)(*CALLS[function])


def test_every_signature_with_shapes_is_called():
    modules = (dsp_numpy, dsp_jax, filterbank, texture, texture_xla, operators, forward)
    missing = set()
    for module in (*modules, numpy_network, model):
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "") == module.__name__
            if own and not inspect.isclass(value) and has_shapes(value) and value not in CALLS:
                missing.add(f"{module.__name__}.{name}")
    assert missing == {"artifactnet_jax.texture.logit"}  # the networks below call it


def test_a_wrong_shape_fails():
    def wrong(x: jaxtyping.Float[np.ndarray, "a b"]) -> jaxtyping.Float[np.ndarray, "b a"]:
        return x

    with pytest.raises(jaxtyping.TypeCheckError):
        checked(wrong)(draw(2, 3))
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(dsp_numpy.soft_masks)(draw(2, 3), draw(3, 2), FE)


def with_checks(kind: Any) -> Any:
    """A subclass whose public methods are checked."""
    found = {
        name: checked(value)
        for base in reversed(kind.__mro__)
        for name, value in vars(base).items()
        if inspect.isfunction(value) and has_shapes(value)
    }
    assert {"magnitude", "mask", "parts", "mel_db", "channels", "classify"} <= set(found)
    return type(kind)(kind.__name__, (kind,), found)


def test_the_stages_of_both_libraries_have_their_shapes():
    tensors = random_tensors(CONFIG)
    network = with_checks(NumpyNetwork)(CONFIG, tensors)
    audio = draw(44_100)
    stages = network.stages(audio)
    assert network.logit_of_db(network.segment_db(stages["magnitude"])) == stages["network_logit"]
    assert 0 <= float(network(audio)) <= 1
    kind = with_checks(model.ArtifactNet)
    net = lambda: kind(CONFIG, rngs=nnx.Rngs(0))  # noqa: E731
    batch = jax.ShapeDtypeStruct((2, 44_100), jnp.float32)
    found, score = jax.eval_shape(lambda a: (net().stages(a), net()(a)), batch)
    assert {name: value.shape[1:] for name, value in found.items()} == {
        name: np.shape(value) for name, value in stages.items()
    }
    assert score.shape == (2,)
