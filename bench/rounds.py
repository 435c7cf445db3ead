"""Rounds in which the candidates take turns, and their statistics."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """{"n", "p50", "p90", "p99", "min", "max"}, interpolated linearly between order statistics."""
    p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
    spread = {"min": float(min(values)), "max": float(max(values))}
    return {"n": len(values), "p50": p50, "p90": p90, "p99": p99, **spread}


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """How many times `fast` is faster, round by round: {"median", "min", "max", "rounds"}."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return {
        "median": statistics.median(each),
        "min": min(each),
        "max": max(each),
        "rounds": each,
    }


class Reading(NamedTuple):
    """Clocks at one moment."""

    wall_s: float
    cpu_s: float  # of this process, all threads
    joules: float | None


def wall_clock() -> Reading:
    """Wall time alone."""
    return Reading(time.perf_counter(), 0.0, None)


def interleaved(
    actions: Mapping[str, Callable[[], Any]],
    rounds: int,
    now: Callable[[], Reading],
    tell: Callable[[str], None],
) -> dict[str, list[tuple[Reading, Any]]]:
    """Run each action once a round: name -> (what it took, what it returned), round by round.

    Each round begins with another action, so that none always follows the same one.
    """
    done: dict[str, list[tuple[Reading, Any]]] = {name: [] for name in actions}
    names = list(actions)
    for k in range(rounds):
        tell(f"round {k + 1} of {rounds}")
        first = k % max(1, len(names))
        for name in names[first:] + names[:first]:
            before = now()
            returned = actions[name]()
            after = now()
            joules = None
            if before.joules is not None and after.joules is not None:
                joules = after.joules - before.joules
            taken = Reading(after.wall_s - before.wall_s, after.cpu_s - before.cpu_s, joules)
            done[name].append((taken, returned))
    return done


def medians(actions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each action, which take turns; a first run of each does not count."""
    for action in actions.values():
        action()

    done = interleaved(actions, rounds, wall_clock, lambda text: None)
    return {name: statistics.median(t.wall_s for t, _ in runs) for name, runs in done.items()}
