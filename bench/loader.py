"""Time the training data: codecs, changed crops, and how fast batches come.

Run as `python -m artifactnet_jax.bench.loader MANIFEST`. Examples per second depend on what else
the machine does; processor milliseconds per example hardly do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

from artifactnet_jax.backends import cpu_count
from artifactnet_jax.data.augment import CODECS, MARGIN, RATE, Augment, encode_decode
from artifactnet_jax.data.decoded import AudioCache, prepare
from artifactnet_jax.data.manifest import read_manifest
from artifactnet_jax.data.records import Examples, batches
from artifactnet_jax.recording import to_float

BATCH = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"augment": None},
    "changed, one codec": {"augment": Augment()},
    "changed, four codecs": {"augment": Augment(), "versions": CODECS},
    "draws on disk, one codec": {"augment": Augment(), "draws": 1},
    "draws on disk, four codecs": {"augment": Augment(), "versions": CODECS, "draws": 1},
}


def codec_times(audio: np.ndarray, kbps: int, rounds: int) -> dict[str, float]:
    """Processor milliseconds for float32 [n, 2] and its left channel, by codec."""
    times: dict[str, float] = {}
    for channels, name in ((1, "mono"), (2, "stereo")):
        pcm = np.ascontiguousarray(audio[:, :channels])
        for codec in (*CODECS, "vorbis"):
            found = []
            for _ in range(rounds):
                began = time.process_time()
                encode_decode(pcm, codec, kbps)
                found.append(1000 * (time.process_time() - began))
            times[f"{codec} {name}"] = round(statistics.median(found), 1)
    return times


def pace(examples: Examples, workers: int, seconds: float) -> dict[str, float]:
    """Examples per second of a loader, after its first batch, and processor time for each."""
    with contextlib.closing(batches(examples, BATCH, workers=workers)) as stream:
        next(stream)
        count, began, busy = 0, time.perf_counter(), time.process_time()
        while count == 0 or time.perf_counter() < began + seconds:
            count += len(next(stream)["label"])
        rate = count / (time.perf_counter() - began)
        return {
            "examples_per_s": round(rate, 1),
            "cpu_ms_per_example": round(1000 * (time.process_time() - busy) / count, 1),
        }


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("manifest", metavar="MANIFEST")
    parser.add_argument("--rows", type=int, default=48, help="tracks, evenly over the manifest")
    parser.add_argument("--crop", type=float, default=4.0, help="seconds of an example")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="of each codec")
    parser.add_argument("--kbps", type=int, default=128, help="of each codec")
    parser.add_argument("--workers", type=int, nargs="+", help="default: 1, and one per CPU")
    args = parser.parse_args(argv)
    workers, samples = args.workers or sorted({1, cpu_count()}), round(args.crop * RATE)
    rows = read_manifest(args.manifest)
    rows = rows[:: max(1, len(rows) // args.rows)]
    loaders: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = AudioCache(folder)
        began = time.perf_counter()
        rows, _ = prepare(rows, cache, max_bad=1.0, jobs=max(workers))
        decoding = time.perf_counter() - began
        tracks = [cache.get(row.path) for row in rows]
        for name, settings in SETTINGS.items():
            examples = Examples(rows, cache, samples=samples, seed=0, **settings)
            if settings.get("draws"):  # first every draw once, untimed
                missing = set(range(len(rows)))
                for i in range(200 * len(rows)):
                    if not missing:
                        break
                    missing.discard(int(examples[i]["row"]))
            for number in workers:
                print(f"{name}: workers {number}", file=sys.stderr)
                found = pace(examples, number, args.seconds)
                loaders.setdefault(name, {})[f"workers {number}"] = found
        stereo = np.concatenate([np.broadcast_to(track, (len(track), 2)) for track in tracks])
        crop = to_float(stereo[: samples + 2 * MARGIN])
    results = {
        "cpus": cpu_count(),
        "decoding_times_real_time": round(len(stereo) / RATE / decoding),
        "codec_cpu_ms": codec_times(crop, args.kbps, args.rounds),
        "loaders": loaders,
    }
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
