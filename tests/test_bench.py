"""The benchmarks run and report what they say; their speed is nobody's assertion."""

import json

import pytest

pytest.importorskip("jax")
from artifactnet_jax.bench import median, training


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
