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

from artifactnet_jax.config import flops
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
}

GRAPH_BACKEND = "artifactnet_jax.convert.runtime:GraphBackend"  # xla's, for Weights.graph

HEAVY_FLOPS = 50e9  # per segment


def cpu_count() -> int:
    """Processors this process may use (the affinity mask, where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    return ""


def pick(weights: Weights) -> str:
    """What "auto" means here: `xla` where it pays for its start, else `numpy`.

    jax takes seconds to import and compile. That pays on a GPU and for heavy weights (v94 runs
    1.4 times as fast in xla on two cores); with light ones `numpy` has long finished by then.
    """
    if weights.file is not None:  # an engine: graphs are named together with their backend
        return "tensorrt"
    if weights.graph is not None:
        return "xla"
    if why_unavailable("xla"):
        return "numpy"
    gpu = any(importlib.util.find_spec(f"jax_{kind}_plugin") for kind in ("cuda12", "cuda13"))
    return "xla" if gpu or flops(weights.config)["total"] > HEAVY_FLOPS else "numpy"


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
    if weights.file is not None and name != "tensorrt":
        raise ValueError(f"{weights.file} is for backend 'tensorrt' only: name the weights file")
    if reason := why_unavailable(name):
        raise BackendError(reason)
    module, factory = BACKENDS[name][0].split(":")
    if weights.graph is not None:
        if name != "xla":
            raise ValueError(f"these weights are a foreign graph, which {name} cannot run: use xla")
        module, factory = GRAPH_BACKEND.split(":")
    return getattr(importlib.import_module(module), factory)(weights, dtype, batch_size)
