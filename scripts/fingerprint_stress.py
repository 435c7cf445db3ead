"""What a track's way to a listener does to its decoder's lines, and the picture of the docs.

    python scripts/fingerprint_stress.py stress MIRRORS FEATURES
    python scripts/fingerprint_stress.py fakeprint MIRRORS FEATURES
    python scripts/fingerprint_stress.py picture docs/fingerprints.png

MIRRORS and FEATURES are those of fingerprint_bank.py. `stress` changes a minute of a few tracks of
each decoder and of real ones and adds what is found to scripts/fingerprint-report.json. `fakeprint`
adds what a published logistic regression finds of the same tracks, its groups left out likewise.
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
from fingerprint_bank import (
    MOST_S,
    REPORT,
    Data,
    called,
    clusters,
    read_features,
    recordings,
    shares,
)

from artifactnet_jax import decoder_learning as dl
from artifactnet_jax import decoders as dc
from artifactnet_jax import fingerprint as fp
from artifactnet_jax.audio import read_mono
from artifactnet_jax.bench.adapter import DetectorError
from artifactnet_jax.bench.baselines import Fakeprint
from artifactnet_jax.bench.stress import SUITES, laundered, rerecorded, stretched
from artifactnet_jax.data.augment import encode_decode, filtered
from artifactnet_jax.data.teachers import open_teacher
from artifactnet_jax.decode import open_audio
from artifactnet_jax.recording import AudioError

REAL = 13  # tracks; one of them is mixed into the others
SECONDS = 60
STRESSED = ("Suno", "MiniMax Music", "MusicGen", "ElevenLabs Music v1", "ElevenLabs Music v2")
TRACKS = 6  # of a decoder, where there are so many
LEAST_S = 20


def equaliser(hz: np.ndarray) -> np.ndarray:
    """Up to 8 dB up and down along the logarithm of frequency."""
    return np.asarray(10 ** (0.4 * np.sin(2 * np.log2(np.maximum(hz, 20) / 440))))


def noisy(audio: np.ndarray, db: float) -> np.ndarray:
    """With white noise `db` below it."""
    noise = np.random.default_rng(0).normal(size=audio.shape) * audio.std() * 10 ** (-db / 20)
    return (audio + noise).astype(np.float32)


def limited(audio: np.ndarray) -> np.ndarray:
    """12 dB louder, held below full scale by a gain that follows peaks of 5 ms."""
    size = fp.RATE // 200
    peaks = np.abs(4 * audio[: len(audio) // size * size]).reshape(-1, size * 2).max(axis=1)
    peaks = np.maximum.reduce([np.roll(peaks, k) for k in (-1, 0, 1)])
    at = (np.arange(len(peaks)) + 0.5) * size
    gain = np.interp(np.arange(len(audio)), at, 1 / np.maximum(1, peaks))
    return np.asarray(np.clip(4 * audio * gain[:, None], -1, 1), np.float32)


def mixed(audio: np.ndarray, other: np.ndarray, db: float) -> np.ndarray:
    """With other music, the first `db` decibels below it."""
    n = min(len(audio), len(other))
    level = audio[:n].std() / (other[:n].std() + 1e-9) * 10 ** (-db / 20)
    return (audio[:n] + other[:n] * level).astype(np.float32)


def centre(audio: np.ndarray) -> np.ndarray:
    """What both channels share, where a singer mostly stands: float32 [n, 2]."""
    frames, hop = 4096, 1024
    window = np.hanning(frames + 1)[:-1]
    out = np.zeros(len(audio) + frames)
    for start in range(0, len(audio) - frames, hop):
        left, right = np.fft.rfft(audio[start : start + frames].T * window)
        share = 1 - np.abs(left - right) / (np.abs(left) + np.abs(right) + 1e-9)
        middle = np.maximum(0, share) * (left + right) / 2
        out[start : start + frames] += np.fft.irfft(middle, frames) * window / 1.5
    return np.asarray(out[: len(audio), None].repeat(2, axis=1), np.float32)


def remixed(audio: np.ndarray) -> np.ndarray:
    """Taken apart by the built-in separator, and the parts added again."""
    mono = audio.mean(axis=1)
    return np.asarray(laundered(mono, open_teacher("builtin"), 1)[:, None])


def played(audio: np.ndarray, factor: float) -> np.ndarray:
    """Faster by a factor: pitch follows."""
    return np.asarray(soxr.resample(audio, fp.RATE * factor, fp.RATE, quality="VHQ"))


def through(audio: np.ndarray, rate: int) -> np.ndarray:
    """At another sample rate, and back."""
    return np.asarray(soxr.resample(soxr.resample(audio, fp.RATE, rate), rate, fp.RATE))


def changes(other: np.ndarray) -> dict[str, Any]:
    """What happens to a track, by name; `other` is real music."""
    out: dict[str, Any] = {"nothing": lambda x: x}
    for seconds in (5, 10, 20):
        out[f"{seconds} s"] = lambda x, s=seconds: x[: s * fp.RATE]
    for codec, kbps in (
        *(("mp3", 320), ("mp3", 128), ("mp3", 64), ("aac", 128), ("opus", 128), ("opus", 64)),
        ("vorbis", 96),
    ):
        out[f"{codec} {kbps}"] = lambda x, c=codec, k=kbps: encode_decode(x, c, k)
    for rate in (48_000, 32_000, 22_050):
        out[f"{rate} Hz"] = lambda x, r=rate: through(x, r)
    for end in (16_000, 11_000, 8_000, 6_000):
        out[f"low-pass {end}"] = lambda x, e=end: filtered(x, lambda hz: hz < e)
    for percent in (-10, -8, -4, -2, -1, 1, 2, 4, 8, 10):
        out[f"speed {percent:+d} %"] = lambda x, p=percent: played(x, 1 + p / 100)
    out["tempo +4 %, pitch kept"] = lambda x: stretched(x.mean(axis=1), 1.04)[:, None]
    out["clipped by 12 dB"] = lambda x: np.clip(4 * x, -1, 1)
    out["limiter, 12 dB"] = limited
    out["20 dB softer, 16 bits"] = lambda x: np.rint(x * 3276.8).astype(np.float32) / 32768
    out["equaliser"] = lambda x: filtered(x, equaliser)
    out["room"] = lambda x: rerecorded(x.mean(axis=1), "room")[:, None]
    for db in (40, 20):
        out[f"noise {db} dB below"] = lambda x, d=db: noisy(x, d)
    for db in (12, 6, 0):
        out[f"real music {db} dB below"] = lambda x, d=db: mixed(x, other, d)
    out["centre over real music"] = lambda x: mixed(centre(x), other, 0)
    out["separated and remixed"] = remixed
    if "remover" in SUITES:
        for name, change in SUITES["remover"].items():
            out[f"remover: {name}"] = lambda x, c=change: c(x.mean(axis=1), "remover")[:, None]
    return out


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
    length = data.tracks.length[dl.stretch_of_tracks(data.tracks)]
    order = order[np.argsort(-length[order], kind="stable")]
    wanted: dict[str, dc.Bank] = {}
    names: dict[str, str] = {}
    for cluster in clusters(data):
        same = [(d.name, d.tracks) == (cluster.name, cluster.keep.sum()) for d in bank.decoders]
        if cluster.name not in STRESSED or not any(same):
            continue
        k = same.index(True)
        tracks = data.tracks.of(cluster.keep)
        parts = dl.halves(tracks)
        members = np.flatnonzero(cluster.keep)
        largest = sorted(np.unique(parts), key=lambda part: -(parts == part).sum())[:3]
        for part in largest:
            entry = dl.entry(tracks.of(parts != part), null)
            nulls = {key: bank.nulls[key].copy() for key in bank.nulls}
            lines = bank.lines.copy()
            lines[k] = entry["lines"]
            for key, array in nulls.items():
                array[k] = entry[key]
            other = dataclasses.replace(bank, lines=lines, nulls=nulls)
            rows = [r for r in order if r in set(members[parts == part]) and _public(data.rows[r])]
            for r in rows[: TRACKS // len(largest)]:
                wanted[data.rows[r]["id"]], names[data.rows[r]["id"]] = other, cluster.name
    seen: set[str] = set()
    for r in order:
        row = data.rows[r]
        new = row["label"] == "real" and _public(row) and row["group"] not in seen
        if new and data.tracks.ends[r] >= dc.CLASSES[-1] and len(seen) < REAL:
            seen.add(row["group"])
            wanted[row["id"]], names[row["id"]] = bank, "real"
    audio = {row["id"]: listened(file, SECONDS) for row, file in recordings(mirrors, set(wanted))}
    whole = [i for i in audio if len(audio[i]) >= LEAST_S * fp.RATE]
    mixed_in = next(audio[i] for i in whole if names[i] == "real")
    chosen = [(names[i], audio[i], wanted[i]) for i in whole if audio[i] is not mixed_in]
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    report["stress"] = stress(chosen, mixed_in)
    REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def fakeprints(mirrors: Path, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `data` whose file can be read, and their float32 [n, 3585] of the first 100 s."""
    adapter = Fakeprint()
    place = {row["id"]: n for n, row in enumerate(data.rows)}
    found, features = [], []
    for row, file in recordings(mirrors):
        if row["id"] not in place:
            continue
        try:
            audio = read_mono(io.BytesIO(file), adapter.input_rate, row["id"])
            features.append(adapter.features(audio[: MOST_S * adapter.input_rate]))
            found.append(place[row["id"]])
        except (AudioError, DetectorError) as error:
            print(f"{row['id']}: {error}", file=sys.stderr)
    return np.array(found), np.stack(features).astype(np.float32)


def write_fakeprint(mirrors: Path, folder: Path) -> None:
    """Add to the report what fakeprint finds by family at 1 and 5 % false alarms.

    Five folds by group; each is scored by a fit to the others, all labelled tracks of neural
    decoders against all real ones. The threshold is that of the left-out real tracks themselves.
    """
    from sklearn.linear_model import LogisticRegression

    data, _ = read_features(folder)
    rows, x = fakeprints(mirrors, data)
    made = np.array([data.rows[r]["label"] != "real" for r in rows])
    groups = np.array([data.rows[r]["group"] for r in rows])
    names = np.unique(groups)
    fold = dict(zip(names, np.random.default_rng(0).permutation(len(names)) % 5, strict=True))
    of_track = np.array([fold[g] for g in groups])
    score = np.zeros(len(rows))
    for f in range(5):
        fit, held = of_track != f, of_track == f
        middle = x[fit].mean(axis=0)
        model = LogisticRegression(class_weight="balanced", max_iter=2000)
        score[held] = model.fit(x[fit] - middle, made[fit]).decision_function(x[held] - middle)
    out: dict[str, Any] = {"real": int((~made).sum())}
    families = np.array([called(data.rows[r]["system"]) for r in rows])
    for name in (*STRESSED, "Google Lyria 3"):
        cell = {}
        for share in (0.01, 0.05):
            threshold = np.quantile(score[~made], 1 - share)
            cell[f"{share:g}"] = shares(score[made & (families == name)] > threshold)
        out[name] = cell
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    report["fakeprint"] = out
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
        fine = fp.residuals(rows * np.float32(dc.STEP_DB))[0][dc.BINS]
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
    for name in ("stress", "fakeprint"):
        verb = verbs.add_parser(name)
        verb.add_argument("mirrors", type=Path)
        verb.add_argument("folder", type=Path)
    verbs.add_parser("picture").add_argument("out", type=Path)
    args = parser.parse_args()
    if args.verb == "picture":
        picture(args.out)
    else:
        {"stress": write_stress, "fakeprint": write_fakeprint}[args.verb](args.mirrors, args.folder)


if __name__ == "__main__":
    main()
