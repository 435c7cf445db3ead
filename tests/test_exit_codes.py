"""Exit codes of every verb: what a script that calls the command can tell apart."""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from artifactnet_jax.cli import build_parser
from artifactnet_jax.config import Config
from artifactnet_jax.weights import load_weights
from audio_files import noise, write
from tiny_model import save_tiny

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips where a package is missing."""
    found = {name: importlib.util.find_spec(name) for name in packages}
    # tests/onnx passes for a package without a file.
    missing = [name for name, spec in found.items() if spec is None or spec.origin is None]
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
        pytest.param(
            "convert {onnx} -o {out}/w", "w", marks=[needs("onnx", "flax"), pytest.mark.slow]
        ),
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


# --- Every verb -----------------------------------------------------------------------------------

TRAINING = needs("optax", "orbax", "grain", "sklearn", "matplotlib")
USAGE = [
    "score --weights {out}/none {music}/a.wav",
    "score @{out}/none.txt",
    "live",
    "live {music}/a.wav --rate 44100",
    pytest.param("report - -o {out}", marks=needs("av", "matplotlib")),
    pytest.param("report {music}/a.wav -o {music}/a.wav", marks=needs("av", "matplotlib")),
    pytest.param("convert {out}/none.onnx", marks=needs("onnx", "flax")),
    "convert {onnx} -o {out}/no/w",
    "export {out}/none -o {out}/m.onnx",
    "export {tiny} -o {out}/m.onnx --precision int8",
    pytest.param("verify {out}/none.onnx", marks=needs("onnx", "onnxruntime", "flax")),
    "build {out}/none",
    "fingerprint learn x {music} -o {out}/b.npz",
    "fingerprint list --bank {out}/none.npz",
    "fingerprint match @{out}/none.txt",
    "fingerprint test embedded --data {out}/none.csv",
    "split {out}/none.csv -o {out}/split.csv",
    "split {music}/data.csv -o {out}/split.txt",
    pytest.param("train head", marks=TRAINING),
    pytest.param("train head --list --set nothing=1", marks=TRAINING),
    "mine {out}/none.csv -o {out}/mined.csv",
    pytest.param("finetune --hard-negatives {out}/none.csv --out {out}/no/w", marks=TRAINING),
    pytest.param("residuals --data {out}/none.csv --out {out}/r", marks=TRAINING),
    pytest.param("rvq --data {music}/data.csv --out {out}/r --per-track 9", marks=TRAINING),
    pytest.param("texture --data {out}/none.csv -o {out}/w", marks=TRAINING),
    pytest.param(
        "bench accuracy --manifest {out}/none.csv --out {out}/b",
        marks=needs("matplotlib", "pyarrow", "scipy", "sklearn"),
    ),
    "bench throughput {out}/none.wav",
    "doctor {music}/a.wav",
    pytest.param("serve --root {music}/a.wav", marks=needs("sqlalchemy", "fastapi", "uvicorn")),
    pytest.param("token revoke 1 --root {out}/s", marks=needs("sqlalchemy")),
]


@pytest.mark.parametrize("line", USAGE)
def test_wrong_usage_is_2(command, tiny, music, tmp_path, line):
    onnx = Path(__file__).parent / "onnx" / "plain.onnx"
    done = command(*fill(line, tiny=tiny, music=music, onnx=onnx, out=tmp_path))
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("artifactnet-jax")


NEEDING = {
    "split m.csv -o x.csv": "train",
    "train head --list": "train",
    "mine x.wav -o x.csv": "train",
    "finetune --hard-negatives x --out w": "train",
    "residuals --data m.csv --out r": "train",
    "rvq --data m.csv --out r": "train",
    "texture --data m.csv -o w": "train",
    "bench accuracy --manifest m.csv --out b": "bench",
    "bench throughput": "bench",
    "serve": "serve",
    "token list": "serve",
}


@pytest.mark.parametrize(("line", "extra"), NEEDING.items())
def test_a_missing_package_is_3(command, monkeypatch, line, extra):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="abacus")

    monkeypatch.setattr(importlib, "import_module", missing)
    done = command(*line.split())
    verb = " ".join(line.split()[: 2 if line.startswith("bench") else 1])
    cure = f'pip install "artifactnet-jax[{extra}]"'
    said = f"artifactnet-jax: {verb} needs a package that is missing (abacus): {cure}\n"
    assert (done.code, done.out, done.err) == (3, "", said)


@pytest.mark.parametrize(
    ("line", "package"),
    [
        pytest.param("report x.wav -o out", "av", marks=needs("av")),
        pytest.param("report x.wav -o out", "matplotlib", marks=needs("matplotlib")),
        pytest.param("bench accuracy --manifest m --out out", "scipy", marks=needs("pyarrow")),
        pytest.param("verify m.onnx", "onnxruntime", marks=needs("onnxruntime")),
    ],
)
def test_a_package_found_missing_by_the_verb_is_3(command, monkeypatch, line, package):
    real = importlib.util.find_spec
    found = lambda name, *rest: None if name == package else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)
    done = command(*line.split())
    assert (done.code, done.out) == (3, "")
    assert package in done.err
    assert "pip install" in done.err


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        pytest.param("report x.wav -o out", "report", marks=needs("av", "matplotlib")),
        pytest.param("bench accuracy --manifest m --out out", "bench", marks=needs("pyarrow")),
    ],
)
def test_without_jinja2_there_is_no_page_and_the_cure_is_told(tmp_path, line, extra):
    code = "import sys; sys.modules['jinja2'] = None; from artifactnet_jax.cli import main; "
    args = [sys.executable, "-c", f"{code}sys.exit(main({line.split()}))"]
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (3, "")
    assert "a package that is missing (jinja2)" in done.stderr
    assert f"artifactnet-jax[{extra}]" in done.stderr


@pytest.mark.parametrize("verb", ["score", "live"])
def test_a_missing_backend_is_3(command, music, tiny, verb):
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is here")
    line = f"{verb} --backend tensorrt --weights {{tiny}} {{music}}/a.wav"
    done = command(*fill(line, tiny=tiny, music=music))
    assert (done.code, done.out) == (3, "")
    assert "tensorrt" in done.err.lower()


@pytest.mark.parametrize(
    "line",
    [
        *NEEDING,
        "score x.wav",
        "live x",
        "report x -o y",
        "fingerprint match x",
        "convert x",
        "export x -o y",
    ],
)
def test_ctrl_c_is_130_and_a_bug_is_1(command, monkeypatch, line):
    def broken(error: BaseException):
        def run(args: object) -> int:
            raise error

        return run

    monkeypatch.setattr("artifactnet_jax.cli._function", lambda args: broken(KeyboardInterrupt()))
    done = command(*line.split())
    assert (done.code, done.err) == (130, "artifactnet-jax: interrupted\n")
    monkeypatch.setattr("artifactnet_jax.cli._function", lambda args: broken(ValueError("bug")))
    done = command(*line.split())
    assert (done.code, done.err) == (1, "artifactnet-jax: ValueError: bug; --debug shows where\n")


# --- What --help shows ----------------------------------------------------------------------------

HELP = (Path(__file__).parent / "help.txt").read_text(encoding="utf-8")
TEXTS = dict(re.findall(r"^\$ artifactnet-jax ?(.*?) ?--help\n(.*?)(?=^\$ |\Z)", HELP, re.M | re.S))


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse words options otherwise there")
@pytest.mark.parametrize("verb", TEXTS)
def test_help_texts_stay(command, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "100")
    done = command(*verb.split(), "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.rstrip("\n") == TEXTS[verb].rstrip("\n")


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every verb's parser, by its name."""
    waiting = [("", build_parser())]
    while waiting:
        name, parser = waiting.pop()
        below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not below:
            yield name, parser
        for action in below:
            waiting += [(f"{name} {key}".strip(), sub) for key, sub in action.choices.items()]


def choices(verb: str, option: str) -> list[str]:
    """What a verb's --help offers for an option."""
    actions = dict(parsers())[verb]._actions
    (found,) = (a for a in actions if option in (*a.option_strings, a.dest))
    return list(found.choices or ())


def test_every_verb_has_its_help_text():
    assert {name for name, _ in parsers()} <= set(TEXTS)


def test_every_verb_runs_a_function_that_is_there():
    for name, parser in parsers():
        module, _, function = build_parser_default(parser, "runs", name).partition(":")
        if importlib.util.find_spec(module) is None:
            raise AssertionError(f"{name}: no module {module}")
        source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        assert re.search(rf"^def {function}\(args", source, re.M), name


def build_parser_default(parser: argparse.ArgumentParser, key: str, name: str) -> str:
    default = parser.get_default(key)
    return default or "artifactnet_jax.serve.command:token"  # an action of `token`


@pytest.mark.parametrize("verb", ["score", "live", "report", "mine", "serve"])
def test_backends_of_help_are_those_there_are(verb):
    from artifactnet_jax import backends, text

    assert set(text.BACKENDS) == set(backends.BACKENDS)
    assert choices(verb, "--backend") == ["auto", *text.BACKENDS]


def test_choices_of_help_are_those_of_the_code():
    """What --help must not import, against what --help shows."""
    rules = typing.get_type_hints(Config)["verdict"]
    aggregates = typing.get_args(typing.get_type_hints(rules)["aggregate"])
    for verb in ("score", "report"):
        assert choices(verb, "--aggregate") == list(aggregates)
    for verb in ("train", "bench throughput"):
        for preset in choices(verb, "--preset"):
            assert getattr(Config, preset)().preset == preset


@TRAINING
def test_choices_of_training_are_those_of_the_code():
    from artifactnet_jax.train.phases import PHASES

    assert choices("train", "phase") == list(PHASES)
    assert set(choices("finetune", "--deep")) < set(PHASES)
    points = {name for name, _ in load_weights().config.verdict.operating_points}
    assert set(choices("texture", "--point")) == points


def test_choices_of_live_are_those_of_the_code():
    from artifactnet_jax.live_source import PCM

    assert choices("live", "--pcm") == list(PCM)
