"""The graph route: a foreign graph as a backend, compiled by XLA node by node as it stands."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from artifactnet_jax.backends.started import first_device, own_settings
from artifactnet_jax.convert.contract import Contract
from artifactnet_jax.convert.graph import graph_from_dict
from artifactnet_jax.convert.operators import compile_graph
from artifactnet_jax.convert.simplify import simplify
from artifactnet_jax.weights import ForeignGraph

ROUNDING = 1e-6  # by which a sum of weighted scores may leave [0, 1]


class GraphBackend:
    """Runs a `ForeignGraph`; float32 front to back, or whatever the graph itself computes in.

    One segment per call (or as many as the graph insists on), so that a score does not depend on
    the batch. A whole-song graph is compiled anew for each number of segments that comes up.
    """

    name = "xla"

    def __init__(
        self, weights: ForeignGraph, dtype: str = "float32", batch_size: int | None = None
    ):
        if dtype != "float32":
            raise ValueError(f"a foreign graph computes in its own dtypes, not {dtype}")
        self.dtype = dtype
        first_device()
        self._graph = graph_from_dict(weights.graph, weights.tensors)
        contract = dict(weights.provenance["contract"])
        self._contract = Contract(**{**contract, "axes": tuple(contract["axes"])})
        self._segments = self._contract.segments or 1
        if self._contract.song and self._contract.segments is not None:
            raise ValueError(
                f"this graph scores songs of exactly {self._segments} segments, which is not "
                "supported: export it with an open number"
            )
        self.batch_size = batch_size or self._segments
        self._compiled: dict[int, Callable[[np.ndarray], np.ndarray]] = {}
        if not self._contract.song:
            self._run(np.zeros((self._segments, self._contract.samples), np.float32))

    def _run(self, audio: np.ndarray) -> np.ndarray:
        with own_settings():
            return self._scores(audio)

    def _scores(self, audio: np.ndarray) -> np.ndarray:
        shaped = self._contract.shaped(audio)
        run = self._compiled.get(len(audio))
        if run is None:
            graph = simplify(self._graph, shaped.shape)
            run = compile_graph(graph, shaped.shape, self._contract.output)
            self._compiled[len(audio)] = run
        scores = run(shaped).reshape(-1)
        inside = (scores >= -ROUNDING) & (scores <= 1 + ROUNDING)
        return np.where(inside, np.clip(scores, 0, 1), scores)

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """P(AI) of each segment: [B, samples] -> [B]."""
        n, k = len(audio), self._segments
        padded = np.zeros((-(-n // k) * k, audio.shape[1]), np.float32)
        padded[:n] = audio
        parts = [self._run(padded[i : i + k]) for i in range(0, len(padded), k)]
        return np.concatenate(parts)[:n].astype(np.float32)

    def song(self, audio: np.ndarray) -> np.ndarray:
        """The song's own score [1] of a whole-song graph, float64."""
        return self._run(audio).astype(np.float64)
