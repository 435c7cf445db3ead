"""What a detector is to a benchmark: a small adapter, and the check of what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import soxr

from artifactnet_jax.config import FrontEnd
from artifactnet_jax.text import brief, printable

RATE = FrontEnd.sample_rate  # Hz; what every track is decoded to


@dataclasses.dataclass(frozen=True)
class Scored:
    """A detector's score of one track."""

    score: float  # P(AI) in [0, 1]
    segments: tuple[float | None, ...] = ()  # of its parts, where it has them
    tier: int | None = None  # of a tiered detector: 1 or 2
    verdict: str | None = None  # in the detector's own words, where it has any


class DetectorError(Exception):
    """A track cannot be scored; `kind` is for machines. The others are none the worse."""

    def __init__(self, kind: str, message: str, segments: tuple[float | None, ...] = ()):
        super().__init__(message)
        self.kind, self.segments = kind, segments


class Adapter:
    """A detector. One of yours needs `score`, and where known `name`, `params` and so on.

    `load` is called once, before anything else. `score` takes mono float32 [n] in [-1, 1] at
    `input_rate` Hz and gives P(AI) (or a `Scored`); it raises what it likes. `batch` does the same
    for several tracks at once, of any lengths.
    """

    name = ""
    params: int | None = None  # trained parameters
    gflops: float | None = None  # for 4 s of audio; 1e9 operations, a multiply-add is two
    threshold = 0.5  # at or above it calls a track AI by itself
    input_rate = RATE  # Hz
    identity = ""  # of the weights and settings: other scores, another identity

    def load(self, device: str) -> None:
        """Make ready, on "auto", "cpu" or "cuda". CommandError: what it needs is not there."""

    def score(self, audio: np.ndarray) -> float | Scored:
        """P(AI) of one track."""
        raise NotImplementedError

    def batch(self, audio: Sequence[np.ndarray]) -> list[float | Scored | DetectorError]:
        """Scores of several tracks; a DetectorError in place of a score fails that track."""
        return [_caught(self.score, one) for one in audio]


def _caught(
    score: Callable[[np.ndarray], float | Scored], audio: np.ndarray
) -> float | Scored | DetectorError:
    try:
        return score(audio)
    except DetectorError as error:
        return error
    except Exception as error:  # somebody's code: its failure is the track's
        return DetectorError("detector", brief(error))


def at_rate(audio: np.ndarray, rate: int) -> np.ndarray:
    """Mono float32 at 44.1 kHz -> the same at `rate` (soxr HQ, in [-1, 1])."""
    return audio if rate == RATE else np.clip(soxr.resample(audio, RATE, rate, "HQ"), -1, 1)


def run_batch(detector: Adapter, audio: Sequence[np.ndarray]) -> list[Scored | DetectorError]:
    """A detector's scores of tracks at 44.1 kHz, each checked: finite and in [0, 1]."""
    heard = [at_rate(one, detector.input_rate) for one in audio]
    try:
        results = list(detector.batch(heard))
    except Exception:  # of a foreign `batch`: whose track it is shows one by one
        results = [_caught(detector.score, one) for one in heard]
    if len(results) != len(audio):
        cause = f"{detector.name} gave {len(results)} scores for {len(audio)} tracks"
        return [DetectorError("detector", cause)] * len(audio)
    return [_checked(result) for result in results]


def _checked(result: Any) -> Scored | DetectorError:
    if isinstance(result, DetectorError):
        return result
    scored = result if isinstance(result, Scored) else None
    try:
        value = float(result if scored is None else scored.score)
    except (TypeError, ValueError):
        return DetectorError("score", f"{printable(repr(result))[:80]} is no score")
    if not 0 <= value <= 1:  # NaN compares false
        cause = f"its score {value} is not a number in [0, 1]"
        return DetectorError("score", cause, () if scored is None else scored.segments)
    return Scored(value) if scored is None else dataclasses.replace(scored, score=value)
