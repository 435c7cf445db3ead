"""The training step: what moves, what does not, and that each phase does what it claims."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifactnet_jax import config as cfg
from artifactnet_jax.backends.xla import build_model
from artifactnet_jax.layers import layer
from artifactnet_jax.passes import folded
from artifactnet_jax.train import loop
from artifactnet_jax.train.loop import Trainer
from artifactnet_jax.train.phases import PHASES, Settings, SettingsError
from artifactnet_jax.weights import Weights, load_weights, random_tensors, save_weights
from tiny_model import TINY

SECONDS = 0.25
RNG = np.random.default_rng(0)


def settings_of(phase: str, **changes: Any) -> Settings:
    few = {"batch": 4, "seconds": SECONDS, "steps": 40, "ema": 0.0}
    return dataclasses.replace(PHASES[phase], **few | changes)


def trainer_of(phase: str, **changes: Any) -> Trainer:
    return Trainer(TINY, random_tensors(TINY), settings_of(phase, **changes))


def batch_of(trainer: Trainer, seed: int = 0) -> dict[str, np.ndarray]:
    """AI tracks have a tone that real ones lack; versions differ by a low-pass and noise."""
    rng = np.random.default_rng(seed)
    settings, n = trainer.settings, trainer.samples
    label = np.float32([1, 0] * (settings.batch // 2))
    audio = rng.standard_normal((len(label), 1, n)) * 0.05
    tone = np.sin(2 * np.pi * 9_000 * np.arange(n) / 44_100)
    audio += 0.1 * label[:, None, None] * tone
    versions = [audio]
    for k in range(1, len(settings.versions)):
        smooth = np.apply_along_axis(np.convolve, 2, audio, np.ones(k + 1) / (k + 1), "same")
        versions.append(smooth + 0.01 * rng.standard_normal(audio.shape))
    batch = {"audio": np.concatenate(versions, axis=1).astype(np.float32), "label": label}
    if settings.distill:
        batch["residual"] = (0.2 * batch["audio"]).astype(np.float32)
    return batch


def copied(tensors: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tensors.items()}


@pytest.fixture(scope="module", params=sorted(PHASES))
def trained(request):
    """A trainer, its state before and after some steps on one batch, and each step's metrics."""
    trainer = trainer_of(request.param, warmup=0.1)
    state = trainer.initial()
    before = {name: copied(getattr(state, name)) for name in ("moving", "statistics", "frozen")}
    batch, rows = batch_of(trainer), []
    for _ in range(25):
        state, metrics = trainer.step(state, batch)
        rows.append({name: np.array(value) for name, value in metrics.items()})
    return request.param, trainer, before, state, rows


def test_the_loss_of_a_batch_falls(trained):
    _, _, _, _, rows = trained
    losses = [float(row["loss"]) for row in rows]
    assert np.isfinite(losses).all()
    assert min(losses[-5:]) < 0.97 * losses[0]


def test_frozen_parts_keep_every_bit(trained):
    phase, trainer, before, state, _ = trained
    parts = {
        "distill": ("unet",),
        "steer": ("unet",),
        "encoder": ("unet", "auxiliary"),
        "cnn": ("cnn",),
        "head": ("cnn",),
        "codec": ("unet", "cnn"),
        "joint": ("unet", "cnn", "auxiliary"),
    }[phase]
    assert {name.split(".")[0] for name in state.moving} == set(parts)
    for name, value in before["frozen"].items():
        np.testing.assert_array_equal(state.frozen[name], value, strict=True)
    for name, value in before["statistics"].items():
        moved = (np.asarray(state.statistics[name]) != value).any()
        # The encoder phase never runs the decoder, whose statistics stay too.
        runs = name.split(".")[0] in parts and not (phase == "encoder" and ".decoder." in name)
        assert moved == (runs and phase != "head"), name
    written = trainer.tensors(state)
    assert set(written) == set(random_tensors(TINY))
    for name, value in random_tensors(TINY).items():
        if name.split(".")[0] not in parts:
            np.testing.assert_array_equal(written[name], value, strict=True)


def test_what_moves_moves(trained):
    phase, _, before, state, _ = trained
    for name, value in before["moving"].items():
        if phase == "encoder" and (".decoder." in name or ".up." in name or ".head." in name):
            continue  # not in its way
        assert (np.asarray(state.moving[name]) != value).any(), name


def test_metrics_say_what_the_mask_does(trained):
    phase, _, _, _, rows = trained
    if phase == "encoder":
        assert "mask_mean" not in rows[0]
        return
    for row in rows:
        assert 0 < row["mask_mean"] < 0.5
        assert 0 < row["mask_spread"] <= 0.25
        assert 0 < row["residual_energy"] < 0.25


def test_the_step_computes_what_the_model_does():
    """In evaluation mode, against the model of the backends and a loss by hand."""
    trainer = trainer_of("codec", boundary=0.8)
    batch = batch_of(trainer)
    weights = Weights("x", TINY, random_tensors(TINY), "", "", {})
    found = trainer.watch(trainer.initial(), batch)
    audio = jnp.asarray(batch["audio"].reshape(16, -1))
    model = build_model(weights)
    score = np.asarray(model(audio)).reshape(4, 4)
    logit = np.log(score.astype(np.float64)) - np.log1p(-score.astype(np.float64))
    np.testing.assert_allclose(found["logit"], logit, atol=2e-5)
    target = np.repeat(batch["label"] * 0.95 + 0.025, 4).reshape(4, 4)
    even = 1 / (1 + np.exp(-(logit - np.log(0.8 / 0.2))))  # a score of 0.8 is as good as 0.5
    entropy = -(target * np.log(even) + (1 - target) * np.log1p(-even)).mean()
    assert float(found["bce"]) == pytest.approx(entropy, rel=1e-5)
    delta = (score.max(axis=1) - score.min(axis=1)).mean()
    assert float(found["consistency"]) == pytest.approx(delta, rel=1e-4)
    assert float(found["loss"]) == pytest.approx(entropy + 0.5 * delta, rel=1e-5)
    magnitude = model.magnitude(audio)
    assert float(found["mask_mean"]) == pytest.approx(float(model.mask(magnitude).mean()), rel=1e-5)


def test_the_share_of_bins_without_a_gradient_of_the_soft_masks():
    """Both medians lie below the floor where half of each crop is silent, and nowhere else."""
    trainer = trainer_of("head")
    state, batch = trainer.initial(), batch_of(trainer)
    assert float(trainer.watch(state, batch)["flat_bins"]) < 0.01
    batch["audio"][..., trainer.samples // 2 :] = 0
    assert float(trainer.watch(state, batch)["flat_bins"]) == pytest.approx(0.5, abs=0.2)
    batch["audio"][...] = 0
    assert float(trainer.watch(state, batch)["flat_bins"]) == 1


# tests/training.json was written by commit c339728, whose networks were Flax modules: shape, sum
# and sum of magnitudes of the random weights of a seed, and two steps of phase joint.
BEFORE = json.loads((Path(__file__).parent / "training.json").read_text())


def test_random_weights_of_a_seed_are_those_of_the_modules_before():
    head = cfg.Texture(resolutions=((512, 128),), hidden=(3,))
    model = loop.ArtifactNet(dataclasses.replace(TINY, texture=head), rngs=nnx.Rngs(4))
    found = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(model))}
    assert set(found) == set(BEFORE["random"])
    for name, (shape, total, size) in BEFORE["random"].items():
        value = np.asarray(found[name], np.float64)
        assert list(value.shape) == shape
        assert value.sum() == pytest.approx(total, rel=1e-6, abs=1e-6), name
        assert np.abs(value).sum() == pytest.approx(size, rel=1e-6), name


def test_two_steps_from_a_seed_are_those_of_the_modules_before():
    """Loss, gradient and statistics, with dropout; and the tree of a checkpoint, which resumes."""
    before = BEFORE["joint"]
    trainer = Trainer(TINY, None, settings_of("joint"))
    state = trainer.initial()
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    tree = [[jax.tree_util.keystr(p), list(v.shape), str(v.dtype)] for p, v in leaves]
    assert tree == before["state"]
    batch = batch_of(trainer)
    for known in before["metrics"]:
        state, metrics = trainer.step(state, batch)
        found = {name: float(np.mean(np.asarray(v, np.float64))) for name, v in metrics.items()}
        assert 0 <= found.pop("flat_bins") <= 1
        assert found == pytest.approx(known, rel=1e-4, abs=1e-6)
    for name, size in before["statistics"].items():
        assert float(np.abs(state.statistics[name]).sum()) == pytest.approx(size, rel=1e-4), name
    moved = sum(float(np.abs(np.asarray(v, np.float64)).sum()) for v in state.moving.values())
    assert moved == pytest.approx(before["moving"], rel=1e-5)


def test_phase_codec_shrinks_the_cross_codec_delta():
    """From a classifier whose scores swing with the codec, on a toy set."""
    tensors = random_tensors(TINY)
    tensors["cnn.out.kernel"] *= 20
    tensors["cnn.out.bias"] += 12  # scores of this batch on both sides of 0.5
    settings = settings_of("codec", learning_rate=3e-3, seconds=0.15)
    trainer = Trainer(TINY, tensors, settings)
    state, batch = trainer.initial(), batch_of(trainer)
    before = trainer.watch(state, batch)
    for _ in range(40):
        state, _ = trainer.step(state, batch)
    after = trainer.watch(state, batch)
    assert float(before["consistency"]) > 0.1
    assert float(after["consistency"]) < 0.5 * float(before["consistency"])
    assert float(after["bce"]) < float(before["bce"])


def test_two_accumulated_batches_are_one_of_twice_the_size():
    """Without dropout and with frozen statistics, where a mean of means is the mean."""
    config = dataclasses.replace(TINY, cnn=dataclasses.replace(TINY.cnn, dropout=0.0))
    ends = []
    for accumulate, size in ((2, 4), (1, 8)):
        settings = settings_of("head", batch=size, accumulate=accumulate, ema=0.9, clip=1e6)
        settings = dataclasses.replace(settings, steps=settings.steps * accumulate)
        trainer = Trainer(config, random_tensors(TINY), settings)
        whole = batch_of(Trainer(config, None, dataclasses.replace(settings, batch=8)))
        state = trainer.initial()
        averages = []
        for step in range(2 * accumulate):
            cut = slice(size * (step % accumulate), size * (step % accumulate + 1))
            state, _ = trainer.step(state, {name: value[cut] for name, value in whole.items()})
            averages.append(copied(state.average))
        ends.append(state)
        if accumulate == 2:  # nothing happens between updates
            for name, value in averages[1].items():
                np.testing.assert_array_equal(averages[2][name], value)
    for name, value in ends[1].moving.items():
        np.testing.assert_allclose(ends[0].moving[name], value, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(ends[0].average[name], ends[1].average[name], atol=2e-5)


def test_the_average_is_exponential():
    trainer = trainer_of("head", ema=0.75)
    state = trainer.initial()
    expected, batch = copied(state.moving), batch_of(trainer)
    for _ in range(3):
        state, _ = trainer.step(state, batch)
        for name in expected:
            expected[name] = 0.75 * expected[name] + 0.25 * np.asarray(state.moving[name])
    for name, value in expected.items():
        np.testing.assert_allclose(state.average[name], value, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(trainer.tensors(state)[name], state.average[name])


def test_the_first_update_is_adamw_by_hand():
    """Bias-corrected moments of one gradient: the step is its sign, less the decay of kernels."""
    trainer = trainer_of(
        "head", clip=1e9, learning_rate=1e-2, warmup=0.0, weight_decay=0.1, label_smoothing=0
    )
    state = trainer.initial()
    before = copied(state.moving)
    state, _ = trainer.step(state, batch_of(trainer))
    rate = float(loop.schedule(trainer.settings)(0))
    for name, old in before.items():
        decay = 0.1 * old if name.endswith("kernel") else 0.0
        moved = (old - np.asarray(state.moving[name])) / rate - decay
        sure = np.abs(moved) > 1e-3  # a gradient of 0 moves nothing
        np.testing.assert_allclose(np.abs(moved[sure]), 1, atol=0.02, err_msg=name)


def test_parts_have_their_own_rates():
    trainer = trainer_of("codec", unet_learning_rate_scale=0.0)
    state = trainer.initial()
    before, batch = copied(state.moving), batch_of(trainer)
    state, _ = trainer.step(state, batch)
    for name, value in before.items():
        assert (np.asarray(state.moving[name]) != value).any() == name.startswith("cnn."), name


def test_the_schedule_warms_up_and_ends_low():
    settings = settings_of(
        "cnn", learning_rate=2e-3, steps=100, warmup=0.1, final_learning_rate=0.05, accumulate=2
    )
    rate = loop.schedule(settings)
    assert float(rate(0)) == pytest.approx(2e-3 / 5)
    assert float(rate(5)) == pytest.approx(2e-3)
    middle = 2e-3 * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * 22 / 45)))
    assert float(rate(27)) == pytest.approx(middle, rel=1e-5)
    assert float(rate(50)) == pytest.approx(1e-4)
    for steps in (1, 2, 3):
        assert np.isfinite(float(loop.schedule(settings_of("cnn", steps=steps))(steps)))


def test_bfloat16_is_close_to_float32():
    found = []
    for dtype in ("float32", "bfloat16"):
        trainer = trainer_of("cnn", dtype=dtype)
        state = trainer.initial()
        with jax.numpy_dtype_promotion("standard"):  # Flax's own norms need it
            for _ in range(3):
                state, metrics = trainer.step(state, batch_of(trainer))
        assert all(value.dtype == jnp.float32 for value in state.moving.values())
        found.append(float(metrics["loss"]))
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], abs=0.05)


def test_steps_are_a_function_of_seed_and_state():
    def weights(seed: int) -> dict[str, np.ndarray]:
        trainer = Trainer(TINY, None, settings_of("cnn", seed=seed))
        state = trainer.initial()
        for _ in range(2):
            state, _ = trainer.step(state, batch_of(trainer))
        return trainer.tensors(state)

    first, again, other = weights(1), weights(1), weights(2)
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value, strict=True)
    assert any((other[name] != value).any() for name, value in first.items())


DEVICES = """
import json, sys
import numpy as np, jax
sys.path.insert(0, sys.argv[1])
from test_training_loop import batch_of, trainer_of
from artifactnet_jax.train.loop import Trainer
assert len(jax.devices()) == 2
rows = []
for devices in (jax.devices(), jax.devices()[:1]):
    whole = trainer_of("codec", ema=0.9)
    trainer = Trainer(whole.config, whole.tensors(whole.initial()), whole.settings, devices)
    state = trainer.initial()
    for _ in range(3):
        state, metrics = trainer.step(state, batch_of(trainer))
    assert len(state.step.sharding.device_set) == len(devices)
    rows.append([float(metrics["loss"]), float(metrics["gradient"])])
print(json.dumps(rows))
"""


def test_two_devices_compute_what_one_does():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    args = [sys.executable, "-c", DEVICES, os.path.dirname(__file__)]
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two, one = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(two, one, rtol=1e-4)


def test_a_batch_must_divide_by_the_devices():
    with pytest.raises(SettingsError, match="batch=3: not a multiple of 2 devices"):
        Trainer(TINY, None, settings_of("cnn", batch=3), [jax.devices()[0]] * 2)


def test_unknown_parts_are_named():
    with pytest.raises(SettingsError, match=r"moves=unet\.nothing: the model has no such part"):
        trainer_of("cnn", trainable=("unet.nothing",))


def as_layers(config: cfg.Config, unet: tuple, tensors: dict) -> Trainer:
    """A trainer of phase codec with this UNet as if it came from a foreign graph."""
    config = dataclasses.replace(config, unet=cfg.Imported(unet, 0.5))
    settings = settings_of("codec", batch=2, seconds=1.0, versions=("wav", "mp3"))
    return Trainer(config, tensors, settings)


def test_constants_of_a_converted_graph_do_not_move():
    layers = folded(TINY)[0]["unet"]
    last = layers[-1]
    scaled = (*layers, layer("scaled", "mul", (last.name,), tensors={"value": (1,)}))
    config = dataclasses.replace(TINY, unet=cfg.Imported(scaled, 0.5))
    trainer = as_layers(TINY, scaled, random_tensors(config))
    state = trainer.initial()
    assert "unet.scaled.value" in state.frozen
    assert "unet.scaled.value" not in state.moving
    assert any(name.startswith("unet.") for name in state.moving)


def test_a_converted_model_takes_whole_segments_and_no_scaffolding():
    layers = folded(TINY)[0]["unet"]
    config = dataclasses.replace(TINY, unet=cfg.Imported(layers, 0.5))
    with pytest.raises(SettingsError, match="takes seconds=1 only"):
        Trainer(config, None, settings_of("codec", seconds=0.5))
    with pytest.raises(SettingsError, match="auxiliary needs the UNet of a preset"):
        Trainer(config, None, settings_of("joint", seconds=1.0))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_statistics_of_folded_norms_stay(dtype, tmp_path):
    """A converted preset has its norms in its convolutions, and identities in their place.

    A weights file keeps that mark, one in float16 too.
    """
    tensors = random_tensors(TINY)
    for name in tensors:
        if ".norm" in name:
            kind = name.rsplit(".", 1)[1]
            value = {"scale": 1.0, "var": 1 - 1e-5}.get(kind, 0.0)
            tensors[name] = np.full_like(tensors[name], value)
    facts = {"name": "f", "licence": "x", "provenance": {}, "dtype": dtype}
    save_weights(tmp_path / "f.safetensors", TINY, tensors, **facts)
    tensors = load_weights(tmp_path / "f.safetensors").tensors
    trainer = Trainer(TINY, tensors, settings_of("codec"))
    assert trainer.frozen_statistics
    assert not trainer_of("codec").frozen_statistics
    assert not Trainer(TINY, None, settings_of("cnn")).frozen_statistics


def gradient_by_differences(trainer: Trainer, batch: dict[str, Any], step: float = 1e-6) -> tuple:
    """Slope of the training loss along a random direction: by jax, and by differences."""
    state = jax.tree.map(
        lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, trainer.initial()
    )
    batch = {name: jnp.asarray(value, jnp.float64) for name, value in batch.items()}
    rng = np.random.default_rng(2)
    direction = {
        name: jnp.asarray(rng.standard_normal(value.shape)) * 0.1
        for name, value in state.moving.items()
    }

    @jax.jit
    def loss(moving):
        return trainer._objective(moving, state, batch, jax.random.key(0))[0]

    slope = jax.jit(jax.grad(loss))(state.moving)
    assert all(value.dtype == jnp.float64 for value in slope.values())
    found = sum(float(jnp.sum(slope[name] * direction[name])) for name in slope)
    moved = [
        float(loss({n: v + s * direction[n] for n, v in state.moving.items()}))
        for s in (step, -step)
    ]
    return found, (moved[0] - moved[1]) / (2 * step)


@pytest.mark.parametrize("phase", ["distill", "codec", "joint"])
def test_gradients_against_finite_differences_in_float64(phase, monkeypatch):
    trainer = trainer_of(phase, batch=2, versions=("wav", "mp3") if phase == "codec" else ())
    batch = batch_of(trainer)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # Flax's norms need it
        model = nnx.eval_shape(lambda: loop.ArtifactNet(TINY, rngs=nnx.Rngs(0), dtype=jnp.float64))
        monkeypatch.setattr(trainer, "_graph", nnx.split(model)[0])  # modules in float64 too
        found, expected = gradient_by_differences(trainer, batch)
    assert found == pytest.approx(expected, rel=1e-4)
