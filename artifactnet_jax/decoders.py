"""The bank of decoders: their lines, what real music reaches against them, and the match.

A track's residual is compared with the lines of each decoder at every speed from 0.9 to 1.1: on the
log-frequency axis a change of speed is a shift, and one FFT gives all of them. The inner products
of the four residuals are weighted (Fisher, no weight below 0) and become a standard score against
real music of the same band and length. Its p-value is the share of real tracks beyond it: by count
up to the 90 % point of the real ones, and by a generalised Pareto distribution fitted to their
excesses above it. The bank is asked as a whole: p is multiplied by the number of its decoders. So
p < 1e-3 is to be the lot of one real track in a thousand, whichever decoder is named.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np

from artifactnet_jax import fingerprint as fp
from artifactnet_jax.files import replace_file
from artifactnet_jax.text import printable

FORMAT = "artifactnet-jax/decoders/1"
DEFAULT = "decoders.npz"
CLASSES = (7_000.0, 10_500.0, 13_000.0, 15_000.0, 16_000.0)  # Hz; upper ends of what is compared
LENGTHS = (20, 64, 216)  # frames; a length class begins: about 4, 12 and 40 s
SPEEDS = (0.9, 1.1)
FOUND = 1e-3  # p of a match
TONAL = 0.1  # share of the band beside strong tones, above which nothing is said
OWN = 5e-3  # p of a match's lines where steady tones and pulses are taken out of both
UNSURE = 0.75  # a decoder of another name with so much of the best score cannot be told apart
SPEED_SHARE = 0.1  # of p, that all speeds but 1 have together
STEP_DB = 0.25  # of the reference tracks

LAGS = np.arange(
    round(math.log(SPEEDS[0]) / fp.GRID_STEP), round(math.log(SPEEDS[1]) / fp.GRID_STEP) + 1
)
ORIGINAL = np.abs(LAGS) <= 1  # speed 1, to 0.015 %
_FFT = 12_288
assert max(LAGS.max(), -LAGS.min()) + fp.GRID <= _FFT
BINS = slice(
    math.ceil(fp.GRID_HZ / fp.BIN_HZ) - fp.FIRST - 1,
    math.ceil(fp.GRID_AXIS[-1] / fp.BIN_HZ) - fp.FIRST + 1,
)


class BankError(Exception):
    """A bank cannot be used; the message names the file, the cause and the cure."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What is known of a template."""

    name: str  # what a match is called; several decoders may share it
    systems: tuple[str, ...]
    tracks: int
    repositories: tuple[str, ...]
    dates: tuple[str, ...]  # years of the tracks, where known
    band_hz: tuple[float, float]  # that most members have
    stability: float  # share of the tracks found by the other repositories' (or half's) template
    note: str = ""
    without: tuple[str, ...] = ()  # in `Bank.left_out`: SHA-256 of the tracks that were left out


@dataclasses.dataclass(frozen=True)
class WindowMatch:
    """The named decoder in one stretch of a track."""

    start_s: float
    end_s: float
    z: float
    p: float


@dataclasses.dataclass(frozen=True)
class Match:
    """A decoder whose lines the track carries, as far as real music tells."""

    name: str
    z: float  # standard score against real music
    p: float  # chance of a real track to match any decoder of the bank so well
    speed: float  # of the track; 1.04: played 4 % faster than the decoder made it
    band_hz: tuple[float, float]  # what was compared
    windows: tuple[WindowMatch, ...]
    rivals: tuple[str, ...] = ()  # names that cannot be told from it
    decoder: int = 0  # index in the bank


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A match, or why there is none; `nearest` is the best decoder even where p is above 1e-3."""

    match: Match | None
    reason: str | None
    nearest: Match | None


@dataclasses.dataclass(frozen=True, eq=False)
class Bank:
    """Decoders with their templates and nulls; see `decoder_null.fit` for the arrays."""

    decoders: tuple[Decoder, ...]
    lines: np.ndarray  # float32 [K, 2, bins of BINS]: fine and wide
    nulls: Mapping[str, np.ndarray]
    reference: np.ndarray  # int8 [n, 2, bins]: real music above the wide median, in `STEP_DB`
    ends: np.ndarray  # [n]: where their bands end, Hz
    digest: str = ""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # The same decoders, each several times, learnt without a part of their tracks: for tests.
    left_out: Bank | None = None

    def only(self, keep: Sequence[int]) -> Bank:
        """The bank with some of its decoders."""
        rows = list(keep)
        decoders = tuple(self.decoders[k] for k in rows)
        nulls = {name: array[rows] for name, array in self.nulls.items()}
        lines, parts = self.lines[rows], self.left_out
        if parts is not None:
            names = {decoder.name for decoder in decoders}
            own = [k for k, decoder in enumerate(parts.decoders) if decoder.name in names]
            parts = parts.only(own) if own else None
        return dataclasses.replace(
            self, decoders=decoders, lines=lines, nulls=nulls, digest="", left_out=parts
        )

    @functools.cached_property
    def grid(self) -> np.ndarray:
        """float32 [K, 2, GRID]: templates on the log axis."""
        return template_grid(self.lines)

    @functools.cached_property
    def transforms(self) -> np.ndarray:
        """complex64 [classes, K, 2, F]: conjugate transforms, of length 1 in the band."""
        return np.stack([transform(self.grid, high) for high in CLASSES])


def join(*banks: Bank) -> Bank:
    """All decoders of several banks, as one bank.

    A bank that is there twice counts once. The reference tracks are those of the first bank that
    has some. ValueError: no bank.
    """
    known = tuple({bank.digest or str(id(bank)): bank for bank in banks}.values())
    if not known:
        raise ValueError("no bank to join")
    if len(known) == 1:
        return known[0]
    first = next((bank for bank in known if len(bank.ends)), known[0])
    parts = [bank.left_out for bank in known if bank.left_out is not None]
    return Bank(
        tuple(decoder for bank in known for decoder in bank.decoders),
        np.concatenate([bank.lines for bank in known]),
        {key: np.concatenate([bank.nulls[key] for bank in known]) for key in _NULLS},
        *(first.reference, first.ends),
        hashlib.sha256(" ".join(bank.digest for bank in known).encode()).hexdigest(),
        {"joined": [bank.digest for bank in known]},
        join(*parts) if parts else None,
    )


def template_grid(lines: np.ndarray) -> np.ndarray:
    """Templates [K, 2, bins of BINS] -> float32 [K, 2, GRID]."""
    full = np.zeros((len(lines) * 2, fp.LAST - fp.FIRST), np.float32)
    full[:, BINS] = lines.reshape(len(full), -1)
    return fp.on_grid(full).reshape(-1, 2, fp.GRID)


def transform(grid: np.ndarray, high: float) -> np.ndarray:
    """Conjugate transforms of templates; their whole length counts, that in the band is 1."""
    return np.conj(np.fft.rfft(unit(grid, high), _FFT))


def unit(template: np.ndarray, high: float) -> np.ndarray:
    """Templates [..., GRID], whole, of length 1 in the band."""
    inside = (fp.LOW_HZ <= fp.GRID_AXIS) & (high > fp.GRID_AXIS)
    size = np.sqrt(np.square(template[..., inside]).sum(-1, keepdims=True))
    return np.asarray(template / (size + np.float32(1e-9)))


def track_transform(grid: np.ndarray, high: float) -> np.ndarray:
    """Residuals [..., 4, GRID] -> transforms complex64 [..., 4, _FFT / 2 + 1] in a band."""
    return np.fft.rfft(fp.in_band(grid, fp.LOW_HZ, high), _FFT)


def products(track: np.ndarray, template: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted inner products at all speeds [..., lags] of tracks [..., 4, F], template [2, F]."""
    fine = weights[0] * track[..., 0, :] + weights[1] * track[..., 1, :]
    wide = weights[2] * track[..., 2, :] + weights[3] * track[..., 3, :]
    # The track's line lies at speed times the template's: a positive lag is a higher pitch.
    moved = np.fft.irfft(fine * template[0] + wide * template[1], _FFT)
    return np.asarray(moved[..., LAGS])


def lag0(grid: np.ndarray, template: np.ndarray, high: float) -> np.ndarray:
    """Inner products [..., 4] at speed 1 of residuals [..., 4, GRID], template [2, GRID]."""
    rows = unit(template, high).repeat(2, axis=0)
    return np.asarray(np.einsum("...cg,cg->...c", fp.in_band(grid, fp.LOW_HZ, high), rows))


def at_speed_one(tracks: np.ndarray, template: np.ndarray) -> np.ndarray:
    """The four inner products [n, 4] at speed 1 of transforms [n, 4, F], template [2, F]: Parseval.

    `_FFT` is even: the first and the last coefficient stand for one frequency, others for two.
    """
    twice = np.full(template.shape[-1], 2 / _FFT, np.float32)
    twice[[0, -1]] = 1 / _FFT
    rows = template.repeat(2, axis=0) * twice
    return np.stack([(tracks[:, c] @ rows[c]).real for c in range(4)], axis=1)


def beyond(z: np.ndarray | float, fitted: np.ndarray) -> np.ndarray:
    """Share of real tracks beyond `z`; 1 below the threshold's share is given linearly."""
    threshold, share, scale, xi = (fitted[..., i].astype(np.float64) for i in range(4))
    excess = np.maximum(0, z - threshold) / scale
    inner = np.maximum(1e-12, 1 + xi * excess)
    curved = np.where(
        np.abs(xi) > 1e-6, inner ** (-1 / np.where(np.abs(xi) > 1e-6, xi, 1)), np.exp(-excess)
    )
    # A tail with an end has one more step beyond the data than they show: exponential from there.
    curved = np.where(xi < 0, np.maximum(curved, np.exp(-excess) * 1e-2), curved)
    return np.asarray(np.where(z > threshold, share * curved, 1.0))


def scores(
    bank: Bank, tracks: np.ndarray, i: int, j: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(z, p, speed) [n, K] of transforms [n, 4, F] in class `i`, length `j`; p of one decoder."""
    shape = (len(tracks), len(bank.lines))
    z, p, speed = np.zeros(shape), np.ones(shape), np.ones(shape)
    for k in range(len(bank.lines)):
        s = products(tracks, bank.transforms[i, k], bank.nulls["weights"][k, i, j])
        one = s[:, ORIGINAL].max(1) - bank.nulls["offset"][k, i, j]
        centre, deviation = bank.nulls["lags"][k, i, j]
        others = np.where(ORIGINAL, -np.inf, (s - centre) / deviation)
        lag, best = others.argmax(1), others.max(1)
        p_one = beyond(one, bank.nulls["tail"][k, i, j]) / (1 - SPEED_SHARE)
        p_other = beyond(best, bank.nulls["speed_tail"][k, i, j]) / SPEED_SHARE
        # Beside a line at speed 1 its neighbours are strong too: a better score is needed to move.
        moved = (p_other < p_one) & (best > 1.1 * one)
        z[:, k], p[:, k] = np.where(moved, best, one), np.where(moved, p_other, p_one)
        speed[:, k] = np.where(moved, np.exp(LAGS[lag] * fp.GRID_STEP), 1.0)
    return z, np.minimum(p, 1), speed


def length_class(frames: int) -> int | None:
    """Which of `LENGTHS`; None below."""
    fits = [j for j, least in enumerate(LENGTHS) if frames >= least]
    return fits[-1] if fits else None


def band_class(end_hz: float) -> int | None:
    """Which of `CLASSES`, for a band that ends there; None below."""
    fits = [i for i, high in enumerate(CLASSES) if end_hz >= high]
    return fits[-1] if fits else None


def named(bank: Bank, z: np.ndarray, p: np.ndarray) -> tuple[int, tuple[str, ...]]:
    """(the best decoder, other names that come near it)."""
    order = sorted(range(len(z)), key=lambda k: (p[k] * 1.0 > FOUND, -z[k]))
    best = order[0]
    name = bank.decoders[best].name
    rivals = [bank.decoders[k].name for k in order if z[k] > UNSURE * z[best]]
    return best, tuple(dict.fromkeys(r for r in rivals if r != name))


def hear(spectrum: fp.Accumulator) -> tuple[np.ndarray, int, int] | str:
    """Levels of the whole track, its classes of band and length; or why it cannot be judged."""
    total = sum(spectrum.windows, fp.Mean())
    if spectrum.frames < LENGTHS[0]:
        return f"too short: {LENGTHS[0] * fp.HOP / fp.RATE:.0f} s are needed"
    j = length_class(total.frames)
    if j is None:
        return "silent above 3.5 kHz"
    levels = total.levels()
    end = fp.band_end(levels[1])
    i = band_class(end)
    if i is None:
        return f"its band ends at {end:.0f} Hz, {CLASSES[0]:.0f} Hz are needed"
    if fp.tone_share(levels) > TONAL:
        return "steady tones of a synthesiser cover its band"
    return levels, i, j


def match(spectrum: fp.Accumulator | None, bank: Bank | None) -> Outcome:
    """Which decoder's lines the audio carries, if any; no spectrum: of audio at another rate."""
    if bank is None:
        return Outcome(None, "no bank was asked", None)
    if spectrum is None:
        text = f"the weights do not read audio at {fp.RATE} Hz, which a bank needs"
        return Outcome(None, text, None)
    heard = hear(spectrum)
    if isinstance(heard, str):
        return Outcome(None, heard, None)
    levels, i, j = heard
    step = spectrum.window_frames * fp.HOP / fp.RATE
    parts = [
        (n * step, length, mean)
        for n, mean in enumerate(spectrum.windows)
        if (length := length_class(mean.frames)) is not None
    ]
    residuals = fp.residuals_of([levels, *(mean.levels() for _, _, mean in parts)])
    grid = fp.on_grid(residuals[0])
    z, p, speed = (rows[0] for rows in scores(bank, track_transform(grid[None], CLASSES[i]), i, j))
    best, rivals = named(bank, z, p)
    shift = round(math.log(speed[best]) / fp.GRID_STEP)
    windows = [
        _window(bank, best, i, length, shift, rows, start, start + step)
        for (start, length, _), rows in zip(parts, residuals[1:], strict=True)
    ]
    found = Match(
        bank.decoders[best].name,
        round(float(z[best]), 3),
        float(min(1.0, p[best] * len(bank.decoders))),
        round(float(speed[best]), 4),
        (fp.LOW_HZ, CLASSES[i]),
        tuple(windows),
        rivals,
        best,
    )
    if found.p < FOUND:
        rows = fp.in_band(grid, fp.LOW_HZ, CLASSES[i])
        own, spacing = own_lines(bank, best, i, j, rows, shift)
        if own < OWN:
            return Outcome(found, None, found)
        return Outcome(None, f"its lines are those of a steady tone of {spacing:.1f} Hz", found)
    return Outcome(None, "like real music: no decoder of the bank", found)


def own_lines(
    bank: Bank, k: int, i: int, j: int, rows: np.ndarray, shift: int
) -> tuple[float, float]:
    """Whether more than a comb agrees with decoder `k`: p without combs, and the comb's spacing.

    A tone or a pulse that sounds all through the track has lines at its multiples, and a decoder's
    comb may lie there too. But a decoder's lines have heights of their own, and these are compared:
    what combs may have laid is taken out of the track and of the decoder's lines. `rows` [4, GRID]
    are residuals in the band, at a speed that shifts the lines by `shift` steps.
    """
    moved = np.roll(unit(bank.grid[k], CLASSES[i]), shift, axis=-1)
    basis, spacings = fp.combs(rows)
    z = agreement(rows, moved, basis) @ bank.nulls["weights"][k, i, j]
    z -= bank.nulls["offset"][k, i, j]
    return float(beyond(float(z), bank.nulls["tail"][k, i, j])), spacings[0]


def agreement(rows: np.ndarray, template: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Inner products [4] of residuals [4, GRID] in a band with a template [2, GRID], less combs."""
    inside = (rows != 0).any(axis=0)
    lines = fp.without(template.repeat(2, axis=0) * inside, basis)
    return np.asarray(np.einsum("cg,cg->c", fp.without(rows, basis), lines))


def _window(
    bank: Bank, k: int, i: int, j: int, shift: int, rows: np.ndarray, start: float, end: float
) -> WindowMatch:
    """One decoder at one speed in a stretch of the track; p is of that decoder alone."""
    grid = fp.in_band(fp.on_grid(rows), fp.LOW_HZ, CLASSES[i])
    moved = np.roll(unit(bank.grid[k], CLASSES[i]), shift, axis=-1)
    s = np.einsum("cg,cg->c", grid, moved.repeat(2, axis=0))
    z = float(s @ bank.nulls["weights"][k, i, j] - bank.nulls["offset"][k, i, j])
    p = float(beyond(z, bank.nulls["tail"][k, i, j]))
    return WindowMatch(round(start, 2), round(end, 2), round(z, 3), p)


_LEFT = "left_out_"  # begins the names of their arrays
_NULLS = {"weights": 4, "offset": 0, "lags": 2, "tail": 4, "speed_tail": 4}  # values each


def _digest(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the header, less its digest, and the arrays as stored."""
    known = {key: value for key, value in header.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def save(bank: Bank, path: str | os.PathLike[str]) -> str:
    """Write a bank, whole or not at all; its digest. Lines are rounded to 8 bits."""
    arrays: dict[str, np.ndarray] = {
        "reference": bank.reference.astype(np.int8),
        "ends": bank.ends.astype(np.float32),
        **_entries(bank, ""),
    }
    header: dict[str, Any] = {
        "format": FORMAT,
        "decoders": [dataclasses.asdict(decoder) for decoder in bank.decoders],
        "provenance": dict(bank.provenance),
    }
    if bank.left_out is not None:
        arrays |= _entries(bank.left_out, _LEFT)
        header["left_out"] = [dataclasses.asdict(part) for part in bank.left_out.decoders]
    header["digest"] = _digest(header, arrays)
    members: dict[str, Any] = dict(arrays)
    members["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    data = io.BytesIO()
    np.savez_compressed(data, **members)
    replace_file(path, data.getvalue())
    return str(header["digest"])


def _entries(bank: Bank, prefix: str) -> dict[str, np.ndarray]:
    """Lines and nulls as they are stored."""
    scale = np.abs(bank.lines).max(axis=2) / 127 + 1e-9
    return {
        f"{prefix}lines": np.rint(bank.lines / scale[..., None]).astype(np.int8),
        f"{prefix}scale": scale.astype(np.float32),
        **{f"{prefix}{name}": bank.nulls[name].astype(np.float32) for name in _NULLS},
    }


def load(path: str | os.PathLike[str] | None = None) -> Bank:
    """Read a bank, the embedded one by default. BankError: it cannot be used, in one line."""
    if path is None:
        data = resources.files("artifactnet_jax").joinpath("assets", DEFAULT).read_bytes()
        return _read(data, DEFAULT)
    name = printable(os.fsdecode(path))
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BankError(f"{name}: {error.strerror or error}: check the path") from None
    return _read(data, name)


def _read(data: bytes, name: str) -> Bank:
    again = "download it again, or learn it anew"
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        header = json.loads(arrays.pop("header").tobytes())
        form = header["format"]
    except Exception as error:  # zip, zlib, NumPy's header parser and JSON each raise their own
        detail = printable(str(error) or type(error).__name__)
        raise BankError(f"{name}: not a bank of decoders ({detail}): {again}") from None
    if form != FORMAT:
        text = f"a bank of format {printable(str(form))}, this version reads {FORMAT}"
        raise BankError(f"{name}: {text}: learn it anew")
    try:
        if header["digest"] != _digest(header, arrays):
            raise BankError(f"{name}: damaged, its digest does not agree: {again}")
        _check_shared(arrays)
        bank = _part(header["decoders"], arrays, "", header)
        if "left_out" in header:
            left_out = _part(header["left_out"], arrays, _LEFT, header)
            bank = dataclasses.replace(bank, left_out=dataclasses.replace(left_out, digest=""))
    except (KeyError, TypeError, ValueError) as error:
        raise BankError(f"{name}: damaged ({printable(str(error))}): {again}") from None
    return bank


def _part(
    entries: list[dict[str, Any]], arrays: Mapping[str, np.ndarray], prefix: str, header: Any
) -> Bank:
    """A bank of the decoders whose arrays begin with `prefix`. ValueError, KeyError: damaged."""
    decoders = tuple(
        Decoder(**cast(Any, {k: tuple(v) if isinstance(v, list) else v for k, v in e.items()}))
        for e in entries
    )
    own = {name: arrays[prefix + name] for name in ("lines", "scale", *_NULLS)}
    _check(own, len(decoders))
    return Bank(
        decoders,
        own["lines"].astype(np.float32) * own["scale"][..., None],
        {key: own[key] for key in _NULLS},
        *(arrays["reference"], arrays["ends"]),
        *(header["digest"], header["provenance"]),
    )


def _check_shared(arrays: Mapping[str, np.ndarray]) -> None:
    """ValueError unless what all decoders share has its shape, and is finite."""
    ends = arrays["ends"]
    _check_shapes(
        arrays,
        {
            "reference": (len(ends), 2, fp.LAST - fp.FIRST),
            "ends": (len(ends),),
        },
    )


def _check(arrays: Mapping[str, np.ndarray], count: int) -> None:
    """ValueError unless the arrays have the shapes of `count` decoders, and are finite."""
    cells = (count, len(CLASSES), len(LENGTHS))
    if not count:
        raise ValueError("no decoder")
    _check_shapes(
        arrays,
        {
            "lines": (count, 2, BINS.stop - BINS.start),
            "scale": (count, 2),
            **{name: (*cells, size) if size else cells for name, size in _NULLS.items()},
        },
    )


def _check_shapes(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, not {shape}")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} holds a value that is not finite")
