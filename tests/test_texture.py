"""The statistics of the texture head against a plain reading of their definition in SciPy."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.signal

from artifactnet_jax import dsp_numpy, texture, texture_xla
from artifactnet_jax.config import Config, FrontEnd, Texture
from artifactnet_jax.model import ArtifactNet
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.weights import random_tensors
from tiny_model import TINY

RATE = 44_100
HEAD = Texture(resolutions=((512, 256), (2048, 512)), edges=(300.0, 1500.0, 4000.0, 9000.0))
LAGS = HEAD.lags


def music(seed=0, n=RATE // 2):
    """Decaying tones over noise, with a rest in the middle."""
    rng = np.random.default_rng(seed)
    t = np.arange(n) / RATE
    x = sum(np.sin(2 * np.pi * f * t) * np.exp(-t * k) for k, f in enumerate((440, 1210, 5300)))
    x = 0.2 * x + 0.02 * rng.standard_normal(n)
    x[n // 2 : n // 2 + n // 8] = 0
    return x


def oracle(magnitude, n_fft):
    """Statistic by statistic and band by band, float64; only what is not silent counts."""
    rows = [round(edge * n_fft / RATE) for edge in HEAD.edges]
    p = magnitude[: rows[-1] + 16]
    energy = (p**2).sum(0)
    kept = energy > 1e-6 * energy.max()
    level = 20 * np.log10(p + 1e-5 * p.max() + 1e-12)
    grain = level - scipy.ndimage.uniform_filter(level, 9, mode="mirror")
    peaks = np.zeros(p.shape, bool)
    for f in range(8, len(p) - 8):
        for t in range(1, p.shape[1] - 1):
            x = level[f, t]
            above = max(level[f - 1, t], level[f + 1, t])
            peaks[f, t] = x >= above and x > max(level[f - 4, t], level[f + 4, t]) + 10
    bands = [range(a, b) for a, b in itertools.pairwise(rows)]
    z = grain.copy()
    for band in bands:
        z[band] -= grain[band][:, kept].mean()
    out = [[np.log((z[b][:, kept] ** 2).mean() + 0.05) for b in bands]]
    wide = np.pad(z, 8)
    for df, dt in LAGS:
        other = wide[8 - df : 8 - df + len(z), 8 - dt : 8 - dt + z.shape[1]]
        out.append(
            [
                (z[b] * other[b])[:, kept].mean() / ((z[b][:, kept] ** 2).mean() + 0.05)
                for b in bands
            ]
        )
    near = np.pad(level, ((8, 8), (1, 1)), mode="edge")

    def at(df, dt=0):
        return near[8 + df : 8 + df + len(p), 1 + dt : 1 + dt + p.shape[1]]

    share = [peaks[b][:, kept].mean() + 3 / (len(b) * p.shape[1]) for b in bands]
    out.append(np.log(share))

    def over_peaks(values):
        return np.array(
            [(values * peaks)[b][:, kept].mean() / s for b, s in zip(bands, share, strict=True)]
        )

    for q in (1, 2, 3, 4, 6, 8):
        fall = np.clip(level - (at(-q) + at(q)) / 2, 0, 40)
        mean = over_peaks(fall)
        out += [mean / 5, np.sqrt(np.maximum(over_peaks(fall**2) - mean**2, 0)) / 5]
    for change in (abs(at(0, -1) - 2 * level + at(0, 1)), abs(at(0, -1) - at(0, 1))):
        out += [np.log(over_peaks(change) + 0.1), over_peaks(np.minimum(change, 3))]
    power = np.stack([(p[b] ** 2).mean(0) for b in bands])
    envelope = 10 * np.log10(power + 1e-10 * p.max() ** 2 + 1e-20)
    envelope -= scipy.ndimage.uniform_filter1d(envelope, 15, axis=1, mode="mirror")
    envelope = envelope[:, kept] - envelope[:, kept].mean(1, keepdims=True)
    spread = (envelope**2).mean(1) + 1e-6
    for step in (1, 2):
        pairs = [(k, k + step) for k in range(len(bands) - step)]
        out.append(
            [(envelope[a] * envelope[b]).mean() / np.sqrt(spread[a] * spread[b]) for a, b in pairs]
        )
    out.append(np.log(np.sqrt(spread) + 0.1))
    return np.concatenate(out)


def magnitude_of(audio, n_fft, hop):
    """Centred STFT magnitude by SciPy."""
    window = scipy.signal.get_window("hann", n_fft)
    padded = np.pad(audio, n_fft // 2, mode="reflect")
    starts = range(0, len(padded) - n_fft + 1, hop)
    return np.abs(np.fft.rfft([padded[s : s + n_fft] * window for s in starts])).T


@pytest.mark.parametrize(("n_fft", "hop"), HEAD.resolutions)
def test_statistics_are_what_they_say(n_fft, hop):
    magnitude = magnitude_of(music(), n_fft, hop)
    got = texture.statistics(magnitude, n_fft, HEAD, RATE)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, oracle(magnitude, n_fft), rtol=1e-9, atol=1e-9)


def test_every_statistic_has_a_name():
    names = texture.names(HEAD, RATE)
    magnitudes = [magnitude_of(music(), *resolution) for resolution in HEAD.resolutions]
    sizes = [
        len(texture.statistics(m, n, HEAD, RATE))
        for m, (n, _) in zip(magnitudes, HEAD.resolutions, strict=True)
    ]
    assert len(names) == sum(sizes) == len(set(names))
    assert names[sizes[0]].startswith("2048: spread, ")
    assert len(texture.names(Texture(), RATE)) == 3336


def test_numpy_and_jax_agree_in_float32():
    audio = np.stack([music(1), music(2)]).astype(np.float32)
    for n_fft, hop in HEAD.resolutions:
        front_end = texture.front_end(FrontEnd(segment_samples=RATE), n_fft, hop)
        magnitude = np.stack([dsp_numpy.stft_magnitude(x, front_end) for x in audio])
        assert magnitude.shape[1] == n_fft // 2 + 1
        exact = np.stack([oracle(m.astype(np.float64), n_fft) for m in magnitude])
        single = np.stack([texture.statistics(m, n_fft, HEAD, RATE) for m in magnitude])
        compiled = texture_xla.statistics([(n_fft, jnp.asarray(magnitude))], HEAD, RATE)
        assert single.dtype == compiled.dtype == np.float32
        np.testing.assert_allclose(single, exact, atol=2e-4)
        np.testing.assert_allclose(compiled, exact, atol=2e-4)


def test_all_resolutions_at_once_are_those_one_by_one():
    """Their pieces lie beside each other in one array: none may read what is its neighbour's."""
    audio = np.stack([music(1), music(2)]).astype(np.float32)
    found = []
    for n_fft, hop in HEAD.resolutions:
        front_end = texture.front_end(FrontEnd(segment_samples=RATE), n_fft, hop)
        found.append((n_fft, np.stack([dsp_numpy.stft_magnitude(x, front_end) for x in audio])))
    exact = [
        [oracle(magnitude[k].astype(np.float64), n_fft) for n_fft, magnitude in found]
        for k in range(2)
    ]
    together = texture_xla.statistics([(n, jnp.asarray(m)) for n, m in found], HEAD, RATE)
    np.testing.assert_allclose(together, [np.concatenate(x) for x in exact], atol=2e-4)


def test_level_makes_no_difference():
    magnitude = magnitude_of(music(), 2048, 512)
    loud = texture.statistics(magnitude, 2048, HEAD, RATE)
    quiet = texture.statistics(magnitude * 0.01, 2048, HEAD, RATE)
    np.testing.assert_allclose(loud, quiet, atol=1e-5)


@pytest.mark.parametrize("audio", [np.zeros(RATE), np.eye(1, RATE, RATE // 2)[0]])
def test_silence_and_a_click_give_finite_statistics(audio):
    front_end = texture.front_end(FrontEnd(segment_samples=RATE), 2048, 512)
    magnitude = dsp_numpy.stft_magnitude(audio.astype(np.float32), front_end)
    assert np.isfinite(texture.statistics(magnitude, 2048, HEAD, RATE)).all()
    compiled = texture_xla.statistics([(2048, jnp.asarray(magnitude)[None])], HEAD, RATE)
    assert np.isfinite(compiled).all()


def test_the_head_adds_its_logit():
    config = dataclasses.replace(TINY, texture=dataclasses.replace(HEAD, hidden=(5,)))
    tensors = random_tensors(config, 3)
    audio = music(4, RATE).astype(np.float32)
    both = NumpyNetwork(config, tensors)
    alone = NumpyNetwork(
        TINY, {name: t for name, t in tensors.items() if not name.startswith("texture.")}
    )
    magnitudes = [magnitude_of(audio.astype(np.float64), *r) for r in HEAD.resolutions]
    x = np.concatenate(
        [oracle(m, n) for m, (n, _) in zip(magnitudes, HEAD.resolutions, strict=True)]
    )
    x = np.clip((x - tensors["texture.mean"]) / tensors["texture.spread"], -6, 6)
    h = np.maximum(x @ tensors["texture.hidden.0.kernel"] + tensors["texture.hidden.0.bias"], 0)
    logit = (h @ tensors["texture.out.kernel"] + tensors["texture.out.bias"])[0]
    score, before = float(both(audio)), float(alone(audio))
    assert abs(logit) > 0.01
    assert np.log(score / (1 - score)) == pytest.approx(
        np.log(before / (1 - before)) + logit, abs=1e-3
    )


def test_a_new_head_is_silent_and_a_song_rule_refuses_it():
    from flax import nnx

    config = dataclasses.replace(TINY, texture=HEAD)
    model = ArtifactNet(config, rngs=nnx.Rngs(0))
    audio = jnp.asarray(music(0, RATE).astype(np.float32))[None]
    assert float(model.texture_logit(audio, model.magnitude(audio))[0]) == 0.0
    with pytest.raises(ValueError, match="one by one"):
        dataclasses.replace(config, front_end=dataclasses.replace(TINY.front_end, joint="song"))


def test_a_config_with_a_head_comes_back_from_its_dict():
    assert Config.from_dict(Config.edge().to_dict()) == Config.edge()
    old = Config.edge().to_dict()
    del old["texture"]
    assert Config.from_dict(old).texture is None
    assert Config.from_dict(Config.v94().to_dict()) == Config.v94()
