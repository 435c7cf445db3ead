"""The source distribution holds the whole repository: its tests run where it is unpacked."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_source_distribution_holds_every_tracked_file(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no checkout with git")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    assert {"README.md", "tests/test_distribution.py", ".ci/run"} <= tracked
    for name in tracked:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / "tree" / name)
    code = f"from setuptools.build_meta import build_sdist as b; print(b({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "tree", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked - held == set()
