"""The verb `bench gpu`: what the detector would cost on a named NVIDIA card, without one.

XLA compiles the program for the card (`backends.cards`). The compiled text tells the kernels, what
they compute and move, and how much memory they take (`bench.hlo`). From the card's figures follows
a time that no card can beat by much. Every such time is called predicted. Where a card of the same
generation is here, the same program is run, and what it took stands beside.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from artifactnet_jax.backends import BackendError
from artifactnet_jax.backends.cards import Card, data, find_card, placed_on, plugin
from artifactnet_jax.backends.cuda import find_device
from artifactnet_jax.bench import hlo
from artifactnet_jax.config import Config
from artifactnet_jax.files import check_output, replace_file, writing
from artifactnet_jax.models import open_model
from artifactnet_jax.results import to_json
from artifactnet_jax.text import NO_BACKEND, OK, USAGE, CommandError
from artifactnet_jax.weights import Weights, WeightsError, random_tensors

SCHEMA = "artifactnet-jax/gpu/1"
DTYPES = ("float32", "bfloat16")
TRACK_SEGMENTS = 60  # of 4 s: a track of 4 minutes
TOP = 8  # of the kernels that take longest
ROUNDS = 20  # of a measurement
EXACT = ("front_end", "hpss", "texture")  # stages that compute in float32, whatever the dtype
ASSUMPTIONS = (
    "a kernel takes the longer of its operations over the card's peak and its bytes over the "
    "memory's bandwidth, and a launch; kernels run one after the other",
    "bytes: every operand once and every result once; nothing stays in the L2 cache",
    "operations: as the compiled text states them, once; a logarithm counts as one",
    "float32 convolutions run outside tensor cores (no TF32), bfloat16 ones inside, both at the "
    "card's peak; what is no product has half of the float32 peak",
    "cuDNN's workspace, and what choosing its algorithms by timing would gain, are not known",
    "decoding of files, and copies to the card, are left out",
)


def run(args: argparse.Namespace) -> int:
    """Compile, print JSON or a table. CommandError: a card that nothing compiles for."""
    if args.out:
        check_output(args.out, f"--out {args.out}")
    cards = [find_card(key) for key in args.card]
    try:
        for card in cards:
            plugin(card)
        weights = _weights(args)
        here = _prepared()
        rows = []
        for card, dtype, batch in itertools.product(cards, args.dtype, args.batch):
            if not args.quiet:
                print(f"{card.name}: {dtype}, {batch} segments", file=sys.stderr)
            row = examine(card, weights, dtype, batch)
            row["measured"] = None
            if here is not None and here.capability == card.capability:
                row["measured"] = measured(weights, dtype, batch)
            rows.append(row)
    except BackendError as error:
        raise CommandError(str(error), NO_BACKEND) from error
    found = {
        "schema": SCHEMA,
        "weights": {"name": weights.name, "preset": weights.config.preset},
        "assumptions": list(ASSUMPTIONS),
        "sources": data()["sources"],
        "cards": {card.key: data()["cards"][card.key] for card in cards},
        "programs": rows,
    }
    text = to_json(found) + "\n"
    if args.out:
        with writing(args.out):
            replace_file(args.out, text.encode())
    with writing("stdout"):
        if args.table:
            sys.stdout.write(table(found))
        elif not args.out:
            sys.stdout.write(text)
    return OK


def _weights(args: argparse.Namespace) -> Weights:
    if args.preset:
        config = Config.from_preset(args.preset)
        return Weights("random", config, random_tensors(config), "", "none", {})
    try:
        model = open_model(args.weights)
    except WeightsError as error:
        raise CommandError(str(error), USAGE) from error
    if not isinstance(model, Weights):
        cure = "name a weights file, or --preset"
        raise CommandError(f"{args.weights}: bench gpu compiles weights only: {cure}", USAGE)
    return model


def _prepared() -> Any:
    """The GPU here, None without one: then jax must not look for any. Before jax's first device."""
    import jax

    device = find_device()
    if isinstance(device, str):
        jax.config.update("jax_platforms", "cpu")
        return None
    return device


# --- one program ----------------------------------------------------------------------------------


def examine(card: Card, weights: Weights, dtype: str, batch: int) -> dict[str, Any]:
    """Compile the detector for a card, and tell what came out: one row of the report."""
    from artifactnet_jax.backends.xla import folded_model, lowered
    from artifactnet_jax.model import ArtifactNet

    where = placed_on(card)
    shape = (batch, weights.config.front_end.segment_samples)
    with tempfile.TemporaryDirectory() as dump:
        asked = lowered(folded_model(weights, dtype), ArtifactNet.__call__, [shape], where)
        began = time.perf_counter()
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        compiled = asked.compile(compiler_options=options)
        taken = time.perf_counter() - began
        registers = registers_of(sorted(Path(dump).glob("*.ptx")))
    memory = compiled.memory_analysis()
    needed = {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes + memory.argument_size_in_bytes,
    }
    needed["room"] = card.room
    needed["fits"] = needed["arguments"] + needed["temporary"] <= card.room
    return {
        "card": card.key,
        "dtype": dtype,
        "batch": batch,
        "compile_s": round(taken, 1),
        **figures(hlo.Program(compiled.as_text()), card, batch),
        "memory": needed,
        "registers": registers,
    }


def figures(program: hlo.Program, card: Card, batch: int) -> dict[str, Any]:
    """What a compiled program does in a call, and the time predicted for the card."""
    rates = {"fp32": card.fp32, "bf16": card.bf16}
    rates |= {"bandwidth": card.bandwidth, "launch": card.launch}
    kernels = program.kernels
    launches = sum(kernel.times for kernel in kernels)
    convolutions = [kernel for kernel in kernels if kernel.kind == "convolution"]
    seconds = hlo.total(kernels, rates)
    longest = sorted(kernels, key=lambda k: -k.times * hlo.seconds(k, rates))[:TOP]
    by_stage = {
        stage: hlo.total([k for k in kernels if k.stage == stage], rates)
        for stage in hlo.count(kernels, "stage")
    }
    return {
        "kernels": {
            "launches": launches,
            "distinct": len(kernels),
            "by_kind": hlo.count(kernels, "kind"),
            "by_stage": hlo.count(kernels, "stage"),
        },
        "flops": sum(kernel.flops * kernel.times for kernel in kernels),
        "bytes": sum(kernel.bytes * kernel.times for kernel in kernels),
        "convolutions": {
            "flops": sum(kernel.flops for kernel in convolutions),
            "bytes": sum(kernel.bytes for kernel in convolutions),
        },
        "rounded": hlo.rounded(kernels, EXACT),
        "predicted": {
            "call_s": seconds,
            "launches_s": launches * card.launch,
            "segment_s": seconds / batch,
            "track_s": seconds / batch * TRACK_SEGMENTS,
            "by_stage_s": by_stage,
            "longest": [
                {
                    "kernel": kernel.name,
                    "kind": kernel.kind,
                    "stage": kernel.stage,
                    "times": kernel.times,
                    "flops": kernel.flops,
                    "bytes": kernel.bytes,
                    "predicted_s": kernel.times * hlo.seconds(kernel, rates),
                }
                for kernel in longest
            ],
        },
    }


def measured(weights: Weights, dtype: str, batch: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of the same program on jax's first device, audio and weights there already."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from artifactnet_jax.backends.started import first_device
    from artifactnet_jax.backends.xla import folded_model, lowered
    from artifactnet_jax.model import ArtifactNet

    device, model = first_device(), folded_model(weights, dtype)
    rng = np.random.default_rng(0)
    audio = rng.standard_normal((batch, weights.config.front_end.segment_samples), np.float32) / 8
    asked = lowered(model, ArtifactNet.__call__, [audio.shape], SingleDeviceSharding(device))
    compiled = asked.compile()
    from flax import nnx

    state = jax.device_put(nnx.state(model), compiled.input_formats[0][0])
    there = jax.device_put(audio, device)
    taken = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        jax.block_until_ready(compiled(state, there))
        taken.append(time.perf_counter() - began)
    seconds = statistics.median(taken[1:])  # the first one loads what the others find
    return {
        "device": device.device_kind,
        "rounds": rounds,
        "call_s": seconds,
        "segment_s": seconds / batch,
        "track_s": seconds / batch * TRACK_SEGMENTS,
    }


# --- registers ------------------------------------------------------------------------------------


def registers_of(files: Sequence[Path]) -> dict[str, Any] | None:
    """What the assembler says of the kernels in PTX files; None where it is not installed.

    {"kernels", "most", "spills"}: spills are the names of kernels that have any. Triton's kernels
    are assembled with their own limits, and so counted alike.
    """
    assembler = _assembler()
    if assembler is None or not files:
        return None
    said = [_assembled(assembler, file) for file in files]
    return read_registers("\n".join(said))


def read_registers(said: str) -> dict[str, Any]:
    """The figures in what `ptxas -v` printed."""
    used: dict[str, int] = {}
    spills = []
    for part in said.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        found = re.search(r"Used (\d+) registers", part)
        used[name] = int(found[1]) if found else 0
        if any(int(n) for n in re.findall(r"(\d+) bytes spill", part)):
            spills.append(name)
    return {"kernels": len(used), "most": max(used.values(), default=0), "spills": spills}


def _assembler() -> Path | None:
    found = util.find_spec("nvidia")
    for folder in found.submodule_search_locations or () if found else ():
        for pattern in ("cu13/bin/ptxas", "cuda_nvcc/bin/ptxas"):
            if (path := Path(folder) / pattern).is_file():
                return path
    return None


def _assembled(assembler: Path, file: Path) -> str:
    target = re.search(r"^\.target (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    if target is None:
        return ""
    command = [str(assembler), "-v", "--gpu-name", target[1], "-o", "/dev/null", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


# --- the report -----------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """The report as Markdown."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    weights = found["weights"]
    yield f"Weights {weights['name']} ({weights['preset']}). Times are predicted, not measured, "
    yield "but for the last column."
    yield ""
    head = ("card", "dtype", "batch", "launches", "GFLOP", "GB", "temporary MB", "fits", "spills")
    timed = ("predicted ms", "predicted s per 4 min", "longest stage", "measured ms")
    yield from _rows((*head, *timed), map(_cells, found["programs"]))
    yield ""
    for by in ("kind", "stage"):
        order = hlo.KINDS if by == "kind" else (*hlo.STAGES, hlo.REST)
        yield f"Kernels launched in a call, by {by}:"
        yield ""
        counts = [(row, row["kernels"][f"by_{by}"]) for row in found["programs"]]
        cells = ([*_key(row), *(each.get(name, 0) for name in order)] for row, each in counts)
        yield from _rows(("card", "dtype", "batch", *order), cells)
        yield ""
    yield "What the prediction assumes:"
    yield ""
    yield from (f"- {text}" for text in found["assumptions"])
    for key, figures in found["cards"].items():
        said = (f"{k} {v[0]} ({v[1]})" for k, v in figures.items() if k != "name")
        yield f"- {key}: {figures['name']}; {'; '.join(said)}"
    used = {v[1] for card in found["cards"].values() for k, v in card.items() if k != "name"}
    yield from (f"- ({key}) {text}" for key, text in found["sources"].items() if key in used)


def _rows(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(map(str, cells))} |"


def _key(row: dict[str, Any]) -> list[Any]:
    return [row["card"], row["dtype"], row["batch"]]


def _cells(row: dict[str, Any]) -> list[Any]:
    predicted, memory = row["predicted"], row["memory"]
    stage, seconds = max(predicted["by_stage_s"].items(), key=lambda pair: pair[1])
    registers = row["registers"]
    return [
        *_key(row),
        row["kernels"]["launches"],
        f"{row['flops'] / 1e9:.1f}",
        f"{row['bytes'] / 1e9:.2f}",
        f"{memory['temporary'] / 1e6:.0f}",
        "yes" if memory["fits"] else "no",
        "-" if registers is None else len(registers["spills"]),
        f"{predicted['call_s'] * 1e3:.2f}",
        f"{predicted['track_s']:.4f}",
        f"{stage} {seconds / predicted['call_s']:.0%}",
        "-" if row["measured"] is None else f"{row['measured']['call_s'] * 1e3:.2f}",
    ]
