"""What codecs, bandwidth, level and other changes do to scores of recordings that were left out.

    python scripts/default_robustness.py --data RAW/data.csv --also RAW/rvq/manifest.csv \
        --weights edge.safetensors > table.json

A texture head is fitted to three quarters of the groups (every fourth by name is left out), as
`artifactnet-jax texture` does it (its statistics are shared through the cache), with the
calibration of `--weights`. Up to `--each` recordings of every source of the others are cut to one
segment; each segment is changed as in the stress suites, and scored by that head. The network,
whose share is small, is left out. Beside the table of changes there are

- `laundered`: stretched, shifted in pitch, re-recorded in a room, coded twice at a low rate, and
  with `--teacher` (as of `bench accuracy`) taken apart into stems and put together again;
- `mixed`: an AI recording and a real one sounding together, the AI one louder by so many dB;
- `spliced`: tracks of eight segments drawn from one real and one AI source, by how many are AI.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from artifactnet_jax import dsp_numpy
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.bench.sanity import codec_delta
from artifactnet_jax.bench.stress import CHAINS, SUITES, laundered
from artifactnet_jax.data.augment import Chain, to_int16
from artifactnet_jax.data.manifest import read_manifest, read_manifests
from artifactnet_jax.data.records import AudioCache, Crops, prepare
from artifactnet_jax.data.teachers import open_teacher
from artifactnet_jax.detector import open_weights
from artifactnet_jax.forward import texture_statistics
from artifactnet_jax.texture import logit
from artifactnet_jax.train.texture import Calibration, Fit, by_model, collect, head

VERSIONS = {"as it is": Chain()}
VERSIONS |= {name: chain for suite in CHAINS.values() for name, chain in suite.items()}
LONGER = 1.1  # times a segment: what is cut before changes of tempo
LOUDER_DB = (12, 6, 0, -6, -12)  # of the AI recording in a mix
SEGMENTS, DRAWS = 8, 4000  # of a spliced track; spliced tracks


LAUNDERED: dict[str, Callable[[np.ndarray, str], np.ndarray]] = {
    **{name: SUITES[suite][name] for suite in ("stretch", "pitch") for name in SUITES[suite]},
    **SUITES["rerecording"],
    "mp3-64, twice": lambda audio, track: SUITES["codecs"]["mp3-64"](
        SUITES["codecs"]["mp3-64"](audio, track), track
    ),
}


def spliced(
    real: np.ndarray, ai: np.ndarray, threshold: float, rng: np.random.Generator
) -> dict[str, float]:
    """Share of tracks of `SEGMENTS` segments that is called AI, by how many of them are AI.

    Their segments are drawn from the scores of real and AI recordings; the median decides.
    """
    found = {}
    for count in range(0, SEGMENTS + 1, 2):
        parts = [rng.choice(own, (DRAWS, n)) for own, n in ((ai, count), (real, SEGMENTS - count))]
        called = np.median(np.concatenate(parts, axis=1), axis=1) >= threshold
        found[f"{count} of {SEGMENTS}"] = float(called.mean())
    return found


def main() -> None:
    """Fit, change, score, and print the table as JSON."""
    parser = argparse.ArgumentParser(description="see the docstring")
    parser.add_argument("--data", required=True)
    parser.add_argument("--also", nargs="+", default=[], help="as of texture")
    parser.add_argument("--weights", help="with a calibrated texture head (default: ours)")
    parser.add_argument("--cache")
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--teacher", help="a separator to launder with, such as htdemucs.onnx")
    parser.add_argument("--separated", type=int, default=24, help="recordings of a class, of these")
    args = parser.parse_args()
    rows = read_manifest(args.data)
    weights = open_weights(args.weights)
    config, [*_, last] = weights.config, weights.provenance["history"]
    assert config.texture is not None
    calibration, fit = Calibration(**last["calibration"]), Fit(**last["fit"])
    cache = AudioCache(args.cache)
    rows, _ = prepare(rows, cache, max_bad=0.05, jobs=cpu_count())
    helpers = by_model(read_manifests(args.also)) if args.also else []
    helpers, _ = prepare(helpers, cache, max_bad=0.05, jobs=cpu_count()) if helpers else ([], [])
    out = set(sorted({row.group for row in rows})[::4])
    known = [row for row in [*rows, *helpers] if row.group not in out]
    tensors = head(config.texture, known, collect(known, cache, config, fit), fit)
    judged, taken = [], dict.fromkeys((row.source for row in rows), 0)
    for row in rows:
        if row.group in out and taken[row.source] < args.each:
            taken[row.source] += 1
            judged.append(row)
    print(f"{len(known)} recordings known, {len(judged)} judged", file=sys.stderr)
    size = config.front_end.segment_samples
    crops = Crops(judged, cache, size, cache.folder)
    longer = Crops(judged, cache, round(LONGER * size), cache.folder)
    label = np.array([row.label for row in judged])

    def score_of(audio: np.ndarray) -> float:
        """P(AI) of the middle segment, as a file of 16 bits would hold it."""
        first = (len(audio) - size) // 2
        audio = to_int16(audio[first : first + size]).astype(np.float32) / np.float32(32768)
        magnitude = dsp_numpy.stft_magnitude(audio, config.front_end)
        values = texture_statistics(audio, magnitude, config, dsp_numpy)
        own = np.array(float(logit(values, config.texture, tensors, dsp_numpy)))
        return float(calibration.scores(own, np.zeros(())))

    def plain(k: int, of: Crops = crops) -> np.ndarray:
        return of.crop(k, of.generator(k, "robustness"), Chain())[0]

    def scores(k: int) -> list[float]:
        # The same place of the recording for all.
        chains = VERSIONS.values()
        return [score_of(crops.crop(k, crops.generator(k, "robustness"), c)[0]) for c in chains]

    def washed(k: int) -> list[float]:
        audio = plain(k, longer)
        return [score_of(change(audio, str(k))) for change in LAUNDERED.values()]

    def mixed(k: int) -> list[float]:
        """An AI recording and a real one of the same loudness, the AI one louder by so much."""
        real = plain(partner[k])
        ai = plain(k)
        ai = ai * (np.sqrt(np.mean(real**2)) / max(float(np.sqrt(np.mean(ai**2))), 1e-6))
        mixes = [ai * 10 ** (db / 20) + real for db in LOUDER_DB]
        return [score_of(0.5 * mix / max(float(np.abs(mix).max()), 1e-6)) for mix in mixes]

    rng = np.random.default_rng(0)
    of_class = [np.flatnonzero(label == k) for k in (0, 1)]
    partner = dict(
        zip(of_class[1].tolist(), rng.choice(of_class[0], len(of_class[1])).tolist(), strict=True)
    )
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cpu_count()) as pool:
        score = np.array(list(pool.map(scores, range(len(judged)))))
        after = np.array(list(pool.map(washed, range(len(judged)))))
        both = np.array(list(pool.map(mixed, of_class[1].tolist())))
    table: dict[str, dict[str, Any]] = {}
    names = list(VERSIONS)
    tracks = [{"id": k, "label": int(value)} for k, value in enumerate(label)]
    delta = codec_delta(tracks, {v: dict(enumerate(score[:, j])) for j, v in enumerate(names)})
    assert delta is not None
    threshold = config.verdict.threshold
    teacher = open_teacher(args.teacher) if args.teacher else None

    def figures(changed: np.ndarray, before: np.ndarray) -> dict[str, float | int]:
        return {
            "recordings": len(changed),
            "mean": float(changed.mean()),
            "called_ai": float((changed >= threshold).mean()),
            "moved": float(np.abs(changed - before).mean()),
        }

    for k, name in enumerate(("real", "ai")):
        own = score[label == k]
        table[name] = {
            "recordings": len(own),
            "sources": sorted({row.source for row in judged if row.label == k}),
            "cross_codec_delta": delta[name]["mean"],
            "cross_codec_delta_of_means": delta[name]["of_means"],
            "versions": {version: figures(own[:, j], own[:, 0]) for j, version in enumerate(names)},
            "laundered": {
                version: figures(after[label == k][:, j], own[:, 0])
                for j, version in enumerate(LAUNDERED)
            },
        }
        if teacher is not None:
            chosen = of_class[k][:: max(1, -(-len(own) // args.separated))]
            stems = [score_of(laundered(plain(i, longer), teacher, 1)) for i in chosen.tolist()]
            table[name]["laundered"]["separated"] = figures(np.array(stems), score[chosen, 0])
    table["mixed"] = {
        f"{db:+d} dB": figures(both[:, j], score[label == 1, 0]) for j, db in enumerate(LOUDER_DB)
    }
    table["spliced"] = spliced(score[label == 0, 0], score[label == 1, 0], threshold, rng)
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
