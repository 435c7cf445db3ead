"""One training step: pure, jitted, its state donated, its batch spread over all devices.

The state is flat: tensors by the names they have in a weights file. What a phase freezes is not
part of what is differentiated, batch statistics included, so that not one bit of it can move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from artifactnet_jax import config as cfg
from artifactnet_jax import dsp_jax
from artifactnet_jax.config import Config
from artifactnet_jax.forward import levelled
from artifactnet_jax.layers import FOLDED_VARIANCE
from artifactnet_jax.model import ArtifactNet
from artifactnet_jax.presets import BOTTLENECK
from artifactnet_jax.train.losses import (
    binary_cross_entropy,
    cross_codec_delta,
    masked_audio,
    multi_resolution_stft,
    waveform_l1,
)
from artifactnet_jax.train.phases import Settings, SettingsError

Tensors = dict[str, jax.Array]
Batch = Mapping[str, Any]  # audio [B, V, n], label [B]; for distillation residual [B, V, n]
AUXILIARY = "auxiliary"  # prefix of the throw-away classifier's parameters


class State(NamedTuple):
    """All that a step changes, and what it holds still: a checkpoint."""

    step: jax.Array  # int32 (): batches seen
    moving: Tensors
    statistics: Tensors  # of every batch norm, frozen ones too
    frozen: Tensors
    average: Tensors  # moving average of `moving`
    optimiser: Any


class Trainer:
    """A model, what of it moves, and its compiled step.

    tensors: those of a weights file with this config, or None for random ones by `settings.seed`.
    devices: what batches are spread over; default: all of jax's. SettingsError: the settings do not
    fit the model or the number of devices.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, np.ndarray] | None,
        settings: Settings,
        devices: list[jax.Device] | None = None,
    ):
        devices = jax.devices() if devices is None else devices
        self.config, self.settings = config, settings
        self.frozen_statistics = settings.batch_statistics == "frozen" or (
            tensors is not None and _folded(tensors, settings.trainable)
        )
        self._check(len(devices))
        precision = jax.lax.Precision(settings.precision)
        dtype = jnp.dtype(settings.dtype)

        def build() -> ArtifactNet:
            rngs = nnx.Rngs(settings.seed)
            return ArtifactNet(config, rngs=rngs, dtype=dtype, precision=precision)

        model = build() if tensors is None else nnx.eval_shape(build)
        self._graph, state = nnx.split(model)
        self._leaves = nnx.to_flat_state(state)
        values = {_name(path): leaf for path, leaf in self._leaves}
        if tensors is not None:
            values = {
                name: leaf.replace(jnp.asarray(tensors[name])) for name, leaf in values.items()
            }
        self._statistics = [n for n, v in values.items() if isinstance(v, nnx.BatchStat)]
        self._moving = [n for n, v in values.items() if _moves(n, v, settings.trainable)]
        if not self._moving:
            raise SettingsError(f"moves={','.join(settings.trainable)}: the model has no such part")
        self._initial = {name: jnp.copy(leaf[...]) for name, leaf in values.items()}
        mesh = Mesh(np.array(devices), ("data",))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self._spread = NamedSharding(mesh, PartitionSpec("data"))
        self._optimiser = _optimiser(settings)
        self._step: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]] = jax.jit(
            self._pure_step,
            donate_argnums=0,
            in_shardings=(self.replicated, self._spread),
            out_shardings=self.replicated,
        )
        self._watch: Callable[[State, Batch], dict[str, jax.Array]] = jax.jit(
            self._pure_watch,
            in_shardings=(self.replicated, self._spread),
            out_shardings=self.replicated,
        )

    def _check(self, n_devices: int) -> None:
        settings, unet = self.settings, self.config.unet
        if settings.batch % n_devices:
            raise SettingsError(f"batch={settings.batch}: not a multiple of {n_devices} devices")
        if settings.auxiliary and isinstance(unet, cfg.Imported):
            raise SettingsError("auxiliary needs the UNet of a preset: set auxiliary=0")
        seconds = self.config.front_end.segment_s
        imported = isinstance(unet, cfg.Imported) or isinstance(self.config.cnn, cfg.Imported)
        if imported and settings.seconds != seconds:
            raise SettingsError(f"a converted model takes seconds={seconds:g} only")
        if settings.distill:
            fe = self.config.front_end
            if fe.n_fft % fe.hop or fe.window == "given" or fe.stft_pad != fe.n_fft // 2:
                raise SettingsError("distill needs centred frames, a Hann window, hop | n_fft")
            if fe.level != "none" or fe.centred:
                raise SettingsError("distill needs audio at its own level: this model changes it")

    @property
    def samples(self) -> int:
        """Length of a crop."""
        return round(self.settings.seconds * self.config.front_end.sample_rate)

    def initial(self) -> State:
        """The state before the first step."""
        values = {name: jnp.copy(value) for name, value in self._initial.items()}
        moving = {name: values.pop(name) for name in self._moving}
        statistics = {name: values.pop(name) for name in self._statistics}
        if self.settings.auxiliary:
            width = self.config.unet.bottleneck  # type: ignore[union-attr]
            key = jax.random.key(self.settings.seed)
            kernel = jax.random.normal(key, (width, 1)) / math.sqrt(width)
            moving |= {f"{AUXILIARY}.kernel": kernel, f"{AUXILIARY}.bias": jnp.zeros(1)}
        state = State(
            jnp.zeros((), jnp.int32),
            moving,
            statistics,
            values,
            {name: jnp.copy(value) for name, value in moving.items()},
            self._optimiser.init(moving),
        )
        placed: State = jax.device_put(state, self.replicated)
        return placed

    def put(self, batch: Batch) -> Batch:
        """A batch spread over the devices: done ahead of `step`, it overlaps with the last one."""
        placed: Batch = jax.device_put(dict(batch), self._spread)
        return placed

    def step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One batch further; `state` is consumed.

        Metrics: loss and its terms, gradient (its norm before clipping), logit [B, V] and, where
        the mask is computed, mask_mean, mask_spread, residual_energy (share of the input's);
        where the logit is, flat_bins (share of bins where the soft masks have gradient 0).
        """
        return self._step(state, self.put(batch))

    def watch(self, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Metrics of a batch by the averaged weights in evaluation mode; nothing changes."""
        return self._watch(state, self.put(batch))

    def tensors(self, state: State) -> dict[str, np.ndarray]:
        """What a weights file holds: averaged parameters, and the running statistics."""
        merged = {**state.frozen, **state.statistics, **state.average}
        return {_name(path): np.asarray(merged[_name(path)]) for path, _ in self._leaves}

    def _pure_step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(self.settings.seed), state.step)
        objective = jax.value_and_grad(self._objective, has_aux=True)
        (_, (statistics, metrics)), slope = objective(state.moving, state, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its int32 counts
            updates, optimiser = self._optimiser.update(slope, state.optimiser, state.moving)
        moving = optax.apply_updates(state.moving, updates)
        decay: Any = self.settings.ema
        if self.settings.accumulate > 1:  # the average counts updates, not batches
            decay = jnp.where(optimiser.mini_step == 0, decay, 1.0)
        average = jax.tree.map(lambda a, m: decay * a + (1 - decay) * m, state.average, moving)
        metrics["gradient"] = optax.tree.norm(slope)
        step = state.step + 1
        return State(step, moving, statistics, state.frozen, average, optimiser), metrics

    def _pure_watch(self, state: State, batch: Batch) -> dict[str, jax.Array]:
        return self._objective(state.average, state, batch, None)[1][1]

    def _objective(
        self, moving: Tensors, state: State, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[Tensors, dict[str, jax.Array]]]:
        """Loss, then (statistics, metrics); without a key in evaluation mode."""
        values = {**state.frozen, **state.statistics, **moving}
        leaves = [(path, leaf.replace(values[_name(path)])) for path, leaf in self._leaves]
        model = nnx.merge(self._graph, nnx.from_flat_state(leaves), copy=True)
        self._set_mode(model, training=key is not None)
        rngs = None if key is None else nnx.Rngs(dropout=key)
        metrics = losses(model, self.settings, values, batch, rngs)
        found = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
        return metrics["loss"], ({_name(path): leaf[...] for path, leaf in found}, metrics)

    def _set_mode(self, model: ArtifactNet, training: bool) -> None:
        model.eval()  # type: ignore[no-untyped-call]
        if training:
            for name in {part.split(".")[0] for part in self.settings.trainable} - {"texture"}:
                part = model.unet if name == "unet" else model.cnn
                part.set_attributes(
                    deterministic=False,
                    use_running_average=self.frozen_statistics,
                    raise_if_not_found=False,
                )


def losses(
    model: ArtifactNet,
    settings: Settings,
    values: Tensors,
    batch: Batch,
    rngs: nnx.Rngs | None,
) -> dict[str, jax.Array]:
    """The loss of a batch, its terms, and what is watched; see `Trainer.step`."""
    tracks, versions, n = batch["audio"].shape
    audio = batch["audio"].reshape(tracks * versions, n)
    label = jnp.repeat(batch["label"], versions)
    front_end = model.config.front_end
    spectrum = dsp_jax.stft(levelled(audio, front_end, jnp), front_end, model.window)
    magnitude = dsp_jax.magnitude(spectrum, front_end)
    metrics: dict[str, jax.Array] = {}
    last = model.unet.layers[-1].name
    masked = bool(settings.distill or settings.bce or settings.consistency)
    # In one run: what comes behind the last of these is not run, and its statistics do not move.
    wanted = {BOTTLENECK: bool(settings.auxiliary), last: masked}
    seen = model.unet.values(magnitude[..., None], [name for name in wanted if wanted[name]])
    if settings.auxiliary:
        pooled = jnp.mean(seen[BOTTLENECK], axis=(1, 2)).astype(label.dtype)
        logit = (pooled @ values[f"{AUXILIARY}.kernel"])[:, 0] + values[f"{AUXILIARY}.bias"]
        metrics["auxiliary"] = binary_cross_entropy(logit, label, settings.label_smoothing)
        metrics["logit"] = logit.reshape(tracks, versions)
    if masked:
        mask = seen[last][..., 0]
        metrics["mask_mean"] = jnp.mean(mask)
        metrics["mask_spread"] = jnp.mean(jnp.std(mask, axis=(1, 2)))
        metrics["residual_energy"] = jnp.sum((mask * magnitude) ** 2) / jnp.maximum(
            jnp.sum(magnitude**2),
            jnp.finfo(magnitude.dtype).tiny,  # type: ignore[no-untyped-call]
        )
    if settings.distill:
        residual = masked_audio(spectrum, mask, front_end, n)
        target = batch["residual"].reshape(tracks * versions, n)
        l1 = jnp.mean(waveform_l1(residual, target, audio))
        stft = jnp.mean(multi_resolution_stft(residual, target))
        metrics |= {"l1": l1, "stft": stft, "distill": l1 + stft}
    if settings.bce or settings.consistency:
        residual = mask * magnitude
        medians = model.medians(residual)
        metrics["flat_bins"] = dsp_jax.flat_share(*medians, front_end)
        mel_db = model.mel_db(model.parts(residual, medians))
        logit = model.logit_of_db(mel_db, rngs=rngs) + model.texture_logit(audio, magnitude)
        even = math.log(settings.boundary / (1 - settings.boundary))
        metrics["bce"] = binary_cross_entropy(logit - even, label, settings.label_smoothing)
        metrics["logit"] = logit.reshape(tracks, versions)
        if versions > 1:
            metrics["consistency"] = jnp.mean(cross_codec_delta(metrics["logit"]))
    loss = jnp.zeros((), audio.dtype)
    for name in ("distill", "bce", "auxiliary", "consistency"):
        if weight := getattr(settings, name):
            loss = loss + weight * metrics[name]
    return {"loss": loss, **metrics}


def schedule(settings: Settings) -> Callable[[Any], Any]:
    """Learning rate by update: linear warm-up, then a cosine to its end."""
    updates = max(2, settings.steps // settings.accumulate)
    warm = min(max(1, round(settings.warmup * updates)), updates - 1)
    rate: Callable[[Any], Any] = optax.warmup_cosine_decay_schedule(
        settings.learning_rate / warm,
        settings.learning_rate,
        warm,
        updates,
        settings.learning_rate * settings.final_learning_rate,
    )
    return rate


def _optimiser(settings: Settings) -> optax.GradientTransformation:
    """Clipping, then AdamW for each part of the model at its own rate."""
    rate = schedule(settings)

    def adamw(factor: float) -> optax.GradientTransformation:
        def kernels(params: Tensors) -> dict[str, bool]:
            return {name: name.endswith("kernel") for name in params}

        return optax.adamw(
            lambda count: factor * rate(count), weight_decay=settings.weight_decay, mask=kernels
        )

    parts = {
        "unet": settings.unet_learning_rate_scale,
        "cnn": settings.cnn_learning_rate_scale,
        AUXILIARY: 1.0,
    }
    parts["texture"] = settings.cnn_learning_rate_scale
    optimiser = optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.partition(
            {part: adamw(factor) for part, factor in parts.items()},
            lambda params: {name: name.split(".")[0] for name in params},
        ),
    )
    if settings.accumulate > 1:
        return optax.MultiSteps(optimiser, settings.accumulate).gradient_transformation()
    return optimiser


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _moves(name: str, leaf: Any, parts: tuple[str, ...]) -> bool:
    """Whether a tensor is a parameter of these parts.

    The constants of a converted graph (a scale, a floor, the bound of its mask) are no parameters.
    """
    constant = not isinstance(leaf, nnx.Param) or name.endswith(".value")
    return not constant and any(f"{name}.".startswith(f"{part}.") for part in parts)


def _folded(tensors: Mapping[str, np.ndarray], parts: tuple[str, ...]) -> bool:
    """Whether the norms were folded into the convolutions: they are identities then.

    Statistics of their batches would undo what the convolutions hold, so they stay.
    """
    tops = {part.split(".")[0] for part in parts}
    variances = [
        tensor
        for name, tensor in tensors.items()
        if name.endswith(".var") and name.split(".")[0] in tops
    ]
    identity = np.float32(FOLDED_VARIANCE)
    return bool(variances) and all((tensor == identity).all() for tensor in variances)
