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
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from artifactnet_jax import dsp_numpy
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.config import Config, Texture
from artifactnet_jax.console.progress import progress
from artifactnet_jax.data.decoded import AudioCache, prepare
from artifactnet_jax.data.manifest import LABELS, Row, read_manifests
from artifactnet_jax.data.splits import assign_splits, check_rows
from artifactnet_jax.decision import log_odds
from artifactnet_jax.dsp_numpy import sigmoid
from artifactnet_jax.evaluation import Sample, numbered, operating_points
from artifactnet_jax.files import check_output, replace_file, whole_file, writing
from artifactnet_jax.results import Failure, aggregate
from artifactnet_jax.text import OK, SOME_FAILED, USAGE, CommandError, brief
from artifactnet_jax.texture import logit
from artifactnet_jax.train.run import native_weights, provenance
from artifactnet_jax.train.texture_head import (
    Fit,
    Taken,
    by_model,
    collect,
    head,
    kinds_alike,
    network_logits,
    row_weights,
)
from artifactnet_jax.weights import Weights, WeightsError, save_weights

MARGINS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)  # log-odds
RESAMPLES = 500  # of an interval
FIGURES = {"auc": "auroc", "tpr_at_fpr5": "tpr_at_fpr5", "f1": "f1", "fpr": "fpr", "tpr": "recall"}


def left_out(
    rows: Sequence[Row],
    statistics: Sequence[Taken],
    texture: Texture,
    fit: Fit,
    folds: int,
    helpers: Sequence[Row] = (),
    theirs: Sequence[Taken] = (),
) -> tuple[list[np.ndarray], np.ndarray, list[dict[str, np.ndarray]]]:
    """Held-out logits of every row's unchanged segments: no head was fitted to the row's group.

    The groups are divided into `folds` parts; the rows of each are scored by a head that was fitted
    to the others, and to those of `helpers` that are of no group of the part. Rows of the part
    "test" are scored and not fitted to. Helpers are not scored; `theirs` are their statistics.
    Returns the logits [segments] of each row, its fold [rows], and the head of every fold.
    """
    parts = {str(k): 1 / folds for k in range(folds)}
    placed = assign_splits(rows, "group", parts, seed=fit.seed)
    fold = np.array([int(row.split) for row in placed])
    out: list[np.ndarray] = [np.zeros(0)] * len(rows)
    heads = []
    for k in range(folds):
        known = [i for i in np.flatnonzero(fold != k).tolist() if rows[i].split != "test"]
        hidden = {rows[i].group for i in np.flatnonzero(fold == k).tolist()}
        also = [i for i, row in enumerate(helpers) if row.group not in hidden]
        tensors = head(
            texture,
            [*(rows[i] for i in known), *(helpers[i] for i in also)],
            [*(statistics[i] for i in known), *(theirs[i] for i in also)],
            fit,
        )
        for i in np.flatnonzero(fold == k).tolist():
            logits = logit(statistics[i].plain, texture, tensors, dsp_numpy)
            out[i] = logits.astype(np.float64)
        heads.append(tensors)
    return out, fold, heads


@dataclasses.dataclass(frozen=True)
class Calibration:
    """P(AI) of two logits: sigmoid(own * texture head + network * CNN + bias)."""

    own: float
    network: float
    bias: float

    def logits(self, own: np.ndarray, network: np.ndarray) -> np.ndarray:
        """Log-odds of segments from their two logits."""
        return np.asarray(self.own * own + self.network * network + self.bias)

    def scores(self, own: np.ndarray, network: np.ndarray) -> np.ndarray:
        """P(AI) of segments from their two logits."""
        return sigmoid(self.logits(own, network))


def calibrate(
    rows: Sequence[Row],
    own: Sequence[np.ndarray],
    network: Sequence[np.ndarray],
    source_power: float,
) -> Calibration:
    """Logistic regression on held-out segments: no part of the detector was fitted to the rows.

    A weight of the network that is not above 0 becomes 0: such a network only adds noise.
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


def write_left_out(
    path: str,
    rows: Sequence[Row],
    seconds: Sequence[float],
    logits: Sequence[np.ndarray],
    fold: np.ndarray,
    heads: Sequence[Mapping[str, np.ndarray]],
) -> None:
    """JSON Lines, and the head of every fold beside it (.npz).

    Of every row what it is, its length, its fold, and its segments' log-odds by a fit without its
    group; the network was not trained on it either.
    """
    lines = []
    for row, length, values, part in zip(rows, seconds, logits, fold.tolist(), strict=True):
        known = dataclasses.asdict(row) | {"seconds": round(length, 3), "fold": part}
        lines.append(json.dumps(known | {"logits": [round(float(x), 4) for x in values]}))
    arrays = {f"{k}/{name}": tensor for k, own in enumerate(heads) for name, tensor in own.items()}
    with writing(path):
        replace_file(path, "".join(f"{line}\n" for line in lines).encode())
        with whole_file(f"{path}.npz") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]


def read_limits(path: str) -> list[str]:
    """Where weights fail: the lines of a text file, a sentence each.

    Raises CommandError when the file cannot be read or holds no sentence.
    """
    try:
        limits = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: {brief(error)}", USAGE) from error
    if not any(limits):
        raise CommandError(f"{path}: no sentence in it; leave --limits out for none", USAGE)
    return [sentence for sentence in limits if sentence]


def run(args: argparse.Namespace) -> int:
    """Fit, calibrate, write and report what the arguments name; returns the exit code."""
    fit = dataclasses.replace(
        Fit(), segments=args.segments, draws=args.draws, steps=args.steps, seed=args.seed
    )
    rows, helpers, weights = _inputs(args)
    limits = {"limits": read_limits(args.limits)} if args.limits else {}
    config = dataclasses.replace(weights.config, texture=weights.config.texture or Texture())
    texture, rule = config.texture, config.verdict
    assert texture is not None
    cache = AudioCache(args.cache)

    def prepared(rows: list[Row]) -> tuple[list[Row], list[Failure]]:
        with progress(args.quiet, args.output, len(rows)) as shown:
            return prepare(rows, cache, max_bad=0.05, jobs=cpu_count(), tell=shown)

    rows, failures = prepared(rows)
    helpers, more = prepared(helpers) if helpers else ([], [])
    helpers, failures = by_model(helpers), [*failures, *more]
    with progress(args.quiet, args.output, len(rows) + len(helpers)) as shown:
        statistics = collect(rows, cache, config, fit, shown)
        theirs = collect(helpers, cache, config, fit, shown)
    own, fold, heads = left_out(rows, statistics, texture, fit, args.folds, helpers, theirs)
    chosen = [i for i, row in enumerate(rows) if row.split != "train"]
    unseen = [rows[i] for i in chosen]
    network = network_logits(weights, unseen, cache, fit)
    calibration = calibrate(unseen, [own[i] for i in chosen], network, fit.source_power)
    score_of = np.array(
        [
            aggregate(scores.tolist(), [1.0] * len(scores), rule.aggregate, rule.rms_eps)
            for scores in map(calibration.scores, [own[i] for i in chosen], network)
        ]
    )
    if args.left_out:
        held = [calibration.logits(own[i], one) for i, one in zip(chosen, network, strict=True)]
        seconds = [len(cache.get(row.path)) / config.front_end.sample_rate for row in unseen]
        write_left_out(args.left_out, unseen, seconds, held, fold[chosen], heads)
    label = np.array([row.label for row in unseen])
    alike = kinds_alike(unseen, row_weights(unseen, fit.source_power))
    points = operating_points(label, score_of, alike)
    rule = dataclasses.replace(
        rule,
        threshold=reached(points, args.point),
        operating_points=tuple(points.items()),
        least_segments=args.least_segments or rule.least_segments,
    )
    known = [i for i, row in enumerate(rows) if row.split != "test"]
    everything = head(
        texture,
        [*(rows[i] for i in known), *helpers],
        [*(statistics[i] for i in known), *theirs],
        fit,
    )
    tensors = combined(weights.tensors, everything, calibration)
    alone = np.array([sigmoid(part.mean()) for part in own])
    facts = {
        "fit": dataclasses.asdict(fit),
        "calibration": dataclasses.asdict(calibration),
        "operating_points": points,
    }
    counts = {"rows": len(rows), "also": len(helpers)}
    entry = {"phase": "texture", **counts, **facts}
    _write(args, weights, dataclasses.replace(config, verdict=rule), tensors, entry, limits)
    report = {
        **counts,
        "groups": len({row.group for row in rows}),
        "skipped": [failure.message for failure in failures],
        **facts,
        "left_out": evaluate(rows, alone, fold, args.point, fit.source_power),
        "unseen": evaluate(unseen, score_of, fold[chosen], args.point, fit.source_power),
    }
    with writing("stdout"):
        print(json.dumps(report, indent=1))
    return SOME_FAILED if failures else OK


def _inputs(args: argparse.Namespace) -> tuple[list[Row], list[Row], Weights]:
    """The rows to fit to and to evaluate, those of `--also`, and the weights. CommandError."""
    rows = read_manifests(args.data)
    helpers = read_manifests(args.also) if args.also else []
    weights = native_weights(args.init)
    check_rows(rows, by="group")
    if len({row.label for row in rows if row.split != "train"}) < 2:
        cause = "no rows of both labels lie outside the part 'train': nothing to calibrate with"
        raise CommandError(f"{cause}: divide the manifest with artifactnet-jax split", USAGE)
    check_output(args.output, args.output)
    return rows, helpers, weights


def _write(
    args: argparse.Namespace,
    weights: Weights,
    config: Config,
    tensors: Mapping[str, np.ndarray],
    entry: dict[str, Any],
    limits: dict[str, Any],
) -> None:
    """The weights with their new head; `entry` goes to their history. CommandError."""
    try:
        with writing(args.output):
            save_weights(
                args.output,
                config,
                tensors,
                name=args.name or Path(args.output).stem,
                licence=weights.licence,
                provenance=provenance(weights, entry) | limits,
                dtype=np.float16 if args.half else np.float32,
                fine=weights.fine,
            )
    except WeightsError as error:
        raise CommandError(f"{args.output}: {brief(error)}", SOME_FAILED) from error


def evaluate(
    rows: Sequence[Row], score: np.ndarray, fold: np.ndarray, point: str, source_power: float
) -> dict[str, Any]:
    """Figures of held-out scores: [rows] in [0, 1], from a model that was not fitted to these rows.

    Each fold uses the threshold chosen on the other folds. Intervals are of 95 %, over whole
    sources. `undecided` tells what a margin around the threshold (log-odds) leaves, and how often
    what remains is wrong; `called_ai` the share of every kind above the threshold.
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
    unit = numbered([(row.label, row.source) for row in rows])
    sample = Sample(label, score, unit, "source", weight, at_once=1)
    points, drawn = sample.points(called), sample.resampled(called, RESAMPLES, seed=0)
    report: dict[str, Any] = {"tracks": len(rows), "groups": len({row.group for row in rows})}
    for name, metric in FIGURES.items():
        report[name] = points[metric]
        report[f"{name}_interval"] = sample.spread(drawn[metric])["interval"]

    def share(chosen: np.ndarray, among: np.ndarray) -> float:
        return float(weight[among & chosen].sum() / max(weight[among].sum(), 1e-12))

    report["undecided"] = []
    for margin in MARGINS:
        decided = np.abs(distance) >= margin
        wrong = {
            name: share(called != label, decided & (label == k))
            for k, name in enumerate(("fpr", "missed"))
        }
        covered = share(decided, np.ones(len(rows), bool))
        report["undecided"].append({"margin": margin, "coverage": covered, **wrong})
    kind = np.array([row.kind for row in rows])
    report["called_ai"] = {name: share(called, kind == name) for name in sorted({*kind})}
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
    return {**report, "sources": sources}
