"""Backends: what turns audio segments into scores. One table, one protocol, nothing imported early.

A backend is built once from a model and then called with float32 audio [B, 176400], B at most its
`batch_size`, for P(AI) [B]. The score of a segment never depends on what else is in the batch.
`artifactnet_jax.models` says which backend runs which model, and builds it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # the names below are wanted where numpy is too slow to import
    import numpy as np


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


class Needs(NamedTuple):
    """What must be there before a backend can run."""

    packages: tuple[str, ...] = ()
    extra: str = ""  # of this package, which brings them
    python: tuple[int, int] = (3, 10)  # the lowest


BACKENDS = {
    "xla": Needs(("jax", "flax"), "cpu", (3, 11)),
    "numpy": Needs(),
    "tensorrt": Needs(),  # its own package has two names, and may be the system's: see `engine`
    "onnxruntime": Needs(("onnxruntime",), "ort"),
    "onnxruntime-cuda": Needs(("onnxruntime",), "ort"),
}


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
