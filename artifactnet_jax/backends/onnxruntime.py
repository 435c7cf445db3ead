"""The `onnxruntime` backends: the lean graph that `export` writes, on the CPU or on CUDA.

No jax, and `onnx` only to write the graph the first time; it is then kept in the user's cache.
Every run has the same shape, so a score does not depend on the batch that its segment came in, bit
for bit. On the CPU that is one segment on one thread, as many at once as there are processors:
measured against one segment over two threads that wins (docs/experiments.md). There a texture head
is NumPy's part, unless the graph is a file that holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime as ort

from artifactnet_jax.backends import BackendError, cpu_count
from artifactnet_jax.backends.head import HostHead
from artifactnet_jax.convert.export import Form
from artifactnet_jax.convert.export_cache import exported
from artifactnet_jax.dsp_numpy import sigmoid
from artifactnet_jax.text import brief
from artifactnet_jax.weights import Engine, Weights

GPU_SEGMENTS = 16


class OnnxruntimeBackend:
    """onnxruntime on the CPU; float32 only.

    Weights are exported, or are an exported graph already (`Engine`). BackendError where the
    graph cannot be written or loaded, ValueError for weights of a joint rule of a song.
    """

    name = "onnxruntime"
    provider: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})

    def __init__(
        self, weights: Weights | Engine, dtype: str = "float32", batch_size: int | None = None
    ):
        if dtype != "float32":
            raise ValueError(f"backend {self.name!r} computes in float32, not {dtype}")
        if weights.whole_song:
            cure = "use --backend numpy or xla"
            raise ValueError(f"backend {self.name!r} scores segments one by one: {cure}")
        self.dtype = dtype
        on_cpu = self.provider[0] == "CPUExecutionProvider"
        self._segments = 1 if on_cpu else GPU_SEGMENTS
        self.batch_size = batch_size or (cpu_count() if on_cpu else GPU_SEGMENTS)
        self._pool = ThreadPoolExecutor(cpu_count() if on_cpu else 1)
        self._head: HostHead | None = None
        if on_cpu and isinstance(weights, Weights) and weights.config.texture is not None:
            self._head = HostHead(weights, self._pool)
        self._session = self._open(weights)
        self._input = self._session.get_inputs()[0].name

    def _open(self, weights: Weights | Engine) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        options.log_severity_level = 4  # what it has to say comes as an exception too

        def load(model: str | bytes) -> Any:
            return ort.InferenceSession(model, options, providers=[self.provider])

        if isinstance(weights, Engine):
            try:
                return load(weights.file)
            except Exception as error:  # onnxruntime's own exception classes are not public
                cure = "export it again, with this version of artifactnet-jax"
                raise BackendError(f"{weights.file}: {brief(error)}: {cure}") from error
        form: Form = "segment" if self._head is None else "network"
        try:
            return load(exported(weights, form=form))
        except ImportError as error:
            cure = "pip install onnx, or export elsewhere and give that file to --weights"
            raise BackendError(f"backend {self.name!r} needs {error.name} once: {cure}") from error
        except Exception:  # the file in the cache was damaged
            return load(exported(weights, anew=True, form=form))

    def _chunk(self, audio: np.ndarray) -> np.ndarray:
        """What the graph gives for at most `_segments` segments, filled up with zeros."""
        padded = audio
        if len(audio) < self._segments:
            padded = np.zeros((self._segments, audio.shape[1]), np.float32)
            padded[: len(audio)] = audio
        scores: np.ndarray = self._session.run(None, {self._input: padded})[0]
        return scores[: len(audio)]

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """Segments float32 [n, segment_samples] -> P(AI) float32 [n]."""
        n = self._segments
        chunks = [audio[k : k + n] for k in range(0, len(audio), n)]
        out = self._pool.map(self._chunk, chunks)  # submitted now, read below
        if self._head is None:
            return np.concatenate(list(out))
        added = self._head(audio)
        return sigmoid(np.concatenate(list(out)) + added)

    def stream(self) -> Callable[[np.ndarray, int], float]:
        """Scorer of the overlapping windows of one stream: (audio [N], its position) -> P(AI).

        The bits of a call of one segment; a texture head runs beside the network.
        """
        if self._head is None:
            return lambda audio, _: float(self(audio[None])[0])
        head = self._head.stream()

        def score(audio: np.ndarray, position: int) -> float:
            network = self._pool.submit(self._chunk, audio[None])
            added = np.array([head(audio, position)], np.float32)
            return float(sigmoid(network.result() + added)[0])

        return score

    def song(self, audio: np.ndarray) -> np.ndarray:
        """P(AI) float32 [n] of the segments [n, N] of one song, each by itself."""
        return self(audio)


class OnnxruntimeCudaBackend(OnnxruntimeBackend):
    """onnxruntime on an NVIDIA GPU.

    No exhaustive search for convolutions, which picks others from run to run and moves scores; no
    TF32.
    """

    name = "onnxruntime-cuda"
    provider = (
        "CUDAExecutionProvider",
        {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"},
    )
