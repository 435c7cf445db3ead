"""One run of a graph on a probe: what the recogniser reads a network from."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

from artifactnet_jax.convert.graph import Graph


def decimal(number: np.ndarray) -> float:
    """A single number as it was written: 1e-10, not the float32 next to it."""
    return float(str(np.reshape(number, ())[()]))


class Unmapped(Exception):
    """These nodes are no network of `Layer`s; the message names the node and the reason."""


@dataclasses.dataclass(eq=False)
class Trace:
    """What one run of a graph on a probe has shown.

    A tensor is static when it does not depend on the audio; of the others the shapes are kept, and
    the values of those that are not large.
    """

    graph: Graph
    segments: int  # of the probe
    static: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    values: dict[str, np.ndarray]
    stored: frozenset[str]  # tensors that the file itself has a name for
    half: bool  # whether any of them is float16

    def __post_init__(self) -> None:
        self.producer = {out: node for node in self.graph.nodes for out in node.outputs if out}
        self.order = {out: k for k, node in enumerate(self.graph.nodes) for out in node.outputs}

    def inputs(self) -> list[str]:
        """The graph's inputs."""
        return [value.name for value in self.graph.inputs]

    def before(self, name: str) -> set[str]:
        """The tensors that a tensor is computed from, itself included."""
        seen: set[str] = set()
        todo = [name]
        while todo:
            tensor = todo.pop()
            if tensor and tensor not in seen and tensor not in self.static:
                seen.add(tensor)
                todo += self.producer[tensor].inputs if tensor in self.producer else ()
        return seen

    def after(self, name: str) -> set[str]:
        """The tensors that are computed from a tensor, itself included."""
        reached = {name}
        for node in self.graph.nodes:
            if reached.intersection(node.inputs):
                reached.update(node.outputs)
        return reached

    def cuts(self, source: set[str], tensor: str, target: str) -> bool:
        """Whether every way from any of `source` to `target` passes through `tensor`."""
        seen: set[str] = set()
        todo = [target]
        while todo:
            name = todo.pop()
            if not name or name in seen or name in self.static or name == tensor:
                continue
            if name in source:
                return False
            seen.add(name)
            todo += self.producer[name].inputs if name in self.producer else ()
        return True


def probe_audio(segments: int, samples: int, seed: int = 0) -> np.ndarray:
    """Audio float32 [segments, samples] with everything that the steps must tell apart."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 44_100
    audio = np.zeros((segments, samples))
    for i in range(segments):
        for start in np.linspace(0, t[-1] * 0.8, 9):  # notes with overtones that die away
            pitch = rng.uniform(80, 900)
            since = np.maximum(t - start, 0)
            for k in range(1, 12):
                tone = np.sin(2 * np.pi * pitch * k * since) * np.exp(-(2 + k) * since)
                audio[i] += rng.uniform(0.02, 0.2) / k * tone * (t >= start)
        audio[i] += rng.normal(0, 0.01, samples) * (1 + np.sin(2 * np.pi * (1 + i) * t))
        loud = slice(samples // 4, samples // 3)  # so that the clamp below the maximum shows
        audio[i, loud] += 0.6 * np.sin(2 * np.pi * 500 * (1 + i) * t[loud])
        clicks = rng.integers(0, samples, 12)
        audio[i, clicks] += rng.uniform(-0.8, 0.8, 12)
        audio[i, -samples // 6 :] = rng.normal(0, 1e-6, len(audio[i, -samples // 6 :]))
        audio[i] *= (0.8, 0.25, 0.5)[i % 3]
    return np.clip(audio, -1, 1).astype(np.float32)


def probe(samples: int) -> dict[str, np.ndarray]:
    """Segments float32 [samples] of what detectors meet, by name."""
    rng = np.random.default_rng(0)
    music = probe_audio(3, samples)
    clicks = np.zeros(samples)
    clicks[rng.integers(0, samples, 4)] = 0.7
    tone = 0.9 * np.sin(2 * np.pi * 1000 / 44_100 * np.arange(samples))
    found = {f"music {i + 1}": segment for i, segment in enumerate(music)}
    found |= {
        "digital silence": np.zeros(samples),
        "clicks in silence": clicks,
        "music at -60 dB": music[0] * 1e-3,
        "full-scale noise": rng.uniform(-1, 1, samples),
        "sine of 1 kHz": tone + rng.normal(0, 1e-5, samples),  # 16 bits have that much noise
    }
    return {name: audio.astype(np.float32) for name, audio in found.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """A two-dimensional quantity of each segment, found in a tensor of the graph."""

    tensor: str
    array: np.ndarray  # [segments, height, width]
    roles: tuple[str, ...] | None  # axes of the tensor; None where it holds several planes


def planes(trace: Trace, height: int, width: int, among: set[str] | None = None) -> Iterator[Plane]:
    """Every plane of these sizes, those in stacks of up to 16 included, in order of computation."""
    n = trace.segments
    for name in sorted(trace.values, key=lambda tensor: trace.order.get(tensor, -1)):
        shape = trace.shapes[name]
        if (among is not None and name not in among) or len(shape) < 2:
            continue
        count, rest = divmod(math.prod(shape), n * height * width)
        if rest or not 1 <= count <= 16 or height not in shape or width not in shape:
            continue
        for a, b in itertools.permutations(range(len(shape)), 2):
            if shape[a] != height or shape[b] != width:
                continue
            if count == 1:
                others = [k for k in range(len(shape)) if k not in (a, b)]
                front = [k for k in others if shape[k] == n][:1]
                array = np.moveaxis(trace.values[name], (a, b), (-2, -1))
                roles = ["1"] * len(shape)
                roles[a], roles[b] = "h", "w"
                if front:
                    roles[front[0]] = "n"
                elif n > 1:
                    continue
                spare = [k for k in others if roles[k] == "1"]
                if spare:
                    roles[spare[0]] = "c"
                yield Plane(name, array.reshape(n, height, width), tuple(roles))
            else:
                array = np.moveaxis(trace.values[name], (a, b), (-2, -1))
                lead = array.shape[:-2]
                array = array.reshape(-1, height, width)
                orders = {"n": array.reshape(n, count, height, width)}
                if lead[0] != n or n == count:
                    orders["c"] = array.reshape(count, n, height, width).swapaxes(0, 1)
                for stack in orders.values() if n > 1 else [orders["n"]]:
                    for k in range(count):
                        yield Plane(name, stack[:, k], None)
            if height != width:
                break


def scalars(trace: Trace) -> list[float]:
    """Every positive number that the graph holds by itself, in ascending order."""
    found = {
        decimal(array)
        for array in trace.static.values()
        if array.size == 1 and np.issubdtype(array.dtype, np.floating)
    }
    for node in trace.graph.nodes:
        for key in ("min", "max", "value", "epsilon"):
            if isinstance(node.attributes.get(key), float):
                found.add(node.attributes[key])
    return sorted(x for x in found if np.isfinite(x) and x > 0)
