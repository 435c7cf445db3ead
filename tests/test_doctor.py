"""The command `artifactnet-jax doctor`."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from artifactnet_jax import __version__, backends, doctor
from artifactnet_jax.weights import WeightsError, load_weights


@pytest.fixture
def _no_jax(monkeypatch):
    for package in ("jax", "flax"):
        monkeypatch.setitem(sys.modules, package, None)


def test_json_and_table_say_the_same(command):
    done = command("doctor", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["artifactnet_jax"] == __version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cores"] == backends.cpu_count()
    assert found["backends"]["numpy"] == "ok"
    assert found["auto"] in found["backends"]
    assert found["packages"]["numpy"]
    assert {"WAV", "FLAC"} <= set(found["audio_formats"])
    weights = load_weights()
    assert found["weights"] == {
        **weights.summary(),
        "licence": weights.licence,
        "provenance": weights.provenance,
        "threshold": weights.config.verdict.threshold,
        "operating_points": dict(weights.config.verdict.operating_points),
    }

    table = command("doctor")
    assert (table.code, table.err) == (0, "")
    for text in (
        f"artifactnet-jax {__version__}",
        *found["backends"],
        found["packages"]["numpy"],
        *found["audio_formats"],
        weights.sha256,
        weights.licence,
    ):
        assert text in table.out


@pytest.mark.usefixtures("_no_jax")
def test_without_jax(command):
    done = command("doctor", "--json")
    assert done.code == 0
    found = json.loads(done.out)
    graphs = all(map(importlib.util.find_spec, ("onnx", "onnxruntime")))
    assert found["auto"] == ("onnxruntime" if graphs else "numpy")
    assert "pip install 'artifactnet-jax[cpu]'" in found["backends"]["xla"]
    assert found["jax_devices"] == []
    table = command("doctor")
    assert table.code == 0
    assert found["backends"]["xla"] in table.out


def test_no_backend_at_all(command, monkeypatch):
    monkeypatch.setattr(doctor, "why_unavailable", lambda name: f"{name}: not here")
    done = command("doctor")
    assert done.code == 3
    assert "numpy: not here" in done.out
    done = command("doctor", "--json")
    assert done.code == 3
    assert json.loads(done.out)["auto"] is None


@pytest.mark.usefixtures("_no_jax")
def test_the_report_survives_what_it_reports_on(command, monkeypatch):
    def broken(path=None):
        raise WeightsError("weights: damaged")

    monkeypatch.setattr("artifactnet_jax.weights.load_weights", broken)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert doctor._devices()[0].startswith("error: ModuleNotFoundError: ")
    done = command("doctor", "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["weights"] == {"error": "weights: damaged"}
    assert found["audio_formats"][0].startswith("error: ")
    assert "weights: damaged" in command("doctor").out


def test_a_driver_that_fails_is_one_line(monkeypatch):
    jax = pytest.importorskip("jax")
    for error, line in (
        (RuntimeError("no driver\nat 0x0"), "error: RuntimeError: no driver"),
        (AssertionError(), "error: AssertionError in test_doctor.py"),
    ):

        def devices(error=error):
            raise error

        monkeypatch.setattr(jax, "devices", devices)
        assert [text.partition(", line ")[0] for text in doctor._devices()] == [line]
