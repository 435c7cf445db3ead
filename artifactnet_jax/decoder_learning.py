"""Learning decoders from tracks: templates, what their own tracks reach, nulls, and the test."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from artifactnet_jax import decoders as dc
from artifactnet_jax import fingerprint as fp
from artifactnet_jax.decoder_null import Real, fit

LEAST_TRACKS = 10  # that `learn` takes
SHARED = 0.5  # of the tracks must be found by the template of the others
MOST_PARTS = 8  # that a bank can do without, each in its turn


@dataclasses.dataclass(eq=False)
class Track:
    """A recording that a decoder is learnt from."""

    group: str  # what no split may part
    digest: str  # SHA-256 of its file
    spectrum: fp.Accumulator


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


def accumulate(tracks: Iterable[Track]) -> tuple[Tracks, list[str]]:
    """Finished accumulators -> `Tracks`, less what cannot be judged; and the digests of those left.

    Of each track the whole and a window in its middle are kept.
    """
    groups: list[str] = []
    digests: list[str] = []
    whole: list[np.ndarray] = []
    ends: list[float] = []
    cuts: list[tuple[int, np.ndarray, float, int]] = []
    for track in tracks:
        if isinstance(dc.hear(track.spectrum), str):
            continue
        windows = track.spectrum.windows
        total = sum(windows, fp.Mean())
        for mean in (total, *windows[len(windows) // 2 :][:1]):
            length = dc.length_class(mean.frames)
            if length is not None:
                levels = mean.levels()
                found = fp.residuals(levels)
                end = fp.band_end(levels[1])
                cuts.append((len(groups), fp.on_grid(found), end, length))
                if mean is total:
                    whole.append(found)
                    ends.append(end)
        groups.append(track.group)
        digests.append(track.digest)
    tracks_of = Tracks(
        *(np.array(groups), np.array(whole, np.float32), np.array(ends)),
        *(np.array([cut[0] for cut in cuts], int), np.array([cut[1] for cut in cuts])),
        *(np.array([cut[2] for cut in cuts]), np.array([cut[3] for cut in cuts], int)),
    )
    return tracks_of, digests


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


def null(real: Tracks) -> list[Real]:
    """Real tracks by length class as `decoder_null.fit` wants them."""
    return [_real(real, real.length == j) for j in range(len(dc.LENGTHS))]


def _real(tracks: Tracks, keep: np.ndarray) -> Real:
    """Some stretches of real music."""
    grid, end = tracks.grid[keep], tracks.end[keep]
    moved = [dc.track_transform(grid[end >= high].astype(np.float32), high) for high in dc.CLASSES]
    return Real(end, weights(tracks.groups[tracks.track[keep]]), grid, moved)


def stretch_of_tracks(tracks: Tracks) -> np.ndarray:
    """int [n]: the stretch that is the whole track: the first of each."""
    return np.unique(tracks.track, return_index=True)[1]


def entry(tracks: Tracks, real: list[Real]) -> dict[str, np.ndarray]:
    """What a bank holds of a decoder: "lines" and the arrays of `decoder_null.fit`."""
    lines = template(tracks)
    fitted = fit(dc.template_grid(lines[None])[0], reach(tracks), real)
    return {"lines": lines, **fitted}


def bank_of(entries: Sequence[dict[str, np.ndarray]], decoders: Sequence[dc.Decoder]) -> dc.Bank:
    """A bank without reference tracks."""
    nulls = {k: np.stack([e[k] for e in entries]) for k in entries[0] if k != "lines"}
    none = np.zeros((0, 2, fp.LAST - fp.FIRST), np.int8)
    lines = np.stack([e["lines"] for e in entries])
    return dc.Bank(tuple(decoders), lines, nulls, none, np.zeros(0))


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


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval (Wilson's, which has a width where nothing was missed)."""

    n: int
    hits: int

    @property
    def share(self) -> float:
        """Of the hits; 0 of none."""
        return self.hits / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end."""
        if not self.n:
            return 0.0, 1.0
        z2, share = 1.96**2, self.hits / self.n
        middle = (share + z2 / 2 / self.n) / (1 + z2 / self.n)
        half = 1.96 * np.sqrt(share * (1 - share) / self.n + z2 / 4 / self.n**2) / (1 + z2 / self.n)
        return float(max(0, middle - half)), float(min(1, middle + half))


class LearningError(Exception):
    """No decoder can be learnt; the message is one line with the cause and the cure."""


@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """A bank of the new decoder alone, and what is known of it.

    `decoders.join` adds the bank to others.
    """

    bank: dc.Bank
    tracks: int
    parts: int  # that were left out in turn: the groups, or parts of several; halves of one group
    shared: Rate  # of the tracks: those that the lines of the other parts find
    already: dict[str, Rate]  # by name of a decoder of the bank: tracks that it is the best for
    asked: tuple[int, int]  # decoders of the bank before and after: p is multiplied by so many
    false_alarms: tuple[Rate, Rate]  # of the bank's reference tracks, before and after


def reference(bank: dc.Bank) -> Tracks:
    """The real music that a bank carries: whole tracks."""
    levels = bank.reference * np.float32(dc.STEP_DB)
    residuals = np.array([fp.residuals(pair) for pair in levels], np.float32)
    grid = np.array([fp.on_grid(rows) for rows in residuals])
    count = len(grid)
    return Tracks(
        *(np.array([f"real {n}" for n in range(count)]), residuals, bank.ends),
        *(np.arange(count), grid, bank.ends, np.full(count, len(dc.LENGTHS) - 1)),
    )


def learn(name: str, tracks: Iterable[Track], bank: dc.Bank) -> Learned:
    """Learn a decoder from tracks of it, 10 at least, beside those of a bank.

    The null is that of the bank's reference tracks. LearningError: the bank has none, too few
    tracks can be judged, or they share no decoder.
    """
    if not len(bank.ends):
        text = "the bank carries no real music to compare with"
        raise LearningError(f"{name}: {text}: learn beside the embedded bank")
    pool, digests = accumulate(tracks)
    if len(pool.groups) < LEAST_TRACKS:
        text = f"{len(pool.groups)} tracks can be judged, {LEAST_TRACKS} are needed"
        enough = f"a band up to {dc.CLASSES[0] / 1000:g} kHz"
        raise LearningError(f"{name}: {text}: name more, of 4 s and more and {enough}")
    real_tracks = reference(bank)
    # What the bank carries are whole tracks: they stand for shorter stretches too.
    real = [_real(real_tracks, real_tracks.length >= 0)] * len(dc.LENGTHS)
    groups = tuple(map(str, np.unique(pool.groups)))
    band = fp.LOW_HZ, float(min(dc.CLASSES[-1], np.median(pool.ends)))
    parts = _parts(pool)
    entries, decoders, found = [], [], 0
    for part in np.unique(parts):
        rows = pool.of(parts != part)
        out = tuple(d for d, p in zip(digests, parts, strict=True) if p == part)
        others = tuple(map(str, np.unique(rows.groups)))
        entries.append(entry(rows, real))
        decoders.append(
            dc.Decoder(name, (name,), len(rows.groups), others, (), band, 0.0, without=out)
        )
        left = pool.of(parts == part)
        alone = bank_of(entries[-1:], decoders[-1:])
        p = score_stretches(alone, left)[1][stretch_of_tracks(left), 0]
        found += int((p < dc.FOUND).sum())
    shared = Rate(len(pool.groups), found)
    if shared.share < SHARED:
        text = f"the tracks share no decoder: the others' lines find {found} of {shared.n}"
        raise LearningError(f"{name}: {text}: name tracks of one system, as it wrote them")
    decoder = dc.Decoder(
        *(name, (name,), len(pool.groups), groups, ()), *(band, round(shared.share, 4))
    )
    new = dataclasses.replace(
        bank_of([entry(pool, real)], [decoder]),
        left_out=bank_of(entries, decoders),
    )
    wider = dc.join(bank, new)
    return Learned(
        *(new, len(pool.groups), len(entries), shared, known(bank, pool)),
        (len(bank.decoders), len(wider.decoders)),
        (false_alarms(bank, real_tracks), false_alarms(wider, real_tracks)),
    )


def _parts(tracks: Tracks) -> np.ndarray:
    """`halves`, or `MOST_PARTS` parts of the groups where they are more."""
    parts = halves(tracks)
    names, place = np.unique(parts, return_inverse=True)
    return parts if len(names) <= MOST_PARTS else np.asarray(place % MOST_PARTS)


def known(bank: dc.Bank, tracks: Tracks) -> dict[str, Rate]:
    """By name of a decoder: tracks that it is named for."""
    z, p, speed = score_stretches(bank, tracks)
    names = []
    for n in range(len(tracks.groups)):
        rows = np.flatnonzero(tracks.track == n)
        row = rows[tracks.length[rows].argmax()]
        best, _ = dc.named(bank, z[row], p[row])
        i, j = dc.band_class(float(tracks.end[row])), int(tracks.length[row])
        if i is None or p[row, best] * len(bank.decoders) >= dc.FOUND:
            continue
        grid = fp.in_band(tracks.grid[row], fp.LOW_HZ, dc.CLASSES[i])
        shift = round(float(np.log(speed[row, best])) / fp.GRID_STEP)
        if dc.own_lines(bank, best, i, j, grid, shift)[0] < dc.OWN:
            names.append(bank.decoders[best].name)
    return {name: Rate(len(tracks.groups), names.count(name)) for name in sorted(set(names))}


def false_alarms(bank: dc.Bank, real: Tracks) -> Rate:
    """Tracks for which a decoder is named."""
    return Rate(len(real.groups), sum(rate.hits for rate in known(bank, real).values()))


def unseen(bank: dc.Bank, group: str, digest: str) -> tuple[dc.Bank | None, tuple[str, ...]]:
    """What of a bank may be asked about a track, and the names that may not be.

    A decoder that was learnt from the track, or from its group, is replaced by the same one learnt
    without that part of its tracks, where the bank has it.
    """
    parts = bank.left_out.decoders if bank.left_out is not None else ()
    keep, instead, lost = [], [], []
    for k, decoder in enumerate(bank.decoders):
        own = [(n, part) for n, part in enumerate(parts) if part.name == decoder.name]
        seen = [n for n, part in own if digest in part.without]
        related = group in decoder.repositories
        fitting = seen or [n for n, part in own if related and group not in part.repositories]
        if not (seen or related):
            keep.append(k)
        elif fitting:
            instead.append(fitting[0])
        else:
            lost.append(decoder.name)
    if len(keep) == len(bank.decoders):
        return bank, ()
    banks = [bank.only(keep)] if keep else []
    if instead and bank.left_out is not None:
        banks.append(bank.left_out.only(instead))
    if not banks:
        return None, tuple(lost)
    return dc.join(*banks), tuple(lost)
