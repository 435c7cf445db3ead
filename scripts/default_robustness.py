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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from artifactnet_jax import dsp_numpy
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.bench.sanity import codec_delta
from artifactnet_jax.bench.stress import CHAINS, SUITES, laundered
from artifactnet_jax.data.augment import Chain, to_int16
from artifactnet_jax.data.decoded import AudioCache, prepare
from artifactnet_jax.data.manifest import Row, read_manifest, read_manifests
from artifactnet_jax.data.records import Crops
from artifactnet_jax.data.teachers import Teacher, open_teacher
from artifactnet_jax.forward import texture_statistics
from artifactnet_jax.recording import to_float
from artifactnet_jax.texture import logit
from artifactnet_jax.train.run import native_weights
from artifactnet_jax.train.texture import Calibration
from artifactnet_jax.train.texture_head import Fit, by_model, collect, head
from artifactnet_jax.weights import Weights

PLAIN = Chain()
VERSIONS = {"as it is": PLAIN}
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


class Robustness:
    """A texture head that was fitted without some groups, and crops of recordings of these."""

    def __init__(
        self,
        weights: Weights,
        rows: Sequence[Row],
        cache: AudioCache,
        tensors: dict[str, np.ndarray],
    ):
        self.config, self.rows, self._tensors = weights.config, rows, tensors
        self._calibration = Calibration(**weights.provenance["history"][-1]["calibration"])
        self._size = self.config.front_end.segment_samples
        self._crops = Crops(rows, cache, self._size, cache.folder)
        self._longer = Crops(rows, cache, round(LONGER * self._size), cache.folder)

    def score_of(self, audio: np.ndarray) -> float:
        """P(AI) of the middle segment, as a file of 16 bits would hold it."""
        first = (len(audio) - self._size) // 2
        audio = to_float(to_int16(audio[first : first + self._size]))
        magnitude = dsp_numpy.stft_magnitude(audio, self.config.front_end)
        values = texture_statistics(audio, magnitude, self.config, dsp_numpy)
        assert self.config.texture is not None
        own = np.array(float(logit(values, self.config.texture, self._tensors, dsp_numpy)))
        return float(self._calibration.scores(own, np.zeros(())))

    def crop(self, k: int, chain: Chain = PLAIN) -> np.ndarray:
        """A segment of recording k through a chain, always from the same place."""
        return self._crops.crop(k, self._crops.generator(k, "robustness"), chain)[0]

    def longer(self, k: int) -> np.ndarray:
        """`LONGER` segments of recording k."""
        return self._longer.crop(k, self._longer.generator(k, "robustness"), PLAIN)[0]

    def versions(self, k: int) -> list[float]:
        """Scores of recording k in all of `VERSIONS`."""
        return [self.score_of(self.crop(k, chain)) for chain in VERSIONS.values()]

    def laundered(self, k: int) -> list[float]:
        """Scores of recording k after all of `LAUNDERED`."""
        audio = self.longer(k)
        return [self.score_of(change(audio, str(k))) for change in LAUNDERED.values()]

    def mixed(self, k: int, real: int) -> list[float]:
        """Scores of an AI recording over a real one, the AI one louder by each of `LOUDER_DB`."""
        below, above = self.crop(real), self.crop(k)
        above *= np.sqrt(np.mean(below**2)) / max(float(np.sqrt(np.mean(above**2))), 1e-6)
        mixes = [above * 10 ** (db / 20) + below for db in LOUDER_DB]
        return [self.score_of(0.5 * mix / max(float(np.abs(mix).max()), 1e-6)) for mix in mixes]


def fitted_without(args: argparse.Namespace) -> Robustness:
    """The head fitted to three quarters of the groups, and recordings of the others."""
    weights, cache = native_weights(args.weights), AudioCache(args.cache)
    config, fit = weights.config, Fit(**weights.provenance["history"][-1]["fit"])
    assert config.texture is not None
    rows, _ = prepare(read_manifest(args.data), cache, max_bad=0.05, jobs=cpu_count())
    helpers = by_model(read_manifests(args.also)) if args.also else []
    helpers, _ = prepare(helpers, cache, max_bad=0.05, jobs=cpu_count()) if helpers else ([], [])
    out = set(sorted({row.group for row in rows})[::4])
    known = [row for row in [*rows, *helpers] if row.group not in out]
    tensors = head(config.texture, known, collect(known, cache, config, fit), fit)
    chosen, taken = [], dict.fromkeys((row.source for row in rows), 0)
    for row in rows:
        if row.group in out and taken[row.source] < args.each:
            taken[row.source] += 1
            chosen.append(row)
    print(f"{len(known)} recordings known, {len(chosen)} evaluated", file=sys.stderr)
    return Robustness(weights, chosen, cache, tensors)


def table_of(fitted: Robustness, teacher: Teacher | None, separated: int) -> dict[str, Any]:
    """Everything that is reported; `separated`: recordings of a class that `teacher` launders."""
    label = np.array([row.label for row in fitted.rows])
    threshold, rng = fitted.config.verdict.threshold, np.random.default_rng(0)
    real, ai = (np.flatnonzero(label == k) for k in (0, 1))
    partners = rng.choice(real, len(ai)).tolist()
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cpu_count()) as pool:
        score = np.array(list(pool.map(fitted.versions, range(len(label)))))
        after = np.array(list(pool.map(fitted.laundered, range(len(label)))))
        both = np.array(list(pool.map(fitted.mixed, ai.tolist(), partners)))
    tracks = [{"id": k, "label": int(value)} for k, value in enumerate(label)]
    delta = codec_delta(tracks, {v: dict(enumerate(score[:, j])) for j, v in enumerate(VERSIONS)})
    assert delta is not None

    def figures(changed: np.ndarray, before: np.ndarray) -> dict[str, float | int]:
        return {
            "recordings": len(changed),
            "mean": float(changed.mean()),
            "called_ai": float((changed >= threshold).mean()),
            "moved": float(np.abs(changed - before).mean()),
        }

    table: dict[str, dict[str, Any]] = {}
    for name, own in (("real", real), ("ai", ai)):
        plain = score[own, 0]
        table[name] = {
            "recordings": len(own),
            "sources": sorted({fitted.rows[k].source for k in own.tolist()}),
            "cross_codec_delta": delta[name]["mean"],
            "cross_codec_delta_of_means": delta[name]["of_means"],
            "versions": {v: figures(score[own, j], plain) for j, v in enumerate(VERSIONS)},
            "laundered": {v: figures(after[own, j], plain) for j, v in enumerate(LAUNDERED)},
        }
        if teacher is not None:
            chosen = own[:: max(1, -(-len(own) // separated))]
            stems = [
                fitted.score_of(laundered(fitted.longer(k), teacher, 1)) for k in chosen.tolist()
            ]
            table[name]["laundered"]["separated"] = figures(np.array(stems), score[chosen, 0])
    table["mixed"] = {
        f"{db:+d} dB": figures(both[:, j], score[ai, 0]) for j, db in enumerate(LOUDER_DB)
    }
    table["spliced"] = spliced(score[real, 0], score[ai, 0], threshold, rng)
    return table


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
    teacher = open_teacher(args.teacher) if args.teacher else None
    print(json.dumps(table_of(fitted_without(args), teacher, args.separated), indent=1))


if __name__ == "__main__":
    main()
