"""The verb `finetune`: move what decides on hard negatives, and check what else has changed.

Some tracks are held out before anything is scored, and only they count in the end. What stays as it
is of a recording is taken once and kept in the cache, so that a second run, and one that goes on
after it was stopped, has nothing to read. Beside the weights OUT it writes OUT.report.json. With
`--deep` a phase of training moves the network, in a run folder OUT.run from which it goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from artifactnet_jax import __version__
from artifactnet_jax.console.progress import progress
from artifactnet_jax.data.decoded import AudioCache
from artifactnet_jax.data.manifest import (
    LABELS,
    ManifestError,
    Row,
    read_manifest,
)
from artifactnet_jax.data.splits import assign_splits, check_rows
from artifactnet_jax.decision import log_odds, probability
from artifactnet_jax.files import check_output, write_json, writing
from artifactnet_jax.results import Failure
from artifactnet_jax.text import OK, SOME_FAILED, USAGE, CommandError, printable
from artifactnet_jax.train import mine, phases
from artifactnet_jax.train import run as training
from artifactnet_jax.train.changes import Change, Scores, area, evaluate, shares_at_points, table
from artifactnet_jax.train.frozen import Frozen, Store, collect, score, segment_scores
from artifactnet_jax.train.loop import Trainer
from artifactnet_jax.train.move import Example, Move, movable, moved, with_tensors
from artifactnet_jax.train.phases import Settings
from artifactnet_jax.train.texture_head import row_weights
from artifactnet_jax.weights import FINE, Weights, weights_digest, write_weights

DEFAULTS = ("steps=300", "batch=8", "watch_every=100", "checkpoint_every=100")  # over the phase's
PARTS = {"train": 0.6, "test": 0.2, "validation": 0.2}  # of the keep-set
HARD_PARTS = {"train": 0.7, "test": 0.3}
HARD, KEPT = 12, 2  # segments that are looked at, of a hard track and of one to keep
REHEARSED = 800  # tracks to keep that are trained on, at most
MAX_BAD = 0.05  # share of the keep-set that may be unreadable
NEAR = 0.2  # of score: a right verdict that is no farther from the threshold is trained on too
HARD_SHARE = 0.5  # of the crops of a label: those of mined tracks
ALPHAS = (1.0, 0.75, 0.5, 0.25)  # shares of the change that may be kept
LOST = 0.02  # of the AI tracks to keep: share that may be found no more by what is kept of it
FIXED = 0.9  # without a keep-set: share of the hard tracks that the least change must put right
UNCHECKED = (
    "what else has changed was not checked, and no threshold was moved: give --keep MANIFEST"
)
NOTE = "measured on tracks of these sources: it says nothing of others"


def run(args: argparse.Namespace) -> int:
    """Adapt the weights that the arguments name; returns the exit code. CommandError."""
    settings, weights = _model(args)
    hard, keep, warnings = _held_out(*_rows(args))
    keep = _rehearsed(keep) if settings is None else keep
    for text in warnings:
        print(printable(f"warning: {text}"), file=sys.stderr)
    scorer, seconds = _Scorer(args, hard), _Seconds()
    hard, keep = _readable(hard, keep, weights, scorer)
    ranked = _ranked(hard, weights, scorer)
    before = scorer([*hard, *keep], weights)
    seconds.stop("reading")
    if not args.quiet:
        print(
            f"{sum(one.wrong for one in ranked)} of {len(ranked)} hard tracks are wrong",
            file=sys.stderr,
        )

    tuned, report = _tuned(args, settings, weights, ranked, keep, scorer)
    seconds.stop("training")
    alpha, adapted = _choose(weights, tuned, hard, keep, before, scorer)
    seconds.stop("choosing")

    held = [row for row in hard if row.split == "test"]
    note = NOTE if held else f"{NOTE}, and the hard ones were trained on"
    held = held or hard
    test = [row for row in keep if row.split == "test"]
    after = scorer([*held, *test], adapted)
    rules = weights.config.verdict, adapted.config.verdict
    thresholds = rules[0].threshold, rules[1].threshold
    changes = evaluate("hard", held, before, after, thresholds, limited=False)
    changes += evaluate("keep", test, before, after, thresholds)
    seconds.stop("checking")
    worse = [f"{change.label} {change.source}" for change in changes if change.worse]
    entry = {
        "written": not worse or args.accept_worse,
        "worse": worse,
        "warnings": warnings,
        "deep": args.deep,
        "alpha": alpha,
        "operating_points": shares_at_points(
            [row for row in test if not row.label], before, after, rules
        ),
        "tracks": {
            name: dict(Counter(row.split for row in rows))
            for name, rows in (("hard", hard), ("keep", keep))
        },
        "changes": [dataclasses.asdict(change) for change in changes],
        "auc": [area([*held, *test], scores) for scores in (before, after)],
        "note": note,
    }
    begun = tuned if args.deep else weights  # a phase of training has its own entry
    provenance = training.provenance(begun, {"finetune": entry | {"training": report}})
    name = Path(args.out).stem
    adapted = dataclasses.replace(adapted, name=name, licence=tuned.licence, provenance=provenance)
    if entry["written"]:
        with writing(args.out):
            write_weights(adapted, args.out)
    failed = len(scorer.failed)
    report = entry | {
        "weights": {"before": weights.summary(), "after": adapted.summary()},
        "failed": failed,
        "training": report,
        "seconds": seconds.by_stage,
        "versions": {"artifactnet-jax": __version__},
    }
    _publish(args.out, report, changes)
    if worse:
        said = f"worse on the keep-set: {', '.join(worse)}"
        if not args.accept_worse:
            cure = "keep more tracks like them, or --accept-worse"
            raise CommandError(printable(f"{said}; {args.out} is not written: {cure}"), SOME_FAILED)
        print(printable(f"warning: {said}"), file=sys.stderr)
    return SOME_FAILED if failed else OK


def _tuned(
    args: argparse.Namespace,
    settings: Settings | None,
    weights: Weights,
    ranked: Sequence[mine.Scored],
    keep: Sequence[Row],
    scorer: _Scorer,
) -> tuple[Weights, dict[str, Any]]:
    """The weights after the move, or after a phase of training, and how it was done."""
    if settings is None:
        rows = [one.row for one in ranked if one.row.split == "train"]
        rehearsed = [row for row in keep if row.split == "train"]
        examples = [
            Example(scorer.frozen[row.path], row.label, hard, share)
            for part, hard in ((rows, True), (rehearsed, False))
            if part
            for row, share in zip(part, row_weights(part, 0.5).tolist(), strict=True)
        ]
        move = Move()
        return moved(weights, examples, move), dataclasses.asdict(move)
    outcome = training.train(
        args.deep,
        settings,
        training_rows(ranked, keep, settings.source_power),
        f"{args.out}.run",
        config=weights.config,
        weights=weights,
        cache=AudioCache(args.cache),
        quiet=args.quiet,
        one_class=args.keep is None,
    )
    return training.native_weights(outcome.weights), outcome.report


# --- what is asked for -----------------------------------------------------------------------


def _model(args: argparse.Namespace) -> tuple[Settings | None, Weights]:
    """Settings of the phase, if one is asked for, and weights. CommandError."""
    check_output(args.out, f"--out {args.out}")
    weights = training.native_weights(args.weights)
    if args.weights and os.path.exists(args.out) and os.path.samefile(args.weights, args.out):
        raise CommandError(f"--out {args.out} is --weights: name another file", USAGE)
    if weights.whole_song:
        cause = f"weights {weights.name!r} score the segments of a song together"
        raise CommandError(f"{cause}: train them with artifactnet-jax train --init", USAGE)
    if args.deep is None:
        if args.set:
            raise CommandError("--set is for a phase of training: give --deep", USAGE)
        if not movable(weights):
            cause = f"weights {weights.name!r} have no last layers that could move by themselves"
            raise CommandError(f"{cause}: give --deep", USAGE)
        return None, weights
    boundary = f"boundary={weights.config.verdict.threshold}"  # where verdicts turn
    settings = phases.settings_of(args.deep, None, [*DEFAULTS, boundary, *args.set])
    # Splits are made and checked here, and sources are no longer told apart in training.
    settings = dataclasses.replace(settings, split_by="group")
    if args.jobs and not settings.workers:
        settings = dataclasses.replace(settings, workers=args.jobs)
    Trainer(weights.config, weights.tensors, settings)
    return settings, weights


def _rows(args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Hard tracks and those to keep. A track in both is hard, and what the keep-set says of it."""
    name = args.hard_negatives
    hard = mine.rows_of([name], None, True)
    if len(hard) == 1 and not os.path.isfile(hard[0].path):
        what = "there is no audio in it" if os.path.isdir(name) else "no such file or folder"
        cause = f"--hard-negatives {name}: {what}"
        raise CommandError(f"{cause}: give recordings or a manifest", USAGE)
    if args.keep is None:
        return hard, []
    keep = {os.path.abspath(row.path): row for row in read_manifest(args.keep)}
    kept = [keep.pop(os.path.abspath(row.path), row) for row in hard]
    for row, other in zip(hard, kept, strict=True):
        if row.label != other.label:
            said = f"{LABELS[row.label]} in {name}, {LABELS[other.label]} in {args.keep}"
            raise CommandError(f"{row.path} is {said}: correct one", USAGE)
    for label, kind in enumerate(LABELS):
        if not any(row.label == label for row in keep.values()):
            cause = f"{args.keep}: no {kind} track to keep"
            raise CommandError(f"{cause}: it takes both labels", USAGE)
    return kept, list(keep.values())


def _held_out(hard: list[Row], keep: list[Row]) -> tuple[list[Row], list[Row], list[str]]:
    """The same rows, each with its part, and warnings; ManifestError if that cannot be done.

    Parts that are given stay. Else hard tracks are divided by group, of which a single one is
    trained on, and the keep-set by source, or by group if it has too few. From a
    keep-set with parts, but none for validation, that is taken from what is trained on.
    """
    part_of = {row.group: row.split for row in [*keep, *hard] if row.split}
    for label in range(len(LABELS)):
        rest = [row for row in hard if row.label == label and row.group not in part_of]
        if len({row.group for row in rest}) > 1:
            rest = assign_splits(rest, "group", HARD_PARTS)
        part_of |= {row.group: row.split or "train" for row in rest}
    hard = [dataclasses.replace(row, split=row.split or part_of[row.group]) for row in hard]
    check_rows([*hard, *keep], by="group", one_class=True)
    given = {row.split for row in keep} - {""}
    if keep and "validation" not in given:
        keep = _divided(keep, given, hard)
    check_rows([*hard, *keep], by="group", one_class=True)
    for part in ("train", "test") if keep else ():
        there = {LABELS[row.label] for row in keep if row.split == part}
        for name in LABELS:
            if name not in there:
                cure = "divide the keep-set with artifactnet-jax split, or empty its column split"
                raise ManifestError(f"no {name} track to keep is in the part {part!r}: {cure}")
    warnings = [] if keep else [UNCHECKED]
    if keep and not any(row.split == "validation" for row in keep):
        warnings.append("no track to keep is in the part 'validation': all of the change is kept")
    if not any(row.split == "test" for row in hard):
        cure = "give more recordings"
        warnings.append(f"no hard track is held out: what is said of them is no test: {cure}")
    sources = {part: {row.source for row in keep if row.split == part} for part in PARTS}
    if both := sorted(sources["train"] & sources["test"]):
        named = ", ".join(both[:3]) + (f" and {len(both) - 3} more" if len(both) > 3 else "")
        warnings.append(f"sources of the keep-set are both trained on and tested: {named}")
    return hard, keep, warnings


def _divided(keep: list[Row], given: set[str], hard: Iterable[Row]) -> list[Row]:
    """A keep-set with the parts that it lacks; a group is where its hard tracks are."""
    shares = {part: share for part, share in PARTS.items() if part not in given - {"train"}}
    shares = {part: share / sum(shares.values()) for part, share in shares.items()}
    rest = [row for row in keep if row.split == "train" or not given]
    others = [row for row in keep if row.split != "train" and given]
    groups = {row.group for row in rest}
    put = sorted({(row.group, row.split) for row in hard if row.group in groups})
    if given:
        with contextlib.suppress(ManifestError):  # too few tracks
            return others + assign_splits(rest, "group", shares, put)
        return keep
    if not put:
        with contextlib.suppress(ManifestError):  # too few sources
            return assign_splits(keep, "source", shares)
    return assign_splits(keep, "group", shares, put)


def _rehearsed(keep: list[Row]) -> list[Row]:
    """The tracks to keep, of those to train on so many at most, evenly over sources."""
    train = sorted((r for r in keep if r.split == "train"), key=lambda r: (r.label, r.source))
    chosen = {int(k) for k in np.linspace(0, len(train) - 1, min(len(train), REHEARSED))}
    paths = {train[k].path for k in chosen}
    return [row for row in keep if row.split != "train" or row.path in paths]


# --- scores and training ---------------------------------------------------------------------


class _Scorer:
    """Scores of rows by weights, from what is frozen of each."""

    def __init__(self, args: argparse.Namespace, hard: Iterable[Row]):
        self.failed: dict[str, Failure] = {}
        self.frozen: dict[str, Frozen] = {}
        self._args, self._cache, self._digest = args, AudioCache(args.cache), ""
        self._hard = {row.path for row in hard}

    def read(self, rows: Sequence[Row], weights: Weights) -> None:
        """Take what is frozen of rows that have not been read with such a network."""
        store = Store(weights, self._cache)
        if store.digest != self._digest:
            self.frozen, self._digest = {}, store.digest
        known = self.frozen.keys() | self.failed.keys()
        paths = [row.path for row in rows if row.path not in known]
        wanted = [(path, HARD if path in self._hard else KEPT) for path in paths]
        with progress(self._args.quiet, self._args.out, len(wanted)) as tell:
            found = collect(wanted, store, self._args.jobs, tell)
        for path, one in zip(paths, found, strict=True):
            if isinstance(one, Failure):
                self.failed[path] = one
                if self._args.quiet:
                    print(one.message, file=sys.stderr)
            else:
                self.frozen[path] = one

    def __call__(self, rows: Sequence[Row], weights: Weights) -> dict[str, float]:
        self.read(rows, weights)
        known = [row.path for row in rows if row.path in self.frozen]
        found = {path: score(self.frozen[path], weights) for path in known}
        return {path: value for path, value in found.items() if value is not None}


def _readable(
    hard: Sequence[Row], keep: Sequence[Row], weights: Weights, scorer: _Scorer
) -> tuple[list[Row], list[Row]]:
    """The rows that can be read and are not silent. CommandError: too many cannot."""
    scorer.read([*hard, *keep], weights)
    bad = [row for row in keep if row.path in scorer.failed]
    if all(row.path in scorer.failed for row in hard):
        first = scorer.failed[hard[0].path].message
        cause = f"none of the {len(hard)} hard tracks can be read"
        raise CommandError(f"{cause} ({first})", SOME_FAILED)
    if len(bad) > MAX_BAD * len(keep):
        cause = f"{len(bad)} of {len(keep)} tracks of the keep-set cannot be read"
        first, cure = scorer.failed[bad[0].path].message, "mend them, or take them out"
        raise CommandError(f"{cause} ({first}), over {MAX_BAD:.0%}: {cure}", SOME_FAILED)

    def good(rows: Iterable[Row]) -> list[Row]:
        return [
            row for row in rows if row.path in scorer.frozen and len(scorer.frozen[row.path].starts)
        ]

    return good(hard), good(keep)


def _ranked(hard: Sequence[Row], weights: Weights, scorer: _Scorer) -> list[mine.Scored]:
    """The hard tracks by how wrong they are. CommandError: there is nothing to learn from them."""
    verdicts = []
    for row in hard:
        frozen = scorer.frozen[row.path]
        pairs = zip(frozen.starts.tolist(), segment_scores(frozen, weights), strict=True)
        segments = [{"start_s": start, "score": value} for start, value in pairs]
        verdicts.append({"score": score(frozen, weights), "segments": segments})
    threshold = weights.config.verdict.threshold
    ranked = mine.rank(hard, verdicts, threshold)
    if not any(one.row.split == "train" for one in ranked):
        raise CommandError("no hard track that can be read is in the part 'train'", USAGE)
    if not any(one.wrong for one in ranked):
        said = f"0 of {len(ranked)} hard tracks are wrong at {threshold:g}"
        raise CommandError(f"{said}: there is nothing to adapt to, no weights are written", 1)
    return ranked


def training_rows(
    ranked: Sequence[mine.Scored], keep: Iterable[Row], source_power: float
) -> list[Row]:
    """What to train on and to watch, every row with its share of the crops as its weight.

    Of each label `HARD_SHARE` of the crops are of the mined tracks: those wrong or nearly so (all
    of them, if none is). The rest are of the keep-set and the other hard tracks. In either a source
    counts by its number of tracks to the power `source_power`. Sources of what is trained on become
    one per label, since a row's weight only counts within its source.
    """
    rows = [mine.mined(one, place) for place, one in enumerate(ranked, 1)]
    train = [row for row in rows if row.split == "train"]
    near = {one.row.path for one in ranked if one.wrongness > -NEAR}
    mined = [row for row in train if row.path in near] or train
    chosen = {row.path for row in mined}
    others = [row for row in [*train, *keep] if row.split == "train" and row.path not in chosen]
    found = [row for row in [*rows, *keep] if row.split == "validation"]
    for part, share in ((mined, HARD_SHARE), (others, 1 - HARD_SHARE)):
        for label, name in enumerate(LABELS):
            sources = defaultdict(list)
            for row in part:
                if row.label == label:
                    sources[row.source].append(row)
            total = sum(len(members) ** source_power for members in sources.values())
            for members in sources.values():
                each = share * len(members) ** source_power / total
                each /= sum(row.weight for row in members)
                found += [
                    dataclasses.replace(row, source=name, weight=each * row.weight)
                    for row in members
                ]
    return found


def blend(weights: Weights, tuned: Weights, alpha: float) -> Weights:
    """`weights` with the share `alpha` of what tuning has changed."""
    done = dict(tuned.tensors)
    if alpha != 1:
        done = {
            name: tensor + np.float32(alpha) * (tuned.tensors[name] - tensor)
            for name, tensor in weights.tensors.items()
        }
    if weights.fine is not None and tuned.fine is not None:
        done |= {
            f"{FINE}{name}": tensor + np.float32(alpha) * (tuned.fine.tensors[name] - tensor)
            for name, tensor in weights.fine.tensors.items()
        }
    return with_tensors(weights, done)


def recalibrated(weights: Weights, before: Sequence[float], after: Sequence[float]) -> Weights:
    """The weights with every threshold where it calls as many of these real tracks AI as before.

    before, after: scores of real tracks that nothing was trained on. Scores of the same rank
    correspond; between two of them log-odds are interpolated. A bias keeps the default threshold
    where it was, if there is one to move: scores go on to mean what they meant.
    """
    rule = weights.config.verdict
    old, new = np.sort(log_odds(before)), np.sort(log_odds(after))

    def place(threshold: float) -> float:
        x = float(log_odds(threshold))
        if not len(old):
            return x
        inside = min(max(x, old[0]), old[-1])
        return float(x - inside + np.interp(inside, old, new))

    weights, shift = _shifted(weights, float(log_odds(rule.threshold)) - place(rule.threshold))
    points = [(name, probability(place(point) + shift)) for name, point in rule.operating_points]
    lower = None if rule.lower is None else probability(place(rule.lower) + shift)
    threshold = rule.threshold if shift else probability(place(rule.threshold))
    rule = dataclasses.replace(
        rule, threshold=threshold, lower=lower, operating_points=tuple(points)
    )
    config = dataclasses.replace(weights.config, verdict=rule)
    digest = weights_digest(config, weights.tensors)
    return dataclasses.replace(weights, config=config, sha256=digest)


def _shifted(weights: Weights, shift: float) -> tuple[Weights, float]:
    """The weights with so much added to a track's log-odds, and what was added.

    0 if no bias does that.
    """
    config, tensors = weights.config, dict(weights.tensors)
    if config.fusion is not None:
        bias = tuple(value + shift for value in config.fusion.bias)
        config = dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, bias=bias))
        return dataclasses.replace(weights, config=config), shift
    biases = [name for name, x in tensors.items() if name.endswith(".bias") and x.shape == (1,)]
    if not biases or config.verdict.aggregate != "median":
        return weights, 0.0
    tensors[biases[-1]] = tensors[biases[-1]] + np.float32(shift)
    return dataclasses.replace(weights, tensors=tensors), shift


def _choose(
    weights: Weights,
    tuned: Weights,
    hard: Sequence[Row],
    keep: Sequence[Row],
    before: Scores,
    scorer: Callable[[Sequence[Row], Weights], Scores],
) -> tuple[float, Weights]:
    """Share of the change to keep, and the resulting weights.

    As much as leaves the keep-set's validation tracks no worse, and at most `LOST` of its AI tracks
    unfound, with thresholds that call as many of the real ones AI as before. Without a keep-set, as
    little as puts `FIXED` of the hard tracks right, and no other threshold: one class says nothing
    of what a larger change would cost.
    """
    threshold = weights.config.verdict.threshold
    # Hard tracks alone are few: those that were trained on count too, but never the test's.
    rows = [row for row in keep if row.split == "validation"]
    rows = rows if keep else [row for row in hard if row.split != "test"]
    real = [row.path for row in rows if not row.label]
    for alpha in ALPHAS if keep else ALPHAS[::-1]:
        adapted = blend(weights, tuned, alpha)
        after = scorer(rows, adapted)
        if keep:
            adapted = recalibrated(adapted, [before[p] for p in real], [after[p] for p in real])
            after = scorer(rows, adapted)
            both = threshold, adapted.config.verdict.threshold
            good = not any(c.worse for c in evaluate("keep", rows, before, after, both))
            found = [
                sum(of[row.path] >= limit for row in rows if row.label)
                for of, limit in zip((before, after), both, strict=True)
            ]
            good &= found[0] - found[1] <= LOST * (len(rows) - len(real))
        else:
            right = [(after[row.path] >= threshold) == bool(row.label) for row in rows]
            good = sum(right) >= FIXED * len(rows)
        if good:
            break
    return alpha, adapted


# --- the report --------------------------------------------------------------------------------


class _Seconds:
    """Seconds of each stage of this call."""

    def __init__(self) -> None:
        self.by_stage: dict[str, float] = {}
        self._began = time.perf_counter()

    def stop(self, stage: str) -> None:
        now = time.perf_counter()
        self.by_stage[stage] = round(now - self._began, 1)
        self._began = now


def _publish(out: str, report: Mapping[str, Any], changes: Sequence[Change]) -> None:
    """The report beside the weights `out`, and for people on stdout."""
    with writing(f"{out}.report.json"):
        write_json(f"{out}.report.json", report)
    print("\n".join(table(changes)))
    if None not in report["auc"]:
        print("AUC {:.4f} -> {:.4f}".format(*report["auc"]))
    for name, (was, now) in report["operating_points"].items():
        print(f"{name}: {was:.1%} -> {now:.1%} of the real tracks of the keep-set")
    print(f"{report['alpha']:g} of the change is kept")
    print(report["note"])
    print(", ".join(f"{stage} {value:.0f} s" for stage, value in report["seconds"].items()))
