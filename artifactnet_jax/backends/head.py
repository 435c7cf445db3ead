"""The texture head in NumPy, beside a network that another library runs on the CPU.

Measured (docs/experiments.md): onnxruntime takes more than twice NumPy's time for the head, and XLA
five sixths of its compile time. On a GPU the head stays in the program.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from artifactnet_jax import dsp_numpy, texture
from artifactnet_jax.dsp_numpy import StreamStft, stft_magnitude
from artifactnet_jax.forward import texture_statistics
from artifactnet_jax.weights import Weights


class HostHead:
    """What the head of some weights adds, a segment per thread of `pool` and one for BLAS each."""

    def __init__(self, weights: Weights, pool: ThreadPoolExecutor):
        self._config, self._tensors, self._pool = weights.config, weights.tensors, pool
        self._libraries = ThreadpoolController()  # looks for BLAS once, not at every batch

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """Audio float32 [B, N] -> what is added to the CNN's logits, float32 [B]."""
        with self._libraries.limit(limits=1, user_api="blas"):
            return np.array(list(self._pool.map(self._one, audio)), np.float32)

    def stream(self) -> Callable[[np.ndarray, int], np.ndarray]:
        """What is added for the windows of one stream: (audio [N], its position) -> scalar array.

        The bits of a call, in the caller's thread, with STFT frames shared (`StreamStft`).
        """
        stft = StreamStft()

        def one(audio: np.ndarray, position: int) -> np.ndarray:
            stft.start = position
            with self._libraries.limit(limits=1, user_api="blas"):
                return self._one(audio, stft)

        return one

    def _one(self, audio: np.ndarray, stft: Callable[..., Any] = stft_magnitude) -> np.ndarray:
        head = self._config.texture
        assert head is not None
        magnitude = stft(audio, self._config.front_end)
        statistics = texture_statistics(audio, magnitude, self._config, dsp_numpy, stft)
        return np.asarray(texture.logit(statistics, head, self._tensors, dsp_numpy))
