"""The verb `bench throughput`: from file to verdict, how fast, in how much memory, how equal.

What is compared takes turns within each round, so that a change of the machine's pace meets all;
ratios are medians over the rounds. Scores are compared too, so that no speed is won by error.
docs/throughput.md says what every figure means.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from artifactnet_jax.backends import BACKENDS, cpu_count
from artifactnet_jax.bench import machine
from artifactnet_jax.bench.candidates import (
    Candidate,
    Outcome,
    Track,
    backend_of,
    calls,
    examine,
    generate,
    music,
    onnx_peer,
    ours,
    torch_peer,
)
from artifactnet_jax.bench.processes import cold, scaling
from artifactnet_jax.bench.rounds import Reading, interleaved, percentiles, ratios
from artifactnet_jax.bench.stages import reading_stages, roofline, stages, traffic
from artifactnet_jax.config import Config
from artifactnet_jax.files import check_output, find_audio, replace_file, writing
from artifactnet_jax.models import open_model, why_unavailable
from artifactnet_jax.presets import flops
from artifactnet_jax.results import Failure
from artifactnet_jax.text import NO_BACKEND, OK, SOME_FAILED, USAGE, CommandError, printable
from artifactnet_jax.weights import (
    ForeignGraph,
    Model,
    Weights,
    WeightsError,
    random_tensors,
    save_weights,
)

SCHEMA = "artifactnet-jax/throughput/1"
SEGMENT_CALLS = 5  # of each round, one segment each
GPU_BACKENDS = ("tensorrt", "onnxruntime-cuda")


class Pass(NamedTuple):
    """What one run over all tracks gave."""

    outcomes: dict[str, Outcome | Failure]  # by path
    track_s: dict[str, float]  # by path, of scenario "single"; empty offline


def one_pass(candidate: Candidate, paths: Sequence[str], scenario: str) -> Pass:
    """Score all tracks: one after the other ("single"), or all at once ("offline")."""
    outcomes: dict[str, Outcome | Failure] = {}
    taken: dict[str, float] = {}
    groups = [[path] for path in paths] if scenario == "single" else [list(paths)]
    for group in groups:
        began = time.perf_counter()
        for index, result in candidate.score(group):
            outcomes[group[index]] = result
        if scenario == "single":
            taken[group[0]] = time.perf_counter() - began
    return Pass(outcomes, taken)


def parity(reference: Pass, other: Pass) -> dict[str, Any]:
    """Largest differences of scores and the number of tracks with another verdict.

    {"tracks", "track_score", "segment_score", "flips"}; a difference is None where there is
    nothing to compare.
    """
    track, segment, flips, n = [0.0], [0.0], 0, 0
    whole = True
    for path, expected in reference.outcomes.items():
        found = other.outcomes[path]
        if isinstance(expected, Failure) or isinstance(found, Failure):
            continue
        n += 1
        flips += expected.verdict != found.verdict
        if expected.score is not None and found.score is not None:
            track.append(abs(expected.score - found.score))
        if len(expected.segments) == len(found.segments):
            apart = map(abs, np.subtract(expected.segments, found.segments).tolist())
            segment += [d for d in apart if math.isfinite(d)]
        else:
            whole = False
    return {
        "tracks": n,
        "track_score": max(track) if n else None,
        "segment_score": max(segment) if n and whole else None,
        "flips": flips,
    }


def row_of(
    candidate: Candidate, runs: list[tuple[Reading, Pass]], tracks: Sequence[Track], cores: int
) -> dict[str, Any]:
    """Speed, utilisation and energy of a candidate; medians over the rounds."""
    audio_s, segments = (sum(getattr(t, key) for t in tracks) for key in ("duration_s", "segments"))
    wall = statistics.median(taken.wall_s for taken, _ in runs)
    cpu = statistics.median(taken.cpu_s for taken, _ in runs)
    row: dict[str, Any] = {
        "name": candidate.name,
        "peer": candidate.peer,
        **candidate.facts,
        "wall_s": wall,
        "wall_s_rounds": [taken.wall_s for taken, _ in runs],
        "cpu_s": cpu,
        "utilisation": statistics.median(t.cpu_s / t.wall_s / cores for t, _ in runs),
        "times_real_time": audio_s / wall,
        "tracks_per_hour": 3600 * len(tracks) / wall,
        "ms_per_segment": 1000 * wall / segments,
    }
    latency = [s for _, given in runs for s in given.track_s.values()]
    if latency:
        row["track_s"] = percentiles(latency)
    energy = [(t.joules, t.wall_s) for t, _ in runs if t.joules is not None]
    if energy:
        row["joules_per_segment"] = statistics.median(joules for joules, _ in energy) / segments
        row["watts"] = statistics.median(joules / wall_s for joules, wall_s in energy)
    return row


def device_memory(candidate: Candidate) -> int | None:
    """Bytes that jax has held on its device at most, where it is not the CPU."""
    device: Any = getattr(candidate.call, "device", None)
    found = device.memory_stats() if hasattr(device, "memory_stats") else None
    return (found or {}).get("peak_bytes_in_use")


# --- The verb -------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Measure, or read what was measured; write it. Returns the exit code. CommandError."""
    from artifactnet_jax.bench import figures

    if args.out:
        check_output(args.out, f"--out {args.out}")
    if args.plots:
        figures.check(args.plots)
    if args.read:
        found = _read(args.read)
    else:
        with tempfile.TemporaryDirectory(prefix="artifactnet-jax-") as folder:
            found = _measure(args, folder)
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    if args.out:
        with writing(args.out):
            replace_file(args.out, text.encode())
    if args.plots:
        with writing(args.plots):
            for path in figures.plots(found, args.plots):
                print(f"wrote {path}", file=sys.stderr)
    with writing("stdout"):
        if args.table:
            sys.stdout.write(figures.tables(found))
        elif not args.out and not args.read:
            sys.stdout.write(text)
    return SOME_FAILED if _failures(found) else OK


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise CommandError(f"--from {path}: {error.strerror}", USAGE) from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        cure = "name a file that bench throughput --out wrote"
        raise CommandError(f"--from {path}: it holds no {SCHEMA}: {cure}", USAGE)
    return found


def _failures(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [*found.get("tracks", ()), *found.get("cold", ()), *found.get("scaling", ())]
    return [row for row in rows if "error" in row or row.get("errors")]


def _measure(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    def tell(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr)

    here = machine.hardware()  # before anything adds to its load
    facts: dict[str, Any] = {"schema": SCHEMA, "machine": here}
    if missing := [path for path in _named(args.paths) if not os.path.lexists(path)]:
        raise CommandError(f"{printable(missing[0])}: no such file: check the path", USAGE)
    if args.onnx and not os.path.isfile(args.onnx):
        raise CommandError(f"--onnx {args.onnx}: no such file: check the path", USAGE)
    weights, weights_path = _weights(args, folder)
    names, left_out = _backends(args.backends, weights)
    config = weights.config
    facts |= {
        "versions": machine.versions(),
        "commit": machine.commit(),
        "settings": {
            "scenario": args.scenario,
            "rounds": args.rounds,
            "audio": "given" if args.paths else "generated",
        },
        "weights": {**weights.summary(), "random": args.preset is not None},
        "left_out": left_out,
    }
    if args.scenario == "scaling":
        if args.paths or args.onnx or args.torch:
            cure = "leave PATH and peers out"
            raise CommandError(
                f"scenario scaling times our backends on its own audio: {cure}", USAGE
            )
        batch = args.batch[0] if args.batch else None
        grown = scaling(names, weights_path, batch, args.long, folder, tell)
        return {**facts, "scaling": grown}

    paths = find_audio(args.paths, recursive=False) if args.paths else generate(folder)
    plan = config.verdict.segments if args.segments is None else args.segments
    tracks, failed, sample = examine(paths, weights, plan)
    candidates = []
    if args.onnx:
        tell(f"{args.onnx}: starting")
        candidates.append(onnx_peer(args.onnx, weights, plan))
    if args.torch:
        tell("torch: starting")
        candidates.append(torch_peer(weights, plan))
    for name, batch in itertools.product(names, args.batch or [None]):
        label = f"{name} batch {batch}" if batch else name
        tell(f"{label}: starting")
        try:
            candidates.append(ours(name, weights, plan, batch, label))
        except CommandError as error:
            if args.backends:
                raise
            left_out[name] = str(error)
    if all(candidate.peer for candidate in candidates):
        raise CommandError(f"no backend can run: {next(iter(left_out.values()))}", NO_BACKEND)
    measured = _compare(args, candidates, weights, tracks, sample, tell)
    cold_rows = []
    if hasattr(os, "posix_spawn"):
        started = [name for name in names if name not in left_out]
        cold_rows = cold(started, weights_path, folder, args.rounds, tell)
    good = [_track_row(track, measured["candidates"]) for track in tracks]
    for row in measured["candidates"]:
        row.pop("outcomes")
    return {**facts, "tracks": [*good, *failed], **measured, "cold": cold_rows}


def _compare(
    args: argparse.Namespace,
    candidates: list[Candidate],
    weights: Model,
    tracks: list[Track],
    sample: np.ndarray,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Everything that is measured in this process."""
    paths, cores = [track.path for track in tracks], cpu_count()
    for candidate in candidates:
        began = time.perf_counter()
        candidate.call(sample[None].astype(np.float32))
        candidate.facts["first_call_s"] = time.perf_counter() - began
        one_pass(candidate, paths[:1], args.scenario)  # warm-up of the whole way
    single: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    batch: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}

    def action(candidate: Candidate) -> Pass:
        return one_pass(candidate, paths, args.scenario)

    def segment_calls(candidate: Candidate) -> None:
        single[candidate.name] += calls(candidate, sample, 1, SEGMENT_CALLS)
        if candidate.batch > 1:
            batch[candidate.name] += calls(candidate, sample, candidate.batch, SEGMENT_CALLS)

    with contextlib.closing(machine.Energy()) as energy:

        def now() -> Reading:
            return Reading(time.perf_counter(), time.process_time(), energy.joules())

        runs = interleaved(
            {c.name: functools.partial(action, c) for c in candidates}, args.rounds, now, tell
        )
        alone = {c.name: functools.partial(segment_calls, c) for c in candidates}
        interleaved(alone, args.rounds, now, lambda text: tell(f"segments: {text}"))
        source = energy.source
    tell("stages and limits")
    limits = {str(n): machine.peaks(n) for n in sorted({1, cores})}
    rows = []
    for candidate in candidates:
        row = row_of(candidate, runs[candidate.name], tracks, cores)
        row["cores"] = cores
        row["segment_ms"] = percentiles([1000 * s for s in single[candidate.name]])
        if batch[candidate.name]:
            row["batch_ms"] = percentiles([1000 * s for s in batch[candidate.name]])
        row["device_peak_bytes"] = device_memory(candidate)
        row["stages"] = None if candidate.peer else stages(candidate, weights, sample, tracks)
        row["outcomes"] = runs[candidate.name][-1][1].outcomes
        rows.append(row)
    found: dict[str, Any] = {
        "candidates": rows,
        "segment_s": weights.config.front_end.segment_s,
        "reading_s_per_s": reading_stages(tracks, weights),
        "limits": limits,
        "energy_from": source or None,
        "comparisons": _comparisons(candidates, runs),
        "peak_bytes": _peak_bytes(),
    }
    if any(c.facts["backend"] == "xla" for c in candidates):
        import jax

        if jax.devices()[0].platform != "cpu":
            found["device_limits"] = machine.device_peaks()
    if not isinstance(weights, ForeignGraph):
        work, moved = flops(weights.config), traffic(weights.config)
        found["flop_per_segment"], found["bytes_per_segment"] = work, moved
        for row in rows:
            on_gpu = row["backend"] in GPU_BACKENDS or row.get("device") == "cuda"
            on_gpu |= row["backend"] == "xla" and "device_limits" in found
            row["roofline"] = None if on_gpu else roofline(work, moved, row, limits)
            if on_gpu and "device_limits" in found:
                gflops = work["total"] / row["ms_per_segment"] / 1e6
                key = "gflops_bfloat16" if row["dtype"] == "bfloat16" else "gflops"
                row["of_device_peak"] = gflops / found["device_limits"][key]
    return found


def _comparisons(
    candidates: list[Candidate], runs: dict[str, list[tuple[Reading, Pass]]]
) -> list[dict[str, Any]]:
    """Speed and parity of every pair; a peer stands first."""

    def walls(candidate: Candidate) -> list[float]:
        return [taken.wall_s for taken, _ in runs[candidate.name]]

    return [
        {
            "of": base.name,
            "over": other.name,
            "speed": ratios(walls(base), walls(other)),
            "parity": parity(runs[base.name][-1][1], runs[other.name][-1][1]),
        }
        for base, other in itertools.combinations(candidates, 2)
    ]


def _track_row(track: Track, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What was said of a track, by candidate; messages where a candidate failed."""
    found: dict[str, Any] = {**dataclasses.asdict(track), "scores": {}}
    errors = {}
    for row in rows:
        outcome = row["outcomes"][track.path]
        if isinstance(outcome, Failure):
            errors[row["name"]] = outcome.message
        else:
            found["scores"][row["name"]] = outcome.score
    return {**found, "errors": errors} if errors else found


def _peak_bytes() -> int | None:
    """Largest resident memory of this process, everything that it compared included."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _named(paths: Sequence[str]) -> list[str]:
    """The files that arguments name, lists read. Raises CommandError."""
    try:
        return find_audio(paths, recursive=False)
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error


def _weights(args: argparse.Namespace, folder: str) -> tuple[Model, str | None]:
    """The weights, and the file that processes of their own read them from; None: embedded."""
    if args.preset:
        path = os.path.join(folder, "random.safetensors")
        _save_random(args.preset, path)
        return open_model(path), path
    try:
        return open_model(args.weights), args.weights
    except WeightsError as error:
        raise CommandError(str(error), USAGE) from error


def _save_random(preset: str, path: str) -> None:
    """Random weights of a preset, whose score of music is about 0.5: elsewhere all would agree."""
    from artifactnet_jax.backends.numpy import NumpyBackend

    config = Config.from_preset(preset)
    tensors = random_tensors(config)
    backend = NumpyBackend(Weights("random", config, tensors, "", "", {}))
    audio = music(config.front_end.segment_s, config.front_end.sample_rate, 0).mean(axis=1)
    tensors["cnn.out.bias"] -= backend.stages(audio)["logit"]
    save_weights(path, config, tensors, name="random", licence="none", provenance={})


def _backends(named: str | None, weights: Model) -> tuple[list[str], dict[str, str]]:
    """Backends to time, and why others are left out. Raises CommandError for a named one."""
    names = named.split(",") if named else list(BACKENDS)
    left_out: dict[str, str] = {}
    for name in names:
        kind, _ = backend_of(name)
        if kind not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise CommandError(f"--backends: unknown backend {name!r}: use {known}", USAGE)
        if reason := why_unavailable(kind):
            if named:
                raise CommandError(reason, NO_BACKEND)
            left_out[name] = reason
    return [name for name in names if name not in left_out], left_out
