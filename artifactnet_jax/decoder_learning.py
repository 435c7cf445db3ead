"""Learning decoders from tracks: templates, what their own tracks reach, nulls, and the test."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from artifactnet_jax import decoders as dc
from artifactnet_jax import fingerprint as fp

LEAST_TRACKS = 10  # that `learn` takes
SHARED = 0.5  # of the tracks must be found by the template of the others


# By length class: band ends [n], weights [n], and transforms of each band class.
Null = list[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]


@dataclasses.dataclass(eq=False)
class Tracks:
    """Residuals of many tracks, and of stretches of them, one row each.

    A stretch is the whole track or 20 s or 5 s of it; `length` is its class in `LENGTHS`.
    """

    groups: np.ndarray  # str [n]: what no split may part
    residuals: np.ndarray  # [n, 4, bins], of whole tracks
    ends: np.ndarray  # [n], Hz
    track: np.ndarray  # int [m]: whose the stretch is
    grid: np.ndarray  # [m, 4, GRID]
    end: np.ndarray  # [m], Hz
    length: np.ndarray  # int [m]

    def of(self, keep: np.ndarray) -> Tracks:
        """The tracks of a mask [n], with their stretches."""
        number = np.cumsum(keep) - 1
        rows = keep[self.track]
        return Tracks(
            *(self.groups[keep], self.residuals[keep], self.ends[keep]),
            *(number[self.track[rows]], self.grid[rows], self.end[rows], self.length[rows]),
        )


def weights(groups: np.ndarray) -> np.ndarray:
    """Weight of each row, 1 in all: a group counts by the root of its size."""
    _, inverse, count = np.unique(groups, return_inverse=True, return_counts=True)
    weight = 1 / np.sqrt(count[inverse])
    return np.asarray(weight / weight.sum())


def accumulate(tracks: Sequence[tuple[str, fp.Accumulator]]) -> Tracks:
    """Groups and finished accumulators -> `Tracks`, less what is too short or silent."""
    groups: list[str] = []
    whole: list[np.ndarray] = []
    ends: list[float] = []
    cuts: list[tuple[int, np.ndarray, float, int]] = []
    for group, spectrum in tracks:
        total = sum(spectrum.windows, fp.Mean())
        if dc.length_class(total.frames) is None:
            continue
        stretches = [total, *spectrum.windows[len(spectrum.windows) // 2 :][:1]]
        for mean in stretches:
            length = dc.length_class(mean.frames)
            if length is not None:
                levels = mean.levels()
                found = fp.residuals(levels)
                end = fp.band_end(levels[1])
                cuts.append((len(groups), fp.on_grid(found), end, length))
                if mean is total:
                    whole.append(found)
                    ends.append(end)
        groups.append(group)
    return Tracks(
        *(np.array(groups), np.array(whole, np.float32), np.array(ends)),
        *(np.array([cut[0] for cut in cuts], int), np.array([cut[1] for cut in cuts])),
        *(np.array([cut[2] for cut in cuts]), np.array([cut[3] for cut in cuts], int)),
    )


def template(tracks: Tracks) -> np.ndarray:
    """float32 [2, bins of BINS]: fine and wide mean residual, each group counted once.

    A track counts up to the end of its band. Where no track has sound the template is 0.
    """
    bins = dc.BINS
    hz = fp.HZ[bins]
    weight = np.zeros(len(tracks.groups))
    for group in np.unique(tracks.groups):
        weight[tracks.groups == group] = 1 / (tracks.groups == group).sum()
    total, cover = np.zeros((2, len(hz))), np.full(len(hz), 1e-9)
    for w, rows, end in zip(weight, tracks.residuals, tracks.ends, strict=True):
        inside = hz < min(end, 17_000.0)
        pairs = np.asarray(rows, np.float32)[:, bins].reshape(2, 2, -1).mean(1)
        size = np.sqrt(np.square(pairs[:, inside]).mean(1, keepdims=True)) + 1e-6
        total += w * pairs / size * inside
        cover += w * inside
    return np.asarray(total / cover * (cover > 0.25 * cover.max()), np.float32)


def halves(tracks: Tracks) -> np.ndarray:
    """Parts of the tracks for leaving out: the groups, or two halves of the only one."""
    names = np.unique(tracks.groups)
    if len(names) > 1:
        return tracks.groups
    return np.array([f"half {i % 2}" for i in range(len(tracks.groups))])


def reach(tracks: Tracks) -> np.ndarray:
    """[classes, lengths, 4]: mean inner products of tracks with the others' template.

    Each part of `halves` is compared with the template of the other parts, and counts once. A
    class without a stretch has the mean of the others.
    """
    parts = halves(tracks)
    sums = np.zeros((len(dc.CLASSES), len(dc.LENGTHS), 4))
    counts = np.zeros((len(dc.CLASSES), len(dc.LENGTHS), 1))
    for part in np.unique(parts):
        lines = dc.template_grid(template(tracks.of(parts != part))[None])[0]
        rows = tracks.of(parts == part)
        for i, high in enumerate(dc.CLASSES):
            products = dc.lag0(rows.grid.astype(np.float32), lines, high)
            for j in range(len(dc.LENGTHS)):
                use = (rows.length == j) & (rows.end >= high)
                if use.any():
                    sums[i, j] += products[use].mean(0)
                    counts[i, j] += 1
    known = counts > 0
    mean = sums / np.maximum(counts, 1)
    fallback = mean.sum((0, 1)) / max(1, known.sum())
    return np.where(known, mean, fallback)


def null(real: Tracks) -> Null:
    """Real tracks by length class as `decoders.fit` wants them, with their transforms."""
    out = []
    for j in range(len(dc.LENGTHS)):
        rows = np.flatnonzero(real.length == j)
        grid, end = real.grid[rows].astype(np.float32), real.end[rows]
        moved = [dc.track_transform(grid[end >= high], high) for high in dc.CLASSES]
        out.append((end, weights(real.groups[real.track[rows]]), moved))
    return out


def stretch_of_tracks(tracks: Tracks) -> np.ndarray:
    """int [n]: the stretch that is the whole track: the first of each."""
    return np.unique(tracks.track, return_index=True)[1]


def entry(tracks: Tracks, real: Null) -> dict[str, np.ndarray]:
    """What a bank holds of a decoder: "lines" and the arrays of `decoders.fit`."""
    lines = template(tracks)
    fitted = dc.fit(dc.template_grid(lines[None])[0], reach(tracks), real)
    return {"lines": lines, **fitted}


def bank_of(
    entries: Sequence[dict[str, np.ndarray]], decoders: Sequence[dc.Decoder], chances: np.ndarray
) -> dc.Bank:
    """A bank without reference tracks."""
    nulls = {k: np.stack([e[k] for e in entries]) for k in entries[0] if k != "lines"}
    none = np.zeros((0, 2, fp.LAST - fp.FIRST), np.int8)
    lines = np.stack([e["lines"] for e in entries])
    return dc.Bank(tuple(decoders), lines, nulls, chances, none, np.zeros(0))


def score_stretches(bank: dc.Bank, tracks: Tracks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(z, p of one decoder, speed) [m, K] of every stretch, nan where the band ends too low."""
    out = np.full((3, len(tracks.track), len(bank.lines)), np.nan)
    for i, high in enumerate(dc.CLASSES):
        above = dc.CLASSES[i + 1] if i + 1 < len(dc.CLASSES) else np.inf
        for j in range(len(dc.LENGTHS)):
            rows = np.flatnonzero(
                (tracks.end >= high) & (tracks.end < above) & (tracks.length == j)
            )
            for part in np.array_split(rows, max(1, len(rows) // 100)):
                if len(part):
                    moved = dc.track_transform(tracks.grid[part].astype(np.float32), high)
                    out[:, part] = dc.scores(bank, moved, i, j)
    return out[0], out[1], out[2]


def chances(bank: dc.Bank, real: Null) -> np.ndarray:
    """[classes, lengths]: independent chances that real tracks show the bank to be."""
    out = np.ones((len(dc.CLASSES), len(dc.LENGTHS)))
    for j in range(len(dc.LENGTHS)):
        ends, weight, moved = real[j]
        for i, high in enumerate(dc.CLASSES):
            p = np.concatenate(
                [
                    dc.scores(bank, part, i, j)[1]
                    for part in np.array_split(moved[i], max(1, len(moved[i]) // 100))
                ]
            )
            out[i, j] = dc.independent(p, weight[ends >= high])
    return out


class LearningError(Exception):
    """No decoder can be learnt; the message is one line with the cause and the cure."""


@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """A bank of the new decoder alone, and what is known of it.

    `decoders.join` adds the bank to others.
    """

    bank: dc.Bank
    shared: float  # share of the tracks that the template of the others finds
    already: tuple[
        tuple[str, float], ...
    ]  # decoders of the bank that find tracks of it: name, share
    chances: tuple[float, float]  # independent chances before and after, over classes and lengths
    false_alarms: tuple[int, int, int]  # reference tracks: how many, alarms before and after


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval (Wilson)."""

    n: int
    hits: int

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high) of the share, from 0 to 1."""
        if not self.n:
            return 0.0, 1.0
        z2, share = 1.96**2, self.hits / self.n
        middle = (share + z2 / 2 / self.n) / (1 + z2 / self.n)
        half = 1.96 * np.sqrt(share * (1 - share) / self.n + z2 / 4 / self.n**2) / (1 + z2 / self.n)
        return float(max(0, middle - half)), float(min(1, middle + half))


def reference(bank: dc.Bank) -> Tracks:
    """The real music that a bank carries, as one stretch a track in every length class."""
    levels = bank.reference * np.float32(dc.STEP_DB)
    residuals = np.array([fp.residuals(pair) for pair in levels], np.float32)
    grid = np.array([fp.on_grid(rows) for rows in residuals])
    count, lengths = len(grid), len(dc.LENGTHS)
    return Tracks(
        *(np.array([f"real {n}" for n in range(count)]), residuals, bank.ends),
        *(np.repeat(np.arange(count), lengths), grid.repeat(lengths, axis=0)),
        *(bank.ends.repeat(lengths), np.tile(np.arange(lengths), count)),
    )


def learn(name: str, tracks: Sequence[tuple[str, fp.Accumulator]], bank: dc.Bank) -> Learned:
    """Learn a decoder from (group, spectrum) of its tracks, 10 at least, beside those of a bank.

    The null is that of the bank's reference tracks. LearningError: too few tracks of 4 s with
    sound, or tracks that share no decoder.
    """
    pool = accumulate(tracks)
    if len(pool.groups) < LEAST_TRACKS:
        text = f"{len(pool.groups)} tracks of 4 s and more with sound above 3.5 kHz"
        raise LearningError(f"{name}: {text}, {LEAST_TRACKS} are needed: name more tracks")
    if not (pool.ends >= dc.CLASSES[0]).all():
        pool = pool.of(pool.ends >= dc.CLASSES[0])
        if len(pool.groups) < LEAST_TRACKS:
            text = f"the band of most tracks ends below {dc.CLASSES[0]:.0f} Hz"
            raise LearningError(f"{name}: {text}: name tracks that were not band-limited")
    real_tracks = reference(bank)
    real = null(real_tracks)
    found, parts = 0, halves(pool)
    nothing = [dc.Decoder(name, (), 0, (), (), (0.0, 0.0), 0.0)]
    one = np.ones((len(dc.CLASSES), len(dc.LENGTHS)))
    for part in np.unique(parts):
        others = bank_of([entry(pool.of(parts != part), real)], nothing, one)
        rows = pool.of(parts == part)
        p = score_stretches(others, rows)[1][stretch_of_tracks(rows), 0]
        found += int((p < dc.FOUND).sum())
    shared = found / len(pool.groups)
    if shared < SHARED:
        text = f"the tracks share no decoder: the others' lines find {found} of {len(pool.groups)}"
        raise LearningError(f"{name}: {text}: name tracks of one system, as it wrote them")
    z, p, _ = score_stretches(bank, pool)
    whole = stretch_of_tracks(pool)
    hits = [
        dc.named(bank, z[i], p[i])[0] for i in whole if p[i].min() * bank.chances.max() < dc.FOUND
    ]
    names = [bank.decoders[k].name for k in hits]
    already = tuple((n, names.count(n) / len(whole)) for n in sorted(set(names)))
    new = entry(pool, real)
    decoder = dc.Decoder(
        *(name, (name,), len(pool.groups), tuple(map(str, np.unique(pool.groups))), ()),
        *((fp.LOW_HZ, float(min(dc.CLASSES[-1], np.median(pool.ends)))), round(shared, 4)),
    )
    alone = bank_of([new], [decoder], one)
    alone = dataclasses.replace(alone, chances=chances(alone, real))
    wider = dc.join(bank, alone)
    alarms = [false_alarms(asked, real_tracks) for asked in (bank, wider)]
    return Learned(
        *(alone, shared, already, (float(bank.chances.mean()), float(wider.chances.mean()))),
        (len(real_tracks.groups), alarms[0], alarms[1]),
    )


def false_alarms(bank: dc.Bank, real: Tracks) -> int:
    """How many whole tracks have p < 1e-3."""
    p = score_stretches(bank, real)[1]
    whole = [rows[real.length[rows].argmax()] for rows in _rows(real)]
    i = [dc.band_class(end) for end in real.end[whole]]
    chance = [
        1 if c is None else bank.chances[c, j] for c, j in zip(i, real.length[whole], strict=True)
    ]
    return int((np.nan_to_num(p[whole], nan=1).min(1) * chance < dc.FOUND).sum())


def _rows(tracks: Tracks) -> list[np.ndarray]:
    return [np.flatnonzero(tracks.track == n) for n in range(len(tracks.groups))]


def test(
    bank: dc.Bank, tracks: Sequence[tuple[str | None, str, fp.Accumulator]]
) -> dict[str, dict[str, Rate]]:
    """Found and named rightly by generator, and false alarms, of (generator, group, spectrum).

    A generator of None is real music. Keys: the generators, and "real"; values: "found", p < 1e-3;
    "named", and the decoder's name is the generator's. A decoder that was learnt from tracks of a
    group is not asked about that group.
    """
    out: dict[str, dict[str, list[bool]]] = {}
    for generator, group, spectrum in tracks:
        asked = [k for k, d in enumerate(bank.decoders) if group not in d.repositories]
        outcome = dc.match(spectrum, bank.only(asked)) if asked else dc.Outcome(None, None, None)
        cell = out.setdefault(generator or "real", {"found": [], "named": []})
        cell["found"].append(outcome.match is not None)
        cell["named"].append(outcome.match is not None and outcome.match.name == generator)
    return {
        key: {name: Rate(len(hits), sum(hits)) for name, hits in cell.items()}
        for key, cell in out.items()
    }
