"""Decoded-audio cache, sampling, crops and batches."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
from scipy import stats

pytest.importorskip("av")
pytest.importorskip("grain")

from artifactnet_jax.audio import SegmentReader
from artifactnet_jax.config import Config
from artifactnet_jax.data import decoded, records
from artifactnet_jax.data.augment import CODECS, RATE, Augment, encode_decode, to_int16
from artifactnet_jax.data.decoded import AudioCache, prepare
from artifactnet_jax.data.manifest import Row
from artifactnet_jax.data.records import Examples, FixedExamples, batches
from artifactnet_jax.recording import AudioError
from artifactnet_jax.results import Failure
from artifactnet_jax.text import CommandError
from audio_files import noise, write

SAMPLES = 8_192


def row(path: Path | str, label: int = 0, source: str = "s", **more: Any) -> Row:
    kind = "ai" if label else "real"
    return Row(str(path), label, kind, source, "", os.path.basename(path), "train", **more)


@pytest.fixture
def cache(tmp_path) -> AudioCache:
    return AudioCache(tmp_path / "cache")


@pytest.fixture
def rows(tmp_path) -> list[Row]:
    """Two real and two AI recordings of 0.6 s; one of each is stereo."""
    made = []
    for k in range(4):
        path = write(tmp_path, f"{k}.wav", noise(0.6, channels=1 + k % 2, seed=k))
        made.append(row(path, label=k // 2, source=f"s{k}"))
    return made


def count_up(folder: Path, name: str = "up.wav", n: int = 30_000) -> Path:
    """A recording whose sample number k holds the value k (from -15000), mono."""
    return write(folder, name, np.arange(-n // 2, n // 2, dtype=np.int16)[:, None])


def first_values(item: dict[str, np.ndarray]) -> np.ndarray:
    """The samples of such a recording's crop."""
    return np.rint(item["audio"][0] * 32768).astype(int)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# --- cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
def test_16_bit_audio_at_the_right_rate_is_kept_bit_for_bit(tmp_path, cache, channels):
    pcm = noise(1.5, channels=channels)
    audio = cache.get(write(tmp_path, "a.wav", pcm))
    assert (audio.dtype, audio.shape) == (np.int16, pcm.shape)
    assert np.array_equal(audio, pcm)
    assert not audio.flags.writeable


def test_other_rates_are_resampled_channel_by_channel(tmp_path, cache):
    pcm = noise(1.0, 8_000, channels=2)
    audio = cache.get(write(tmp_path, "a.wav", pcm, rate=8_000))
    whole = soxr.resample(pcm / np.float32(32768), 8_000, RATE, "HQ")
    assert audio.shape == (44_100, 2)
    assert np.abs(audio - 32768 * whole.clip(-1, 1)).max() <= 0.51


def test_eight_channels_become_their_mean(tmp_path, cache):
    pcm = noise(0.5, channels=8)
    audio = cache.get(write(tmp_path, "a.wav", pcm))
    assert audio.shape == (len(pcm), 1)
    assert np.abs(audio[:, 0] - pcm.mean(axis=1)).max() <= 0.51


@pytest.mark.parametrize(
    ("name", "rate"), [("a.ogg", 44_100), ("a.m4a", 48_000), ("a.mp3", 32_000)]
)
def test_the_mix_of_what_is_kept_is_what_is_scored(tmp_path, cache, name, rate):
    path = write(tmp_path, name, noise(1.0, rate), rate=rate)
    config = Config.edge()
    scored = next(iter(SegmentReader(path, config.front_end, config.verdict))).samples
    audio = cache.get(path)
    n = min(len(audio), len(scored))
    assert len(audio) > 0.9 * RATE
    assert np.abs(audio[:n].mean(axis=1) / 32768 - scored[:n]).max() < 1.2 / 32768


def test_a_recording_is_decoded_once(tmp_path, cache, monkeypatch):
    path = write(tmp_path, "a.wav", noise(0.2))
    first = np.array(cache.get(path))
    monkeypatch.setattr(decoded, "open_audio", lambda path: pytest.fail("decoded again"))
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(AudioCache(tmp_path / "cache").get("a.wav"), first)


def test_a_changed_recording_is_decoded_again(tmp_path, cache):
    path = write(tmp_path, "a.wav", noise(0.2, seed=1))
    cache.get(path)
    os.utime(write(tmp_path, "a.wav", noise(0.2, seed=2)), ns=(1, 1))
    assert np.array_equal(cache.get(path), noise(0.2, seed=2))


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "other"])
def test_a_damaged_entry_is_made_anew(tmp_path, cache, damage):
    path = write(tmp_path, "a.wav", noise(0.2))
    cache.get(path)
    (entry,) = Path(cache.folder).glob("*.npy")
    content = {
        "cut": entry.read_bytes()[:-100],
        "garbage": b"garbage" * 1_000,
        "empty": b"",
    }
    if damage == "other":
        np.save(entry, np.zeros(5))
    else:
        entry.write_bytes(content[damage])
    assert np.array_equal(cache.get(path), noise(0.2))


def test_the_folder_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = Path(AudioCache().folder)
    assert folder == tmp_path / "xdg" / "artifactnet-jax" / "audio"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_several_at_once(tmp_path, cache):
    path = write(tmp_path, "a.flac", noise(2.0))
    found: list[np.ndarray] = []
    others = [AudioCache(cache.folder) for _ in range(4)]
    threads = [threading.Thread(target=lambda c=c: found.append(c.get(path))) for c in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(audio, noise(2.0)) for audio in found)
    assert len(os.listdir(cache.folder)) == 1


def test_a_failure_leaves_nothing_behind(tmp_path, cache):
    path = write(tmp_path, "cut.flac", noise(2.0))
    path.write_bytes(path.read_bytes()[:-40_000])
    with pytest.raises(AudioError, match=r"cut\.flac: .*(damaged|declared length)"):
        cache.get(path)
    path = write(tmp_path, "cut.wav", noise(2.0))
    path.write_bytes(path.read_bytes()[:-40_000])
    with pytest.raises(AudioError, match=r"cut\.wav: 0\.2 s of the declared length"):
        cache.get(path)
    with pytest.raises(AudioError, match=r"gone\.wav: no such file"):
        cache.get(tmp_path / "gone.wav")
    with pytest.raises(AudioError, match=r"folder"):
        cache.get(tmp_path)
    assert os.listdir(cache.folder) == []


def test_audio_that_is_not_finite_is_refused(tmp_path, cache):
    import soundfile

    samples = np.zeros(5_000, np.float32)
    samples[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, RATE, "FLOAT")
    with pytest.raises(AudioError, match=r"nan\.wav: 1 samples are NaN"):
        cache.get(tmp_path / "nan.wav")


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "disk is full"), (errno.EIO, "error")])
def test_a_full_disk_ends_the_command(tmp_path, cache, monkeypatch, number, said):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    path = write(tmp_path, "a.wav", noise(0.2))
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CommandError, match=rf"{cache.folder}.*{said}.*--cache"):
        cache.get(path)
    assert os.listdir(cache.folder) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match=r"file.*--cache"):
        AudioCache(tmp_path / "file")


# --- prepare ---------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path, rows) -> list[Row]:
    """The good rows with bad ones among them."""
    (tmp_path / "text.mp3").write_text("not audio")
    bad = [
        row(tmp_path / "text.mp3"),
        row(tmp_path / "gone.wav"),
        row(write(tmp_path, "short.wav", noise(0.05))),
        row(write(tmp_path, "silent.wav", np.zeros((9_000, 2), np.int16))),
    ]
    return [bad[0], *rows[:2], *bad[1:], *rows[2:]]


@pytest.mark.parametrize("jobs", [1, 3])
def test_bad_rows_are_told_of_and_left_out(cache, mixed, rows, jobs):
    told: list[Row | Failure] = []
    good, failures = prepare(mixed, cache, max_bad=0.5, jobs=jobs, tell=told.append)
    assert good == rows
    assert [f.kind for f in failures] == ["unsupported", "not-found", "short", "silent"]
    assert all(f.message.startswith(f"{f.path}: ") for f in failures)
    assert Counter(map(type, told)) == {Row: 4, Failure: 4}


def test_too_many_bad_rows_end_it(cache, mixed):
    with pytest.raises(CommandError, match=r"0\.4 of the 8 rows.*gone\.wav") as caught:
        prepare(mixed, cache, max_bad=0.4, jobs=1)
    assert "\n" not in str(caught.value)
    prepare([mixed[1]], cache, max_bad=0.0, jobs=1)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (None, "has no residual"),
        ("missing", "missing or damaged"),
        (np.zeros(100, np.float32), r"float32 \[100\], not float \[26460\]"),
        (np.zeros(26_460, np.float64), "float64"),
        (np.zeros((26_460, 1), np.float32), r"\[26460, 1\]"),
    ],
)
def test_rows_without_a_fitting_residual_are_bad(tmp_path, cache, rows, made, said):
    name = "" if made is None else str(tmp_path / "r.npy")
    if isinstance(made, np.ndarray):
        np.save(name, made)
    np.save(tmp_path / "good.npy", np.zeros(26_460, np.float16))
    pair = [
        dataclasses.replace(rows[0], residual=name),
        dataclasses.replace(rows[1], residual=str(tmp_path / "good.npy")),
    ]
    good, failures = prepare(pair, cache, max_bad=0.5, jobs=1, residual=True)
    assert good == pair[1:]
    assert failures[0].kind == "residual"
    with pytest.raises(CommandError, match=said):
        prepare(pair, cache, max_bad=0.0, jobs=1, residual=True)


# --- examples --------------------------------------------------------------------------------


def examples(rows, cache, **settings) -> Examples:
    return Examples(rows, cache, **{"samples": SAMPLES, "seed": 1, "augment": None, **settings})


def test_items(rows, cache):
    made = examples(rows, cache)
    for i in range(6):
        item = made[i]
        assert {k: (v.dtype, v.shape) for k, v in item.items()} == {
            "audio": (np.float32, (1, SAMPLES)),
            "label": (np.float32, ()),
            "row": (np.int32, ()),
        }
        assert item["label"] == i % 2 == rows[item["row"]].label


@pytest.mark.parametrize(
    "settings",
    [{}, {"augment": Augment()}, {"versions": CODECS}, {"draws": 2, "augment": Augment()}],
)
def test_an_example_depends_on_its_number_alone(rows, cache, settings):
    one, other = examples(rows, cache, **settings), examples(rows, cache, **settings)
    late = [one[i] for i in (5, 2, 11)]
    assert all(same(a, other[i]) for a, i in zip(late, (5, 2, 11), strict=True))
    assert not np.array_equal(one[3]["audio"], one[5]["audio"])
    assert not np.array_equal(
        examples(rows, cache, seed=2, **settings)[5]["audio"], late[0]["audio"]
    )


def test_crops_are_contiguous_and_come_from_everywhere(tmp_path, cache):
    made = examples([row(count_up(tmp_path))], cache)
    starts = []
    for i in range(300):
        values = first_values(made[i])
        assert np.array_equal(values, np.arange(values[0], values[0] + SAMPLES))
        starts.append((values[0] + 15_000) / (30_000 - SAMPLES))
    assert min(starts) >= 0
    assert max(starts) <= 1
    assert stats.kstest(starts, "uniform").pvalue > 1e-3


def test_stereo_is_mixed(tmp_path, cache):
    pcm = noise(0.3)
    made = examples([row(write(tmp_path, "a.wav", pcm))], cache, samples=len(pcm))
    np.testing.assert_allclose(made[0]["audio"][0], pcm.mean(axis=1) / 32768, atol=1e-7)


def test_a_short_recording_is_followed_by_zeros(tmp_path, cache):
    pcm = noise(0.15, channels=1)
    short = [row(write(tmp_path, "a.wav", pcm))]
    audio = examples(short, cache)[0]["audio"][0]
    assert np.array_equal(audio[: len(pcm)], pcm[:, 0] / np.float32(32768))
    assert not audio[len(pcm) :].any()
    for i in range(10):
        audio = examples(short, cache, augment=Augment(), versions=CODECS)[i]["audio"]
        assert not audio[:, int(1.04 * len(pcm)) :].any()
        assert np.isfinite(audio).all()


def test_silence_is_avoided(tmp_path, cache):
    pcm = np.zeros((RATE, 1), np.int16)
    pcm[-RATE // 3 :] = noise(1 / 3, channels=1)
    made = examples([row(write(tmp_path, "a.wav", pcm))], cache, samples=2_000)
    silent = sum(not made[i]["audio"].any() for i in range(200))
    assert silent < 15  # two thirds to the power of 8 draws: 4 % of 200 are 8


def test_sources_count_by_the_root_of_their_size_and_rows_by_weight(tmp_path, cache):
    path = write(tmp_path, "a.wav", noise(0.2))
    links = [tmp_path / f"{k}.wav" for k in range(15)]
    for link in links:
        link.symlink_to(path)
    rows = [row(link, source="big") for link in links[:9]]
    rows += [row(links[9], source="small"), *(row(link, 1, source="ai") for link in links[10:])]
    rows[0] = dataclasses.replace(rows[0], weight=4.0)
    made = examples(rows, cache, samples=64)
    picked = Counter(int(made[i]["row"]) for i in range(3_000))
    # sqrt(9) : sqrt(1); within the big source 4 : 1 : 1 ... of 12.
    big = 3 / 4 / 12
    expected = np.array([4 * big, *[big] * 8, 1 / 4, *[1 / 5] * 5]) * 1_500
    found = np.array([picked[k] for k in range(15)])
    assert stats.chisquare(found, expected).pvalue > 1e-3


def test_the_label_has_no_part_in_the_changes(rows, cache):
    swapped = [dataclasses.replace(r, label=1 - r.label) for r in rows]
    a, b = (examples(r, cache, augment=Augment()) for r in (rows, swapped))
    assert [a.chain(i) for i in range(50)] == [b.chain(i) for i in range(50)]
    # Fixed draws are known by their file: the same ones, now under the other label.
    a, b = (examples(r, cache, augment=Augment(), draws=1) for r in (rows, swapped))
    for i in range(8):
        item = a[i]
        others = (b[j] for j in range(60))
        twin = next(other for other in others if other["row"] == item["row"])
        assert np.array_equal(item["audio"], twin["audio"])
        assert item["label"] != twin["label"]


def test_one_label_alone_is_all_there_is(rows, cache):
    made = examples(rows[:2], cache)
    assert [made[i]["label"] for i in range(4)] == [0, 0, 0, 0]


def test_mined_rows_are_cut_near_their_worst_segment(tmp_path, cache):
    path = count_up(tmp_path)
    mined = [row(path, extra=(("segment_start_s", "0.4"), ("score", "0.9")))]
    near = examples(mined, cache, near_p=1.0, samples=4_000)
    starts = np.array([first_values(near[i])[0] + 15_000 for i in range(100)])
    assert np.abs(starts - 0.4 * RATE).max() <= 2_000
    assert np.ptp(starts) > 3_000
    for start_s, place in (("99", 26_000), ("-3", 0)):
        mined = [row(path, extra=(("segment_start_s", start_s),))]
        item = examples(mined, cache, near_p=1.0, samples=4_000)[0]
        assert abs(first_values(item)[0] + 15_000 - place) <= 2_000
    with pytest.raises(CommandError, match=r"up\.wav: segment_start_s 'soon' is not a number"):
        examples([row(path, extra=(("segment_start_s", "soon"),))], cache)


# --- versions --------------------------------------------------------------------------------


def test_versions_are_one_crop_in_every_codec(rows, cache):
    plain = examples(rows, cache, versions=("wav", "wav"))
    made = examples(rows, cache, versions=CODECS, augment=None)
    for i in range(6):
        audio = made[i]["audio"]
        assert audio.shape == (4, SAMPLES)
        assert np.array_equal(audio[0], plain[i]["audio"][0])
        for lossy in audio[1:]:
            c = np.correlate(lossy, audio[0], "same")
            assert c.argmax() == SAMPLES // 2
            assert not np.array_equal(lossy, audio[0])
    kbps = [dict(made.chain(i).codecs) for i in range(40)]
    assert all(64 <= k[codec] <= 320 for k in kbps for codec in CODECS[1:])
    assert len({k["mp3"] for k in kbps}) > 20
    assert any(k["mp3"] != k["aac"] for k in kbps)


def test_a_crop_is_cut_from_a_codecs_running_output(tmp_path, cache):
    """A tenth of a second on either side is encoded along with it, where there is that much."""
    pcm = noise(0.6, channels=1)
    made = examples([row(write(tmp_path, "a.wav", pcm))], cache, versions=("wav", "mp3"))
    whole = pcm / np.float32(32768)
    for i in range(6):
        wav, mp3 = made[i]["audio"]
        start = int(np.correlate(whole[:, 0], wav, "valid").argmax())
        first = max(0, start - 4_410)
        kbps = dict(made.chain(i).codecs)["mp3"]
        around = encode_decode(whole[first : start + SAMPLES + 4_410], "mp3", kbps)[:, 0]
        assert np.array_equal(mp3, around[start - first :][:SAMPLES])


# --- fixed draws -----------------------------------------------------------------------------


@pytest.mark.parametrize("versions", [(), CODECS])
def test_fixed_draws_are_made_once(rows, cache, tmp_path, monkeypatch, versions):
    settings = {"augment": Augment(), "draws": 2, "versions": versions, "draw_cache": str(tmp_path)}
    made = examples(rows, cache, **settings)
    first = [made[i] for i in range(40)]
    assert {item["audio"].shape for item in first} == {(max(1, len(versions)), SAMPLES)}
    assert len({item["audio"].tobytes() for item in first}) == 2 * len(rows)
    monkeypatch.setattr(records.Chain, "apply", lambda *_: pytest.fail("made again"))
    again = examples(rows, cache, **settings)
    assert all(same(item, again[i]) for i, item in enumerate(first))


def test_fixed_draws_belong_to_their_settings(rows, cache, tmp_path):
    def audio(folder: str, **settings) -> bytes:
        both = {"augment": level, "draws": 1, "draw_cache": str(tmp_path / folder), **settings}
        return examples(rows[:1], cache, **both)[0]["audio"].tobytes()

    level = Augment(level_p=1.0, mp3=0.0, aac=0.0)
    changes = [
        {},
        {"seed": 2},
        {"augment": dataclasses.replace(level, level_low=-50.0)},
        {"augment": None},
        {"samples": 5_000},
        {"versions": ("mp3",)},
        {"versions": ("aac",)},
    ]
    fresh = [audio(f"own-{k}", **change) for k, change in enumerate(changes)]
    assert len(set(fresh)) == len(changes)
    assert [audio("shared", **change) for change in changes] == fresh


@pytest.mark.parametrize("damage", [b"", b"x" * 50, None])
def test_a_damaged_draw_is_made_anew(rows, cache, tmp_path, damage):
    settings = {"augment": Augment(), "draws": 1, "draw_cache": str(tmp_path / "draws")}
    first = [examples(rows, cache, **settings)[i] for i in range(12)]
    for file in (tmp_path / "draws").rglob("*.npy"):
        if damage is None:  # killed before it was there
            file.unlink()
        else:
            file.write_bytes(damage)
    made = examples(rows, cache, **settings)
    assert all(same(item, made[i]) for i, item in enumerate(first))


def test_fixed_draws_are_the_same_wherever_the_recording_lies(rows, cache, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    others = []
    for k, r in enumerate(rows):
        write(moved, f"{k}.wav", noise(0.6, channels=1 + k % 2, seed=k))
        others.append(dataclasses.replace(r, path=str(moved / f"{k}.wav")))
    a, b = (examples(r, cache, augment=Augment(), draws=2) for r in (rows, others))
    assert all(same(a[i], b[i]) for i in range(8))


def test_draws_lie_in_the_cache_by_default(rows, cache):
    _ = examples(rows, cache, augment=None, draws=1)[0]
    assert len(list(Path(cache.folder, "draws").rglob("*.npy"))) == 1


# --- residuals -------------------------------------------------------------------------------


@pytest.fixture
def with_residuals(rows, cache, tmp_path) -> list[Row]:
    """Residuals that are a third of the audio, one of them with 16 bits."""
    made = []
    for k, r in enumerate(rows):
        mono = cache.get(r.path).mean(axis=1) / 32768 / 3
        name = tmp_path / f"r{k}.npy"
        np.save(name, mono.astype(np.float16 if k == 1 else np.float32))
        made.append(dataclasses.replace(r, residual=str(name)))
    return made


@pytest.mark.parametrize("augment", [None, Augment(level_p=1.0)])
def test_residuals_are_cut_and_scaled_alike(with_residuals, cache, augment):
    rows, _ = prepare(with_residuals, cache, max_bad=0, jobs=1, residual=True)
    made = examples(rows, cache, residual=True, augment=augment)
    levels = []
    for i in range(16):
        item = made[i]
        assert item["audio"].shape == item["residual"].shape == (1, SAMPLES)
        assert item["audio"].dtype == item["residual"].dtype == np.float32
        np.testing.assert_allclose(3 * item["residual"], item["audio"], rtol=2e-3, atol=1e-5)
        levels.append(20 * np.log10(np.std(item["audio"])))
    assert (np.ptp(levels) > 8) == (augment is not None)


def test_short_residuals_are_padded(tmp_path, cache):
    path = write(tmp_path, "a.wav", noise(0.15, channels=1))
    np.save(tmp_path / "r.npy", (noise(0.15, channels=1)[:, 0] / 32768).astype(np.float32))
    item = examples([row(path, residual=str(tmp_path / "r.npy"))], cache, residual=True)[0]
    assert np.array_equal(item["audio"], item["residual"])
    assert not item["audio"][0, 6_615:].any()


def test_residuals_exclude_versions_and_draws(rows, cache):
    for settings in ({"versions": CODECS}, {"draws": 3}):
        with pytest.raises(ValueError, match="residuals"):
            examples(rows, cache, residual=True, **settings)


def test_a_residual_that_goes_is_named(with_residuals, cache):
    made = examples(with_residuals, cache, residual=True)
    for r in with_residuals:
        os.unlink(r.residual)
    with pytest.raises(CommandError, match=r"r\d\.npy: the residual is gone"):
        made[0]


def test_fixed_examples_have_residuals_too(with_residuals, cache):
    made = FixedExamples(with_residuals, cache, samples=SAMPLES, per_row=2, seed=0, residual=True)
    plain = FixedExamples(with_residuals, cache, samples=SAMPLES, per_row=2, seed=0)
    for item, other in zip(made, plain, strict=True):
        assert np.array_equal(item["audio"], other["audio"])
        np.testing.assert_allclose(3 * item["residual"], item["audio"], rtol=2e-3, atol=1e-5)


# --- recordings that change under a run ------------------------------------------------------


def test_a_recording_that_goes_is_still_in_the_cache(rows, cache):
    prepare(rows, cache, max_bad=0, jobs=1)
    made = examples(rows, cache)
    before = [made[i] for i in range(4)]
    for k, r in enumerate(rows):
        os.unlink(r.path) if k % 2 else write(Path(r.path).parent, f"{k}.wav", noise(0.2, seed=9))
    assert all(same(made[i], item) for i, item in enumerate(before))
    for file in Path(cache.folder).glob("*.npy"):
        file.unlink()
    with pytest.raises(CommandError, match=r"no such file.*start again"):
        [made[i] for i in range(8)]
    with pytest.raises(CommandError, match="no such file"):
        examples(rows, cache)


# --- fixed examples and batches --------------------------------------------------------------


@pytest.mark.parametrize("versions", [(), ("wav", "opus")])
def test_fixed_examples_are_the_same_each_time(rows, cache, versions, monkeypatch):
    settings = {"samples": SAMPLES, "per_row": 3, "seed": 1, "versions": versions}
    made = FixedExamples(rows, cache, **settings)
    items = list(made)
    assert len(items) == len(made) == 12
    assert [int(item["row"]) for item in items] == [k for k in range(4) for _ in range(3)]
    assert [float(item["label"]) for item in items] == [0.0] * 6 + [1.0] * 6
    assert {item["audio"].shape for item in items} == {(max(1, len(versions)), SAMPLES)}
    assert len({item["audio"].tobytes() for item in items}) == 12
    # Of other rows beside it a crop is independent.
    fewer = FixedExamples(rows[2:], cache, **settings)
    assert all(
        np.array_equal(a["audio"], b["audio"]) for a, b in zip(items[6:], fewer, strict=True)
    )
    if versions:
        monkeypatch.setattr(records.Chain, "apply", lambda *_: pytest.fail("made again"))
    assert all(same(a, b) for a, b in zip(items, made, strict=True))
    with pytest.raises(IndexError):
        made[12]


@pytest.mark.parametrize("settings", [{}, {"augment": Augment(), "versions": ("wav", "mp3")}])
def test_a_batch_is_the_same_for_any_start_and_any_number_of_workers(rows, cache, settings):
    def take(start: int, workers: int, count: int) -> list[dict[str, np.ndarray]]:
        stream = batches(examples(rows, cache, **settings), 4, start=start, workers=workers)
        found = [next(stream) for _ in range(count)]
        stream.close()
        return found

    made = examples(rows, cache, **settings)
    first = take(0, 1, 5)
    for k, batch in enumerate(first):
        expected = [made[4 * k + j] for j in range(4)]
        assert batch["audio"].shape == (4, len(settings.get("versions", "1")), SAMPLES)
        assert all(
            np.array_equal(batch[name], np.stack([e[name] for e in expected])) for name in batch
        )
        assert batch["label"].tolist() == [0, 1, 0, 1]
    for start, workers in ((0, 3), (2, 1), (3, 4)):
        found = take(start, workers, 5 - start)
        assert all(same(a, b) for a, b in zip(found, first[start:], strict=True))


def test_finite_examples_end(rows, cache):
    made = FixedExamples(rows, cache, samples=256, per_row=3, seed=0)
    found = list(batches(made, 5, workers=2))
    assert [len(batch["row"]) for batch in found] == [5, 5, 2]
    assert np.concatenate([batch["row"] for batch in found]).tolist() == sorted([0, 1, 2, 3] * 3)


def test_closing_ends_the_threads(rows, cache):
    before = set(threading.enumerate())
    stream = batches(examples(rows, cache), 2, workers=3)
    next(stream)
    mine = set(threading.enumerate()) - before
    assert mine
    stream.close()
    deadline = time.monotonic() + 20
    while any(thread.is_alive() for thread in mine) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in mine)


def test_what_goes_wrong_in_a_worker_reaches_the_caller(rows, cache):
    made = examples(rows, cache)
    for r in rows:
        os.unlink(r.path)
    stream = batches(made, 2, workers=2)
    with pytest.raises(CommandError, match=r"\.wav: no such file"):
        next(stream)


def test_draws_are_kept_in_16_bits(rows, cache):
    fresh = examples(rows[:1], cache, draws=1)
    audio = fresh[0]["audio"]
    assert np.array_equal(to_int16(audio) / np.float32(32768), audio)


def test_the_benchmark_runs(rows, tmp_path, capsys):
    from artifactnet_jax.bench import loader

    lines = [f"{Path(r.path).name},{r.label}" for r in rows]
    (tmp_path / "m.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    small = ["--crop", "0.2", "--seconds", "0.01", "--rounds", "1", "--workers", "1"]
    assert loader.main([str(tmp_path / "m.csv"), *small]) == 0
    results = json.loads(capsys.readouterr().out)
    assert set(results["loaders"]) == set(loader.SETTINGS)
    for found in results["loaders"].values():
        assert set(found) == {"workers 1"}
        assert found["workers 1"]["examples_per_s"] > 0
    assert len(results["codec_cpu_ms"]) == 10
