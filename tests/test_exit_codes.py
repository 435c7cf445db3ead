"""Exit codes of every verb: what a script that calls the command can tell apart."""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from audio_files import noise, write
from tiny_model import save_tiny

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips where a package is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {missing}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def music(tmp_path_factory) -> Path:
    """A manifest of one real and one AI track, beside them."""
    folder = tmp_path_factory.mktemp("music")
    for seed, name in enumerate(("a.wav", "b.wav")):
        write(folder, name, noise(4, channels=1, seed=seed))
    (folder / "data.csv").write_text("path,label\na.wav,real\nb.wav,ai\n")
    return folder


def fill(text: str, **values: object) -> list[str]:
    return [part.format(**values) for part in text.split()]


# --- A full disk is no wrong usage ----------------------------------------------------------------

SCORE = "score --backend numpy --weights {tiny} {music}/a.wav"


@needs_full
@pytest.mark.parametrize(
    "line",
    [
        f"{SCORE} --format table",
        f"{SCORE} --format jsonl",
        f"{SCORE} --format json",
        f"{SCORE} --format csv",
        "live --backend numpy --weights {tiny} {music}/a.wav --format jsonl -q",
        "doctor",
        "doctor --json",
        "split {music}/data.csv -o {out}/split.csv --parts train=1",
        "mine {music}/data.csv --backend numpy --weights {tiny} -o {out}/mined.csv -q",
        pytest.param(
            "report {music}/a.wav --backend numpy --weights {tiny} -o {out} -q",
            marks=needs("av", "matplotlib"),
        ),
        pytest.param("train head --list", marks=needs("optax", "orbax", "grain")),
        pytest.param("token create --root {out}/service", marks=needs("sqlalchemy")),
    ],
)
def test_stdout_on_a_full_disk(command, tiny, music, tmp_path, monkeypatch, line):
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        done = command(*fill(line, tiny=tiny, music=music, out=tmp_path))
    assert done.code == 1
    said = "artifactnet-jax: cannot write to stdout: No space left on device; free space"
    assert done.err.splitlines()[-1].startswith(said)


@pytest.mark.parametrize(
    ("line", "output"),
    [
        (f"{SCORE} -o {{out}}/rows.csv --format csv", "rows.csv"),
        (f"{SCORE} -o {{out}}/rows.jsonl --format jsonl", "rows.jsonl"),
        ("split {music}/data.csv -o {out}/split.csv --parts train=1", "split.csv"),
        ("mine {music}/data.csv --backend numpy --weights {tiny} -o {out}/mined.csv -q", "mined"),
        pytest.param(
            "report {music}/a.wav --backend numpy --weights {tiny} -o {out}/pages -q",
            "pages/1-a.json",
            marks=needs("av", "matplotlib"),
        ),
        pytest.param("export {tiny} -o {out}/m.onnx", "m.onnx", marks=needs("onnx")),
        pytest.param("convert {onnx} -o {out}/w", "w", marks=needs("onnx", "flax")),
        pytest.param(
            "residuals --data {music}/data.csv --out {out}/r --cache {cache}",
            "r/teacher.json",
            marks=needs("flax"),
        ),
        pytest.param(
            "rvq --data {music}/data.csv --out {out}/r --cache {cache}",
            "r/settings.json",
            marks=needs("optax"),
        ),
        pytest.param(
            "bench accuracy --manifest {music}/data.csv --out {out}/b -q "
            "--detector artifactnet:{tiny}",
            "b/run.json",
            marks=needs("matplotlib", "pyarrow", "scipy", "sklearn"),
        ),
    ],
)
def test_an_output_on_a_full_disk(command, tiny, music, tmp_path, monkeypatch, line, output):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    onnx = Path(__file__).parent / "onnx" / "plain.onnx"
    folders = {"out": tmp_path, "cache": tmp_path / "cache"}
    monkeypatch.setattr(os, "fsync", full)
    done = command(*fill(line, tiny=tiny, music=music, onnx=onnx, **folders))
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("artifactnet-jax: ")
    assert f"{tmp_path}/{output}" in last
    assert "No space left on device" in last
    assert "free space" in last


@needs_full
def test_a_device_is_no_output_file(command, tiny, music):
    """Replacing it by a file would be worse: wrong usage, found before the work."""
    done = command(*fill(f"{SCORE} -o {FULL}", tiny=tiny, music=music))
    assert done.code == 2
    assert "not a regular file" in done.err


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    from artifactnet_jax.files import make_folder
    from artifactnet_jax.text import CommandError

    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match=r"--out .*/file/x: Not a directory: name") as taken:
        make_folder(tmp_path / "file" / "x", "--out")
    assert taken.value.code == 2

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "makedirs", full)
    with pytest.raises(CommandError, match=r"-o .*/x: No space left on device: free") as error:
        make_folder(tmp_path / "x", "-o")
    assert error.value.code == 1
