"""The Python door: arrays, numbers, errors, pickles, forks, jax's environment, and privacy."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

import artifactnet_jax
from artifactnet_jax import Detector, Verdict, results
from artifactnet_jax.arrays import checked
from artifactnet_jax.backends import BackendError
from artifactnet_jax.recording import AudioError
from artifactnet_jax.results import Failure
from artifactnet_jax.text import brief
from audio_files import encode, noise
from tiny_model import save_tiny

RATE = 44_100
X = noise(5, channels=1)[:, 0] / np.float32(32768)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("door") / "tiny.safetensors")


@pytest.fixture(scope="module")
def detector(path):
    return Detector(path, "numpy", banks=())


@pytest.fixture(scope="module")
def score(detector):
    return detector.score(X, RATE).score


# --- Arrays ---------------------------------------------------------------------------------------


def test_floats_in_other_units_are_scaled(detector, score):
    pcm = np.round(X * 32768).astype(np.int16)
    plain = detector.score(pcm, RATE)
    assert plain.warnings == ()
    loud = pcm.copy()
    loud[1000] = 32767  # so that the power of two is that of 16 bits
    expected = detector.score(loud, RATE).score
    for units in (loud.astype(np.float32), loud.astype(np.float64)):
        found = detector.score(units, RATE)
        assert found.score == expected
        assert "scaled" in found.warnings
    assert "scaled" not in detector.score(X, RATE).warnings


def test_int32_of_16_and_24_bits(detector):
    pcm = np.round(X * 32768).astype(np.int16)
    expected = detector.score(pcm, RATE).score
    for wide in (pcm.astype(np.int32), pcm.astype(np.int32) << 8, pcm.astype(np.int32) << 16):
        assert detector.score(wide, RATE).score == expected


def test_a_file_far_beyond_full_scale_is_scaled(detector):
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, X * 20, RATE, "FLOAT", format="WAV")
    found = detector.score(out)
    peak = float(np.abs(X * 20)[:176_400].max())
    assert 2 < peak <= 16
    assert "scaled" in found.warnings
    quiet = detector.score(X * np.float32(20) * np.float32(2.0 ** -np.ceil(np.log2(peak))), RATE)
    assert found.segments[0].score == quiet.segments[0].score


def test_a_little_beyond_full_scale_is_told(detector):
    pcm = X.copy()
    pcm[500] = 1.5
    assert "clipped" in detector.score(pcm, RATE).warnings


def test_big_endian_arrays(detector, score):
    pcm = np.round(X * 32768).astype(np.int16)
    expected = detector.score(pcm, RATE).score
    for kind in (">i2", ">i4"):
        wide = pcm.astype(kind) if kind == ">i2" else (pcm.astype(np.int32) << 16).astype(kind)
        assert detector.score(wide, RATE).score == expected
    for kind in (">f4", ">f8"):
        assert detector.score(X.astype(kind), RATE).score == score


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
def test_bytes_are_no_samples(detector, make):
    data = make(np.round(X * 32768).astype(np.int16).tobytes())
    with pytest.raises(TypeError, match="frombuffer"):
        detector.score(data, RATE)
    with pytest.raises(TypeError, match="frombuffer"):
        list(detector.score_many([(data, RATE)]))


class Tensor:
    """An array of another library, whose dtype is none of NumPy's."""

    dtype = "torch.float32"

    def __init__(self, samples: np.ndarray):
        self._samples = samples

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._samples if dtype is None else self._samples.astype(dtype)


class OnDevice(Tensor):
    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise RuntimeError("can't convert cuda:0 device type tensor to numpy")


def test_arrays_of_other_libraries(detector, score):
    assert detector.score(Tensor(X), RATE).score == score
    found = dict(detector.score_many([(Tensor(X), RATE), (X.tolist(), RATE), (X, RATE)]))
    assert [found[k].score for k in range(3)] == [score] * 3
    with pytest.raises(TypeError, match=r"OnDevice.*cuda:0"):
        detector.score(OnDevice(X), RATE)
    with pytest.raises(ValueError, match="sample_rate"):
        detector.score(Tensor(X))


def test_no_channels(detector):
    with pytest.raises(AudioError, match="channels 0"):
        detector.score(np.zeros((1000, 0), np.float32), RATE)


@pytest.mark.parametrize(
    "rate", [44_100.0, np.int64(44_100), np.float32(44_100), np.uint16(44_100)]
)
def test_rates_of_every_type(detector, score, rate):
    found = detector.score(X, rate)
    assert found.score == score
    assert json.loads(results.to_json(found.to_dict()))["sample_rate"] == 44_100


@pytest.mark.parametrize("rate", [44_100.5, True, "44100", None, float("nan"), 2j])
def test_what_is_no_rate(rate):
    with pytest.raises(TypeError, match="sample rate"):
        checked(X, rate)


def test_numbers_of_numpy_make_rows_of_json(path, score):
    detector = Detector(
        path,
        "numpy",
        segments=np.int64(2),
        threshold=np.float32(0.25),
        margin=np.float64(0.1),
        batch_size=np.int32(2),
        jobs=np.int8(1),
        banks=(),
    )
    row = json.loads(results.to_json(detector.score(X, RATE).to_dict()))
    assert (row["plan"], row["threshold"], row["margin"], row["n_segments"]) == (2, 0.25, 0.1, 2)


@pytest.mark.parametrize(
    "option",
    [
        *({"jobs": 0}, {"jobs": 1.5}, {"batch_size": True}, {"segments": np.float64(2)}),
        *({"threshold": True}, {"margin": "0"}, {"margin": float("nan")}),
    ],
)
def test_what_is_no_number(path, option):
    with pytest.raises(ValueError, match=r"at least 1|segments|no number|not a number"):
        Detector(path, "numpy", **option)


def test_more_segments_than_there_are(detector, path):
    many = Detector(path, "numpy", segments=10**12, banks=())
    assert len(many.score(X, RATE).segments) == 64
    assert len(many.score(X[:RATE], RATE).segments) == 1


# --- Sources --------------------------------------------------------------------------------------


def test_one_stream_given_twice(detector):
    stream = io.BytesIO(encode(noise(9), "flac"))
    alone = detector.score(stream)
    found = dict(detector.score_many([stream] * 4))
    assert [found[k].score for k in range(4)] == [alone.score] * 4


def test_text_files_are_told(detector, tmp_path):
    (tmp_path / "a.wav").write_bytes(encode(noise(1), "wav"))
    with (
        open(tmp_path / "a.wav", encoding="latin-1") as file,
        pytest.raises(AudioError, match="'rb'"),
    ):
        detector.score(file)
    with pytest.raises(AudioError, match="'rb'"):
        detector.score(io.StringIO("RIFF"))


def test_the_bytes_of_a_file_are_no_path(detector):
    with pytest.raises(AudioError) as caught:
        detector.score(encode(noise(1), "wav"))
    assert len(str(caught.value)) < 300
    assert "BytesIO" in str(caught.value)


@pytest.mark.parametrize("one", ["a.wav", b"a.wav", Path("a.wav"), io.BytesIO(), X])
def test_score_many_refuses_a_single_source(detector, one):
    with pytest.raises(TypeError, match="pass a list"):
        detector.score_many(one)


# --- Names, words, copies -------------------------------------------------------------------------


def test_public_names():
    assert {"AudioError", "BackendError", "WeightsError"} <= set(artifactnet_jax.__all__)
    assert artifactnet_jax.AudioError is AudioError
    assert artifactnet_jax.BackendError is BackendError
    words = {"ai", "partly-ai", "unclear", "real", "undecided"}
    assert set(get_args(get_type_hints(Verdict)["verdict"])) == words
    done = subprocess.run(
        [sys.executable, "-m", "artifactnet_jax", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("artifactnet-jax ")


def test_reprs_are_short(detector):
    verdict = detector.score(X, RATE)
    assert "numpy" in repr(detector)
    assert f"{verdict.score:.4f}" in repr(verdict)
    assert max(len(repr(detector)), len(repr(verdict))) < 200


def test_no_message_is_only_a_class():
    with pytest.raises(StopIteration) as caught:
        next(iter(()))
    assert brief(caught.value).startswith("StopIteration in test_door.py, line ")
    assert brief(ValueError("why")) == "ValueError: why"


def test_a_pickle_is_a_fresh_detector(detector, score):
    again = pickle.loads(pickle.dumps(detector))
    assert again.score(X, RATE).score == score
    assert again.backend is not detector.backend


def _child(detector: Detector, queue: Any) -> None:
    try:
        queue.put(detector.score(X, RATE).score)
    except Exception as error:
        queue.put(error)


def forked(detector: Detector) -> Any:
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    process = fork.Process(target=_child, args=(detector, queue))
    process.start()
    try:
        return queue.get(timeout=120)
    finally:
        process.kill()
        process.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")
@pytest.mark.parametrize("backend", ["numpy", "onnxruntime"])
def test_a_forked_child_scores(path, backend):
    if backend != "numpy":
        pytest.importorskip(backend)
        pytest.importorskip("onnx")
    detector = Detector(path, backend, banks=())
    assert forked(detector) == detector.score(X, RATE).score
    assert forked(detector) == detector.score(X, RATE).score


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_other_backends_say_why_not(path, monkeypatch):
    detector = Detector(path, "numpy", banks=())
    detector.backend.name = "xla"
    monkeypatch.setattr(detector, "_process", -1)
    with pytest.raises(BackendError, match="spawn"):
        detector.score(X, RATE)


# --- jax's environment ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "variable", ["JAX_DISABLE_JIT=1", "JAX_TRANSFER_GUARD=disallow", "JAX_PLATFORMS=tpu"]
)
def test_variables_of_jax(path, tmp_path, variable):
    pytest.importorskip("jax")
    (tmp_path / "a.wav").write_bytes(encode(noise(5), "wav"))
    name, _, value = variable.partition("=")
    run = [sys.executable, "-m", "artifactnet_jax", "score", "-q", "--format", "jsonl"]
    run += ["--backend", "xla", "--weights", str(path), str(tmp_path / "a.wav")]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, name: value})
    if name == "JAX_PLATFORMS":
        assert done.returncode == 3
        assert "JAX_PLATFORMS" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["score"] is not None


# --- Privacy --------------------------------------------------------------------------------------

# A process in which socket(2) ends it: Python's, and that of any library's threads.
NO_SOCKETS = """
import ctypes, struct, sys
def refuse_sockets():
    numbers = [41] if sys.argv[1] == "x86_64" else [198]
    code = [(0x20, 0, 0, 0)]  # load the number of the call
    for number in numbers:
        code += [(0x15, 0, 1, number), (0x06, 0, 0, 0x80000000)]  # equal: kill the process
    code += [(0x06, 0, 0, 0x7FFF0000)]  # allow
    text = b"".join(struct.pack("HBBI", *line) for line in code)
    program = ctypes.create_string_buffer(text)
    class Program(ctypes.Structure):
        _fields_ = [("n", ctypes.c_ushort), ("code", ctypes.c_void_p)]
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
    held = Program(len(code), ctypes.addressof(program))
    assert libc.prctl(22, 2, ctypes.byref(held)) == 0, ctypes.get_errno()
refuse_sockets()
"""
SCORES = """
from artifactnet_jax.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="seccomp"
)
@pytest.mark.parametrize("backend", ["numpy", "onnxruntime"])
def test_nothing_leaves_the_machine(path, tmp_path, backend):
    if backend != "numpy":
        pytest.importorskip(backend)
        pytest.importorskip("onnx")
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "a.wav").write_bytes(encode(noise(5), "wav"))
    env = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "CI")}
    env |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home)}
    env |= {"PYTHONDONTWRITEBYTECODE": "1"}
    start = [sys.executable, "-c"]
    control = [*start, NO_SOCKETS + "import socket; socket.socket()", platform.machine()]
    assert subprocess.run(control, env=env).returncode < 0  # or the test could not fail
    arguments = ["score", "-q", "--format", "jsonl", "--backend", backend]
    arguments += ["--weights", str(path), str(tmp_path / "a.wav")]
    run = [*start, NO_SOCKETS + SCORES, platform.machine(), *arguments]
    done = subprocess.run(run, capture_output=True, text=True, env=env, cwd=home)
    assert (done.returncode, done.stderr) == (0, "")
    made = {str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()}
    assert all(name.startswith("cache/artifactnet-jax/") for name in made), made


def test_telemetry_is_off_before_anything_is_imported():
    code = "import artifactnet_jax, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "1\n"


def test_failures_have_short_names(detector):
    (result,) = [found for _, found in detector.score_many([b"x" * 10_000])]
    assert isinstance(result, Failure)
    assert len(result.path) < 100
    assert threading.active_count() < 50
