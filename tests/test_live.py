"""The verb `live`: windows and scores of a stream, what is dropped, and how a source may end."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from artifactnet_jax import dsp_numpy, live, live_decoder, texture
from artifactnet_jax.audio import read_mono
from artifactnet_jax.config import Config, FrontEnd
from artifactnet_jax.decoders import Outcome, load
from artifactnet_jax.detector import Detector
from artifactnet_jax.recording import Decoded
from artifactnet_jax.results import WORDS
from artifactnet_jax.weights import Weights
from audio_files import carrying, encode, noise, write
from tiny_model import TINY, save_tiny

RATE = 44_100
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Weights with windows of 1 s."""
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def run(command, tiny):
    """`live` with those weights on backend numpy; the rows, the summary, exit code and stderr."""

    def call(*args: Any) -> tuple[list[dict[str, Any]], dict[str, Any], int, str]:
        options = ("--weights", tiny, "--backend", "numpy", "--format", "jsonl", "--hop", 0.25)
        done = command("live", *options, *args)
        rows = [json.loads(line) for line in done.out.splitlines()]
        summary = rows.pop()["summary"] if rows else {}
        return rows, summary, done.code, done.err

    return call


@pytest.fixture
def stdin(monkeypatch):
    """Makes bytes the standard input, through a pipe and in pieces of odd sizes."""
    opened: list[tuple[threading.Thread, Any]] = []
    over = threading.Event()

    def feed(data: bytes, close: bool = True) -> None:
        out, into = os.pipe()

        def write_pieces() -> None:
            sizes, k = itertools.cycle([1, 7, 4093, 30_011, 65_536]), 0
            with contextlib.suppress(BrokenPipeError), os.fdopen(into, "wb", buffering=0) as file:
                while k < len(data):
                    k += file.write(data[k : k + next(sizes)])
                if not close:
                    over.wait()

        opened.append((threading.Thread(target=write_pieces), os.fdopen(out, "rb", buffering=0)))
        opened[-1][0].start()
        monkeypatch.setattr(sys, "stdin", opened[-1][1])

    yield feed
    over.set()
    for thread, file in opened:
        file.close()  # before the thread, which may still be writing
        thread.join()


def scores(rows: list[dict[str, Any]]) -> list[float]:
    return [row["score"] for row in rows]


def hop_of(config: Config) -> int:
    return live.hop_samples(config, 0.25)


# --- Scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_a_window_scores_as_the_detector_scores_the_same_seconds(run, tiny, tmp_path, rate):
    path = write(tmp_path, "x.wav", noise(3.3, rate), rate)
    rows, summary, code, _ = run(path)
    audio, detector = read_mono(path, RATE, "x"), Detector(tiny, "numpy")
    starts = range(0, len(audio) - RATE + 1, hop_of(TINY))
    assert [row["start_sample"] for row in rows] == list(starts)
    expected = [detector.score((audio[s : s + RATE].copy(), RATE)).score for s in starts]
    assert scores(rows) == expected  # to the bit
    assert len(set(expected)) == len(expected)
    medians = [float(np.median(expected[: k + 1])) for k in range(len(expected))]
    assert [row["median"] for row in rows] == pytest.approx(medians, rel=1e-12)
    assert (code, summary["scored"], summary["dropped"]) == (0, len(rows), 0)
    assert summary["audio_s"] == pytest.approx(3.3, abs=1e-3)


@pytest.mark.parametrize("name", ["numpy", "onnxruntime"])
def test_windows_of_the_default_model_share_frames_and_keep_their_bits(weights_path, name):
    if name == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")
    """Six window lengths and two threads against a call of the backend for each window."""
    backend: Any = Detector(weights_path, name, batch_size=1).backend
    config = Config.edge()
    audio = noise(6, channels=1)[:, 0].astype(np.float32) / 32768
    hop, size = hop_of(config), config.front_end.segment_samples
    assert (hop % 2048, abs(hop / RATE - 0.25) < 0.03) == (0, True)
    score = backend.stream()
    for start in (0, hop, 2 * hop, 5 * hop, 5 * hop + 100):  # one dropped, one off the grid
        window = audio[start : start + size]
        assert score(window, start) == float(backend(window[None])[0])


@pytest.mark.parametrize("edge", ["reflect", "edge", "constant"])
def test_shared_frames_equal_those_of_each_window(edge, monkeypatch):
    front_end = FrontEnd(segment_samples=20_000, stft_edge=edge)
    ends = [texture.front_end(front_end, n, h) for n, h in ((256, 64), (8192, 2048))]
    ends += [front_end, FrontEnd(segment_samples=20_000, n_fft=600, hop=250, stft_pad=0)]
    audio = np.random.default_rng(0).standard_normal(80_000).astype(np.float32)
    computed: list[int] = []
    plain = dsp_numpy._magnitude

    def counted(frames: np.ndarray, *args: Any) -> np.ndarray:
        computed.append(len(frames))
        return plain(frames, *args)

    monkeypatch.setattr(dsp_numpy, "_magnitude", counted)
    for each in ends:
        shared = dsp_numpy.StreamStft()
        for start in (0, 2048, 6144, 6144, 6244, 2048, 4096, 40_960):
            shared.start = start
            window = audio[start : start + 20_000]
            computed.clear()
            out = shared(window, each)
            done = sum(computed)
            np.testing.assert_array_equal(out, dsp_numpy.stft_magnitude(window, each))
            if start == 4096 and 2048 % each.hop == 0:  # one grid step after the one before
                assert done <= 2048 // each.hop + 2 * -(-each.n_fft // each.hop)


def test_the_median_forgets_what_is_older_than_over(run, tmp_path):
    path = write(tmp_path, "x.wav", noise(4, channels=1))
    rows, *_ = run("--over", 1, path)
    n = math.ceil(RATE / hop_of(TINY))
    for k, row in enumerate(rows):
        kept = scores(rows)[max(0, k - n + 1) : k + 1]
        assert (row["n_windows"], row["median"]) == (len(kept), pytest.approx(np.median(kept)))


def test_threshold_and_margin_are_the_detectors(run, tmp_path):
    path = write(tmp_path, "x.wav", noise(1.1, channels=1))
    ((score,), summary, _, err) = (lambda r: (scores(r[0]), *r[1:]))(run(path))
    assert (summary["verdict"], summary["ai"]) == ("ai" if score >= 0.5 else "real", score >= 0.5)
    assert run("--threshold", score, path)[1]["verdict"] == "ai"
    assert run("--threshold", score, "--margin", 0.1, path)[1]["verdict"] == "unclear"
    assert f"{WORDS[summary['verdict']]}, median" in err


# --- Standard input -------------------------------------------------------------------------------


def wav(pcm: np.ndarray, subtype: str = "PCM_16", kind: str = "WAV") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, pcm, 48_000, subtype, format=kind)
    return out.getvalue()


def endless(data: bytes) -> bytes:
    """The same as written to a pipe: no sizes in the header, and a chunk before the data."""
    at = data.index(b"data")
    tag = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"  # odd: padded
    head = data[:4] + b"\xff" * 4 + data[8:at]
    return head + tag + b"data" + b"\xff" * 4 + data[at + 8 :]


PCM = noise(2.2, 48_000)


@pytest.fixture
def from_file(run, tmp_path) -> list[dict[str, Any]]:
    rows, *_ = run(write(tmp_path, "x.wav", PCM, 48_000))
    assert len(rows) >= 5
    return rows


RAW = ("--rate", 48_000, "--channels", 2)
FLOATS = (PCM / np.float32(32768)).astype("<f4")


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (wav(PCM), ()),
        (endless(wav(PCM)), ()),
        (wav(FLOATS, "FLOAT"), ()),
        (wav(PCM.astype(np.int32) << 16, "PCM_32"), ()),
        (endless(wav(PCM, kind="WAVEX")), ()),
        (PCM.astype("<i2").tobytes(), ("--pcm", "s16le", *RAW)),
        (FLOATS.tobytes(), ("--pcm", "f32le", *RAW)),
    ],
    ids=["wav", "endless", "float", "32 bits", "extensible", "s16le", "f32le"],
)
def test_a_pipe_gives_the_scores_of_the_file(run, stdin, from_file, data, options):
    stdin(data)
    rows, summary, code, _ = run("--every-window", *options, "-")
    assert scores(rows) == scores(from_file)
    assert (code, summary["notes"], summary["sample_rate"], summary["channels"]) == (
        0,
        [],
        48000,
        2,
    )


def test_bytes_of_no_whole_frame_are_left_out_and_told(run, stdin, from_file):
    stdin(PCM.astype("<i2").tobytes() + b"\1\2\3")
    rows, summary, code, err = run("--every-window", "--pcm", "s16le", *RAW, "-")
    assert (scores(rows), code) == (scores(from_file), 0)
    assert summary["notes"] == ["3 bytes at the end are no whole frame: left out"]
    assert summary["notes"][0] in err


def test_what_follows_the_samples_of_a_wav_file_is_no_sound(run, stdin, from_file):
    stdin(wav(PCM) + b"LIST\4\0\0\0INFO" * 5000)
    rows, *_ = run("--every-window", "-")
    assert scores(rows) == scores(from_file)


@pytest.mark.parametrize(
    ("data", "options", "cause"),
    [
        (b"\0" * 50, (), "no WAV stream"),
        (b"RI", (), "no WAV stream"),
        (wav(PCM), ("--pcm", "s16le", *RAW), "leave --pcm"),
        (wav(PCM, "PCM_24"), (), "24 bits"),
        (wav(PCM, "PCM_U8"), (), "8 bits"),
        (b"", ("--pcm", "s16le"), "all of --pcm, --rate and --channels"),
        (b"", ("--pcm", "s16le", "--rate", 10, "--channels", 1), "--rate 10"),
    ],
    ids=["other", "torn", "wav as raw", "24 bits", "8 bits", "no rate", "10 Hz"],
)
def test_a_stream_that_is_not_what_was_said_is_a_usage_error(run, stdin, data, options, cause):
    stdin(data)
    rows, _, code, err = run(*options, "-")
    assert (rows, code, err.count("\n")) == ([], 2, 1)
    assert cause in err


@pytest.mark.parametrize("arguments", [(), ("x.wav", "--device", "a"), ("x.wav", "--rate", 8000)])
def test_options_that_do_not_agree(run, arguments):
    _, _, code, err = run(*arguments)
    assert (code, err.count("\n")) == (2, 1)


# --- Bad sound ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_windows_with_nan_fail_and_the_others_are_none_the_worse(run, stdin, rate):
    pcm = noise(4, rate, 1).astype(np.float32) / 32768
    bad = pcm.copy()
    at = round(1.6 * rate)
    bad[at], bad[at + 3] = np.nan, np.inf
    results = []
    for data in (pcm, bad):
        stdin(data.tobytes())
        options = ("--pcm", "f32le", "--rate", rate, "--channels", 1)
        results.append(run("--every-window", *options, "-"))
    (clean, _, code, _), (rows, summary, bad_code, err) = results
    assert (code, bad_code) == (0, 1)
    failed = {row["start_sample"] for row in rows if "error" in row}
    holding = {s for row in rows if (s := row["start_sample"]) <= 1.6 * RATE < s + RATE}
    assert failed >= holding
    assert len(failed - holding) <= (rate != RATE)  # the resampler reaches 50 ms further
    for row, before in zip(rows, clean, strict=True):
        if row["start_sample"] in failed:
            assert (row["score"], row["error"]["kind"]) == (None, "non-finite")
        elif rate == RATE:
            assert row["score"] == before["score"]
        else:
            assert row["score"] == pytest.approx(before["score"], abs=1e-4)
    assert summary["failed"] == len(failed)
    assert f"{len(failed)} failed" in err


def test_silence_has_no_score(run, tmp_path):
    pcm = noise(4, channels=1)
    pcm[RATE:] = 0
    rows, summary, code, _ = run("--over", 1, write(tmp_path, "x.wav", pcm))
    silent = [row for row in rows if row.get("silent")]
    assert code == 0
    assert [row["start_sample"] >= RATE for row in rows] == [row in silent for row in rows]
    assert all(row["score"] is None for row in silent)
    assert (summary["silent"], summary["verdict"], summary["median"]) == (
        len(silent),
        "undecided",
        None,
    )


def test_a_stream_shorter_than_a_window_has_no_verdict(run, stdin):
    stdin(encode(noise(0.5), "wav"))
    rows, summary, code, err = run("-")
    assert (rows, summary["scored"], code) == ([], 0, 1)
    assert "ended after 0.5 s, before the first window of 1 s was full" in err


# --- Decoders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [RATE, 48_000])
def test_the_decoder_is_told_while_it_runs_and_is_that_of_score(run, tiny, tmp_path, rate):
    lines = carrying("MusicGen", 42, channels=1)
    pcm = np.concatenate([noise(22, channels=1), lines])[:, 0] / np.float32(32768)
    pcm = pcm if rate == RATE else soxr.resample(pcm, RATE, rate)
    path = write(tmp_path, "x.wav", np.rint(pcm[:, None] * 32767).astype(np.int16), rate)
    rows, summary, code, err = run("--hop", 1, path)
    assert code == 0
    told = [row for row in rows if "decoder" in row]
    # The windows that first reach 20, 40 and 60 s.
    hop = rows[1]["start_sample"]
    ends = [-(-(s * RATE - RATE) // hop) * hop for s in (20, 40, 60)]
    assert [row["start_sample"] for row in told] == ends
    audio = read_mono(path, RATE, "x")
    detector = Detector(tiny, "numpy")
    for row, seconds in zip(told, (20, 40, 60), strict=True):
        expected = detector.score((audio[: seconds * RATE].copy(), RATE)).to_dict()
        if expected["decoder"]:
            del expected["decoder"]["windows"]
        for key in ("decoder", "decoder_reason"):
            assert row[key] == expected[key]
    assert told[0]["decoder"] is None
    assert told[2]["decoder"]["name"] == "MusicGen"
    whole = json.loads(json.dumps(detector.score(path).to_dict()))
    for key in ("decoder", "decoder_reason", "bank", "notices"):
        assert summary[key] == whole[key]
    assert err.count("carries the lines of MusicGen's decoder") == 2


def test_without_a_bank_nothing_is_told(run, tmp_path):
    rows, summary, _, _ = run("--no-decoder", "--hop", 5, write(tmp_path, "x.wav", noise(21)))
    assert not any("decoder" in row for row in rows)
    assert (summary["decoder"], summary["bank"]) == (None, None)
    assert summary["decoder_reason"] == "no bank was asked"


def test_a_watch_of_a_long_stream_keeps_its_memory(monkeypatch):
    monkeypatch.setattr(live_decoder, "match", lambda spectrum, bank: Outcome(None, "so", None))
    watch = live_decoder.Watch(load(), RATE)
    spectrum = watch._spectrum
    assert spectrum is not None
    spectrum.window_frames = 1  # 64 windows after 12 s
    block = noise(10, channels=1)[:, 0].astype(np.float32) / 32768
    sizes = []
    for k in range(30):
        watch.add(block)
        assert bool(watch.row(spectrum.samples)) == (k % 2 == 1)
        sizes.append(len(pickle.dumps(watch._spectrum)))
    assert len(spectrum.windows) <= 64
    assert max(sizes[20:]) <= max(sizes[:10])
    assert watch.row(0) == {}


def test_matches_that_nobody_took_in_time_are_left_out(monkeypatch):
    seen = []

    def matched(spectrum: Any, bank: Any) -> Outcome:
        seen.append(spectrum.samples)
        return Outcome(None, "so", None)

    monkeypatch.setattr(live_decoder, "match", matched)
    watch = live_decoder.Watch(load(), RATE)
    watch.add(np.zeros(130 * RATE, np.float32))
    assert watch.row(20 * RATE) == {}  # the first two have gone
    assert watch.row(101 * RATE) == {"decoder": None, "decoder_reason": "so"}
    assert watch.row(119 * RATE) == {}
    assert watch.row(120 * RATE) != {}
    assert seen == [100 * RATE, 120 * RATE]


# --- How a source ends ----------------------------------------------------------------------------


def test_a_stalled_source_ends_in_time(run, stdin):
    stdin(endless(encode(noise(1.5), "wav")), close=False)
    rows, summary, code, err = run("--every-window", "--timeout", 0.3, "-")
    assert (len(rows), code, summary["ended"]) == (2, 1, "stalled")
    assert "artifactnet-jax: standard input: nothing came for 0.3 s" in err


def test_a_source_that_breaks_off_is_told(run, stdin, tmp_path):
    stdin(encode(noise(3), "wav")[: 44 + 4 * 2 * RATE])
    rows, summary, code, err = run("--every-window", "-")
    assert (len(rows), code, summary["ended"]) == (4, 1, "truncated")
    assert "1.0 s before its declared length" in err
    rows, _, code, err = run(tmp_path / "none.wav")
    assert (rows, code) == ([], 1)
    assert "no such file" in err


@pytest.mark.slow
@posix
def test_ctrl_c_ends_with_the_summary(tiny):
    options = ["--weights", str(tiny), "--backend", "numpy", "--format", "jsonl"]
    line = [sys.executable, "-m", "artifactnet_jax", "live", *options, "-"]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # A parent that runs in the background may have passed on that SIGINT is ignored.
    wanted = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(line, **pipes)
    finally:
        signal.signal(signal.SIGINT, wanted)
    with process:
        try:
            process.stdin.write(endless(encode(noise(1.2), "wav")))
            process.stdin.flush()
            row = json.loads(process.stdout.readline())
            process.send_signal(signal.SIGINT)
            process.wait(30)
        except BaseException:
            process.kill()
            raise
        rest, err = process.stdout.read(), process.stderr.read().decode()
    assert process.returncode == 130
    assert 0 <= row["score"] <= 1
    assert json.loads(rest)["summary"]["ended"] == "interrupted"
    assert err.endswith("artifactnet-jax: interrupted\n")
    assert "1 scored, 0 dropped" in err


# --- Time -----------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Source:
    """A source that is open already; blocks float32 [n] at `rate` Hz."""

    def __init__(self, rate: int, blocks: Iterator[np.ndarray]):
        self.decoded = Decoded(rate, 1, (block[:, None] for block in blocks))

    def __enter__(self) -> Decoded:
        return self.decoded

    def __exit__(self, *_: object) -> None:
        return None


def fake_detector(score: Callable[[np.ndarray], float], rate: int, size: int) -> Any:
    """What `Monitor` needs of a detector, with any function of the audio for a model."""
    config = Config("fake", front_end=FrontEnd(sample_rate=rate, segment_samples=size))
    weights = Weights("fake", config, {}, "0", "none", {})
    backend = types.SimpleNamespace(name="fake")
    backend.stream = lambda: lambda audio, start: score(audio)
    return types.SimpleNamespace(
        **{"weights": weights, "backend": backend, "threshold": 0.5, "margin": 0.0, "fusion": None},
        alone=lambda score: score,
        word=lambda score: "ai" if score >= 0.5 else "real",
    )


def test_slow_computing_drops_old_windows_and_counts_them():
    """A live source of 100 samples/s, windows of 1 s, a hop of 0.25 s, and 3 s for each score."""
    ramp, clock = np.arange(2000, dtype=np.float32) / 4096, Clock()
    buffer = live.Buffer(100, 100, 25, wait=False, clock=clock)
    steps = threading.Semaphore(0)
    done = threading.Semaphore(0)

    def blocks() -> Iterator[np.ndarray]:
        for k in range(0, 2000, 10):
            steps.acquire()
            clock.now = (k + 10) / 100
            yield ramp[k : k + 10]
            done.release()  # the block is in the buffer

    def play(seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            steps.release()
            done.acquire()

    reader = threading.Thread(target=buffer.fill, args=(Source(100, blocks()),))
    reader.start()
    play(1.1)
    seen, latencies = [], []
    monitor = live.Monitor(
        fake_detector(lambda x: 0.25, 100, 100), 25, over=5, timed=True, clock=clock
    )
    for _ in range(5):
        window = buffer.next(0)
        assert window is not None
        np.testing.assert_array_equal(window.samples, ramp[window.start : window.start + 100])
        seen.append(window.start)
        assert window.arrived == math.ceil((window.start + 100) / 10) / 10
        play(3)
        row = monitor(window, buffer.dropped)
        latencies.append(row["latency_ms"])
    steps.release(200)
    reader.join()
    # 1.1 s: the first; then after each 3 s the newest that is complete.
    assert seen == [0, 300, 600, 900, 1200]
    assert row["dropped"] == buffer.dropped == 4 * 11
    assert latencies == pytest.approx([3100, 3100, 3100, 3100, 3100], abs=200)


def test_a_burst_of_a_second_waits_and_nothing_is_dropped():
    ramp = np.arange(300, dtype=np.float32) / 512
    buffer = live.Buffer(100, 100, 25, wait=False)
    buffer.fill(Source(100, iter([ramp[:100], ramp[100:200]])))
    starts = [window.start for window in iter(lambda: buffer.next(0), None)]
    assert (starts, buffer.dropped) == ([0, 25, 50, 75, 100], 0)


def test_a_source_that_can_wait_loses_nothing():
    ramp = np.arange(10_000, dtype=np.float32) / 16_384
    buffer = live.Buffer(100, 100, 25, wait=True)
    reader = threading.Thread(target=buffer.fill, args=(Source(100, iter([ramp])),))
    reader.start()
    starts = []
    while (window := buffer.next(10)) is not None:
        np.testing.assert_array_equal(window.samples, ramp[window.start : window.start + 100])
        starts.append(window.start)
    reader.join()
    assert starts == list(range(0, 9901, 25))


def test_a_consumer_that_goes_stops_the_reader():
    buffer = live.Buffer(100, 100, 25, wait=True)
    endless_blocks = itertools.repeat(np.zeros(50, np.float32))
    reader = threading.Thread(target=buffer.fill, args=(Source(100, endless_blocks),))
    reader.start()
    assert buffer.next(10) is not None
    buffer.close()
    reader.join(10)
    assert not reader.is_alive()


def test_a_day_keeps_its_positions_and_its_memory():
    """24 h at 1,000 samples/s: every window holds the samples of its position, memory stays."""
    rate, size, hop, day = 1000, 4000, 4000, 24 * 3600 * 1000
    period = 2**16
    ramp = np.tile(np.arange(period, dtype=np.float32) / period, 2)
    buffer = live.Buffer(rate, size, hop, wait=False)
    first: list[float] = []

    def score(audio: np.ndarray) -> float:
        first.append(float(audio[0]) * period)
        return 0.75

    monitor = live.Monitor(fake_detector(score, rate, size), hop, over=60, timed=True)
    rows: deque[dict[str, Any]] = deque(maxlen=1)
    memory: list[int] = []

    def judge() -> None:
        with contextlib.suppress(live.Stalled):
            while (window := buffer.next(0)) is not None:
                rows.append(monitor(window, buffer.dropped))
                assert first.pop() == rows[0]["start_sample"] % period

    def blocks() -> Iterator[np.ndarray]:
        for k in range(0, day, 4800):
            yield ramp[k % period : k % period + 4800]
            judge()
            if k % (3600 * rate) == 0:
                memory.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    buffer.fill(Source(rate, blocks()))
    judge()
    tracemalloc.stop()
    n = (day - size) // hop + 1
    assert (buffer.total, buffer.dropped, monitor.counts["scored"]) == (day, 0, n)
    assert (rows[0]["start_sample"], rows[0]["n_windows"]) == ((n - 1) * hop, 15)
    # What is kept has filled up after 4,096 windows; from then on nothing is added.
    assert len(memory) == 24
    assert max(memory[5:]) - min(memory[5:]) < 20_000


def test_resampling_does_not_drift():
    """Two hours at 1,100 Hz, a tone: the last window holds it at its own time."""
    rate, source = 1000, 1100
    tone = lambda n, r: np.sin(2 * np.pi * 7.3 * n / r).astype(np.float32)  # noqa: E731
    blocks = (
        tone(np.arange(k, k + source * 60), source) for k in range(0, source * 7200, source * 60)
    )
    buffer = live.Buffer(rate, 4000, 4000, wait=False)
    buffer.fill(Source(source, blocks))
    last = buffer.next(0)
    assert last is not None
    assert (buffer.total, last.start) == (rate * 7200, rate * 7196)
    inner = np.arange(last.start, last.start + 3800)  # the tone ends at the end
    np.testing.assert_allclose(last.samples[:3800], tone(inner, rate), atol=2e-3)


def test_a_file_in_real_time_takes_its_time(run, tmp_path):
    path = write(tmp_path, "x.wav", noise(1.5, channels=1))
    began = time.monotonic()
    rows, summary, code, _ = run("--realtime", path)
    assert time.monotonic() - began >= 1.5
    assert code == 0
    assert summary["dropped"] + summary["scored"] == 2
    assert summary["latency_ms"]["n"] == summary["scored"] > 0
    assert all(row["latency_ms"] >= row["compute_ms"] for row in rows)


# --- Devices --------------------------------------------------------------------------------------


class FakeDevice:
    """sounddevice as far as it is used: an input that plays, overflows once, and is unplugged."""

    class PortAudioError(Exception):
        pass

    def __init__(self, pcm: np.ndarray, lost: int | None = None):
        self.pcm, self.lost, self.at, self.opened = pcm, lost, 0, None

    def query_devices(self, device: Any = None, kind: str | None = None) -> Any:
        one = {"name": "Loop", "max_input_channels": 8, "default_samplerate": 44_100.0}
        if kind is None:
            return [one, {"name": "Speaker", "max_input_channels": 0}]
        if device not in (None, "Loop", 3):
            raise ValueError(f"No input device matching {device!r}")
        return one

    def InputStream(self, **options: Any) -> Any:
        self.opened = options
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def read(self, n: int) -> tuple[np.ndarray, bool]:
        if self.at >= len(self.pcm):
            raise self.PortAudioError("Device unavailable")
        self.at += n
        return self.pcm[self.at - n : self.at], self.at - n == self.lost


@pytest.mark.parametrize("name", ["default", "Loop", "3"])
def test_a_device_until_it_is_unplugged(run, monkeypatch, tiny, name):
    pcm = noise(2.5).astype(np.float32) / 32768
    device = FakeDevice(pcm, lost=882 * 60)
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    rows, summary, code, err = run("--device", name)
    assert device.opened["device"] == {"default": None, "3": 3}.get(name, name)
    assert (device.opened["samplerate"], device.opened["channels"]) == (44_100, 2)
    assert (code, summary["ended"]) == (1, "read")
    assert "the device stopped (PortAudioError: Device unavailable)" in err
    detector = Detector(tiny, "numpy")
    for row in rows:
        start = row["start_sample"]
        if start < 882 * 60 < start + RATE:
            assert (row["error"]["kind"], row["score"]) == ("gap", None)
        else:
            mono = pcm[start : start + RATE]
            assert row["score"] == detector.score((mono, RATE)).score
    assert summary["failed"] == sum("error" in row for row in rows)


def test_a_device_that_is_not_there(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", FakeDevice(np.zeros((0, 2), np.float32)))
    rows, _, code, err = run("--device", "Nobody")
    assert (rows, code) == ([], 2)
    assert "device Nobody cannot be opened" in err
    assert "there are 'Loop'" in err


def test_without_sounddevice_the_cure_is_told(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    _, _, code, err = run("--device", "default")
    assert code == 3
    assert 'pip install "artifactnet-jax[live]"' in err
