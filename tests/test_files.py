"""Facts of a run in its folder: written once, and compared when the command is given again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from artifactnet_jax.files import claim
from artifactnet_jax.text import USAGE, CommandError

FACTS = {"steps": 3, "settings": {"rate": 0.5, "parts": ["a"]}, "version": "1"}


def decisive(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("steps", "settings")}


def test_the_same_run_goes_on(tmp_path):
    path = tmp_path / "run.json"
    assert claim(path, FACTS, decisive) == FACTS
    assert json.loads(path.read_text()) == FACTS
    assert claim(path, FACTS | {"version": "2"}, decisive) == FACTS  # what was there


def test_another_run_is_told_what_differs(tmp_path):
    path = tmp_path / "run.json"
    claim(path, FACTS, decisive)
    other = {"steps": 4, "settings": {"parts": ["a"], "seed": 1}}
    with pytest.raises(CommandError) as refused:
        claim(path, other, decisive)
    differs = "settings.rate 0.5 there, None here, settings.seed None there, 1 here, "
    differs += "steps 3 there, 4 here"
    cure = "give the same settings, or another --out"
    assert str(refused.value) == f"{tmp_path} holds another run ({differs}): {cure}"
    assert refused.value.code == USAGE


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"steps": 3}'])
def test_a_damaged_file_is_no_run(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(CommandError, match=r"run\.json cannot be read .*: name another --out"):
        claim(path, FACTS, decisive)
    assert path.read_text() == text
