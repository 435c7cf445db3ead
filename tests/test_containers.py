"""Container files. There is nothing here to build them with: what can be checked by reading is."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path

import pytest

from artifactnet_jax.cli import build_parser

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "containers").glob("Dockerfile.*"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN"}
INSTRUCTIONS |= {"STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, its arguments on one line) of a Dockerfile."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]
    assert {name for name, _ in found} <= INSTRUCTIONS
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_container_file_fits_the_project(path):
    found = instructions(path)
    given = {name: [text for other, text in found if other == name] for name, _ in found}

    (base,) = [text.partition("=")[2] for text in given["ARG"]]
    assert re.fullmatch(r"[a-z0-9./-]+:[a-zA-Z0-9.-]+", base)
    assert not base.endswith(":latest")
    assert {text.split()[0] for text in given["FROM"]} == {"${BASE}"}

    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in ignore if line.startswith("!")]
    copied = {
        source
        for text in given["COPY"]
        if not text.startswith("--from")
        for source in text.split()[:-1]
    }
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in let_in), source
    assert set(PROJECT["tool"]["setuptools"]["package-dir"].values()) <= copied
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= copied

    (extras,) = re.findall(r"pip install \"\.\[([a-z0-9,]+)\]\"", " ".join(given["RUN"]))
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])

    assert given["USER"][-1].isdigit()
    assert int(given["USER"][-1]) > 0
    words = json.loads(given["ENTRYPOINT"][0]) + json.loads(given["CMD"][0])
    assert words[0] in PROJECT["project"]["scripts"]
    arguments = build_parser().parse_args(words[1:])
    assert arguments.verb == "serve"
    check = json.loads(given["HEALTHCHECK"][0].split("CMD", 1)[1])
    compile(check[-1], "health check", "exec")
    assert f":{given['EXPOSE'][0]}/healthz" in check[-1]
    assert arguments.port == int(given["EXPOSE"][0])


def test_both_are_there():
    assert [path.suffix for path in FILES] == [".cuda", ".jetpack"]
