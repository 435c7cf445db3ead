"""The verb `finetune`: mine hard negatives, train on them, and check what else has changed.

Some tracks are held out before anything is scored, and only they count in the end. Beside the
weights OUT it writes OUT.report.json, and a folder OUT.run from which it goes on if stopped:

scores-*.jsonl         a row per track; a file for each set of weights
train                  run folder of the training
candidate.safetensors  the weights that were evaluated
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from artifactnet_jax import __version__
from artifactnet_jax.config import REGRESSION
from artifactnet_jax.console.detectors import open_detector
from artifactnet_jax.data.decoded import AudioCache
from artifactnet_jax.data.manifest import (
    LABELS,
    ManifestError,
    Row,
    read_manifest,
)
from artifactnet_jax.data.splits import assign_splits, check_rows
from artifactnet_jax.detector import Detector
from artifactnet_jax.evaluation import auc
from artifactnet_jax.files import check_output, make_folder, write_json, writing
from artifactnet_jax.text import OK, SOME_FAILED, USAGE, CommandError, printable
from artifactnet_jax.train import mine, phases
from artifactnet_jax.train import run as training
from artifactnet_jax.train.loop import Trainer
from artifactnet_jax.train.phases import Settings
from artifactnet_jax.weights import Weights, weights_digest, write_weights

DEFAULTS = ("steps=300", "batch=8", "watch_every=100", "checkpoint_every=100")  # over the phase's
PARTS = {"train": 0.6, "test": 0.3, "validation": 0.1}  # the first ones, of a very small set
NEAR = 0.2  # of score: a right verdict that is no farther from the threshold is trained on too
HARD_SHARE = 0.5  # of the crops of a label: those of mined tracks
ALPHAS = (1.0, 0.75, 0.5, 0.25)  # shares of the change that may be kept
FIXED = 0.9  # without a keep-set: share of the hard tracks that the least change must put right
LEAST = 1e-7  # distance of a score from 0 and 1 when it becomes a logit
MARGIN = 1e-3  # by which a shift of logits clears the threshold
LIMITS = REGRESSION  # rise of the FPR, fall of the TPR that is worse
UNCHECKED = "what else has changed was not checked: give --keep MANIFEST"
NOTE = "measured on tracks of these sources: it says nothing of others"

Scores = Mapping[str, float]  # by path; what is silent or cannot be read has none


@dataclasses.dataclass(frozen=True)
class Change:
    """Tracks of one source and label, before and after; `judged`: held to the limit of `worse`."""

    of: str  # "hard" or "keep"
    source: str
    label: str
    tracks: int
    called_ai: tuple[int, int]  # false positives of real tracks, detections of AI ones
    mean_score: tuple[float, float]
    judged: bool
    worse: bool


def run(args: argparse.Namespace) -> int:
    """Adapt the weights that the arguments name; returns the exit code. CommandError."""
    settings, weights = _model(args)
    threshold = weights.config.verdict.threshold
    hard, keep, warnings = _held_out(*_rows(args))
    for text in warnings:
        print(printable(f"warning: {text}"), file=sys.stderr)
    folder = Path(f"{args.out}.run")
    make_folder(folder, "--out")
    scorer, seconds = _Scorer(args, folder), _Seconds()

    ranked, before = _mine(hard, keep, weights, settings, scorer)
    hard = [row for row in hard if row.path in before]
    keep = [row for row in keep if row.path in before or row.split == "train"]
    seconds.stop("mining")
    wrong = sum(one.wrong for one in ranked)
    said = f"{wrong} of {len(ranked)} hard tracks are wrong at {threshold:g}"
    if not wrong:
        print(f"{said}: there is nothing to adapt to, no weights are written", file=sys.stderr)
        return SOME_FAILED if scorer.failed else OK
    if not args.quiet:
        print(said, file=sys.stderr)

    chosen = training_rows(ranked, keep, settings.source_power)
    outcome = _trained(args, settings, weights, chosen, folder / "train")
    tuned = training.native_weights(outcome.weights)
    seconds.stop("training")
    alpha, shift, adapted = _choose(weights, tuned, hard, keep, before, scorer)
    seconds.stop("choosing")

    held = [row for row in hard if row.split == "test"]
    note = NOTE if held else f"{NOTE}, and the hard ones were trained on"
    held = held or hard
    test = [row for row in keep if row.split == "test"]
    after = scorer([*held, *test], adapted)
    changes = evaluate("hard", held, before, after, threshold, limited=False)
    changes += evaluate("keep", test, before, after, threshold)
    seconds.stop("checking")
    worse = [f"{change.label} {change.source}" for change in changes if change.worse]
    entry = {
        "written": not worse or args.accept_worse,
        "worse": worse,
        "warnings": warnings,
        "phase": args.phase,
        "alpha": alpha,
        "shift": round(shift, 6),
        "threshold": threshold,
        "tracks": {
            name: dict(Counter(row.split for row in rows))
            for name, rows in (("hard", hard), ("keep", keep))
        },
        "changes": [dataclasses.asdict(change) for change in changes],
        "auc": [_auc([*held, *test], scores) for scores in (before, after)],
        "note": note,
    }
    adapted = _signed(adapted, args.out, entry)
    _save(folder / "candidate.safetensors", adapted)
    if entry["written"]:
        _save(Path(args.out), adapted)
    report = entry | {
        "weights": {"before": weights.summary(), "after": adapted.summary()},
        "failed": len(scorer.failed) + outcome.report["skipped"],
        "training": outcome.report,
        "seconds": seconds.by_stage,
        "versions": {"artifactnet-jax": __version__},
    }
    _publish(args.out, report, changes)
    if worse and not args.accept_worse:
        cure = "keep more tracks like them, take fewer steps, or --accept-worse"
        cause = f"worse on the keep-set: {', '.join(worse)}; {args.out} is not written"
        raise CommandError(f"{cause}, {folder}/candidate.safetensors is: {cure}", SOME_FAILED)
    if worse:
        print(printable(f"warning: worse on the keep-set: {', '.join(worse)}"), file=sys.stderr)
    return SOME_FAILED if report["failed"] else OK


def _trained(
    args: argparse.Namespace, settings: Settings, weights: Weights, rows: list[Row], folder: Path
) -> training.Outcome:
    """The run of the training; without a keep-set it may have tracks of one class."""
    return training.train(
        args.phase,
        settings,
        rows,
        folder,
        config=weights.config,
        weights=weights,
        cache=AudioCache(args.cache),
        quiet=args.quiet,
        one_class=args.keep is None,
    )


# --- what is asked for -----------------------------------------------------------------------


def _model(args: argparse.Namespace) -> tuple[Settings, Weights]:
    """Settings and weights, checked before the mining. CommandError."""
    check_output(args.out, f"--out {args.out}")
    weights = training.native_weights(args.weights)
    boundary = f"boundary={weights.config.verdict.threshold}"  # where verdicts turn
    settings = phases.settings_of(args.phase, None, [*DEFAULTS, boundary, *args.set])
    # Splits are made and checked here, and sources are no longer told apart in training.
    settings = dataclasses.replace(settings, split_by="group")
    if args.jobs and not settings.workers:
        settings = dataclasses.replace(settings, workers=args.jobs)
    Trainer(weights.config, weights.tensors, settings)
    if args.weights and os.path.exists(args.out) and os.path.samefile(args.weights, args.out):
        raise CommandError(f"--out {args.out} is --weights: name another file", USAGE)
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

    Parts that are given stay. Else hard tracks are divided by group, which may leave a set of one
    or two without some parts, and the keep-set by source, or by group if it has too few. From a
    keep-set with parts, but none for validation, that is taken from what is trained on.
    """
    part_of = {row.group: row.split for row in [*keep, *hard] if row.split}
    for label in range(len(LABELS)):
        rest = [row for row in hard if row.label == label and row.group not in part_of]
        shares = dict(list(PARTS.items())[: len({row.group for row in rest})])
        shares = {part: share / sum(shares.values()) for part, share in shares.items()}
        if rest:
            part_of |= {row.group: row.split for row in assign_splits(rest, "group", shares)}
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


# --- mining and training ---------------------------------------------------------------------


class _Scorer:
    """Scores of rows by weights, from the run folder if they are there."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.failed: set[str] = set()
        self._args, self._folder = args, folder
        self._open: tuple[str, Detector] | None = None

    def verdicts(self, rows: Sequence[Row], weights: Weights) -> list[dict[str, Any]]:
        """What is said of each row, as `results` has it in JSON."""
        args, sha = self._args, weights.sha256
        if self._open is None or self._open[0] != sha:
            self._open = sha, open_detector(weights, args.backend, jobs=args.jobs, banks=())
        output = str(self._folder / f"scores-{sha[:12]}.jsonl")
        found = mine.score_rows(rows, self._open[1], output, args.quiet)
        self.failed |= {verdict["path"] for verdict in found if "error" in verdict}
        return found

    def __call__(self, rows: Sequence[Row], weights: Weights) -> dict[str, float]:
        return _scores(rows, self.verdicts(rows, weights))


def _scores(rows: Iterable[Row], verdicts: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    pairs = zip(rows, verdicts, strict=True)
    return {row.path: v["score"] for row, v in pairs if v.get("score") is not None}


def _mine(
    hard: Sequence[Row], keep: Sequence[Row], weights: Weights, settings: Settings, scorer: _Scorer
) -> tuple[list[mine.Scored], dict[str, float]]:
    """The hard tracks by how wrong they are, and all scores that are compared later."""
    held = [row for row in keep if row.split in ("validation", "test")]
    verdicts = scorer.verdicts([*hard, *held], weights)
    failed = ["error" in verdict for verdict in verdicts]
    if all(failed[: len(hard)]):
        first = verdicts[0]["error"]["message"]
        raise CommandError(f"none of the {len(hard)} hard tracks can be read ({first})", 1)
    if sum(failed[len(hard) :]) > settings.max_bad * len(held):
        cause = f"{sum(failed[len(hard) :])} of {len(held)} tracks of the keep-set cannot be read"
        cure = "mend them, take them out of the manifest, or raise max_bad"
        raise CommandError(f"{cause}, over the fraction {settings.max_bad:g}: {cure}", SOME_FAILED)
    ranked = mine.rank(hard, verdicts[: len(hard)], weights.config.verdict.threshold)
    if not any(one.row.split == "train" for one in ranked):
        raise CommandError("no hard track that can be read is in the part 'train'", USAGE)
    return ranked, _scores([*hard, *held], verdicts)


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


def blend(weights: Weights, tuned: Weights, alpha: float, shift: float = 0.0) -> Weights:
    """`weights` with the share `alpha` of what tuning has changed, and `shift` added to logits."""
    tensors = dict(tuned.tensors)
    if alpha != 1:
        tensors = {
            name: tensor + np.float32(alpha) * (tuned.tensors[name] - tensor)
            for name, tensor in weights.tensors.items()
        }
    if shift:
        (bias,) = _last_bias(weights)
        tensors[bias] = tensors[bias] + np.float32(shift)
    digest = weights_digest(weights.config, tensors)
    return dataclasses.replace(tuned, tensors=tensors, sha256=digest)


def _last_bias(weights: Weights) -> list[str]:
    """The name of what is added to the logit; none if a converted model has no such tensor."""
    return [
        name
        for name, tensor in weights.tensors.items()
        if name.startswith("cnn.") and name.endswith(".bias") and tensor.shape == (1,)
    ][-1:]


def level(before: Scores, after: Scores, threshold: float) -> float:
    """The least shift of logits that calls as many tracks AI as before.

    Training on changed crops, half of them AI, moves all scores together. The threshold was chosen
    for other scores, so without a shift many verdicts would change.
    """
    paths = [path for path in after if path in before]
    wanted = sum(before[path] >= threshold for path in paths)
    *scores, edge = (
        min(max(p, LEAST), 1 - LEAST) for p in (*(after[path] for path in paths), threshold)
    )
    logits = sorted((math.log(p / (1 - p)) for p in scores), reverse=True)
    bound = math.log(edge / (1 - edge))
    if wanted and logits[wanted - 1] < bound:
        return bound - logits[wanted - 1] + MARGIN
    if wanted < len(logits) and logits[wanted] >= bound:
        return bound - logits[wanted] - MARGIN
    return 0.0


def _shifted(scores: Scores, shift: float) -> dict[str, float]:
    """What a shift of the logits makes of scores; exact but for medians of an even number."""
    odds = {path: min(max(p, LEAST), 1 - LEAST) for path, p in scores.items()}
    return {p: 1 / (1 + math.exp(-shift) * (1 - q) / q) for p, q in odds.items()}


def _choose(
    weights: Weights,
    tuned: Weights,
    hard: Sequence[Row],
    keep: Sequence[Row],
    before: Scores,
    scorer: Callable[[Sequence[Row], Weights], Scores],
) -> tuple[float, float, Weights]:
    """Share of the change to keep, shift of the logits, and the resulting weights.

    As much as leaves the keep-set's validation tracks no worse, at a shift that calls as many of
    them AI as before. Without a keep-set, as little as puts `FIXED` of the hard tracks right, and
    no shift: one class says nothing of what a larger change would cost.
    """
    threshold, shift = weights.config.verdict.threshold, 0.0
    # Hard tracks alone are few: those that were trained on count too, but never the test's.
    rows = [row for row in keep if row.split == "validation"]
    rows = rows if keep else [row for row in hard if row.split != "test"]
    for alpha in ALPHAS if keep else ALPHAS[::-1]:
        after = scorer(rows, blend(weights, tuned, alpha)) if rows else {}
        known = [row for row in rows if row.path in after]
        if keep:
            if _last_bias(weights):
                shift = level({row.path: before[row.path] for row in known}, after, threshold)
            changes = evaluate("keep", known, before, _shifted(after, shift), threshold)
            good = not any(change.worse for change in changes)
        else:
            right = [(after[row.path] >= threshold) == bool(row.label) for row in known]
            good = sum(right) >= FIXED * len(known)
        if good:
            break
    return alpha, shift, blend(weights, tuned, alpha, shift)


# --- before and after ------------------------------------------------------------------------


def evaluate(
    of: str,
    rows: Iterable[Row],
    before: Scores,
    after: Scores,
    threshold: float,
    limited: bool = True,
) -> list[Change]:
    """Each source of a label, then its small sources together, then all of them.

    A source is small, and held to no limit by itself, if a single track would exceed the limit. All
    tracks of a label are held to the limit, however few they are. limited: False holds none to it.
    """
    sources: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row.path in before and row.path in after:
            sources[row.label, row.source].append((before[row.path], after[row.path]))

    def change(source: str, label: int, scores: list[tuple[float, float]], enough: bool) -> Change:
        was, now = (sum(pair[k] >= threshold for pair in scores) for k in (0, 1))
        loss = (was - now if label else now - was) / len(scores)
        means = [round(float(np.mean([pair[k] for pair in scores])), 6) for k in (0, 1)]
        return Change(
            of,
            source,
            LABELS[label],
            len(scores),
            (was, now),
            (means[0], means[1]),
            limited and enough,
            limited and enough and loss > LIMITS[label],
        )

    changes = []
    for label, limit in enumerate(LIMITS):
        own = {name: scores for (other, name), scores in sources.items() if other == label}
        small = [pair for scores in own.values() if len(scores) * limit < 1 for pair in scores]
        everything = [pair for scores in own.values() for pair in scores]
        for name, scores in sorted(own.items()):
            changes.append(change(name, label, scores, len(scores) * limit >= 1))
        if limited and 0 < len(small) < len(everything):
            changes.append(change("(small sources)", label, small, len(small) * limit >= 1))
        if len(own) > 1 or (limited and small):
            changes.append(change("(all)", label, everything, True))
    return changes


def _auc(rows: Iterable[Row], scores: Scores) -> float | None:
    pairs = [(row.label, scores[row.path]) for row in rows if row.path in scores]
    area = auc(*map(np.array, zip(*pairs, strict=True))) if pairs else None
    return None if area is None else round(area, 6)


class _Seconds:
    """Seconds of each stage of this call."""

    def __init__(self) -> None:
        self.by_stage: dict[str, float] = {}
        self._began = time.perf_counter()

    def stop(self, stage: str) -> None:
        now = time.perf_counter()
        self.by_stage[stage] = round(now - self._began, 1)
        self._began = now


def _signed(weights: Weights, out: str, entry: dict[str, Any]) -> Weights:
    """The weights under the name of the file `out`, with an entry more in their history."""
    history = [*weights.provenance["history"], {"finetune": entry}]
    provenance = {**weights.provenance, "history": history}
    return dataclasses.replace(weights, name=Path(out).stem, provenance=provenance)


def _save(path: Path, weights: Weights) -> None:
    with writing(str(path)):
        write_weights(weights, path)


def _publish(out: str, report: Mapping[str, Any], changes: Sequence[Change]) -> None:
    """The report beside the weights `out`, and for people on stdout."""
    with writing(f"{out}.report.json"):
        write_json(f"{out}.report.json", report)
    width = max([len("source"), *(len(printable(change.source)) for change in changes)])
    print(f"set   {'source':<{width}}  label  tracks  called AI    mean score")
    for change in changes:
        called = "{:>3} -> {:<3}".format(*change.called_ai)
        mean = "{:.3f} -> {:.3f}".format(*change.mean_score)
        head = f"{change.of:<4}  {printable(change.source):<{width}}  {change.label:<5}"
        note = "  worse" if change.worse else ""
        print(f"{head}  {change.tracks:>6}  {called}  {mean}{note}")
    if None not in report["auc"]:
        print("AUC {:.4f} -> {:.4f}".format(*report["auc"]))
    print(f"{report['alpha']:g} of the change is kept, logits {report['shift']:+.2f}")
    print(report["note"])
    print(", ".join(f"{stage} {value:.0f} s" for stage, value in report["seconds"].items()))
