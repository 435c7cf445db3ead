"""The `xla` backend: the Flax model, compiled ahead of time for one fixed shape.

Every call runs the same executable on the same number of segments, padded with zeros: nothing
recompiles whatever the length or number of files, and a segment's score cannot depend on the batch
it came in, bit for bit. (Buckets of several sizes compile to different programs, whose sums differ
in the last bits.) On CPU one segment fills the machine, so the executable takes one and a batch is
a loop; on a GPU it takes `GPU_SEGMENTS`.
"""

from __future__ import annotations

import os

# A detector must leave room for the other users of the device; only effective before jax starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from artifactnet_jax.model import ArtifactNet
from artifactnet_jax.weights import Weights

CPU_SEGMENTS = 1
GPU_SEGMENTS = 16


def build_model(weights: Weights, dtype: str = "float32") -> ArtifactNet:
    """Flax model in evaluation mode, filled with these weights."""
    model = nnx.eval_shape(
        lambda: ArtifactNet(weights.config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
    )
    filled = [
        (path, leaf.replace(jnp.asarray(weights.tensors[".".join(map(str, path))])))
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    ]
    nnx.update(model, nnx.from_flat_state(filled))
    model.eval()
    return model


class XlaBackend:
    """XLA on whatever device jax finds first."""

    name = "xla"

    def __init__(self, weights: Weights, dtype: str = "float32", batch_size: int | None = None):
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"backend 'xla' computes in float32 or bfloat16, not {dtype}")
        self.dtype = dtype
        self.device = jax.devices()[0]
        self._segments = CPU_SEGMENTS if self.device.platform == "cpu" else GPU_SEGMENTS
        self.batch_size = batch_size or self._segments
        graph, self._state = nnx.split(build_model(weights, dtype))
        samples = weights.config.front_end.segment_samples

        def forward(state: nnx.State, audio: jax.Array) -> jax.Array:
            return nnx.merge(graph, state)(audio)

        shape = jax.ShapeDtypeStruct((self._segments, samples), jnp.float32)
        self._run = jax.jit(forward).lower(self._state, shape).compile()

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        n = len(audio)
        padded = np.zeros((-(-n // self._segments) * self._segments, audio.shape[1]), np.float32)
        padded[:n] = audio
        chunks = padded.reshape(-1, self._segments, audio.shape[1])
        # Dispatch is asynchronous: all chunks are queued before the first result is read.
        out = [self._run(self._state, chunk) for chunk in chunks]
        return np.concatenate([np.asarray(p) for p in out])[:n]
