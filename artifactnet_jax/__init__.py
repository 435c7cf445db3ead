"""ArtifactNet in JAX and NumPy: detect AI-generated music by the residue of neural codecs.

Importing this package loads nothing heavy: names below are resolved on first use.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from artifactnet_jax.backends import BackendError
    from artifactnet_jax.config import Config
    from artifactnet_jax.detector import Detector
    from artifactnet_jax.recording import AudioError
    from artifactnet_jax.results import Failure, Verdict
    from artifactnet_jax.weights import WeightsError, load_weights, save_weights

# Before anything imports them: nothing of what is scored, or where, leaves the machine.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime: on by default since 1.29
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # which some models of `bench` come by

__version__ = "0.1.0"
__all__ = [
    "AudioError",
    "BackendError",
    "Config",
    "Detector",
    "Failure",
    "Verdict",
    "WeightsError",
    "load_weights",
    "save_weights",
]

_HOME = {
    "AudioError": "recording",
    "BackendError": "backends",
    "WeightsError": "weights",
    "Config": "config",
    "Detector": "detector",
    "Failure": "results",
    "Verdict": "results",
    "load_weights": "weights",
    "save_weights": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'artifactnet_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"artifactnet_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # what completion offers
