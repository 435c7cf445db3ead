"""The verb `train` on tiny data: run folders, resuming, and what ends a run."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from artifactnet_jax.data import manifest
from artifactnet_jax.detector import Detector
from artifactnet_jax.train import loop, phases, run, steps
from artifactnet_jax.train.phases import PHASES, SettingsError
from artifactnet_jax.weights import load_weights, save_weights
from audio_files import write
from tiny_model import TINY, save_tiny

FEW = {"batch": 4, "seconds": 0.25, "steps": 8, "log_every": 2, "watch_every": 4}
FEW |= {"checkpoint_every": 3, "workers": 2, "draws": 2}


@pytest.fixture(scope="module")
def music(tmp_path_factory) -> Path:
    """A folder with a manifest of twelve short tracks of four sources, two of them to watch."""
    folder = tmp_path_factory.mktemp("music")
    rng, lines = np.random.default_rng(0), ["path,label,source,group,split,residual"]
    for k in range(12):
        label, source = k % 2, f"{('real', 'ai')[k % 2]}-{k % 4 // 2}"
        audio = 0.1 * rng.standard_normal(44_100)
        if label:
            audio += 0.1 * np.sin(2 * np.pi * 9_000 * np.arange(44_100) / 44_100)
        write(folder, f"{k}.wav", (32768 * audio[:, None]).astype(np.int16))
        np.save(folder / f"{k}.npy", (0.2 * audio).astype(np.float16))
        split = "validation" if source.endswith("1") else "train"
        lines.append(f"{k}.wav,{label},{source},g{k},{split},{k}.npy")
    (folder / "music.csv").write_text("\n".join(lines) + "\n")
    save_tiny(folder / "tiny.safetensors")
    return folder


@pytest.fixture
def train(command, music, tmp_path):
    """Runs `train PHASE` with few steps; `changes` are settings, `None` leaves one out."""

    def call(phase, out, *more, init=True, data=None, **changes):
        pairs = [f"--set={k}={v}" for k, v in {**FEW, **changes}.items() if v is not None]
        start = ["--init", music / "tiny.safetensors"] if init else []
        data = music / "music.csv" if data is None else data
        cache = ["--cache", music / "cache"]
        return command(
            "train", phase, "--data", data, "--out", tmp_path / out, *start, *cache, *pairs, *more
        )

    return call


def rows_of(folder: Path) -> list[dict]:
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def untimed(rows: list[dict]) -> list[dict]:
    times = ("steps_per_s", "segments_per_s", "waiting")
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_weights(folder / "weights.safetensors").tensors for folder in (one, other))
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_a_run_leaves_weights_that_score(train, music, tmp_path):
    done = train("codec", "run")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["tracks"] == {"train": 6, "validation": 6}
    assert report["last"]["step"] == 8
    assert {"loss", "auc", "delta_real", "delta_ai", "tracks", "step"} <= set(report["validation"])
    folder = tmp_path / "run"
    rows = rows_of(folder)
    assert [row["step"] for row in rows if "validation" not in row] == [2, 3, 4, 6, 8]
    assert [row["step"] for row in rows if "validation" in row] == [4, 8]
    for row in rows:
        if "validation" not in row:
            assert {"loss", "auc", "mask_mean", "residual_energy", "steps_per_s"} <= set(row)
            assert 0 <= row["waiting"] <= 1
    weights = load_weights(folder / "weights.safetensors")
    assert weights.config == TINY
    assert weights.name == "run"
    assert weights.licence == "test licence"
    first, last = weights.provenance["history"]
    assert first["weights"]["name"] == "tiny"
    assert (last["phase"], last["tracks"]) == ("codec", report["tracks"])
    verdict = Detector(weights, "numpy").score(music / "0.wav")
    assert 0 <= verdict.score <= 1
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "skipped.jsonl").read_text() == ""

    # The same command again has nothing to do, and says what it did.
    again = train("codec", "run")
    assert (again.code, again.out) == (0, done.out)
    assert "all 8 steps were done" in again.err


def test_a_killed_run_goes_on_to_the_same_weights(train, tmp_path, monkeypatch):
    """Killed without a warning after step 5, whose last checkpoint is of step 3."""
    whole = train("cnn", "whole")
    step = loop.Trainer.step

    def until_5(self, state, batch):
        if int(state.step) == 5:
            raise MemoryError("killed")
        return step(self, state, batch)

    monkeypatch.setattr(loop.Trainer, "step", until_5)
    killed = train("cnn", "killed")
    assert killed.code == 1
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a row torn by the kill
    monkeypatch.undo()
    resumed = train("cnn", "killed")
    assert (whole.code, resumed.code) == (0, 0)
    assert "step 3 of 8" in resumed.err
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert untimed(rows_of(tmp_path / "killed")) == untimed(rows_of(tmp_path / "whole"))


def test_ctrl_c_keeps_a_checkpoint_and_the_same_weights(train, tmp_path, monkeypatch):
    train("cnn", "whole", accumulate=2, ema=0.5)
    step = loop.Trainer.step

    def interrupted(self, state, batch):
        if int(state.step) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, state, batch)

    monkeypatch.setattr(loop.Trainer, "step", interrupted)
    stopped = train("cnn", "stopped", accumulate=2, ema=0.5)
    assert stopped.code == 130
    assert "stopped at step 4: the same command goes on from there" in stopped.err
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train("cnn", "stopped", accumulate=2, ema=0.5).code == 0
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_a_signal_that_comes_late_waits_for_the_next_step(train, tmp_path, monkeypatch):
    """Between the decision to save and the end of the step nothing may be lost."""
    write_row = steps.Loop._write

    def late(self, row):
        if row["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        write_row(self, row)

    monkeypatch.setattr(steps.Loop, "_write", late)
    stopped = train("cnn", "stopped")
    assert stopped.code == 130
    assert "stopped at step 5" in stopped.err
    assert "5" in os.listdir(tmp_path / "stopped" / "checkpoints")


def test_distillation_reads_the_residuals(train, tmp_path):
    done = train("distill", "run", draws=None, steps=4)
    assert done.code == 0, done.err
    last = json.loads(done.out)["last"]
    assert {"distill", "l1", "stft", "loss"} <= set(last)
    assert json.loads(done.out)["validation"]["tracks"] == 6
    before, after = load_weights(tmp_path / "run" / "weights.safetensors"), TINY
    assert before.config == after


def test_random_weights_of_a_preset(train, tmp_path):
    done = train("encoder", "run", "--preset", "edge", init=False, steps=1, batch=2, seconds=0.1)
    assert done.code == 0, done.err
    assert load_weights(tmp_path / "run" / "weights.safetensors").config.preset == "edge"


@pytest.mark.parametrize(
    ("phase", "changes", "message"),
    [
        ("cnn", {"stepz": 3}, "no setting 'stepz'"),
        ("cnn", {"rate": "fast"}, "rate='fast': it must be a number above 0"),
        ("cnn", {"steps": 2.5}, "steps=2.5: it must be a whole number above 0"),
        ("cnn", {"steps": 0}, "steps=0: it must be above 0"),
        ("cnn", {"dtype": "float16"}, "it must be one of float32, bfloat16"),
        (
            "cnn",
            {"versions": "wav,flac"},
            "it must be a list, each one of wav, mp3, aac, opus",
        ),
        ("cnn", {"rate": "nan"}, "rate=nan: it must be a number above 0"),
        ("cnn", {"boundary": 1}, "boundary=1.0: it must be between 0 and 1"),
        ("cnn", {"consistency": 1}, "consistency needs at least two versions"),
        ("cnn", {"augment.clip_p": 2}, "augment.clip_p = 2.0 is not a probability"),
        ("distill", {}, "no versions, draws"),
        ("cnn", {"moves": "unet.nothing"}, "the model has no such part"),
        ("joint", {"bce": 0, "auxiliary": 0}, "there is nothing to minimise"),
    ],
)
def test_bad_settings_are_usage_errors(train, phase, changes, message):
    done = train(phase, "run", **changes)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_settings_from_files_and_the_command_line(tmp_path, command):
    toml, other = tmp_path / "a.toml", tmp_path / "b.json"
    toml.write_text('steps = 7\nversions = ["wav", "mp3"]\n[augment]\neq_p = 0.5\n')
    other.write_text('{"steps": 7, "versions": "wav, mp3", "augment": {"eq_p": 0.5}}')
    one = phases.settings_of("cnn", str(toml), ["steps=9", "augment.eq_p=1"])
    two = phases.settings_of("cnn", str(other), ["steps = 9", "augment.eq_p=1.0"])
    assert one == two
    assert (one.steps, one.versions, one.augment.eq_p) == (9, ("wav", "mp3"), 1.0)
    assert phases.from_flat(json.loads(json.dumps(phases.to_flat(one)))) == one
    for text in ("steps = ", "[1]"):
        toml.write_text(text)
        with pytest.raises(SettingsError, match=r"a\.toml"):
            phases.settings_of("cnn", str(toml), [])
    with pytest.raises(SettingsError, match="write KEY=VALUE"):
        phases.settings_of("cnn", None, ["steps"])
    done = command("train", "steer", "--list", "--set", "steps=3")
    assert done.code == 0
    assert "steps = 3\n" in done.out
    assert 'moves = ["unet"]\n' in done.out
    done = command("train", "steer", "--out", tmp_path / "run")
    assert done.code == 2
    assert "train needs --data MANIFEST and --out RUN_DIR" in done.err


def test_every_default_can_be_written_and_read():
    for settings in PHASES.values():
        assert phases.from_flat(phases.to_flat(settings)) == settings
        texts = [
            f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}"
            for k, v in phases.to_flat(settings).items()
            if v not in ([], "")
        ]
        base = next(name for name, known in PHASES.items() if known == settings)
        assert phases.settings_of(base, None, texts) == settings


def test_phases_that_need_weights_say_so(train):
    for phase in ("steer", "codec", "head"):
        done = train(phase, "run", init=False)
        assert done.code == 2
        assert f"phase {phase} cannot start from random weights: give --init W" in done.err


def test_the_wrong_preset_for_the_weights(train):
    done = train("cnn", "run", "--preset", "v94")
    assert done.code == 2
    assert "has preset 'tiny', not 'v94'" in done.err


def test_weights_of_a_graph_cannot_be_trained(train, music):
    graph = music / "graph.safetensors"
    constant = {"x": np.zeros(3, np.float32)}
    save_weights(graph, TINY, constant, name="g", licence="", provenance={}, graph={"nodes": []})
    done = train("cnn", "run", "--init", graph)
    assert done.code == 2
    assert "only native models can be trained" in done.err


def changed(music: Path, tmp_path: Path, old: str, new: str) -> Path:
    """The manifest with a text replaced, in a copy of its folder."""
    folder = tmp_path / "changed"
    shutil.copytree(music, folder, ignore=shutil.ignore_patterns("cache"))
    path = folder / "music.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",1,ai", ",0,ai", "all 6 tracks to train on are real: add ai ones"),
        ("real-1,g2,validation", "real-1,g2,train", "real-1"),
        ("real-1,g2,", "real-1,g0,", "g0"),
        ("train,0.npy", "train,", "0.wav: has no residual: run artifactnet-jax residuals"),
    ],
)
def test_manifests_that_cannot_be_trained_on(train, music, tmp_path, old, new, message):
    data = changed(music, tmp_path, old, new)
    phase = "distill" if "npy" in old else "cnn"
    done = train(phase, "run", data=data, **({"draws": None} if phase == "distill" else {}))
    assert done.code in (1, 2)
    assert message in done.err


def test_several_manifests_are_one(train, music, tmp_path):
    """Such as music, and the positives that rvq made of it."""
    lines = (music / "music.csv").read_text().splitlines()
    halves = [music / "first.csv", music / "second.csv"]
    for path, part in zip(halves, (lines[1:7], lines[7:]), strict=True):
        path.write_text("\n".join([lines[0], *part]) + "\n")
    rows = manifest.read_manifests([str(path) for path in halves])
    assert rows == manifest.read_manifests([str(music / "music.csv")])
    with pytest.raises(
        manifest.ManifestError, match=r"first\.csv: .*0\.wav is in another manifest too"
    ):
        manifest.read_manifests([str(music / "music.csv"), str(halves[0])])


def test_unreadable_rows_are_counted_and_skipped(train, music, tmp_path):
    data = changed(music, tmp_path, "label", "label")
    (data.parent / "4.wav").write_bytes(b"not audio")
    done = train("cnn", "run", data=data, steps=2, max_bad=0.2)
    assert done.code == 1
    report = json.loads(done.out)
    assert (report["skipped"], report["tracks"]["train"]) == (1, 5)
    assert "4.wav: not audio in a known format" in done.err
    (row,) = map(json.loads, (tmp_path / "run" / "skipped.jsonl").read_text().splitlines())
    assert row["path"].endswith("4.wav")
    (data.parent / "5.wav").unlink()
    done = train("cnn", "other", data=data, steps=2, max_bad=0.05)
    assert done.code == 1
    assert "more than the fraction 0.05 of the 12 rows cannot be used" in done.err


def test_another_run_in_the_folder_is_left_alone(train, music, tmp_path):
    assert train("cnn", "run", steps=2).code == 0
    before = load_weights(tmp_path / "run" / "weights.safetensors").sha256
    for changes in ({"steps": 2, "rate": 0.5}, {"steps": 3}):
        done = train("cnn", "run", **changes)
        assert done.code == 2
        assert "holds another run (settings." in done.err
    done = train("head", "run", steps=2)
    assert "phase cnn there, head here" in done.err
    done = train("cnn", "run", steps=2, data=changed(music, tmp_path, "real-0", "real-9"))
    assert "holds another run (data " in done.err
    assert train("cnn", "run", steps=2, workers=1, log_every=1).code == 0  # moves no weight
    assert load_weights(tmp_path / "run" / "weights.safetensors").sha256 == before
    (tmp_path / "run" / "run.json").unlink()
    assert "but no run.json" in train("cnn", "run", steps=2).err


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(train, tmp_path, monkeypatch):
    step = loop.Trainer.step

    def broken(self, state, batch):
        if int(state.step) == 4:
            batch = {**batch, "label": batch["label"] * np.nan}
        return step(self, state, batch)

    monkeypatch.setattr(loop.Trainer, "step", broken)
    done = train("cnn", "run")
    assert done.code == 1
    assert "loss is not finite at step 5; the checkpoint of step 3 is the last good one" in done.err
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["3"]
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    monkeypatch.undo()
    assert train("cnn", "run").code == 0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"mask_high": 0.01}, "pass-through: the mask is"),
        ({"mask_low": 0.99}, "the mask has closed"),
        ({"mask_spread": 0.9}, "a constant mask: it varies by"),
    ],
)
def test_a_collapsed_mask_stops_the_run(train, tmp_path, limits, message):
    done = train("cnn", "run", patience=4, **limits)
    assert done.code == 1
    assert "collapse at step 4" in done.err
    assert message in done.err
    assert (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize("where", ["checkpoints", "weights", "metrics"])
def test_a_full_disk_says_what_to_do(train, tmp_path, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "checkpoints":
        monkeypatch.setattr(steps.ocp.CheckpointManager, "save", full)
    elif where == "weights":
        monkeypatch.setattr(run, "save_weights", full)
    else:
        monkeypatch.setattr(steps, "to_json", full)
    done = train("cnn", "run", steps=3)
    assert done.code == 1
    assert "No space left on device" in done.err
    assert "free space, and give the same command again" in done.err
    monkeypatch.undo()
    assert train("cnn", "run", steps=3).code == 0


def test_a_damaged_checkpoint_names_itself(train, tmp_path):
    assert train("cnn", "run", steps=3).code == 0
    (tmp_path / "run" / "weights.safetensors").unlink()
    for path in (tmp_path / "run" / "checkpoints" / "3").rglob("*"):
        if path.is_file() and path.name not in ("commit_success.txt", "_CHECKPOINT_METADATA"):
            path.write_bytes(b"")
    done = train("cnn", "run", steps=3)
    assert done.code == 1
    assert "checkpoints/3: cannot be restored" in done.err


def test_nothing_to_watch_is_no_error(train, music, tmp_path):
    data = changed(music, tmp_path, ",validation,", ",test,")
    done = train("cnn", "run", data=data, steps=2)
    assert done.code == 0, done.err
    assert json.loads(done.out)["validation"] == {}
    assert json.loads(done.out)["tracks"] == {"train": 6, "validation": 0}


def test_quiet_says_nothing(train):
    done = train("cnn", "run", "-q", steps=2)
    assert (done.code, done.err) == (0, "")


def test_presets_cost_what_their_layers_say():
    """The settings are data: a phase is no more than that."""
    assert {field.name for field in dataclasses.fields(phases.Settings)} >= set(phases.FREE)
