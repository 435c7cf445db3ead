"""What codecs, bandwidth, level and other changes do to scores of recordings that were left out.

    python scripts/default_robustness.py --data RAW/data.csv --also RAW/rvq/manifest.csv \
        --weights edge.safetensors > table.json

A texture head is fitted to three quarters of the groups (every fourth by name is left out), as
`artifactnet-jax texture` does it (its statistics are shared through the cache), with the
calibration of `--weights`. Up to `--each` recordings of every source of the others are cut to one
segment; each segment is changed as in the stress suites, and scored by that head. The network,
whose share is small, is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from artifactnet_jax.backends import cpu_count
from artifactnet_jax.bench.sanity import codec_delta
from artifactnet_jax.bench.stress import CHAINS
from artifactnet_jax.detector import open_weights
from artifactnet_jax.reference import stft_magnitude, texture_statistics
from artifactnet_jax.texture import logit
from artifactnet_jax.train.augment import Chain
from artifactnet_jax.train.data import AudioCache, Crops, prepare
from artifactnet_jax.train.manifest import read_manifest, read_manifests
from artifactnet_jax.train.texture import Calibration, Fit, by_model, collect, head

VERSIONS = {"as it is": Chain()}
VERSIONS |= {name: chain for suite in CHAINS.values() for name, chain in suite.items()}


def main() -> None:
    """Fit, change, score, and print the table as JSON."""
    parser = argparse.ArgumentParser(description="see the docstring")
    parser.add_argument("--data", required=True)
    parser.add_argument("--also", nargs="+", default=[], help="as of texture")
    parser.add_argument("--weights", help="with a calibrated texture head (default: ours)")
    parser.add_argument("--cache")
    parser.add_argument("--each", type=int, default=4)
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
    crops = Crops(judged, cache, config.front_end.segment_samples, cache.folder)

    def scores(k: int) -> np.ndarray:
        logits = []
        for chain in VERSIONS.values():  # the same place of the recording for all
            audio = crops.crop(k, crops.generator(k, "robustness"), chain)[0]
            magnitude = stft_magnitude(audio, config.front_end)
            values = texture_statistics(audio, magnitude, config)
            logits.append(float(logit(values, config.texture, tensors)))
        return calibration.scores(np.array(logits), np.zeros(len(logits)))

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cpu_count()) as pool:
        score = np.stack(list(pool.map(scores, range(len(judged)))))
    label = np.array([row.label for row in judged])
    table: dict[str, dict[str, object]] = {}
    names = list(VERSIONS)
    tracks = [{"id": k, "label": int(value)} for k, value in enumerate(label)]
    delta = codec_delta(tracks, {v: dict(enumerate(score[:, j])) for j, v in enumerate(names)})
    assert delta is not None
    for k, name in enumerate(("real", "ai")):
        own = score[label == k]
        table[name] = {
            "recordings": len(own),
            "sources": sorted({row.source for row in judged if row.label == k}),
            "cross_codec_delta": delta[name]["mean"],
            "cross_codec_delta_of_means": delta[name]["of_means"],
            "versions": {
                version: {
                    "mean": float(own[:, j].mean()),
                    "called_ai": float((own[:, j] >= config.verdict.threshold).mean()),
                    "moved": float(np.abs(own[:, j] - own[:, 0]).mean()),
                }
                for j, version in enumerate(names)
            },
        }
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
