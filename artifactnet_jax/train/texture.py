"""The verb `texture`: fit the texture head of weights on the tracks of a manifest.

The head reads statistics that nothing trained has a part in, so they are taken once: of some
segments of every track as it is, of as many changed by the random chain that every other phase
draws from too (`augment`), label unseen, and of one more cut to a narrow band. They are kept in the
cache; a run that was stopped goes on from there. The fit itself takes a minute: mixed-up pairs,
dropout, and each source counting by its size to the power `source_power` within its label, as
everywhere in training. Fits differ by chance, and their mean is better than any of them; so several
heads are fitted, and the one that is kept is taught to give their mean: it costs what one costs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import roc_auc_score, roc_curve
from threadpoolctl import threadpool_limits

from artifactnet_jax import __version__, dsp_numpy, score
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.config import Config, Texture
from artifactnet_jax.data.augment import Augment, Chain, to_int16
from artifactnet_jax.data.manifest import (
    LABELS,
    ManifestError,
    Row,
    assign_splits,
    check_rows,
    read_manifests,
)
from artifactnet_jax.data.records import AudioCache, Crops, read_array, write_array
from artifactnet_jax.detector import log_odds, open_weights
from artifactnet_jax.dsp_numpy import sigmoid, stft_magnitude
from artifactnet_jax.forward import texture_statistics
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.results import (
    OK,
    SOME_FAILED,
    USAGE,
    CommandError,
    aggregate,
    brief,
)
from artifactnet_jax.texture import logit, normalised
from artifactnet_jax.train.losses import binary_cross_entropy
from artifactnet_jax.train.run import Teller, check_native, history, prepare_shown, progress
from artifactnet_jax.weights import Weights, WeightsError, save_weights

_FIRST_NARROW = 50  # number of a row's first narrow version
_REVISION = 2  # of the statistics: raise it whenever the same audio gives something else
MARGINS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)  # log-odds
NARROW = (3_500.0, 16_000.0)  # Hz: where the band of a track's narrow version ends
LEAST_SPREAD = 1e-3  # of a statistic that hardly differs between tracks

Params = list[tuple[jax.Array, jax.Array]]  # kernels [I, O] and biases [O], or of M heads: [M, ...]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Everything that decides a fit, besides its data."""

    segments: int = 3  # of a recording with `every_s` seconds for each, else one
    every_s: float = 6.0
    draws: int = 3  # changed versions of a recording's only segment; of several half as many each
    narrow: int = 1  # versions of a recording's first segment, changed and cut to a narrow band
    members: int = 8  # heads whose mean logit the one that is kept is taught to give
    steps: int = 2500  # of the members; it is taught in twice as many
    batch: int = 256
    rate: float = 1e-3
    weight_decay: float = 0.02
    input_dropout: float = 0.2
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
        """What row k's segments, as they are and changed, have for statistics."""
        segments, draws = self._segments(k), self._fit.draws
        each = range(1, 1 + (draws if len(segments) == 1 else max(1, draws // 2)))
        changed = [(segment, version) for segment in segments for version in each]
        changed += [(0, _FIRST_NARROW + version) for version in range(self._fit.narrow)]
        plain = [self._one(k, segment, 0) for segment in segments]
        return Taken(np.stack(plain), np.stack([self._one(k, *draw) for draw in changed]))

    def plain(self, k: int) -> list[np.ndarray]:
        """The unchanged segments of row k that `of` has the statistics of: float32 [N] each."""
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
        return to_int16(crop).astype(np.float32) / np.float32(32768)  # as a file would hold it

    def _draw(self, segment: int, version: int) -> str:
        """What a draw is known by: nothing of the fit is in it, so all fits share statistics."""
        return f"res/{segment}/{version}"

    def _one(self, k: int, segment: int, version: int) -> np.ndarray:
        path = self.path(k, self._draw(segment, version))
        kept = read_array(path)
        if kept is not None:
            return kept
        audio, config = self._crop(k, segment, version), self._config
        magnitude = stft_magnitude(audio, config.front_end)
        values = texture_statistics(audio, magnitude, config, dsp_numpy)
        write_array(path, values)
        return values


def collect(
    rows: Sequence[Row],
    cache: AudioCache,
    config: Config,
    fit: Fit,
    tell: Callable[[], None] = lambda: None,
) -> list[Taken]:
    """Statistics of every row; `tell` is called by row."""
    source = _Statistics(rows, cache, config, fit)
    done = []
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cpu_count()) as pool:
        try:
            for values in pool.map(source.of, range(len(rows))):
                done.append(values)
                tell()
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
        return np.array([network.logit(audio) for audio in source.plain(k)], np.float64)

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cpu_count()) as pool:
        return list(pool.map(one, range(len(rows))))


def head(
    texture: Texture, rows: Sequence[Row], statistics: Sequence[Taken], fit: Fit
) -> dict[str, np.ndarray]:
    """The head's tensors, fitted to what `collect` gives: the same for the same input.

    It is taught the mean logit of `fit.members` heads, each fitted to the labels.
    """
    values = np.concatenate([part for taken in statistics for part in (taken.plain, taken.changed)])
    sizes = [len(taken.plain) + len(taken.changed) for taken in statistics]
    label = np.repeat([row.label for row in rows], sizes)
    weight = np.repeat(row_weights(rows, fit.source_power) / sizes, sizes)
    mean = np.average(values, 0, weight)
    spread = np.maximum(np.sqrt(np.average((values - mean) ** 2, 0, weight)), LEAST_SPREAD)
    mean, spread = mean.astype(np.float32), spread.astype(np.float32)
    x = normalised(values, mean, spread, texture)
    rng = np.random.default_rng(fit.seed)
    sizes = [x.shape[1], *texture.hidden, 1]

    def start(members: int) -> Params:
        return [
            (
                jnp.asarray(rng.standard_normal((members, i, o)) / math.sqrt(i), jnp.float32),
                jnp.zeros((members, o), jnp.float32),
            )
            for i, o in itertools.pairwise(sizes)
        ]

    def fitting(params: Params, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        first, *keys = jax.random.split(key, 1 + fit.members)
        x = _dropped(x, fit.input_dropout, first)

        def own(params: Params, key: jax.Array) -> jax.Array:
            def drop(x: jax.Array, level: int) -> jax.Array:
                return _dropped(x, fit.dropout, jax.random.fold_in(key, level))

            return binary_cross_entropy(_logit(params, x, drop), y, fit.label_smoothing)

        return jax.vmap(own)(params, jnp.stack(keys)).sum()  # none has a part in another's

    def teaching(params: Params, x: jax.Array, _y: jax.Array, _key: jax.Array) -> jax.Array:
        taught, wanted = (jax.vmap(_logit, (0, None))(p, x).mean(0) for p in (params, members))
        return jnp.square(taught - wanted).mean()

    pairs = _pairs(x, label, np.cumsum(weight), fit, rng)
    members = _descended(start(fit.members), fitting, pairs, fit.steps, fit)
    params = _descended(start(1), teaching, pairs, 2 * fit.steps, fit)
    tensors = {"texture.mean": mean, "texture.spread": spread}
    for level, (kernel, bias) in enumerate(params):
        name = "texture.out" if level == len(texture.hidden) else f"texture.hidden.{level}"
        tensors |= {f"{name}.kernel": np.asarray(kernel[0]), f"{name}.bias": np.asarray(bias[0])}
    return tensors


def _pairs(
    x: np.ndarray, label: np.ndarray, edges: np.ndarray, fit: Fit, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches without end: versions drawn by weight, mixed in pairs; and their labels, likewise."""
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


def _logit(
    params: Params, x: jax.Array, drop: Callable[[jax.Array, int], jax.Array] = lambda x, level: x
) -> jax.Array:
    """One head's logits [B] of normalised statistics [B, K]; `drop` follows each hidden layer."""
    for level, (kernel, bias) in enumerate(params[:-1]):
        x = drop(jnp.maximum(_linear(x, kernel, bias), 0), level)
    return _linear(x, *params[-1])[:, 0]


def _linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias[None]


def _dropped(x: jax.Array, share: float, key: jax.Array) -> jax.Array:
    kept = jax.random.bernoulli(key, 1 - share, x.shape)
    return jnp.where(kept, x / (1 - share), 0.0)


def by_model(helpers: Sequence[Row]) -> list[Row]:
    """What one codec made is one source, however many the originals are of."""
    return [dataclasses.replace(row, source=row.model or row.source) for row in helpers]


def row_weights(rows: Sequence[Row], source_power: float) -> np.ndarray:
    """What a row counts: both labels alike, within one a source by its size to `source_power`."""
    count = Counter((row.label, row.source) for row in rows)
    weights = np.array([count[row.label, row.source] ** (source_power - 1) for row in rows])
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


def left_out(
    rows: Sequence[Row],
    statistics: Sequence[Taken],
    texture: Texture,
    fit: Fit,
    folds: int,
    helpers: Sequence[Row] = (),
    theirs: Sequence[Taken] = (),
) -> tuple[list[np.ndarray], np.ndarray]:
    """Logits of every row's unchanged segments by a head that knew nothing of the row's group.

    The groups are divided into `folds` parts; the rows of each are judged by a head that was fitted
    to the others, and to those of `helpers` that are of no group of the part. Helpers are not
    judged; `theirs` are their statistics. Returns the logits [segments] of each row, and its fold
    [rows].
    """
    parts = {str(k): 1 / folds for k in range(folds)}
    placed = assign_splits(rows, "group", parts, seed=fit.seed)
    fold = np.array([int(row.split) for row in placed])
    out: list[np.ndarray] = [np.zeros(0)] * len(rows)
    for k in range(folds):
        known = np.flatnonzero(fold != k).tolist()
        hidden = {rows[i].group for i in np.flatnonzero(fold == k).tolist()}
        also = [i for i, row in enumerate(helpers) if row.group not in hidden]
        tensors = head(
            texture,
            [*(rows[i] for i in known), *(helpers[i] for i in also)],
            [*(statistics[i] for i in known), *(theirs[i] for i in also)],
            fit,
        )
        for i in np.flatnonzero(fold == k).tolist():
            out[i] = logit(statistics[i].plain, texture, tensors).astype(np.float64)
    return out, fold


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How the two logits become a probability: sigmoid(own * head + network * cnn + bias)."""

    own: float
    network: float
    bias: float

    def scores(self, own: np.ndarray, network: np.ndarray) -> np.ndarray:
        """P(AI) of segments from their two logits."""
        return sigmoid(self.own * own + self.network * network + self.bias)


def calibrate(
    rows: Sequence[Row],
    own: Sequence[np.ndarray],
    network: Sequence[np.ndarray],
    source_power: float,
) -> Calibration:
    """Logistic regression on the segments of rows that neither part of the detector was fitted to.

    A share of the network that is not above 0 becomes 0: then it only adds noise.
    """
    from sklearn.linear_model import LogisticRegression

    sizes = [len(part) for part in own]
    weight = np.repeat(row_weights(rows, source_power) / sizes, sizes)
    y = np.repeat([row.label for row in rows], sizes)
    x = np.stack([np.concatenate(list(own)), np.concatenate(list(network))], axis=1)

    def regress(columns: np.ndarray) -> Any:
        model = LogisticRegression(C=1e6, max_iter=1000)
        return model.fit(columns, y, sample_weight=weight * len(y) / weight.sum())

    both = regress(x)
    if both.coef_[0, 1] > 0:
        own_share, network_share = map(float, both.coef_[0])
        return Calibration(own_share, network_share, float(both.intercept_[0]))
    alone = regress(x[:, :1])
    return Calibration(float(alone.coef_[0, 0]), 0.0, float(alone.intercept_[0]))


def operating_points(label: np.ndarray, score: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """Thresholds from tracks that were left out, each as low as it may be.

    "fprN" calls at most N % of the (weighted) real tracks AI, and is missing where no threshold
    does; "balanced" has the largest sum of the shares of both classes that are judged right.
    """
    real = label == 0
    candidates = np.unique(np.nextafter(score.astype(np.float32), np.float32(2)).astype(float))
    candidates = np.minimum(candidates, 1.0)

    def share(own: np.ndarray, threshold: float) -> float:
        return float(weight[own & (score >= threshold)].sum() / weight[own].sum())

    false = np.array([share(real, t) for t in candidates])
    found = np.array([share(~real, t) for t in candidates])
    points = {}
    for percent in (1, 2, 5):
        allowed = candidates[false <= percent / 100]
        if len(allowed):
            points[f"fpr{percent}"] = float(allowed[0])
    points["balanced"] = float(candidates[np.argmax(found - false)])
    return points


def reached(points: Mapping[str, float], name: str) -> float:
    """The threshold of an operating point. CommandError where no threshold reaches it."""
    if name not in points:
        cause = f"no threshold reaches {name}: too many real tracks have the highest scores"
        raise CommandError(
            f"{cause}; use --point {' or '.join(points)}, or more music", SOME_FAILED
        )
    return points[name]


def combined(
    tensors: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], calibration: Calibration
) -> dict[str, np.ndarray]:
    """A network's tensors with the head `own`, both scaled as the calibration says."""
    done = {**tensors, **own}
    for name, factor in (("texture.out", calibration.own), ("cnn.out", calibration.network)):
        for leaf in ("kernel", "bias"):
            done[f"{name}.{leaf}"] = done[f"{name}.{leaf}"] * np.float32(factor)
    done["texture.out.bias"] = done["texture.out.bias"] + np.float32(calibration.bias)
    return done


def run(args: argparse.Namespace) -> int:
    """Fit, calibrate, write and report what the arguments name; returns the exit code."""
    fit = dataclasses.replace(
        Fit(), segments=args.segments, draws=args.draws, steps=args.steps, seed=args.seed
    )
    try:
        rows = read_manifests(args.data)
        helpers = read_manifests(args.also) if args.also else []
        weights = open_weights(args.init)
        check_native(weights)
        check_rows(rows, by="group")
    except (ManifestError, WeightsError) as error:
        raise CommandError(str(error), USAGE) from error
    if len({row.label for row in rows if row.split != "train"}) < 2:
        cause = "no rows of both labels lie outside the part 'train': nothing to calibrate with"
        raise CommandError(f"{cause}: divide the manifest with artifactnet-jax split", USAGE)
    if problem := score.output_problem(args.output):
        raise CommandError(f"{args.output}: {problem}", USAGE)
    config = weights.config
    if config.texture is None:
        config = dataclasses.replace(config, texture=Texture())
    texture = config.texture
    assert texture is not None
    cache = AudioCache(args.cache)
    say = Teller(args.quiet)
    rows, failures = prepare_shown(rows, cache, max_bad=0.05, jobs=cpu_count(), tell=say)
    if helpers:
        helpers, more = prepare_shown(helpers, cache, max_bad=0.05, jobs=cpu_count(), tell=say)
        failures = [*failures, *more]
        helpers = by_model(helpers)
    counted = itertools.count(1)
    with progress(say, 0, len(rows) + len(helpers), "track") as move:
        statistics = collect(rows, cache, config, fit, lambda: move(next(counted)))
        theirs = collect(helpers, cache, config, fit, lambda: move(next(counted)))
    try:
        own, fold = left_out(rows, statistics, texture, fit, args.folds, helpers, theirs)
    except ManifestError as error:
        raise CommandError(str(error), USAGE) from error
    unseen = [i for i, row in enumerate(rows) if row.split != "train"]
    network = network_logits(weights, [rows[i] for i in unseen], cache, fit)
    judged = [rows[i] for i in unseen]
    calibration = calibrate(judged, [own[i] for i in unseen], network, fit.source_power)
    rule, eps = config.verdict.aggregate, config.verdict.rms_eps
    score_of = np.array(
        [
            aggregate(calibration.scores(own[i], other).tolist(), [1.0] * len(other), rule, eps)
            for i, other in zip(unseen, network, strict=True)
        ]
    )
    label = np.array([row.label for row in judged])
    points = operating_points(
        label, score_of, kinds_alike(judged, row_weights(judged, fit.source_power))
    )
    everything = head(texture, [*rows, *helpers], [*statistics, *theirs], fit)
    tensors = combined(weights.tensors, everything, calibration)
    verdict = dataclasses.replace(
        config.verdict,
        threshold=reached(points, args.point),
        operating_points=tuple(points.items()),
        least_segments=args.least_segments or config.verdict.least_segments,
    )
    config = dataclasses.replace(config, texture=texture, verdict=verdict)
    alone = np.array([sigmoid(part.mean()) for part in own])
    report = {
        "rows": len(rows),
        "also": len(helpers),
        "groups": len({row.group for row in rows}),
        "skipped": [failure.message for failure in failures],
        "fit": dataclasses.asdict(fit),
        "calibration": dataclasses.asdict(calibration),
        "operating_points": points,
        "left_out": judgement(rows, alone, fold, args.point, fit.source_power),
        "unseen": judgement(judged, score_of, fold[unseen], args.point, fit.source_power),
    }
    kept = {key: report[key] for key in ("rows", "also", "fit", "calibration", "operating_points")}
    try:
        save_weights(
            args.output,
            config,
            tensors,
            name=args.name or Path(args.output).stem,
            licence=weights.licence,
            provenance={
                "trained_by": f"artifactnet-jax {__version__}",
                "history": [*history(weights), {"phase": "texture", **kept}],
                "note": "not evidence by itself",
            },
            dtype=np.float16 if args.half else np.float32,
        )
    except (OSError, WeightsError) as error:
        raise CommandError(f"{args.output}: {brief(error)}", SOME_FAILED) from error
    print(json.dumps(report, indent=1))
    return SOME_FAILED if failures else OK


def judgement(
    rows: Sequence[Row], score: np.ndarray, fold: np.ndarray, point: str, source_power: float
) -> dict[str, Any]:
    """How good scores in [0, 1] [rows] are, of rows that what gave them was not fitted to.

    The verdicts of a fold are those at the threshold of the other folds, so that it is no choice
    of the tracks that it is judged by. Intervals are of 95 %, over whole sources. `undecided` is
    what a margin around the threshold (log-odds) leaves, and how often what remains is wrong;
    `called_ai` the share of every kind above the threshold.
    """
    label = np.array([row.label for row in rows])
    weight = row_weights(rows, source_power)
    distance = np.zeros(len(rows))  # from the threshold, log-odds
    for k in np.unique(fold):
        own, other = fold == k, fold != k
        alike = kinds_alike([rows[i] for i in np.flatnonzero(other).tolist()], weight[other])
        threshold = reached(operating_points(label[other], score[other], alike), point)
        distance[own] = log_odds(score[own]) - log_odds(threshold)
    called = distance >= 0

    def share(w: np.ndarray, judged: np.ndarray, among: np.ndarray) -> float:
        return float((weight * w)[among & judged].sum() / max((weight * w)[among].sum(), 1e-12))

    def f1(w: np.ndarray) -> float:
        found, missed, false = (
            (weight * w)[mask].sum()
            for mask in (called & (label == 1), ~called & (label == 1), called & (label == 0))
        )
        return float(2 * found / max(2 * found + missed + false, 1e-12))

    figures = {
        "auc": lambda w: _auc(label, score, weight * w),
        "tpr_at_fpr5": lambda w: _tpr(label, score, weight * w, 0.05),
        "f1": f1,
        "fpr": lambda w: share(w, called, label == 0),
        "tpr": lambda w: share(w, called, label == 1),
    }
    done: dict[str, Any] = {"tracks": len(rows), "groups": len({row.group for row in rows})}
    for name, figure in figures.items():
        low, done[name], high = bootstrap(rows, figure)
        done[f"{name}_interval"] = [low, high]
    everything = np.ones(len(rows))
    done["undecided"] = []
    for margin in MARGINS:
        decided = np.abs(distance) >= margin
        wrong = {
            name: share(everything, called != label, decided & (label == k))
            for k, name in enumerate(("fpr", "missed"))
        }
        covered = share(everything, decided, everything > 0)
        done["undecided"].append({"margin": margin, "coverage": covered, **wrong})
    kind = np.array([row.kind for row in rows])
    done["called_ai"] = {name: share(everything, called, kind == name) for name in sorted({*kind})}
    sources = {}
    for name in sorted({row.source for row in rows}):
        own = np.array([row.source == name for row in rows])
        sources[name] = {
            "label": LABELS[int(label[own][0])],
            "kind": rows[int(np.flatnonzero(own)[0])].kind,
            "tracks": int(own.sum()),
            "called_ai": float(called[own].mean()),
            "median_score": float(np.median(score[own])),
        }
    return {**done, "sources": sources}


def bootstrap(
    rows: Sequence[Row], statistic: Callable[[np.ndarray], float], resamples: int = 500
) -> tuple[float, float, float]:
    """2.5 % bound, value, 97.5 % bound of a statistic of row weights; whole sources are resampled.

    Within each label, so that no resample lacks one.
    """
    rng = np.random.default_rng(0)
    names = [(row.label, row.source) for row in rows]
    numbers = {name: k for k, name in enumerate(sorted(set(names)))}
    unit = np.array([numbers[name] for name in names])
    labels = np.array([name[0] for name in sorted(numbers)])
    values = []
    for _ in range(resamples):
        count = np.zeros(len(numbers))
        for k in (0, 1):
            own = np.flatnonzero(labels == k)
            np.add.at(count, rng.choice(own, len(own)), 1)
        values.append(statistic(count[unit]))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), statistic(np.ones(len(rows))), float(high)


def _tpr(label: np.ndarray, score: np.ndarray, weight: np.ndarray, most: float) -> float:
    false, found, _ = roc_curve(label, score, sample_weight=weight)
    return float(found[np.searchsorted(false, most + 1e-9, side="right") - 1])


def _auc(label: np.ndarray, score: np.ndarray, weight: np.ndarray) -> float:
    kept = weight > 0
    return float(roc_auc_score(label[kept], score[kept], sample_weight=weight[kept]))
