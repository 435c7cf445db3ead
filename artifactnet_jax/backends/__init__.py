"""Backends: what turns audio segments into scores. One table, one protocol, nothing imported early.

A backend is built once from weights and then called with float32 audio [B, 176400], B at most its
`batch_size`, for P(AI) [B]. The score of a segment never depends on what else is in the batch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Protocol

import numpy as np

from artifactnet_jax.presets import flops
from artifactnet_jax.weights import Weights


class Backend(Protocol):
    """What the detector needs to know of a backend."""

    name: str
    dtype: str  # what the convolutions compute in
    batch_size: int  # segments that one call takes at most

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """P(AI) float32 [B] of float32 audio [B, segment_samples], B <= batch_size."""
        ...

    def song(self, audio: np.ndarray) -> np.ndarray:
        """P(AI) of each segment of one song [n, segment_samples] seen together: float32 [n].

        A whole-song graph gives float64 [1], its own score.
        """
        ...


class BackendError(Exception):
    """A backend is not available here; the message says what to install."""


# name -> (module:class, packages it needs, extra that brings them, lowest Python)
BACKENDS = {
    "xla": ("artifactnet_jax.backends.xla:XlaBackend", ("jax", "flax"), "cpu", (3, 11)),
    "numpy": ("artifactnet_jax.backends.numpy:NumpyBackend", (), "", (3, 10)),
    "tensorrt": ("artifactnet_jax.backends.tensorrt:TensorRTBackend", (), "trt", (3, 10)),
    "onnxruntime": (
        "artifactnet_jax.backends.onnxruntime:OnnxruntimeBackend",
        ("onnxruntime",),
        "ort",
        (3, 10),
    ),
    "onnxruntime-cuda": (
        "artifactnet_jax.backends.onnxruntime:OnnxruntimeCudaBackend",
        ("onnxruntime",),
        "ort",
        (3, 10),
    ),
}

GRAPH_BACKEND = "artifactnet_jax.convert.runtime:GraphBackend"  # xla's, for Weights.graph

ENGINE_SUFFIX = ".engine"  # of a file that holds a TensorRT engine

HEAVY_FLOPS = 50e9  # per segment


def cpu_count() -> int:
    """Processors this process may use (the affinity mask, where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def leave_memory() -> None:
    """Have jax take GPU memory as it needs it, for the device may have other users.

    Effective before the first use of a device in this process. The user's own setting wins.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def why_unavailable(name: str) -> str:
    """One line saying why a backend cannot run here and the cure; empty when it can."""
    _, packages, extra, python = BACKENDS[name]
    if sys.version_info < python:
        version = ".".join(map(str, python))
        return f"backend {name!r} needs Python {version} or newer; use --backend numpy"
    if name == "tensorrt":  # from the system or from PyPI, under either name; and a GPU
        return importlib.import_module("artifactnet_jax.backends.engine").why_unavailable()
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        return (
            f"backend {name!r} needs {' and '.join(missing)}: "
            f"pip install 'artifactnet-jax[{extra}]'"
        )
    if name == "onnxruntime-cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            cure = "pip install onnxruntime-gpu in place of onnxruntime"
            return f"backend {name!r} needs onnxruntime's CUDA provider: {cure}"
    return ""


def pick(weights: Weights) -> str:
    """What "auto" means here: the fastest of what is installed, as measured in docs/speed.md.

    That is `xla` on a GPU. On a CPU it is `onnxruntime`; without it, `numpy` for light weights,
    which has scored a track before `xla` has started, and `xla` for heavy ones.
    """
    if weights.file is not None:
        return "tensorrt" if weights.file.endswith(ENGINE_SUFFIX) else "onnxruntime"
    if weights.graph is not None:
        return "xla"
    gpu = any(importlib.util.find_spec(f"jax_{kind}_plugin") for kind in ("cuda12", "cuda13"))
    compiles = not why_unavailable("xla")
    if gpu and compiles:
        return "xla"
    by_segment = not weights.config.front_end.joint.startswith("song")
    ready = not why_unavailable("onnxruntime") and importlib.util.find_spec("onnx") is not None
    if by_segment and ready:
        return "onnxruntime"
    heavy = flops(weights.config)["total"] > HEAVY_FLOPS
    return "xla" if compiles and heavy else "numpy"


def load_backend(
    name: str, weights: Weights, *, dtype: str = "float32", batch_size: int | None = None
) -> Backend:
    """Build a backend; "auto" is what `pick` says, or `xla` where the dtype needs it.

    Raises ValueError for an unknown name or dtype, BackendError when it cannot run here.
    """
    if name == "auto":
        name = pick(weights) if dtype == "float32" or weights.file is not None else "xla"
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: use auto, {', '.join(BACKENDS)}")
    if reason := why_unavailable(name):
        raise BackendError(reason)
    module, factory = BACKENDS[name][0].split(":")
    if weights.file is not None:
        is_engine = weights.file.endswith(ENGINE_SUFFIX)
        if name != "tensorrt" and (is_engine or not name.startswith("onnxruntime")):
            what = "an engine" if is_engine else "an exported graph"
            own = "tensorrt" if is_engine else "onnxruntime"
            cure = f"use --backend {own}, or name the weights file"
            raise ValueError(f"{weights.file} is {what}, which {name} cannot run: {cure}")
    if weights.graph is not None:
        if name != "xla":
            raise ValueError(f"these weights are a foreign graph, which {name} cannot run: use xla")
        module, factory = GRAPH_BACKEND.split(":")
    return getattr(importlib.import_module(module), factory)(weights, dtype, batch_size)
