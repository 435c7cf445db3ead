"""The `xla` backend: the Flax model, compiled ahead of time for one fixed shape.

Every call runs the same executable on the same number of segments, padded with zeros: nothing
recompiles whatever the length or number of files, and a segment's score cannot depend on the batch
it came in, bit for bit. (Buckets of several sizes compile to different programs, whose sums differ
in the last bits.) On a CPU the executable takes one segment, and as many run at once as there are
processors: XLA by itself leaves the second core half idle (docs/experiments.md). On a GPU it takes
`GPU_SEGMENTS`, or fewer where memory is short (`fitting`). Where the maximum of the top-dB clamp is
that of a whole song there are two such executables: one up to the views whose maxima are taken, one
from there. On a CPU a texture head is NumPy's part (`head`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from artifactnet_jax.backends import cpu_count, leave_memory
from artifactnet_jax.backends.head import HostHead
from artifactnet_jax.backends.started import first_device, own_settings
from artifactnet_jax.dsp_numpy import sigmoid
from artifactnet_jax.files import cache_folder
from artifactnet_jax.layers import PRODUCTS, tensor_shapes
from artifactnet_jax.model import ArtifactNet
from artifactnet_jax.passes import folded
from artifactnet_jax.weights import Weights

CPU_SEGMENTS = 1
GPU_SEGMENTS = 16
SHARE = 1 / 4  # of a device's memory: the rest is for weights, cuDNN, and on a board the system


def build_model(weights: Weights, dtype: str = "float32", parts: Any = None) -> ArtifactNet:
    """Flax model in evaluation mode, filled with these weights.

    `parts`: the networks by name, where they are not as they are trained; see `folded_model`.
    """
    how: dict[str, Any] = {"dtype": jnp.dtype(dtype), "parts": parts}
    model = nnx.eval_shape(lambda: ArtifactNet(weights.config, rngs=nnx.Rngs(0), **how))
    leaves = list(nnx.to_flat_state(nnx.state(model)))
    # All at once: an array each would compile a program for each of their shapes.
    arrays = jax.device_put([weights.tensors[".".join(map(str, path))] for path, _ in leaves])
    filled = [(path, leaf.replace(a)) for (path, leaf), a in zip(leaves, arrays, strict=True)]
    nnx.update(model, nnx.from_flat_state(filled))
    model.eval()  # type: ignore[no-untyped-call]
    return model


def folded_model(weights: Weights, dtype: str = "float32") -> ArtifactNet:
    """`build_model` of the networks as they are run: batch norms are in the products before them.

    For segments of the config's size. Tensors of products are in `dtype` already.
    """
    parts, tensors = folded(weights.config, weights.tensors)
    for part, layers in parts.items():
        products = tensor_shapes([x for x in layers if x.op in PRODUCTS], part)
        tensors |= {name: tensors[name].astype(jnp.dtype(dtype)) for name in products}
    front_end = {name: v for name, v in weights.tensors.items() if name.startswith("front_end.")}
    return build_model(dataclasses.replace(weights, tensors=tensors | front_end), dtype, parts)


def lowered(
    model: ArtifactNet, function: Callable[..., Any], shapes: Iterable[tuple[int, ...]], where: Any
) -> Any:
    """`function` of a model and float32 arrays of these shapes, to be compiled for `where`.

    `where` is a sharding, of a device here or of a named card (`cards`). The compiled program takes
    the model's state as its first argument, in the layouts that it chose: `input_formats`. With
    the layouts of the weights file a GPU would turn every kernel around in each call.
    """
    graph, state = nnx.split(model)

    def forward(state: nnx.State[Any, Any], *arrays: jax.Array) -> Any:
        return function(nnx.merge(graph, state), *arrays)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    kinds = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    places = (Format(Layout.AUTO, where), *[where] * len(arrays))
    return jax.jit(forward, in_shardings=places, out_shardings=where).lower(kinds, *arrays)


def fitting(
    programs: Callable[[int], list[tuple[Callable[..., Any], int]]], most: int, memory: int | None
) -> tuple[int, list[tuple[Callable[..., Any], int]]]:
    """The number of segments at once, `most` or the first half of it that fits, and its programs.

    `programs` compiles for a number of segments, and says what memory each program works in. That
    is at most `SHARE` of `memory`, the bytes of the device; None where nobody knows it. The choice
    goes by device and network alone, for another number is another program with other last bits.
    """
    n = most
    while True:
        found = programs(n)
        if n == 1 or memory is None or max(work for _, work in found) <= SHARE * memory:
            return n, found
        n //= 2


def _keep_compiled() -> None:
    """Keep compiled programs on disk for the next start, unless the user has said where or not to.

    jax's own cache, which goes by program, compiler, flags and processor.
    """
    said = getattr(jax.config, "jax_compilation_cache_dir", None)
    if said is None and getattr(jax.config, "jax_enable_compilation_cache", False):
        folder = cache_folder("xla")
        with contextlib.suppress(OSError):  # no home: compiled anew each time, as it was
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", os.fspath(folder))


class XlaBackend:
    """XLA on whatever device jax finds first."""

    name = "xla"

    def __init__(self, weights: Weights, dtype: str = "float32", batch_size: int | None = None):
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"backend 'xla' computes in float32 or bfloat16, not {dtype}")
        self.dtype = dtype
        leave_memory()
        _keep_compiled()
        self.device = first_device()
        on_cpu = self.device.platform == "cpu"
        self._pool = ThreadPoolExecutor(cpu_count()) if on_cpu else None
        self._stages: Callable[..., Any] | None = None
        self._front_end = weights.config.front_end
        self._head: HostHead | None = None
        if self._pool is not None and weights.config.texture is not None:
            self._head = HostHead(weights, self._pool)
            network = dataclasses.replace(weights.config, texture=None)
            weights = dataclasses.replace(weights, config=network)
        with own_settings():
            self._model = folded_model(weights, dtype)
        self._by_song = self._front_end.joint.startswith("song")
        memory = (self.device.memory_stats() or {}).get("bytes_limit")
        most = CPU_SEGMENTS if on_cpu else GPU_SEGMENTS
        self._segments, programs = fitting(self._programs, most, memory)
        self._parts = [program for program, _ in programs]
        self.batch_size = batch_size or (cpu_count() if on_cpu else self._segments)

    def _programs(self, n: int) -> list[tuple[Callable[..., Any], int]]:
        """What scores `n` segments, and the bytes of memory that each program works in."""
        fe = self._front_end
        audio = (n, fe.segment_samples)
        if self._by_song:
            mel_db = (n, 3, fe.n_mels, fe.n_frames)
            return [self._compile(_song_db, audio), self._compile(_classify, mel_db, (n, 3))]
        return [self._compile(ArtifactNet.logit if self._head else ArtifactNet.__call__, audio)]

    def _compile(
        self, function: Callable[..., Any], *shapes: tuple[int, ...]
    ) -> tuple[Callable[..., Any], int]:
        """`function` of the model and float32 arrays of these shapes, ahead of time.

        And the bytes of memory that it works in.
        """
        where = SingleDeviceSharding(self.device)
        with own_settings():
            compiled = lowered(self._model, function, shapes, where).compile()
            state = jax.device_put(nnx.state(self._model), compiled.input_formats[0][0])
        needed = compiled.memory_analysis()
        work = 0 if needed is None else needed.temp_size_in_bytes
        return functools.partial(_run, compiled, state), work

    def _chunks(self, audio: np.ndarray) -> np.ndarray:
        """[B, N] -> [chunks, segments, N], the last one filled up with zeros."""
        n = len(audio)
        padded = np.zeros((-(-n // self._segments) * self._segments, audio.shape[1]), np.float32)
        padded[:n] = audio
        return padded.reshape(-1, self._segments, audio.shape[1])

    def _each(self, program: Callable[..., Any], chunks: Iterable[Any]) -> Iterator[Any]:
        """What the program gives for every chunk, all started now and read one by one."""
        if self._pool is None:  # dispatch to a GPU is asynchronous
            return iter([program(chunk) for chunk in chunks])
        # Dispatch on a CPU is too, but one after the other; a thread waits for its own.
        return self._pool.map(lambda chunk: jax.block_until_ready(program(chunk)), chunks)

    def _scores(self, chunk: np.ndarray) -> Any:
        first, *then = self._parts
        return then[0](*first(chunk)) if then else first(chunk)

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """P(AI) float32 [B] of float32 audio [B, segment_samples]."""
        out = self._each(self._scores, self._chunks(audio))
        added = self._head and self._head(audio)  # while XLA is at work
        values = np.concatenate([np.asarray(part) for part in out])[: len(audio)]
        return values if added is None else sigmoid(values + added)

    def song(self, audio: np.ndarray) -> np.ndarray:
        """P(AI) float32 [n] of the segments [n, N] of one song, under the config's joint rule."""
        if not self._by_song:
            return self(audio)
        first, last = self._parts
        mel_db, peaks = zip(*self._each(first, self._chunks(audio)), strict=True)
        # The segments that fill up the last chunk are no part of the song.
        highest = np.concatenate([np.asarray(part) for part in peaks])[: len(audio)].max(axis=0)
        joint = np.tile(highest, (self._segments, 1))
        out = self._each(lambda part: last(part, joint), mel_db)
        return np.concatenate([np.asarray(part) for part in out])[: len(audio)]

    def stages(self, audio: np.ndarray) -> dict[str, np.ndarray]:
        """Every stage of one segment [N] scored by itself: `Forward.stages`, and its score ().

        Compiled at the first call, on its own.
        """
        if self._stages is None:
            self._stages, _ = self._compile(ArtifactNet.stages, (1, len(audio)))
        batch = np.asarray(audio, np.float32)[None]
        values = {name: np.asarray(value) for name, value in self._stages(batch).items()}
        if self._head is not None:
            values["texture_logit"] = self._head(batch)
            values["logit"] = values["logit"] + values["texture_logit"]
        values["score"] = sigmoid(values["logit"])
        return {name: value[0] for name, value in values.items()}


def _run(compiled: Any, *arrays: Any) -> Any:
    with own_settings():
        return compiled(*arrays)


def _song_db(model: ArtifactNet, audio: jax.Array) -> tuple[jax.Array, jax.Array]:
    mel_db = model.segment_db(model.magnitude(audio))
    return mel_db, model.reference_db(mel_db)


def _classify(model: ArtifactNet, mel_db: jax.Array, reference_db: jax.Array) -> jax.Array:
    return nnx.sigmoid(model.logit_of_db(mel_db, reference_db))
