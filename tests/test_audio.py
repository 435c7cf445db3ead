"""Decoding, segment plans, warnings and errors, against soundfile, soxr and numpy."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from artifactnet_jax import recording
from artifactnet_jax.audio import AudioReport, Segment, SegmentReader
from artifactnet_jax.config import Decision, FrontEnd
from artifactnet_jax.files import find_audio
from artifactnet_jax.recording import AudioError
from audio_files import encode, noise, write

FE, VERDICT = FrontEnd(), Decision()
RATE, SIZE = FE.sample_rate, FE.segment_samples


def read(source: Any, plan: Any = "all", **options: Any) -> tuple[list[Segment], AudioReport]:
    reader = SegmentReader(source, FE, VERDICT, plan, **options)
    return list(reader), reader.report


def joined(source: Any) -> np.ndarray:
    return np.concatenate([s.samples for s in read(source)[0]])


def failure(source: Any, plan: Any = "all") -> AudioError:
    with pytest.raises(AudioError) as caught:
        read(source, plan)
    assert "\n" not in str(caught.value)
    return caught.value


def low_passed(cutoff: float, rate: int = RATE, seconds: float = 8) -> np.ndarray:
    """Pinkish noise [n] without anything above `cutoff` Hz."""
    spectrum = np.fft.rfft(np.random.default_rng(1).standard_normal(round(seconds * rate)))
    f = np.fft.rfftfreq(round(seconds * rate), 1 / rate)
    shaped = np.fft.irfft(spectrum * (f < cutoff) / np.sqrt(np.maximum(f, 20)))
    return 0.5 * shaped / np.abs(shaped).max()


# --- Samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["wav", "flac", "aiff", "ogg", "mp3"])
def test_blocks_equal_the_whole_file(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, f"a.{suffix}", noise(9))
    whole = soundfile.read(path)[0].astype(np.float32).astype(np.float64)
    expected = np.clip(whole.mean(axis=1), -1, 1).astype(np.float32)
    assert np.array_equal(joined(path)[: 2 * SIZE], expected[: 2 * SIZE])


def test_lossless_containers_give_the_same_bits(tmp_path: Path) -> None:
    pcm = noise(9)
    wav = joined(write(tmp_path, "a.wav", pcm))
    for suffix in ("flac", "aiff", "alac.m4a"):
        assert np.array_equal(joined(write(tmp_path, f"a.{suffix}", pcm)), wav)
    assert np.array_equal(joined((pcm, RATE)), wav)
    assert np.array_equal(joined(((pcm / 32768), RATE)), wav)
    assert np.array_equal(joined(io.BytesIO(encode(pcm, "wav"))), wav)


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000, 96_000])
def test_resampling_equals_one_shot_soxr(rate: int) -> None:
    pcm = noise(8, rate, channels=1)
    expected = soxr.resample(pcm[:, 0].astype(np.float32) / 32768, rate, RATE, "HQ")
    assert np.array_equal(joined((pcm, rate))[: 2 * SIZE], np.clip(expected, -1, 1)[: 2 * SIZE])


@pytest.mark.parametrize("suffix", ["wav", "mp3", "opus", "m4a"])
def test_samples_do_not_depend_on_the_block_size(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, f"a.{suffix}", noise(5, 48_000), 48_000)
    expected, report = read(path)
    for size in (1_000, 65_537):
        monkeypatch.setattr(recording, "_BLOCK_VALUES", size)
        segments, same = read(path)
        assert same == report
        assert all(
            np.array_equal(a.samples, b.samples) for a, b in zip(segments, expected, strict=True)
        )


def test_eight_channels_average(tmp_path: Path) -> None:
    pcm = noise(4, channels=8)
    expected = (pcm.astype(np.float64) / 32768).mean(axis=1).astype(np.float32)
    [segment], report = read(write(tmp_path, "a.wav", pcm))
    assert np.array_equal(segment.samples, expected)
    assert report.channels == 8


def test_values_beyond_full_scale_are_clipped() -> None:
    loud = np.array([3, -3, 1e38, -1e38] * RATE, np.float32)
    for rate in (RATE, 48_000):
        assert np.abs(joined((loud, rate))).max() <= 1


def test_lossy_codecs_keep_length_and_alignment(tmp_path: Path) -> None:
    pcm = np.round(np.repeat(low_passed(6_000)[:, None], 2, axis=1) * 16_000).astype(np.int16)
    for suffix in ("mp3", "lame.mp3", "m4a", "ogg"):
        decoded = joined(write(tmp_path, f"a.{suffix}", pcm))[RATE : 2 * RATE]
        assert np.corrcoef(decoded, pcm[RATE : 2 * RATE, 0])[0, 1] > 0.98, suffix


@pytest.mark.parametrize("suffix", ["m4a", "alac.m4a", "aac", "wma", "mka"])
def test_pyav_reads_what_soundfile_cannot(tmp_path: Path, suffix: str) -> None:
    segments, report = read(write(tmp_path, f"a.{suffix}", noise(6)))
    assert len(segments) in (1, 2)  # WMA loses a little at the end
    assert (report.sample_rate, report.channels) == (RATE, 2)
    assert report.duration_s == pytest.approx(6, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s32le", "pcm_f64le"])
def test_pyav_sample_formats_scale_alike(codec: str) -> None:
    import av

    out, pcm = io.BytesIO(), noise(4, channels=1).T
    with av.open(out, "w", format="matroska") as container:
        stream: Any = container.add_stream(codec, rate=RATE)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm), "s16", "mono")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(stream.codec_context.format, "mono", RATE)
        for converted in resampler.resample(frame):
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    tolerance = 0.008 if codec == "pcm_u8" else 0
    assert joined(out) == pytest.approx(pcm[0] / 32768, abs=tolerance, rel=0)


# --- Plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "count"),
    [(1, 1), (88_199, 1), (176_399, 1), (176_400, 1), (264_599, 1), (264_600, 2), (400_000, 2)],
)
def test_tail_rule(n: int, count: int) -> None:
    samples = np.linspace(0.1, 0.5, n, dtype=np.float32)
    segments, report = read((samples, RATE))
    assert [s.start_s for s in segments] == [4.0 * i for i in range(count)]
    padded = np.pad(samples, (0, max(0, count * SIZE - n)))[: count * SIZE]
    assert np.array_equal(np.concatenate([s.samples for s in segments]), padded)
    assert report.duration_s == n / RATE
    assert ("short" in report.warnings) == (n < SIZE)
    for segment in segments:
        assert segment.samples.dtype == np.float32
        assert segment.peak == segment.samples.max()
        assert segment.rms == pytest.approx(np.sqrt(np.mean(segment.samples.astype(float) ** 2)))


@pytest.mark.parametrize(
    ("seconds", "starts"),
    [
        (3.0, [0.0]),
        (4.0, [0.0]),
        (4.9, [0.0]),
        (5.0, [0.0, 1.0]),
        (6.5, [0.0, 1.25, 2.5]),
        (10.0, [0.0, 1.5, 3.0, 4.5, 6.0]),
        (19.0, [0.0, 3.75, 7.5, 11.25, 15.0]),
        (20.0, [0.0, 4.0, 8.0, 12.0, 16.0]),
        (21.0, [0.0, 4.0, 8.0, 12.0, 16.0]),
    ],
)
def test_short_recordings_have_overlapping_segments(seconds: float, starts: list[float]) -> None:
    samples = np.linspace(0.1, 0.5, round(seconds * RATE), dtype=np.float32)
    verdict = Decision(least_segments=5)
    reader = SegmentReader((samples, RATE), FrontEnd(), verdict)
    segments = list(reader)
    assert [s.start_s for s in segments] == starts
    for segment in segments:
        whole = samples[round(segment.start_s * RATE) :][:SIZE]
        assert np.array_equal(segment.samples[: len(whole)], whole)
    assert reader.report.duration_s == seconds


@pytest.mark.parametrize("suffix", ["wav", "mp3", "mka"])
@pytest.mark.parametrize("rate", [RATE, 32_000])
def test_first60_equals_the_first_segments(tmp_path: Path, suffix: str, rate: int) -> None:
    path = write(tmp_path, f"a.{suffix}", noise(63, rate, channels=1), rate)
    first, report = read(path, "first60")
    assert len(first) == 15
    everything, full = read(path)
    assert all(
        np.array_equal(a.samples, b.samples) for a, b in zip(first, everything[:15], strict=True)
    )
    assert report.duration_s == full.duration_s == pytest.approx(63)


@pytest.mark.parametrize(("seconds", "count"), [(59.9, 15), (57.9, 14), (60.0, 15), (5.0, 1)])
def test_first60_counts(seconds: float, count: int) -> None:
    assert len(read((noise(seconds, channels=1), RATE), "first60")[0]) == count


@pytest.mark.parametrize("n", [SIZE + 1, SIZE + 5, 5 * SIZE // 3, 6 * SIZE + 17])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_evenly_spaced_starts(tmp_path: Path, n: int, count: int) -> None:
    pcm = noise(n / RATE, channels=1)
    segments, _ = read(write(tmp_path, "a.flac", pcm), count)
    starts = np.linspace(0, n - SIZE, count).astype(np.int64)
    assert [s.start_s for s in segments] == [start / RATE for start in starts]
    for start, segment in zip(starts, segments, strict=True):
        expected = pcm[start : start + SIZE, 0] / np.float32(32768)
        assert np.array_equal(segment.samples, expected)


@pytest.mark.parametrize("n", [1, 1000, SIZE])
def test_evenly_spaced_starts_of_short_audio_are_one(n: int) -> None:
    assert len(read((noise(n / RATE), RATE), 7)[0]) == 1


def test_reading_again_gives_the_same(tmp_path: Path) -> None:
    reader = SegmentReader(io.BytesIO(encode(noise(5), "wav")), FE, VERDICT)
    with pytest.raises(RuntimeError):
        _ = reader.report
    first, report = list(reader), reader.report
    assert np.array_equal(first[0].samples, next(iter(list(reader))).samples)
    assert reader.report == report


# --- Warnings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cutoff", [8_000, 12_000, 15_000, 17_000, 20_000])
@pytest.mark.parametrize("as_int16", [False, True])
def test_bandwidth_of_low_passed_noise(cutoff: int, as_int16: bool) -> None:
    samples = low_passed(cutoff)
    pcm = np.round(samples * 32767).astype(np.int16) if as_int16 else samples
    report = read((pcm, RATE))[1]
    assert report.bandwidth_hz == pytest.approx(cutoff, abs=300)
    assert ("band-limited" in report.warnings) == (cutoff < 16_000)


def test_bandwidth_of_other_sources(tmp_path: Path) -> None:
    for rate in (8_000, 16_000, 32_000):
        report = read((low_passed(rate, rate), rate))[1]
        assert report.bandwidth_hz == pytest.approx(rate / 2, rel=0.05)
        assert "resampled" in report.warnings
    pcm = np.round(np.repeat(low_passed(22_050)[:, None], 2, axis=1) * 32767).astype(np.int16)
    assert read((pcm, RATE))[1].warnings == ()
    limited = {}
    for bit_rate in (64_000, 128_000):
        report = read(io.BytesIO(encode(pcm, "lame.mp3", bit_rate=bit_rate)))[1]
        limited[bit_rate] = "band-limited" in report.warnings
    assert limited == {64_000: True, 128_000: False}
    padded = (low_passed(12_000)[:100_000], RATE)  # the step to the padding is not content
    assert read(padded)[1].warnings == ("short", "band-limited")


def test_clipping_needs_runs_at_full_scale() -> None:
    tone = np.sin(np.arange(8 * RATE) * 0.05)
    assert "clipped" not in read((tone, RATE))[1].warnings
    assert "clipped" in read((np.clip(1.5 * tone, -1, 1), RATE))[1].warnings
    spikes = np.where(np.arange(8 * RATE) % 10 < 2, 1.0, 0.0)  # runs of two only
    assert "clipped" not in read((spikes, RATE))[1].warnings
    one_sided = np.stack([np.clip(1.5 * tone, -1, 1), 0 * tone], axis=1)
    assert "clipped" in read((one_sided, RATE))[1].warnings


def test_silence() -> None:
    silent, report = read((np.zeros(2 * SIZE), RATE))
    assert report.warnings == ("silent",)
    assert report.bandwidth_hz == 0
    assert [s.peak for s in silent] == [0, 0]
    half = np.concatenate([noise(4)[:, 0], np.zeros(SIZE, np.int16)])
    assert read((half, RATE))[1].warnings == ("silent-segments",)


# --- Errors ---------------------------------------------------------------------------------------


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    assert failure(tmp_path / "none.wav").kind == "not-found"
    assert failure("a\0b.wav").kind == "not-found"
    (tmp_path / "link.wav").symlink_to("gone.wav")
    assert failure(tmp_path / "link.wav").kind == "broken-link"
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    assert failure(tmp_path / "loop.wav").kind == "broken-link"
    os.mkfifo(tmp_path / "pipe.wav")
    assert failure(tmp_path / "pipe.wav").kind == "unsupported"
    (tmp_path / "empty.wav").touch()
    assert failure(tmp_path / "empty.wav").kind == "empty"
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    assert failure(folder).kind == "no-audio"
    write(folder / "deep", "a.wav", noise(0.1))
    error = failure(folder)
    assert error.kind == "no-audio"
    assert "-r" in str(error)
    assert failure(folder / "deep").kind == "is-directory"


def test_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "a.wav", noise(0.1))
    monkeypatch.setattr(builtins, "open", refuse)
    error = failure(path)
    monkeypatch.undo()
    assert error.kind == "permission"


def test_reading_fails_midway() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 100_000:
                raise OSError(5, "Input/output error")
            return super().read(size)

    for suffix in ("wav", "aac"):
        error = failure(Failing(encode(noise(20), suffix)))
        assert error.kind == "read"
        assert "Input/output error" in str(error)


def test_unseekable_and_text_sources() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert failure(pipe).kind == "unsupported"


@pytest.mark.parametrize(
    "data",
    [
        b"not audio\n" * 1000,
        b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile a.wav\n",
        b"\x89PNG\r\n\x1a\n" + bytes(500),
        bytes(5000),
    ],
)
def test_what_is_not_audio(tmp_path: Path, data: bytes) -> None:
    pytest.importorskip("av")  # without it the reason is that
    write(tmp_path, "a.wav", noise(5))
    path = tmp_path / "text.mp3"
    path.write_bytes(data)
    assert failure(path).kind == "unsupported"


def test_no_samples(tmp_path: Path) -> None:
    assert failure(write(tmp_path, "a.wav", noise(0))).kind == "no-audio"
    assert failure((np.zeros(0), RATE)).kind == "no-audio"
    assert failure((np.zeros(0), RATE), 7).kind == "no-audio"


def test_video_without_sound_has_no_audio() -> None:
    av = pytest.importorskip("av")

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode(None))
    assert failure(out).kind == "no-audio"


@pytest.mark.parametrize("suffix", ["wav", "flac", "aiff"])
def test_truncated(suffix: str) -> None:
    data = encode(noise(9), suffix)
    assert failure(io.BytesIO(data[: len(data) // 2])).kind == "truncated"


def test_wav_of_unknown_length_is_not_truncated() -> None:
    data = bytearray(encode(noise(5), "wav"))
    data[40:44] = b"\xff\xff\xff\xff"  # as written to a pipe
    assert read(io.BytesIO(data))[1].duration_s == 5


def test_truncated_mp3_is_a_warning() -> None:
    data = encode(noise(9), "lame.mp3")
    report = read(io.BytesIO(data[: len(data) // 2]))[1]
    assert report.warnings == ("truncated",)
    assert report.duration_s == pytest.approx(4.5, abs=0.1)


def test_damage_in_the_middle() -> None:
    data = bytearray(encode(noise(9), "flac"))
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    assert failure(io.BytesIO(data)).kind == "decode"


def test_decoders_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    data = encode(noise(9), "lame.mp3")
    middle = len(data) // 2
    damaged = read(io.BytesIO(data[:middle] + bytes(5000) + data[middle:]))[1]
    assert damaged.warnings == ("damaged",)
    read(io.BytesIO(data[:middle]))
    assert capfd.readouterr() == ("", "")


def test_non_finite_samples_are_counted(tmp_path: Path) -> None:
    samples = np.zeros((9 * RATE, 2), np.float32)
    samples[[5, RATE, 8 * RATE], 1] = np.nan, np.inf, -np.inf
    soundfile.write(tmp_path / "a.wav", samples, RATE, "FLOAT")
    for source in (tmp_path / "a.wav", (samples, RATE)):
        error = failure(source)
        assert error.kind == "non-finite"
        assert ": 3 samples" in str(error)
    assert failure((np.full(9, 1e300), RATE)).kind == "non-finite"  # beyond float32


def test_headers_that_lie() -> None:
    data = encode(noise(1), "wav")
    for rate in (999, 768_001, 2**31 - 1):
        lie = data[:24] + rate.to_bytes(4, "little") + data[28:]
        assert failure(io.BytesIO(lie)).kind == "sample-rate"
    for channels in (65, 1000):
        lie = data[:22] + channels.to_bytes(2, "little") + data[24:]
        lie = lie[:32] + (2 * channels).to_bytes(2, "little") + lie[34:]
        assert failure(io.BytesIO(lie)).kind == "channels"
    for channels in (0, 65_535):  # libsndfile refuses these itself
        lie = data[:22] + channels.to_bytes(2, "little") + data[24:]
        failure(io.BytesIO(lie))


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.m4a", noise(1))
    monkeypatch.setitem(sys.modules, "av", None)
    error = failure(path)
    assert error.kind == "missing-extra"
    assert 'pip install "artifactnet-jax[av]"' in str(error)


def test_wrong_arguments() -> None:
    ok = noise(1)
    for plan in (0, -1, True, "half", 2.0):
        with pytest.raises(ValueError, match="segments"):
            SegmentReader((ok, RATE), FE, VERDICT, plan)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        SegmentReader((np.zeros((2, 2, 2)), RATE), FE, VERDICT)
    for samples in (np.zeros(9, complex), np.zeros(9, bool), np.zeros(9, np.int64)):
        with pytest.raises(TypeError, match="samples"):
            SegmentReader((samples, RATE), FE, VERDICT)
    with pytest.raises(TypeError, match="rate"):
        SegmentReader((ok, 44_100.5), FE, VERDICT)  # type: ignore[arg-type]
    assert failure((ok.T, RATE)).kind == "channels"
    assert failure((ok, 500)).kind == "sample-rate"


def test_audio_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(AudioError("empty", "a.wav: empty")))
    assert (error.kind, str(error)) == ("empty", "a.wav: empty")


# --- Names and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["naïve 曲.wav", "two\nlines.wav", os.fsdecode(b"\xff\xfe.wav"), "-x.wav"]
)
def test_unusual_names(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, "a.wav", noise(1)).rename(tmp_path / name)
    assert len(read(path)[0]) == len(read(os.fsencode(path))[0]) == 1
    assert find_audio([tmp_path], recursive=False) == [str(path)]
    path.write_bytes(b"")
    str(failure(path)).encode()  # a line that can be printed anywhere
    assert str(failure(path)).isprintable()


def test_find_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "d/b.WAV",
        "d/a.mp3",
        "d/.c.wav",
        "d/e.txt",
        "d/s/x.flac",
        "d/.h/y.wav",
        "n/z.txt",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("d/s/up").symlink_to("..")
    Path("d/gone.wav").symlink_to("nowhere")
    folder = ["d/a.mp3", "d/b.WAV", "d/gone.wav"]
    assert find_audio(["d"], recursive=False) == folder
    assert find_audio(["d"], recursive=True) == [*folder, "d/s/x.flac"]
    assert find_audio(["n", "-", "no.wav", "d/e.txt"], False) == ["n", "-", "no.wav", "d/e.txt"]
    assert find_audio(["d/b.WAV", "d", Path("d/b.WAV")], False) == [
        "d/b.WAV",
        "d/a.mp3",
        "d/gone.wav",
    ]
    Path("list.txt").write_text("\ufeff# comment\nd/b.WAV\n\nd\n@x.wav\n", encoding="utf-8")
    assert find_audio(["@list.txt"], False) == ["d/b.WAV", "d/a.mp3", "d/gone.wav", "@x.wav"]
    with pytest.raises(ValueError, match="missing"):
        find_audio(["@missing.txt"], False)


# --- Cost -----------------------------------------------------------------------------------------

PEAK = """
import re, sys
from pathlib import Path
from artifactnet_jax.audio import SegmentReader
from artifactnet_jax.config import FrontEnd, Decision
plan = int(sys.argv[2]) if sys.argv[2].isdigit() else sys.argv[2]
sum(1 for _ in SegmentReader(sys.argv[1], FrontEnd(), Decision(), plan))
# Not getrusage: its peak includes the parent's, from between fork and exec.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(("suffix", "plan"), [("wav", "all"), ("flac", "7"), ("mka", "all")])
def test_memory_does_not_grow_with_length(tmp_path: Path, suffix: str, plan: str) -> None:
    minute = noise(60, channels=1)
    peaks = []
    for minutes in (1, 20):
        path = write(tmp_path, f"{minutes}.{suffix}", np.tile(minute, (minutes, 1)))
        run = [sys.executable, "-c", PEAK, str(path), plan]
        peaks.append(int(subprocess.run(run, capture_output=True, check=True).stdout))
        path.unlink()
    assert peaks[1] <= 1.2 * peaks[0]


@pytest.mark.slow
def test_import_is_light() -> None:
    code = (
        "import artifactnet_jax.audio, sys; print({'av', 'soxr', 'soundfile'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert run.stdout == b"set()\n"


@pytest.mark.parametrize("plan", ["all", "first60", 7])
@pytest.mark.parametrize("least", [1, 5])
@pytest.mark.parametrize("seconds", [0.5, 4.0, 9.0, 17.9, 21.0])
def test_the_number_of_segments_is_bounded_beforehand(tmp_path, seconds, least, plan):
    verdict = Decision(least_segments=least)
    for name, rate in (("a.wav", 44_100), ("a.flac", 48_000), ("a.mp3", 44_100), ("a.ogg", 32_000)):
        path = write(tmp_path, name, noise(seconds, rate, 1), rate)
        reader = SegmentReader(path, FrontEnd(), verdict, plan, counted=True)
        bounds, count = set(), 0
        for _ in reader:
            bounds.add(reader.most)
            count += 1
        (most,) = bounds
        assert count <= most
        if isinstance(plan, int):
            assert most == plan
        else:
            assert most <= max(count + 1, least)
