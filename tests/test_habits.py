"""What is checked before a commit, by continuous integration, and on other Pythons."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def recipe(target: str) -> list[str]:
    """Commands of a target of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert found, target
    return [line.strip() for line in found[1].splitlines()]


def test_a_commit_is_checked_by_what_continuous_integration_checks():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"entry: (.*)", hooks) == ["make lint"]
    assert not re.findall(r"repo: (?!local$).*", hooks, re.MULTILINE)
    assert "$(MAKE) lint" in recipe("test")
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def test_the_base_install_is_tested_on_the_oldest_and_newest_python_and_the_lowest_versions():
    run, base = ((ROOT / ".ci" / name).read_text(encoding="utf-8") for name in ("run", "base"))
    targets = re.search(r"^make (test-base .*)$", run, re.MULTILINE)
    assert targets
    calls = [line for target in targets[1].split() for line in recipe(target)]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'requires-python = ">=(3\.\d+)"', project)
    assert oldest
    for call in (oldest[1], "newest", f"{oldest[1]} lowest-direct"):
        assert f".ci/base {call}" in calls
    files = re.search(r"^files=\((.*)\)$", base, re.MULTILINE)
    assert files
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in files[1].split())
