"""The verb `verify`: an ONNX model in onnxruntime against every backend here, and the report."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from artifactnet_jax.audio import Segment, SegmentReader
from artifactnet_jax.convert.graph import ConvertError, read_graph
from artifactnet_jax.convert.parity import (
    BACKENDS,
    FILE,
    STAGES,
    Candidate,
    Comparison,
    Original,
    Outcome,
    nearer,
    together,
)
from artifactnet_jax.convert.trace import probe
from artifactnet_jax.dsp_numpy import sigmoid
from artifactnet_jax.files import find_audio, writing
from artifactnet_jax.models import load_backend, open_model, why_unavailable
from artifactnet_jax.recording import AudioError
from artifactnet_jax.text import NO_BACKEND, OK, SOME_FAILED, USAGE, CommandError, printable
from artifactnet_jax.weights import ForeignGraph, Model, WeightsError

if TYPE_CHECKING:
    from artifactnet_jax.convert.contract import Contract

SCHEMA = "artifactnet-jax/verify/1"
COLUMNS = 100  # of the text
LISTED = 20  # segments in the text of which the original has no finite score


def run(args: argparse.Namespace) -> int:
    """Verify what the arguments name; returns the exit code. CommandError: it cannot go on."""
    for package in ("onnxruntime", "onnx", "jax", "flax"):
        if importlib.util.find_spec(package) is None:
            cure = "pip install 'artifactnet-jax[convert]'"
            raise CommandError(f"verify needs {package}: {cure}", NO_BACKEND)
    from tqdm import tqdm

    wanted = args.backends.split(",") if args.backends else list(BACKENDS)
    try:
        paths = find_audio(args.audio or [], recursive=False)
        given = open_model(args.weights) if args.weights else None
        reference = _converted(args.model, given)
        weights = given or reference
        original = Original(args.model, reference)
        _check(args.weights, weights, original.contract)
        found, left_out = candidates(weights, original.contract, wanted)
        if args.exact:
            found.insert(0, Candidate(FILE, original))
            original = Original(args.model, reference, exact=True)
    except (ConvertError, WeightsError, ValueError) as error:
        raise CommandError(str(error), USAGE) from error
    if args.backends and left_out:
        name, reason = next(iter(left_out.items()))
        raise CommandError(f"--backends {name}: {reason}", NO_BACKEND)

    comparison = Comparison(original, weights, found)
    tracks: Iterable[tuple[str, Iterable[Segment]]] = _probe_tracks(weights, original.contract)
    if args.audio:
        tracks = _read(paths, weights, original.contract)
    total = len(paths) or None
    for path, segments in tqdm(tracks, total=total, unit="track", leave=False, disable=None):
        try:
            comparison.track(path, segments)
        except (AudioError, ConvertError) as error:
            kind = error.kind if isinstance(error, AudioError) else "model"
            failure = {"kind": kind, "message": str(error)}
            comparison.rows.append({"path": path, "error": failure})
    report = _report(args, reference, comparison, left_out)
    text = json.dumps(report, indent=1, allow_nan=False) + "\n" if args.json else to_text(report)
    with writing("stdout"):
        sys.stdout.write(text)
    return OK if report["ok"] else SOME_FAILED


def _converted(path: str, given: Model | None) -> Model:
    """What a model converts to. Raises ConvertError or WeightsError."""
    from artifactnet_jax.convert.import_cache import load_onnx

    try:
        return load_onnx(path)
    except (ConvertError, WeightsError):
        # Of several outputs only the weights may know which one is the score.
        if given is None or given.provenance.get("source_sha256") != read_graph(path).sha256:
            raise
        return given


def _check(path: str | None, weights: Model, contract: Contract) -> None:
    """ValueError where weights cannot score what the original scores."""
    samples = weights.config.front_end.segment_samples
    if samples != contract.samples:
        raise ValueError(
            f"{path}: weights of {samples}-sample segments, the model's have {contract.samples}: "
            "name weights that were made of it"
        )
    if isinstance(weights, ForeignGraph) and weights.whole_song != contract.song:
        raise ValueError(
            f"{path}: of weights and model one scores songs, the other segments: name weights that "
            "were made of it"
        )


# --- What scores ---------------------------------------------------------------------------------


def candidates(
    weights: Model, contract: Contract, wanted: Sequence[str]
) -> tuple[list[Candidate], dict[str, str]]:
    """The backends of these names that can run here, and why the others cannot.

    ValueError: a name that there is not.
    """
    if unknown := [name for name in wanted if name not in BACKENDS]:
        raise ValueError(f"unknown backend {unknown[0]!r}: use {', '.join(BACKENDS)}")
    found, left_out = [], {}
    for name in wanted:
        kind, _, precision = name.partition("-")
        reason = "" if kind == "onnx" else why_unavailable(kind)
        if isinstance(weights, ForeignGraph) and name != "xla":
            reason = "a graph whose networks were not recognised runs as it is, in xla alone"
        if not reason:
            make = _lean if kind == "onnx" else _backend
            try:
                found.append(Candidate(name, make(weights, contract, kind, precision)))
            except ValueError as error:  # weights that float16 or this backend cannot hold
                reason = str(error)
        if reason:
            left_out[name] = reason
    return found, left_out


def _backend(
    weights: Model, contract: Contract, kind: str, dtype: str
) -> Callable[[np.ndarray], Outcome]:
    backend: Any = load_backend(kind, weights, dtype=dtype or "float32")
    whole = together(weights, contract)
    joint = weights.whole_song

    def run(audio: np.ndarray) -> Outcome:
        scores = backend.song(audio) if whole else backend(audio)
        if isinstance(weights, ForeignGraph):
            return ({}, None, float(scores[0])) if contract.song else ({}, scores, None)
        if not hasattr(backend, "stages"):  # onnxruntime: "onnx" shows those of its graph
            return {}, scores, None
        parts = [backend.stages(segment) for segment in audio]
        stages = {stage: np.stack([part[stage] for part in parts]) for stage in STAGES[:-1]}
        if joint and len(audio) > 1:  # these two are of each segment by itself
            del stages["channels"], stages["logit"]
        return stages, scores, None

    return run


def _lean(
    weights: Model, contract: Contract, kind: str, precision: str
) -> Callable[[np.ndarray], Outcome]:
    """The graph that `export` writes, in onnxruntime."""
    from artifactnet_jax.convert.export import build_onnx
    from artifactnet_jax.convert.original import session

    whole = together(weights, contract)
    form: Any = "song" if whole else "segment"
    of: Any = precision or "fp32"
    model = build_onnx(weights, form=form, precision=of, stages=True)
    lean = session(model.SerializeToString())
    given, names = lean.get_inputs()[0].name, [value.name for value in lean.get_outputs()]

    def run(audio: np.ndarray) -> Outcome:
        stages = dict(zip(names, lean.run(names, {given: audio}), strict=True))
        score = stages.pop("p_ai")
        if not whole:
            return stages, score, None
        song = float(score[0]) if contract.song else None
        return stages, sigmoid(stages["logit"].astype(np.float64)), song

    return run


# --- What is scored -------------------------------------------------------------------------------


def _read(
    paths: list[str], weights: Model, contract: Contract
) -> Iterator[tuple[str, SegmentReader]]:
    """Recordings, cut as the weights say; for a graph of k segments, into k of them."""
    config = weights.config
    plan: Any = config.verdict.segments
    if together(weights, contract):
        plan = contract.segments or ("first60" if plan == "all" else plan)
    for path in paths:
        yield path, SegmentReader(path, config.front_end, config.verdict, plan)


def _probe_tracks(weights: Model, contract: Contract) -> Iterator[tuple[str, list[Segment]]]:
    """The probe's segments as tracks of one; where songs are scored whole, also one of several.

    A graph that takes no less than k segments gets each k times.
    """
    found, whole = probe(contract.samples), together(weights, contract)
    tracks = {k: [audio] * ((contract.segments or 1) if whole else 1) for k, audio in found.items()}
    if whole:
        music = [audio for name, audio in found.items() if name.startswith("music")][:3]
        count = contract.segments or len(music)
        tracks["music 1 to 3"] = list(itertools.islice(itertools.cycle(music), count))
    seconds = weights.config.front_end.segment_s
    for name, segments in tracks.items():
        yield (
            name,
            [
                Segment(i * seconds, x, float(np.abs(x).max()), float(np.sqrt(np.mean(x * x))))
                for i, x in enumerate(segments)
            ],
        )


# --- The report -----------------------------------------------------------------------------------


def _report(
    args: argparse.Namespace, reference: Model, comparison: Comparison, left_out: dict[str, str]
) -> dict[str, Any]:
    """Everything that was found, as plain data."""
    weights, original, rows = comparison.weights, comparison.original, comparison.rows
    verdict, made = weights.config.verdict, reference.provenance
    notes = []
    if weights.sha256 != reference.sha256:
        notes.append("these weights are not what the model converts to: differences are expected")
    if original.note:
        notes.append(f"the original was {original.note}")
    backends = {c.name: c.to_dict(args.tolerance) for c in comparison.found}
    if args.exact:
        file, *others = comparison.found
        for candidate in others:
            row = backends[candidate.name]
            row |= nearer(candidate, file)
            # Nearer to the truth than the file itself is in onnxruntime: nothing is wrong with it.
            sound = not (candidate.flips or candidate.not_finite)
            row["ok"] = row["ok"] or (row["nearer"] == "backend" and sound)
    failed = sum("error" in row for row in rows)
    compared = sum(row.get("score") is not None for row in rows)
    if failed:
        notes.append(f"{failed} of {len(rows)} tracks could not be compared")
    if not compared:
        notes.append("nothing was compared: there is no track of which the original has a score")
    equal = all(row["ok"] for row in backends.values() if row["counted"])
    return {
        "schema": SCHEMA,
        "ok": bool(equal and compared and not failed),
        "model": {
            "path": args.model,
            "sha256": made["source_sha256"],
            "form": made["form"],
            "producer": made["producer"],
            "opset": made["opset"],
        },
        "weights": {
            **weights.summary(),
            **{k: weights.provenance.get(k) for k in ("route", "reason", "source_sha256")},
        },
        "notes": notes,
        "against": "float64" if args.exact else "onnxruntime",
        "tolerance": args.tolerance,
        "threshold": verdict.threshold,
        "aggregate": "graph" if original.contract.song else verdict.aggregate,
        "backends": backends,
        "left_out": left_out,
        "tracks": rows,
        "not_finite": comparison.not_finite,
    }


def to_text(report: dict[str, Any]) -> str:
    """The report for people, in lines of at most 100 characters."""
    model, weights, backends = report["model"], report["weights"], report["backends"]
    names = {name: name if row["counted"] else f"{name}*" for name, row in backends.items()}
    lines = [
        f"model     {printable(os.path.basename(model['path']))}, scores each {model['form']}, "
        f"opset {model['opset']}, sha256 {model['sha256'][:16]}",
        f"weights   {printable(weights['name'])}, route {weights['route'] or 'none'}, "
        f"sha256 {weights['sha256'][:16]}",
    ]
    lines += [f"          {printable(weights['reason'])}"] if weights["reason"] else []
    for reason, same in itertools.groupby(report["left_out"].items(), lambda item: item[1]):
        lines.append(f"left out  {', '.join(name for name, _ in same)}: {reason}")
    lines += ["", *_stages(report, names), "", *_tracks(report, names), ""]
    if report["not_finite"]:
        lines += [*_not_finite(report["not_finite"]), ""]
    lines.append(f"{'backend':<14}{'track |dp|':>12}{'segment |dp|':>14}{'flips':>7}")
    for name, row in backends.items():
        verdict = "ok" if row["ok"] else "FAILS"
        if name == FILE:
            verdict = "the file itself, in onnxruntime"
        elif not row["counted"]:
            verdict = "beside: does not decide"
        elif not row["ok"] and row["departs"]:
            verdict += f", departs first at: {row['departs']}"
        if "nearer" in row:
            side = name if row["nearer"] == "backend" else "onnxruntime"
            verdict += f"; nearer to float64: {side}"
            verdict += f", they part at: {row['parts']}" if row["parts"] else ""
        if row["not_finite"]:
            verdict += f"; not finite: {row['not_finite']}"
        cells = f"{short(row['track_dp']):>12}{short(row['segment_dp']):>14}{row['flips']:>7}"
        lines.append(f"{names[name]:<14}{cells}  {verdict}")
    lines += ["", *(f"note: {note}" for note in report["notes"])]
    outcome = "verified" if report["ok"] else "NOT VERIFIED"
    lines.append(f"{outcome}; tolerance {report['tolerance']:g} on a track's |dp|, and no flip")
    wrapped = (textwrap.wrap(x, COLUMNS, subsequent_indent=" " * 10) or [""] for x in lines)
    return "".join(f"{line}\n" for line in itertools.chain.from_iterable(wrapped))


def _stages(report: dict[str, Any], names: dict[str, str]) -> Iterator[str]:
    backends = report["backends"].values()
    against = report["against"]
    yield f"Largest and 99.9 % absolute error against {against}, over all segments"
    yield f"{'stage':<10}{'scale':>9}" + "".join(f"{name:>16}" for name in names.values())
    for stage in STAGES:
        found = [row["stages"].get(stage) for row in backends]
        if any(found):
            scale = max(cell["scale"] for cell in found if cell)
            pairs = [f"{short(c['max'])} {short(c['p999']):>6}" if c else "-" for c in found]
            yield f"{stage:<10}{scale:>9.3g}" + "".join(f"{pair:>16}" for pair in pairs)


def _tracks(report: dict[str, Any], names: dict[str, str]) -> Iterator[str]:
    rule = "by the graph" if report["aggregate"] == "graph" else f"by {report['aggregate']}"
    yield f"|dp| of each track, {rule}; ! is a verdict flip at {report['threshold']:g}"
    widths = [max(8, len(name)) + 2 for name in names.values()]
    cells = "".join(f"{name:>{w}}" for name, w in zip(names.values(), widths, strict=True))
    yield f"{'original':>8}{'segments':>10}{cells}  track"
    room = COLUMNS - 20 - sum(widths)
    for row in report["tracks"]:
        if "error" in row:
            yield f"{'error':>8}  {printable(row['error']['message'])}"
            continue
        path, found = printable(row["path"]), row["backends"].values()
        known = row["score"] is not None
        dps = [short(c["dp"]) + "!" * c["flip"] if known else "-" for c in found]
        cells = "".join(f"{dp:>{width}}" for dp, width in zip(dps, widths, strict=True))
        score = "-" if row["score"] is None else f"{row['score']:.5f}"
        tail = path if len(path) <= room else f"...{path[3 - room :]}"
        yield f"{score:>8}{row['n_segments']:>10}{cells}  {tail}"


def _not_finite(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{len(rows)} times the original is not finite; ours there"
    for row in rows[:LISTED]:
        start = "song" if row["start_s"] is None else f"{row['start_s']:.1f} s"
        path = printable(row["path"])
        yield f"{start:>8}  {path if len(path) <= 90 else '...' + path[-87:]}"
        says = ((k, "not finite" if p is None else f"{p:.4f}") for k, p in row["backends"].items())
        yield f"{'':>10}" + "  ".join(f"{name} {score}" for name, score in says)
    if len(rows) > LISTED:
        yield f"{'':>10}and {len(rows) - LISTED} more: --json lists them all"


def short(x: float | None) -> str:
    """A number in at most six characters; None, as JSON has it, is infinite."""
    if x is None:
        return "inf"
    if x < 1e-9:
        return "<1e-9" if x else "0"
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
