"""Named NVIDIA cards: their figures, and compiling for one of them where there is none.

The figures are data: `assets/cards.json`, each with its public source. XLA takes a card's
description as text and runs its whole GPU pipeline for it, down to machine code. It needs jax's
CUDA plugin, but neither a driver nor a GPU. Two things it cannot do so: choose among the algorithms
of cuDNN by timing them, and run.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

from artifactnet_jax.backends import BackendError

ASSET = Path(__file__).parent.parent / "assets" / "cards.json"
PLUGINS = ("xla_cuda13", "xla_cuda12")  # of the namespace package jax_plugins, the newer one first
NEEDS_CUDA13 = (10, 1)  # compute capability from which CUDA 12's compiler does not know the names
# What `Card.target` says alike of all cards: limits of CUDA, and the cuDNN to compile for.
COMMON = """threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536"""
CUDNN = (9, 8)


@dataclasses.dataclass(frozen=True)
class Card:
    """One card's figures, as `fields` of the data file describes them. SI units."""

    key: str
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float  # GHz
    fp32: float
    bf16: float
    bandwidth: float
    memory: int
    usable: float
    l2: int
    shared: int
    shared_block: int
    threads: int
    launch: float

    @property
    def architecture(self) -> str:
        """As NVIDIA's compilers call it: "sm_89"."""
        return "sm_{}{}".format(*self.capability)

    @property
    def room(self) -> int:
        """Bytes that a program may count on."""
        return int(self.memory * self.usable)

    def target(self) -> str:
        """The card for XLA: a GpuTargetConfigProto as text."""
        lanes = 64 if self.capability in ((8, 0),) else 128
        (major, minor), (dnn, dnn_minor) = self.capability, CUDNN
        return f"""gpu_device_info {{ {COMMON}
  shared_memory_per_core: {self.shared} shared_memory_per_block_optin: {self.shared_block}
  threads_per_core_limit: {self.threads} core_count: {self.multiprocessors} fpus_per_core: {lanes}
  memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2} clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory} cuda_compute_capability {{ major: {major} minor: {minor} }} }}
  platform_name: "CUDA" dnn_version_info {{ major: {dnn} minor: {dnn_minor} }}
  device_description_str: "{self.name}" """


@functools.cache
def data() -> dict[str, Any]:
    """The data file: "sources", "fields", and "cards" with [figure, source] by field."""
    found: dict[str, Any] = json.loads(ASSET.read_text(encoding="utf-8"))
    return found


def find_card(key: str) -> Card:
    """The card of that key. KeyError where there is none."""
    figures = {k: v if k == "name" else v[0] for k, v in data()["cards"][key].items()}
    figures["capability"] = tuple(figures["capability"])
    return Card(key=key, **figures)


def plugin(card: Card) -> str:
    """The CUDA plugin of jax that compiles for the card.

    Raises:
        BackendError: none is installed, or only one whose compiler does not know the card. That
            compiler would end the process.
    """
    cure = "pip install 'artifactnet-jax[gpu_ahead]'"
    found = [name for name in PLUGINS if _has(f"jax_plugins.{name}")]
    if not found:
        raise BackendError(f"compiling for {card.name} needs jax's CUDA plugin: {cure}")
    if found[0] == "xla_cuda12" and card.capability >= NEEDS_CUDA13 and card.capability < (12, 0):
        raise BackendError(f"CUDA 12's compiler does not know {card.architecture}: {cure}")
    return found[0]


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


def placed_on(card: Card) -> Any:
    """Sharding of arrays that lie on the card, for `jax.jit(in_shardings=...)`.

    What is compiled with it is compiled for the card. Imports jax.

    Raises:
        BackendError: see `plugin`.
    """
    plugin(card)
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    described = topologies.get_topology_desc(
        card.key, platform="cuda", topology="1x1x1", target_config=card.target()
    )
    mesh = topologies.make_mesh(described, (1,), ("x",))
    return NamedSharding(mesh, PartitionSpec())
