"""Build the bank of decoders from whole files of public repositories, and say what it is worth.

    python scripts/fingerprint_bank.py features MIRRORS FEATURES
    python scripts/fingerprint_bank.py left-out FEATURES -o DECODERS.npz
    python scripts/fingerprint_bank.py build FEATURES -o artifactnet_jax/assets/decoders.npz

MIRRORS is what `default_data.py fetch` made. `features` reads its files and keeps sums of the fine
spectrum over stretches of 5 s. `build` clusters the tracks of neural decoders, keeps what is
stable, fits the nulls to the real tracks, writes the bank, and measures it on tracks left out:
scripts/fingerprint-report.json.

`left-out` writes what the bank of the package says of every track of FEATURES, for fusion.py: of a
decoder's own tracks by the template of the other repositories, and nothing where there is none; of
real tracks by nulls without their group.

A cell is what one group has of one system, three tracks or more. Cells are joined by average
linkage of their standard scores against each other's templates, divided by the geometric mean of
those against their own (leave one out): from 0.3 if they are said to be by one system, from 0.7 if
not. A cluster stays if the template without a repository (or without one half) finds half of what
was left out.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from default_data import DOUBTED, listed, package_row, recordings

from artifactnet_jax import decoder_learning as dl
from artifactnet_jax import decoders as dc
from artifactnet_jax import fingerprint as fp
from artifactnet_jax.decode import open_audio
from artifactnet_jax.decoder_null import Real
from artifactnet_jax.kernels import median_filter
from artifactnet_jax.recording import AudioError

HERE = Path(__file__).parent
REPORT = HERE / "fingerprint-report.json"
STRETCH = 27  # frames; 5 s
MOST_S = 100  # s of a file that are read
LEAST_CELL = 3  # tracks
LEAST_CLUSTER = 4
STABLE = 0.5  # share found by the template of the others
SAME, OTHER = 0.3, 0.7  # joined from here on
FOLDS = 4  # of the real groups
REFERENCES = 70  # real tracks that the bank carries
# What a system is called; the first word found in its description decides.
NAMES = {
    "ElevenLabs sound": "ElevenLabs sound effects",
    "ElevenLabs Music v2": "ElevenLabs Music v2",
    "ElevenLabs": "ElevenLabs Music v1",
    "Lyria": "Google Lyria 3",
    "Suno": "Suno",
    "MiniMax": "MiniMax Music",
    **dict.fromkeys(("Coco-Mulla", "STAGE", "StemGen", "MAGNeT", "MusicGen"), "MusicGen"),
    "Riffusion": "Riffusion",
    "DITTO": "DITTO-2",
    # AudioX and Audio-Omni decode with the autoencoder of Stable Audio.
    **dict.fromkeys(("AudioX", "Audio-Omni", "Stable Audio"), "Stable Audio Open"),
    "VersBand": "VersBand",
    **dict.fromkeys(("AudioLDM", "Tango"), "AudioLDM"),
    "LoopGen": "LoopGen",
    "SongEditor": "SongEditor",
    "CDCD": "Jukebox",
    "prompt": "X-Codec",
    "Diff-A-Riff": "Diff-A-Riff",
    "GaMaDHaNi": "EnCodec 24 kHz",
    "UNAGAN": "UNAGAN",
    "JukeDrummer": "JukeDrummer",
    "Subtractive": "Riffusion",
    "BigVGAN 24k": "BigVGAN",
    "BigVGAN-large": "BigVGAN",
    "AEROMamba": "AEROMamba",
    "AERO ": "AERO",
    "HiFi-GAN": "HiFi-GAN 48 kHz",
}
# Groups whose label in the list is not believed, with the reason.
NOT_A_MAKER = ("separated-stems", "inpainting")  # kinds that are no decoder's output


def called(system: str) -> str:
    """The name of a system's decoder."""
    found = (name for word, name in NAMES.items() if word in system)
    return next(found, system.split(" (")[0])


@dataclasses.dataclass(eq=False)
class Data:
    """All tracks with their rows of sources.csv."""

    rows: list[dict[str, str]]
    tracks: dl.Tracks

    def mask(self, test: Any) -> np.ndarray:
        """bool [n]: the tracks whose row passes a test."""
        return np.array([bool(test(row)) for row in self.rows])


@dataclasses.dataclass(eq=False)
class Cluster:
    """Cells of tracks that carry the same lines."""

    name: str
    keep: np.ndarray  # bool [n]
    cells: list[tuple[str, str]]


def cells(data: Data) -> list[tuple[tuple[str, str], np.ndarray]]:
    """(group, system) and rows of every cell."""
    found = collections.defaultdict(list)
    for i, row in enumerate(data.rows):
        made = row["label"] != "real" and row["kind"] not in NOT_A_MAKER
        if made and data.tracks.ends[i] >= dc.CLASSES[0]:
            found[row["group"], row["system"]].append(i)
    return [(key, np.array(rows)) for key, rows in found.items() if len(rows) >= LEAST_CELL]


def clusters(data: Data) -> list[Cluster]:
    """Cells joined by what they have of each other's lines, fine ones at speed 1."""
    whole = dl.stretch_of_tracks(data.tracks)
    fine = data.tracks.grid[whole].reshape(-1, 2, 2, fp.GRID)[:, 0].astype(np.float32).mean(1)
    tops = np.minimum(dc.CLASSES[-1], data.tracks.ends - 200)
    fine = np.stack(
        [fp.in_band(g, fp.LOW_HZ, max(top, 6e3)) for g, top in zip(fine, tops, strict=True)]
    )
    real = np.flatnonzero(data.mask(lambda row: row["label"] == "real"))
    weight = dl.weights(data.tracks.groups[real])

    def standard(template: np.ndarray, rows: np.ndarray) -> np.ndarray:
        null = fine[real] @ template
        centre = weight @ null
        return np.asarray((fine[rows] @ template - centre) / np.sqrt(weight @ (null - centre) ** 2))

    found = cells(data)
    means = [fine[rows].mean(0) for _, rows in found]
    table = np.array([[np.median(standard(mean, rows)) for _, rows in found] for mean in means])
    for a, (_, rows) in enumerate(found):
        alone = [standard(fine[np.setdiff1d(rows, [i])].mean(0), [i])[0] for i in rows]
        table[a, a] = max(1e-3, np.median(alone))
    own = np.sqrt(np.diag(table))
    share = (table + table.T) / 2 / np.outer(own, own)
    names = [called(key[1]) for key, _ in found]
    joined = [[a] for a in range(len(found)) if table[a, a] > 3]
    while True:
        best = (0.0, 0, 0)
        for x in range(len(joined)):
            for y in range(x):
                mean = float(np.mean(share[np.ix_(joined[x], joined[y])]))
                same = {names[a] for a in joined[x]} & {names[a] for a in joined[y]}
                best = max(best, (mean - (SAME if same else OTHER), x, y))
        if best[0] <= 0:
            break
        joined[best[2]] += joined.pop(best[1])
    out = []
    for group in joined:
        keep = np.zeros(len(data.rows), bool)
        tally: collections.Counter[str] = collections.Counter()
        for a in group:
            keep[found[a][1]] = True
            tally[names[a]] += len(found[a][1])
        out.append(Cluster(tally.most_common(1)[0][0], keep, [found[a][0] for a in group]))
    return out


def left_out(
    cluster: Cluster, tracks: dl.Tracks, null: list[Real]
) -> Iterator[tuple[np.ndarray, dc.Bank]]:
    """For each repository (or half) of a cluster: the mask of its tracks, the others' decoder."""
    members = np.flatnonzero(cluster.keep)
    chosen = tracks.of(cluster.keep)
    parts = dl.halves(chosen)
    decoder = [dc.Decoder(cluster.name, (), 0, (), (), (0.0, 0.0), 0.0)]
    for part in np.unique(parts):
        if (parts != part).sum() >= LEAST_CELL:
            mask = np.zeros(len(cluster.keep), bool)
            mask[members[parts == part]] = True
            entry = dl.entry(chosen.of(parts != part), null)
            yield mask, dl.bank_of([entry], decoder)


@dataclasses.dataclass(eq=False)
class Left:
    """Scores of all stretches, a cluster's own by a template that never saw their repository."""

    z: np.ndarray  # [m, K], nan where not left out
    p: np.ndarray
    own: np.ndarray  # [m]: p of `decoders.own_lines`


def own_lines(bank: dc.Bank, k: int, tracks: dl.Tracks, n: int, speed: float) -> float:
    """p of `decoders.own_lines` of the n-th stretch, 1 where its band ends too low."""
    i = dc.band_class(tracks.end[n])
    if i is None:
        return 1.0
    grid = fp.in_band(tracks.grid[n].astype(np.float32), fp.LOW_HZ, dc.CLASSES[i])
    shift = round(float(np.log(speed)) / fp.GRID_STEP)
    return dc.own_lines(bank, k, i, int(tracks.length[n]), grid, shift)[0]


def cross_scores(
    found: list[Cluster], data: Data, bank: dc.Bank, null: list[Real]
) -> dict[int, Left]:
    """By cluster: scores of all stretches, its own decoder's from the others' template."""
    z, p, _ = dl.score_stretches(bank, data.tracks)
    out = {}
    for k, cluster in enumerate(found):
        own_z, own_p, own = z.copy(), p.copy(), np.ones(len(z))
        own_z[:, k] = own_p[:, k] = np.nan
        for mask, others in left_out(cluster, data.tracks, null):
            rows = np.flatnonzero(mask[data.tracks.track])
            part = data.tracks.of(mask)
            left_z, left_p, speed = dl.score_stretches(others, part)
            own_z[rows, k], own_p[rows, k] = left_z[:, 0], left_p[:, 0]
            for n, row in enumerate(rows):
                if left_p[n, 0] < dc.FOUND:
                    own[row] = own_lines(others, 0, part, n, speed[n, 0])
        out[k] = Left(own_z, own_p, own)
        print(f"left out: {cluster.name}", file=sys.stderr, flush=True)
    return out


def folds(groups: Sequence[str] | np.ndarray, count: int) -> np.ndarray:
    """Which of `count` parts each row is of: a group's rows are in one."""
    names, of = np.unique(groups, return_inverse=True)
    return np.asarray((np.random.default_rng(0).permutation(len(names)) % count)[of])


def shares(hits: np.ndarray) -> dict[str, Any]:
    """Of booleans: how many, and their share with its 95 % interval."""
    rate = dl.Rate(len(hits), int(hits.sum()))
    low, high = rate.interval
    share = round(float(hits.mean()), 4) if len(hits) else None
    return {
        "n": rate.n,
        "hits": rate.hits,
        "share": share,
        "interval": [round(low, 4), round(high, 4)],
    }


LENGTH_NAMES = ("5 s", "20 s", "whole track, 40 to 100 s")


def found_table(
    found: list[Cluster], data: Data, bank: dc.Bank, left: dict[int, Left]
) -> dict[str, Any]:
    """By decoder and length: found at p < 1e-3, named rightly, said to be another."""
    tracks = data.tracks
    out: dict[str, Any] = {}
    for k, cluster in enumerate(found):
        scores = left[k]
        p = np.minimum(1, scores.p * len(bank.decoders))
        known = cluster.keep[tracks.track] & np.isfinite(scores.p[:, k])
        table = {}
        for j, name in enumerate(LENGTH_NAMES):
            rows = np.flatnonzero(known & (tracks.length == j))
            if not len(rows):
                continue
            best = [dc.named(bank, scores.z[r], p[r]) for r in rows]
            right = np.array([bank.decoders[b].name == cluster.name for b, _ in best])
            hits = (p[rows].min(1) < dc.FOUND) & (~right | (scores.own[rows] < dc.OWN))
            sure = np.array([not rivals for _, rivals in best])
            table[name] = {
                "found": shares(hits),
                "named": shares(hits & right),
                "misnamed": shares(hits & ~right & sure),
                "median_z": round(float(np.median(scores.z[rows, k])), 2),
                "by_group": {
                    str(g): shares((hits & right)[tracks.groups[tracks.track[rows]] == g])
                    for g in np.unique(tracks.groups[tracks.track[rows]])
                },
            }
        out[cluster.name if cluster.name not in out else f"{cluster.name} ({k})"] = table
    return out


def calibration(entries_of: Any, decoders: list[dc.Decoder], real: dl.Tracks) -> dict[str, Any]:
    """False alarms on real tracks that no null saw, by group, in folds.

    As in `decoders.match` what agrees by nothing but a comb is no match: its p is 1.
    """
    of_track = folds(real.groups, FOLDS)
    p = np.full(len(real.track), np.nan)
    best = np.zeros(len(real.track), int)
    for f in range(FOLDS):
        null = dl.null(real.of(of_track != f))
        entries = entries_of(null)
        bank = dl.bank_of(entries, decoders)
        held = real.of(of_track == f)
        z, one, speed = dl.score_stretches(bank, held)
        one *= len(decoders)
        rows = np.flatnonzero(of_track[real.track] == f)
        p[rows], best[rows] = one.min(1), np.nan_to_num(one, nan=2).argmin(1)
        for n in np.flatnonzero(one.min(1) < 0.01):
            k = best[rows[n]] = dc.named(bank, z[n], one[n])[0]
            if own_lines(bank, k, held, n, speed[n, k]) >= dc.OWN:
                p[rows[n]] = 1
        print(f"fold {f}", file=sys.stderr)
    out: dict[str, Any] = {"p": {}, "alarms": []}
    for j, name in enumerate(LENGTH_NAMES):
        rows = (real.length == j) & np.isfinite(p)
        table = {f"{q:g}": shares(p[rows] < q) for q in (0.1, 0.03, 0.01, 0.003, 0.001, 1e-4)}
        out["p"][name] = {"groups": len(np.unique(real.groups[real.track[rows]])), **table}
        ordered = np.sort(p[rows])
        out.setdefault("curve", {})[name] = [float(f"{v:.3g}") for v in ordered[:60]]
    for r in np.flatnonzero(p < dc.FOUND):
        name = decoders[best[r]].name
        out["alarms"].append(
            [str(real.groups[real.track[r]]), LENGTH_NAMES[real.length[r]], name, float(p[r])]
        )
    return out


def stretches(data: bytes) -> fp.Accumulator:
    """The sums of the first 100 s of a recording, every 5 s."""
    spectrum = fp.Accumulator(STRETCH, 1 << 30)
    with open_audio(io.BytesIO(data)) as decoded:
        resampler = soxr.ResampleStream(decoded.rate, fp.RATE, 1, dtype="float32")
        left = MOST_S * decoded.rate
        for block in decoded.blocks:
            mono = block[:left].mean(axis=1)
            left -= len(mono)
            spectrum.add(resampler.resample_chunk(mono, last=left <= 0))
            if left <= 0:
                break
    return spectrum


def stability(k: int, cluster: Cluster, data: Data, bank: dc.Bank, left: Left) -> float:
    """Share of the tracks whose longest stretch the template of the others finds."""
    tracks = data.tracks
    p = left.p[:, k] * len(bank.decoders)
    hit: dict[int, tuple[int, bool]] = {}
    for row in np.flatnonzero(cluster.keep[tracks.track] & np.isfinite(left.p[:, k])):
        good = bool(p[row] < dc.FOUND and left.own[row] < dc.OWN)
        n, length = int(tracks.track[row]), int(tracks.length[row])
        if n not in hit or hit[n][0] < length:
            hit[n] = (length, good)
    return float(np.mean([good for _, good in hit.values()])) if hit else 0.0


def described(cluster: Cluster, data: Data, stable: float) -> dc.Decoder:
    """What is known of a cluster."""
    rows = [row for row, keep in zip(data.rows, cluster.keep, strict=True) if keep]
    ends = data.tracks.ends[cluster.keep]
    repositories = tuple(sorted({row["repo"] for row in rows}))
    note = "" if len(repositories) > 1 else "one source only: its encoder may be part of the lines"
    return dc.Decoder(
        *(cluster.name, tuple(sorted({row["system"] for row in rows})), len(rows), repositories),
        tuple(sorted({row["year"] for row in rows if row.get("year")})),
        (fp.LOW_HZ, float(min(dc.CLASSES[-1], round(float(np.median(ends)))))),
        *(round(stable, 4), note),
    )


def references(data: Data, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels above the wide median of one real track of each group, packages' music first."""
    real = [n for n, row in enumerate(data.rows) if row["label"] == "real"]
    real.sort(key=lambda n: not data.rows[n]["group"].startswith("deb-"))
    chosen: dict[str, int] = {}
    for n in real:
        if data.tracks.ends[n] >= dc.CLASSES[-1]:
            chosen.setdefault(data.rows[n]["group"], n)
    rows = list(chosen.values())[:REFERENCES]
    above = levels[rows].astype(np.float32)
    above -= np.stack([median_filter(pair, fp.WIDE, 1) for pair in above])
    return np.clip(np.rint(above / dc.STEP_DB), -127, 127).astype(np.int8), data.tracks.ends[rows]


def read_features(folder: Path) -> tuple[Data, np.ndarray]:
    """All tracks of a folder of features, and the levels [n, 2, bins] of each."""
    known = {path.stem: path for path in sorted(folder.glob("*.npz"))}
    rows = [row for row in listed().values() if row["id"] in known]
    for stem in known:
        if stem.startswith(("deb-", "npm-")):
            rows.append(package_row(stem))
    kept, whole, ends, levels, cuts = [], [], [], [], []
    for row in rows:
        if row["group"] in DOUBTED:
            row["kind"] = NOT_A_MAKER[0]
        with np.load(known[row["id"]]) as file:
            frames, log, power = file["n"], file["log"], file["pw"]
        parts = [(0, len(frames))]
        middle = len(frames) // 2
        if frames.sum() >= 150:
            parts.append((max(0, middle - 4), max(0, middle - 4) + 4))
        if frames.sum() >= 2 * STRETCH:
            parts.append((middle, middle + 1))
        for a, b in parts:
            count = frames[a:b].astype(float)
            length = dc.length_class(int(count.sum()))
            if length is None:
                break
            share = (count / count.sum())[:, None]
            mean = (log[a:b].astype(float) * share).sum(0)
            sums = (10 ** (power[a:b].astype(float) / 10) * share).sum(0)
            both = np.stack([mean, 10 * np.log10(sums + fp.FLOOR)])
            residual, end = fp.residuals(both), fp.band_end(both[1])
            if (a, b) == parts[0]:
                kept.append(row)
                whole.append(residual.astype(np.float16))
                ends.append(end)
                levels.append(both.astype(np.float16))
            grid = fp.on_grid(residual).astype(np.float16)
            cuts.append((len(kept) - 1, grid, end, length))
    track, grids, end, length = zip(*cuts, strict=True)
    groups = np.array([row["group"] for row in kept])
    tracks = dl.Tracks(
        *(groups, np.stack(whole), np.array(ends)),
        *(np.array(track), np.stack(grids), np.array(end), np.array(length)),
    )
    return Data(kept, tracks), np.stack(levels)


def build(folder: Path, out: Path) -> None:
    """Features -> the bank, and the report beside this script."""
    data, levels = read_features(folder)
    print(f"{len(data.rows)} tracks", file=sys.stderr, flush=True)
    real = data.tracks.of(data.mask(lambda row: row["label"] == "real"))
    null = dl.null(real)
    found = [c for c in clusters(data) if c.keep.sum() >= LEAST_CLUSTER]
    print(f"{len(found)} clusters", file=sys.stderr, flush=True)
    entries = [dl.entry(data.tracks.of(c.keep), null) for c in found]
    bank = dl.bank_of(entries, [described(c, data, 0) for c in found])
    left = cross_scores(found, data, bank, null)
    shares_found = [stability(k, c, data, bank, left[k]) for k, c in enumerate(found)]
    stay = [k for k, share in enumerate(shares_found) if share >= STABLE]
    dropped = [[found[k].name, round(s, 3)] for k, s in enumerate(shares_found) if k not in stay]
    left = {
        n: Left(left[k].z[:, stay], left[k].p[:, stay], left[k].own) for n, k in enumerate(stay)
    }
    found, entries = [found[k] for k in stay], [entries[k] for k in stay]
    decoders = [described(c, data, shares_found[k]) for c, k in zip(found, stay, strict=True)]
    bank = dl.bank_of(entries, decoders)
    reference, ends = references(data, levels)
    bank = dataclasses.replace(bank, reference=reference, ends=ends)
    digest = dc.save(bank, out)
    groups = {row["group"] for row in data.rows if row["label"] == "real"}
    report = {
        "bank": {"digest": digest, "decoders": [dataclasses.asdict(d) for d in decoders]},
        "dropped": dropped,
        "doubted": DOUBTED,
        "lengths": LENGTH_NAMES,
        "data": {"tracks": len(data.rows), "real": len(real.groups), "real groups": len(groups)},
        "found": found_table(found, data, bank, left),
    }
    REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("bank written", file=sys.stderr, flush=True)
    parts = [data.tracks.of(c.keep) for c in found]
    again = lambda null: [dl.entry(part, null) for part in parts]  # noqa: E731
    report["real"] = calibration(again, decoders, real)
    REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def write_left_out(folder: Path, out: Path) -> None:
    """Name, length, p of the nearest decoder and p of its own lines, of every stretch."""
    data, _ = read_features(folder)
    bank, tracks = dc.load(), data.tracks
    known = {(c.name, int(c.keep.sum())): c for c in reversed(clusters(data)) if c.keep.any()}
    found = [known[d.name, d.tracks] for d in bank.decoders]
    mask = data.mask(lambda row: row["label"] == "real")
    real = tracks.of(mask)
    null = dl.null(real)
    _, p, _ = dl.score_stretches(bank, tracks)
    own = np.ones(len(p))
    for k, cluster in enumerate(found):
        pages = set(bank.decoders[k].repositories)
        theirs = data.mask(lambda row, pages=pages: row["repo"] in pages and row["label"] != "real")
        p[theirs[tracks.track], k] = np.nan
        if len(pages) < 2:
            continue
        for part, others in left_out(cluster, tracks, null):
            rows, held = np.flatnonzero(part[tracks.track]), tracks.of(part)
            _, one, speed = dl.score_stretches(others, held)
            p[rows, k] = one[:, 0]
            for n in np.flatnonzero(one[:, 0] < dc.FOUND):
                own[rows[n]] = own_lines(others, 0, held, int(n), speed[n, 0])
    of_track = folds(real.groups, FOLDS)
    parts, of_real = [tracks.of(c.keep) for c in found], np.flatnonzero(mask[tracks.track])
    for f in range(FOLDS):
        nulls = dl.null(real.of(of_track != f))
        without = dl.bank_of([dl.entry(part, nulls) for part in parts], list(bank.decoders))
        held = real.of(of_track == f)
        z, one, speed = dl.score_stretches(without, held)
        rows = of_real[of_track[real.track] == f]
        p[rows] = one
        for n in np.flatnonzero(one.min(1) * len(found) < 0.01):
            k = dc.named(without, z[n], one[n] * len(found))[0]
            own[rows[n]] = own_lines(without, k, held, int(n), speed[n, k])
    first: set[int] = set()
    views = []
    for track, length in zip(tracks.track.tolist(), tracks.length.tolist(), strict=True):
        views.append(LENGTH_NAMES[length] if track in first else "whole")
        first.add(track)
    nearest = np.where(np.isfinite(p).any(axis=1), np.nanmin(np.nan_to_num(p, nan=1), axis=1), 1)
    name = np.array([data.rows[track]["id"] for track in tracks.track])
    p_bank = np.minimum(1, nearest * len(found))
    np.savez(out, name=name, view=np.array(views), p=p_bank, own=own)


def write_features(mirrors: Path, folder: Path) -> None:
    """One file of features for each recording that has none yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for row, data in recordings(mirrors):
        path = folder / f"{row['id'].replace('/', '_')}.npz"
        if path.exists():
            continue
        try:
            windows = [mean for mean in stretches(data).windows if mean.frames]
        except AudioError as error:
            print(f"{row['id']}: {error}", file=sys.stderr)
            continue
        if windows:
            count = np.array([mean.frames for mean in windows])
            log, power = np.moveaxis([mean.levels() for mean in windows], 0, 1).astype(np.float16)
            np.savez(path, n=count, log=log, pw=power)


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    features = verbs.add_parser("features")
    features.add_argument("mirrors", type=Path)
    features.add_argument("folder", type=Path)
    built = verbs.add_parser("build")
    built.add_argument("folder", type=Path)
    built.add_argument("-o", dest="out", type=Path, required=True)
    left = verbs.add_parser("left-out")
    left.add_argument("folder", type=Path)
    left.add_argument("-o", dest="out", type=Path, required=True)
    args = parser.parse_args()
    if args.verb == "left-out":
        write_left_out(args.folder, args.out)
    elif args.verb == "features":
        write_features(args.mirrors, args.folder)
    else:
        build(args.folder, args.out)


if __name__ == "__main__":
    main()
