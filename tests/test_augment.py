"""Codecs and other changes that keep the label: aligned, as strong as they claim, label-blind."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import signal, stats

pytest.importorskip("av")

from artifactnet_jax.data.augment import (
    CODECS,
    PEAK,
    RATE,
    Augment,
    Chain,
    biquad,
    encode_decode,
    filtered,
    low_pass,
    to_int16,
)

LOSSY = ("mp3", "aac", "opus", "vorbis")
NOTHING = {
    **{f.name: 0.0 for f in dataclasses.fields(Augment) if f.name.endswith("_p")},
    **{"wav": 1.0, "mp3": 0.0, "aac": 0.0, "opus": 0.0, "vorbis": 0.0},
}


def music(n: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Noise with the spectrum of music (falling by 6 dB an octave) up to 12 kHz, and a chord."""
    rng = np.random.default_rng(seed)
    sos = signal.butter(8, 12_000, fs=RATE, output="sos")
    shaped = signal.lfilter([1], [1, -0.98], rng.standard_normal((n + 500, channels)), axis=0)
    x = signal.sosfilt(sos, shaped, axis=0)[500:]
    t = np.arange(n) / RATE
    x += 3 * sum(np.sin(2 * np.pi * f * t) for f in (220.0, 277.2, 329.6))[:, None]
    return (0.3 * x / np.abs(x).max()).astype(np.float32)


def lag(changed: np.ndarray, original: np.ndarray) -> float:
    """Samples by which `changed` comes late, with a fraction (parabola through the peak)."""
    c = signal.correlate(changed, original, "full", "fft")
    k = int(c.argmax())
    a, b, d = c[k - 1 : k + 2]
    return k - (len(original) - 1) + 0.5 * (a - d) / (a - 2 * b + d)


def snr(changed: np.ndarray, original: np.ndarray) -> float:
    error = changed.astype(np.float64) - original
    return float(10 * np.log10(np.sum(original.astype(np.float64) ** 2) / np.sum(error**2)))


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("channels", [0, 1, 2])  # 0: one-dimensional
@pytest.mark.parametrize(("n", "kbps"), [(22_050, 64), (30_011, 128), (44_100, 320)])
def test_a_codec_changes_neither_place_nor_length(codec, channels, n, kbps):
    x = music(n, max(1, channels))
    x = x[:, 0] if channels == 0 else x
    y = encode_decode(x, codec, kbps)
    assert (y.shape, y.dtype) == (x.shape, np.float32)
    for k in range(max(1, channels)):
        pair = (y, x) if channels == 0 else (y[:, k], x[:, k])
        assert abs(lag(*pair)) < 0.1
    inside = slice(2_000, -2_000)
    assert snr(y[inside], x[inside]) > {64: 8, 128: 13, 320: 16}[kbps]
    assert not np.array_equal(y, x)


@pytest.mark.parametrize("codec", LOSSY)
def test_more_bits_are_nearer_to_the_original(codec):
    x = music(44_100)
    found = [snr(encode_decode(x, codec, kbps), x) for kbps in (64, 128, 256)]
    assert found[0] + 1 < found[1] < found[2] - 1


@pytest.mark.parametrize("codec", LOSSY)
def test_channels_stay_apart_and_in_order(codec):
    x = np.zeros((44_100, 2), np.float32)
    x[:, 1] = music(44_100)[:, 0]
    y = encode_decode(x, codec, 192)
    assert snr(y[:, 1], x[:, 1]) > 15
    assert np.abs(y[:, 0]).max() < 0.05 * np.abs(y[:, 1]).max()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("n", [50, 300, 4_410])
def test_the_shortest_clips_pass_a_codec(codec, n):
    y = encode_decode(music(4_410, 2)[:n], codec, 128)
    assert y.shape == (n, 2)
    assert np.isfinite(y).all()
    silence = encode_decode(np.zeros((n, 1), np.float32), codec, 128)
    assert np.abs(silence).max() < 1e-4


def test_wav_is_16_bit_pcm():
    x = np.array([[-1.5], [-1.0], [0.4 / 32768], [0.6 / 32768], [0.25], [1.0], [2.0]], np.float32)
    y = encode_decode(x, "wav", 0)
    assert (y[:, 0] * 32768).tolist() == [-32768, -32768, 0, 1, 8192, 32767, 32767]
    noise = encode_decode(music(44_100), "wav", 0) - music(44_100)
    assert 20 * np.log10(np.std(noise)) == pytest.approx(-101.1, abs=0.1)  # 1 / sqrt(12) steps


def test_to_int16_undoes_the_scale_of_16_bit_files():
    pcm = np.arange(-32768, 32768).astype(np.int16)
    assert np.array_equal(to_int16(pcm.astype(np.float32) / np.float32(32768)), pcm)


# --- filters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
def test_filtering_is_that_of_the_recursive_filter(channels):
    x = music(20_000, channels)
    b, a = signal.butter(3, 1_500, fs=RATE)
    y = filtered(x, lambda hz: signal.freqz(b, a, hz, fs=RATE)[1])
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, signal.lfilter(b, a, x, axis=0), atol=2e-6)


@pytest.mark.parametrize("gain_db", [-6.0, 4.0])
@pytest.mark.parametrize("centre", [60.0, 1_000.0, 12_000.0])
def test_bands_of_the_equaliser(gain_db, centre):
    hz = np.array([0.0, centre, RATE / 2])
    decibel = {k: 20 * np.log10(np.abs(biquad(hz, k, centre, gain_db))) for k in ("low", "high")}
    # Cookbook: a shelf passes half of its gain at its corner, and has it whole at one end.
    np.testing.assert_allclose(decibel["low"], [gain_db, gain_db / 2, 0], atol=1e-6)
    np.testing.assert_allclose(decibel["high"], [0, gain_db / 2, gain_db], atol=1e-6)
    peak = 20 * np.log10(np.abs(biquad(hz, "peak", centre, gain_db)))
    np.testing.assert_allclose(peak, [0, gain_db, 0], atol=1e-6)


def test_equaliser_bands_are_causal_and_stable():
    for kind in ("low", "high", "peak"):
        click = np.zeros((8_192, 1), np.float32)
        click[4_096] = 1
        y = filtered(click, lambda hz, kind=kind: biquad(hz, kind, 200.0, 6.0))[:, 0]
        assert np.abs(y[:4_096]).max() < 1e-6
        assert np.abs(y[-500:]).max() < 1e-3


def test_the_low_pass_is_steep_and_keeps_place():
    hz = np.array([0.0, 9_999, 10_250, 10_501, 22_050])
    np.testing.assert_allclose(low_pass(hz, 10_000.0), [1, 1, 0.5, 0, 0], atol=1e-9)
    x = music(30_000)
    assert abs(lag(filtered(x, lambda hz: low_pass(hz, 6_000.0))[:, 0], x[:, 0])) < 0.01


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("cutoff", [5_000.0, 11_025.0, 20_000.0])
def test_band_limits(cutoff, resampled):
    x = (0.1 * np.random.default_rng(0).standard_normal((60_000, 1))).astype(np.float32)
    y = Chain(cutoff=cutoff, resampled=resampled).apply(x)[0]
    assert y.shape == (60_000,)
    assert abs(lag(y, x[:, 0])) < 0.01
    hz, power = signal.welch(y[5_000:-5_000], RATE, nperseg=2_048)
    _, before = signal.welch(x[5_000:-5_000, 0], RATE, nperseg=2_048)
    gain = 10 * np.log10(power / before)
    assert np.abs(gain[(hz > 100) & (hz < 0.93 * cutoff)]).max() < 1
    assert gain[hz > 1.15 * cutoff].max(initial=-99) < -40


# --- the chain -------------------------------------------------------------------------------


def test_the_default_chain_only_mixes():
    x = np.random.default_rng(0).uniform(-1, 1, (5_000, 2)).astype(np.float32)
    np.testing.assert_allclose(Chain().apply(x)[0], x.mean(axis=1), atol=1e-7)
    assert np.array_equal(Chain().apply(x[:, :1])[0], x[:, 0])


@pytest.mark.parametrize("speed", [0.97, 1.03])
def test_speed_moves_tempo_and_pitch(speed):
    n = 2 * RATE
    x = np.sin(2 * np.pi * 1_000 * np.arange(n) / RATE).astype(np.float32)[:, None]
    y = Chain(speed=speed).apply(0.5 * x)[0]
    assert abs(len(y) - n / speed) <= 1
    spectrum = np.abs(np.fft.rfft(y * np.hanning(len(y))))
    assert spectrum.argmax() * RATE / len(y) == pytest.approx(1_000 * speed, abs=0.5)
    assert Chain(speed=speed).source_samples(len(y)) == pytest.approx(n, abs=2)


def test_mixes():
    x = np.stack([music(5_000)[:, 0], music(5_000, seed=1)[:, 0]], axis=1)
    for left in (0.0, 1.0, 0.3):
        expected = left * x[:, 0] + (1 - left) * x[:, 1]
        np.testing.assert_allclose(Chain(left=left).apply(x)[0], expected, atol=1e-6)
        mono = Chain(left=left).apply(x[:, :1])[0]
        np.testing.assert_allclose(mono, x[:, 0], atol=1e-6)
    x[:, 1] = 0  # nothing there to listen to: the mean is taken
    np.testing.assert_allclose(Chain(left=0.0).apply(x)[0], x[:, 0] / 2, atol=1e-7)


def test_stereo_is_mixed_behind_the_codec():
    x = music(44_100, 2)
    chain = Chain(stereo=True, codecs=(("mp3", 128),))
    np.testing.assert_allclose(
        chain.apply(x)[0], encode_decode(x, "mp3", 128).mean(axis=1), atol=1e-6
    )


@pytest.mark.parametrize("soft", [False, True])
def test_clipping(soft):
    x = music(20_000)
    y = Chain(clip_db=6.0, soft=soft).apply(x)[0]
    top = np.abs(x).max() * 10 ** (-6 / 20)
    assert np.abs(y).max() <= top * 1.0001
    if soft:
        assert np.abs(y).max() < 0.97 * top  # tanh(2) = 0.964
    else:
        assert np.count_nonzero(np.isclose(np.abs(y), top)) > 5
        inside = np.abs(x[:, 0]) < top
        np.testing.assert_allclose(y[inside], x[inside, 0], atol=1e-7)


def test_levels_and_gains():
    x = music(44_100)
    y = Chain(level_db=-30.0).apply(x)[0]
    assert 20 * np.log10(np.std(y)) == pytest.approx(-30, abs=0.05)
    loud = Chain(level_db=0.0).apply(x)[0]
    assert np.abs(loud).max() == pytest.approx(PEAK, abs=1e-4)
    np.testing.assert_allclose(loud / np.abs(loud).max(), x[:, 0] / np.abs(x).max(), atol=1e-6)
    behind = Chain(level_db=-20.0, codecs=(("mp3", 128),))
    quieter = dataclasses.replace(behind, gain_db=-6.0)
    np.testing.assert_allclose(
        quieter.apply(x), 10 ** (-6 / 20) * behind.apply(x), rtol=1e-5, atol=1e-7
    )


def test_what_an_equaliser_lifts_over_full_scale_is_turned_down():
    x = (3 * music(20_000)).clip(-1, 1)
    y = Chain(eq=(("low", 1_000.0, 6.0),)).apply(x)[0]
    assert np.abs(y).max() == pytest.approx(PEAK, abs=1e-5)


def test_noise_has_its_level_and_is_white():
    x = music(44_100)
    noise = Chain(noise_db=-40.0, noise_seed=3).apply(x)[0] - x[:, 0]
    assert snr(noise + x[:, 0], x[:, 0]) == pytest.approx(40, abs=0.1)
    flatness = signal.welch(noise, RATE, nperseg=512)[1][5:-5]
    assert flatness.max() < 2 * flatness.min()


def test_versions_are_the_same_crop_at_the_same_place():
    chain = dataclasses.replace(
        Augment().draw(np.random.default_rng(5), CODECS), level_db=-20.0, speed=1.02
    )
    assert [codec for codec, _ in chain.codecs] == list(CODECS)
    y = chain.apply(music(60_000, 2))
    assert (y.shape[0], y.dtype) == (4, np.float32)
    alone = [
        dataclasses.replace(chain, codecs=(c,)).apply(music(60_000, 2))[0] for c in chain.codecs
    ]
    assert np.array_equal(y, alone)
    for version in y[1:]:
        assert abs(lag(version, y[0])) < 0.1
        assert snr(version[3_000:-3_000], y[0, 3_000:-3_000]) > 5


@pytest.mark.parametrize("n", [50, 9_000])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_any_chain_takes_silence_and_scraps(n, scale):
    x = np.float32(scale) * music(9_000, 2)[:n]
    everything = Augment(**{**NOTHING, **dict.fromkeys(("clip_p", "eq_p", "noise_p"), 1.0)})
    for seed in range(12):
        for augment in (Augment(), everything):
            y = augment.draw(np.random.default_rng(seed)).apply(x)
            assert y.ndim == 2
            assert np.isfinite(y).all()
            assert np.abs(y).max(initial=0) <= 1


# --- drawing ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chains() -> list[Chain]:
    return [Augment().draw(np.random.default_rng((7, i))) for i in range(4_000)]


def test_changes_come_as_often_as_they_should(chains):
    a = Augment()
    seen = {
        a.speed_p: [c.speed != 1 for c in chains],
        a.eq_p: [bool(c.eq) for c in chains],
        a.one_channel_p: [c.left in (0.0, 1.0) for c in chains],
        a.random_mix_p: [c.left not in (0.0, 0.5, 1.0) for c in chains],
        a.stereo_p: [c.stereo for c in chains],
        a.clip_p: [c.clip_db > 0 for c in chains],
        a.band_p: [c.cutoff > 0 for c in chains],
        a.noise_p: [c.noise_db is not None for c in chains],
        a.level_p: [c.level_db is not None for c in chains],
        a.gain_p: [c.gain_db < 0 for c in chains],
    }
    for codec in (*CODECS, "vorbis"):
        seen[getattr(a, codec)] = [c.codecs[0][0] == codec for c in chains]
    for p, found in seen.items():
        assert stats.binomtest(sum(found), len(found), p).pvalue > 1e-4


def test_values_lie_in_their_ranges(chains):
    a = Augment()
    for c in chains:
        assert abs(c.speed - 1) <= a.speed
        assert len(c.eq) <= a.eq_bands
        assert all(60 <= hz <= 12_000 and abs(db) <= a.eq_db for _, hz, db in c.eq)
        assert c.cutoff == 0 or a.band_low <= c.cutoff <= a.band_high
        assert c.level_db is None or a.level_low <= c.level_db <= a.level_high
        assert c.noise_db is None or a.noise_low <= c.noise_db <= a.noise_high
        assert a.gain_low <= c.gain_db <= 0
        assert 0 <= c.clip_db <= a.clip_db
        assert a.kbps_low <= c.codecs[0][1] <= a.kbps_high
    kbps = np.log([c.codecs[0][1] for c in chains])
    assert stats.kstest(kbps, stats.uniform(np.log(64), np.log(5)).cdf).pvalue > 1e-3


def test_even_and_odd_examples_draw_alike(chains):
    """Labels alternate with the example's number: that must not show in the changes."""
    for value in (
        lambda c: c.codecs[0][0],
        lambda c: c.stereo,
        lambda c: c.cutoff > 0,
        lambda c: bool(c.eq),
        lambda c: c.level_db is None,
    ):
        both = [[value(c) for c in chains[parity::2]] for parity in (0, 1)]
        table = [[half.count(v) for v in sorted(set(both[0]))] for half in both]
        assert stats.chi2_contingency(table).pvalue > 1e-3
    levels = [[c.level_db for c in chains[p::2] if c.level_db is not None] for p in (0, 1)]
    assert stats.ks_2samp(*levels).pvalue > 1e-3


def test_a_draw_is_a_function_of_its_generator():
    one, same, other = (Augment().draw(np.random.default_rng(s)) for s in (1, 1, 2))
    assert one == same != other
    x = music(9_000, 2)
    assert np.array_equal(one.apply(x), same.apply(x))


def test_nothing_can_be_asked_for():
    chain = Augment(**NOTHING).draw(np.random.default_rng(0))
    x = to_int16(music(5_000)).astype(np.float32) / np.float32(32768)
    assert np.array_equal(chain.apply(x)[0], x[:, 0])


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"eq_p": 1.5}, "eq_p"),
        ({"noise_p": -0.1}, "noise_p"),
        ({"level_low": 0.0}, "level_low"),
        ({"gain_low": 3.0}, "gain_low"),
        ({"kbps_low": 400.0}, "kbps_low"),
        ({"kbps_low": 0.0}, "kbps_low"),
        ({"band_low": 100.0}, "band_low"),
        ({"band_high": 30_000.0}, "band_high"),
        ({"stereo_p": 0.9}, "stereo_p"),
        ({"mp3": -1.0}, "mp3"),
        ({k: 0.0 for k in (*CODECS, "vorbis")}, "wav"),
        ({"speed": 0.7}, "speed"),
        ({"eq_bands": 0}, "eq_bands"),
    ],
)
def test_settings_that_make_no_sense_are_named(setting, named):
    with pytest.raises(ValueError, match=rf"augment\..*{named}"):
        Augment(**setting)
