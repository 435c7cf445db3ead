"""What a command line names: lists, folders, streams; and what --resume takes for done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import pytest

from artifactnet_jax import files
from artifactnet_jax.console.inputs import sources
from artifactnet_jax.console.writers import rows_to_keep
from artifactnet_jax.decode import open_audio
from artifactnet_jax.files import FORMATS, SUFFIXES, facts_of, find_audio
from artifactnet_jax.results import Failure, SegmentScore, Verdict
from audio_files import encode, noise, write


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


# --- Lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_lists_of_every_encoding(here, encoding, end):
    touch("naïve.wav", "b.mp3")
    text = end.join(["naïve.wav", "", "b.mp3", ""])
    Path("list.txt").write_bytes(text.encode(encoding))
    assert find_audio(["@list.txt"], False) == ["naïve.wav", "b.mp3"]


def test_paths_are_relative_to_the_list_and_else_to_the_current_folder(here):
    touch("lists/a.wav", "a.wav", "b.wav")
    Path("lists/list.txt").write_text("a.wav\nb.wav\ngone.wav\n")
    assert find_audio(["@lists/list.txt"], False) == ["lists/a.wav", "b.wav", "gone.wav"]


def test_a_comment_may_be_the_name_of_a_file(here):
    touch("#1 hit.wav")
    Path("list.txt").write_text("# songs\n#1 hit.wav\n")
    assert find_audio(["@list.txt"], False) == ["#1 hit.wav"]


def test_an_at_sign_may_begin_the_name_of_a_file(here):
    touch("@song.wav")
    assert find_audio(["@song.wav"], False) == ["@song.wav"]


def test_names_before_nuls_and_with_backslashes(here):
    touch("d/two\nlines.wav", "d/b.wav")
    Path("nul.txt").write_bytes(b"d/two\nlines.wav\0d/b.wav\0")
    assert find_audio(["@nul.txt"], False) == ["d/two\nlines.wav", "d/b.wav"]
    Path("list.txt").write_bytes(b"d\\b.wav\r\n")
    assert find_audio(["@list.txt"], False) == ["d/b.wav"]


def test_file_urls(here):
    touch("ä b.wav")
    url = (here / "ä b.wav").as_uri()
    assert "%" in url
    Path("list.txt").write_text(url)
    for given in ([url], ["@list.txt"], [url.replace("file://", "file://localhost")]):
        assert find_audio(given, False) == [str(here / "ä b.wav")]
    assert find_audio(["s3://bucket/a.wav"], False) == ["s3://bucket/a.wav"]


@pytest.mark.parametrize("there", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
def test_letters_of_another_unicode_form(here, there, asked):
    name = f"{unicodedata.normalize(there, 'é')}/{unicodedata.normalize(there, 'ü')}.wav"
    touch(name)
    (found,) = find_audio([unicodedata.normalize(asked, name)], False)
    assert os.path.exists(found)
    assert unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", name)


@pytest.mark.parametrize("kind", ["mp3", "wav", "flac"])
def test_a_recording_is_no_list(here, kind):
    write(here, f"a.{kind}", noise(1))
    with pytest.raises(ValueError, match="no list"):
        find_audio([f"@a.{kind}"], False)


# --- Folders --------------------------------------------------------------------------------------


def test_folders_say_what_they_leave_out(here):
    touch("d/a.wav", "d/x.txt", "d/y.txt", "d/cover.jpg", "d/README", "d/.h.wav", "d/deep/b.wav")
    Path("d/again").symlink_to("..")
    os.mkfifo("d/pipe.wav")
    told: list[str] = []
    assert find_audio(["d"], False, told.append) == ["d/a.wav"]
    (line,) = told
    assert line == (
        "d: left out 4 files of no audio suffix (.txt 2, .jpg 1, no suffix 1), 1 subfolder "
        "(-r searches them), 1 linked folder, 1 hidden name, 1 pipe or device"
    )
    told.clear()
    assert find_audio(["d"], True, told.append) == ["d/a.wav", "d/deep/b.wav"]
    assert "subfolder" not in told[0]
    assert "1 linked folder" in told[0]
    touch("whole/a.wav")
    told.clear()
    find_audio(["whole"], False, told.append)
    assert told == []


def test_every_format_has_suffixes_and_a_demuxer():
    av = pytest.importorskip("av")
    known = {name for each in av.formats_available for name in each.split(",")}
    assert set(FORMATS) <= known
    assert sum(len(text.split()) for text in FORMATS.values()) == len(SUFFIXES)
    assert {".mkv", ".mov", ".avi", ".ts", ".flv", ".m4v", ".m4r", ".3g2", ".mpg"} <= SUFFIXES
    assert {".spx", ".eac3", ".asf", ".voc", ".mp3", ".wav", ".flac", ".dsf", ".dff"} <= SUFFIXES


# --- Streams --------------------------------------------------------------------------------------


def test_pipes_are_copied_and_read_like_files(here):
    data = encode(noise(1), "flac")
    os.mkfifo("pipe")
    feed = threading.Thread(target=lambda: Path("pipe").write_bytes(data))
    feed.start()
    with sources(["pipe", "other.wav"]) as found:
        assert found[1] == "other.wav"
        assert found[0].name == "pipe"
        with open_audio(found[0]) as decoded:
            assert sum(map(len, decoded.blocks)) == 44_100
    feed.join()


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="needs /dev/stdout")
def test_stdin_and_stdout_by_their_names(here, tiny_file):
    data = encode(noise(5), "wav")
    run = [sys.executable, "-m", "artifactnet_jax", "score", "-q", "--format", "jsonl"]
    run += ["--backend", "numpy", "--weights", str(tiny_file), "-o", "/dev/stdout", "/dev/stdin"]
    done = subprocess.run(run, input=data, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    (row,) = map(json.loads, done.stdout.splitlines())
    assert (row["path"], row["duration_s"]) == ("/dev/stdin", 5.0)


@pytest.fixture
def tiny_file(tmp_path):
    from tiny_model import save_tiny

    return save_tiny(tmp_path / "tiny.safetensors")


# --- What is done already -------------------------------------------------------------------------


def row_of(path: str, named: str | None = None) -> dict:
    with open(path, "rb") as file:
        facts = facts_of(file)
    weights = {"name": "w", "sha256": "0", "preset": "edge"}
    verdict = Verdict(
        named or path, "ai", 0.9, 0.5, (SegmentScore(0.0, 0.9),), 1.0, 44_100, 2, weights,
        "numpy", "float32", "median", "all", file=facts,
    )  # fmt: skip
    return verdict.to_dict()


def resumed(rows: list[dict], paths: list[str]) -> tuple[list[str], set[str]]:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, done = rows_to_keep("rows.jsonl", {}, paths)
    return sorted(row["path"] for row in kept), done


def test_resume_goes_by_the_file(here):
    for name in ("a.wav", "b.wav", "c.wav"):
        Path(name).write_bytes(name.encode() * 100)
    rows = [row_of(name) for name in ("a.wav", "b.wav", "c.wav")]
    assert resumed(rows, ["a.wav", "b.wav"]) == (["a.wav", "b.wav", "c.wav"], {"a.wav", "b.wav"})

    status = os.stat("a.wav")
    Path("a.wav").write_bytes(b"other" * 100)  # of the same size
    os.utime("a.wav", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert resumed(rows, ["a.wav", "b.wav"]) == (["b.wav", "c.wav"], {"b.wav"})

    os.utime("b.wav")  # touched
    assert resumed(rows, ["b.wav"])[1] == {"b.wav"}

    os.rename("c.wav", "moved.wav")
    Path("link.wav").symlink_to("b.wav")
    Path("folder").mkdir()
    names = ["moved.wav", "link.wav", "./folder/../b.wav"]
    kept, done = resumed(rows[1:], names)
    assert done == set(names)
    assert "c.wav" not in kept

    shutil.copy("b.wav", "copy.wav")
    assert resumed(rows[1:2], ["copy.wav"])[1] == {"copy.wav"}


def test_resume_scores_again_what_it_cannot_know(here):
    Path("a.wav").write_bytes(b"a" * 100)
    row = row_of("a.wav")
    del row["file"]
    assert resumed([row], ["a.wav"])[1] == set()
    stream = row_of("a.wav", "-")
    stream["file"]["modified"] = None
    assert resumed([stream], ["-"]) == ([], set())
    failed = Failure("a.wav", "read", "a.wav: no").to_dict()
    assert resumed([failed], ["a.wav"]) == ([], set())
    gone = row_of("a.wav")
    os.unlink("a.wav")
    assert resumed([gone], ["a.wav"])[1] == {"a.wav"}  # its score is still what it was


def test_facts_are_of_the_bytes(here):
    import hashlib

    Path("a.wav").write_bytes(b"abc")
    with open("a.wav", "rb") as file:
        facts = files.facts_of(file)
    assert facts == {
        "size": 3,
        "modified": os.stat("a.wav").st_mtime_ns,
        "sha256": hashlib.sha256(b"abc").hexdigest(),
    }
