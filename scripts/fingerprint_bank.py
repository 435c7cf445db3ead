"""Build the bank of decoders from whole files of public repositories, and say what it is worth.

    python scripts/fingerprint_bank.py sources open.tsv
    python scripts/fingerprint_bank.py features MIRRORS FEATURES
    python scripts/fingerprint_bank.py build FEATURES -o artifactnet_jax/assets/decoders.npz

`sources` writes scripts/sources.csv, the facts of every file: id, repository, commit, path, label,
kind, system, group, licence, year. `features` reads the files of it that are below MIRRORS: bare or
plain git repositories, as OWNER+NAME/repo, Debian packages' music as deb/PACKAGE/FILE, npm packages
as npm/PACKAGE-VERSION; it keeps sums of the fine spectrum over stretches of 5 s. `build` clusters
the tracks of neural decoders, keeps what is stable, fits the nulls to the real tracks, writes the
bank, and measures it on tracks left out: scripts/fingerprint-report.json.

A cell is what one group has of one system, three tracks or more. Cells are joined by average
linkage of their standard scores against each other's templates, divided by the geometric mean of
those against their own (leave one out): from 0.3 if they are said to be by one system, from 0.7 if
not. A cluster stays if the template without a repository (or without one half) finds half of what
was left out.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from artifactnet_jax import decoder_learning as dl
from artifactnet_jax import decoders as dc
from artifactnet_jax import fingerprint as fp
from artifactnet_jax.decode import open_audio

HERE = Path(__file__).parent
SOURCES, REPORT = HERE / "sources.csv", HERE / "fingerprint-report.json"
COLUMNS = ["id", "repo", "commit", "path", "label", "kind", "system", "group", "licence", "year"]
STRETCH = 27  # frames; 5 s
MOST_S = 100  # s of a file that are read
LEAST_CELL = 3  # tracks
SAME, OTHER = 0.3, 0.7  # joined from here on
FOLDS = 4  # of the real groups
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
    "AudioX": "AudioX",
    **dict.fromkeys(("Audio-Omni", "Stable Audio"), "Stable Audio Open"),
    "VersBand": "VersBand",
    **dict.fromkeys(("AudioLDM", "Tango"), "AudioLDM"),
    "LoopGen": "LoopGen",
    "SongEditor": "SongEditor",
    "CDCD": "Jukebox",
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
        return np.array([bool(test(row)) for row in self.rows])


@dataclasses.dataclass(eq=False)
class Cluster:
    name: str
    keep: np.ndarray  # bool [n]
    cells: list[tuple[str, str]]


def cells(data: Data) -> list[tuple[tuple[str, str], np.ndarray]]:
    """(group, system) and rows of every cell."""
    found = collections.defaultdict(list)
    for i, row in enumerate(data.rows):
        if row["label"] != "real" and row["kind"] not in NOT_A_MAKER:
            if data.tracks.ends[i] >= dc.CLASSES[0]:
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
    cluster: Cluster, tracks: dl.Tracks, null: dl.Null
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
            yield mask, dl.bank_of([entry], decoder, np.ones((len(dc.CLASSES), len(dc.LENGTHS))))


@dataclasses.dataclass(eq=False)
class Left:
    """Scores of stretches by a bank that never saw their repository."""

    z: np.ndarray  # [m, K], nan where not left out
    p: np.ndarray


def cross_scores(found: list[Cluster], data: Data, bank: dc.Bank, null: dl.Null) -> dict[int, Left]:
    """By cluster: scores of all stretches, its own decoder's from the others' template."""
    z, p, _ = dl.score_stretches(bank, data.tracks)
    out = {}
    for k, cluster in enumerate(found):
        own_z, own_p = z.copy(), p.copy()
        own_z[:, k] = own_p[:, k] = np.nan
        for mask, others in left_out(cluster, data.tracks, null):
            rows = mask[data.tracks.track]
            left_z, left_p, _ = dl.score_stretches(others, data.tracks.of(mask))
            own_z[rows, k], own_p[rows, k] = left_z[:, 0], left_p[:, 0]
        out[k] = Left(own_z, own_p)
    return out


def corrected(bank: dc.Bank, p: np.ndarray, ends: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """p of single decoders -> p of the bank, by the chances of each stretch's class."""
    i = np.array([max(0, dc.band_class(end) or 0) for end in ends])
    return np.minimum(1, p * bank.chances[i, lengths][:, None])


def shares(hits: np.ndarray) -> dict[str, Any]:
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
        p = corrected(bank, scores.p, tracks.end, tracks.length)
        known = cluster.keep[tracks.track] & np.isfinite(scores.p[:, k])
        table = {}
        for j, name in enumerate(LENGTH_NAMES):
            rows = np.flatnonzero(known & (tracks.length == j))
            if not len(rows):
                continue
            hits = p[rows].min(1) < dc.FOUND
            best = [dc.named(bank, scores.z[r], p[r]) for r in rows]
            right = np.array([bank.decoders[b].name == cluster.name for b, _ in best])
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
    """False alarms on real tracks left out of the nulls and of the chances, by group, in folds."""
    names = np.unique(real.groups)
    fold = np.random.default_rng(0).permutation(len(names)) % FOLDS
    part = dict(zip(names, fold, strict=True))
    of_track = np.array([part[g] for g in real.groups])
    p = np.full(len(real.track), np.nan)
    best = np.zeros(len(real.track), int)
    for f in range(FOLDS):
        null = dl.null(real.of(of_track != f))
        entries = entries_of(null)
        bank = dl.bank_of(entries, decoders, np.ones((len(dc.CLASSES), len(dc.LENGTHS))))
        bank = dataclasses.replace(bank, chances=dl.chances(bank, null))
        held = real.of(of_track == f)
        _, one, _ = dl.score_stretches(bank, held)
        rows = of_track[real.track] == f
        all_p = corrected(bank, one, held.end, held.length)
        p[rows], best[rows] = all_p.min(1), np.nan_to_num(all_p, nan=2).argmin(1)
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


def write_sources(listing: Path) -> None:
    """scripts/sources.csv from a list of files with the same columns, tab-separated."""
    with listing.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with SOURCES.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["repo"], row["path"])))


def recordings(mirrors: Path) -> Iterator[tuple[dict[str, str], bytes]]:
    """Rows with the bytes of their files: of repositories, and of packages' music."""
    with SOURCES.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            folder = mirrors / row["repo"].replace("/", "+") / "repo"
            if not folder.is_dir():
                continue
            git = folder / ".git" if (folder / ".git").is_dir() else folder
            name = f"{row['commit']}:{row['path']}"
            show = ["git", f"--git-dir={git}", "cat-file", "blob", name]
            result = subprocess.run(show, capture_output=True, check=False)
            if result.returncode == 0 and result.stdout:
                yield row, result.stdout
            else:
                print(f"{row['repo']}: {row['path']} is not in the mirror", file=sys.stderr)
    packages = (("deb", "real", "game", "human"), ("npm", "ai", "service", "Suno v5"))
    for kind, label, what, system in packages:
        for folder in sorted((mirrors / kind).glob("*/")):
            group = f"{kind}-{folder.name}" if kind == "deb" else "npm-weshop"
            for path in sorted(p for p in folder.rglob("*") if p.suffix in (".ogg", ".opus", ".mp3")):
                row = {"id": f"{group}-{path.stem}", "repo": group, "group": group, "label": label}
                yield {**row, "kind": what, "system": system}, path.read_bytes()


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
