"""What adapting weights leaves as it is, of every recording: taken once, and kept in the cache.

Of some segments the statistics that the texture head reads, and what the CNN's last layers read;
of the whole recording what the head for the fine spectrum reads. Scores are made of it by the
detector's own sums, in no time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from artifactnet_jax import decision, dsp_numpy, fine_head
from artifactnet_jax.audio import Segment, SegmentReader
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.config import Config, Decision
from artifactnet_jax.data.decoded import (
    AudioCache,
    read_array,
    read_arrays,
    write_array,
    write_arrays,
)
from artifactnet_jax.dsp_numpy import sigmoid
from artifactnet_jax.forward import texture_statistics
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.numpy_network import run as run_network
from artifactnet_jax.presets import Layers, networks
from artifactnet_jax.recording import AudioError
from artifactnet_jax.results import Failure, aggregate
from artifactnet_jax.text import printable
from artifactnet_jax.texture import logit as texture_logit
from artifactnet_jax.weights import Weights, weights_digest

HELD = 32  # segments in memory; of a longer recording every second, fourth ... is held
_REVISION = 1  # of what is kept: raise it whenever the same recording gives something else
# Settings of the verdict that decide what segments there are.
_READING = ("segments", "first_s", "min_tail_s", "least_segments", "least_hop_s", "silence_peak")


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """Of S audible segments, evenly over a recording, and of the N parts of its fine spectrum."""

    starts: np.ndarray  # s [S]
    rms: np.ndarray  # [S]
    statistics: np.ndarray  # float32 [S, K]; K is 0 without a texture head
    pooled: np.ndarray  # float32 [S, P]
    parts: tuple[fine_head.Part, ...]
    duration_s: float


class Store:
    """Reads recordings, and keeps what it took of each.

    One file is of what nothing trained has a part in, one of what the network makes of segments.
    """

    def __init__(self, weights: Weights, cache: AudioCache):
        self._config, self._cache = weights.config, cache
        self._fine = weights.fine is not None
        self._network = NumpyNetwork(weights.config, weights.tensors)
        layers = self._network.networks["cnn"]
        self._body = layers[: len(layers) - len(last_layers(layers))]
        texture = weights.config.texture
        head = texture and dataclasses.replace(texture, hidden=(), limit=0.0)
        reading = [getattr(weights.config.verdict, name) for name in _READING]
        known = [_REVISION, dataclasses.asdict(weights.config.front_end), reading, self._fine]
        known.append(head and dataclasses.asdict(head))
        first = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        plain = dataclasses.replace(weights.config, verdict=Decision(), texture=None, fusion=None)
        moved = {"texture", *(f"cnn.{layer.name}" for layer in last_layers(layers))}
        fixed = {k: v for k, v in weights.tensors.items() if k.rpartition(".")[0] not in moved}
        fixed = {k: v for k, v in fixed.items() if not k.startswith("texture.")}
        second = hashlib.sha256((first + weights_digest(plain, fixed)).encode()).hexdigest()
        self.digest = second  # of the network that the last layers follow
        self._folders = [os.path.join(cache.folder, "frozen", d[:16]) for d in (first, second)]

    def of(self, path: str, count: int) -> Frozen | Failure:
        """What is kept of a recording, of at most `count` segments; read it if that is missing."""
        try:
            key = self._cache.key(path)
        except AudioError as error:
            return Failure(path, error.kind, f"{printable(path)}: {error}")
        name = os.path.join(key[:2], f"{key[2:]}-{count}")
        first, second = (os.path.join(folder, name) for folder in self._folders)
        taken, pooled = read_arrays(f"{first}.npz"), read_array(f"{second}.npy")
        if taken is None or pooled is None:
            try:
                taken, pooled = self._read(path, count, taken)
            except AudioError as error:
                return Failure(path, error.kind, str(error))
            write_arrays(f"{first}.npz", taken)
            write_array(f"{second}.npy", pooled)
        classes = taken.pop("classes")
        parts = [
            fine_head.Part(int(frames), values, int(band), int(length))
            for values, (frames, band, length) in zip(taken.pop("fine"), classes, strict=True)
        ]
        duration = float(taken.pop("duration_s"))
        return Frozen(**taken, pooled=np.array(pooled), parts=tuple(parts), duration_s=duration)

    def _read(
        self, path: str, count: int, taken: dict[str, np.ndarray] | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """What of a recording is not known yet, and what is. AudioError."""
        config, network = self._config, self._network
        reader = SegmentReader(
            path,
            config.front_end,
            config.verdict,
            config.verdict.segments,
            fingerprint=self._fine and taken is None,
        )
        segments = _some((one for one in reader if one.peak > config.verdict.silence_peak), count)
        magnitudes = [network.magnitude(segment.samples) for segment in segments]
        if taken is None:
            parts = fine_head.parts(reader.spectrum)[0] if reader.spectrum is not None else []
            taken = {
                "starts": np.array([segment.start_s for segment in segments]),
                "rms": np.array([segment.rms for segment in segments]),
                "statistics": _stacked(
                    texture_statistics(segment.samples, magnitude, config, dsp_numpy)
                    for segment, magnitude in zip(segments, magnitudes, strict=True)
                    if config.texture is not None
                ),
                "fine": _stacked(part.features for part in parts),
                "classes": _stacked([part.frames, part.band, part.length] for part in parts),
                "duration_s": np.array(reader.report.duration_s),
            }
            if config.texture is None:
                taken["statistics"] = np.zeros((len(segments), 0), np.float32)
        return taken, _stacked(self._pooled(magnitude) for magnitude in magnitudes)

    def _pooled(self, magnitude: np.ndarray) -> np.ndarray:
        network = self._network
        mel_db = network.segment_db(magnitude)
        channels = network.channels(mel_db, network.reference_db(mel_db))
        x = np.ascontiguousarray(np.moveaxis(channels, 0, -1))
        return run_network(self._body, network.tensors, x, "cnn.").ravel()


def _stacked(rows: Iterator[Any]) -> np.ndarray:
    found = list(rows)
    return np.stack(found) if found else np.zeros((0, 0), np.float32)


def _some(segments: Iterator[Segment], count: int) -> list[Segment]:
    """At most so many of the segments, evenly, in memory that does not depend on their number."""
    held: list[Segment] = []
    step = 1
    for n, segment in enumerate(segments):
        if n % step == 0:
            held.append(segment)
        if len(held) == 2 * HELD:
            held, step = held[::2], 2 * step
    if len(held) <= count:
        return held
    return [held[int((k + 0.5) * len(held) / count)] for k in range(count)]


def last_layers(layers: Layers) -> Layers:
    """The layers that follow the last map of a CNN, each reading the one before: they may move.

    None where the CNN does not end with a product of a vector.
    """
    n = len(layers)
    while n > 1 and layers[n - 1].op in ("linear", "relu", "dropout"):
        if layers[n - 1].inputs != (layers[n - 2].name,):
            break
        n -= 1
    return layers[n:] if any(layer.op == "linear" for layer in layers[n:]) else ()


def network_logit(pooled: Any, config: Config, tensors: Mapping[str, Any], lib: Any) -> Any:
    """What the CNN's last layers make of their input [..., P]: logits [...]."""
    x = pooled
    for layer in last_layers(networks(config)["cnn"]):
        if layer.op == "relu":
            x = lib.xp.maximum(x, 0)
        elif layer.op == "linear":
            own = {leaf: tensors[f"cnn.{layer.name}.{leaf}"] for leaf, _ in layer.tensors}
            x = lib.matmul(x, own["kernel"])
            x = x + own["bias"].reshape((1,) * (x.ndim - 1) + (-1,)) if "bias" in own else x
    return x[..., 0]


def segment_scores(frozen: Frozen, weights: Weights) -> list[float]:
    """P(AI) of each segment, as the detector has it."""
    config, tensors = weights.config, weights.tensors
    logit = network_logit(frozen.pooled, config, tensors, dsp_numpy)
    if config.texture is not None:
        logit = logit + texture_logit(frozen.statistics, config.texture, tensors, dsp_numpy)
    return [float(score) for score in np.asarray(sigmoid(logit), np.float32)]


def shares(frozen: Frozen, weights: Weights) -> tuple[float, float, float]:
    """What is added to a track's log-odds, and the weights of its segments and fine spectrum."""
    fusion = weights.config.fusion
    if fusion is None:
        return 0.0, 1.0, 0.0
    k = fusion.row(frozen.duration_s, bool(frozen.parts))
    return fusion.bias[k], fusion.segments[k], fusion.fine[k] if frozen.parts else 0.0


def score(frozen: Frozen, weights: Weights) -> float | None:
    """P(AI) of a recording, as the detector has it without a bank; None if it is silent."""
    rule, fusion = weights.config.verdict, weights.config.fusion
    if not len(frozen.starts):
        return None
    scores = segment_scores(frozen, weights)
    together = aggregate(scores, frozen.rms.tolist(), rule.aggregate, rule.rms_eps)
    if fusion is None:
        return together
    head, parts = weights.fine, frozen.parts
    fine = fine_head.together(parts, head) if head is not None and parts else None
    heard = decision.Heard(float(decision.log_odds(together)), fine, None, frozen.duration_s)
    return decision.judge(heard, fusion).score


def collect(
    wanted: Sequence[tuple[str, int]],
    store: Store,
    jobs: int | None = None,
    tell: Callable[[Frozen | Failure], None] = lambda result: None,
) -> list[Frozen | Failure]:
    """What is kept of every (path, count of segments); `tell` is called with each, in order."""
    done = []
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(jobs or cpu_count()) as pool:
        try:
            for result in pool.map(store.of, *zip(*wanted, strict=True)) if wanted else ():
                done.append(result)
                tell(result)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return done
