"""`rvq --codec`: positives by a published codec, and their originals at its band."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.testing import assert_allclose

from artifactnet_jax.data.manifest import read_manifest
from artifactnet_jax.train import published
from audio_files import noise, write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A manifest of two real tracks and one AI track."""
    rows = ["path,label,source,group,split"]
    for k in range(2):
        write(tmp_path, f"{k}.wav", noise(0.25 + 0.1 * k, seed=k))
        rows.append(f"{k}.wav,0,site{k},album{k},train")
    rows.append("ai.wav,1,gen,g,train")
    path = tmp_path / "data.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


class _Codec:
    """What TensorFlow Lite's interpreter shows of a codec that halves every frame."""

    def __init__(self, path: str, num_threads: int):
        self.name = Path(path).stem

    def allocate_tensors(self) -> None:
        """As of the library."""

    def get_signature_runner(self, name: str) -> Any:
        codes = np.zeros((1, 3), np.int32)
        return {
            ("soundstream_encoder", "serving_default"): lambda input_audio: {
                "output_0": input_audio
            },
            ("quantizer", "encode"): lambda input_frames, num_quantizers: (
                self._keep(input_frames) | {"codes": codes + num_quantizers}
            ),
            ("quantizer", "decode"): lambda encoding_indices: {"output_0": self._kept / 2},
            ("lyragan", "serving_default"): lambda input_audio: {"output_0": input_audio},
        }[self.name, name]

    def _keep(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        self._kept = frames
        return {"features": frames}


def test_a_published_codec(command, data, monkeypatch, tmp_path):
    interpreter = types.ModuleType("ai_edge_litert.interpreter")
    interpreter.Interpreter = _Codec
    monkeypatch.setitem(sys.modules, "ai_edge_litert", types.ModuleType("ai_edge_litert"))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", interpreter)
    out = tmp_path / "out"
    common = ["--data", data, "--out", out, "--cache", tmp_path / "cache", "-q"]
    done = command("rvq", *common, "--codec", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "soundstream_encoder.tflite" in done.err
    for name in published.FILES:
        (tmp_path / f"{name}.tflite").write_bytes(b"model")
    assert command("rvq", *common, "--codec", tmp_path).code == 0
    rows = read_manifest(out / "manifest.csv")
    assert [(row.label, row.group) for row in rows] == [
        (label, f"album{k}") for k in range(2) for label in (1, 0)
    ]
    for made, original in zip(rows[::2], rows[1::2], strict=True):
        coded, rate = soundfile.read(made.path)
        plain, _ = soundfile.read(original.path)
        real, _ = soundfile.read(dict(original.extra)["original"])
        assert rate == 16_000
        assert len(plain) == pytest.approx(len(real) * 16 / 44.1, abs=2)
        assert_allclose(coded, plain, atol=2 / 32768)  # halved, and of the same level again
        assert made.source.startswith("soundstream-")
        assert original.source.startswith("narrow-")
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    for row in rows:
        Path(row.path).unlink()
    done = command("rvq", *common, "--codec", tmp_path)
    assert done.code == 3
    assert "artifactnet-jax[litert]" in done.err
