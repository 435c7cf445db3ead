"""What a graph makes of the level of its audio before the spectrum, and the spectrum behind it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from artifactnet_jax.convert.original import tensors_of
from artifactnet_jax.convert.recognise import Spectrum, find_spectrum
from artifactnet_jax.convert.trace import Trace, Unmapped, scalars

_RULES: dict[str, Callable[[Any, float], Any]] = {
    "add": lambda level, eps: level + eps,
    "max": np.maximum,
    "root": lambda level, eps: np.sqrt(level**2 + eps),
}


def find_levelled_spectrum(
    trace: Trace, audio: np.ndarray, shaped: Callable[[np.ndarray], np.ndarray]
) -> list[Spectrum]:
    """`find_spectrum`, of the audio or of what the graph makes of its level. Raises Unmapped."""
    name = _levelled(trace, audio)
    if not name:
        return find_spectrum(trace, audio)
    try:
        spectra = find_spectrum(trace, trace.values[name].reshape(audio.shape))
    except Unmapped:
        return find_spectrum(trace, audio)
    level, gain = _level(trace, name, audio, shaped)
    return [
        dataclasses.replace(
            spectrum,
            values={
                **spectrum.values,
                **level,
                "spectrum_scale": spectrum.values["spectrum_scale"] * gain,
                "spectrum_eps": spectrum.values["spectrum_eps"] / gain**2,
            },
        )
        for spectrum in spectra
    ]


def _lines(x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """Gain and offset [n, 2] with which rows of y are those of x, if they are."""
    with np.errstate(all="ignore"):
        mean = x.mean(axis=1, keepdims=True), y.mean(axis=1, keepdims=True)
        centred = x - mean[0], y - mean[1]
        gain = (centred[0] * centred[1]).sum(1) / (centred[0] ** 2).sum(1)
        rest = np.abs(centred[1] - gain[:, None] * centred[0]).max(1)
        same = rest <= 1e-4 * np.abs(y).max(1)
    found = np.stack([gain, mean[1][:, 0] - gain * mean[0][:, 0]], 1)
    return found if np.all(same) and np.all(gain > 0) else None


def _levelled(trace: Trace, audio: np.ndarray) -> str:
    """The last tensor that is the audio with another gain or offset, or nothing."""
    n, samples = audio.shape
    found = ""
    for name in sorted(trace.values, key=lambda tensor: trace.order.get(tensor, -1)):
        values = trace.values[name]
        if values.size != audio.size or max(trace.shapes[name]) != samples:
            continue
        if name in trace.inputs() or not np.all(np.isfinite(values)):
            continue
        rows = values.reshape(n, samples).astype(np.float64)
        if not np.array_equal(rows, audio) and _lines(audio.astype(np.float64), rows) is not None:
            found = name
    return found


def _level(
    trace: Trace, name: str, audio: np.ndarray, shaped: Callable[[np.ndarray], np.ndarray]
) -> tuple[dict[str, Any], float]:
    """The rule by which a tensor has the level that it has, and the gain after it.

    By the probe at several levels, the quietest of which shows the epsilon, and with an offset.
    Raises Unmapped.
    """
    heard = [0.3 * audio + 0.1, *(level * audio for level in (1.0, 1e-2, 1e-4, 1e-6))]
    gains, offsets = [], []
    for one in heard:
        feed = {trace.inputs()[0]: shaped(one.astype(np.float32))}
        got = tensors_of(trace.graph, feed, [name])[name].reshape(audio.shape)
        lines = _lines(one.astype(np.float64), got.astype(np.float64))
        if lines is None:
            raise Unmapped("the level of its audio is changed by a rule that is not known")
        gains.append(lines[:, 0])
        offsets.append(lines[:, 1])
    x = np.concatenate(heard).astype(np.float64)
    gain, offset = np.concatenate(gains), np.concatenate(offsets)
    mean = x.mean(axis=1)
    centred = bool(abs(offset[0] / gain[0] + mean[0]) < 1e-3)
    x = x - mean[:, None] if centred else x
    levels = {
        "none": np.ones(len(x)),
        "peak": np.abs(x).max(axis=1),
        "rms": np.sqrt((x * x).mean(axis=1)),
    }
    best: tuple[float, dict[str, Any], float] = (np.inf, {}, 1.0)
    numbers = [0.0, *(number for number in scalars(trace) if number < 0.1)]
    for (kind, level), rule, eps in itertools.product(levels.items(), _RULES, numbers):
        divisor = _RULES[rule](level, eps) if kind != "none" else level
        ratio = gain * divisor
        factor = float(np.median(ratio))
        error = float(np.max(np.abs(ratio / factor - 1)))
        if error < 0.5 * best[0]:  # the first of equals is the plainest
            values = {"level": kind, "level_rule": rule, "level_eps": eps, "centred": centred}
            best = error, values, factor
    if best[0] > 2e-3:
        raise Unmapped("the level of its audio is changed by a rule that is not known")
    return best[1], 1.0 if abs(best[2] - 1) < 1e-4 else best[2]
