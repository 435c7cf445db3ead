"""The `numpy` backend: the reference pipeline in float32. No jax."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import ThreadpoolController

from artifactnet_jax.backends import cpu_count
from artifactnet_jax.reference import Network, StreamStft, channels, hpss, loudest, sigmoid
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
                texture = self._pool.submit(network.texture, audio, magnitude)
                views = network.views(network.mask(magnitude) * magnitude)
                logit = network.classify(views, loudest(views, network.config.front_end))
                return float(np.float32(sigmoid(logit + texture.result())))

        return score

    def song(self, audio: np.ndarray) -> np.ndarray:
        """P(AI) float32 [n] of the segments [n, N] of one song, under the config's joint rule."""
        network, front_end = self._network, self._network.config.front_end
        if not front_end.joint.startswith("song"):
            return self(audio)
        with self._libraries.limit(limits=1, user_api="blas"):
            views = list(self._pool.map(network.segment_views, audio))
            peaks = np.max([loudest(each, front_end) for each in views], axis=0)
            logits = self._pool.map(lambda each: network.classify(each, peaks), views)
            return np.array([sigmoid(logit) for logit in logits], np.float32)

    def stages(self, audio: np.ndarray) -> dict[str, np.ndarray]:
        """Every stage of one segment [N] scored by itself.

        magnitude, mask, residual, H, P [n_bins, T], views [3, n_mels, T] in dB before the clamp,
        channels [C, n_mels, T], logit and score ().
        """
        network, front_end = self._network, self._network.config.front_end
        with self._libraries.limit(limits=1, user_api="blas"):
            magnitude = network.magnitude(audio)
            mask = network.mask(magnitude)
            residual = mask * magnitude
            harmonic, percussive = hpss(residual, front_end)
            views = network.views(residual)
            features = channels(views, front_end, loudest(views, front_end))
            logit = network.logit(features) + network.texture(audio, magnitude)
        return {
            "magnitude": magnitude,
            "mask": mask,
            "residual": residual,
            "H": harmonic,
            "P": percussive,
            "views": views,
            "channels": features,
            "logit": logit,
            "score": sigmoid(logit),
        }
