"""Losses against scipy, librosa, scikit-learn, hand-worked cases and finite differences."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from sklearn.metrics import log_loss

from artifactnet_jax import dsp_jax
from artifactnet_jax.config import FrontEnd
from artifactnet_jax.train import losses

RNG = np.random.default_rng(0)


def noise(n: int, batch: int = 2, scale: float = 0.1) -> np.ndarray:
    return (RNG.standard_normal((batch, n)) * scale).astype(np.float32)


@pytest.mark.parametrize("n", [8192, 10_000])
def test_a_constant_mask_gives_the_audio_back_scaled(n):
    audio = noise(n)
    spectrum = dsp_jax.stft(jnp.asarray(audio), FrontEnd())
    mask = jnp.full(spectrum.shape, 0.25, jnp.float32)
    out = np.asarray(losses.masked_audio(spectrum, mask, FrontEnd(), n))
    covered = n // 512 * 512 - 512  # the last frame's window ends in a slope to 0
    np.testing.assert_allclose(out[:, :covered], 0.25 * audio[:, :covered], atol=1e-6)


def test_masked_audio_is_librosas_inverse():
    audio = noise(8192)
    spectrum = dsp_jax.stft(jnp.asarray(audio), FrontEnd())
    mask = RNG.uniform(0, 0.5, spectrum.shape).astype(np.float32)
    out = losses.masked_audio(spectrum, jnp.asarray(mask), FrontEnd(), 8192)
    expected = librosa.istft(np.asarray(spectrum) * mask, n_fft=2048, hop_length=512, length=8192)
    np.testing.assert_allclose(out[:, :8000], expected[:, :8000], atol=1e-6)


def test_masked_audio_refuses_a_hop_that_does_not_divide():
    front_end = dataclasses.replace(FrontEnd(), hop=500)
    with pytest.raises(ValueError, match="multiple of the hop"):
        losses.masked_audio(
            jnp.zeros((1, 1025, 3), jnp.complex64), jnp.zeros((1, 1025, 3)), front_end, 10
        )


def test_multi_resolution_stft_against_librosa():
    target, estimate = noise(6000), noise(6000, scale=0.05)
    expected = np.zeros(2)
    for n_fft in losses.RESOLUTIONS:
        t, e = (
            np.abs(librosa.stft(x, n_fft=n_fft, hop_length=n_fft // 4, pad_mode="reflect"))
            for x in (target, estimate)
        )
        expected += np.linalg.norm(t - e, axis=(1, 2)) / np.linalg.norm(t, axis=(1, 2))
        t, e = (np.log(np.maximum(x, losses.MAGNITUDE_FLOOR)) for x in (t, e))
        expected += np.abs(t - e).mean(axis=(1, 2))
    found = losses.multi_resolution_stft(jnp.asarray(estimate), jnp.asarray(target))
    np.testing.assert_allclose(found, expected / len(losses.RESOLUTIONS), rtol=1e-4)


def test_multi_resolution_stft_of_equals_is_zero_with_a_finite_slope():
    x = jnp.asarray(noise(4096))
    for pair in ((x, x), (x, jnp.zeros_like(x)), (jnp.zeros_like(x), jnp.zeros_like(x))):
        value, slope = jax.value_and_grad(lambda e, t: jnp.sum(losses.multi_resolution_stft(e, t)))(
            *pair
        )
        assert np.isfinite(value)
        assert np.isfinite(slope).all()
    np.testing.assert_array_equal(losses.multi_resolution_stft(x, x), 0)


def test_waveform_l1_is_relative_to_the_input():
    audio = np.array([[0.5, -0.5], [1e-5, 1e-5]], np.float32)
    estimate, target = np.float32([[0.1, 0.1], [1e-3, 1e-3]]), np.zeros((2, 2), np.float32)
    found = losses.waveform_l1(*map(jnp.asarray, (estimate, target, audio)))
    np.testing.assert_allclose(found, [0.2, 1e-3 / losses.LEVEL_FLOOR], rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_against_scikit_learn(smoothing):
    logit = RNG.standard_normal(7).astype(np.float32) * 2
    label = np.float32([1, 0, 0, 0, 0, 1, 0])
    p = 1 / (1 + np.exp(-logit.astype(np.float64)))
    s = smoothing / 2  # a smoothed label is a mixture of both

    def of(y: float) -> float:
        q = p[label == y]
        own, other = (
            log_loss(np.full(len(q), v), np.stack([1 - q, q], 1), labels=[0, 1]) for v in (y, 1 - y)
        )
        return (1 - s) * own + s * other

    found = losses.binary_cross_entropy(jnp.asarray(logit), jnp.asarray(label), smoothing)
    assert float(found) == pytest.approx((of(0) + of(1)) / 2, rel=1e-5)


def test_binary_cross_entropy_of_one_class_is_its_mean():
    logit = jnp.asarray([0.0, 2.0])
    found = float(losses.binary_cross_entropy(logit, jnp.ones(2), 0.0))
    assert found == pytest.approx((np.log(2) + np.log1p(np.exp(-2))) / 2, rel=1e-6)


def test_cross_codec_delta_by_hand():
    p = np.array([[0.2, 0.9, 0.5], [0.3, 0.3, 0.3]])
    logit = jnp.asarray(np.log(p / (1 - p)), jnp.float32)
    np.testing.assert_allclose(losses.cross_codec_delta(logit), [0.7, 0.0], atol=1e-6)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(losses.cross_codec_delta(x)))(logit)).all()


def directional(function, x: np.ndarray, step: float = 1e-6) -> tuple[float, float]:
    """Slope along a random direction, by gradient and by central differences, in float64."""
    with jax.enable_x64(True):
        direction = np.random.default_rng(1).standard_normal(x.shape)
        slope = jax.grad(function)(jnp.asarray(x))
        assert slope.dtype == jnp.float64
        up, down = (float(function(jnp.asarray(x + s * direction))) for s in (step, -step))
        return float(jnp.sum(slope * direction)), (up - down) / (2 * step)


def test_gradient_of_the_distillation_loss_against_finite_differences():
    audio, target = (RNG.standard_normal((1, 4096)) * 0.1 for _ in range(2))
    logits = RNG.standard_normal((1, 1025, 9))
    with jax.enable_x64(True):
        spectrum = dsp_jax.stft(jnp.asarray(audio), FrontEnd())

    def loss(z):
        out = losses.masked_audio(spectrum, 0.5 * jax.nn.sigmoid(z), FrontEnd(), 4096)
        l1 = losses.waveform_l1(out, jnp.asarray(target), jnp.asarray(audio))
        return jnp.sum(l1 + losses.multi_resolution_stft(out, jnp.asarray(target)))

    found, expected = directional(loss, logits)
    assert found == pytest.approx(expected, rel=1e-4)


def test_gradient_of_entropy_and_delta_against_finite_differences():
    logit = RNG.standard_normal((3, 4))

    def loss(x):
        label = jnp.repeat(jnp.asarray([0.0, 1.0, 0.0]), 4)
        delta = jnp.sum(losses.cross_codec_delta(x))
        return losses.binary_cross_entropy(x.reshape(12), label, 0.05) + delta

    found, expected = directional(loss, logit)
    assert found == pytest.approx(expected, rel=1e-6)
