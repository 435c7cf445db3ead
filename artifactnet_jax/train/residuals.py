"""The verb `residuals`: what a teacher leaves of every track of a manifest, for phase distill.

In the folder that it writes:

    teacher.json    whose residuals these are; another teacher needs another folder
    residuals/      float16 [n] of each track at 44.1 kHz, named by path, size and time of change
    tracks.jsonl    their figures, a line for each, appended as they are done
    manifest.csv    the rows done, with their column `residual`

float16 is exact to 11 bits, and to 2**-25 of full scale below 2**-14: finer than the 16 bits of the
decoded audio where the residual is below -12 dBFS.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import IO

import numpy as np

from artifactnet_jax.backends import cpu_count
from artifactnet_jax.console.progress import progress
from artifactnet_jax.data.decoded import AudioCache, read_array
from artifactnet_jax.data.manifest import (
    LABELS,
    Row,
    check_output,
    read_other,
    write_manifest,
)
from artifactnet_jax.data.teachers import SAMPLE_RATE, Teacher, open_teacher
from artifactnet_jax.files import claim, make_folder, whole_file, writing
from artifactnet_jax.recording import AudioError
from artifactnet_jax.results import Failure
from artifactnet_jax.text import OK, SOME_FAILED, CommandError, brief, printable

SCHEMA = "artifactnet-jax/residuals/1"


@dataclasses.dataclass(frozen=True)
class Track:
    """Figures of one track; energies, of mono and residual, are sums of squares."""

    key: str
    samples: int
    energy: float
    residual_energy: float


class _Stopped(Exception):
    """The command is ending: leave off."""


def run(args: argparse.Namespace) -> int:
    """Compute what is missing and write the manifest; returns the exit code."""
    manifest = os.path.join(args.out, "manifest.csv")
    rows = read_other(args.data, manifest)
    folder = os.path.join(args.out, "residuals")
    make_folder(folder, "--out")
    check_output(manifest)
    teacher = open_teacher(args.teacher, args.teacher_weights)
    if teacher.note:
        print(teacher.note, file=sys.stderr)
    whose = {"schema": SCHEMA, "teacher": teacher.name, "digest": teacher.digest}
    claim(
        os.path.join(args.out, "teacher.json"),
        whose | {"note": teacher.note},
        lambda facts: {name: facts[name] for name in ("teacher", "digest")},
    )
    cache = AudioCache(args.cache)
    journal = os.path.join(args.out, "tracks.jsonl")
    kept = _kept(rows, cache, journal, folder)
    todo = [k for k in range(len(rows)) if k not in kept]
    if kept and not args.quiet:
        print(f"resume: {len(kept)} done, {len(todo)} to do", file=sys.stderr)

    done = dict(kept)
    failed = 0
    started = time.monotonic()
    try:
        with (
            _appending(journal) as file,
            progress(args.quiet, args.out, len(todo)) as tell,
            contextlib.closing(_tracks(rows, todo, cache, teacher, folder)) as results,
        ):
            for k, result in results:
                if isinstance(result, Failure):
                    failed += 1
                    if args.quiet:
                        print(result.message, file=sys.stderr)
                else:
                    done[k] = result
                    _append(file, result)
                tell(result)
    except BaseException:
        # Of a full disk, perhaps: what ends this counts.
        with contextlib.suppress(CommandError):
            _write(manifest, rows, done, folder)
        raise
    seconds = time.monotonic() - started
    if not done:
        raise CommandError(f"none of the {failed} tracks could be used", SOME_FAILED)
    _write(manifest, rows, done, folder)
    _report(rows, done, kept, failed, seconds)
    return SOME_FAILED if failed else OK


def _kept(rows: list[Row], cache: AudioCache, journal: str, folder: str) -> dict[int, Track]:
    """By row, what earlier runs have done and is still there."""
    known: dict[str, Track] = {}
    with contextlib.suppress(FileNotFoundError), open(journal, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError):  # torn by a kill
                track = Track(**json.loads(line))
                known[track.key] = track
    kept = {}
    for k, row in enumerate(rows):
        with contextlib.suppress(AudioError):  # will be told of when its turn comes
            done = known.get(cache.key(row.path))
            if done is not None and _whole(_file(folder, done.key), done.samples):
                kept[k] = done
    return kept


def _whole(path: str, samples: int) -> bool:
    array = read_array(path)
    return array is not None and array.dtype == np.float16 and array.shape == (samples,)


def _file(folder: str, key: str) -> str:
    return os.path.join(folder, f"{key}.npy")


def _tracks(
    rows: list[Row], todo: list[int], cache: AudioCache, teacher: Teacher, folder: str
) -> Generator[tuple[int, Track | Failure], None, None]:
    """Rows and what came of them, in the order of completion. Closing it ends the work."""
    jobs = cpu_count() if teacher.parallel else 1
    stop = threading.Event()
    with ThreadPoolExecutor(jobs, "artifactnet-residuals") as pool:
        try:
            tasks = {
                pool.submit(_track, rows[k].path, cache, teacher, folder, stop): k for k in todo
            }
            for task in as_completed(tasks):
                yield tasks[task], task.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _track(
    path: str, cache: AudioCache, teacher: Teacher, folder: str, stop: threading.Event
) -> Track | Failure:
    """Compute and store one residual. CommandError: the disk takes no more."""
    try:
        audio = cache.get(path)
        key = cache.key(path)
        energy = residual_energy = 0.0
        place = 0
        residual = _file(folder, key)
        with writing(residual), whole_file(residual) as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (len(audio),)}
            np.lib.format.write_array_header_1_0(file, header)
            for block in teacher.residual(audio):
                if stop.is_set():
                    raise _Stopped
                if not np.isfinite(block).all():
                    raise ValueError("the teacher's residual is not finite: check its weights")
                mono = audio[place : place + len(block)].mean(axis=1) / 32768
                place += len(block)
                energy += float(np.sum(np.square(mono)))
                residual_energy += float(np.sum(np.square(block, dtype=np.float64)))
                file.write(block.astype("<f2").tobytes())
    except AudioError as error:
        return Failure(path, error.kind, str(error))
    except (CommandError, _Stopped):
        raise
    except Exception as error:  # a teacher's own: the other tracks do not depend on it
        return Failure(path, "internal", f"{printable(path)}: {brief(error)}")
    return Track(key, len(audio), energy, residual_energy)


@contextlib.contextmanager
def _appending(path: str) -> Iterator[IO[bytes]]:
    with writing(path):
        file = open(path, "ab+")  # noqa: SIM115
    with file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # torn by a kill
                file.write(b"\n")
        yield file


def _append(file: IO[bytes], track: Track) -> None:
    with writing(str(file.name)):
        file.write(json.dumps(dataclasses.asdict(track)).encode() + b"\n")
        file.flush()


def _write(path: str, rows: list[Row], done: dict[int, Track], folder: str) -> None:
    """The manifest of the rows that are done; nothing while none is."""
    if done:
        written = [
            dataclasses.replace(rows[k], residual=_file(folder, done[k].key)) for k in sorted(done)
        ]
        write_manifest(path, written)


def _report(
    rows: list[Row], done: dict[int, Track], kept: dict[int, Track], failed: int, seconds: float
) -> None:
    """Two lines on stdout."""
    new = [track for k, track in done.items() if k not in kept]
    computed = sum(track.samples for track in new) / SAMPLE_RATE
    hours = sum(track.samples for track in done.values()) / SAMPLE_RATE / 3600
    counts = f"{len(new)} done, {len(kept)} kept, {failed} failed"
    speed = f", {computed / max(seconds, 1e-9):.3g} x real time" if new else ""
    print(f"tracks: {counts}; {hours:.2f} h of audio{speed}")
    parts = [f"all {_fraction(done.values())}"]
    for label, name in enumerate(LABELS):
        of_label = [track for k, track in done.items() if rows[k].label == label]
        parts += [f"{name} {_fraction(of_label)}"] if of_label else []
    print("residual energy, mean over tracks: " + ", ".join(parts))


def _fraction(tracks: Iterable[Track]) -> str:
    fractions = [track.residual_energy / track.energy for track in tracks if track.energy > 0]
    return f"{100 * float(np.mean(fractions)):.3g} %" if fractions else "-"
