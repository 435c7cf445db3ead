"""The quick move of `finetune`: the layers that decide, trained on what is frozen before them.

Layers of the texture head, the CNN's last ones and the head for the fine spectrum learn the hard
tracks, segment by segment. On tracks to keep they are held to what they said before, and all of
them to where they were. A last bias, which would move all scores together, stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from artifactnet_jax import dsp_jax, fine_head
from artifactnet_jax.decision import log_odds
from artifactnet_jax.presets import networks
from artifactnet_jax.texture import dense, normalised
from artifactnet_jax.train.frozen import Frozen, last_layers, network_logit, shares
from artifactnet_jax.weights import FINE, Weights, weights_digest

READ = {"texture": "track", "pooled": "track", "fine": "part"}  # inputs, and whose they are
Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Move:
    """Settings: with the data they decide what is learnt."""

    steps: int = 200
    rate: float = 1e-3  # of Adam, at its peak
    keep: float = 100.0  # of the change on tracks to keep, in squared log-odds
    pull: float = 1.0  # of the tensors' change, relative to their size
    dropout: float = 0.5  # of what the heads read of hard tracks
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A track, and its share of the loss; a hard one is learnt, another one kept."""

    frozen: Frozen
    label: int
    hard: bool
    share: float


def movable(weights: Weights) -> dict[str, np.ndarray]:
    """The tensors that move, by name; those of the fine head begin with "fine."."""
    layers = last_layers(networks(weights.config)["cnn"])
    names = {f"cnn.{layer.name}.{leaf}" for layer in layers for leaf, _ in layer.tensors}
    found = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if name in names or name.startswith(("texture.hidden.", "texture.out."))
    }
    if weights.fine is not None and weights.config.fusion is not None:
        found |= {
            f"{FINE}{name}": tensor
            for name, tensor in weights.fine.tensors.items()
            if name.startswith(("hidden.", "out."))
        }
    return {name: tensor for name, tensor in found.items() if tensor.shape != (1,)}


def with_tensors(weights: Weights, moved: Tensors) -> Weights:
    """The weights with tensors of `movable` in the place of their own."""
    tensors = {**weights.tensors} | {k: v for k, v in moved.items() if not k.startswith(FINE)}
    own = {k.removeprefix(FINE): v for k, v in moved.items() if k.startswith(FINE)}
    fine = weights.fine
    if fine is not None and own:
        stored = fine_head.stored({**fine.tensors} | own)
        single = {name: tensor.astype(np.float32) for name, tensor in stored.items()}
        fine = fine_head.FineHead(single, fine.provenance)
    digest = weights_digest(weights.config, tensors)
    return dataclasses.replace(weights, tensors=tensors, fine=fine, sha256=digest)


def moved(weights: Weights, examples: Sequence[Example], move: Move) -> Weights:
    """The weights after the move. Equal input gives equal tensors."""
    start = {name: jnp.asarray(tensor) for name, tensor in movable(weights).items()}
    data = _arrays(weights, examples)
    before = _log_odds(weights, start, data)
    hard, keep = (_weights(examples, data, kind) for kind in (True, False))
    label = data["label"][data["track"]]
    boundary = float(log_odds(weights.config.verdict.threshold))

    def loss(params: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        found = _log_odds(weights, params, _dropped(data, move.dropout, key))
        wrong = optax.sigmoid_binary_cross_entropy(found - boundary, label)
        change = jnp.square(found - before)
        pull = sum(
            jnp.square(params[k] - v).sum() / (jnp.square(v).sum() + 1e-6) for k, v in start.items()
        )
        kept = move.keep * (keep * change).sum()
        return jnp.asarray((hard * wrong).sum() + kept + move.pull * pull)

    schedule = optax.warmup_cosine_decay_schedule(0.0, move.rate, move.steps // 10, move.steps)
    optimiser = optax.adam(schedule)

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> Any:
        slope = jax.grad(loss)(params, key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its counters in
            change, state = optimiser.update(slope, state, params)
            return optax.apply_updates(params, change), state

    params, state, key = start, optimiser.init(start), jax.random.key(move.seed)
    for number in range(move.steps):
        params, state = step(params, state, jax.random.fold_in(key, number))
    return with_tensors(weights, {name: np.asarray(param) for name, param in params.items()})


def _weights(examples: Sequence[Example], data: Mapping[str, jax.Array], hard: bool) -> jax.Array:
    """Weight of each segment [M] in the sum over the hard tracks, or over the others."""
    share = np.array([example.share * (example.hard == hard) for example in examples])
    count = np.array([max(1, len(example.frozen.starts)) for example in examples])
    each = share / max(share.sum(), 1e-12) / count
    return jnp.asarray(each, jnp.float32)[data["track"]]


def _arrays(weights: Weights, examples: Sequence[Example]) -> dict[str, jax.Array]:
    """What is frozen of all tracks, one after the other: M segments, and N parts of spectra."""
    config, tracks = weights.config, [example.frozen for example in examples]
    count = [len(track.starts) for track in tracks]
    found: dict[str, Any] = {
        "track": np.repeat(np.arange(len(tracks)), count),
        "hard": np.array([example.hard for example in examples]),
        "label": np.array([example.label for example in examples], np.float32),
        "pooled": np.concatenate([track.pooled for track in tracks if len(track.starts)]),
    }
    if config.texture is not None:
        values = np.concatenate([track.statistics for track in tracks])
        mean, spread = (weights.tensors[f"texture.{name}"] for name in ("mean", "spread"))
        found["texture"] = normalised(values, mean, spread, config.texture)
    parts = [(k, track.parts) for k, track in enumerate(tracks) if track.parts]
    bias, segments, fine = np.array([shares(track, weights) for track in tracks]).T
    found |= {"bias": bias.astype(np.float32), "segments": segments.astype(np.float32)}
    if weights.fine is not None and fine.any():
        head = weights.fine
        found["fine"] = np.stack(
            [
                head.standard(part.features, part.band, part.length)
                for _, own in parts
                for part in own
            ]
        ).astype(np.float32)
        found["part"] = np.repeat([k for k, _ in parts], [len(own) for _, own in parts])
        sizes = [np.array([part.frames for part in own], np.float64) for _, own in parts]
        each = np.concatenate([size / size.sum() for size in sizes]) * fine[found["part"]]
        found["part_share"] = each.astype(np.float32)
    return {name: jnp.asarray(value) for name, value in found.items()}


def _log_odds(
    weights: Weights, params: Mapping[str, jax.Array], data: Mapping[str, jax.Array]
) -> jax.Array:
    """Log-odds [M] that a track of such segments has."""
    config, tensors = weights.config, {**weights.tensors, **params}
    logit = network_logit(data["pooled"], config, tensors, dsp_jax)
    if config.texture is not None:
        logit = logit + dense(data["texture"], config.texture, tensors, dsp_jax)
    beside = data["bias"]
    if "fine" in data:
        assert weights.fine is not None
        own = {f"{FINE}{name}": tensor for name, tensor in weights.fine.tensors.items()} | dict(
            params
        )
        hidden = dsp_jax.matmul(data["fine"], own["fine.hidden.kernel"])
        hidden = jnp.maximum(hidden + own["fine.hidden.bias"][None], 0)
        each = dsp_jax.matmul(hidden, own["fine.out.kernel"])[:, 0] + own["fine.out.bias"][0]
        beside = beside.at[data["part"]].add(data["part_share"] * each)
    return jnp.asarray(data["segments"][data["track"]] * logit + beside[data["track"]])


def _dropped(data: Mapping[str, jax.Array], share: float, key: jax.Array) -> dict[str, jax.Array]:
    """The same without a share of what the heads read of hard tracks, by chance."""
    done, hard = dict(data), data["hard"]
    for number, (name, track) in enumerate(READ.items()):
        if name in data:
            own = jax.random.fold_in(key, number)
            kept = jax.random.bernoulli(own, 1 - share, data[name].shape)
            dropped = jnp.where(kept, data[name] / (1 - share), 0.0)
            done[name] = jnp.where(hard[data[track]][:, None], dropped, data[name])
    return done
