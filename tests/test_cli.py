"""The command `artifactnet-jax score`: rows, exit codes, output files, and what may go wrong."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from artifactnet_jax import cli, results
from artifactnet_jax.config import Config
from artifactnet_jax.detector import Detector
from artifactnet_jax.text import printable
from artifactnet_jax.weights import random_tensors, save_weights
from audio_files import encode, noise, write

COMMAND = [sys.executable, "-m", "artifactnet_jax"]
needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("flax") is None, reason="needs artifactnet-jax[cpu]"
)
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


@pytest.fixture
def shell(weights_path: Path) -> list[str]:
    """The beginning of a command line for another process."""
    options = ["--weights", str(weights_path), "--backend", "numpy", "--format", "jsonl"]
    return [*COMMAND, "score", *options]


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the times that it took, and without what tells a file from another."""
    return {key: value for key, value in row.items() if key not in ("timings", "file")}


def file_rows(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


def one_line(err: str) -> str:
    assert err.startswith("artifactnet-jax: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


# --- Rows -----------------------------------------------------------------------------------------


def test_a_folder_gives_a_row_per_track_as_the_detector_scores_it(score, tracks, detector):
    done = score(tracks)
    assert (done.code, done.err) == (0, "")
    assert sorted(done.rows) == [str(tracks / name) for name in ("a.wav", "b.wav", "c.flac")]
    for path, row in done.rows.items():
        expected = json.loads(results.to_json(detector.score(path).to_dict()))
        assert comparable(row) == comparable(expected)
        assert set(row) == set(expected)
    assert [len(row["segments"]) for _, row in sorted(done.rows.items())] == [1, 3, 2]


def test_folder_file_and_list_give_the_same_rows(score, tracks, tmp_path):
    expected = {p: comparable(row) for p, row in score(tracks).rows.items()}
    files = sorted(map(str, tracks.iterdir()))
    listed = tmp_path / "list.txt"
    listed.write_text("# tracks\n\n" + "\n".join(reversed(files)) + "\n")
    for arguments in (files, [f"@{listed}"], [*files, tracks, f"@{listed}", files[0]]):
        rows = score("--batch-size", 5, "--jobs", 1, *arguments).rows
        assert {path: comparable(row) for path, row in rows.items()} == expected


def test_recursion_is_asked_for(score, tmp_path):
    (tmp_path / "deep").mkdir()
    inner = write(tmp_path / "deep", "x.wav", noise(1, channels=1))
    flat = score(tmp_path)
    assert flat.code == 1
    assert flat.rows[str(tmp_path)]["error"]["kind"] == "no-audio"
    assert "-r" in flat.rows[str(tmp_path)]["error"]["message"]
    assert list(score("-r", tmp_path).rows) == [str(inner)]


@pytest.mark.parametrize(
    "backend", ["numpy", pytest.param("xla", marks=[needs_jax, pytest.mark.slow])]
)
def test_wav_and_flac_give_the_same_bits(score, tmp_path, backend):
    pcm = noise(9, seed=3)
    for suffix in ("wav", "flac"):
        write(tmp_path, f"x.{suffix}", pcm)
    done = score("--backend", backend, tmp_path)
    assert (done.code, len(done.rows)) == (0, 2)
    wav, flac = (done.rows[str(tmp_path / name)] for name in ("x.wav", "x.flac"))
    assert wav["backend"] == backend
    assert wav["n_segments"] == 2  # and a tail of 1 s, which is dropped
    assert {**comparable(flac), "path": ""} == {**comparable(wav), "path": ""}


def test_options_reach_the_detector(score, tracks):
    path = str(tracks / "b.wav")
    (plain,) = score(path).rows.values()
    (rms,) = score("--aggregate", "rms", "--threshold", "0.001", path).rows.values()
    assert (plain["aggregate"], plain["threshold"]) == ("median", 0.5)
    assert (rms["aggregate"], rms["threshold"], rms["verdict"]) == ("rms", 0.001, "ai")
    assert rms["score"] != plain["score"]
    assert rms["segments"] == plain["segments"]
    for option, n in (("all", 3), ("first60", 3), (2, 2), (7, 7)):
        (row,) = score("--segments", option, path).rows.values()
        assert (row["n_segments"], row["plan"]) == (n, option)
    exact = plain["score"]
    (row,) = score("--threshold", repr(exact), path).rows.values()
    assert row["verdict"] == "ai"
    (row,) = score("--threshold", repr(float(np.nextafter(exact, 1))), path).rows.values()
    assert row["verdict"] == "real"


def test_table_csv_and_json_keep_the_order_of_the_inputs(score, tracks):
    paths = [str(tracks / name) for name in ("b.wav", "gone.wav", "c.flac", "a.wav")]
    rows = score(*paths).rows

    table = score("--format", "table", *paths)
    assert table.code == 1
    lines = table.out.splitlines(keepends=True)
    assert lines[0] == results.TABLE_HEADER
    assert lines[1:] == [results.to_table(rows[path]) for path in paths]

    records = list(csv.DictReader(io.StringIO(score("--format", "csv", *paths).out)))
    assert [record["path"] for record in records] == paths
    assert float(records[0]["score"]) == rows[paths[0]]["score"]
    assert records[1]["error_kind"] == "not-found"

    whole = json.loads(score("--format", "json", *paths).out)
    assert [comparable(row) for row in whole] == [comparable(rows[path]) for path in paths]


# --- Bad input ------------------------------------------------------------------------------------


def bad_inputs(folder: Path) -> dict[str, str]:
    """Bad files in a folder: path -> kind of error."""
    flac = encode(noise(5, channels=1), "flac")
    nan = np.zeros(RATE := 44_100, np.float32)
    nan[100] = np.nan
    inf = nan.copy()
    inf[100] = np.inf
    (folder / "empty.wav").touch()
    (folder / "text.mp3").write_text("This is no music.\n" * 100)
    (folder / "cut.flac").write_bytes(flac[: len(flac) // 2])
    (folder / "none.wav").write_bytes(encode(noise(0), "wav"))
    soundfile.write(folder / "nan.wav", nan, RATE, "FLOAT")
    soundfile.write(folder / "inf.wav", inf, RATE, "FLOAT")
    (folder / "link.wav").symlink_to("nowhere.wav")
    (folder / "folder").mkdir()
    kinds = {"empty.wav": "empty", "text.mp3": "unsupported", "cut.flac": "truncated"}
    kinds |= {"none.wav": "no-audio", "nan.wav": "non-finite", "inf.wav": "non-finite"}
    kinds |= {"link.wav": "broken-link", "folder": "no-audio", "gone.wav": "not-found"}
    return {str(folder / name): kind for name, kind in kinds.items()}


@posix
def test_bad_input_is_a_row_and_never_stops_the_others(score, tmp_path):
    kinds = bad_inputs(tmp_path)
    good = {
        "one-sample.wav": (noise(1)[:1], 44_100),
        "eight.wav": (noise(4, channels=8), 44_100),
        "slow.wav": (noise(4, 8_000), 8_000),
        "silent.wav": (np.zeros((44_100, 1), np.int16), 44_100),
    }
    for name, (pcm, rate) in good.items():
        write(tmp_path, name, pcm, rate)
    done = score(*kinds, *[tmp_path / name for name in good])
    assert done.code == 1
    rows = done.rows
    assert {path: row["error"]["kind"] for path, row in rows.items() if "error" in row} == kinds
    for path in kinds:
        assert set(rows[path]) == {"schema", "path", "error"}
        message = rows[path]["error"]["message"]
        assert message.startswith(f"{path}: ")
        assert message.isprintable()
    assert sorted(done.err.splitlines()) == sorted(rows[p]["error"]["message"] for p in kinds)

    row = rows[str(tmp_path / "one-sample.wav")]
    assert "short" in row["warnings"]
    assert 0 <= row["score"] <= 1
    row = rows[str(tmp_path / "eight.wav")]
    assert (row["channels"], row["n_segments"]) == (8, 1)
    row = rows[str(tmp_path / "slow.wav")]
    assert (row["sample_rate"], row["duration_s"]) == (8_000, 4.0)
    assert row["warnings"] == ["resampled", "band-limited"]
    row = rows[str(tmp_path / "silent.wav")]
    assert (row["verdict"], row["score"], row["segments"]) == ("undecided", None, [])
    assert "silent" in row["warnings"]


def test_an_unreadable_file_is_a_row(score, tracks, tmp_path, monkeypatch):
    path = write(tmp_path, "secret.wav", noise(1))
    real = open

    def guarded(file, *rest, **options):
        if file == str(path):  # chmod does not stop an administrator, whom tests may run as
            raise PermissionError(13, "Permission denied")
        return real(file, *rest, **options)

    monkeypatch.setattr("builtins.open", guarded)
    done = score(path, tracks / "a.wav")
    assert done.code == 1
    assert done.rows[str(path)]["error"]["kind"] == "permission"
    assert "score" in done.rows[str(tracks / "a.wav")]


@posix
def test_names_of_any_bytes(score, tmp_path):
    names = [b"na\xc3\xafve \xe9\x9f\xb3.wav", b"two\nlines.wav", b"raw \xff\xfe.wav", b'q",.wav']
    audio = encode(noise(1, channels=1), "wav")
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(audio)
    paths = {os.path.join(str(tmp_path), os.fsdecode(name)) for name in names}
    done = score(tmp_path)
    assert (done.code, set(done.rows)) == (0, paths)
    assert len({row["score"] for row in done.rows.values()}) == 1

    table = score("--format", "table", tmp_path).out
    assert len(table.splitlines()) == 5
    assert "two\\nlines.wav" in table
    assert "raw \\udcff\\udcfe.wav" in table
    out = tmp_path / "out.csv"
    assert score("--format", "csv", tmp_path, "-o", out).code == 0
    with out.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    assert {record["path"] for record in records} == {printable(path, keep="\n") for path in paths}
    # And in a list file, but for the name that has a line break.
    lines = [os.path.join(os.fsencode(tmp_path), name) for name in names if b"\n" not in name]
    (tmp_path / "list").write_bytes(b"\n".join(lines))
    assert set(score(f"@{tmp_path}/list").rows) == {p for p in paths if "\n" not in p}


@pytest.mark.slow
@posix
@pytest.mark.parametrize("form", ["table", "csv"])
def test_a_terminal_without_unicode(shell, tmp_path, form):
    write(tmp_path, "naïve 音.wav", noise(1, channels=1))
    env = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    args = [*shell, "--format", form, str(tmp_path)]
    done = subprocess.run(args, capture_output=True, env=env, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"na\\xefve \\u97f3.wav" in done.stdout


def test_fail_fast_stops_at_the_first_failure(score, tracks, tmp_path):
    paths = [tracks / "a.wav", tmp_path / "gone1.wav", tmp_path / "gone2.wav", tracks / "b.wav"]
    done = score("--fail-fast", "--format", "csv", *paths)
    assert done.code == 1
    records = list(csv.DictReader(io.StringIO(done.out)))
    assert [r["path"] for r in records] == [str(p) for p in paths[:2]]
    done = score("--fail-fast", *paths)
    assert done.code == 1
    assert sum("error" in row for row in done.rows.values()) == 1
    out = tmp_path / "out.json"  # ended as asked: the file has the rows up to the failure
    assert score("--fail-fast", "--format", "json", "-o", out, *paths).code == 1
    assert [row["path"] for row in json.loads(out.read_text())] == [str(p) for p in paths[:2]]
    assert score("--fail-fast", *paths[:1]).code == 0


# --- Standard input -------------------------------------------------------------------------------


class Stdin:
    def __init__(self, data: bytes):
        self.buffer = io.BytesIO(data)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_stream_scores_like_the_file(score, tracks, tmp_path, monkeypatch, suffix):
    path = write(tmp_path, f"x.{suffix}", noise(5))
    monkeypatch.setattr(sys, "stdin", Stdin(path.read_bytes()))
    done = score(path, "-", tracks / "a.wav", "-")
    assert (done.code, len(done.rows)) == (0, 3)
    assert {**comparable(done.rows["-"]), "path": str(path)} == comparable(done.rows[str(path)])


@pytest.mark.parametrize("stdin", [Stdin(b""), None])
def test_an_empty_stream_is_a_row(score, tracks, monkeypatch, stdin):
    monkeypatch.setattr(sys, "stdin", stdin)
    done = score("-", tracks / "a.wav")
    assert done.code == 1
    assert done.rows["-"]["error"]["kind"] == "empty"
    assert done.rows["-"]["error"]["message"].startswith("-: ")
    assert "score" in done.rows[str(tracks / "a.wav")]


@pytest.mark.slow
@posix
def test_a_pipe(shell, detector):
    flac = encode(noise(5, seed=9), "flac")
    done = subprocess.run([*shell, "-"], input=flac, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    row = json.loads(done.stdout)
    assert (row["path"], row["score"]) == ("-", detector.score(io.BytesIO(flac)).score)


def test_stdin_that_cannot_be_read(score, tracks, monkeypatch):
    class Broken:
        def read(self, size):
            raise OSError(5, "Input/output error")

    stdin = Stdin(b"")
    stdin.buffer = Broken()
    monkeypatch.setattr(sys, "stdin", stdin)
    done = score("-", tracks / "a.wav")
    assert (done.code, done.out) == (1, "")
    assert "standard input cannot be copied" in one_line(done.err)
    assert "Input/output error" in done.err


@pytest.mark.slow
@posix
def test_ctrl_c_while_standard_input_hangs(shell):
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*shell, "-"], **pipes) as process:
        process.stdin.write(encode(noise(5), "wav"))  # returns once the command is reading
        time.sleep(0.3)  # a signal right before a read blocks would be noticed after it
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        out, err = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130
    assert (out, err) == (b"", b"artifactnet-jax: interrupted\n")


# --- Output files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["table", "jsonl", "json", "csv"])
def test_an_output_file_holds_what_stdout_would(score, tracks, tmp_path, form):
    def masked(text: str) -> list[str]:  # timings differ
        lines = [line for line in text.splitlines() if '_s": ' not in line or "start_s" in line]
        return sorted(line.split(', "timings"')[0] for line in lines)

    out = tmp_path / "out"
    out.write_text("old")
    printed = score("--format", form, tracks)
    written = score("--format", form, tracks, "-o", out)
    assert (written.code, written.out, written.err) == (0, "", "")
    assert masked(out.read_text()) == masked(printed.out)
    assert len(printed.out) > 200
    assert os.listdir(tmp_path) == ["out"]  # no temporary file is left
    assert masked(score("--format", form, tracks, "-o", "-").out) == masked(printed.out)


@posix
def test_an_output_file_keeps_its_mode_and_links(score, tracks, tmp_path):
    private, link = tmp_path / "private.csv", tmp_path / "link.csv"
    private.touch(0o600)
    link.symlink_to("private.csv")
    assert score("--format", "csv", tracks / "a.wav", "-o", link).code == 0
    assert link.is_symlink()
    assert private.stat().st_mode & 0o777 == 0o600
    assert private.read_text().startswith("path,")
    mask = os.umask(0o027)
    try:
        assert score("--format", "csv", tracks / "a.wav", "-o", tmp_path / "new.csv").code == 0
    finally:
        os.umask(mask)
    assert (tmp_path / "new.csv").stat().st_mode & 0o777 == 0o640


class _Stop:
    """Makes a detector stop with an exception after its first result."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException):
        real = Detector.score_many

        def stopped(self, sources):
            yield next(real(self, sources))
            raise error

        monkeypatch.setattr(Detector, "score_many", stopped)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("out of memory\nat 0x0"), 1, "RuntimeError: out of memory; --debug"),
    ],
)
def test_a_run_that_breaks_off_leaves_the_old_file(
    score, tracks, tmp_path, monkeypatch, error, code, words
):
    _Stop(monkeypatch, error)
    for form in ("table", "json", "csv"):
        out = tmp_path / form
        out.write_text("old")
        done = score("--format", form, "-o", out, tracks)
        assert (done.code, done.out) == (code, "")
        assert words in one_line(done.err)
        assert out.read_text() == "old"
    assert score("--format", "json", tracks).out == ""  # no array that looks complete
    assert score("-o", tmp_path / "rows", tracks).code == code
    assert len(file_rows(tmp_path / "rows")) == 1  # JSON Lines keep what is done
    assert sorted(os.listdir(tmp_path)) == ["csv", "json", "rows", "table"]


def test_output_that_cannot_be_written_is_found_before_the_work(
    score, tracks, tmp_path, monkeypatch
):
    def unreachable(*args, **options):
        raise AssertionError("the work began")

    monkeypatch.setattr("artifactnet_jax.console.detectors.Detector", unreachable)
    audio = write(tmp_path, "x.wav", noise(1))
    before = audio.read_bytes()
    for form in ("table", "jsonl", "json", "csv"):
        for out, words in (
            (tmp_path / "no" / "such" / "out", "folder does not exist"),
            (tmp_path, "not a regular file"),
            (os.devnull, "not a regular file"),
            ("", "not a regular file"),
            (audio, "one of the inputs"),
        ):
            done = score("--format", form, "-o", out, audio)
            assert (done.code, done.out) == (2, "")
            assert words in one_line(done.err)
    assert audio.read_bytes() == before
    # Modes do not stop an administrator, whom tests may run as.
    for locked in (tmp_path, audio):
        monkeypatch.setattr(os, "access", lambda path, mode, locked=locked: path != str(locked))
        done = score("-o", audio, tracks)
        assert done.code == 2
        assert "no permission to write there" in one_line(done.err)
    assert audio.read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_full_disk(shell, tracks, form):
    with open("/dev/full", "wb") as full:
        args = [*shell, "--format", form, str(tracks)]
        done = subprocess.run(args, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 1
    assert "cannot write to stdout: No space left" in one_line(done.stderr.decode())


def test_each_row_is_on_disk_before_the_next_is_begun(score, tracks, tmp_path, monkeypatch):
    out, seen, real = tmp_path / "rows.jsonl", [], os.fsync

    def watched(handle):
        seen.append(out.read_bytes().count(b"\n") if out.exists() else None)
        real(handle)

    monkeypatch.setattr(os, "fsync", watched)
    assert score("-o", out, tracks).code == 0
    assert seen == [None, 1, 2, 3]


def test_a_disk_that_fills_up(score, tracks, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for form in ("jsonl", "csv"):
        out = tmp_path / form
        out.write_text("old")
        done = score("--format", form, "-o", out, tracks)
        assert done.code == 1
        assert f"cannot write to {out}: No space left on device" in one_line(done.err)
        assert out.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["csv", "jsonl"]


@pytest.mark.slow
@posix
def test_a_reader_that_has_had_enough(shell, tracks):
    line = f"({shlex.join([*shell, str(tracks)])}; echo $? >&2) | head -c 1"
    done = subprocess.run(line, shell=True, capture_output=True, timeout=120)
    assert (done.stdout, done.stderr) == (b"{", b"1\n")


@pytest.mark.slow
@posix
def test_closed_streams(shell, tracks, tmp_path):
    line = shlex.join([*shell, str(tracks / "a.wav"), str(tmp_path / "gone.wav")])
    done = subprocess.run(f"{line} 2>&-", shell=True, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert len([json.loads(row) for row in done.stdout.splitlines()]) == 2  # and nothing else
    done = subprocess.run(
        f"{line} -q -o {shlex.quote(str(tmp_path / 'out'))} <&- >&-",
        shell=True,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (1, b"")
    assert len(file_rows(tmp_path / "out")) == 2


# --- Resume ---------------------------------------------------------------------------------------


def test_resume_skips_what_is_done_and_retries_what_failed(score, tracks, tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    late = tmp_path / "late.wav"
    inputs = [tracks / "a.wav", late, tracks / "b.wav"]
    assert score("-o", out, *inputs).code == 1
    first = file_rows(out)
    assert first[str(late)]["error"]["kind"] == "not-found"

    scored: list[list[str]] = []
    real = Detector.score_many

    def recorded(self, paths):
        scored.append(paths)
        return real(self, paths)

    monkeypatch.setattr(Detector, "score_many", recorded)
    again = score("--resume", "-o", out, *inputs)
    assert again.code == 1
    assert scored == [[str(late)]]
    assert again.err.startswith("resume: 2 done, 1 to score\n")
    assert file_rows(out) == first

    write(tmp_path, "late.wav", noise(4, seed=8))
    done = score("--resume", "-q", "-o", out, *inputs, tracks / "c.flac")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert scored[1:] == [[str(late), str(tracks / "c.flac")]]
    rows = file_rows(out)
    assert {path: comparable(row) for path, row in rows.items()} == {
        path: comparable(row) for path, row in score(*inputs, tracks / "c.flac").rows.items()
    }
    assert rows[str(tracks / "a.wav")] == first[str(tracks / "a.wav")]  # timings too: the same row


def test_resume_keeps_rows_of_inputs_not_named_this_time(score, tracks, tmp_path):
    out = tmp_path / "rows.jsonl"
    score("-o", out, tracks / "a.wav", tmp_path / "gone.wav")
    before = file_rows(out)
    assert score("--resume", "-o", out, tracks / "b.wav").code == 0
    after = file_rows(out)
    assert {path: after[path] for path in before} == before
    assert len(after) == 3
    assert score("-o", out, tracks / "b.wav").code == 0  # without --resume the file is begun anew
    assert list(file_rows(out)) == [str(tracks / "b.wav")]


@pytest.mark.slow
def test_resume_from_every_kind_of_torn_file(score, tracks, tmp_path):
    full = tmp_path / "full.jsonl"
    score("--jobs", 1, "-o", full, tracks)
    data, expected = full.read_bytes(), file_rows(full)
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    out = tmp_path / "rows.jsonl"
    for cut in (0, 1, 30, ends[0] - 1, ends[0], ends[0] + 5, ends[1] - 1, ends[2] - 1, ends[2]):
        out.write_bytes(data[:cut])
        done = score("--resume", "-o", out, tracks)
        whole = sum(end <= cut for end in ends)
        assert (done.code, done.err) == (0, f"resume: {whole} done, {3 - whole} to score\n")
        rows = file_rows(out)
        assert {p: comparable(r) for p, r in rows.items()} == {
            p: comparable(r) for p, r in expected.items()
        }
        assert (
            data[: ends[whole - 1] if whole else 0]
            == out.read_bytes()[: ends[whole - 1] if whole else 0]
        )


def test_resume_after_a_row_twice_keeps_one(score, tracks, tmp_path):
    out = tmp_path / "rows.jsonl"
    score("-o", out, tracks / "a.wav")
    out.write_bytes(out.read_bytes() * 2)
    assert score("--resume", "-o", out, tracks / "a.wav").code == 0
    assert list(file_rows(out)) == [str(tracks / "a.wav")]


def test_resume_never_takes_an_earlier_stream_for_this_one(score, tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    found = []
    for seed in (1, 2):
        monkeypatch.setattr(sys, "stdin", Stdin(encode(noise(4, seed=seed), "wav")))
        assert score("--resume", "-o", out, "-").code == 0
        found.append(file_rows(out)["-"]["score"])
    assert found[0] != found[1]


def test_resume_refuses_what_it_would_spoil(score, tracks, tmp_path):
    out = tmp_path / "rows.jsonl"
    score("-o", out, tracks / "a.wav")
    before = out.read_bytes()
    other = tmp_path / "other.safetensors"
    tensors = random_tensors(Config.edge(), seed=1)
    save_weights(other, Config.edge(), tensors, name="o", licence="none", provenance={})
    for option, word in (
        (("--threshold", "0.4"), "threshold"),
        (("--aggregate", "rms"), "aggregate"),
        (("--segments", "7"), "plan"),
        (("--weights", other), "weights"),
    ):
        done = score("--resume", "-o", out, *option, tracks)
        assert done.code == 2
        assert f"has rows with other {word}: " in one_line(done.err)
        assert out.read_bytes() == before
    for text in ("not\nrows\n", "not rows", '{"schema": "another/1", "path": "x"}\n'):
        out.write_text(text)
        done = score("--resume", "-o", out, tracks)
        assert done.code == 2
        assert "holds no row of artifactnet-jax/score/2" in one_line(done.err)
        assert out.read_text() == text


@pytest.mark.slow
@posix
def test_kill_at_any_moment_then_resume(shell, score, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(10):
        write(folder, f"{i}.wav", noise(4 + 4 * (i % 2), channels=1, seed=i))
    (folder / "bad.wav").write_text("not audio")
    out = tmp_path / "rows.jsonl"
    args = [*shell, "--resume", "-o", str(out), str(folder)]
    rng, codes = random.Random(0), []
    kept: dict[str, Any] = {}
    for more in (1, 3, 2):
        with subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            deadline = time.monotonic() + 120
            while run.poll() is None and time.monotonic() < deadline:
                if out.exists() and out.read_bytes().count(b'"verdict"') >= len(kept) + more:
                    time.sleep(rng.uniform(0, 0.15))
                    break
                time.sleep(0.002)
            run.kill()
        codes.append(run.returncode)
        *lines, _torn = out.read_bytes().split(b"\n")
        rows = {row["path"]: row for row in map(json.loads, lines)}
        assert len(rows) == len(lines)
        assert {path: rows[path] for path in kept} == kept  # timings too: not scored again
        assert len(kept) < len(rows)
        kept = {path: row for path, row in rows.items() if "error" not in row}
    assert -signal.SIGKILL in codes
    assert score("--resume", "-o", out, folder).code == 1
    assert {p: comparable(r) for p, r in file_rows(out).items()} == {
        p: comparable(r) for p, r in score(folder).rows.items()
    }
    assert len(file_rows(out)) == 11


# --- Usage, backends, errors ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["score"],
        ["sing", "x.wav"],
        ["score", "--format", "xml", "x.wav"],
        ["score", "--backend", "abacus", "x.wav"],
        ["score", "--segments", "0", "x.wav"],
        ["score", "--segments", "some", "x.wav"],
        ["score", "--threshold", "1.5", "x.wav"],
        ["score", "--threshold", "nan", "x.wav"],
        ["score", "--threshold", "", "x.wav"],
        ["mine", "--threshold", "1.2", "x.wav", "-o", "m.csv"],
        ["score", "--jobs", "0", "x.wav"],
        ["score", "--batch-size", "-1", "x.wav"],
        ["score", "--frobnicate", "x.wav"],
        ["doctor", "x.wav"],
    ],
)
def test_bad_flags(command, arguments):
    done = command(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "artifactnet-jax" in done.err
    assert "Traceback" not in done.err


def test_usage_errors_are_one_line_with_the_cause(score, weights_path, tracks, tmp_path):
    damaged = bytearray(weights_path.read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "flipped").write_bytes(damaged)
    (tmp_path / "cut").write_bytes(damaged[:1000])
    (tmp_path / "text").write_text("hello")
    audio = tracks / "a.wav"
    for arguments, words in (
        ([f"@{tmp_path}/none.txt"], f"{tmp_path}/none.txt"),
        (["--resume", audio], "--resume needs --format jsonl and -o FILE"),
        (["--resume", "-o", "-", audio], "--resume needs"),
        (["--resume", "--format", "csv", "-o", tmp_path / "x", audio], "--resume needs"),
        (["--weights", tmp_path / "none", audio], "none: no such weights file"),
        (["--weights", tmp_path, audio], "no such weights file"),
        (["--weights", tmp_path / "a\nb", audio], "a\\nb: no such weights file"),
        (["--weights", tmp_path / "text", audio], "text: "),
        (["--weights", tmp_path / "cut", audio], "cut: "),
        (["--weights", tmp_path / "flipped", audio], "flipped: "),
        (["--dtype", "bfloat16", audio], "'numpy' computes in float32"),
    ):
        done = score(*arguments)
        assert (done.code, done.out) == (2, "")
        assert words in one_line(done.err)
    assert not (tmp_path / "x").exists()


def test_without_jax_xla_says_what_to_install_and_auto_takes_numpy(score, tracks, monkeypatch):
    for package in ("jax", "flax", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    done = score("--backend", "xla", tracks)
    assert (done.code, done.out) == (3, "")
    assert "pip install 'artifactnet-jax[cpu]'" in one_line(done.err)
    done = score("--backend", "auto", tracks / "a.wav")
    assert done.code == 0
    assert [row["backend"] for row in done.rows.values()] == ["numpy"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("Unable to initialize\nmore"), "RuntimeError: Unable to initialize; "),
        (AssertionError(), "AssertionError in test_cli.py, line "),
        (ImportError("undefined symbol"), "ImportError: undefined symbol; "),
    ],
)
def test_a_backend_that_does_not_start(score, tracks, monkeypatch, error, words):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr("artifactnet_jax.detector.load_backend", broken)
    done = score("--backend", "auto", tracks)
    assert (done.code, done.out) == (3, "")
    assert f"backend 'auto' does not start: {words}" in one_line(done.err)


def test_debug_shows_tracebacks(score, tracks, tmp_path, monkeypatch, caplog):
    done = score("--debug", "--weights", tmp_path / "none", tracks)
    assert done.code == 2
    assert "WeightsError: " in done.err
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("artifactnet-jax: ")
    assert score("--debug", tmp_path / "gone.wav").code == 1
    assert [r.exc_info[0].__name__ for r in caplog.records if r.exc_info] == ["AudioError"]
    _Stop(monkeypatch, RuntimeError("out of memory"))
    done = score("--debug", tracks)
    assert done.code == 1
    assert "RuntimeError: out of memory\n" in done.err


def test_help_and_version(command):
    done = command("--version")
    assert (done.code, done.out) == (0, f"artifactnet-jax {cli.__version__}\n")
    help_text = command("score", "--help").out
    for option in (
        *("-r", "--weights", "--backend", "--segments", "--aggregate", "--threshold"),
        *("--batch-size", "--jobs", "--format", "-o", "--resume", "--fail-fast", "-q", "--debug"),
    ):
        assert option in help_text
    assert "Exit codes: 0 all scored, 1 some" in " ".join(help_text.split())


def test_the_embedded_weights(command, tracks):
    path = str(tracks / "a.wav")
    (row,) = command("score", "--backend", "numpy", "--format", "jsonl", path).rows.values()
    assert row["weights"] == Detector(None, "numpy").weights.summary()


# --- Progress -------------------------------------------------------------------------------------


@pytest.mark.slow
@posix
@pytest.mark.parametrize("case", ["piped rows", "piped rows, quiet", "rows on the terminal"])
def test_a_bar_where_stderr_is_a_terminal(shell, tracks, tmp_path, case):
    import fcntl
    import pty
    import struct
    import termios

    gone = str(tmp_path / "gone.wav")
    args = [*shell, str(tracks / "a.wav"), gone, *(["-q"] if "quiet" in case else [])]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    piped = subprocess.PIPE if "piped" in case else theirs
    with subprocess.Popen(args, stdout=piped, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # Linux says so when the other end has gone
            pass
        data = process.stdout.read() if process.stdout else shown
    os.close(ours)
    assert process.returncode == 1
    rows = [json.loads(line) for line in data.splitlines()]
    assert {row["path"] for row in rows} == {str(tracks / "a.wav"), gone}
    if case == "piped rows":
        assert b"2/2" in shown
        assert f"{gone}: no such file".encode() in shown
    elif case == "piped rows, quiet":
        assert shown == b""


def test_no_bar_without_a_terminal(score, tracks, tmp_path):
    done = score(tracks / "a.wav", tmp_path / "gone.wav")
    assert done.err == done.rows[str(tmp_path / "gone.wav")]["error"]["message"] + "\n"
    done = score("-q", tracks / "a.wav", tmp_path / "gone.wav")
    assert (done.code, done.err) == (1, "")
