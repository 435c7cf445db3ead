"""`bench throughput`: its statistics, its schema, what it says of bad input; never its speed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from artifactnet_jax import backends
from artifactnet_jax.bench import figures, machine, processes, stages, throughput
from artifactnet_jax.bench.candidates import (
    Outcome,
    backend_of,
    calls,
    generate,
    music,
    onnx_peer,
    ours,
)
from artifactnet_jax.bench.rounds import Reading, interleaved, percentiles, ratios
from artifactnet_jax.config import Config, UNet
from artifactnet_jax.results import Failure
from artifactnet_jax.text import CommandError
from artifactnet_jax.weights import Weights, load_weights, random_tensors
from audio_files import noise, write
from tiny_model import TINY, save_tiny

# --- Statistics -----------------------------------------------------------------------------------


def test_percentiles_by_hand():
    found = percentiles([40, 10, 30, 20, 50])  # order statistics at 0, 25, 50, 75, 100 %
    assert found == {"n": 5, "p50": 30, "p90": 46, "p99": pytest.approx(49.6), "min": 10, "max": 50}
    single = percentiles([7.0])
    assert {single[key] for key in ("p50", "p90", "p99", "min", "max")} == {7.0}


def test_percentiles_against_the_standard_library():
    values = np.random.default_rng(0).lognormal(size=101).tolist()
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    found = percentiles(values)
    assert [found[p] for p in ("p50", "p90", "p99")] == pytest.approx(
        [cuts[49], cuts[89], cuts[98]]
    )


def test_ratios_pair_the_rounds():
    # Of totals the ratio would be 35 / 17, of medians 10 / 4.
    assert ratios([10, 20, 5], [5, 4, 8]) == {
        "median": 2.0,
        "min": 0.625,
        "max": 5.0,
        "rounds": [2.0, 5.0, 0.625],
    }
    with pytest.raises(ValueError, match="shorter"):
        ratios([1, 2], [1])


class FakeClock:
    """Clocks that only move when an action says so."""

    def __init__(self) -> None:
        self.at = Reading(100.0, 50.0, 7.0)
        self.order: list[str] = []

    def __call__(self) -> Reading:
        return self.at

    def action(self, name: str, *walls: float):
        left = iter(walls)

        def act() -> str:
            self.order.append(name)
            wall = next(left)
            self.at = Reading(self.at.wall_s + wall, self.at.cpu_s + wall / 2, self.at.joules + 1)
            return name.upper()

        return act


def test_interleaved_rounds_on_a_fake_clock():
    clock, told = FakeClock(), []
    # The machine slows down threefold: "b" is twice as fast as "a" in every round all the same.
    actions = {"a": clock.action("a", 2, 4, 6), "b": clock.action("b", 1, 2, 3)}
    done = interleaved(actions, 3, clock, told.append)
    assert clock.order == ["a", "b", "b", "a", "a", "b"]
    assert [taken for taken, _ in done["a"]] == [(2, 1, 1), (4, 2, 1), (6, 3, 1)]
    assert {returned for _, returned in done["b"]} == {"B"}
    walls = {name: [taken.wall_s for taken, _ in runs] for name, runs in done.items()}
    assert ratios(walls["a"], walls["b"])["rounds"] == [2, 2, 2]
    assert told == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]


def test_without_a_counter_of_energy_there_is_none():
    done = interleaved({"a": lambda: None}, 1, lambda: Reading(0, 0, None), lambda text: None)
    assert done["a"][0][0].joules is None


# --- Parity ---------------------------------------------------------------------------------------


def of(**outcomes):
    return throughput.Pass(outcomes, {})


def test_parity_by_hand():
    reference = of(
        a=Outcome("ai", 0.75, (0.5, 1.0)),
        b=Outcome("real", 0.25, (0.25,)),
        c=Failure("c", "decode", "damaged"),
    )
    other = of(
        a=Outcome("ai", 0.625, (0.75, 1.0)),
        b=Outcome("ai", 0.5, (0.5,)),
        c=Outcome("ai", 1.0, (1.0,)),
    )
    assert throughput.parity(reference, other) == {
        "tracks": 2,
        "track_score": 0.25,
        "segment_score": 0.25,
        "flips": 1,
    }


def test_parity_with_what_shows_no_segments():
    found = throughput.parity(of(a=Outcome("ai", 0.75, ())), of(a=Outcome("ai", 0.5, (0.5,))))
    assert (found["track_score"], found["segment_score"]) == (0.25, None)
    nothing = throughput.parity(of(a=Failure("a", "model", "")), of(a=Outcome("ai", 0.5, ())))
    assert (nothing["tracks"], nothing["track_score"]) == (0, None)


# --- Work and limits ------------------------------------------------------------------------------


def test_traffic_of_a_convolution_by_hand():
    moved, config = stages.traffic(Config.v94()), Config.v94()
    assert moved["total"] == moved["unet"] + moved["cnn"]
    # The CNN: input, output, kernel and bias of four convolutions, ReLU and pools between them.
    values, c, h, w = 0, 7, 128, 345
    for level, o in enumerate(config.cnn.widths):
        values += c * h * w + o * h * w + 9 * c * o + o
        values += 2 * o * h * w  # ReLU
        c = o
        if level < 3:
            values += o * h * w + o * (h // 2) * (w // 2)
            h, w = h // 2, w // 2
    values += c * h * w + c  # mean
    values += 2 * c  # flatten
    values += c + 128 + c * 128 + 128 + 2 * 128  # hidden, ReLU
    values += 128 + 1 + 128 + 1
    assert moved["cnn"] == 4 * values


def test_roofline_by_hand():
    # 100 MFLOP and 50 MB in 10 ms: 10 GFLOP/s, 5 GB/s, 2 FLOP per byte.
    work = {"unet": 80_000_000, "cnn": 20_000_000, "total": 100_000_000}
    moved = {"unet": 40_000_000, "cnn": 200_000, "total": 50_000_000}
    limits = {
        "1": {"gflops": 40.0, "gbytes_per_s": 10.0},
        "2": {"gflops": 80.0, "gbytes_per_s": 20.0},
    }
    row = {"ms_per_segment": 10.0, "cores": 2, "stages": {"ms": {"unet": 8, "cnn": 2}}}
    row["stages"]["threads"] = 1
    total, unet, cnn = stages.roofline(work, moved, row, limits)
    assert (total["part"], total["threads"], total["gflops"]) == ("total", 2, 10)
    assert (total["gbytes_per_s"], total["flop_per_byte"], total["bound"]) == (5, 2, "memory")
    assert (total["of_peak"], total["of_bandwidth"], total["of_attainable"]) == (0.125, 0.25, 0.25)
    assert (unet["gflops"], unet["of_attainable"], unet["bound"]) == (10, 0.5, "memory")
    assert (cnn["flop_per_byte"], cnn["of_attainable"], cnn["bound"]) == (100, 0.25, "compute")
    row["stages"] = None
    assert [part["part"] for part in stages.roofline(work, moved, row, limits)] == ["total"]


def test_peaks_count_operations_and_bytes(monkeypatch):
    monkeypatch.setattr(machine, "_best", lambda action, rounds: 0.5)
    found = machine.peaks(2, matrix=100, copy_bytes=4000)
    assert found == {"threads": 2, "gflops": 2e6 / 0.5 / 1e9, "gbytes_per_s": 16_000 / 0.5 / 1e9}


def test_device_peaks_run():
    pytest.importorskip("jax")
    found = machine.device_peaks(matrix=16, copy_bytes=4000, rounds=1)
    rates = [value for key, value in found.items() if key != "device"]
    assert len(rates) == 4
    assert all(rate > 0 for rate in rates)


# --- The machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        ("RAM 2448/7620MB CPU [1%@729] VDD_IN 5081mW/4978mW VDD_CPU_GPU_CV 560mW/560mW", 5.081),
        ("RAM 1/2MB POM_5V_IN 2532/2532 POM_5V_GPU 40/40", 2.532),
        ("RAM 2448/7620MB (lfb 4x4MB) CPU [1%@729]", None),
    ],
)
def test_power_in_a_line_of_tegrastats(line, watts):
    assert machine.tegrastats_watts(line) == watts


def test_energy_of_tegrastats(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tool = tmp_path / "tegrastats"
    tool.write_text("#!/bin/sh\nwhile true; do echo VDD_IN 3000mW/1mW; sleep 0.02; done\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    energy = machine.Energy()
    try:
        assert energy.source == "tegrastats"
        deadline = time.monotonic() + 20
        while not energy.joules() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert energy.joules()
    finally:
        energy.close()


def test_a_commit_is_that_of_the_projects_own_checkout(tmp_path, monkeypatch):
    sha = machine.commit()
    root = Path(machine.artifactnet_jax.__file__).resolve().parent.parent
    if (root / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}\+?", sha or "")
    inside = tmp_path / "site-packages" / "artifactnet_jax" / "__init__.py"
    inside.parent.mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(machine.artifactnet_jax, "__file__", str(inside))
    assert machine.commit() is None


def test_a_child_is_measured_by_itself():
    held = np.ones(40_000_000)  # 320 MB that the child has no part in
    found = machine.child(["-c", "x = bytearray(50_000_000); x[::4096] = x[::4096]"])
    assert held.sum() > 0
    assert found["code"] == 0
    assert 50e6 < found["peak_bytes"] < 200e6
    assert found["cpu_s"] > 0
    failed = machine.child(["-c", "import sys; sys.exit('no such thing')"])
    assert (failed["code"], failed["error"]) == (1, "no such thing")


def test_names_of_backends_and_dtypes(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "other-cuda", backends.BACKENDS["numpy"])
    assert backend_of("numpy") == ("numpy", "float32")
    assert backend_of("xla-bfloat16") == ("xla", "bfloat16")
    assert backend_of("other-cuda") == ("other-cuda", "float32")
    assert backend_of("other-cuda-float16") == ("other-cuda", "float16")
    assert backend_of("no-such") == ("no-such", "float32")
    arguments = processes.score_arguments("a.wav", "xla-bfloat16", "w")
    assert arguments[2:] == [
        "score",
        "-q",
        "--backend",
        "xla",
        "--dtype",
        "bfloat16",
        "--weights",
        "w",
        "a.wav",
    ]


def test_baselines_import_what_backends_need():
    assert processes.baseline("numpy") == "import numpy, soundfile"
    assert "jit(lambda x: x + 1)" in processes.baseline("xla-bfloat16")
    for name in backends.BACKENDS:
        compile(processes.baseline(name), name, "exec")


# --- Audio ----------------------------------------------------------------------------------------


def test_generated_audio_repeats(tmp_path, monkeypatch):
    assert np.array_equal(music(1.3, 8000, 1), music(1.3, 8000, 1))
    assert not np.array_equal(music(1.3, 8000, 1), music(1.3, 8000, 2))
    one = music(1.3, 8000, 1)
    assert (one.shape, one.dtype) == ((10_400, 2), np.float32)
    assert 0.05 < np.abs(one).max() < 1
    monkeypatch.setattr("artifactnet_jax.bench.candidates.TRACK_S", 1.5)
    paths = generate(str(tmp_path))
    assert [path.rsplit(".")[-1] for path in paths] == ["flac", "mp3", "wav", "ogg"]


# --- Candidates -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[str]:
    """Two tracks of 3 and 2 segments of the tiny model, the second with silence at its end."""
    folder = tmp_path_factory.mktemp("clips")
    silent = noise(2, seed=1)
    silent[44_100:] = 0
    return [str(write(folder, "a.wav", noise(3))), str(write(folder, "b.flac", silent))]


def onnx_of(tiny: Path, folder: Path, form: str = "segment", batch: int | None = None) -> Path:
    """The same weights as an ONNX file, its batch axis fixed where `batch` says so."""
    pytest.importorskip("onnxruntime")
    export = pytest.importorskip("artifactnet_jax.convert.export")
    model = export.build_onnx(load_weights(tiny), form=form)
    if batch:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = batch
    path = folder / f"{form}-{batch}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_a_peer_scores_as_our_backend(tiny, clips, tmp_path, batch):
    weights = load_weights(tiny)
    theirs = onnx_peer(str(onnx_of(tiny, tmp_path, batch=batch)), weights, "all")
    assert theirs.facts["form"] == "segment"
    assert theirs.batch in ((1, 2, 4, 8) if batch is None else (batch,))
    expected = dict(ours("numpy", weights, "all", None, "numpy").score(clips))
    found = dict(theirs.score(clips))
    assert sorted(found) == [0, 1]
    assert [len(found[i].segments) for i in (0, 1)] == [3, 1]  # silence is not scored
    for index, outcome in found.items():
        assert outcome.segments == pytest.approx(expected[index].segments, abs=1e-3)
        assert outcome.verdict == expected[index].verdict
    assert len(calls(theirs, np.zeros(TINY.front_end.segment_samples), 1, 2)) == 2


def test_a_peer_of_songs_gives_one_score(tiny, clips, tmp_path):
    weights = load_weights(tiny)
    theirs = onnx_peer(str(onnx_of(tiny, tmp_path, "song")), weights, "all")
    assert (theirs.facts["form"], theirs.facts["segments"]) == ("song", "first60")
    found = dict(theirs.score(clips))
    assert [outcome.segments for outcome in found.values()] == [(), ()]
    expected = dict(ours("numpy", weights, "all", None, "numpy").score(clips[:1]))
    assert found[0].score == pytest.approx(expected[0].score, abs=1e-3)


def loudness_model(path: Path, samples: int, last: str) -> Path:
    """audio [batch, samples] -> something of its mean magnitude, by one more operator."""
    helper = pytest.importorskip("onnx.helper")
    pytest.importorskip("onnxruntime")
    numpy_helper = pytest.importorskip("onnx.numpy_helper")
    nodes = [helper.make_node("Abs", ["audio"], ["size"])]
    constants = [numpy_helper.from_array(np.array([1], np.int64), "one")]
    nodes.append(helper.make_node("ReduceMean", ["size", "one"], ["mean"], keepdims=0))
    nodes.append(helper.make_node(last, ["mean", "one"][: 2 if last == "Reshape" else 1], ["p"]))
    graph = helper.make_graph(
        nodes,
        "loudness",
        [helper.make_tensor_value_info("audio", 1, ["batch", samples])],
        [helper.make_tensor_value_info("p", 1, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_a_batch_axis_in_name_only_is_found_out(tiny, tmp_path):
    path = loudness_model(tmp_path / "m.onnx", TINY.front_end.segment_samples, "Reshape")
    theirs = onnx_peer(str(path), load_weights(tiny), "all")
    assert list(theirs.facts["ms_per_segment_by_batch"]) == ["1"]
    assert theirs.batch == 1


def test_a_peer_without_a_finite_score_is_undecided(tiny, clips, tmp_path):
    path = loudness_model(tmp_path / "m.onnx", TINY.front_end.segment_samples, "Acosh")
    theirs = onnx_peer(str(path), load_weights(tiny), "all")
    outcome = dict(theirs.score(clips))[0]
    assert (outcome.verdict, outcome.score) == ("undecided", None)


def test_the_network_in_pytorch(clips):
    torch_network = pytest.importorskip("artifactnet_jax.bench.torch_network", exc_type=ImportError)
    config = dataclasses.replace(
        TINY,
        unet=UNet(widths=(4, 8), bottleneck=8),
        front_end=dataclasses.replace(TINY.front_end, hpss_eps=1e-10),
    )
    weights = Weights("small", config, random_tensors(config), "", "", {})
    assert torch_network.why_not(weights) == ""
    network = torch_network.TorchNetwork(weights)
    audio = np.stack([music(1, 44_100, seed).mean(axis=1) for seed in range(2)])
    own = ours("numpy", weights, "all", None, "numpy")
    assert network(audio) == pytest.approx(own.call(audio), abs=1e-4)
    edge = Weights("edge", Config.edge(), random_tensors(Config.edge()), "", "", {})
    with pytest.raises(ValueError, match="texture head"):
        torch_network.TorchNetwork(edge)


def test_a_peer_of_other_segments_is_refused(tiny, tmp_path):
    path = loudness_model(tmp_path / "m.onnx", 176_400, "Identity")
    with pytest.raises(CommandError, match="segments of 44100 samples") as caught:
        onnx_peer(str(path), load_weights(tiny), "all")
    assert caught.value.code == 2


# --- The command ----------------------------------------------------------------------------------

ROW = {"name", "peer", "backend", "dtype", "batch", "segments", "build_s", "first_call_s", "cores"}
ROW |= {"wall_s", "wall_s_rounds", "cpu_s", "utilisation", "times_real_time", "tracks_per_hour"}
ROW |= {"ms_per_segment", "segment_ms", "device_peak_bytes", "stages", "roofline"}
TOP = {"schema", "machine", "versions", "commit", "settings", "weights", "left_out", "tracks"}
TOP |= {"candidates", "segment_s", "reading_s_per_s", "limits", "energy_from", "comparisons"}
TOP |= {"peak_bytes", "flop_per_segment", "bytes_per_segment", "cold"}


@pytest.fixture
def quick(monkeypatch):
    """Small matrices and few repetitions; no process of its own."""
    peaks = machine.peaks
    monkeypatch.setattr(machine, "peaks", lambda n: peaks(n, matrix=32, copy_bytes=4096, rounds=1))
    monkeypatch.setattr(stages, "ROUNDS", 1)
    monkeypatch.setattr(throughput, "SEGMENT_CALLS", 2)
    run = {"code": 0, "wall_s": 2.0, "cpu_s": 1.0, "peak_bytes": 2**20, "error": ""}
    asked: list[list[str]] = []
    monkeypatch.setattr(processes, "child", lambda arguments: asked.append(arguments) or dict(run))
    return asked


def finite(value) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def test_report_of_a_run_with_a_peer(quick, command, tiny, clips, tmp_path):
    out = tmp_path / "r.json"
    model = onnx_of(tiny, tmp_path)
    options = ("--weights", tiny, "--onnx", model, "--backends", "numpy", "--rounds", "2")
    done = command("bench", "throughput", *clips, *options, "--scenario", "single", "-o", out)
    assert (done.code, done.out) == (0, "")
    found = json.loads(out.read_text())
    assert found["schema"] == throughput.SCHEMA
    assert set(found) == TOP
    assert finite(found)
    theirs, own = found["candidates"]
    assert set(own) == ROW | {"track_s", *(["batch_ms"] if own["batch"] > 1 else [])}
    assert ROW - set(theirs) == set()
    assert (theirs["peer"], own["peer"], own["name"]) == (True, False, "numpy")
    assert own["track_s"]["n"] == 4  # two tracks, two rounds
    assert own["segment_ms"]["n"] == 4
    assert len(own["wall_s_rounds"]) == 2
    assert own["times_real_time"] == pytest.approx(5.0 / statistics.median(own["wall_s_rounds"]))
    assert set(own["stages"]["ms"]) == {"stft", "unet", "hpss", "cnn", "aggregate"}
    (pair,) = found["comparisons"]
    assert (pair["of"], pair["over"]) == (theirs["name"], "numpy")
    expected = [a / b for a, b in zip(theirs["wall_s_rounds"], own["wall_s_rounds"], strict=True)]
    assert pair["speed"]["rounds"] == expected
    assert pair["parity"]["flips"] == 0
    assert pair["parity"]["segment_score"] < 1e-3
    assert [track["segments"] for track in found["tracks"]] == [3, 2]
    (cold,) = found["cold"]
    assert cold["cpu_ratio"]["median"] == 1.0
    assert any("score" in arguments for arguments in quick)

    pytest.importorskip("matplotlib")
    plots = tmp_path / "plots"
    again = command("bench", "throughput", "--from", out, "--table", "--plots", plots)
    assert again.code == 0
    assert {path.name for path in plots.iterdir()} == {"speed.svg", "stages.svg", "roofline.svg"}
    first = (plots / "speed.svg").read_bytes()
    assert command("bench", "throughput", "--from", out, "--plots", plots).code == 0
    assert (plots / "speed.svg").read_bytes() == first
    lines = again.out.splitlines()
    assert sum(line.startswith("| numpy |") for line in lines) >= 3
    widths = [line.count("|") for line in lines if line.startswith("|")]
    assert all(width > 4 for width in widths)


def test_batches_are_compared(quick, command, tiny, clips):
    options = ("--weights", tiny, "--rounds", "1", "--backends", "numpy", "--batch", "1,2,3")
    done = command("bench", "throughput", clips[0], *options)
    assert done.code == 0
    found = json.loads(done.out)
    rows = {row["name"]: row["batch"] for row in found["candidates"]}
    assert rows == {"numpy batch 1": 1, "numpy batch 2": 2, "numpy batch 3": 3}
    assert len(found["comparisons"]) == 3
    # A score does not depend on the batch, bit for bit.
    assert all(row["parity"]["segment_score"] == 0 for row in found["comparisons"])


def test_xla_and_its_stages(quick, command, tiny, clips):
    pytest.importorskip("jax")
    options = ("--weights", tiny, "--rounds", "1", "--backends", "numpy,xla")
    done = command("bench", "throughput", clips[0], *options)
    assert done.code == 0
    found = json.loads(done.out)
    assert [row["name"] for row in found["candidates"]] == ["numpy", "xla"]
    (pair,) = found["comparisons"]
    assert pair["parity"]["track_score"] < 1e-3
    ms = found["candidates"][-1]["stages"]["ms"]
    assert set(ms) == {"transfer", "stft", "unet", "hpss", "cnn", "aggregate"}


def test_stages_of_the_exported_graph(tiny):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    audio = music(1, 44_100, 0).mean(axis=1)
    found = stages.onnxruntime_stages(load_weights(tiny), audio)["seconds"]
    assert {"stft", "unet", "hpss", "cnn"} <= set(found) <= {"stft", "unet", "hpss", "cnn", "other"}
    assert min(found[name] for name in ("stft", "unet", "hpss", "cnn")) > 0


def test_random_weights_of_a_preset_score_in_the_middle(tmp_path):
    path = tmp_path / "edge.safetensors"
    throughput._save_random("edge", str(path))
    weights = load_weights(path)
    candidate = ours("numpy", weights, "all", None, "numpy")
    scores = candidate.call(music(4, 44_100, 0).mean(axis=1)[None])
    assert scores == pytest.approx([0.5], abs=1e-3)


def test_a_broken_track_is_a_row(quick, command, tiny, clips, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF nothing")
    options = ("--weights", tiny, "--rounds", "1", "--backends", "numpy")
    done = command("bench", "throughput", clips[0], broken, *options)
    assert done.code == 1
    found = json.loads(done.out)
    good, bad = found["tracks"]
    assert (good["path"], bad["path"]) == (clips[0], str(broken))
    assert bad["error"]["kind"] == "unsupported"
    assert found["candidates"][0]["wall_s"] > 0
    none = command("bench", "throughput", broken, *options)
    assert (none.code, none.out) == (1, "")
    assert "broken.wav" in none.err.splitlines()[-1]


def test_a_candidate_that_fails_on_a_track(quick, command, tiny, clips, monkeypatch):
    def fail(self, track):
        return Failure(track.path, "model", f"{track.path}: no score")

    monkeypatch.setattr("artifactnet_jax.detector.Detector._finish", fail)
    options = ("--weights", tiny, "--rounds", "1", "--backends", "numpy")
    done = command("bench", "throughput", clips[0], *options)
    assert done.code == 1
    (track,) = json.loads(done.out)["tracks"]
    assert track["errors"] == {"numpy": f"{clips[0]}: no score"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing.wav"], 2, "nothing.wav: no such file"),
        (["--backends", "cuda"], 2, "unknown backend 'cuda': use "),
        (["--weights", "nothing.safetensors"], 2, "nothing.safetensors"),
        (["--onnx", "nothing.onnx"], 2, "nothing.onnx: no such file"),
        (["--from", "nothing.json"], 2, "nothing.json: No such file"),
        (["--out", "nowhere/r.json"], 2, "its folder does not exist"),
        (["--batch", "0"], 2, "not whole numbers joined by commas, each above 0"),
        (["--rounds", "0"], 2, "not a whole number above 0"),
        (["--scenario", "scaling", "."], 2, "leave PATH and peers out"),
        (["--weights", "w", "--preset", "edge"], 2, "not allowed with"),
    ],
)
def test_usage(command, quick, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    done = command("bench", "throughput", "-q", *arguments)
    assert (done.code, done.out) == (code, "")
    assert message in done.err.splitlines()[-1]


def test_a_dtype_that_a_backend_has_not(command, quick, tiny, clips):
    options = ("--weights", tiny, "--backends", "numpy-float16")
    done = command("bench", "throughput", "-q", clips[0], *options)
    assert done.code == 2
    assert "computes in float32, not float16" in done.err


def test_a_backend_that_is_not_installed(command, monkeypatch):
    missing = backends.Needs(("no_such_package",), "extra")
    monkeypatch.setitem(backends.BACKENDS, "later", missing)
    done = command("bench", "throughput", "--backends", "later")
    assert done.code == 3
    assert "needs no_such_package: pip install" in done.err


def test_a_file_that_is_no_report(command, tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"schema": "other"}')
    done = command("bench", "throughput", "--from", path)
    assert done.code == 2
    assert f"it holds no {throughput.SCHEMA}" in done.err


def test_scaling(tiny, tmp_path, monkeypatch):
    asked: list[tuple[str, int]] = []

    def child(arguments):
        path = arguments[-1]
        if path.startswith("@"):
            names = Path(path[1:]).read_text().split()
            assert all(Path(name).is_file() for name in names)
            asked.append(("files", len(names)))
        else:
            import soundfile

            asked.append(("seconds", round(soundfile.info(path).duration)))
        code = 1 if asked[-1] == ("files", 3) else 0
        return {"code": code, "wall_s": 2.0, "cpu_s": 1.0, "peak_bytes": 2**20, "error": "broken"}

    monkeypatch.setattr(processes, "child", child)
    rows = processes.scaling(
        ["numpy"], str(tiny), None, False, str(tmp_path), lambda text: None, (0.05, 1.1), (1, 3)
    )
    assert asked == [("seconds", 3), ("seconds", 66), ("files", 1), ("files", 3)]
    assert [row.get("error") for row in rows] == [None, None, None, "broken"]
    found = {
        "machine": machine.hardware(),
        "versions": machine.versions(),
        "commit": None,
        "settings": {"scenario": "scaling", "rounds": 1, "audio": "generated"},
        "weights": {"name": "tiny", "preset": "tiny", "random": False},
        "scaling": rows,
    }
    assert "| numpy | 1 | 1.1 | 2 | 33 | 1 | 0.5 | 1 |" in figures.tables(found)
    pytest.importorskip("matplotlib")
    written = figures.plots(found, str(tmp_path / "plots"))
    assert [Path(path).name for path in written] == ["scaling-length.svg", "scaling-files.svg"]


def test_one_process_of_each_kind(tiny, tmp_path):
    """The processes that are counted elsewhere by a stand-in, for real."""
    (row,) = processes.cold(["numpy"], str(tiny), str(tmp_path), 1, lambda text: None)
    assert "error" not in row
    assert row["cpu_s"] > 0
    assert row["peak_bytes"] > 2**20
    (bad,) = processes.cold(["numpy"], "nothing", str(tmp_path), 1, lambda text: None)
    assert "nothing" in bad["error"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1"), (12345.6, "12,300"), (0.05, "0.05"), (2e-6, "2.00e-06")],
)
def test_figures_are_rounded(value, text):
    assert figures._figures(value) == text
