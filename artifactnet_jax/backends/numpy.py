"""The `numpy` backend: the reference pipeline in float32. No jax."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import ThreadpoolController

from artifactnet_jax.backends import cpu_count
from artifactnet_jax.reference import Network
from artifactnet_jax.weights import Weights


class NumpyBackend:
    """Runs wherever NumPy runs; float32 only.

    One segment per core, each with a single BLAS thread: the products of one segment are too small
    to share, and a score cannot depend on how BLAS would have split them.
    """

    name = "numpy"

    def __init__(self, weights: Weights, dtype: str = "float32", batch_size: int | None = None):
        if dtype != "float32":
            raise ValueError(f"backend 'numpy' computes in float32, not {dtype}")
        self.dtype = dtype
        self.batch_size = batch_size or cpu_count()
        self._network = Network(weights.config, weights.tensors)
        self._pool = ThreadPoolExecutor(cpu_count())
        self._libraries = ThreadpoolController()  # looks for BLAS once, not at every batch

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        with self._libraries.limit(limits=1, user_api="blas"):
            return np.array(list(self._pool.map(self._network, audio)), np.float32)
