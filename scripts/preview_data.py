"""Make a training set of augmented 4 s crops from music on disk, both classes by one chain.

The result is a preview-sized training set (thousands of crops, not the corpus of the paper): good
for checking that training works end to end and for preview weights, not for published figures.

Where the music comes from
--------------------------
The script itself fetches nothing. It reads folders of audio files that were put on disk before:

- real music, by people: game soundtracks packaged in Debian. `apt-get download PACKAGE`, then
  `dpkg-deb -x PACKAGE_*.deb FOLDER` unpacks one without installing it; a `.pk3` inside is a zip
  archive. Packages that fit: wesnoth-1.16-music, warzone2100-music, naev-data, supertux-data,
  hedgewars-data, planetblupi-music-ogg, nexuiz-music, berusky2-data, colobot-common-sounds,
  singularity-music, marsshooter-data, freedroidrpg-data, drascula-music, flare-game,
  fretsonfire-songs-sectoid, fretsonfire-songs-muldjord. Read each package's copyright file: free
  licences, but not all alike.
- AI music: `npm pack weshop-music-package-NAME@0.1.0` and `tar xzf` bring 166 tracks by Suno v5
  (CC0 1.0); NAME is activities, ambient-lofi, asian-lofi, chillhop, funk-soul, hybrid, jazzhop,
  late-night, seasonal-weather or soul-rnb.
- short clips with a manifest: a CSV with the columns path (relative to the CSV), label (1 = AI or
  re-synthesised by a neural codec, 0 = real), kind and source.

Example:

    python scripts/preview_data.py --manifest clips/manifest.csv \\
        --real deb-naev-data=raw/naev-data --ai suno-v5-weshop=raw/weshop \\
        --exclude exclude.txt --out train --seed 1 --jobs 2

What is done to a crop
----------------------
The classes differ in container, codec, bandwidth and loudness before they differ in anything that
is of interest. So one random chain, drawn without a look at the label (the generator is seeded by
the seed, the file's name and the number of the crop), treats every crop:

 1. decode (soundfile, else PyAV), mono as the mean of the channels, resampled to 44.1 kHz (soxr);
 2. random 4 s crop, 0.1 s away from the file's ends where the file is long enough; a start whose
    rms is below -50 dBFS is drawn again (8 times, then the crop is given up). A file shorter than
    4 s (2 s at least) is padded with zeros;
 3. p 0.55: band-limited at 5-20 kHz, upper half preferred, by a steep linear-phase low-pass or by
    resampling down and up again (half each);
 4. p 0.15: high shelf of +-4 dB with its corner at 0.5-6 kHz;
 5. gain to an rms of -32 to -12 dBFS; less where the peak would reach 0.99, but with p 0.05 the
    crop is let clip;
 6. codec: none 0.3, MP3 0.2, AAC in MP4 0.2, Opus 0.2, Vorbis 0.1. One channel at 64-320 kbit/s
    (Opus 64-192), log-uniform; Vorbis by its quality. Margins of 0.1 s are encoded along with the
    crop and cut away, and encoder delay is taken out, so that no codec edge lies in the crop;
 7. clipped to +-1 and stored as 16-bit integers.

The first crop of every file is "plain": of the steps above only 1, 2, 5 and 7.

What is written
---------------
`OUT/crops.npy`, int16 [rows, 176400], to be opened with `numpy.load(..., mmap_mode="r")`, and
`OUT/index.csv` with row, label, kind, source, file, start_s, chain, peak. Files are worked through
in random order and the index is flushed file by file, with complete rows only: a run that was
stopped leaves a usable, representative set (`crops.npy` then has empty rows at its end, which the
index does not list; a run that ends by itself cuts them off). Files that fail are reported, and
named in `OUT/failed.txt`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import av
import numpy as np
import scipy.signal
import soundfile as sf
import soxr

RATE = 44_100  # Hz
CROP = 4 * RATE  # samples of a crop
MARGIN = RATE // 10  # samples encoded on either side of a crop and cut away afterwards
CONTEXT_S = 0.25  # s read on either side of a crop, for resampling and filters to settle
MIN_S = 2.0  # s; shorter files are left out
SILENCE_DB = -50.0  # dBFS rms; quieter crops are not used
TRIES = 8  # draws of a crop's start before it is given up
PEAK = 0.99
SUFFIXES = {".ogg", ".oga", ".opus", ".mp3", ".m4a", ".mp4", ".aac", ".flac", ".wav", ".webm"}
CODECS = ("none", "mp3", "aac", "opus", "vorbis")
CODEC_P = (0.3, 0.2, 0.2, 0.2, 0.1)
MP3_KBPS = np.array([64, 80, 96, 112, 128, 160, 192, 224, 256, 320])
# PyAV encoder, container, sample rate, sample format
ENCODERS = {
    "mp3": ("libmp3lame", "mp3", RATE, "fltp"),
    "aac": ("aac", "mp4", RATE, "fltp"),
    "opus": ("libopus", "ogg", 48_000, "flt"),
}
FIELDS = ("row", "label", "kind", "source", "file", "start_s", "chain", "peak")

Audio = np.ndarray  # float32 [samples], mono


@dataclasses.dataclass(frozen=True)
class Item:
    """An audio file, its labels, and how many crops to take from it."""

    path: Path
    name: str  # relative to its folder; goes into the index and into the seed
    label: int
    kind: str
    source: str
    crops: int


@dataclasses.dataclass(frozen=True)
class Crop:
    """A finished crop: int16 [CROP], and what the index says about it."""

    samples: np.ndarray
    start_s: float
    chain: str
    peak: float


# --- reading ---------------------------------------------------------------------------------


def decode_av(path: Path) -> tuple[Audio, int]:
    """Decode a whole file with PyAV to mono; returns samples and sample rate."""
    blocks = []
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="fltp")
        for frame in container.decode(audio=0):
            blocks += [out.to_ndarray().mean(axis=0) for out in resampler.resample(frame)]
        rate = container.streams.audio[0].codec_context.sample_rate
    if not blocks:
        raise ValueError("no audio in it")
    return np.concatenate(blocks).astype(np.float32), rate


class Reader:
    """Random access to a file as mono 44.1 kHz: seeks if soundfile can read it, else holds it."""

    def __init__(self, path: Path) -> None:
        self.file: sf.SoundFile | None = None
        self.whole: Audio = np.zeros(0, np.float32)
        try:
            self.file = sf.SoundFile(path)
            self.rate, self.frames = self.file.samplerate, self.file.frames
            if not 0 < self.frames < 1 << 40:
                raise ValueError("length unknown")
            if self.frames < 60 * self.rate:  # short: one read is cheaper than many
                self.whole = self.file.read(dtype="float32", always_2d=True).mean(axis=1)
                self.frames, self.file = len(self.whole), None
        except Exception:
            self.whole, self.rate = decode_av(path)
            self.frames, self.file = len(self.whole), None
        self.seconds = self.frames / self.rate

    def read(self, start_s: float, stop_s: float) -> Audio:
        """Samples from `start_s` to `stop_s` at 44.1 kHz, cut at the ends of the file."""
        a = max(0, round((start_s - CONTEXT_S) * self.rate))
        b = min(self.frames, round((stop_s + CONTEXT_S) * self.rate))
        if self.file is not None:
            self.file.seek(a)
            x = self.file.read(b - a, dtype="float32", always_2d=True).mean(axis=1)
        else:
            x = self.whole[a:b]
        x = x if self.rate == RATE else soxr.resample(x, self.rate, RATE, "VHQ")
        skip = round((max(0.0, start_s) - a / self.rate) * RATE)
        return x[skip : skip + round((stop_s - max(0.0, start_s)) * RATE)].astype(np.float32)


# --- the chain -------------------------------------------------------------------------------


def rms_db(x: Audio) -> float:
    """Level in dBFS."""
    return float(10 * np.log10(np.mean(np.square(x, dtype=np.float64)) + 1e-12))


def low_pass(x: Audio, cutoff: float) -> Audio:
    """Steep linear-phase low-pass (Kaiser, 80 dB, transition of 500 Hz), without delay."""
    taps, beta = scipy.signal.kaiserord(80.0, 500.0 / (RATE / 2))
    taps |= 1
    h = scipy.signal.firwin(taps, cutoff, window=("kaiser", beta), fs=RATE)
    return scipy.signal.fftconvolve(x, h.astype(np.float32), mode="same").astype(np.float32)


def down_up(x: Audio, cutoff: float) -> Audio:
    """Resample to just above twice the cut-off and back."""
    rate = round(2 * cutoff / 0.95)
    y = soxr.resample(soxr.resample(x, RATE, rate, "HQ"), rate, RATE, "HQ")
    return fit(y, len(x))


def high_shelf(x: Audio, corner: float, gain_db: float) -> Audio:
    """Second-order high shelf, slope 0.5: a gentle tilt around `corner` Hz."""
    a = 10 ** (gain_db / 40)
    w = 2 * np.pi * corner / RATE
    c, alpha = np.cos(w), np.sin(w) / 2 * np.sqrt((a + 1 / a) * (1 / 0.5 - 1) + 2)
    r = 2 * np.sqrt(a) * alpha
    b = [
        a * (a + 1 + (a - 1) * c + r),
        -2 * a * (a - 1 + (a + 1) * c),
        a * (a + 1 + (a - 1) * c - r),
    ]
    d = [a + 1 - (a - 1) * c + r, 2 * (a - 1 - (a + 1) * c), a + 1 - (a - 1) * c - r]
    return scipy.signal.lfilter(np.array(b) / d[0], np.array(d) / d[0], x).astype(np.float32)


def fit(x: Audio, n: int) -> Audio:
    """Cut or pad with zeros at the end, to `n` samples."""
    return x[:n] if len(x) >= n else np.pad(x, (0, n - len(x)))


def through_av(x: Audio, codec: str, kbps: int) -> Audio:
    """Encode and decode mono 44.1 kHz in memory with PyAV; same length, no delay."""
    encoder, container_format, rate, sample_format = ENCODERS[codec]
    y = x if rate == RATE else soxr.resample(x, RATE, rate, "VHQ")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream: Any = container.add_stream(encoder, rate=rate)
        stream.bit_rate, stream.layout, stream.format = 1000 * kbps, "mono", sample_format
        stream.codec_context.open(strict=False)
        size = stream.codec_context.frame_size
        for i in range(0, len(y), size):
            block = np.ascontiguousarray(y[None, i : i + size], np.float32)
            frame = av.AudioFrame.from_ndarray(block, format=sample_format, layout="mono")
            frame.sample_rate, frame.pts = rate, i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer, "r") as encoded:
        blocks = [frame.to_ndarray()[0] for frame in encoded.decode(audio=0)]
    z = np.concatenate(blocks)
    return fit(z if rate == RATE else soxr.resample(z, rate, RATE, "VHQ"), len(x))


def through_vorbis(x: Audio, quality: float) -> Audio:
    """Encode and decode mono 44.1 kHz as Ogg Vorbis in memory; `quality` from 0 to 1."""
    buffer = io.BytesIO()
    with sf.SoundFile(
        buffer, "w", RATE, 1, format="OGG", subtype="VORBIS", compression_level=1 - quality
    ) as file:
        for i in range(0, len(x), 4096):  # long writes overflow the encoder's stack
            file.write(x[i : i + 4096])
    buffer.seek(0)
    return fit(sf.read(buffer, dtype="float32")[0], len(x))


def through_codec(x: Audio, rng: np.random.Generator) -> tuple[Audio, str]:
    """Draw a codec and its bit rate; returns the decoded signal and what was drawn."""
    codec = str(rng.choice(CODECS, p=CODEC_P))
    top = 192 if codec == "opus" else 320
    kbps = float(np.exp(rng.uniform(np.log(64), np.log(top))))
    quality = float(rng.uniform(0.05, 0.95))
    if codec == "none":
        return x, "codec=none"
    if codec == "vorbis":
        return through_vorbis(x, quality), f"codec=vorbis q{quality:.2f}"
    if codec == "mp3":
        kbps = float(MP3_KBPS[np.abs(MP3_KBPS - kbps).argmin()])
    return through_av(x, codec, round(kbps)), f"codec={codec} {kbps:.0f}k"


def augment(x: Audio, crop: slice, plain: bool, rng: np.random.Generator) -> tuple[Audio, str]:
    """Steps 3 to 7 of the chain on a crop with its margins; returns the crop and a description."""
    chain = []
    if not plain and rng.random() < 0.55:
        cutoff = 5_000 + 15_000 * rng.random() ** 0.6
        if rng.random() < 0.5:
            x = low_pass(x, cutoff)
            chain.append(f"fir={cutoff:.0f}")
        else:
            x = down_up(x, cutoff)
            chain.append(f"downup={cutoff:.0f}")
    if not plain and rng.random() < 0.15:
        corner, gain_db = 500 * 12 ** rng.random(), rng.uniform(-4, 4)
        x = high_shelf(x, corner, gain_db)
        chain.append(f"shelf={corner:.0f}Hz{gain_db:+.1f}dB")
    gain = 10 ** ((rng.uniform(-32, -12) - rms_db(x[crop])) / 20)
    if rng.random() < 0.05:
        chain.append("clip")
    else:
        gain = min(gain, PEAK / max(float(np.abs(x).max()), 1e-9))
    x = np.clip(x * np.float32(gain), -1, 1)
    chain.append(f"gain={20 * np.log10(gain):+.1f}dB")
    if plain:
        chain.insert(0, "plain")
    else:
        x, codec = through_codec(x, rng)
        chain.append(codec)
    return np.clip(x[crop], -1, 1), ";".join(chain)


def generator(seed: int, item: Item, number: int) -> np.random.Generator:
    """The random generator of one crop; the label has no part in it."""
    key = f"{seed}/{item.source}/{item.name}/{number}".encode()
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()))


def one_crop(reader: Reader, plain: bool, rng: np.random.Generator) -> Crop | None:
    """A crop at a random place, through the chain; None if only silence was found."""
    crop_s, margin_s = CROP / RATE, MARGIN / RATE
    edge = margin_s if reader.seconds >= crop_s + 2 * margin_s else 0.0
    for _ in range(TRIES):
        start = float(rng.uniform(edge, max(edge, reader.seconds - crop_s - edge)))
        first = max(0.0, start - margin_s)
        x = reader.read(first, start + crop_s + margin_s)
        skip = round((start - first) * RATE)
        x = x if len(x) >= skip + CROP else fit(x, skip + CROP)
        crop = slice(skip, skip + CROP)
        if np.isfinite(x).all() and rms_db(x[crop]) >= SILENCE_DB:
            break
    else:
        return None
    y, chain = augment(x, crop, plain, rng)
    samples = np.round(y * 32767).astype(np.int16)
    return Crop(samples, round(start, 3), chain, round(float(np.abs(y).max()), 4))


def work(item: Item, seed: int) -> tuple[list[Crop], str]:
    """All crops of a file, and a complaint ("" if there is none). Runs in a worker process."""
    crops: list[Crop] = []
    try:
        av.logging.set_level(av.logging.PANIC)
        reader = Reader(item.path)
        if reader.seconds < MIN_S:
            return [], f"too short ({reader.seconds:.1f} s)"
        for number in range(item.crops):
            crop = one_crop(reader, number == 0, generator(seed, item, number))
            if crop is not None:
                crops.append(crop)
    except Exception as error:  # whatever is wrong with one file, the others go on
        return crops, f"{type(error).__name__}: {error}"
    return crops, "" if len(crops) == item.crops else f"{item.crops - len(crops)} silent crops"


# --- the set ---------------------------------------------------------------------------------


def from_manifest(manifest: Path, crops: int) -> Iterator[Item]:
    """The clips of a manifest."""
    with manifest.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            path = manifest.parent / row["path"]
            yield Item(path, row["path"], int(row["label"]), row["kind"], row["source"], crops)


def from_folder(
    spec: str, label: int, crops: int, min_s: float, limit: int, rng: np.random.Generator
) -> list[Item]:
    """The tracks of `NAME=FOLDER` that last `min_s` at least; `limit` crops in all (0: any)."""
    name, _, folder = spec.partition("=")
    if not folder or not Path(folder).is_dir():
        raise SystemExit(f"NAME=FOLDER expected, with a folder that exists: {spec}")
    root, kind, items = Path(folder), "ai" if label else "real", []
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.is_symlink() or not path.is_file():
            continue
        try:
            seconds = sf.info(str(path)).duration
        except sf.LibsndfileError:
            seconds = min_s  # PyAV may be able to read it
        if seconds >= min_s:
            items.append(Item(path, path.relative_to(root).as_posix(), label, kind, name, crops))
    if limit:
        chosen = rng.permutation(len(items))[: max(1, limit // crops)]
        items = [items[i] for i in sorted(chosen)]
    return items


def collect(args: argparse.Namespace, rng: np.random.Generator) -> list[Item]:
    """Everything to be worked through, in random order."""
    items = list(from_manifest(args.manifest, args.crops_per_clip)) if args.manifest else []
    for label, specs in ((0, args.real), (1, args.ai)):
        for spec in specs:
            items += from_folder(
                spec, label, args.crops_per_track, args.min_track_s, args.max_per_source, rng
            )
    if args.exclude:
        lines = args.exclude.read_text(encoding="utf-8").splitlines()
        excluded = {Path(line.strip()).resolve() for line in lines if line.strip()}
        items = [item for item in items if item.path.resolve() not in excluded]
    return [items[i] for i in rng.permutation(len(items))]


def shorten(path: Path, rows: int) -> None:
    """Cut the empty rows off the end of `crops.npy`, in place."""
    header = {"descr": "<i2", "fortran_order": False, "shape": (rows, CROP)}
    with path.open("r+b") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        data = file.tell()
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
        if file.tell() != data:
            raise RuntimeError("header length changed")
        file.truncate(data + 2 * CROP * rows)


def in_workers(items: list[Item], seed: int, jobs: int) -> Iterator[tuple[Item, list[Crop], str]]:
    """Work through the items in `jobs` processes; results as they come, few in memory at once."""
    queue = iter(items)
    running: dict[Future[tuple[list[Crop], str]], Item] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        while True:
            while len(running) < 3 * jobs and (item := next(queue, None)) is not None:
                running[pool.submit(work, item, seed)] = item
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield (running.pop(future), *future.result())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--manifest", type=Path, help="CSV of short clips")
    for name in ("--real", "--ai"):
        parser.add_argument(name, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--exclude", type=Path, help="text file, one path of an audio file a line")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crops-per-clip", type=int, default=8)
    parser.add_argument("--crops-per-track", type=int, default=12)
    parser.add_argument("--min-track-s", type=float, default=30.0, help="shorter ones are left out")
    parser.add_argument("--max-per-source", type=int, default=0, help="crops of one folder; 0: any")
    parser.add_argument("--jobs", type=int, default=2)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write the set."""
    args = parse(argv)
    items = collect(args, np.random.default_rng(args.seed))
    capacity = sum(item.crops for item in items)
    if not capacity:
        raise SystemExit("nothing to do: give --manifest, --real or --ai")
    print(f"{len(items)} files, {capacity} crops planned", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    crops_path = args.out / "crops.npy"
    store = np.lib.format.open_memmap(crops_path, "w+", dtype=np.int16, shape=(capacity, CROP))
    begun, row, kinds = time.monotonic(), 0, Counter[str]()
    with (
        (args.out / "index.csv").open("w", newline="", encoding="utf-8") as index_file,
        (args.out / "failed.txt").open("w", encoding="utf-8") as failed_file,
    ):
        index = csv.writer(index_file, lineterminator="\n")
        index.writerow(FIELDS)
        for done, (item, crops, complaint) in enumerate(in_workers(items, args.seed, args.jobs), 1):
            lines = []
            for crop in crops:
                store[row] = crop.samples
                about = (item.label, item.kind, item.source, item.name)
                lines.append((row, *about, crop.start_s, crop.chain, crop.peak))
                row += 1
            index.writerows(lines)
            index_file.flush()
            kinds[item.kind] += len(crops)
            if complaint:
                print(f"{item.source}/{item.name}: {complaint}", file=sys.stderr)
                failed_file.write(f"{item.source}/{item.name}\t{complaint}\n")
                failed_file.flush()
            if done % 50 == 0 or done == len(items):
                passed = time.monotonic() - begun
                print(f"{done}/{len(items)} files, {row} crops, {passed:.0f} s", flush=True)
    store.flush()
    del store
    shorten(crops_path, row)
    print(", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items())))


if __name__ == "__main__":
    main()
