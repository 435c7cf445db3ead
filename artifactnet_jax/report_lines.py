"""What `report` shows of decoders: a track's fine spectrum, a decoder's lines, and real music."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from artifactnet_jax import decoders as dc
from artifactnet_jax import fingerprint as fp
from artifactnet_jax.decoder_learning import reference
from artifactnet_jax.results import decoder_row, sentence


def view(spectrum: fp.Accumulator | None, bank: dc.Bank) -> dict[str, Any]:
    """What there is to show of the named decoder, or of the nearest one, as JSON has it.

    `sentence` or `reason`, and `match` or `nearest`. Where there is one of these: `hz`, and `track`
    and `lines` at these, in units of their own deviation; `real_z`, what real tracks of the bank
    reach against the same lines, and `threshold_z`, from which on a decoder is named.
    """
    outcome = dc.match(spectrum, bank)
    found = outcome.match
    out: dict[str, Any] = {
        "sentence": None if found is None else sentence(found),
        "reason": outcome.reason,
        "match": None if found is None else decoder_row(found),
    }
    best = outcome.nearest
    heard = "" if spectrum is None else dc.hear(spectrum)
    if best is None or isinstance(heard, str):
        return out
    levels, i, j = heard
    if found is None:
        out["nearest"] = {"name": best.name, "z": best.z, "p": best.p, "speed": best.speed}
    fine = bank.nulls["weights"][best.decoder, i, j].reshape(2, 2).sum(axis=1)
    kind = int(fine[1] > fine[0])
    inside = (fp.HZ >= fp.LOW_HZ) & (dc.CLASSES[i] > fp.HZ)
    hz = fp.HZ[inside]
    track = fp.residuals(levels).reshape(2, 2, -1)[kind].mean(axis=0)[inside]
    # A line of the decoder lies at speed times its place.
    lines = np.interp(hz, fp.HZ[dc.BINS] * best.speed, bank.lines[best.decoder, kind])
    return out | {
        "kind": ("fine", "wide")[kind],
        "hz": {"first": float(hz[0]), "step": fp.BIN_HZ},
        "track": [round(float(v), 2) for v in _in_deviations(track)],
        "lines": [round(float(v), 2) for v in _in_deviations(lines)],
        "real_z": [round(float(v), 2) for v in _real(bank, best, i, j)],
        "threshold_z": _threshold(bank, best, i, j),
    }


def _in_deviations(row: np.ndarray) -> np.ndarray:
    row = row - row.mean()
    return np.asarray(row / (np.sqrt(np.square(row).mean()) + 1e-9))


def _real(bank: dc.Bank, best: dc.Match, i: int, j: int) -> np.ndarray:
    """Standard scores of the bank's real tracks against one decoder, at speed 1 or at others."""
    transforms = _transforms(bank, i)
    nulls = {name: array[best.decoder, i, j] for name, array in bank.nulls.items()}
    if not len(transforms):
        return np.zeros(0)
    conjugate = bank.transforms[i, best.decoder]
    s = np.concatenate(
        [
            dc.products(part, conjugate, nulls["weights"])
            for part in np.array_split(transforms, max(1, len(transforms) // 16))
        ]
    )
    if best.speed == 1:
        return np.asarray(s[:, dc.ORIGINAL].max(axis=1) - nulls["offset"])
    centre, deviation = nulls["lags"]
    return np.asarray((s[:, ~dc.ORIGINAL].max(axis=1) - centre) / deviation)


@functools.lru_cache(maxsize=8)
def _transforms(bank: dc.Bank, i: int) -> np.ndarray:
    """Of the bank's real tracks whose band reaches so far."""
    if not len(bank.ends):
        return np.zeros((0, 4, 0))
    real = reference(bank)
    _, first = np.unique(real.track, return_index=True)
    rows = first[real.end[first] >= dc.CLASSES[i]]
    return dc.track_transform(real.grid[rows], dc.CLASSES[i])


def _threshold(bank: dc.Bank, best: dc.Match, i: int, j: int) -> float:
    """The least z, to 0.05, at which p of the bank is below that of a match."""
    share = 1 - dc.SPEED_SHARE if best.speed == 1 else dc.SPEED_SHARE
    name = "tail" if best.speed == 1 else "speed_tail"
    z = np.arange(0, 100, 0.05)
    p = dc.beyond(z, bank.nulls[name][best.decoder, i, j]) / share * len(bank.decoders)
    return round(float(z[np.argmax(p < dc.FOUND)]), 2)
