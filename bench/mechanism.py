"""What the residual is like: bandwidth, mask, energy; and what each channel is worth.

Effective bandwidth (paper, appendix C): the smallest frequency below which 95 % of the residual's
energy lies, summed over the frames of a track (n_fft 2048, hop 512). Its confounders stand beside
it: the same figure of the track itself, its cut-off (a low-passed master has a narrow residual) and
its crest factor (so has a compressed one). It is a correlate, and no proof.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from artifactnet_jax.audio import BAND_FLOOR, SegmentReader
from artifactnet_jax.bench.adapter import RATE
from artifactnet_jax.bench.detectors import ArtifactNet
from artifactnet_jax.config import FrontEnd
from artifactnet_jax.data.manifest import LABELS
from artifactnet_jax.data.teachers import Teacher
from artifactnet_jax.dsp_numpy import effective_bandwidth, sigmoid, stft_magnitude
from artifactnet_jax.evaluation import auc
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.text import USAGE, CommandError
from artifactnet_jax.weights import Weights

SEGMENTS = 3  # evenly spaced ones of a track
FLAT_MASK = 0.01  # public runner: a mask whose standard deviation is smaller is a bug
_FRONT_END = FrontEnd()


class Mechanism:
    """Looks into our detector; native weights only. CommandError for a foreign graph.

    `basis` are tracks, mono audio [n] at 44.1 kHz: an ablated channel is replaced by its mean over
    them, one number for each mel band.
    """

    def __init__(
        self, detector: ArtifactNet, teacher: Teacher, basis: Iterable[np.ndarray]
    ) -> None:
        weights = detector.detector.weights
        if not isinstance(weights, Weights) or weights.whole_song:
            cause = f"--mechanism: {detector.name} has no stages of a segment to look at"
            raise CommandError(f"{cause}: give artifactnet with native weights", USAGE)
        self._config = weights.config
        self._network = NumpyNetwork(weights.config, weights.tensors)
        self._teacher = teacher
        self.mask_max: float | None = weights.config.unet.mask_max
        self._means = self._mean_channels(basis)

    def _mean_channels(self, basis: Iterable[np.ndarray]) -> np.ndarray:
        means = [
            stages["channels"].mean(axis=-1, dtype=np.float64)
            for audio in basis
            for stages in self._segments(audio)
        ]
        if not means:
            raise CommandError("--mechanism: no audible track to take the mean channels of", USAGE)
        mean: np.ndarray = np.mean(means, axis=0).astype(np.float32)  # [C, n_mels]
        return mean

    def _segments(self, audio: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """Every stage of `SEGMENTS` evenly spaced segments, silent ones left out."""
        front_end, verdict = self._config.front_end, self._config.verdict
        for segment in SegmentReader((audio, RATE), front_end, verdict, SEGMENTS):
            if segment.peak > verdict.silence_peak:
                with threadpool_limits(limits=1, user_api="blas"):  # as backend `numpy` has it
                    found = self._network.stages(segment.samples)
                yield found

    def track(self, audio: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
        """Figures of one track, and its score under every ablation; both {} of a silent one.

        `mean_mask`, `mask_spread` (standard deviation), `residual_energy_fraction` (of the track's
        energy), `effective_bandwidth_hz` of the UNet's residual, `teacher_bandwidth_hz` of the
        teacher's, and the confounders `input_bandwidth_hz`, `cutoff_hz` (highest bin within 90 dB
        of the strongest) and `crest_db`.

        A score is the median over segments. "none": nothing is replaced; "without CHANNEL"; "mask
        unbounded": the same weights, their mask's bound 1; "without the texture head".
        """
        masks, energies = [], []
        scores: dict[str, list[float]] = defaultdict(list)
        for stages in self._segments(audio):
            masks.append((float(stages["mask"].mean()), float(stages["mask"].std())))
            energies.append(
                [
                    np.square(stages[name]).sum(axis=-1, dtype=np.float64)
                    for name in ("magnitude", "residual")
                ]
            )
            with threadpool_limits(limits=1, user_api="blas"):  # small products: threads only wait
                for name, score in self._ablated(stages):
                    scores[name].append(score)
        if not masks:
            return {}, {}
        whole, residual = np.sum(energies, axis=0)
        loud = np.flatnonzero(whole > BAND_FLOOR * whole.max())
        rms = float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
        left = np.concatenate(list(self._teacher.residual(audio[:, None])))
        figures = {
            "mean_mask": float(np.mean([mean for mean, _ in masks])),
            "mask_spread": float(np.mean([spread for _, spread in masks])),
            "residual_energy_fraction": float(residual.sum() / whole.sum()),
            "effective_bandwidth_hz": effective_bandwidth(residual, RATE),
            "teacher_bandwidth_hz": effective_bandwidth(energy_of(left), RATE),
            "input_bandwidth_hz": effective_bandwidth(whole, RATE),
            "cutoff_hz": float(loud[-1]) * RATE / 2 / (len(whole) - 1),
            "crest_db": 20 * float(np.log10(np.abs(audio).max() / rms)),
        }
        return figures, {name: float(np.median(values)) for name, values in scores.items()}

    def _ablated(self, stages: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float]]:
        """Name and score of one segment under every ablation."""
        network, maps = self._network, stages["channels"]
        own, texture = stages["network_logit"], float(stages["texture_logit"])

        def score(logit: Any) -> float:
            return float(sigmoid(np.asarray(logit, np.float64)))

        yield "none", score(own + texture)
        for index, name in enumerate(self._config.front_end.channels):
            changed = maps.copy()
            changed[index] = self._means[index][:, None]
            yield f"without {name}", score(network.classify(changed) + texture)
        if self.mask_max is not None:  # a factor on the mask's sigmoid
            parts = network.parts(stages["mask"] / self.mask_max * stages["magnitude"])
            yield "mask unbounded", score(network.logit_of_db(network.mel_db(parts)) + texture)
        if self._config.texture is not None:
            yield "without the texture head", score(own)


def ablations(
    labels: Sequence[int], scores: Sequence[Mapping[str, float]], threshold: float
) -> list[dict[str, Any]]:
    """F1 and AUROC under every ablation, over tracks: a row each, that of "none" first.

    `delta_f1` and `delta_auroc` are differences to "none". AUROC is None with one class only.
    """
    from sklearn.metrics import f1_score

    table: list[dict[str, Any]] = []
    for name in scores[0] if scores else ():
        values = np.array([score[name] for score in scores])
        f1 = float(f1_score(labels, values >= threshold, zero_division=0.0))
        auroc = auc(np.array(labels), values)
        row: dict[str, Any] = {"ablation": name, "n": len(values), "f1": f1, "auroc": auroc}
        first = table[0] if table else row
        row["delta_f1"] = f1 - first["f1"]
        row["delta_auroc"] = None if auroc is None else auroc - first["auroc"]
        table.append(row)
    return table


def energy_of(audio: np.ndarray) -> np.ndarray:
    """Energy by bin of a whole waveform, piece by piece; a piece's frames are centred."""
    pieces = [audio[i : i + 60 * RATE] for i in range(0, len(audio), 60 * RATE)]
    total = np.zeros(_FRONT_END.n_bins)
    for piece in pieces:
        if len(piece) <= _FRONT_END.stft_pad:  # too short to be mirrored
            piece = np.pad(piece, (0, _FRONT_END.n_fft - len(piece)))
        magnitude = stft_magnitude(piece.astype(np.float32), _FRONT_END)
        total += np.square(magnitude).sum(axis=-1, dtype=np.float64)
    return total


def by_source(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians of tracks' figures for each class as a whole, and by source and label.

    rows: source, label, and what `Mechanism.track` gives. `flat_masks` counts the tracks whose mask
    is constant.
    """
    parts: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        parts[f"all {LABELS[row['label']]}", row["label"]].append(row)
    for row in sorted(rows, key=lambda row: (-row["label"], row["source"])):
        parts[row["source"], row["label"]].append(row)
    table = []
    for (source, label), members in parts.items():
        figures = [key for key in members[0] if key not in ("source", "label")]
        medians = {key: float(np.median([m[key] for m in members])) for key in figures}
        flat = sum(member["mask_spread"] < FLAT_MASK for member in members)
        row = {"source": source, "label": label, "n": len(members), "flat_masks": flat}
        table.append(row | medians)
    return table
