"""The verb `bench accuracy`: detectors on the tracks of a manifest, scores first, then a report.

What a run leaves in its folder: `results.jsonl`, a row for every track and detector, `stress.jsonl`
with the same for every change, `run.json` (what was run), the fitted baselines, `public/DETECTOR/`
in the public runner's forms, and what `artifactnet_jax.bench.accuracy_report` writes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from artifactnet_jax import __version__, evaluation
from artifactnet_jax.audio import read_mono
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.bench import accuracy_report, manifests, mechanism, public, sanity, stress
from artifactnet_jax.bench.adapter import RATE, Adapter, Scored, at_rate, run_batch
from artifactnet_jax.bench.detectors import ArtifactNet, Tiered, open_detector, trained_parts
from artifactnet_jax.bench.manifests import AudioReader, Track
from artifactnet_jax.console.progress import progress
from artifactnet_jax.console.writers import writer
from artifactnet_jax.data.teachers import Teacher, open_teacher
from artifactnet_jax.files import check_output, claim, make_folder, write_json, writing
from artifactnet_jax.recording import AudioError
from artifactnet_jax.results import Failure
from artifactnet_jax.text import NO_BACKEND, OK, SOME_FAILED, USAGE, CommandError, brief, printable

BATCH = 8  # tracks in memory at once
MEAN_TRACKS = 32  # of the part "train", whose channels' mean an ablation puts in their place
STAGES = {"not-found": "resolve", "shard": "resolve"}  # of an AudioError; others: decode
Key = tuple[str, str, str]  # id, detector, change ("" none)


def run(args: argparse.Namespace) -> int:
    """Score what the arguments name, and report; returns the exit code."""
    for package in ("matplotlib", "pyarrow", "scipy", "sklearn"):  # now rather than after hours
        if importlib.util.find_spec(package) is None:
            cause = f"bench accuracy needs a package that is missing ({package})"
            raise CommandError(f'{cause}: pip install "artifactnet-jax[bench]"', NO_BACKEND)
    known, notes = manifests.read(args.manifest, args.audio)
    tracks = manifests.select(known, args.split, args.origin or "", args.each)
    say = _teller(args.quiet)
    for note in notes:
        say(note)
    out = Path(args.out)
    detectors = _detectors(args.detector, args.compare)
    teacher = _Lazy(args.teacher, say)
    try:
        changes = stress.changes(args.stress, teacher.open)
    except ValueError as error:
        raise CommandError(f"--stress: {error}", USAGE) from error
    _check_threshold(args.threshold, tracks)
    if args.mechanism and not any(isinstance(d, ArtifactNet) for d in detectors):
        raise CommandError("--mechanism: none of the detectors is artifactnet: add it", USAGE)
    _claim(out, args.resume)
    for detector in detectors:
        detector.load(args.device)
    _fit(detectors, known, out, say)
    kept = _resume(out, args, detectors, teacher)
    rows = _score_all(tracks, detectors, changes, out, kept, args.quiet)
    return _report(args, out, tracks, known, detectors, rows, teacher)


def _teller(quiet: bool) -> Callable[[str], None]:
    def say(text: str) -> None:
        if not quiet:
            print(printable(text), file=sys.stderr)

    return say


def _detectors(specs: Sequence[str], compared: Sequence[str]) -> list[Adapter]:
    detectors = [open_detector(spec) for spec in specs or ["artifactnet"]]
    names = [detector.name for detector in detectors] + [_pair(text)[0] for text in compared]
    if twice := {name for name in names if names.count(name) > 1}:
        cause = f"two detectors are called {printable(sorted(twice)[0])}"
        raise CommandError(f"{cause}: give one as NAME=SPECIFICATION", USAGE)
    return detectors


def _pair(text: str) -> tuple[str, str]:
    name, mark, folder = text.partition("=")
    if not (name and mark and folder):
        raise CommandError(printable(f"--compare {text}: give NAME=FOLDER"), USAGE)
    return name, folder


class _Lazy:
    """The separator, opened when something needs it."""

    def __init__(self, spec: str | None, say: Callable[[str], None]) -> None:
        installed = importlib.util.find_spec("demucs") and importlib.util.find_spec("torch")
        self._spec = spec or ("demucs" if installed else "builtin")
        self._say = say
        self.teacher: Teacher | None = None

    def open(self) -> Teacher:
        """The separator; opened by the first call."""
        if self.teacher is None:
            self.teacher = open_teacher(self._spec)
            self._say(f"separator: {self.teacher.name}")
            if self.teacher.note:
                self._say(self.teacher.note)
        return self.teacher


def _check_threshold(threshold: float | str | None, tracks: Sequence[Track]) -> None:
    if threshold is None or isinstance(threshold, float):
        return
    if threshold not in evaluation.RULES:
        known = ", ".join(evaluation.RULES)
        raise CommandError(f"--threshold {threshold}: give a number or one of {known}", USAGE)
    labels = {track.label for track in tracks if track.split == "calibration"}
    if len(labels) < 2:
        cause = f"--threshold {threshold} is chosen on tracks of both labels of the part"
        cure = "divide the manifest with artifactnet-jax split, or give a number"
        raise CommandError(f"{cause} 'calibration', which are not there: {cure}", USAGE)


def _claim(out: Path, resume: bool) -> None:
    """Make the folder where it is missing, and check that it can be used."""
    make_folder(out, "--out")
    for name in ("results.jsonl", "stress.jsonl", "run.json"):
        check_output(out / name, f"--out {out}: {name}")
        if not resume and (out / name).exists():
            cure = "give --resume to go on with it, or another folder"
            raise CommandError(f"--out {out}: it holds a run already: {cure}", USAGE)


def _fit(
    detectors: Sequence[Adapter], tracks: Sequence[Track], out: Path, say: Callable[[str], None]
) -> None:
    """Fit what needs it to the part "train", once of a kind, or take what the folder has."""
    for part in [part for detector in detectors for part in trained_parts(detector)]:
        if part.fitted:
            continue
        path = out / f"{_file_name(part.label)}.json"
        if not path.exists():
            known = [t for t in tracks if t.split == "train" and not t.problem]
            if len({track.label for track in known}) < 2:
                cause = f"{part.kind} is fitted to tracks of both labels of the part 'train'"
                cure = "divide the manifest with artifactnet-jax split, or give a fitted file"
                raise CommandError(f"{cause}, which are not there: {cure}", USAGE)
            say(f"{part.label}: fitting to {len(known)} tracks")
            rate = part.input_rate
            part.fit((at_rate(audio, rate), track.label) for track, audio in _decoded(known))
            with writing(str(path)):
                write_json(path, part.state)
        try:
            part.restore(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            cause = f"{path}: not a fitted {part.kind} ({brief(error)})"
            raise CommandError(printable(f"{cause}: delete it to fit again"), USAGE) from error


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name)


def _resume(
    out: Path, args: argparse.Namespace, detectors: Sequence[Adapter], teacher: _Lazy
) -> dict[Key, dict[str, Any]]:
    """Whole rows of an earlier run of the folder but its failures; and `run.json`, checked."""
    digests = []
    for path in args.manifest:
        with contextlib.suppress(OSError), open(path, "rb") as file:  # a folder has none
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    facts: dict[str, Any] = {
        "version": __version__,
        "manifests": digests,
        "detectors": {detector.name: detector.identity for detector in detectors},
        "teacher": None if teacher.teacher is None else teacher.teacher.digest,
    }
    path, own, separator = out / "run.json", facts["detectors"], facts["teacher"]

    def decisive(facts: dict[str, Any]) -> dict[str, Any]:
        """Facts that both runs have, and that must be equal."""
        known = {name: facts["detectors"].get(name, own[name]) for name in own}
        theirs = separator and (facts["teacher"] or separator)
        return {"manifests": facts["manifests"], "detectors": known, "separator": theirs}

    earlier = claim(path, facts, decisive)
    facts |= {"detectors": earlier["detectors"] | own, "teacher": separator or earlier["teacher"]}
    with writing(path):
        write_json(path, facts)
    kept: dict[Key, dict[str, Any]] = {}
    for name in ("results.jsonl", "stress.jsonl"):
        if (out / name).exists():
            for line in (out / name).read_bytes().splitlines(keepends=True):
                row = _row_of(line) if line.endswith(b"\n") else None
                if row is not None and row["error"] is None:
                    kept[row["id"], row["detector"], row.get("stress", "")] = row
    return kept


def _row_of(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds, None if it was cut off."""
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and {"id", "detector", "score", "error"} <= set(row):
            return row
    return None


# --- scoring ---------------------------------------------------------------------------------


def _decoded(tracks: Sequence[Track]) -> Iterator[tuple[Track, np.ndarray]]:
    """Tracks with their audio, those that fail left out."""
    for batch in _batches(tracks):
        for track, audio in batch:
            if isinstance(audio, np.ndarray):
                yield track, audio


def _batches(tracks: Sequence[Track]) -> Iterator[list[tuple[Track, np.ndarray | AudioError]]]:
    """Mono audio of a few tracks at a time, the next ones decoded meanwhile."""
    reader = AudioReader()

    def decode(track: Track, source: Any) -> np.ndarray | AudioError:
        if isinstance(source, AudioError):
            return source
        try:
            return read_mono(source, RATE, track.id)
        except AudioError as error:
            return error
        except Exception as error:  # a bug in a decoder; the other tracks are none the worse
            return AudioError("internal", printable(f"{track.id}: {brief(error)}"))

    def source(track: Track) -> Any:
        try:
            return reader.open(track)
        except AudioError as error:
            return error

    with ThreadPoolExecutor(cpu_count()) as pool:
        ahead: list[Any] = []
        parts = [tracks[i : i + BATCH] for i in range(0, len(tracks), BATCH)]
        for part in [*parts, None]:
            ready = ahead
            ahead = []
            if part is not None:  # sources come in order, from this thread alone
                ahead = [(t, pool.submit(decode, t, source(t))) for t in part]
            if ready:
                yield [(track, future.result()) for track, future in ready]


def _score_all(
    tracks: Sequence[Track],
    detectors: Sequence[Adapter],
    changes: Mapping[str, stress.Change],
    out: Path,
    kept: Mapping[Key, dict[str, Any]],
    quiet: bool,
) -> dict[Key, dict[str, Any]]:
    """Every row of this run, those kept and those scored now."""
    names = ["", *changes]
    keys = [(t.id, d.name, change) for t in tracks for d in detectors for change in names]
    rows = {key: kept[key] for key in keys if key in kept}
    open_ids = {key[0] for key in keys if key not in kept}
    todo = [track for track in tracks if track.id in open_ids]
    if kept and not quiet:
        print(f"resume: {len(rows)} rows done, {len(keys) - len(rows)} to go", file=sys.stderr)
    plain = [row for (_, _, change), row in kept.items() if not change]
    stressed = [row for (_, _, change), row in kept.items() if change]
    with contextlib.ExitStack() as stack:
        write = {"": stack.enter_context(writer("jsonl", str(out / "results.jsonl"), plain))}
        if changes or stressed:
            path = str(out / "stress.jsonl")
            grow = stack.enter_context(writer("jsonl", path, stressed))
            write |= dict.fromkeys(changes, grow)
        tell = stack.enter_context(progress(quiet, str(out), len(todo)))
        for batch in _batches(todo):
            for change in names:
                changed = _changed(batch, change, changes)
                for detector in detectors:
                    due = [
                        item for item in changed if (item[0].id, detector.name, change) not in rows
                    ]
                    for row in _rows(detector, due, change):
                        rows[row["id"], detector.name, change] = row
                        write[change](row)
            for track, _ in batch:
                own = [rows[track.id, d.name, c] for d in detectors for c in names]
                error = next((row["error"] for row in own if row["error"]), None)
                tell(Failure(track.id, error["kind"], error["message"]) if error else None)
    return rows


Heard = list[tuple[Track, np.ndarray | AudioError]]


def _changed(batch: Heard, name: str, changes: Mapping[str, stress.Change]) -> Heard:
    if not name:
        return batch

    def one(track: Track, audio: np.ndarray | AudioError) -> np.ndarray | AudioError:
        if isinstance(audio, AudioError):
            return audio
        try:
            return changes[name](audio, track.id)
        except Exception as error:  # a codec that refuses this track
            return AudioError("stress", printable(f"{track.id}: {name} failed: {brief(error)}"))

    return [(track, one(track, audio)) for track, audio in batch]


def _rows(detector: Adapter, batch: Heard, change: str) -> Iterator[dict[str, Any]]:
    """A detector's rows for a batch; a track without audio is a failure like any other."""
    heard = [(track, audio) for track, audio in batch if isinstance(audio, np.ndarray)]
    began = time.perf_counter()
    results = run_batch(detector, [audio for _, audio in heard]) if heard else []
    seconds = (time.perf_counter() - began) / max(len(heard), 1)
    found: dict[str, Any] = {t.id: r for (t, _), r in zip(heard, results, strict=True)}
    for track, audio in batch:
        row: dict[str, Any] = {"id": track.id, "detector": detector.name}
        if change:
            row["stress"] = change
        row |= {"score": None, "segments": [], "error": None, "seconds": round(seconds, 4)}
        result: Any = found.get(track.id)
        if isinstance(audio, AudioError):
            stage = STAGES.get(audio.kind, "decode")
            row |= {"error": _problem(audio.kind, str(audio), stage), "seconds": 0.0}
        elif isinstance(result, Scored):
            row |= {"score": result.score, "segments": list(result.segments)}
            if result.tier is not None:
                row["tier"] = result.tier
            if result.verdict is not None:
                row["verdict"] = result.verdict
        else:
            message = f"{track.id}: {detector.name}: {result}"
            row |= {
                "error": _problem(result.kind, message, "inference"),
                "segments": list(result.segments),
            }
        yield row


def _problem(kind: str, message: str, stage: str) -> dict[str, str]:
    return {"kind": kind, "message": printable(message), "stage": stage}


# --- what comes of it ------------------------------------------------------------------------


def _measured(tracks: Sequence[Track]) -> list[Track]:
    """The tracks that figures are of: all but those that thresholds are chosen on."""
    return [t for t in tracks if t.split != "calibration"] or list(tracks)


def _threshold(
    threshold: float | str | None,
    fact: Mapping[str, Any],
    tracks: Sequence[Track],
    rows: Mapping[Key, Mapping[str, Any]],
) -> float:
    """The threshold of a rule, the number given, or None: the detector's own.

    It is 0.5 where calibration scores allow none.
    """
    name = str(fact["name"])
    if threshold is None:
        return float(fact.get("own_threshold", 0.5))
    if isinstance(threshold, float):
        return threshold
    own = _metric_rows(name, [t for t in tracks if t.split == "calibration"], rows)
    try:
        return evaluation.choose_threshold(own, threshold)
    except ValueError as error:
        print(printable(f"{name}: threshold 0.5, as {threshold}: {error}"), file=sys.stderr)
        return 0.5


def _metric_rows(
    name: str, tracks: Sequence[Track], rows: Mapping[Key, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    return [track.to_dict() | {"score": rows[track.id, name, ""]["score"]} for track in tracks]


def _look(
    detector: ArtifactNet,
    measured: Sequence[Track],
    known: Sequence[Track],
    teacher: Teacher,
    threshold: float,
) -> dict[str, Any]:
    """The mechanism of one detector."""
    train = [track for track in known if track.split == "train" and not track.problem]
    basis = train[:: max(1, len(train) // MEAN_TRACKS)] or measured
    inside = mechanism.Mechanism(detector, teacher, (audio for _, audio in _decoded(basis)))
    figures, labels, scores = [], [], []
    for track, audio in _decoded(measured):
        row, ablated = inside.track(audio)
        if row:
            figures.append({"source": track.source, "label": track.label, **row})
            labels.append(track.label)
            scores.append(ablated)
    return {
        "detector": detector.name,
        "separator": teacher.name,
        "mask_max": inside.mask_max,
        "mean_channels_of": "train" if train else "the scored tracks",
        "sources": mechanism.by_source(figures),
        "ablations": mechanism.ablations(labels, scores, threshold),
    }


def _report(
    args: argparse.Namespace,
    out: Path,
    tracks: Sequence[Track],
    known: Sequence[Track],
    detectors: Sequence[Adapter],
    rows: dict[Key, dict[str, Any]],
    teacher: _Lazy,
) -> int:
    """Tables, the public forms and the report; the summary goes to stdout."""
    failed = any(row["error"] for row in rows.values())
    everything = [track.to_dict() for track in tracks]
    listed = [_facts(detector, rows) for detector in detectors]
    for text in args.compare:
        name, folder = _pair(text)
        read, views = public.read(folder, everything, name)
        rows |= {(row["id"], name, row.get("stress", "")): row for row in read + views}
        listed.append({"name": name, "params": None, "gflops": None})
    measured = _measured(tracks)
    measured_rows = [track.to_dict() for track in measured]
    passes, stressed, looked = [], [], []
    lines, worse = [], []
    baseline = public.read_per_source(args.baseline) if args.baseline else {}
    for fact in listed:
        name = fact["name"]
        threshold = _threshold(args.threshold, fact, tracks, rows)
        own = _metric_rows(name, measured, rows)
        subsets = sanity.evaluate(own, threshold, _subsets(args.subsets))
        passes += [{"detector": name, **row} for row in subsets]
        views_of: dict[str, dict[str, float | None]] = defaultdict(dict)
        for (track_id, detector_name, change), row in rows.items():
            if change and detector_name == name:
                views_of[change][track_id] = row["score"]
        if views_of:
            plain = {row["id"]: row["score"] for row in own}
            changed = stress.summarise(measured_rows, plain, views_of, threshold)
            delta = sanity.codec_delta(measured_rows, views_of)
            stressed.append({"detector": name, "changes": changed, "codec_delta": delta})
        results = {track.id: rows[track.id, name, ""] for track in measured}
        folder_of = out / "public" / _file_name(name)
        with writing(str(folder_of)):
            public.write(folder_of, measured_rows, results, views_of, threshold)
        if baseline:
            after = public.read_per_source(str(folder_of / "per_source.json"))
            worse += [{"detector": name, **row} for row in sanity.regressions(baseline, after)]
        lines.append(_line(name, own, threshold, subsets))
    for detector in detectors:
        if args.mechanism and isinstance(detector, ArtifactNet):
            threshold = _threshold(args.threshold, _facts(detector, rows), tracks, rows)
            looked.append(_look(detector, measured, known, teacher.open(), threshold))
    accuracy_report.write_report(
        out,
        everything,
        [row for (_, _, change), row in rows.items() if not change],
        detectors=listed,
        threshold=args.threshold,
        stress=stressed or None,
        sanity=passes,
        mechanism=looked or None,
    )
    print(_HEADER)
    print("\n".join(lines))
    for row in worse:
        change = f"{row['before']:.3f} to {row['after']:.3f}"
        text = f"{row['detector']}: {row['source']}: {row['rate'].upper()} from {change}: worse"
        print(printable(text), file=sys.stderr)
    if not args.quiet:
        print(f"report: {printable(str(out / 'report.html'))}", file=sys.stderr)
    return SOME_FAILED if failed else OK


def _facts(detector: Adapter, rows: Mapping[Key, Mapping[str, Any]]) -> dict[str, Any]:
    """What a report says of a detector beside its scores."""
    own = [row for (_, name, change), row in rows.items() if (name, change) == (detector.name, "")]
    seconds = [row["seconds"] for row in own if row["score"] is not None]
    facts: dict[str, Any] = {
        "name": detector.name,
        "params": detector.params,
        "gflops": detector.gflops,
        "seconds": float(np.mean(seconds)) if seconds else None,
        "own_threshold": detector.threshold,
    }
    if isinstance(detector, Tiered):
        facts |= detector.cost([row.get("tier") for row in own])
    return facts


def _subsets(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    return sanity.PAPER_SUBSETS if text == "paper" else tuple(text.split(","))


_HEADER = (
    "| detector | tracks | failed | threshold | F1 | TPR | FPR | AUROC | subsets passed |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def _line(
    name: str, own: list[dict[str, Any]], threshold: float, passes: list[dict[str, Any]]
) -> str:
    figures = evaluation.evaluate(own, threshold, resamples=1)["overall"]
    values = figures["missing_left_out"]["metrics"]

    def text(key: str) -> str:
        value = values[key]["value"]
        return "-" if value is None else f"{value:.3f}"

    cells = [name, str(len(own)), str(sum(row["score"] is None for row in own))]
    cells += [f"{threshold:.4g}", *map(text, ("f1", "recall", "fpr", "auroc"))]
    cells.append(f"{sum(row['passed'] for row in passes)} of {len(passes)}")
    return printable(f"| {' | '.join(cells)} |")
