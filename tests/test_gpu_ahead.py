"""Every program compiles for NVIDIA cards of every generation, without one: `make gpu-check`.

Needs jax's CUDA plugin, extra `gpu_ahead` (5 GB), and takes long: no part of the usual tests. The
number of kernels is stored in gpu_kernels.json: GPU_KERNELS=write writes it anew, on purpose.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from artifactnet_jax.backends import cards
from artifactnet_jax.config import Config
from artifactnet_jax.weights import Weights, random_tensors

if not any(cards._has(f"jax_plugins.{name}") for name in cards.PLUGINS):
    pytest.skip("needs artifactnet-jax[gpu_ahead]", allow_module_level=True)

import jax
import jax.numpy as jnp
import numpy as np

from artifactnet_jax.backends import xla
from artifactnet_jax.bench import gpu, hlo
from artifactnet_jax.kernels import median_filter

pytestmark = pytest.mark.gpu_ahead
# A card of each generation: compute capability 8.0, 8.6, 8.7, 8.9, 9.0, 12.0, 11.0.
GENERATIONS = ("a100", "rtx3090", "orin-nano", "rtx4090", "h100", "rtx5090", "thor")
STORED = Path(__file__).parent / "gpu_kernels.json"
PRESETS = {"edge": Config.edge(), "v94": Config.v94()}


@pytest.fixture(scope="module", autouse=True)
def _no_device_is_looked_for():
    gpu._prepared()


def weights_of(preset: str, **changed: Any) -> Weights:
    config = PRESETS[preset]
    front_end = dataclasses.replace(config.front_end, **changed)
    texture = None if "joint" in changed else config.texture
    config = dataclasses.replace(config, front_end=front_end, texture=texture)
    return Weights("random", config, random_tensors(config), "", "", {})


def default_batch(card: cards.Card, weights: Weights, dtype: str) -> tuple[int, dict[str, Any]]:
    """What backend `xla` would take on the card, and the report on it."""
    rows: dict[int, dict[str, Any]] = {}

    def programs(n: int) -> list[tuple[Any, int]]:
        rows[n] = gpu.examine(card, weights, dtype, n)
        return [(len, rows[n]["memory"]["temporary"])]

    n, _ = xla.fitting(programs, xla.GPU_SEGMENTS, card.room)
    return n, rows[n]


def has_no_more_kernels(name: str, row: dict[str, Any]) -> None:
    """Than are stored for the program, of so many segments a call."""
    stored, launches = json.loads(STORED.read_text(encoding="utf-8")), row["kernels"]["launches"]
    if os.environ.get("GPU_KERNELS") == "write":
        stored[name] = launches
        STORED.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
    if name not in stored:
        pytest.skip(f"{launches} kernels, and no number is stored: GPU_KERNELS=write stores it")
    assert launches <= stored[name], f"{name}: {launches} kernels, and {stored[name]} before"


@pytest.mark.parametrize("dtype", gpu.DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("key", GENERATIONS)
def test_a_program_compiles_fits_spills_nothing_and_has_no_more_kernels(key, preset, dtype):
    card = cards.find_card(key)
    n, row = default_batch(card, weights_of(preset), dtype)
    assert row["memory"]["fits"]
    assert row["memory"]["temporary"] <= xla.SHARE * card.room or n == 1
    assert row["registers"]["spills"] == []
    assert row["rounded"] == []  # front end, medians and texture in whole float32
    assert "convolution" in row["kernels"]["by_kind"]
    has_no_more_kernels(f"{preset} {dtype} {card.architecture} x{n}", row)


@pytest.mark.parametrize("key", GENERATIONS)
def test_the_texture_head_takes_at_most_60_fusions(key):
    card = cards.find_card(key)
    row = gpu.examine(card, weights_of("edge"), "float32", 8)
    assert row["kernels"]["by_stage"]["texture"] <= 60 + 5  # five FFTs beside the front end's
    assert row["registers"]["spills"] == []
    has_no_more_kernels(f"edge float32 {card.architecture} x8", row)


@pytest.mark.parametrize("key", GENERATIONS)
def test_programs_of_whole_songs_and_of_stages_compile(key):
    where, weights = cards.placed_on(cards.find_card(key)), weights_of("v94", joint="song")
    fe, model = weights.config.front_end, xla.folded_model(weights)
    shapes = {
        xla._song_db: [(4, fe.segment_samples)],
        xla._classify: [(4, 3, fe.n_mels, fe.n_frames), (4, 3)],
        xla.ArtifactNet.stages: [(1, fe.segment_samples)],
    }
    for function, arrays in shapes.items():
        compiled = xla.lowered(model, function, arrays, where).compile()
        assert hlo.Program(compiled.as_text()).kernels


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("key", GENERATIONS)
def test_the_median_kernel_compiles_to_one_call(key, axis):
    where = cards.placed_on(cards.find_card(key))

    def median(x: jax.Array) -> jax.Array:
        return median_filter(x, 31, axis, implementation="pallas")

    shape = jax.ShapeDtypeStruct((8, 1025, 345), jnp.float32)
    compiled = jax.jit(median, in_shardings=where, out_shardings=where).lower(shape).compile()
    kinds = hlo.count(hlo.Program(compiled.as_text()).kernels, "kind")
    assert kinds["custom"] == 1
    assert sum(kinds.values()) <= 4


@pytest.mark.skipif(importlib.util.find_spec("optax") is None, reason="needs [train]")
@pytest.mark.parametrize("phase", ["distill", "cnn", "steer"])
@pytest.mark.parametrize("key", GENERATIONS)
def test_training_steps_compile(key, phase):
    from artifactnet_jax.train.loop import Trainer
    from artifactnet_jax.train.phases import PHASES

    settings = dataclasses.replace(PHASES[phase], batch=2, seconds=1.0)
    config = dataclasses.replace(PRESETS["edge"], texture=None)
    trainer = Trainer(config, random_tensors(config), settings, jax.devices("cpu")[:1])
    where = cards.placed_on(cards.find_card(key))
    samples = trainer.samples
    batch = {"audio": (2, 1, samples), "label": (2,), "residual": (2, 1, samples)}
    arrays = {k: jax.ShapeDtypeStruct(v, np.float32) for k, v in batch.items()}
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainer.initial())
    step = jax.jit(trainer._pure_step, in_shardings=where, out_shardings=where)
    assert hlo.Program(step.lower(state, arrays).compile().as_text()).kernels
