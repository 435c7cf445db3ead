"""The front end against scipy and librosa: JAX and NumPy each on their own."""

import dataclasses

import librosa
import numpy as np
import pytest
import scipy.ndimage
import scipy.signal

from artifactnet_jax import dsp_numpy
from artifactnet_jax.config import Config, FrontEnd
from artifactnet_jax.filterbank import hann, mel_filterbank
from artifactnet_jax.forward import Forward

jax = pytest.importorskip("jax")
jnp = jax.numpy
from artifactnet_jax import dsp_jax  # noqa: E402

FRONT_END = FrontEnd()


def music(seconds: float = 4.0, seed: int = 0) -> np.ndarray:
    """Float64 test signal: decaying harmonics, clicks and noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(44_100 * seconds)) / 44_100
    beat = (t * 2) % 1
    tones = sum(np.sin(2 * np.pi * f * t) / k for k, f in enumerate((220, 441, 1760, 9000), 1))
    return (
        0.2 * tones * np.exp(-4 * beat) + 0.3 * (beat < 0.002) + 0.01 * rng.standard_normal(t.size)
    )


AUDIO = music()


def oracle_magnitude(audio: np.ndarray) -> np.ndarray:
    return np.abs(librosa.stft(audio, n_fft=2048, hop_length=512, center=True, pad_mode="reflect"))


def oracle_hpss(residual: np.ndarray, eps: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    h = scipy.ndimage.median_filter(residual, size=(1, 31), mode="mirror") ** 2
    p = scipy.ndimage.median_filter(residual, size=(31, 1), mode="mirror") ** 2
    total = h + p + eps
    safe = np.where(total == 0, 1, total)
    return residual * h / safe, residual * p / safe


def oracle_mel_db(magnitude: np.ndarray) -> np.ndarray:
    mel = librosa.feature.melspectrogram(S=magnitude**2, sr=44_100, n_mels=128, norm="slaney")
    return librosa.power_to_db(mel, ref=1.0, amin=1e-10, top_db=None)


def oracle_channels(residual: np.ndarray) -> np.ndarray:
    h, p = oracle_hpss(residual)
    views = np.stack([oracle_mel_db(residual), oracle_mel_db(h), oracle_mel_db(p)])
    views = np.maximum(views, views.max() - 80)
    d = np.zeros_like(views[0])
    d[:, 1:] = views[0][:, 1:] - views[0][:, :-1]
    d2 = np.zeros_like(d)
    d2[:, 1:] = d[:, 1:] - d[:, :-1]
    return np.stack([*views, d, d2, views[1] - views[2], np.abs(d)])


class FrontEndOnly(Forward):
    """The stages before the networks and between them."""

    def __init__(self, lib, front_end: FrontEnd, mel=None):
        self.lib, self.config, self.mel = lib, Config("front end", front_end), mel


def hpss(lib, residual, front_end: FrontEnd):
    parts = FrontEndOnly(lib, front_end).parts(residual)
    return parts[..., 1, :, :], parts[..., 2, :, :]


def mel_db(lib, magnitude, front_end: FrontEnd):
    return FrontEndOnly(lib, front_end).mel_db(magnitude)


def mel_views(lib, residual, front_end: FrontEnd, mel=None):
    stages = FrontEndOnly(lib, front_end, mel)
    return stages.mel_db(stages.parts(residual))


def seven_channels(lib, residual, front_end: FrontEnd, mel=None):
    stages = FrontEndOnly(lib, front_end, mel)
    mel_db = stages.mel_db(stages.parts(residual))
    return stages.channels(mel_db, stages.reference_db(mel_db))


def in_jax(function, x: np.ndarray):
    """Run a batched JAX function on one float32 example, jitted, without its batch axis."""
    out = jax.jit(function)(jnp.asarray(x, jnp.float32)[None])
    return jax.tree.map(lambda y: np.asarray(y)[0], out)


def test_hann_is_periodic():
    np.testing.assert_allclose(hann(2048), scipy.signal.get_window("hann", 2048), atol=1e-15)


@pytest.mark.parametrize("scale", ["slaney", "htk"])
@pytest.mark.parametrize("norm", ["slaney", "none"])
def test_mel_filterbank_matches_librosa(scale, norm):
    ours = mel_filterbank(FrontEnd(mel_scale=scale, mel_norm=norm))
    theirs = librosa.filters.mel(
        sr=44_100,
        n_fft=2048,
        n_mels=128,
        htk=scale == "htk",
        norm=None if norm == "none" else norm,
        dtype=np.float64,
    )
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n_fft", [2047, 1025, 441, 400])
def test_mel_filterbank_of_odd_sizes(n_fft):
    """The highest bin of an odd size lies below Nyquist."""
    ours = mel_filterbank(FrontEnd(n_fft=n_fft, hop=100, stft_pad=n_fft // 2, n_mels=40))
    theirs = librosa.filters.mel(sr=44_100, n_fft=n_fft, n_mels=40, dtype=np.float64)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_stft_magnitude():
    expected = oracle_magnitude(AUDIO)
    assert expected.shape == (1025, 345)
    exact = dsp_numpy.stft_magnitude(AUDIO, FRONT_END)
    assert exact.dtype == np.float64
    np.testing.assert_allclose(exact, expected, atol=1e-10)
    single = dsp_numpy.stft_magnitude(AUDIO.astype(np.float32), FRONT_END)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, atol=2e-4)
    ours = in_jax(lambda a: dsp_jax.stft_magnitude(a, FRONT_END), AUDIO)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_stft_of_a_bin_centred_sine_is_half_the_window_sum():
    f = 100 * 44_100 / 2048
    audio = np.cos(2 * np.pi * f * np.arange(176_400) / 44_100)
    for magnitude in (
        dsp_numpy.stft_magnitude(audio, FRONT_END),
        in_jax(lambda a: dsp_jax.stft_magnitude(a, FRONT_END), audio),
    ):
        np.testing.assert_allclose(magnitude[100, 10:-10], 512.0, rtol=1e-4)
        assert magnitude[104:, 10:-10].max() < 0.05


VARIANTS = [
    FrontEnd(hop=441),
    FrontEnd(n_fft=512, hop=160, stft_pad=256, stft_edge="edge"),
    FrontEnd(n_fft=512, hop=128, stft_pad=0, window="given"),
    FrontEnd(n_fft=512, hop=256, stft_pad=100, stft_edge="constant", spectrum_power=2.0),
    FrontEnd(spectrum_eps=1e-3, spectrum_scale=0.25),
    FrontEnd(spectrum_eps=1e-3, spectrum_scale=0.25, spectrum_power=0.5),
]


@pytest.mark.parametrize("front_end", VARIANTS, ids=range(len(VARIANTS)))
def test_stft_variants_against_librosa(front_end):
    fe = dataclasses.replace(front_end, segment_samples=22_050)
    audio = AUDIO[: fe.segment_samples]
    window = None
    if fe.window == "given":
        window = np.random.default_rng(0).uniform(0, 1, fe.n_fft)
    spectrum = librosa.stft(
        np.pad(audio, fe.stft_pad, mode=fe.stft_edge),
        n_fft=fe.n_fft,
        hop_length=fe.hop,
        window="hann" if window is None else window,
        center=False,
    )
    magnitude = fe.spectrum_scale * np.sqrt(np.abs(spectrum) ** 2 + fe.spectrum_eps)
    expected = magnitude**fe.spectrum_power
    assert expected.shape == (fe.n_bins, fe.n_frames)
    exact = dsp_numpy.stft_magnitude(audio, fe, window)
    np.testing.assert_allclose(exact, expected, rtol=1e-6, atol=1e-7)
    given = None if window is None else jnp.asarray(window, jnp.float32)
    ours = in_jax(lambda a: dsp_jax.stft_magnitude(a, fe, given), audio)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=5e-4)


def test_a_given_window_or_mel_matrix_must_be_passed():
    for module, audio in ((dsp_numpy, AUDIO), (dsp_jax, jnp.asarray(AUDIO, jnp.float32)[None])):
        with pytest.raises(ValueError, match=r"front_end\.window"):
            module.stft_magnitude(audio, FrontEnd(window="given"))
        with pytest.raises(ValueError, match=r"front_end\.mel"):
            mel_db(module, audio[..., None], FrontEnd(mel_scale="given"))


@pytest.mark.parametrize("eps", [0.0, 1e-10])
def test_hpss(eps):
    front_end = FrontEnd(hpss_eps=eps)
    residual = oracle_magnitude(AUDIO) * 0.3
    expected = oracle_hpss(residual, eps)
    for ours, theirs in zip(hpss(dsp_numpy, residual, front_end), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        in_jax(lambda r: hpss(dsp_jax, r, front_end), residual), expected, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("edge", ["reflect", "edge", "constant"])
@pytest.mark.parametrize("power", [1.0, 1.5, 3.0])
def test_hpss_variants_against_scipy(edge, power):
    fe = FrontEnd(
        hpss_width=9, percussive_width=17, hpss_edge=edge, hpss_power=power, hpss_eps=1e-3
    )
    residual = np.random.default_rng(0).uniform(0, 1, (60, 50)) ** 3
    mode = {"reflect": "mirror", "edge": "nearest", "constant": "constant"}[edge]
    h = scipy.ndimage.median_filter(residual, size=(1, 9), mode=mode) ** power
    p = scipy.ndimage.median_filter(residual, size=(17, 1), mode=mode) ** power
    expected = residual * h / (h + p + 1e-3), residual * p / (h + p + 1e-3)
    for ours, theirs in zip(hpss(dsp_numpy, residual, fe), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    parts = in_jax(lambda r: hpss(dsp_jax, r, fe), residual)
    for ours, theirs in zip(parts, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0])
def test_soft_masks_of_any_power_have_true_and_finite_gradients(power):
    fe = FrontEnd(hpss_width=3, percussive_width=5, hpss_power=power)

    def loss(r):
        return sum(jnp.sum(part**2) for part in hpss(dsp_jax, r, fe))

    silent = np.zeros((1, 12, 12), np.float32)
    silent[0, :6] = np.random.default_rng(0).uniform(0, 1, (6, 12))
    assert np.isfinite(jax.grad(loss)(jnp.asarray(silent))).all()
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        residual = jnp.asarray(rng.uniform(0.5, 1.5, (1, 12, 12)))
        direction = jnp.asarray(rng.standard_normal((1, 12, 12)))
        slope = jnp.vdot(jax.grad(loss)(residual), direction)
        step = 1e-6
        ahead, behind = loss(residual + step * direction), loss(residual - step * direction)
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("joint", ["segment", "view", "song", "song_view"])
@pytest.mark.parametrize("top_db", [None, 20.0])
def test_feature_variants_by_hand(joint, top_db):
    fe = FrontEnd(
        n_fft=64,
        n_mels=6,
        mel_scale="given",
        mel_power=1.0,
        amin=0.3,
        amin_rule="add",
        db_factor=20.0,
        top_db=top_db,
        joint=joint,
        channels=("flux", "mel_P", "delta2", "mel_res", "ratio"),
        hpss_width=3,
        percussive_width=3,
    )
    rng = np.random.default_rng(0)
    mel, residual = rng.uniform(0, 1, (6, 33)), rng.uniform(0, 3, (33, 20)) ** 4
    h = scipy.ndimage.median_filter(residual, size=(1, 3), mode="mirror") ** 2
    p = scipy.ndimage.median_filter(residual, size=(3, 1), mode="mirror") ** 2
    parts = residual, residual * h / (h + p), residual * p / (h + p)
    views = np.stack([20 * np.log10(mel @ part + 0.3) for part in parts])
    clamped = views
    if top_db is not None:
        # A segment scored by itself is its own song.
        axes = (1, 2) if joint.endswith("view") else (0, 1, 2)
        clamped = np.maximum(views, views.max(axis=axes, keepdims=True) - top_db)
        assert (clamped > views).any()
    d = np.diff(clamped[0], axis=1, prepend=clamped[0][:, :1])
    d2 = np.diff(d, axis=1, prepend=0)
    expected = np.stack([np.abs(d), clamped[2], d2, clamped[0], clamped[1] - clamped[2]])
    ours = seven_channels(dsp_numpy, residual, fe, mel)
    np.testing.assert_allclose(ours, expected, atol=1e-9)
    given = jnp.asarray(mel, jnp.float32)
    in32 = in_jax(lambda r: seven_channels(dsp_jax, r, fe, given), residual)
    np.testing.assert_allclose(in32, expected, atol=1e-3)
    np.testing.assert_allclose(mel_views(dsp_numpy, residual, fe, mel), views, atol=1e-9)


def test_hpss_separates_a_tone_from_a_click():
    residual = np.full((1025, 345), 1e-3)
    residual[100], residual[:, 200] = 1.0, 1.0
    for harmonic, percussive in (
        hpss(dsp_numpy, residual, FRONT_END),
        in_jax(lambda r: hpss(dsp_jax, r, FRONT_END), residual),
    ):
        assert harmonic[100, 50] > 0.99
        assert percussive[100, 50] < 0.01
        assert percussive[600, 200] > 0.99
        assert harmonic[600, 200] < 0.01


def test_parts_are_exactly_zero_on_digital_silence():
    residual = np.zeros((1025, 345), np.float32)
    residual[500, 100] = 1.0  # a lone bin: both medians are 0 there too
    for parts in (
        hpss(dsp_numpy, residual, FRONT_END),
        in_jax(lambda r: hpss(dsp_jax, r, FRONT_END), residual),
    ):
        for part in parts:
            assert not part.any()


def test_seven_channels():
    residual = oracle_magnitude(AUDIO) * 0.3
    expected = oracle_channels(residual)
    exact = seven_channels(dsp_numpy, residual, FRONT_END)
    assert exact.shape == (7, 128, 345)
    np.testing.assert_allclose(exact, expected, atol=1e-5)  # librosa's filters are float32
    for ours in (
        seven_channels(dsp_numpy, residual.astype(np.float32), FRONT_END),
        in_jax(lambda r: seven_channels(dsp_jax, r, FRONT_END), residual),
    ):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, atol=5e-3)  # dB


def test_top_db_is_joint_over_the_three_views_but_not_over_segments():
    loud = oracle_magnitude(AUDIO)
    quiet = loud * 1e-3
    batch = jnp.asarray(np.stack([loud, quiet]), jnp.float32)
    both = np.asarray(seven_channels(dsp_jax, batch, FRONT_END))
    alone = np.asarray(seven_channels(dsp_jax, batch[1:], FRONT_END))
    np.testing.assert_array_equal(both[1], alone[0])
    views = both[0, :3]
    assert views.min() >= views.max() - 80.0001
    assert (views == views.min()).any(axis=(1, 2)).any()


@pytest.mark.parametrize("kind", ["silence", "music", "tiny", "click", "half"])
@pytest.mark.parametrize("eps", [0.0, 1e-10])
def test_gradients_are_finite(kind, eps):
    front_end = FrontEnd(hpss_eps=eps)
    audio = {
        "silence": np.zeros(44_100),
        "music": music(1.0),
        "tiny": music(1.0) * 1e-15,
        "click": np.eye(1, 44_100, 22_050)[0],
        "half": music(1.0) * (np.arange(44_100) < 22_050),
    }[kind]

    def loss(a):
        residual = 0.25 * dsp_jax.stft_magnitude(a, front_end)
        return jnp.mean(seven_channels(dsp_jax, residual, front_end) ** 2)

    value, slope = jax.jit(jax.value_and_grad(loss))(jnp.asarray(audio, jnp.float32)[None])
    assert np.isfinite(value)
    assert np.isfinite(slope).all()
    if kind == "music":
        assert np.abs(slope).max() > 0


@pytest.mark.parametrize("level", [0.0, 1e-38, 1e-27, 1e-18, 1e-9, 1e-6])
@pytest.mark.parametrize("eps", [0.0, 1e-10])
def test_gradient_at_a_lone_peak_in_near_silence_is_bounded(level, eps):
    front_end = FrontEnd(hpss_eps=eps)
    rng = np.random.default_rng(0)
    residual = level * rng.uniform(0.5, 1.5, (1, 1025, 60)) + np.zeros((1, 1025, 60))
    residual[0, 500, 30] = 1.0

    def loss(r):
        return jnp.mean(seven_channels(dsp_jax, r, front_end) ** 2)

    slope = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(residual, jnp.float32)))
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() < 1e8


def test_gradient_of_the_soft_mask_against_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        residual = jnp.asarray(rng.uniform(0.5, 1.5, (1, 40, 40)))
        direction = jnp.asarray(rng.standard_normal((1, 40, 40)))
        weight = jnp.asarray(rng.standard_normal((1, 40, 40)))

        def loss(r):
            h, p = hpss(dsp_jax, r, FRONT_END)
            return jnp.sum(weight * h) + jnp.sum(weight**2 * p)

        slope = jnp.vdot(jax.grad(loss)(residual), direction)
        step = 1e-7
        ahead, behind = loss(residual + step * direction), loss(residual - step * direction)
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5)
