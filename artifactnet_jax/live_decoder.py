"""Whose decoder's lines a stream carries, as `live` tells while it runs."""

from __future__ import annotations

import copy
import threading
from collections import deque
from typing import Any

import numpy as np

from artifactnet_jax.decoders import Bank, Outcome, match
from artifactnet_jax.fingerprint import RATE, Accumulator
from artifactnet_jax.results import decoder_row

STEP_S = 20.0  # of audio from one match to the next
WAITING = 4  # matches that the caller may be late by; then the oldest is left out


class Watch:
    """The fine spectrum of a stream since its beginning, matched every `STEP_S`.

    `add` runs in the thread that reads, the rest in another. What `row` gives depends on the
    samples alone, not on who is how fast. rate: of the samples, in Hz. Memory does not grow.
    """

    def __init__(self, bank: Bank | None, rate: int) -> None:
        self._bank, self._lock = bank, threading.Lock()
        self._spectrum = Accumulator() if bank is not None and rate == RATE else None
        self._step = round(STEP_S * rate)
        self._due: deque[Accumulator] = deque(maxlen=WAITING)

    def add(self, block: np.ndarray) -> None:
        """Count samples [n] in."""
        spectrum = self._spectrum
        while spectrum is not None and len(block):
            with self._lock:
                part = block[: self._step - spectrum.samples % self._step]
                block = block[len(part) :]
                spectrum.add(part)
                if spectrum.samples % self._step == 0:
                    self._due.append(copy.deepcopy(spectrum))

    def row(self, position: int) -> dict[str, Any]:
        """What the row of a window adds that ends at `position`; nothing where nothing was due."""
        newest = None
        while self._due and self._due[0].samples <= position:
            newest = self._due.popleft()
        if newest is None:
            return {}
        found = _said(match(newest, self._bank))
        if found["decoder"]:
            del found["decoder"]["windows"]  # they come with the summary
        return found

    def summary(self) -> dict[str, Any]:
        """What the summary says, of the whole stream."""
        with self._lock:
            return _said(match(self._spectrum, self._bank))


def _said(outcome: Outcome) -> dict[str, Any]:
    found = outcome.match
    return {
        "decoder": None if found is None else decoder_row(found),
        "decoder_reason": outcome.reason,
    }
