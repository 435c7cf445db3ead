"""Documents say what the code and the reports say, and their links lead somewhere."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

import documents
from artifactnet_jax.weights import load_weights

ROOT = Path(__file__).parent.parent
REPORT = json.loads((ROOT / "scripts" / "edge-report.json").read_text())
ROBUST = json.loads((ROOT / "scripts" / "edge-robustness.json").read_text())


def test_what_is_generated_is_what_stands_there():
    command = [sys.executable, ROOT / "scripts" / "documents.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# --- Limits ---------------------------------------------------------------------------------------


def test_the_header_has_the_limits_and_the_digest_stays():
    weights = load_weights()
    limits = weights.provenance["limits"]
    assert limits == (ROOT / "scripts" / "edge-limits.txt").read_text().splitlines()
    assert weights.sha256 == "26ff46d08f5c06edaa6eb1a3ecf4beaafbb59de604a8cbca15bd5b2f5d8fb1df"


def test_other_limits_change_nothing_but_the_header():
    tensors = {"a": np.arange(3, dtype=np.float16), "b": np.arange(8, dtype=np.float32)}
    metadata = {"provenance": json.dumps({"note": "kept"}), "sha256": "kept"}
    old = save(tensors, metadata=metadata)
    new = documents.with_limits(old, ["One."])
    assert documents.with_limits(new, ["One."]) == new
    found = load(new)
    assert all((found[name] == tensor).all() for name, tensor in tensors.items())
    (size,) = struct.unpack("<Q", new[:8])
    assert size % 8 == 0
    header = json.loads(new[8 : 8 + size])["__metadata__"]
    assert json.loads(header["provenance"]) == {"note": "kept", "limits": ["One."]}
    assert header["sha256"] == "kept"


def test_limits_are_what_was_measured():
    """Every quantity in edge-limits.txt, against the reports."""
    said = (ROOT / "scripts" / "edge-limits.txt").read_text()
    assert "About a quarter to a third" in said
    missed = [1 - REPORT[part]["tpr"] for part in ("left_out", "unseen")]
    assert 0.22 < min(missed) < max(missed) < 0.34
    points = REPORT["operating_points"]
    assert points["fpr5"] < points["fpr2"] < points["fpr1"]
    assert "about three times as often" in said
    real, ai = ROBUST["real"], ROBUST["ai"]
    usual = real["versions"]["as it is"]["called_ai"]
    for name in ("24khz", "16khz", "mp3-64", "noise-20db"):
        assert real["versions"][name]["called_ai"] / usual == pytest.approx(3, rel=0.15)
    found = ai["versions"]["as it is"]["called_ai"]
    assert "less than half as often" in said
    assert ai["laundered"]["room"]["called_ai"] < found / 2
    assert "about a quarter as often" in said
    assert ROBUST["mixed"]["+0 dB"]["called_ai"] / found == pytest.approx(0.25, abs=0.05)
    assert "about three quarters as often" in said
    for name in ("clipped-6db", "soft-6db"):
        assert ai["versions"][name]["called_ai"] / found == pytest.approx(0.75, abs=0.1)
    assert "half of its segments or less" in said
    assert ROBUST["spliced"]["4 of 8"] < 0.1
    games = sum(s["tracks"] for s in REPORT["left_out"]["sources"].values() if s["kind"] == "game")
    reals = sum(s["tracks"] for s in REPORT["left_out"]["sources"].values() if s["label"] == "real")
    assert games / reals > 0.5


def test_limits_are_short_sentences():
    for sentence in load_weights().provenance["limits"]:
        assert re.fullmatch(r"[A-Z][^`\[\]]{20,220}\.", sentence)
