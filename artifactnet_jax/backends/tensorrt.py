"""The `tensorrt` backend: an engine on an NVIDIA GPU. No jax, no onnx, no CUDA package.

Every call runs one profile of the engine, filled up with zeros, so that a score does not depend on
its company. Two buffers take turns: one is filled while the GPU works on the other.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from artifactnet_jax.backends import BackendError
from artifactnet_jax.backends import engine as engines
from artifactnet_jax.backends.cuda import Cuda, CudaError
from artifactnet_jax.files import cache_folder
from artifactnet_jax.weights import Engine, Weights

PRECISIONS = {"float32": "fp32", "float16": "fp16"}


class TensorRTBackend:
    """Runs the engine that the weights are, or one of the cache, made there when it is missing.

    dtype "float16" has the convolutions in half precision; an engine or an exported ONNX file
    brings its own precision. batch_size chooses the profile: where the weights are an engine, the
    least one that is as large, or else its largest.

    Raises ValueError for a dtype or weights that it cannot take, BackendError where the GPU, the
    driver or TensorRT is missing or refuses.
    """

    name = "tensorrt"

    def __init__(
        self, weights: Weights | Engine, dtype: str = "float32", batch_size: int | None = None
    ):
        if dtype not in PRECISIONS:
            raise ValueError(f"backend 'tensorrt' computes in float32 or float16, not {dtype}")
        wanted = batch_size or engines.BATCH
        try:
            self._cuda = Cuda()
            path = self._find(weights, PRECISIONS[dtype], wanted)
            self._start(path, wanted)
        except CudaError as error:
            raise BackendError(f"backend 'tensorrt': {error}; use --backend numpy") from error

    def _find(self, weights: Weights | Engine, precision: str, batch: int) -> Path:
        """The engine to run. One that is missing is built, and stderr says why."""
        device = self._cuda.device
        if isinstance(weights, Engine) and weights.compiled:
            recipe, _ = engines.read_recipe(weights.file)
            here = dataclasses.replace(
                recipe,
                version=engines.load_library(recipe.library).__version__,
                device=engines.device_for(recipe.library, device),
                revision=engines.REVISION,
            )
            if reason := recipe.misfit(here):
                cure = f"build it again here: artifactnet-jax build W -o {weights.file}"
                raise BackendError(f"{weights.file} does not run here: {reason}; {cure}")
            return Path(weights.file)
        if isinstance(weights, Engine):
            precision = weights.precision
        library = engines.find_library()
        recipe = engines.recipe_for(weights, library, device, precision=precision, batches=[batch])
        path, reason = engines.cached_engine(recipe, cache_folder("engines"))
        if path is None:
            path = cache_folder("engines") / recipe.name()
            engines.make_engine(weights, recipe, path, reason)
        return path

    def _start(self, path: Path, wanted: int) -> None:
        recipe, _ = engines.read_recipe(path)
        self.dtype = next(k for k, v in PRECISIONS.items() if v == recipe.precision)
        self.batch_size = next((b for b in recipe.batches if b >= wanted), recipe.batches[-1])
        trt = engines.load_library(recipe.library)
        self._said = engines.logger(trt)
        self._engine = engines.load_plan(trt, self._said, recipe, engines.read_plan(path))
        self._context = self._engine.create_execution_context()
        shape = (self.batch_size, recipe.samples)
        profile = recipe.batches.index(self.batch_size)
        stream = self._cuda.stream
        self._check(
            self._context is not None
            and self._context.set_optimization_profile_async(profile, stream)
            and self._context.set_input_shape(engines.INPUT, shape)
        )
        self._slots = [_Slot(self._cuda, shape) for _ in range(2)]

    def _check(self, done: bool) -> None:
        if not done:
            cause = self._said.error or "it does not say why"
            raise BackendError(f"TensorRT cannot run the engine: {cause}; try a smaller batch size")

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """P(AI) float32 [B] of float32 audio [B, samples]."""
        scores = np.empty(len(audio), np.float32)
        self._cuda.activate()
        running: list[tuple[int, _Slot]] = []  # first segment and slot of what is queued
        for turn, start in enumerate(range(0, len(audio), self.batch_size)):
            if len(running) == len(self._slots):
                self._read(scores, *running.pop(0))
            slot = self._slots[turn % len(self._slots)]
            self._queue(slot, audio[start : start + self.batch_size])
            running.append((start, slot))
        for start, slot in running:
            self._read(scores, start, slot)
        return scores

    def _queue(self, slot: _Slot, audio: np.ndarray) -> None:
        slot.audio[: len(audio)] = audio
        slot.audio[len(audio) :] = 0
        self._cuda.upload(slot.audio_address, slot.audio)
        self._check(
            self._context.set_tensor_address(engines.INPUT, slot.audio_address)
            and self._context.set_tensor_address(engines.OUTPUT, slot.scores_address)
            and self._context.execute_async_v3(self._cuda.stream)
        )
        self._cuda.download(slot.scores, slot.scores_address)
        self._cuda.record(slot.done)

    def _read(self, scores: np.ndarray, start: int, slot: _Slot) -> None:
        self._cuda.wait(slot.done)
        part = scores[start : start + self.batch_size]
        part[:] = slot.scores[: len(part)]

    def song(self, audio: np.ndarray) -> np.ndarray:
        """P(AI) float32 [n] of the segments [n, samples] of one song, each by itself."""
        return self(audio)


class _Slot:
    """Audio and scores of one call, on the host and on the device."""

    def __init__(self, cuda: Cuda, shape: tuple[int, int]):
        self.audio = cuda.pinned(shape, np.float32)
        self.scores = cuda.pinned(shape[:1], np.float32)
        self.audio_address = cuda.memory(self.audio.nbytes)
        self.scores_address = cuda.memory(self.scores.nbytes)
        self.done = cuda.event()
