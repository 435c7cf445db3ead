"""Teachers of phase distill, and the verb that computes their residuals."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import soundfile
from conftest import Command

from artifactnet_jax.data import teachers
from artifactnet_jax.data.teachers import Builtin, HTDemucsOnnx, Teacher, open_teacher
from artifactnet_jax.text import NO_BACKEND, SOME_FAILED, USAGE, CommandError
from artifactnet_jax.train import residuals
from audio_files import noise, write

RATE = 44_100


def whole(teacher: Teacher, audio: np.ndarray) -> np.ndarray:
    """The residual of a track in one piece."""
    blocks = list(teacher.residual(audio))
    assert all(block.dtype == np.float32 and block.ndim == 1 for block in blocks)
    residual = np.concatenate(blocks)
    assert residual.shape == audio.shape[:1]
    return residual


# --- built in --------------------------------------------------------------------------------


def test_builtin_is_half_of_what_both_medians_leave():
    audio = noise(0.7)
    mono = audio.mean(axis=1) / 32768
    # All of the recording at once, in float64, on frames that start at multiples of the hop.
    n_fft, hop, around = 2048, 512, 19 * 512
    wide = np.pad(mono, around, mode="reflect")
    wide = np.pad(wide, (0, -len(wide) % hop))
    window = scipy.signal.get_window("hann", n_fft)
    starts = range(0, len(wide) - n_fft + 1, hop)
    spectrum = np.array([np.fft.rfft(window * wide[k : k + n_fft]) for k in starts])
    size = np.abs(spectrum)
    tones = scipy.ndimage.median_filter(size, (31, 1), mode="mirror")
    clicks = scipy.ndimage.median_filter(size, (1, 31), mode="mirror")
    target = np.minimum(np.minimum(tones, clicks), size) / 2
    frames = np.fft.irfft(target * np.exp(1j * np.angle(spectrum)))
    sums = np.zeros((2, len(wide)))
    for k, frame in zip(starts, frames, strict=True):
        sums[:, k : k + n_fft] += window * frame, window**2
    expected = (sums[0] / np.maximum(sums[1], 1e-9))[around : around + len(mono)]
    np.testing.assert_allclose(whole(Builtin(), audio), expected, rtol=0, atol=2e-7)


def test_builtin_does_not_depend_on_blocks_or_channels(monkeypatch):
    audio = noise(2.3)
    one = whole(Builtin(), audio)
    monkeypatch.setattr(Builtin, "BLOCK", 37)
    np.testing.assert_allclose(whole(Builtin(), audio), one, rtol=0, atol=1e-7)
    mono = audio.mean(axis=1, keepdims=True, dtype=np.float32) / np.float32(32768)
    np.testing.assert_allclose(whole(Builtin(), mono), one, rtol=0, atol=1e-7)


def test_builtin_keeps_noise_and_drops_tones_and_clicks():
    n = 4 * RATE
    parts = {
        "tone": 0.3 * np.sin(2 * np.pi * 1_000 * np.arange(n) / RATE),
        "clicks": np.where(np.arange(n) % 11_025 == 5_000, 0.9, 0.0),
        "noise": 0.003 * np.random.default_rng(0).standard_normal(n),
    }
    mix = sum(parts.values())
    residual = whole(Builtin(), mix[:, None].astype(np.float32))
    gains = dict(
        zip(parts, np.linalg.lstsq(np.array([*parts.values()]).T, residual)[0], strict=True)
    )
    assert gains["tone"] < 0.01
    assert gains["clicks"] < 0.1
    assert 0.2 < gains["noise"] < 0.5
    assert np.sum(residual**2) < 0.01 * np.sum(mix**2)


@pytest.mark.parametrize("samples", [1, 2, 513, 30_000])
def test_builtin_takes_any_length_and_keeps_silence(samples):
    assert np.isfinite(whole(Builtin(), noise(samples / RATE))).all()
    assert not whole(Builtin(), np.zeros((samples, 2), np.int16)).any()


# --- separators ------------------------------------------------------------------------------

SEGMENT = 12_000  # samples of the tiny graphs: no multiple of the hop


def save_graph(path: Path, frequency: float, time: float, segment: int = SEGMENT) -> Path:
    """An HTDemucs graph whose two stems add up to these parts of its two inputs."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    frames = -(-segment // 1024)
    shape = {"mix": [1, 2, segment], "spectrogram": [1, 4, 2048, frames]}
    nodes, constants = [], []
    for name, gain in (("mix", time), ("spectrogram", frequency)):
        shares = np.array([0.25, 0.75], np.float32) * np.float32(gain)
        shares = shares.reshape(1, 2, *[1] * (len(shape[name]) - 1))
        constants.append(numpy_helper.from_array(shares, f"{name}_shares"))
        constants.append(numpy_helper.from_array(np.array([1]), f"{name}_axis"))
        nodes.append(helper.make_node("Unsqueeze", [name, f"{name}_axis"], [f"{name}_wide"]))
        nodes.append(helper.make_node("Mul", [f"{name}_wide", f"{name}_shares"], [f"{name}_out"]))

    def tensor(name: str, dims: list[int]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)

    graph = helper.make_graph(
        nodes,
        "tiny",
        [tensor(name, dims) for name, dims in shape.items()],
        [tensor(f"{name}_out", [1, 2, *dims[1:]]) for name, dims in shape.items()],
        constants,
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def smooth(samples: int) -> np.ndarray:
    """Float32 [n, 2] without the highest frequencies, which HTDemucs' spectrogram leaves out."""
    rng = np.random.default_rng(samples)
    slow = scipy.ndimage.gaussian_filter1d(rng.standard_normal((samples, 2)), 8, axis=0)
    slow *= np.minimum(1, np.minimum(np.arange(samples), np.arange(samples)[::-1]) / 800)[:, None]
    return slow.astype(np.float32)


def test_htdemucs_spectrogram_of_a_cosine():
    # Bin 100 of 4096, left only; the frame j is centred on sample 512 + 1024 j.
    phase = 0.4
    mix = np.zeros((2, 8 * 1024), np.float32)
    mix[0] = np.cos(2 * np.pi * 100 / 4096 * np.arange(8 * 1024) + phase)
    spectrogram = teachers._spectrogram(mix)
    assert spectrogram.shape == (1, 4, 2048, 8)
    assert spectrogram.dtype == np.float32
    assert not spectrogram[0, 2:].any()
    # Half the amplitude, times the sum of a Hann window, over the square root of its length. Each
    # frame's phase is that of its first sample, 1024 j - 1536.
    j = np.arange(2, 6)  # clear of the ends
    angle = 2 * np.pi * 100 / 4096 * (1024 * j - 1536) + phase
    found = spectrogram[0, 0, 100, 2:6] + 1j * spectrogram[0, 1, 100, 2:6]
    np.testing.assert_allclose(found, 0.5 * 2048 / 64 * np.exp(1j * angle), atol=1e-3)


@pytest.mark.parametrize("samples", [3_000, SEGMENT * 3 // 4])  # no second segment
def test_onnx_separator_round_trip(tmp_path, samples):
    teacher = open_teacher(os.fspath(save_graph(tmp_path / "tiny.onnx", 0.5, 0.25)))
    assert "personal and research use" in teacher.note
    # Four frames cover a sample, at the ends of a segment some of them are not among its own.
    cover = np.zeros(1536 + 15 * 1024)
    for start in range(0, 12 * 1024, 1024):
        cover[start : start + 4096] += scipy.signal.get_window("hann", 4096) ** 2 / 1.5
    left = (SEGMENT - samples) // 2  # the recording is in the middle of its segment
    gain = 1 - 0.25 - 0.5 * cover[1536 + left : 1536 + left + samples]
    audio = smooth(samples)
    expected = gain * audio.mean(axis=1)
    np.testing.assert_allclose(whole(teacher, audio), expected, rtol=0, atol=1e-5)
    mono = np.round(8000 * audio[:, :1]).astype(np.int16)
    expected = gain * mono[:, 0] / 32768
    np.testing.assert_allclose(whole(teacher, mono), expected, rtol=0, atol=1e-5)


def test_onnx_separator_of_many_segments(tmp_path):
    audio = noise(1.7)
    teacher = open_teacher(os.fspath(save_graph(tmp_path / "tiny.onnx", 0, 0.7)))
    expected = 0.3 * audio.mean(axis=1) / 32768
    np.testing.assert_allclose(whole(teacher, audio), expected, rtol=0, atol=1e-6)
    assert not whole(teacher, np.zeros_like(audio)).any()


def test_overlap_add_weighs_segments_by_triangles():
    segment, samples = 8, 15  # stride 6: segments at 0, 6, and 12 with three samples

    def separate(mix: np.ndarray) -> np.ndarray:
        return mix - np.arange(segment)  # a residual that tells where in its segment it was made

    audio = np.ones((samples, 1), np.float32)
    found = np.concatenate(list(teachers._overlap_add(audio, segment, separate)))
    triangle = [1, 2, 3, 4, 4, 3, 2, 1]
    expected = np.arange(samples, dtype=np.float64) % 6
    for place in (6, 7):  # the end of the first one, and the start of the second
        weight = np.array([triangle[place], triangle[place - 6]])
        expected[place] = weight @ [place, place - 6] / weight.sum()
    # The last one is the middle of the samples from 10 to 17. Its weights are those of its start.
    for k, place in enumerate((12, 13, 14)):
        late = k + 2
        earlier = place - 6
        if earlier < segment:
            weight = np.array([triangle[earlier], triangle[k]])
            expected[place] = weight @ [earlier, late] / weight.sum()
        else:
            expected[place] = late
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_digests_tell_weights_and_settings_apart(tmp_path, monkeypatch):
    one, same = (save_graph(tmp_path / name, 0.5, 0.25) for name in ("a.onnx", "b.onnx"))
    other = save_graph(tmp_path / "c.onnx", 0.5, 0.3)
    digests = [open_teacher(str(path)).digest for path in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]
    before = Builtin().digest
    monkeypatch.setattr(Builtin, "WIDTH", 17)
    assert Builtin().digest != before == before


def error_of(function: Callable[[], Any]) -> CommandError:
    with pytest.raises(CommandError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return caught.value


def test_teachers_that_cannot_be_had(tmp_path, monkeypatch):
    assert error_of(lambda: open_teacher("spleeter")).code == USAGE
    assert error_of(lambda: open_teacher("builtin", "folder")).code == USAGE
    missing = error_of(lambda: open_teacher("none.onnx"))
    assert (missing.code, "No such file" in str(missing)) == (USAGE, True)
    (tmp_path / "text.onnx").write_text("not a graph")
    assert "cannot open it" in str(error_of(lambda: open_teacher(f"{tmp_path}/text.onnx")))
    import onnx

    for number in (0, 1):  # of the mix, and of the spectrogram
        graph = onnx.load(save_graph(tmp_path / "odd.onnx", 0.5, 0.5))
        graph.graph.input[number].type.tensor_type.shape.dim[1].dim_value = 3
        onnx.save(graph, tmp_path / "odd.onnx")
        assert error_of(lambda: open_teacher(f"{tmp_path}/odd.onnx")).code == USAGE
    for package, spec in (("torch", "demucs"), ("onnxruntime", f"{tmp_path}/odd.onnx")):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        error = error_of(lambda spec=spec: open_teacher(spec))
        assert (error.code, "pip install" in str(error)) == (NO_BACKEND, True)


# --- the demucs package, where it is installed -------------------------------------------------


@pytest.fixture
def small_model(tmp_path: Path) -> Any:
    """An HTDemucs of half a second with random weights, also in tmp_path/weights: small."""
    pytest.importorskip("demucs")
    import torch
    from demucs.htdemucs import HTDemucs

    kwargs = {
        "sources": ["drums", "bass", "other", "vocals"],
        "channels": 8,
        "depth": 3,
        "t_layers": 1,
        "t_heads": 2,
        "bottom_channels": 32,
        "segment": 0.5,
    }
    folder = tmp_path / "weights"
    folder.mkdir()
    for seed, name in enumerate(("other", "small")):
        torch.manual_seed(seed)
        model = HTDemucs(**kwargs).eval()
        with torch.no_grad():  # else its biases are zero, and much would be hidden
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        package = {"klass": HTDemucs, "args": (), "kwargs": kwargs, "state": model.state_dict()}
        torch.save(package, folder / f"{name}.th")
    shares = "weights: [[1, 2, 3, 4], [4, 3, 2, 1]]"
    (folder / "bag.yaml").write_text(f"models: [small, other]\n{shares}")
    return model


def applied(model: Any, audio: np.ndarray) -> np.ndarray:
    """The residual as the package itself would have it."""
    import torch
    from demucs.apply import apply_model

    mix = torch.from_numpy(np.ascontiguousarray(audio.T))
    with torch.inference_mode():
        stems = apply_model(model, mix[None], shifts=0, split=True, overlap=0.25)[0]
    return (mix - stems.sum(dim=0)).mean(dim=0).numpy()


@pytest.mark.parametrize("samples", [3_000, 22_050, 60_123])
@pytest.mark.parametrize("name", ["small", "bag"])
def test_demucs_is_what_its_package_applies(small_model, tmp_path, name, samples):
    from demucs.pretrained import get_model

    teacher = open_teacher(f"demucs:{name}", f"{tmp_path}/weights")
    audio = noise(samples / RATE).astype(np.float32) / np.float32(32768)
    model = get_model(name, repo=tmp_path / "weights")
    np.testing.assert_allclose(whole(teacher, audio), applied(model, audio), rtol=0, atol=1e-5)
    assert teacher.digest == open_teacher(f"demucs:{name}", f"{tmp_path}/weights").digest


@pytest.mark.parametrize("samples", [3_000, 22_050, 60_123])
def test_onnx_separator_is_what_the_package_applies(small_model, samples, monkeypatch):
    import torch

    def network(_: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """What an ONNX file of the model would hold: all but its STFT, in and out."""
        seen = []
        given = torch.from_numpy(feeds["spectrogram"])
        monkeypatch.setattr(small_model, "_magnitude", lambda z: given)
        monkeypatch.setattr(small_model, "_mask", lambda z, m: seen.append(m))
        monkeypatch.setattr(small_model, "_ispec", lambda z, length: 0)
        with torch.inference_mode():
            waves = small_model(torch.from_numpy(feeds["mix"]))
        monkeypatch.undo()
        return [seen[0].numpy(), waves.numpy()]

    teacher = HTDemucsOnnx.__new__(HTDemucsOnnx)
    teacher._segment = 22_050
    teacher._names = "mix", "spectrogram", "spectra", "waves"
    teacher._session = SimpleNamespace(run=network)
    audio = noise(samples / RATE).astype(np.float32) / np.float32(32768)
    expected = applied(small_model, audio)
    np.testing.assert_allclose(whole(teacher, audio), expected, rtol=0, atol=1e-5)


def test_demucs_without_weights(small_model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    assert error_of(lambda: open_teacher("demucs", f"{tmp_path}/none")).code == USAGE
    error = error_of(lambda: open_teacher("demucs:big", f"{tmp_path}/weights"))
    assert (error.code, "--teacher-weights" in str(error)) == (USAGE, True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert error_of(lambda: open_teacher("demucs")).code == USAGE


# --- the verb --------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A manifest of a mono and two stereo recordings, one of them silent."""
    write(tmp_path, "a.wav", noise(1.5, channels=1))
    write(tmp_path, "b.flac", noise(0.5, seed=1))
    write(tmp_path, "silent.wav", np.zeros((RATE // 4, 2), np.int16))
    path = tmp_path / "data.csv"
    path.write_text("path,label,origin\na.wav,1,x\nb.flac,0,y\nsilent.wav,0,z\n")
    return path


@pytest.fixture
def run(command: Command, tmp_path: Path, data: Path) -> Command:
    """`artifactnet-jax residuals` into tmp_path/out."""

    def run(*args: Any) -> Any:
        paths = ("--data", data, "--out", tmp_path / "out", "--cache", tmp_path / "cache")
        return command("residuals", *paths, *args)

    return run


def manifest(tmp_path: Path) -> dict[str, dict[str, str]]:
    """What was written, by the name of the recording."""
    with open(tmp_path / "out" / "manifest.csv", newline="") as file:
        return {Path(row["path"]).name: row for row in csv.DictReader(file)}


def stored(tmp_path: Path, name: str) -> Path:
    return tmp_path / "out" / manifest(tmp_path)[name]["residual"]


def test_residuals_of_a_manifest(run, tmp_path, data):
    data.write_text(data.read_text() + "none.wav,0,-\n")
    outcome = run()
    assert outcome.code == SOME_FAILED
    assert "none.wav" in outcome.err
    rows = manifest(tmp_path)
    assert list(rows) == ["a.wav", "b.flac", "silent.wav"]
    assert [(row["label"], row["origin"]) for row in rows.values()] == [
        ("1", "x"),
        ("0", "y"),
        ("0", "z"),
    ]
    fractions = {}
    for name in rows:
        audio, rate = soundfile.read(tmp_path / name, always_2d=True, dtype="int16")
        assert rate == RATE
        found = np.load(stored(tmp_path, name))
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, whole(Builtin(), audio), rtol=2**-11, atol=2**-25)
        energy = np.sum((audio.mean(axis=1) / 32768) ** 2)
        fractions[name] = np.sum(found.astype(np.float64) ** 2) / energy if energy else None
    assert not np.load(stored(tmp_path, "silent.wav")).any()
    assert "3 done, 0 kept, 1 failed; 0.00 h" in outcome.out
    figures = outcome.out.splitlines()[1].replace("%", "").replace(",", " ").split()
    found = {name: float(figures[figures.index(name) + 1]) / 100 for name in ("all", "real", "ai")}
    assert found["ai"] == pytest.approx(fractions["a.wav"], rel=1e-2)
    assert found["real"] == pytest.approx(fractions["b.flac"], rel=1e-2)
    assert found["all"] == pytest.approx((found["ai"] + found["real"]) / 2, rel=1e-2)


def test_residuals_go_on(run, tmp_path):
    assert run().code == 0
    before = {name: stored(tmp_path, name) for name in ("a.wav", "b.flac", "silent.wav")}
    content = {name: path.read_bytes() for name, path in before.items()}
    times = {name: path.stat().st_mtime_ns for name, path in before.items()}
    before["b.flac"].unlink()
    before["silent.wav"].write_bytes(content["silent.wav"][:-2])  # damaged
    with open(tmp_path / "out" / "tracks.jsonl", "a") as file:
        file.write('{"key": "torn')
    outcome = run()
    assert (outcome.code, "resume: 1 done, 2 to do" in outcome.err) == (0, True)
    assert "2 done, 1 kept, 0 failed" in outcome.out
    assert {name: path.read_bytes() for name, path in before.items()} == content
    assert before["a.wav"].stat().st_mtime_ns == times["a.wav"]
    write(tmp_path, "b.flac", noise(0.6, seed=2))  # another recording of that name
    outcome = run("-q")
    assert (outcome.code, outcome.err) == (0, "")
    assert "1 done, 2 kept, 0 failed" in outcome.out
    assert len(np.load(stored(tmp_path, "b.flac"))) == round(0.6 * RATE)


def test_residuals_interrupted(run, tmp_path, monkeypatch):
    real = Builtin.residual
    asked = []

    def interrupted(self: Builtin, audio: np.ndarray) -> Iterator[np.ndarray]:
        asked.append(len(audio))
        for block in real(self, audio):
            yield block
            if len(asked) == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Builtin, "residual", interrupted)
        patch.setattr(Builtin, "parallel", False)
        assert run().code == 130
    assert list(manifest(tmp_path)) == ["a.wav"]
    assert len(list((tmp_path / "out" / "residuals").iterdir())) == 1  # nothing half-written
    outcome = run()
    assert (outcome.code, "2 done, 1 kept, 0 failed" in outcome.out) == (0, True)
    assert list(manifest(tmp_path)) == ["a.wav", "b.flac", "silent.wav"]


def test_residuals_of_another_teacher_need_another_folder(run, tmp_path, monkeypatch):
    assert run().code == 0
    graph = save_graph(tmp_path / "tiny.onnx", 0.5, 0.25)
    outcome = run("--teacher", graph)
    assert (outcome.code, "teacher builtin there" in outcome.err) == (USAGE, True)
    assert "--out" in outcome.err
    monkeypatch.setattr(Builtin, "SHARE", 0.4)
    outcome = run()
    assert (outcome.code, "another run (digest" in outcome.err) == (USAGE, True)
    (tmp_path / "out" / "teacher.json").write_text("{")
    assert run().code == USAGE


def test_residuals_by_an_onnx_file(run, tmp_path):
    outcome = run("--teacher", save_graph(tmp_path / "tiny.onnx", 0.5, 0.25))
    assert (outcome.code, "personal and research use" in outcome.err) == (0, True)
    said = json.loads((tmp_path / "out" / "teacher.json").read_text())
    assert said["teacher"] == "htdemucs-onnx"
    # A broken graph fails its tracks; a silent one needs no graph.
    broken = save_graph(tmp_path / "nan.onnx", 0.5, np.nan)
    outcome = run("--teacher", broken, "--out", tmp_path / "other", "-q")
    assert (outcome.code, outcome.err.count("not finite")) == (SOME_FAILED, 2)
    assert "1 done, 0 kept, 2 failed" in outcome.out


def test_residuals_that_cannot_be_made(run, tmp_path, data, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(residuals.os, "replace", full)
        outcome = run("--out", tmp_path / "full")
    assert (outcome.code, "No space left" in outcome.err) == (SOME_FAILED, True)
    assert run("--data", tmp_path / "none.csv").code == USAGE
    assert run("--out", data).code == USAGE
    assert run("--teacher", "spleeter").code == USAGE
    assert run().code == 0
    outcome = run("--data", tmp_path / "out" / "manifest.csv")
    assert (outcome.code, "what the command writes" in outcome.err) == (USAGE, True)
    data.write_text("path,label\nnone.wav,0\n")
    outcome = run("--out", tmp_path / "nothing")
    assert (outcome.code, "none of the 1 tracks" in outcome.err) == (SOME_FAILED, True)
    assert not (tmp_path / "nothing" / "manifest.csv").exists()
