"""`bench accuracy` as a command: rows, resuming, failures, thresholds, public files."""

from __future__ import annotations

import csv
import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("av")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from artifactnet_jax.bench import accuracy, public
from artifactnet_jax.text import CommandError

RATE = 44_100
MODULE = """
import os
import numpy as np

class Loud:
    '''P(AI) is the level of a constant track. It notes what it hears.'''
    name, params, input_rate, identity = "loud", 1, 44_100, os.environ.get("LOUD", "")

    def score(self, audio):
        with open("heard.txt", "a") as file:
            file.write(f"{np.abs(audio).max():.2f}\\n")
        return round(float(np.abs(audio).max()), 3)

class Wild(Loud):
    name = "wild"

    def score(self, audio):
        level = round(float(np.abs(audio).max()), 3)
        if level == 0.2:
            raise RuntimeError("it broke")
        return {0.1: float("nan"), 0.9: 1.5}.get(level, level)
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command):
    """Runs `bench accuracy` in a folder with a manifest of ten constant tracks.

    Test: AI at 0.9, 0.8, 0.4; real at 0.1, 0.2, 0.6. Calibration: AI at 0.7, 0.5; real 0.3, 0.45.
    """
    monkeypatch.chdir(tmp_path)
    whole = (
        accuracy.accuracy_report.write_report
    )  # intervals from few resamples: they are not tested here
    few = functools.partial(whole, resamples=20)
    monkeypatch.setattr(accuracy.accuracy_report, "write_report", few)
    (tmp_path / "bench_levels.py").write_text(MODULE)
    table = [("path", "label", "source", "model", "group", "split")]
    for split, label, levels in (
        ("test", 1, (0.9, 0.8, 0.4)),
        ("test", 0, (0.1, 0.2, 0.6)),
        ("calibration", 1, (0.7, 0.5)),
        ("calibration", 0, (0.3, 0.45)),
    ):
        for level in levels:
            name = f"{split}-{level}.wav"
            soundfile.write(name, np.full(RATE // 2, level), RATE, subtype="FLOAT")
            source = ("band", "generator")[label]
            table.append((name, str(label), source, f"G{label}", name, split))
    with open("m.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)

    def run(*args, detector: str = "bench_levels:Loud", manifest: str = "m.csv", out: str = "run"):
        return command(
            *("bench", "accuracy", "--manifest", manifest, "--detector", detector, "--out", out),
            *("-q", *args),
        )

    return run


def rows(path: str = "run/results.jsonl") -> dict[str, dict]:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert len({(r["id"], r["detector"], r.get("stress")) for r in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def heard() -> int:
    return len(Path("heard.txt").read_text().split())


def test_a_row_for_every_track(bench):
    done = bench()
    assert done.code == 0, done.err
    found = rows()
    assert len(found) == 10
    row = found["test-0.9.wav"]
    assert (row["score"], row["detector"], row["error"], row["segments"]) == (0.9, "loud", None, [])
    assert row["seconds"] >= 0
    # At 0.5: two of three found, one of three real wrong. Pairs in order: 3 + 3 + 2 of 9.
    cells = [cell.strip() for cell in done.out.splitlines()[2].strip("|").split("|")]
    assert cells == ["loud", "6", "0", "0.5", "0.667", "0.667", "0.333", "0.889", "0 of 2"]
    figures = json.loads(Path("run/metrics.json").read_text())
    f1 = figures["detectors"]["loud"]["judged"]["overall"]["missing_left_out"]["metrics"]["f1"]
    assert f1["value"] == pytest.approx(2 / 3)
    for name in ("report.md", "report.html"):
        assert "loud" in (Path("run") / name).read_text()


def test_a_threshold_is_chosen_on_calibration_only(bench):
    done = bench("--threshold", "fpr5")
    # No calibration real track may be called AI: 0.45 is the highest, 0.5 the next AI score.
    assert done.out.splitlines()[2].split("|")[4].strip() == "0.5"
    (Path("m2.csv")).write_text(Path("m.csv").read_text().replace(",calibration", ",validation"))
    done = bench("--threshold", "fpr5", manifest="m2.csv", out="run2")
    assert done.code == 2
    assert "'calibration'" in done.err


def test_failures_are_rows_and_stop_nothing(bench):
    Path("test-0.4.wav").write_bytes(b"no audio")
    Path("test-0.6.wav").unlink()
    done = bench(detector="bench_levels:Wild")
    assert done.code == 1
    errors = {name: row["error"] for name, row in rows().items() if row["error"]}
    kinds = {name: (error["kind"], error["stage"]) for name, error in errors.items()}
    assert kinds == {
        "test-0.9.wav": ("score", "inference"),  # 1.5
        "test-0.1.wav": ("score", "inference"),  # NaN
        "test-0.2.wav": ("detector", "inference"),
        "test-0.4.wav": ("unsupported", "decode"),
        "test-0.6.wav": ("not-found", "resolve"),
    }
    assert all(row["score"] is None for name, row in rows().items() if name in errors)
    assert "it broke" in errors["test-0.2.wav"]["message"]
    written = json.loads(Path("run/public/wild/inference_failures.json").read_text())
    assert {row["track_id"]: row["stage"] for row in written} == {
        name: stage for name, (_, stage) in kinds.items()
    }


def test_resume_scores_what_is_missing_and_what_failed(bench):
    saved = Path("test-0.4.wav").read_bytes()
    Path("test-0.4.wav").write_bytes(b"no audio")
    assert bench().code == 1
    assert heard() == 9
    done = bench()
    assert done.code == 2  # the folder holds a run
    assert "--resume" in done.err
    Path("test-0.4.wav").write_bytes(saved)
    results = Path("run/results.jsonl")
    lines = results.read_bytes().splitlines(keepends=True)
    cut = [line for line in lines if b"test-0.8" not in line and b"test-0.4" not in line]
    results.write_bytes(b"".join(cut) + lines[0][: len(lines[0]) // 2])  # killed while writing
    before = {json.loads(c)["id"]: c for c in cut}
    done = bench("--resume")
    assert done.code == 0, done.err
    assert heard() == 9 + 2
    assert len(rows()) == 10
    kept = {json.loads(c)["id"]: c for c in results.read_bytes().splitlines(keepends=True)}
    assert all(kept[name] == line for name, line in before.items())


def test_resume_of_another_run_is_refused(bench, monkeypatch):
    assert bench().code == 0
    monkeypatch.setenv("LOUD", "other weights")
    sys.modules.pop("bench_levels")
    done = bench("--resume")
    assert done.code == 2
    assert "holds another run (detectors.loud" in done.err
    monkeypatch.delenv("LOUD")
    sys.modules.pop("bench_levels")
    Path("m.csv").write_text(Path("m.csv").read_text().replace("generator", "machine"))
    done = bench("--resume")
    assert done.code == 2
    assert "holds another run (manifests " in done.err
    Path("run/run.json").write_text("{}")
    done = bench("--resume")
    assert done.code == 2
    assert "run.json cannot be read" in done.err


def test_stress_rows_lie_beside(bench):
    done = bench("--stress", "20db-quieter,wav,mp3-128,aac-128,opus-128", "--split", "test")
    assert done.code == 0, done.err
    assert len(rows()) == 6
    lines = [json.loads(line) for line in Path("run/stress.jsonl").read_text().splitlines()]
    assert len(lines) == 6 * 5
    quiet = {r["id"]: r["score"] for r in lines if r["stress"] == "20db-quieter"}
    assert quiet["test-0.9.wav"] == pytest.approx(0.09, abs=2e-3)
    pairs = json.loads(Path("run/public/loud/codec_pair.json").read_text())
    assert {tuple(pair["probs"]) for pair in pairs} == {("wav", "mp3_128", "aac_128", "opus_128")}
    figures = json.loads(Path("run/metrics.json").read_text())
    changes = {row["stress"]: row for row in figures["stress"][0]["changes"]}
    assert (changes["20db-quieter"]["tpr"], changes["20db-quieter"]["flips"]) == (0.0, 3)
    count = heard()
    assert bench("--resume", "--stress", "20db-quieter", "--split", "test").code == 0
    assert heard() == count


def test_two_detectors_and_what_the_public_runner_found(bench):
    done = bench("--detector", "other=bench_levels:Loud")
    assert done.code == 0
    text = Path("run/results.jsonl").read_text().splitlines()
    assert len(text) == 20
    theirs = Path("run/public/other")
    probs = json.loads((theirs / "track_probs.json").read_text())
    assert len(probs) == 6
    assert {(p["track_id"], p["prob"], p["label"]) for p in probs} >= {("test-0.9.wav", 0.9, 1)}
    source = json.loads((theirs / "per_source.json").read_text())["band"]
    assert (source["n"], source["attempted"], source["failures"], source["label"]) == (3, 3, 0, 0)
    assert source["prob_median"] == 0.2
    assert source["prob_p10"] == pytest.approx(np.quantile([0.1, 0.2, 0.6], 0.1))
    assert source["fpr"] == pytest.approx(1 / 3)
    # Their results read in again stand beside ours, and a baseline that was better is named.
    better = json.loads((theirs / "per_source.json").read_text())
    better["band"]["fpr"] = 0.0
    Path("before.json").write_text(json.dumps(better))
    done = bench("--compare", f"theirs={theirs}", "--baseline", "before.json", out="run2")
    assert done.code == 0
    assert "loud: band: FPR from 0.000 to 0.333: worse" in done.err
    lines = done.out.splitlines()
    ours, read = (line.split("|")[2:] for line in lines[2:4])
    assert ours == read
    (pair,) = json.loads(Path("run2/metrics.json").read_text())["comparisons"]
    assert (pair["a"], pair["b"], pair["n"]) == ("loud", "theirs", 6)


def test_fakeprint_is_fitted_to_train_and_kept(bench, command):
    rng = np.random.default_rng(0)
    t = np.arange(4 * RATE) / RATE
    table = ["path,label,source,split"]
    for k in range(12):
        audio = 0.1 * rng.standard_normal(len(t))
        if k % 2:
            audio += sum(0.01 * np.sin(2 * np.pi * f * t) for f in range(1500, 7500, 500))
        soundfile.write(f"f{k}.wav", audio, RATE)
        table.append(f"f{k}.wav,{k % 2},s{k % 2},{'train' if k < 8 else 'test'}")
    Path("f.csv").write_text("\n".join(table) + "\n")
    done = bench(detector="fakeprint", manifest="f.csv")
    assert done.code == 0, done.err
    assert set(rows()) == {f"f{k}.wav" for k in range(8, 12)}  # train is not judged
    first = Path("run/results.jsonl").read_bytes()
    again = bench(detector="fakeprint=fakeprint:run/fakeprint.json", manifest="f.csv", out="run2")
    assert again.code == 0, again.err
    scores = [
        {json.loads(line)["id"]: json.loads(line)["score"] for line in data.splitlines()}
        for data in (first, Path("run2/results.jsonl").read_bytes())
    ]
    assert scores[0] == scores[1]
    done = bench(detector="fakeprint", out="run3")
    assert done.code == 2
    assert "'train'" in done.err


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--stress", "mp4"], "no stress suite"),
        (["--mechanism"], "none of the detectors is artifactnet"),
        (["--threshold", "best"], "give a number or one of"),
        (["--split", "dev"], "no track is in the part 'dev'"),
        (["--detector", "bench_levels:Loud"], "two detectors are called loud"),
        (["--compare", "x"], "NAME=FOLDER"),
        (["--audio", "nowhere"], "no such folder"),
    ],
)
def test_usage(bench, args, what):
    done = bench(*args)
    assert done.code == 2
    assert what in done.err
    assert len(done.err.splitlines()) == 1


def test_one_class_only(bench):
    text = Path("m.csv").read_text().splitlines()
    Path("one.csv").write_text("\n".join([text[0], *(r for r in text if ",1,generator" in r)]))
    done = bench(manifest="one.csv")
    assert done.code == 2
    assert "a benchmark needs real ones" in done.err


def test_public_files_that_cannot_be_used(tmp_path):
    tracks = [{"id": "a", "label": 1, "source": "s"}]

    def read(data: object) -> None:
        (tmp_path / "track_probs.json").write_text(json.dumps(data))
        public.read(str(tmp_path), tracks, "x")

    with pytest.raises(CommandError, match="No such file"):
        public.read(str(tmp_path), tracks, "x")
    for data, what in (
        ({"a": 1}, "no list"),
        ([{"prob": 0.5}], "not the public runner's"),
        ([{"prob": 1.5, "track_id": "a"}], "not in"),
        ([{"prob": 0.5, "track_id": "b"}], "none of its track ids"),
    ):
        with pytest.raises(CommandError, match=what):
            read(data)
    failure = {"track_id": "a", "source": "s", "stage": "decode", "error_type": "E", "error": "x"}
    (tmp_path / "inference_failures.json").write_text(json.dumps([failure]))
    read_rows, views = public.read(
        str(tmp_path), [*tracks, {"id": "b", "label": 0, "source": "t"}], "x"
    )
    assert read_rows[0]["error"] == {"kind": "E", "message": "x", "stage": "decode"}
    assert read_rows[1]["score"] == 0.5
    assert views == []


def test_a_missing_package_is_told_before_the_work(bench, monkeypatch):
    find = accuracy.importlib.util.find_spec
    monkeypatch.setattr(
        accuracy.importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name)
    )
    done = bench()
    assert done.code == 3
    assert "(sklearn): pip install" in done.err
    assert not Path("run").exists()
