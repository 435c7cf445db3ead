"""Whole processes of `score`: what a cold start costs, and how time and memory grow."""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from artifactnet_jax.backends import BACKENDS
from artifactnet_jax.bench.candidates import backend_of, music, write_audio
from artifactnet_jax.bench.machine import child
from artifactnet_jax.bench.rounds import interleaved, ratios, wall_clock

COLD_S = 10.0  # length of the file that a cold start scores
MINUTES, LONG_MINUTES = (1, 3, 10, 30), (60, 180, 600)  # lengths of a track
FILES, LONG_FILES = (1, 10, 100), (1000, 10_000)  # numbers of files of one segment


def baseline(backend: str) -> str:
    """A program that only imports what a backend cannot do without; jax also compiles x + 1."""
    packages = BACKENDS[backend_of(backend)[0]].packages
    if "jax" in packages:
        return "import jax; jax.jit(lambda x: x + 1)(1.0).block_until_ready()"
    return f"import {', '.join(('numpy', 'soundfile', *packages))}"


def score_arguments(path: str, backend: str, weights: str | None, *more: str) -> list[str]:
    """`artifactnet-jax score` as a process of this Python."""
    name, dtype = backend_of(backend)
    given = ["--dtype", dtype, *(["--weights", weights] if weights else [])]
    return ["-m", "artifactnet_jax", "score", "-q", "--backend", name, *given, *more, path]


def cold(
    backends: Sequence[str],
    weights: str | None,
    folder: str,
    rounds: int,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """`score` on one 10 s file, the whole process, against a process that only imports.

    A first start of each is not counted: it may fill caches of compiled code.
    """
    path = write_audio(os.path.join(folder, "cold.wav"), iter([music(COLD_S, 44_100, 0)]), 44_100)
    tell("cold start")
    first = {name: child(score_arguments(path, name, weights)) for name in backends}
    rows = [{"backend": n, "error": run["error"]} for n, run in first.items() if run["code"]]
    started = [name for name, run in first.items() if not run["code"]]
    actions: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in started:
        actions[name] = functools.partial(child, score_arguments(path, name, weights))
        actions[f"{name} imports"] = functools.partial(child, ["-c", baseline(name)])
    done = interleaved(actions, rounds, wall_clock, lambda text: tell(f"cold start: {text}"))
    for name in started:
        runs, imports = ([r for _, r in done[key]] for key in (name, f"{name} imports"))
        row: dict[str, Any] = {"backend": name, "baseline": baseline(name)}
        for key in ("cpu_s", "wall_s"):
            row[key] = statistics.median(run[key] for run in runs)
            row[f"baseline_{key}"] = statistics.median(run[key] for run in imports)
            row[f"{key[:-2]}_ratio"] = ratios([r[key] for r in runs], [i[key] for i in imports])
        row["peak_bytes"] = statistics.median(run["peak_bytes"] for run in runs)
        row["first_wall_s"] = first[name]["wall_s"]
        rows.append(row)
    return rows


def scaling(
    backends: Sequence[str],
    weights: str | None,
    batch: int | None,
    long: bool,
    folder: str,
    tell: Callable[[str], None],
    minutes: Sequence[float] = MINUTES,
    files: Sequence[int] = FILES,
) -> list[dict[str, Any]]:
    """Time and memory of `score` processes over the length of a track, and over many short ones."""
    more = ["--batch-size", str(batch)] if batch else []
    rows: list[dict[str, Any]] = []

    def measure(path: str, of: dict[str, Any]) -> None:
        for name in backends:
            tell(f"{name}: " + f"{of['files']} files, {of['minutes']:g} minutes")
            found = child(score_arguments(path, name, weights, *more))
            row: dict[str, Any] = {"backend": name, **of}
            if found["code"]:
                rows.append({**row, "error": found["error"]})
                continue
            keys = ("wall_s", "cpu_s", "peak_bytes")
            rows.append({**row, **{key: found[key] for key in keys}})

    minute = music(60, 44_100, 0)[:, :1]
    for length in (*minutes, *(LONG_MINUTES if long else ())):
        whole, rest = divmod(length, 1)
        blocks = [minute] * int(whole) + ([minute[: round(rest * len(minute))]] if rest else [])
        path = write_audio(os.path.join(folder, "long.flac"), iter(blocks), 44_100)
        measure(path, {"over": "length", "minutes": length, "files": 1})
    os.unlink(path)
    short = write_audio(os.path.join(folder, "short.flac"), iter([minute[:176_400]]), 44_100)
    listed = os.path.join(folder, "files.txt")
    made: list[str] = []
    for count in (*files, *(LONG_FILES if long else ())):
        for k in range(len(made), count):
            made.append(os.path.join(folder, f"{k:05}.flac"))
            os.link(short, made[-1])
        with open(listed, "w", encoding="utf-8") as file:
            file.write("\n".join(made))
        measure(f"@{listed}", {"over": "files", "minutes": count * 4 / 60, "files": count})
    return rows
