"""The `numpy` backend: `NumpyNetwork` in float32. No jax."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import ThreadpoolController

from artifactnet_jax.backends import cpu_count
from artifactnet_jax.dsp_numpy import StreamStft, sigmoid
from artifactnet_jax.numpy_network import NumpyNetwork
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
        self._network = NumpyNetwork(weights.config, weights.tensors)
        self._pool = ThreadPoolExecutor(cpu_count())
        self._libraries = ThreadpoolController()  # looks for BLAS once, not at every batch

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """P(AI) float32 [B] of float32 audio [B, segment_samples]."""
        with self._libraries.limit(limits=1, user_api="blas"):
            return np.array(list(self._pool.map(self._network, audio)), np.float32)

    def stream(self) -> Callable[[np.ndarray, int], float]:
        """Scorer of the overlapping windows of one stream: (audio [N], its position) -> P(AI).

        The bits of a call, sooner: the texture head runs beside the network, and STFT frames are
        shared (`StreamStft`). One window at a time.
        """
        stft = StreamStft()
        network = copy.copy(self._network)
        network.stft = stft

        def score(audio: np.ndarray, position: int) -> float:
            stft.start = position
            with self._libraries.limit(limits=1, user_api="blas"):
                magnitude = network.magnitude(audio)
                texture = self._pool.submit(network.texture_logit, audio, magnitude)
                mel_db = network.segment_db(magnitude)
                logit = network.logit_of_db(mel_db) + texture.result()
                return float(np.float32(sigmoid(logit)))

        return score

    def song(self, audio: np.ndarray) -> np.ndarray:
        """P(AI) float32 [n] of the segments [n, N] of one song, under the config's joint rule."""
        network = self._network
        if not network.config.front_end.joint.startswith("song"):
            return self(audio)
        with self._libraries.limit(limits=1, user_api="blas"):
            mel_db = list(self._pool.map(lambda x: network.segment_db(network.magnitude(x)), audio))
            reference_db = np.max([network.reference_db(each) for each in mel_db], axis=0)
            logits = self._pool.map(lambda each: network.logit_of_db(each, reference_db), mel_db)
            return np.array([sigmoid(logit) for logit in logits], np.float32)

    def stages(self, audio: np.ndarray) -> dict[str, np.ndarray]:
        """Every stage of one segment [N] scored by itself: `Forward.stages`, and its score ()."""
        with self._libraries.limit(limits=1, user_api="blas"):
            found = self._network.stages(audio)
        return found | {"score": sigmoid(found["logit"])}
