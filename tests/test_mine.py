"""Mining: what is scored, how it is ranked, and what the manifest says of it.

Scores come from random weights, which give noise what they like; what the manifest must say is
worked out from the rows that `score` gives, or by hand.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifactnet_jax.data.manifest import ManifestError, Row, read_manifest, write_manifest
from artifactnet_jax.detector import Detector
from artifactnet_jax.train import mine
from audio_files import noise, write

COLUMNS = ("score", "segment_score", "segment_start_s", "wrong", "rank", "mined")


def row(path: str, label: int = 0, **changes: Any) -> Row:
    kind = ("real", "ai")[label]
    return dataclasses.replace(Row(path, label, kind, kind, "", f"{kind}/{path}", ""), **changes)


def verdict(score: float | None, *segments: float) -> dict[str, Any]:
    starts = [{"start_s": 4.0 * i, "score": p} for i, p in enumerate(segments)]
    return {"path": "x", "score": score, "segments": starts}


def extras(path: Path) -> dict[str, dict[str, str]]:
    """The other columns of a manifest by the name of the file."""
    return {os.path.basename(r.path): dict(r.extra) for r in read_manifest(path)}


@pytest.fixture
def album(tracks: Path, tmp_path: Path) -> Path:
    """A copy of `tracks` that tests may change."""
    return Path(shutil.copytree(tracks, tmp_path / "album"))


@pytest.fixture
def mine_it(command, weights_path: Path):
    def run(*args: Any):
        return command("mine", "--weights", weights_path, "--backend", "numpy", *args)

    return run


@pytest.fixture
def scores(score, tracks: Path) -> dict[str, dict[str, Any]]:
    """Rows of `score` by the name of the file."""
    done = score(tracks)
    assert done.code == 0
    return {os.path.basename(path): found for path, found in done.rows.items()}


def count_scored(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[str]:
    """The paths that are scored from now on; after so many the run is broken off."""
    seen: list[str] = []
    whole = Detector.score_many

    def score_many(self, sources):
        for index, result in whole(self, sources):
            if len(seen) == stop_after:
                raise KeyboardInterrupt
            seen.append(os.path.basename(result.path))
            yield index, result

    monkeypatch.setattr(Detector, "score_many", score_many)
    return seen


# --- ranking ---------------------------------------------------------------------------------


def test_the_most_wrong_come_first_by_hand():
    """Threshold 0.6. Wrongness: c 0.35, e 0.3, b 0.1 twice (b2 by its segment), f 0, a -0.2..."""
    cases = [
        ("a", 0, verdict(0.4, 0.5, 0.3), False, 0.5, 0.0),
        ("b", 0, verdict(0.7, 0.7, 0.6), True, 0.7, 0.0),
        ("b2", 0, verdict(0.7, 0.6, 0.8), True, 0.8, 4.0),
        ("c", 0, verdict(0.95, 0.9, 0.95, 1.0), True, 1.0, 8.0),
        ("d", 1, verdict(0.9, 0.8, 1.0), False, 0.8, 0.0),
        ("e", 1, verdict(0.3, 0.5, 0.1), True, 0.1, 4.0),
        ("f", 0, verdict(0.6), True, None, None),
        ("g", 1, verdict(0.6), False, None, None),
        ("silent", 0, verdict(None), False, None, None),
        ("failed", 0, {"path": "x", "error": {"kind": "empty", "message": "x"}}, False, None, None),
    ]
    rows = [row(name, label) for name, label, *_ in cases]
    ranked = mine.rank(rows, [v for _, _, v, *_ in cases], 0.6)
    assert [one.row.path for one in ranked] == ["c", "e", "b2", "b", "f", "g", "a", "d"]
    expected = {name: rest for name, _, _, *rest in cases}
    for one in ranked:
        assert [one.wrong, one.segment_score, one.segment_start_s] == expected[one.row.path]
    assert {one.row.path: one.wrongness for one in ranked} == pytest.approx(
        {"c": 0.35, "e": 0.3, "b2": 0.1, "b": 0.1, "f": 0.0, "g": 0.0, "a": -0.2, "d": -0.3}
    )


def test_equal_tracks_rank_by_name_whatever_their_order():
    rows = [row(name) for name in "cab"]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        ranked = mine.rank([rows[i] for i in order], [verdict(1.0, 1.0)] * 3, 0.5)
        assert [one.row.path for one in ranked] == ["a", "b", "c"]


def test_the_columns_of_a_row_mined_twice():
    (one,) = mine.rank([row("a", 1, extra=(("bpm", "120"), ("rank", "9")))], [verdict(0.25)], 0.5)
    assert dict(mine.mined(one, 1).extra) == {
        "bpm": "120",
        "rank": "1",
        "score": "0.25",
        "segment_score": "",
        "segment_start_s": "",
        "wrong": "1",
        "mined": "missed",
    }
    (one,) = mine.rank([row("a", 0)], [verdict(0.1234567, 0.1234567)], 0.5)
    made = dict(mine.mined(one, 3).extra)
    assert [made[c] for c in COLUMNS] == ["0.123457", "0.123457", "0.0", "0", "3", ""]


# --- the verb --------------------------------------------------------------------------------


def test_a_folder_is_real_music_of_its_name(mine_it, album, tmp_path, scores):
    out = tmp_path / "m.csv"
    done = mine_it(album, "-o", out, "--threshold", "0.5")
    assert done.code == 0
    rows = read_manifest(out)
    by_score = sorted(scores, key=lambda name: -scores[name]["score"])
    assert [os.path.basename(r.path) for r in rows] == by_score
    assert {(r.label, r.kind, r.source, r.split) for r in rows} == {(0, "real", "album", "")}
    assert len({r.group for r in rows}) == 3
    for place, name in enumerate(by_score, 1):
        worst = max(scores[name]["segments"], key=lambda s: s["score"])
        wrong = scores[name]["score"] >= 0.5
        found = extras(out)[name]
        assert float(found["score"]) == pytest.approx(scores[name]["score"], abs=1e-6)
        assert float(found["segment_score"]) == pytest.approx(worst["score"], abs=1e-6)
        assert float(found["segment_start_s"]) == worst["start_s"]
        assert (found["wrong"], found["rank"]) == (str(int(wrong)), str(place))
        assert found["mined"] == ("hard-negative" if wrong else "")
    wrong = sum(s["score"] >= 0.5 for s in scores.values())
    head, line = done.out.splitlines()
    assert head.split() == ["source", "label", "tracks", "wrong", "worst"]
    assert line.split() == ["album", "real", "3", str(wrong), f"{scores[by_score[0]]['score']:.3f}"]
    assert f"{wrong} of 3 tracks are wrong at 0.5; 3 written to {out}" in done.err


def test_as_ai_the_same_tracks_rank_the_other_way_round(mine_it, album, tmp_path, scores):
    out = tmp_path / "m.parquet"
    assert mine_it(album, "-o", out, "--label", "ai", "--threshold", "1").code == 0
    rows = read_manifest(out)
    by_score = sorted(scores, key=lambda name: scores[name]["score"])
    assert [os.path.basename(r.path) for r in rows] == by_score
    assert {(r.label, r.kind) for r in rows} == {(1, "ai")}
    found = extras(out)
    assert {f["mined"] for f in found.values()} == {"missed"}
    for name in by_score:
        lowest = min(s["score"] for s in scores[name]["segments"])
        assert float(found[name]["segment_score"]) == pytest.approx(lowest, abs=1e-6)


def test_a_manifest_keeps_what_it_says(mine_it, album, tmp_path, scores):
    rows = [
        row(f"{album}/a.wav", 1, kind="codec-recon", source="s1", model="M", group="g", weight=2.0),
        row(f"{album}/b.wav", 0, split="test", extra=(("bpm", "120.50"),)),
        row(f"{album}/c.flac", 0, split="train"),
    ]
    write_manifest(album / "in.csv", rows)
    assert mine_it(album / "in.csv", "-o", tmp_path / "all.csv").code == 0
    back = {r.path: dataclasses.replace(r, extra=()) for r in read_manifest(tmp_path / "all.csv")}
    assert back == {r.path: dataclasses.replace(r, extra=()) for r in rows}
    assert extras(tmp_path / "all.csv")["b.wav"]["bpm"] == "120.50"
    assert mine_it(album / "in.csv", "-o", tmp_path / "r.csv", "--label", "real").code == 0
    assert {r.label for r in read_manifest(tmp_path / "r.csv")} == {0}
    for name, found in extras(tmp_path / "r.csv").items():
        assert float(found["score"]) == pytest.approx(scores[name]["score"], abs=1e-6)


def test_top_and_wrong_only(mine_it, album, tmp_path, scores):
    ordered = sorted((s["score"] for s in scores.values()), reverse=True)
    between = str((ordered[1] + ordered[2]) / 2)
    out = tmp_path / "m.csv"
    for arguments, n in (
        (["--top", "1"], 1),
        (["--wrong-only"], 2),
        (["--wrong-only", "--top", "1"], 1),
        (["--top", "9"], 3),
    ):
        done = mine_it(album, "-o", out, "--threshold", between, *arguments)
        assert done.code == 0
        assert [e["rank"] for e in extras(out).values()] == ["1", "2", "3"][:n]
        assert done.out.splitlines()[1].split()[2:4] == ["3", "2"]  # the table is of all
    done = mine_it(album, "-o", out, "--threshold", "1", "--wrong-only")
    assert done.code == 0
    assert "0 of 3 tracks are wrong at 1; 0 written" in done.err
    with pytest.raises(ManifestError, match="no rows"):
        read_manifest(out)


def test_sources_are_the_folders_named_and_a_file_counts_once(mine_it, album, tmp_path):
    other = tmp_path / "other" / "deep"
    other.mkdir(parents=True)
    shutil.copy(album / "a.wav", other / "d.wav")
    out = tmp_path / "m.csv"
    paths = (album, tmp_path / "other", album / "a.wav", other / "d.wav")
    assert mine_it("-r", *paths, "-o", out, "-q").code == 0
    found = {os.path.basename(r.path): r.source for r in read_manifest(out)}
    assert found == {"a.wav": "album", "b.wav": "album", "c.flac": "album", "d.wav": "other"}
    assert mine_it(other / "d.wav", "-o", out, "-q").code == 0
    assert [r.source for r in read_manifest(out)] == ["deep"]


def test_what_fails_is_told_and_left_out(mine_it, album, tmp_path):
    (album / "bad.wav").write_bytes(b"RIFF")
    write(album, "still.wav", np.zeros((44_100 * 5, 1), np.int16))
    for quiet in ([], ["-q"]):
        out = tmp_path / f"m{len(quiet)}.csv"
        done = mine_it(album, "-o", out, *quiet)
        assert done.code == 1
        assert sorted(extras(out)) == ["a.wav", "b.wav", "c.flac"]
        assert "bad.wav" in done.err
        assert "1 of 5 tracks could not be scored" in done.err
        assert ("1 silent, left out" in done.err) is not bool(quiet)
    done = mine_it(album, "-o", tmp_path / "m0.csv")  # tried again, and told again
    assert done.code == 1
    assert "resume: 4 done, 1 to score" in done.err
    assert f"{album}/bad.wav: " in done.err


def test_if_all_fail_nothing_is_written(mine_it, tmp_path):
    out = tmp_path / "m.csv"
    out.write_text("mine\n")
    done = mine_it(tmp_path / "none.wav", tmp_path / "no.flac", "-o", out)
    assert (done.code, done.out) == (1, "")
    assert "none of the 2 tracks could be scored" in done.err
    assert out.read_text() == "mine\n"


def test_a_run_broken_off_goes_on(mine_it, album, tmp_path, monkeypatch):
    out = tmp_path / "m.csv"
    log = tmp_path / "m.csv.scores.jsonl"
    with monkeypatch.context() as patch:
        first = count_scored(patch, stop_after=2)
        assert mine_it(album, "-o", out).code == 130
    assert not out.exists()
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    log.write_bytes(lines[0] + lines[1][:-20])  # killed while it wrote
    with monkeypatch.context() as patch:
        second = count_scored(patch)
        done = mine_it(album, "-o", out)
    assert done.code == 0
    assert "resume: 1 done, 2 to score" in done.err
    assert sorted([first[0], *second]) == ["a.wav", "b.wav", "c.flac"]
    assert len(log.read_text().splitlines()) == 3
    fresh = tmp_path / "fresh.csv"
    assert mine_it(album, "-o", fresh).code == 0
    assert extras(out) == extras(fresh)


def test_what_has_been_scored_is_not_scored_again(mine_it, album, tmp_path, monkeypatch):
    out = tmp_path / "m.csv"
    assert mine_it(album, "-o", out).code == 0
    seen = count_scored(monkeypatch)
    monkeypatch.chdir(tmp_path)  # however the paths are written, and at any threshold
    assert mine_it("album", "-o", "m.csv", "--threshold", "0.9", "--top", "1", "-q").code == 0
    assert seen == []
    write(album, "b.wav", noise(5, channels=1, seed=9))
    later = os.stat(out).st_mtime + 60
    os.utime(album / "b.wav", (later, later))
    assert mine_it(album, "-o", out).code == 0
    assert seen == ["b.wav"]


def test_scores_of_other_weights_are_not_mixed(mine_it, command, album, tmp_path):
    out = tmp_path / "m.csv"
    assert mine_it(album, "-o", out).code == 0
    before = out.read_bytes()
    done = command("mine", album, "-o", out, "--backend", "numpy")
    assert done.code == 2
    assert "rows with other weights" in done.err
    assert out.read_bytes() == before


def test_a_name_that_is_not_utf8(mine_it, album, tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    (album / "a.wav").rename(album / name)
    out = tmp_path / "m.csv"
    assert mine_it(album, "-o", out).code == 0
    assert all(os.path.exists(r.path) for r in read_manifest(out))
    assert name in extras(out)
    lines = Path(f"{out}.scores.jsonl").read_text().splitlines()
    logged = [json.loads(line)["path"] for line in lines]
    assert str(album / name) in logged


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["in.csv", "album", "-o", "m.csv"], "in.csv is a manifest, and not all there is"),
        (["-", "-o", "m.csv"], "standard input"),
        (["@none.txt", "-o", "m.csv"], "list file none.txt"),
        (["none.csv", "-o", "m.csv"], "none.csv: cannot be read"),
        (["in.csv", "--label", "ai", "-o", "m.csv"], "no track is ai"),
        (["album", "-o", "m.txt"], ".csv or .parquet"),
        (["album", "-o", "no/m.csv"], "its folder does not exist"),
        (["album", "-o", "m.csv", "--weights", "none.safetensors"], "none.safetensors"),
    ],
)
def test_it_refuses_in_one_line(mine_it, album, monkeypatch, arguments, word):
    monkeypatch.chdir(album.parent)
    write_manifest("in.csv", [row("album/a.wav")])
    done = mine_it(*arguments)
    assert (done.code, done.out) == (2, "")
    assert word in done.err
    assert len(done.err.splitlines()) == 1
    assert sorted(os.listdir()) == ["album", "in.csv"]


def test_nothing_on_stderr_when_quiet(mine_it, album, tmp_path):
    done = mine_it(album, "-o", tmp_path / "m.csv", "-q")
    assert (done.code, done.err) == (0, "")
