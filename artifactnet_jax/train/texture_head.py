"""The texture head's fit: statistics of tracks, taken once, and heads fitted to them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from threadpoolctl import threadpool_limits

from artifactnet_jax import dsp_jax, dsp_numpy
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.config import Config, Texture
from artifactnet_jax.data.augment import Augment, Chain, to_int16
from artifactnet_jax.data.decoded import AudioCache, read_array, write_array
from artifactnet_jax.data.manifest import Row
from artifactnet_jax.data.records import Crops
from artifactnet_jax.dsp_numpy import stft_magnitude
from artifactnet_jax.forward import texture_statistics
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.recording import to_float
from artifactnet_jax.texture import dense, normalised
from artifactnet_jax.train.losses import binary_cross_entropy
from artifactnet_jax.weights import Weights

_FIRST_NARROW = 50  # number of a row's first narrow version
_REVISION = 2  # of the statistics: raise it whenever the same audio gives something else
NARROW = (3_500.0, 16_000.0)  # Hz: where the band of a track's narrow version ends
LEAST_STD = 1e-3  # of a statistic that hardly differs between tracks

Params = dict[str, jax.Array]  # kernels [M, I, O] and biases [M, O] of M heads, by name


@dataclasses.dataclass(frozen=True)
class Fit:
    """Settings of a fit: together with the data they decide it."""

    segments: int = 5  # of a recording with `every_s` seconds for each, else one
    every_s: float = 6.0
    draws: int = 3  # changed versions of a recording's only segment; of several half as many each
    narrow: int = 1  # versions of a recording's first segment, changed and cut to a narrow band
    members: int = 5  # heads whose mean logit the one that is kept is taught to give
    steps: int = 2000  # of the members; it is taught in twice as many
    batch: int = 256
    rate: float = 1.5e-3
    weight_decay: float = 0.02
    input_dropout: float = 0.1
    dropout: float = 0.2
    mixup: float = 0.3  # of the Beta distribution that pairs are mixed by; 0: no mixing
    label_smoothing: float = 0.05
    source_power: float = 0.5
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Taken:
    """Statistics of a track: float32, those of its segments [segments, K] and [versions, K]."""

    plain: np.ndarray
    changed: np.ndarray


class _Statistics(Crops):
    """Statistics of segments of rows, each taken once and then kept on disk."""

    def __init__(self, rows: Sequence[Row], cache: AudioCache, config: Config, fit: Fit):
        self._config, self._fit, self._augment = config, fit, Augment()
        # What follows the statistics has no part in them.
        head = config.texture and dataclasses.asdict(
            dataclasses.replace(config.texture, hidden=(), limit=0.0)
        )
        known = [_REVISION, head, dataclasses.asdict(self._augment), NARROW]
        known += [config.front_end.segment_samples, config.front_end.sample_rate]
        digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
        store = os.path.join(cache.folder, "texture", digest)
        super().__init__(rows, cache, config.front_end.segment_samples, store)

    def of(self, k: int) -> Taken:
        """Statistics of row k's segments, unchanged and changed."""
        segments, draws = self._segments(k), self._fit.draws
        each = range(1, 1 + (draws if len(segments) == 1 else max(1, draws // 2)))
        changed = [(segment, version) for segment in segments for version in each]
        changed += [(0, _FIRST_NARROW + version) for version in range(self._fit.narrow)]
        plain = [self._one(k, segment, 0) for segment in segments]
        return Taken(np.stack(plain), np.stack([self._one(k, *draw) for draw in changed]))

    def plain(self, k: int) -> list[np.ndarray]:
        """Row k's unchanged segments, whose statistics `of` gives: float32 [N] each."""
        return [self._crop(k, segment, 0) for segment in self._segments(k)]

    def _segments(self, k: int) -> range:
        seconds = len(self.audio(k)) / self._config.front_end.sample_rate
        long = seconds >= self._fit.every_s * self._fit.segments
        return range(self._fit.segments if long else 1)

    def _crop(self, k: int, segment: int, version: int) -> np.ndarray:
        rng = self.generator(k, self._draw(segment, version))
        chain = self._augment.draw(rng) if version else Chain()
        if version >= _FIRST_NARROW:
            low, high = NARROW
            cutoff = float(low * (high / low) ** rng.random())
            chain = dataclasses.replace(chain, cutoff=cutoff, resampled=bool(rng.integers(2)))
        crop = self.crop(k, rng, chain)[0]
        return to_float(to_int16(crop))  # as a file would hold it

    def _draw(self, segment: int, version: int) -> str:
        """Name of a draw. It holds no setting of the fit, so all fits share statistics."""
        return f"res/{segment}/{version}"

    def _one(self, k: int, segment: int, version: int) -> np.ndarray:
        path = self.path(k, self._draw(segment, version))
        kept = read_array(path)
        if kept is not None:
            return kept
        audio, front_end = self._crop(k, segment, version), self._config.front_end
        magnitude = stft_magnitude(audio, front_end)
        values: np.ndarray = texture_statistics(audio, magnitude, self._config, dsp_numpy)
        write_array(path, values)
        return values


def collect(
    rows: Sequence[Row],
    cache: AudioCache,
    config: Config,
    fit: Fit,
    tell: Callable[[Taken], None] = lambda taken: None,
) -> list[Taken]:
    """Statistics of every row; `tell` is called with those of each, in their order."""
    source = _Statistics(rows, cache, config, fit)
    done = []
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cpu_count()) as pool:
        try:
            for values in pool.map(source.of, range(len(rows))):
                done.append(values)
                tell(values)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return done


def network_logits(
    weights: Weights, rows: Sequence[Row], cache: AudioCache, fit: Fit
) -> list[np.ndarray]:
    """The CNN's own logit of the same unchanged segments, float64 [segments] for each row."""
    source = _Statistics(rows, cache, weights.config, fit)
    plain = dataclasses.replace(weights.config, texture=None)
    network = NumpyNetwork(plain, weights.tensors)

    def one(k: int) -> np.ndarray:
        path = source.path(k, f"network/{weights.sha256}/{fit.segments}")
        kept = read_array(path)
        if kept is None:
            kept = np.array([network.logit(audio) for audio in source.plain(k)], np.float64)
            write_array(path, kept)
        return kept

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cpu_count()) as pool:
        return list(pool.map(one, range(len(rows))))


def head(
    texture: Texture, rows: Sequence[Row], statistics: Sequence[Taken], fit: Fit
) -> dict[str, np.ndarray]:
    """Tensors of the head, fitted to statistics of `collect`. Equal input gives equal tensors.

    It is taught the mean logit of `fit.members` heads, each fitted to the labels.
    """
    values = np.concatenate([part for taken in statistics for part in (taken.plain, taken.changed)])
    sizes = [len(taken.plain) + len(taken.changed) for taken in statistics]
    label = np.repeat([row.label for row in rows], sizes)
    weight = np.repeat(row_weights(rows, fit.source_power) / sizes, sizes)
    mean = np.average(values, 0, weight)
    std = np.maximum(np.sqrt(np.average((values - mean) ** 2, 0, weight)), LEAST_STD)
    mean, std = mean.astype(np.float32), std.astype(np.float32)
    x = normalised(values, mean, std, texture)
    rng = np.random.default_rng(fit.seed)
    names = [*(f"texture.hidden.{level}" for level in range(len(texture.hidden))), "texture.out"]
    sizes = [x.shape[1], *texture.hidden, 1]

    def start(members: int) -> Params:
        params = {}
        for name, (i, o) in zip(names, itertools.pairwise(sizes), strict=True):
            kernel = rng.standard_normal((members, i, o)) / math.sqrt(i)
            params[f"{name}.kernel"] = jnp.asarray(kernel, jnp.float32)
            params[f"{name}.bias"] = jnp.zeros((members, o), jnp.float32)
        return params

    def fitting(params: Params, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        first, *keys = jax.random.split(key, 1 + fit.members)
        x = _dropped(x, fit.input_dropout, first)

        def own(params: Params, key: jax.Array) -> jax.Array:
            def drop(x: jax.Array, level: int) -> jax.Array:
                return _dropped(x, fit.dropout, jax.random.fold_in(key, level))

            logit = dense(x, texture, params, dsp_jax, drop)
            return binary_cross_entropy(logit, y, fit.label_smoothing)

        return jax.vmap(own)(params, jnp.stack(keys)).sum()  # none has a part in another's

    def teaching(params: Params, x: jax.Array, _y: jax.Array, _key: jax.Array) -> jax.Array:
        def mean_logit(params: Params) -> jax.Array:
            logits: jax.Array = jax.vmap(lambda own: dense(x, texture, own, dsp_jax))(params)
            return logits.mean(0)

        taught, wanted = mean_logit(params), mean_logit(members)
        return jnp.square(taught - wanted).mean()

    pairs = _pairs(x, label, np.cumsum(weight), fit, rng)
    members = _descended(start(fit.members), fitting, pairs, fit.steps, fit)
    params = _descended(start(1), teaching, pairs, 2 * fit.steps, fit)
    tensors = {name: np.asarray(param[0]) for name, param in params.items()}
    return {"texture.mean": mean, "texture.spread": std, **tensors}


def _pairs(
    x: np.ndarray, label: np.ndarray, edges: np.ndarray, fit: Fit, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches: versions drawn by weight and mixed in pairs, labels mixed alike."""
    while True:
        pick = np.minimum(np.searchsorted(edges, rng.random(fit.batch) * edges[-1]), len(x) - 1)
        a, y = x[pick], label[pick].astype(np.float32)
        if fit.mixup:
            share = rng.beta(fit.mixup, fit.mixup, (fit.batch, 1)).astype(np.float32)
            other = rng.permutation(fit.batch)
            a = share * a + (1 - share) * a[other]
            y = share[:, 0] * y + (1 - share[:, 0]) * y[other]
        yield a, y


def _descended(
    params: Params,
    loss: Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array],
    pairs: Iterator[tuple[np.ndarray, np.ndarray]],
    steps: int,
    fit: Fit,
) -> Params:
    """The parameters after so many steps of AdamW: warm-up for a fifth of them, then a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, fit.rate, steps // 5, steps)
    optimiser = optax.adamw(schedule, weight_decay=fit.weight_decay)

    @jax.jit
    def step(params: Params, state: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        slope = jax.grad(loss)(params, x, y, key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its counters in
            change, state = optimiser.update(slope, state, params)
            return optax.apply_updates(params, change), state

    state, key = optimiser.init(params), jax.random.key(fit.seed)
    for number, (x, y) in enumerate(itertools.islice(pairs, steps)):
        params, state = step(params, state, x, y, jax.random.fold_in(key, number))
    return params


def _dropped(x: jax.Array, share: float, key: jax.Array) -> jax.Array:
    kept = jax.random.bernoulli(key, 1 - share, x.shape)
    return jnp.where(kept, x / (1 - share), 0.0)


def by_model(helpers: Sequence[Row]) -> list[Row]:
    """The rows with their model as source: what one codec made is one source."""
    return [dataclasses.replace(row, source=row.model or row.source) for row in helpers]


def row_weights(rows: Sequence[Row], source_power: float) -> np.ndarray:
    """Weight of each row [rows]: both labels sum to 1.

    Within a label a source weighs as its number of rows to the power `source_power`, and a kind as
    the sum of its sources to that power: else most real music is of games.
    """
    count = Counter((row.label, row.source) for row in rows)
    weights = np.array([count[row.label, row.source] ** (source_power - 1) for row in rows])
    kinds = np.array([f"{row.label} {row.kind}" for row in rows])
    for kind in np.unique(kinds):
        weights[kinds == kind] *= weights[kinds == kind].sum() ** (source_power - 1)
    for label in (0, 1):
        own = np.array([row.label == label for row in rows])
        weights[own] /= max(weights[own].sum(), 1e-12)
    return weights


def kinds_alike(rows: Sequence[Row], weight: np.ndarray) -> np.ndarray:
    """`weight` [rows] with the kinds of real music counting alike, however many tracks each has.

    For thresholds: what most of the real tracks are need not be what a user's are.
    """
    done = weight.copy()
    real = np.array([row.label == 0 for row in rows])
    kind = np.array([row.kind for row in rows])
    names = np.unique(kind[real])
    for name in names:
        own = real & (kind == name)
        done[own] *= weight[real].sum() / len(names) / weight[own].sum()
    return done
