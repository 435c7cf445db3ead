"""Decoder fingerprints: exact sums, speeds, traps that no decoder laid, damaged banks, learning."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json

import numpy as np
import pytest
import soundfile
import soxr

from artifactnet_jax import decoder_learning as learning
from artifactnet_jax import decoder_null, decoders
from artifactnet_jax import fingerprint as fp
from made_decoder import RATE, SECONDS, coloured, combed

TIME = np.arange(SECONDS * RATE) / RATE


def spectrum(audio: np.ndarray, block: int = 1 << 30) -> fp.Accumulator:
    out = fp.Accumulator()
    for start in range(0, len(audio), block):
        out.add(audio[start : start + block])
    return out


# -- the accumulator ---------------------------------------------------------------------------


def test_sums_are_those_of_every_frame():
    audio = coloured(0, 3)
    got = spectrum(audio)
    frames = 1 + (len(audio) - fp.FRAME) // fp.HOP
    window = np.hanning(fp.FRAME + 1)[:-1]
    power = 0.0
    logs = 0.0
    for n in range(frames):
        part = audio[n * fp.HOP :][: fp.FRAME].astype(float)
        bins = np.abs(np.fft.rfft(part * window)) ** 2 / np.square(window).sum()
        power = power + bins[fp.FIRST : fp.LAST]
        logs = logs + np.log(bins[fp.FIRST : fp.LAST] + 1e-12)
    [mean] = got.windows
    assert mean.frames == got.frames == frames
    np.testing.assert_allclose(mean.power, power, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(mean.log, logs, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("block", [1, 997, fp.HOP, fp.FRAME, 44_100, 100_003])
def test_sums_are_bit_equal_whatever_the_blocks(block):
    audio = coloured(1, 2 if block == 1 else SECONDS)
    whole, parts = spectrum(audio), spectrum(audio, block)
    assert len(whole.windows) == len(parts.windows)
    for a, b in zip(whole.windows, parts.windows, strict=True):
        assert a.frames == b.frames
        assert a.log.tobytes() == b.log.tobytes()
        assert a.power.tobytes() == b.power.tobytes()


def test_memory_is_constant_and_merged_windows_keep_the_sums():
    audio = coloured(2)
    few, many = fp.Accumulator(4, 4), fp.Accumulator(4, 1000)
    few.add(audio)
    many.add(audio)
    assert len(few.windows) <= 4
    assert few.window_frames == 32  # 128 frames
    merged = sum(many.windows[8:16], fp.Mean())
    np.testing.assert_allclose(few.windows[1].power, merged.power, rtol=1e-12)
    assert sum(w.frames for w in few.windows) == sum(w.frames for w in many.windows)


def test_silent_frames_are_left_out():
    audio = coloured(3, 8)
    gap = np.concatenate([audio, np.zeros(8 * RATE, np.float32)])
    total = sum(spectrum(gap).windows, fp.Mean())
    assert total.frames == pytest.approx(spectrum(audio).frames, abs=2)


@pytest.mark.parametrize("end", [6_000, 11_000, 16_000])
def test_the_end_of_the_band_is_seen(end):
    audio = coloured(4, 8)
    bins = np.fft.rfft(audio)
    bins[round(end * 8) :] = 0
    levels = sum(spectrum(np.fft.irfft(bins, len(audio))).windows, fp.Mean()).levels()
    assert fp.band_end(levels[1]) == pytest.approx(end, abs=400)
    whole = sum(spectrum(audio).windows, fp.Mean()).levels()
    assert fp.band_end(whole[1]) == RATE / 2


def test_residuals_of_many_are_those_of_each():
    parts = [coloured(40, 4), coloured(41, 4), tones([6000.0], 0.02)[: 4 * RATE]]
    levels = [sum(spectrum(part).windows, fp.Mean()).levels() for part in parts]
    many = fp.residuals_of(levels)
    assert many.shape == (3, 4, fp.LAST - fp.FIRST)
    for got, one in zip(many, levels, strict=True):
        assert got.tobytes() == fp.residuals(one).tobytes()


# -- what no decoder laid ----------------------------------------------------------------------


def through_mp3(audio: np.ndarray, rate: int) -> np.ndarray:
    """Through an MP3 file of that rate, and back to 44.1 kHz."""
    file = io.BytesIO()
    soundfile.write(file, soxr.resample(audio, RATE, rate), rate, format="MP3")
    decoded, _ = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")
    return np.asarray(soxr.resample(decoded, rate, RATE), np.float32)


def low_passed(end: float) -> np.ndarray:
    audio = coloured(12)
    bins = np.fft.rfft(audio)
    bins[round(end * SECONDS) :] = 0
    return np.fft.irfft(bins, len(audio)).astype(np.float32)


def held(rate: int) -> np.ndarray:
    """A resampler without a filter: each sample of the lower rate is held."""
    low = soxr.resample(coloured(13), RATE, rate)
    return low[np.minimum((TIME * rate).astype(int), len(low) - 1)]


def interpolated(rate: int) -> np.ndarray:
    low = soxr.resample(coloured(14), RATE, rate)
    return np.interp(TIME, np.arange(len(low)) / rate, low).astype(np.float32)


def tones(hz: list[float], level: float, seed: int = 15) -> np.ndarray:
    audio = sum(np.sin(2 * np.pi * f * TIME + f) for f in hz) * level
    return (audio + coloured(seed)).astype(np.float32)


def tempered(seed: int, level: float) -> np.ndarray:
    """Notes of the tempered scale with overtones, four a second, all below 4 kHz."""
    rng = np.random.default_rng(seed)
    audio = coloured(seed, rms=0.02)
    for start in range(0, len(audio), RATE // 4):
        for note in rng.integers(40, 88, 3):
            f = 440 * 2 ** ((note - 69) / 12)
            for k in range(1, int(4000 / f) + 1):
                part = slice(start, start + RATE // 4)
                audio[part] += level / k * np.sin(2 * np.pi * f * k * TIME[part])
    return audio.astype(np.float32)


def squares(hz: list[float], noise: float, seconds: float = 0.15) -> np.ndarray:
    """A chiptune: square waves one after the other, over and over."""
    notes = np.array(hz)[(TIME / seconds).astype(int) % len(hz)]
    phase = np.cumsum(notes) / RATE
    return (0.2 * np.sign(np.sin(2 * np.pi * phase)) + coloured(16, rms=noise)).astype(np.float32)


def clicks(rate: float, noise: float) -> np.ndarray:
    """Clicks at a rate in Hz, to the sample."""
    audio = coloured(17, rms=noise)
    audio[np.rint(np.arange(0, len(audio) - 1, RATE / rate)).astype(int)] += 0.8
    return audio


TRAPS = {
    **{f"noise {n}": (lambda n=n: coloured(20 + n)) for n in range(4)},
    **{
        f"MP3 at {rate} Hz": (lambda rate=rate: through_mp3(coloured(11), rate))
        for rate in (32_000, 44_100, 48_000)
    },
    **{
        f"low-pass at {end} Hz": (lambda end=end: low_passed(end))
        for end in (8_100, 11_000, 15_500, 16_000, 19_000)
    },
    **{
        f"held at {rate} Hz": (lambda rate=rate: held(rate))
        for rate in (8_000, 11_025, 16_000, 22_050, 32_000)
    },
    **{
        f"interpolated from {rate} Hz": (lambda rate=rate: interpolated(rate))
        for rate in (11_025, 16_000, 22_050)
    },
    **{
        f"tempered scale {level}": (lambda level=level: tempered(18, level))
        for level in (0.02, 0.1)
    },
    **{
        f"hum at {hz} Hz": (lambda hz=hz: tones([hz * k for k in range(1, 20_000 // hz)], 0.0005))
        for hz in (50, 60)
    },
    **{
        f"whistle at {hz} Hz": (lambda hz=hz, level=level: tones([hz], level))
        for hz, level in ((15_625, 0.01), (15_734, 0.001), (19_000, 0.02))
    },
    **{
        f"steady tone of {hz} Hz, {level}": (
            lambda hz=hz, level=level: tones([hz * k for k in range(1, int(20_000 / hz))], level)
        )
        for hz in (196.0, 200.0, 440.0, 689.0625)
        for level in (0.0002, 0.001, 0.02)
    },
    **{
        f"chiptune, noise {noise}": (
            lambda noise=noise: squares([220, 261.63, 329.63, 440, 196, 200, 392, 523.25], noise)
        )
        for noise in (0.0, 0.001, 0.02)
    },
    **{
        f"drone of {hz} Hz squares": (lambda hz=hz: squares([hz], 0.005))
        for hz in (100.0, 196.0, 200.0, 345.0)
    },
    **{
        f"{rate} clicks a second, noise {noise}": (
            lambda rate=rate, noise=noise: clicks(rate, noise)
        )
        for rate in (2, 4, 8, 16, 25, 50)
        for noise in (0.0, 0.003, 0.03)
    },
}


@pytest.fixture(scope="module")
def bank() -> decoders.Bank:
    return decoders.load()


@pytest.mark.parametrize("name", TRAPS)
def test_what_no_decoder_laid_is_no_match(bank, name):
    outcome = decoders.match(spectrum(TRAPS[name]()), bank)
    assert outcome.match is None, (name, outcome.match)
    assert outcome.reason


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (coloured(5, 2), "too short"),
        (np.zeros(RATE * 10, np.float32), "silent"),
        (np.sin(TIME * 2 * np.pi * 500).astype(np.float32), ""),
    ],
)
def test_what_cannot_be_judged_has_a_reason(bank, audio, reason):
    outcome = decoders.match(spectrum(audio), bank)
    assert outcome.match is None
    assert reason in outcome.reason


def test_a_band_that_ends_below_4_khz_has_a_reason(bank):
    outcome = decoders.match(spectrum(low_passed(3_900)), bank)
    assert outcome.match is None
    assert outcome.nearest is None
    assert outcome.reason


# -- banks -------------------------------------------------------------------------------------


def test_the_embedded_bank_is_small_and_says_what_it_holds(bank):
    size = len(
        decoders.resources.files("artifactnet_jax")
        .joinpath("assets", decoders.DEFAULT)
        .read_bytes()
    )
    assert size < 1_000_000
    assert len(bank.decoders) >= 20
    assert len(bank.digest) == 64
    for decoder in bank.decoders:
        assert decoder.tracks >= 3
        assert decoder.repositories
        assert decoder.stability >= 0.5
        assert len(decoder.repositories) > 1 or decoder.note


def test_a_saved_bank_is_read_as_it_was(bank, tmp_path):
    digest = decoders.save(bank, tmp_path / "b.npz")
    again = decoders.load(tmp_path / "b.npz")
    assert again.digest == digest
    assert again.decoders == bank.decoders
    np.testing.assert_allclose(again.lines, bank.lines, atol=0.02 * np.abs(bank.lines).max())
    for name, array in bank.nulls.items():
        np.testing.assert_array_equal(again.nulls[name], array)


def rewritten(bank, tmp_path, change) -> str:
    """A saved bank whose members `change` alters, header as a dict; the path."""
    path = tmp_path / "b.npz"
    decoders.save(bank, path)
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    header = change(header, arrays) or header
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(path, header=text, **arrays)
    return str(path)


def _nan(header, arrays):
    arrays["tail"][0, 0, 0, 0] = np.nan
    header["digest"] = decoders._digest(header, arrays)


def _flipped(header, arrays):
    arrays["lines"][0, 0, 0] += 1


def _missing(header, arrays):
    del arrays["weights"]
    header["digest"] = decoders._digest(header, arrays)


def _misshapen(header, arrays):
    arrays["offset"] = arrays["offset"][:, :1]
    header["digest"] = decoders._digest(header, arrays)


def _version(header, arrays):
    return {**header, "format": "artifactnet-jax/decoders/9"}


def _empty(header, arrays):
    return {**header, "decoders": []}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        *((_nan, "finite"), (_flipped, "digest"), (_missing, "damaged"), (_misshapen, "shape")),
        *((_version, "decoders/9"), (_empty, "damaged")),
    ],
)
def test_a_damaged_bank_is_refused_in_one_line(bank, tmp_path, change, word):
    path = rewritten(bank, tmp_path, change)
    with pytest.raises(decoders.BankError, match=word) as error:
        decoders.load(path)
    assert "b.npz" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x93NUMPY", b"hello" * 100])
def test_what_is_no_bank_is_refused_in_one_line(tmp_path, data):
    (tmp_path / "b.npz").write_bytes(data)
    with pytest.raises(decoders.BankError) as error:
        decoders.load(tmp_path / "b.npz")
    assert "b.npz" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(decoders.BankError, match="check the path"):
        decoders.load(tmp_path / "none.npz")


# -- learning ----------------------------------------------------------------------------------


def track(group: str, audio: np.ndarray) -> learning.Track:
    digest = hashlib.sha256(audio.tobytes()).hexdigest()
    return learning.Track(group, digest, spectrum(audio))


@pytest.fixture(scope="module")
def pages() -> list[learning.Track]:
    """Twelve tracks of a made-up decoder, on three pages."""
    return [track(f"page {n % 3}", combed(100 + n, 173.0)) for n in range(12)]


@pytest.fixture(scope="module")
def learned(bank, pages) -> learning.Learned:
    return learning.learn("Made up", pages, bank)


@pytest.fixture(scope="module")
def wider(learned, bank) -> decoders.Bank:
    return decoders.join(bank, learned.bank)


def test_a_decoder_is_learnt_and_named(learned, bank, wider):
    assert learned.shared == learning.Rate(12, 12)
    assert (learned.tracks, learned.parts) == (12, 3)
    assert learned.already == {}
    assert [d.name for d in learned.bank.decoders] == ["Made up"]
    assert wider.decoders == (*bank.decoders, *learned.bank.decoders)
    assert decoders.join(wider, bank, bank).decoders[: len(wider.decoders)] == wider.decoders
    before, after = learned.false_alarms
    assert (before.n, after.n) == (len(bank.ends), len(bank.ends))
    assert after.hits <= before.hits + 1
    assert learned.asked == (len(bank.decoders), len(bank.decoders) + 1)
    found = decoders.match(spectrum(combed(500, 173.0)), wider).match
    assert found is not None
    assert found.name == "Made up"
    assert found.speed == 1
    assert found.p < 1e-3
    assert found.windows
    assert found.windows[0].z > 3
    assert decoders.match(spectrum(coloured(501)), wider).match is None


@pytest.mark.parametrize("speed", [0.93, 0.99, 1.01, 1.04])
def test_a_change_of_speed_is_found_and_stated(wider, speed):
    found = decoders.match(spectrum(combed(502, 173.0, speed)), wider).match
    assert found is not None
    assert found.name == "Made up"
    assert found.speed == pytest.approx(speed, abs=4e-4)


def test_too_few_tracks_and_strangers_are_refused(bank):
    few = [track("a", combed(n, 173.0, seconds=8)) for n in range(9)]
    few += [track("a", coloured(20, 2)), track("a", low_passed(7_000))]
    with pytest.raises(learning.LearningError, match=r"9 tracks can be judged, 10 are needed"):
        learning.learn("Few", few, bank)
    strangers = [track("a", coloured(600 + n, 8)) for n in range(10)]
    with pytest.raises(learning.LearningError, match="share no decoder"):
        learning.learn("Strangers", strangers, bank)
    with pytest.raises(learning.LearningError, match="no real music"):
        learning.learn("Alone", few, dataclasses.replace(bank, ends=np.zeros(0)))


def test_a_decoder_that_is_there_already_is_said_so(wider):
    tracks = [track("b", combed(700 + n, 173.0)) for n in range(10)]
    again = learning.learn("Another name", tracks, wider)
    assert again.already["Made up"].share >= 0.9
    assert again.parts == 2


def test_a_track_is_judged_without_what_was_learnt_from_it(wider, learned, bank, pages):
    """The others of its page go with it, and the decoder that takes their place is named alike."""
    asked, lost = learning.unseen(wider, "elsewhere", pages[4].digest)
    assert lost == ()
    assert sorted(d.name for d in asked.decoders) == sorted(d.name for d in wider.decoders)
    [part] = [d for d in asked.decoders if d.name == "Made up"]
    page = {one.digest for one in pages if one.group == "page 1"}
    assert set(part.without) == page
    assert part.repositories == ("page 0", "page 2")
    assert part.tracks == 8
    # Its lines are those that the other pages give.
    others = learning.learn("Others", [one for one in pages if one.digest not in page] * 2, bank)
    k = asked.decoders.index(part)
    np.testing.assert_allclose(asked.lines[k], others.bank.lines[0], atol=1e-5)
    assert len(asked.decoders) == len(wider.decoders)
    assert decoders.match(pages[4].spectrum, asked).match.name == "Made up"
    # By the name of the page too; and what has no such part is not asked.
    [also] = [d for d in learning.unseen(wider, "page 1", "")[0].decoders if d.name == "Made up"]
    assert also == part
    bare = dataclasses.replace(learned.bank, left_out=None)
    assert learning.unseen(bare, "page 1", "") == (None, ("Made up",))
    assert learning.unseen(wider, "elsewhere", "") == (wider, ())


def test_parts_left_out_are_saved_with_a_bank(learned, bank, tmp_path):
    both = decoders.join(bank, learned.bank)
    decoders.save(both, tmp_path / "b.npz")
    again = decoders.load(tmp_path / "b.npz")
    assert again.left_out.decoders == learned.bank.left_out.decoders
    assert [len(part.without) for part in again.left_out.decoders] == [4, 4, 4]
    for name, array in learned.bank.left_out.nulls.items():
        np.testing.assert_array_equal(again.left_out.nulls[name], array)
    assert again.only(range(len(bank.decoders))).left_out is None


def test_many_groups_are_left_out_in_eight_parts(bank):
    tracks = [track(f"{n}", combed(300 + n, 173.0, seconds=5)) for n in range(11)]
    learned = learning.learn("Made up", tracks, bank)
    sizes = [len(part.without) for part in learned.bank.left_out.decoders]
    assert sorted(sizes) == [1, 1, 1, 1, 1, 2, 2, 2]


def test_intervals_are_wilsons():
    # Worked by hand: 8 of 10, z = 1.96 -> (0.8 + 0.19208) / 1.38416 +- 0.22613
    low, high = learning.Rate(10, 8).interval
    assert low == pytest.approx(0.4902, abs=1e-3)
    assert high == pytest.approx(0.9433, abs=1e-3)
    assert learning.Rate(0, 0).interval == (0, 1)


# -- the tail ----------------------------------------------------------------------------------


def test_the_tail_of_known_distributions():
    rng = np.random.default_rng(0)
    one = np.full(4000, 1 / 4000)
    normal = decoder_null.tail(rng.normal(size=4000), one, decoder_null.COMMON)
    assert 2e-4 < decoders.beyond(3.09, normal) < 3e-3  # 1e-3 in truth
    exponential = decoder_null.tail(rng.exponential(size=4000), one, decoder_null.COMMON)
    assert 2e-4 < decoders.beyond(6.9, exponential) < 4e-3
    assert decoders.beyond(-1.0, normal) == 1


def test_a_tail_of_few_tracks_is_not_wild():
    """Of 40 tracks four lie above the 90 % point: by themselves they give any tail."""
    rng = np.random.default_rng(4)
    one = np.full(40, 1 / 40)
    at = [
        float(
            decoders.beyond(3.09, decoder_null.tail(rng.normal(size=40), one, decoder_null.COMMON))
        )
        for _ in range(50)
    ]
    assert 3e-4 < np.median(at) < 6e-3  # 1e-3 in truth; the common tail is heavier
    assert min(at) > 1e-5


def test_products_at_lag_0_are_inner_products():
    rng = np.random.default_rng(3)
    grid = rng.normal(size=(2, 4, fp.GRID)).astype(np.float32)
    template = rng.normal(size=(2, fp.GRID)).astype(np.float32)
    weights = np.array([0.5, 0.2, 1.0, 0.0])
    inside = (fp.LOW_HZ <= fp.GRID_AXIS) & (fp.GRID_AXIS < 11_000)
    expected = np.zeros(2)
    for n in range(2):
        for c in range(4):
            row = fp.in_band(grid[n, c], fp.LOW_HZ, 11_000)
            lines = template[c // 2] / np.linalg.norm(template[c // 2][inside])
            expected[n] += weights[c] * (row * lines).sum()
    moved = decoders.track_transform(grid, 11_000)
    got = decoders.products(moved, decoders.transform(template, 11_000), weights)
    np.testing.assert_allclose(got[:, decoders.LAGS == 0][:, 0], expected, atol=1e-5)
    four = decoders.at_speed_one(moved, decoders.transform(template, 11_000))
    np.testing.assert_allclose(four @ weights, expected, atol=1e-5)


def test_a_decoder_of_another_name_that_is_as_good_is_a_rival(wider):
    twice = dataclasses.replace(wider.decoders[-1], name="Its twin")
    count = len(wider.decoders)
    both = wider.only([*range(count), count - 1])
    both = dataclasses.replace(both, decoders=(*wider.decoders, twice))
    found = decoders.match(spectrum(combed(900, 173.0)), both).match
    assert {found.name, *found.rivals} == {"Made up", "Its twin"}
