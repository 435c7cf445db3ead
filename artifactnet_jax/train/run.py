"""The verb `train`: one phase in one run folder, to be stopped and continued at will.

run.json            what decides the run; a folder that holds another run is left alone
checkpoints/        Orbax; the last two
metrics.jsonl       a row every `log_every` steps, and one of each look at validation tracks
skipped.jsonl       rows of the manifest that could not be read
weights.safetensors averaged weights, written at the end
curves.png          loss, AUC, mask and residual energy over steps
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from artifactnet_jax import __version__
from artifactnet_jax.backends import cpu_count, leave_memory
from artifactnet_jax.config import Config
from artifactnet_jax.console.progress import Teller, progress
from artifactnet_jax.data.decoded import AudioCache, prepare
from artifactnet_jax.data.manifest import Row, read_manifests
from artifactnet_jax.data.records import Examples, FixedExamples, batches
from artifactnet_jax.data.splits import check_rows
from artifactnet_jax.files import claim, replace_file, write_json
from artifactnet_jax.models import open_model
from artifactnet_jax.results import to_json
from artifactnet_jax.text import OK, SOME_FAILED, USAGE, CommandError
from artifactnet_jax.train import phases
from artifactnet_jax.train.loop import Trainer
from artifactnet_jax.train.phases import Settings
from artifactnet_jax.train.steps import WATCHED, Loop, full_disk
from artifactnet_jax.weights import Engine, Weights, WeightsError, load_weights, save_weights

TRAIN = ("train", "")  # values of a manifest's column `split`


def run(args: argparse.Namespace) -> int:
    """Train what the arguments name; returns the exit code. CommandError: it cannot go on."""
    settings = phases.settings_of(args.phase, args.config, args.set)
    if args.list:
        for name, value in phases.to_flat(settings).items():
            print(f"{name} = {json.dumps(value)}")
        return OK
    if not (args.data and args.out):
        raise CommandError("train needs --data MANIFEST and --out RUN_DIR", USAGE)
    weights = native_weights(args.init) if args.init else None
    rows = read_manifests(args.data)
    if weights is not None and args.preset not in (None, weights.config.preset):
        cause = f"{args.init} has preset {weights.config.preset!r}, not {args.preset!r}"
        raise CommandError(f"{cause}: leave --preset out", USAGE)
    config = Config.from_preset(args.preset or "edge") if weights is None else weights.config
    outcome = train(
        args.phase,
        settings,
        rows,
        args.out,
        config=config,
        weights=weights,
        cache=AudioCache(args.cache),
        quiet=args.quiet,
    )
    print(json.dumps(outcome.report, indent=1))
    return SOME_FAILED if outcome.report["skipped"] else OK


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run: path of its weights, and its report."""

    weights: Path
    report: dict[str, Any]


def train(
    phase: str,
    settings: Settings,
    rows: Sequence[Row],
    out: str | os.PathLike[str],
    *,
    config: Config,
    weights: Weights | None,
    cache: AudioCache,
    quiet: bool = False,
    one_class: bool = False,
) -> Outcome:
    """Train from `weights` (None: random) on the manifest's rows, in the run folder `out`.

    one_class: rows of one label only are no mistake. Goes on where an earlier call with the same
    arguments stopped, to the same weights. Raises CommandError: the data or the folder cannot be
    used, the loss is not finite, the mask has collapsed, or the disk is full; KeyboardInterrupt
    after a checkpoint, on Ctrl-C.
    """
    if weights is None and settings.needs_init:
        cure = "give --init W, such as the weights of an earlier phase"
        raise CommandError(f"phase {phase} cannot start from random weights: {cure}", USAGE)
    leave_memory()
    trainer = Trainer(config, weights.tensors if weights else None, settings)
    folder = Path(out)
    with full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tell = Teller(quiet)
    if trainer.frozen_statistics and settings.batch_statistics == "update":
        tell("the norms of these weights are folded into convolutions: their statistics stay")
    wanted, watched = _select(rows, settings, one_class or bool(settings.distill))
    jobs = settings.workers or cpu_count()
    with progress(quiet, str(folder), len(wanted) + len(watched)) as shown:
        good, skipped = prepare(
            [*wanted, *watched],
            cache,
            max_bad=settings.max_bad,
            jobs=jobs,
            tell=shown,
            residual=bool(settings.distill),
        )
    with full_disk(folder):
        lines = "".join(to_json(failure.to_dict()) + "\n" for failure in skipped)
        replace_file(folder / "skipped.jsonl", lines.encode())
    kept = {row.path for row in good}
    wanted = [row for row in wanted if row.path in kept]
    watched = [row for row in watched if row.path in kept]
    _check_rows(wanted, watched, settings, one_class)
    _claim(folder, phase, settings, config, weights, wanted, watched)

    loop = Loop(folder, trainer, settings, tell)
    try:
        examples = _examples(wanted, cache, trainer.samples, settings)
        looks = _watch_batches(watched, cache, trainer.samples, settings, jobs)
        state = loop.run(examples, looks, jobs)
    finally:
        loop.close()
    report = {
        "phase": phase,
        "steps": settings.steps,
        "tracks": {name: len(part) for name, part in (("train", wanted), (WATCHED, watched))},
        "skipped": len(skipped),
        "last": loop.last,
        WATCHED: loop.validation,
        "weights": str(folder / "weights.safetensors"),
    }
    _write_weights(folder, phase, settings, config, weights, trainer.tensors(state), report)
    loop.plot()
    return Outcome(folder / "weights.safetensors", report)


def native_weights(path: str | os.PathLike[str] | None) -> Weights:
    """Weights that can be trained; None: the embedded ones.

    Raises:
        CommandError: they cannot be opened, or are a graph or an engine, which runs as it is.
    """
    try:
        model = open_model(path)
    except WeightsError as error:
        raise CommandError(str(error), USAGE) from error
    if isinstance(model, Weights):
        return model
    what = "a graph that was not recognised in every part"
    if isinstance(model, Engine):
        what = f"the file {model.file}, which holds no tensors"
    cause = f"weights {model.name!r} are {what}"
    raise CommandError(f"{cause}: only native models can be trained", USAGE)


def _select(
    rows: Sequence[Row], settings: Settings, one_class: bool
) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and some to watch, evenly over sources."""
    check_rows(rows, by=settings.split_by, one_class=one_class)
    wanted = [row for row in rows if row.split in TRAIN]
    by_source: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        if row.split == WATCHED and (row.residual or not settings.distill):
            by_source[row.source].append(row)
    rng = np.random.default_rng(0)
    for source in sorted(by_source):
        by_source[source] = [by_source[source][i] for i in rng.permutation(len(by_source[source]))]
    turns = range(max(map(len, by_source.values()), default=0))
    watched = [part[k] for k in turns for _, part in sorted(by_source.items()) if k < len(part)]
    return wanted, watched[: settings.watch_tracks]


def _check_rows(wanted: list[Row], watched: list[Row], settings: Settings, one_class: bool) -> None:
    """CommandError unless there is something to learn from."""
    if not wanted:
        raise CommandError("no row can be trained on: the manifest has no split 'train'", USAGE)
    if settings.distill:
        missing = next((row.path for row in wanted if not row.residual), None)
        if missing is not None:
            cure = "make residuals with `artifactnet-jax residuals`, and give its manifest"
            raise CommandError(f"{missing} has no residual to distil from: {cure}", USAGE)
    elif not one_class and len({row.label for row in wanted}) < 2:
        kind = "AI" if wanted[0].label else "real"
        cure = "add the other, or make positives from real music with `artifactnet-jax rvq`"
        raise CommandError(f"all {len(wanted)} rows to train on are {kind}: {cure}", USAGE)


def _claim(
    folder: Path,
    phase: str,
    settings: Settings,
    config: Config,
    weights: Weights | None,
    wanted: list[Row],
    watched: list[Row],
) -> None:
    """Write run.json, or find that it is the same run; CommandError if it is another."""
    flat = phases.to_flat(settings)
    rows = json.dumps([dataclasses.astuple(row) for row in wanted])
    decisive = {
        "phase": phase,
        "config": config.digest(),
        "init": weights.sha256 if weights else "random",
        "data": hashlib.sha256(rows.encode("utf-8", "surrogateescape")).hexdigest(),
        "settings": {key: value for key, value in flat.items() if key not in phases.FREE},
    }
    path = folder / "run.json"
    made = [name for name in ("checkpoints", "weights.safetensors") if (folder / name).exists()]
    if made and not path.exists():
        cause = f"{folder} holds checkpoints or weights, but no run.json"
        raise CommandError(f"{cause}: give another --out", USAGE)
    facts = {
        "decisive": decisive,
        "settings": flat,
        "init": weights.summary() if weights else None,
        "tracks": {"train": len(wanted), WATCHED: len(watched)},
        "sources": dict(collections.Counter(row.source for row in wanted)),
        "versions": {"artifactnet-jax": __version__, "jax": jax.__version__},
        "devices": [str(device) for device in jax.devices()],
    }
    claim(path, facts, lambda facts: facts["decisive"])
    with full_disk(folder):
        write_json(path, facts)


def _examples(rows: list[Row], cache: AudioCache, samples: int, settings: Settings) -> Examples:
    """Endless examples of the rows that are trained on."""
    return Examples(
        rows,
        cache,
        samples=samples,
        seed=settings.seed,
        augment=settings.augment,
        versions=settings.versions,
        draws=settings.draws,
        residual=bool(settings.distill),
        source_power=settings.source_power,
        near_p=settings.near_p,
    )


def _watch_batches(
    rows: list[Row], cache: AudioCache, samples: int, settings: Settings, jobs: int
) -> list[tuple[dict[str, np.ndarray], int]]:
    """Batches of the validation tracks, and how many of each are not filling."""
    if not rows:
        return []
    examples = FixedExamples(
        rows,
        cache,
        samples=samples,
        per_row=1,
        seed=0,
        versions=settings.versions,
        residual=bool(settings.distill),
    )
    found = []
    with contextlib.closing(batches(examples, settings.batch, workers=jobs)) as source:
        for batch in source:
            n = len(batch.pop("row"))
            filling = np.arange(settings.batch) % n
            found.append(({name: value[filling] for name, value in batch.items()}, n))
    return found


def provenance(weights: Weights | None, entry: dict[str, Any]) -> dict[str, Any]:
    """Provenance of weights that a step `entry` made of `weights` (None: random ones)."""
    history: list[Any] = []
    if weights is not None:
        history += weights.provenance.get("history", ())
        facts = {"weights": weights.summary(), "provenance": dict(weights.provenance)}
        history = history or [facts]  # all that is known of them
    return {
        "trained_by": f"artifactnet-jax {__version__}",
        "history": [*history, entry],
        "note": "not evidence by itself",
    }


def _write_weights(
    folder: Path,
    phase: str,
    settings: Settings,
    config: Config,
    weights: Weights | None,
    tensors: dict[str, np.ndarray],
    report: dict[str, Any],
) -> None:
    """weights.safetensors, with the history of what made it."""
    # The points were those of the weights that this run began with.
    verdict = dataclasses.replace(config.verdict, operating_points=())
    config = dataclasses.replace(config, verdict=verdict)
    entry = {
        "phase": phase,
        "settings": phases.to_flat(settings),
        "tracks": report["tracks"],
        WATCHED: report[WATCHED],
    }
    try:
        with full_disk(folder):
            save_weights(
                folder / "weights.safetensors",
                config,
                tensors,
                name=folder.resolve().name,
                licence=settings.licence or (weights.licence if weights else "not stated"),
                provenance=provenance(weights, entry),
                fine=weights.fine if weights else None,
            )
    except WeightsError as error:
        raise CommandError(str(error), SOME_FAILED) from error
    load_weights(folder / "weights.safetensors")
