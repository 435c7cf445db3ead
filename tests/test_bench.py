"""The benchmarks run and report what they say; their speed is nobody's assertion."""

import json
import sys

import pytest

pytest.importorskip("jax")
from artifactnet_jax.bench import median, serving, training


def test_median(capsys):
    small = ["--batch", "1", "--bins", "40", "--frames", "50", "--rounds", "1"]
    assert median.main(small) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [r["axis"] for r in results] == [-1, -2]
    for result in results:
        assert result["equals_scipy"] == dict.fromkeys(("scipy", "numpy", "xla", "xla_sort"), True)
        assert set(result["ratios"]) == {"scipy/numpy", "scipy/xla", "xla_sort/xla"}


def test_training_speed_of_a_phase():
    row = training.measure("edge", "encoder", 2, 0.1, "float32", 1)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["edge", "encoder", "2"]
    assert float(cells[6]) == pytest.approx(2 * float(cells[5]), abs=0.02)


def test_load_on_the_service(capsys, monkeypatch):
    pytest.importorskip("fastapi")
    monkeypatch.setattr(
        sys, "argv", ["serving", "--uploaders", "2", "--files", "2", "--seconds", "1"]
    )
    serving.main()
    row = json.loads(capsys.readouterr().out)["loads"][0]
    assert row["files"] == row["upload_s"]["n"] == 4
    assert [row[key] for key in ("lost", "twice", "failed", "sent_again")] == [0, 0, 0, 0]
    assert row["different_scores_of_a_clip"] == 1
