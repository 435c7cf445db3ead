"""What a track's way to a listener does to its decoder's lines, and the picture of the docs.

    python scripts/fingerprint_stress.py stress MIRRORS FEATURES
    python scripts/fingerprint_stress.py picture docs/fingerprints.png

MIRRORS and FEATURES are those of fingerprint_bank.py. `stress` changes a minute of a few tracks of
each decoder and of real ones and adds what is found to scripts/fingerprint-report.json.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from fingerprint_bank import REPORT, clusters, read_features, recordings, shares

from artifactnet_jax import decoder_learning as dl
from artifactnet_jax import decoders as dc
from artifactnet_jax import fingerprint as fp
from artifactnet_jax.bench.stress import stretched
from artifactnet_jax.data.augment import encode_decode
from artifactnet_jax.decode import open_audio

REAL = 13  # tracks; one of them is mixed into the others
STRESSED = ("Suno", "MiniMax Music", "MusicGen", "ElevenLabs Music v1", "ElevenLabs Music v2")


def speed_up(audio: np.ndarray, factor: float) -> np.ndarray:
    """Played faster by a factor: pitch follows."""
    return np.asarray(soxr.resample(audio, fp.RATE * factor, fp.RATE, quality="VHQ"))


def low_passed(audio: np.ndarray, end: float) -> np.ndarray:
    """Nothing above `end` Hz."""
    bins = np.fft.rfft(audio, axis=0)
    bins[round(end * len(audio) / fp.RATE) :] = 0
    return np.fft.irfft(bins, len(audio), axis=0).astype(np.float32)


def noisy(audio: np.ndarray, db: float) -> np.ndarray:
    """With white noise `db` below it."""
    noise = np.random.default_rng(0).normal(size=audio.shape) * audio.std() * 10 ** (-db / 20)
    return (audio + noise).astype(np.float32)


def in_room(audio: np.ndarray) -> np.ndarray:
    """With the reverberation of a room: 0.4 s, as strong as the direct sound."""
    tail = np.random.default_rng(1).normal(size=fp.RATE // 2)
    tail *= 10 ** (-3 * np.arange(len(tail)) / (0.4 * fp.RATE))
    tail /= np.sqrt(np.square(tail).sum())
    tail[0] += 1
    size = len(audio) + len(tail)
    wet = np.fft.irfft(np.fft.rfft(audio, size, axis=0) * np.fft.rfft(tail, size)[:, None], axis=0)
    return np.asarray(wet[: len(audio)] * 0.7, np.float32)


def equalised(audio: np.ndarray) -> np.ndarray:
    """Up to 8 dB up and down along the logarithm of frequency."""
    hz = np.fft.rfftfreq(len(audio), 1 / fp.RATE)
    gain = 10 ** (0.4 * np.sin(2 * np.log2(np.maximum(hz, 20) / 440)))
    bins = np.fft.rfft(audio, axis=0) * gain[:, None]
    return np.fft.irfft(bins, len(audio), axis=0).astype(np.float32)


def mixed(audio: np.ndarray, other: np.ndarray, db: float) -> np.ndarray:
    """With other music, the first `db` decibels below it."""
    n = min(len(audio), len(other))
    level = audio[:n].std() / (other[:n].std() + 1e-9) * 10 ** (-db / 20)
    return (audio[:n] + other[:n] * level).astype(np.float32)


def changes(other: np.ndarray) -> dict[str, Any]:
    """What happens to a track, by name."""
    return {
        "nothing (60 s)": lambda x: x,
        **{f"{s} s": (lambda x, s=s: x[: s * fp.RATE]) for s in (5, 10, 20)},
        **{
            f"{codec} {kbps}": (lambda x, c=codec, k=kbps: encode_decode(x, c, k))
            for codec, kbps in (
                *(("mp3", 320), ("mp3", 128), ("mp3", 64), ("aac", 128), ("opus", 128)),
                *(("opus", 64), ("vorbis", 96)),
            )
        },
        **{
            f"{rate} Hz": (
                lambda x, r=rate: soxr.resample(soxr.resample(x, fp.RATE, r), r, fp.RATE)
            )
            for rate in (48_000, 32_000, 22_050)
        },
        **{
            f"low-pass {e}": (lambda x, e=e: low_passed(x, e))
            for e in (16_000, 11_000, 8_000, 6_000)
        },
        **{
            f"speed {100 * (f - 1):+.0f} %": (lambda x, f=f: speed_up(x, f))
            for f in (0.92, 0.96, 0.99, 1.01, 1.04, 1.08)
        },
        "tempo +4 %, pitch kept": lambda x: np.stack([stretched(c, 1.04) for c in x.T], axis=1),
        "clipped by 12 dB": lambda x: np.clip(4 * x, -1, 1),
        "20 dB softer, 16 bits": lambda x: np.rint(x * 3276.8).astype(np.float32) / 32768,
        "equaliser": equalised,
        "room": in_room,
        **{f"noise {db} dB below": (lambda x, db=db: noisy(x, db)) for db in (40, 20)},
        **{
            f"real music {db} dB below": (lambda x, db=db: mixed(x, other, db)) for db in (12, 6, 0)
        },
    }


def stress(chosen: list[tuple[str, np.ndarray, dc.Bank]], other: np.ndarray) -> dict[str, Any]:
    """By change and decoder ("real": none): found and named of (name, stereo audio, bank)."""
    out: dict[str, Any] = {}
    for title, change in changes(other).items():
        cell: dict[str, list[tuple[bool, float]]] = collections.defaultdict(list)
        for name, audio, bank in chosen:
            spectrum = fp.Accumulator()
            spectrum.add(np.asarray(change(audio), np.float32).mean(axis=1))
            outcome = dc.match(spectrum, bank)
            named = outcome.match is not None and (name == "real" or outcome.match.name == name)
            cell[name].append((named, outcome.nearest.z if outcome.nearest else 0.0))
        out[title] = {
            name: {
                **shares(np.array([hit for hit, _ in hits])),
                "median_z": round(float(np.median([z for _, z in hits])), 1),
            }
            for name, hits in cell.items()
        }
        print(title, {n: f"{c['hits']}/{c['n']}" for n, c in out[title].items()}, file=sys.stderr)
    return out


def listened(data: bytes, seconds: int) -> np.ndarray:
    """float32 [n, 2] at 44.1 kHz: the middle of a recording."""
    with open_audio(io.BytesIO(data)) as decoded:
        audio = np.concatenate(list(decoded.blocks))
        rate = decoded.rate
    middle = max(0, (len(audio) - seconds * rate) // 2)
    audio = audio[middle : middle + seconds * rate, :2]
    if audio.shape[1] == 1:
        audio = audio.repeat(2, axis=1)
    return np.asarray(soxr.resample(audio, rate, fp.RATE, quality="VHQ"), np.float32)


def write_stress(mirrors: Path, folder: Path) -> None:
    """Add to the report what changes do to a few tracks of each decoder and to real ones.

    An AI track is asked of the bank with its decoder's template made without its repository.
    """
    data, _ = read_features(folder)
    bank = dc.load()
    real = data.tracks.of(data.mask(lambda row: row["label"] == "real"))
    null = dl.null(real)
    order = np.random.default_rng(5).permutation(len(data.rows))
    wanted: dict[str, dc.Bank] = {}
    names: dict[str, str] = {}
    for cluster in clusters(data):
        if cluster.name not in STRESSED:
            continue
        k = [d.name for d in bank.decoders].index(cluster.name)
        tracks = data.tracks.of(cluster.keep)
        parts = dl.halves(tracks)
        members = np.flatnonzero(cluster.keep)
        largest = sorted(np.unique(parts), key=lambda part: -(parts == part).sum())[:3]
        for n, part in enumerate(largest):
            entry = dl.entry(tracks.of(parts != part), null)
            nulls = {key: bank.nulls[key].copy() for key in bank.nulls}
            lines = bank.lines.copy()
            lines[k] = entry["lines"]
            for key, array in nulls.items():
                array[k] = entry[key]
            other = dataclasses.replace(bank, lines=lines, nulls=nulls)
            rows = [r for r in order if r in set(members[parts == part]) and _public(data.rows[r])]
            for r in rows[: 2 if n < 1 or len(largest) < 3 else 1]:
                wanted[data.rows[r]["id"]], names[data.rows[r]["id"]] = other, cluster.name
    seen: set[str] = set()
    for r in order:
        row = data.rows[r]
        new = row["label"] == "real" and _public(row) and row["group"] not in seen
        if new and data.tracks.ends[r] >= dc.CLASSES[-1] and len(seen) < REAL:
            seen.add(row["group"])
            wanted[row["id"]], names[row["id"]] = bank, "real"
    audio = {row["id"]: listened(file, 60) for row, file in recordings(mirrors, set(wanted))}
    whole = [i for i in audio if len(audio[i]) >= 40 * fp.RATE]
    other = next(audio[i] for i in whole if names[i] == "real")
    chosen = [(names[i], audio[i], wanted[i]) for i in whole if audio[i] is not other]
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    report["stress"] = stress(chosen, other)
    REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _public(row: dict[str, str]) -> bool:
    """Whether the track is a file of a repository."""
    return not row["id"].startswith(("deb-", "npm-"))


PICTURED = ("Suno", "MusicGen", "MiniMax Music", "ElevenLabs Music v1")


def picture(out: Path) -> None:
    """Draw decoders' lines beside real music's residuals, and the calibration."""
    import matplotlib  # an extra, for this verb alone

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bank = dc.load()
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(3, 1, figsize=(9, 9), height_ratios=(4, 2, 3))
    hz = fp.HZ[dc.BINS] / 1000
    shown = (hz > 7) & (hz < 9)
    for n, name in enumerate(PICTURED):
        k = [d.name for d in bank.decoders].index(name)
        axes[0].plot(hz[shown], bank.lines[k, 0][shown] - 5 * n, lw=0.8, label=name)
    axes[0].legend(loc="upper right", fontsize=8)
    axes[0].set_title("Fine residual, mean over a decoder's tracks (multiples of its spread)")
    for n, rows in enumerate(bank.reference[:3]):
        fine = fp.residuals(rows / 10.0)[0][dc.BINS]
        fine = fine / np.sqrt(np.square(fine).mean())
        axes[1].plot(hz[shown], fine[shown] - 5 * n, lw=0.8, color="grey")
    axes[1].set_title("The same of three real tracks")
    axes[1].set_xlabel("kHz")
    for name, curve in report["real"]["curve"].items():
        count = report["real"]["p"][name]["0.1"]["n"]
        axes[2].loglog(curve, np.arange(1, len(curve) + 1) / count, ".-", lw=0.8, label=name)
    axes[2].plot([1e-5, 1], [1e-5, 1], "k:", lw=0.8)
    axes[2].set(
        xlabel="p stated", ylabel="share of real tracks", xlim=(1e-4, 0.3), ylim=(1e-3, 0.3)
    )
    axes[2].set_title("Real tracks left out of everything")
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    stressed = verbs.add_parser("stress")
    stressed.add_argument("mirrors", type=Path)
    stressed.add_argument("folder", type=Path)
    verbs.add_parser("picture").add_argument("out", type=Path)
    args = parser.parse_args()
    if args.verb == "stress":
        write_stress(args.mirrors, args.folder)
    else:
        picture(args.out)


if __name__ == "__main__":
    main()
