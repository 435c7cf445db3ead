"""Samples in memory as a recording: which arrays are taken, and how they are scaled."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np

from artifactnet_jax.recording import Blocks, Decoded, Flaws, block_frames, to_float

LOUD = 2.0  # times full scale; decoders overshoot so far, and no music is louder

Array = tuple[Any, Any]  # samples [n] or [n, channels], sample rate in Hz


def count_of(value: Any) -> int:
    """A whole number of any library as an int; 0 where it is none, or a truth value."""
    try:
        return 0 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        return 0


def checked(samples: Any, rate: Any) -> tuple[np.ndarray, int]:
    """Samples [n] or [n, channels] and a rate in Hz, as NumPy and int, whatever library has them.

    Raises TypeError or ValueError where they are none.
    """
    if isinstance(samples, (bytes, bytearray, memoryview, str)):
        cure = "numpy.frombuffer(samples, '<i2') makes 16-bit samples of bytes"
        raise TypeError(f"samples are {type(samples).__name__}: {cure}")
    if not isinstance(samples, np.ndarray):
        try:
            samples = np.asarray(samples)
        except Exception as error:  # whatever the library raises: on a GPU, with a gradient, ...
            cause = f"samples of type {type(samples).__name__} are no array"
            raise TypeError(f"{cause} ({error}): pass a NumPy array") from error
    kind = samples.dtype
    if kind.kind != "f" and (kind.kind, kind.itemsize) not in (("u", 1), ("i", 2), ("i", 4)):
        raise TypeError(f"samples are {kind}: use float, int16, int32 or uint8")
    if samples.ndim not in (1, 2):
        raise ValueError(f"samples have shape {samples.shape}: use [n] or [n, channels]")
    try:
        whole = operator.index(rate) if not isinstance(rate, (float, np.floating)) else int(rate)
    except (TypeError, ValueError, OverflowError):
        whole = -1
    if isinstance(rate, (bool, np.bool_)) or whole != rate:
        raise TypeError(f"sample rate is {rate!r}: use a whole number of Hz")
    return samples, whole


def decode(samples: np.ndarray, rate: int) -> Decoded:
    """Samples [n] or [n, channels] in memory, in blocks.

    int32 whose values all fit into 16 or 24 bits is taken as samples of so many bits. Floats that
    reach beyond LOUD are multiplied by the power of two that brings them within full scale: those
    in units of 16 bits become what int16 would be. `Flaws.gain` says so.
    """
    samples = samples[:, None] if samples.ndim == 1 else samples
    size = block_frames(rate, max(1, samples.shape[1]))

    def pieces() -> Iterator[np.ndarray]:
        return (samples[i : i + size] for i in range(0, len(samples), size))

    gain = 1.0
    if samples.dtype.kind == "f" or samples.dtype.itemsize == 4:
        peak = max((_peak(piece) for piece in pieces() if piece.size), default=0.0)
        gain = _gain(peak, samples.dtype.kind == "f")

    def blocks() -> Blocks:
        for piece in pieces():
            yield to_float(piece) if gain == 1 else to_float(piece.astype(np.float64) * gain)

    relative = gain * 2.0**31 if samples.dtype.kind == "i" and gain != 1 else gain
    return Decoded(rate, samples.shape[1], blocks(), len(samples), flaws=Flaws(gain=relative))


def _peak(samples: np.ndarray) -> float:
    """The largest magnitude; NaN and infinity, which are refused elsewhere, do not count."""
    if samples.dtype.kind == "i":
        return max(abs(int(samples.max())), abs(int(samples.min())))
    finite = samples[np.isfinite(samples)]
    return float(np.abs(finite).max()) if finite.size else 0.0


def _gain(peak: float, floating: bool) -> float:
    if floating:
        sane = LOUD < peak < 2.0**127  # beyond float32 it is refused
        return 2.0 ** -math.ceil(math.log2(peak)) if sane else 1.0
    if 1 < peak <= 2**15:
        return 2.0**-15
    return 2.0**-23 if 1 < peak <= 2**23 else 1.0
