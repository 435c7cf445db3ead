"""Engines: what TensorRT makes of a graph, in a file that says what it is of.

One way to build for TensorRT 10, 11 and TensorRT for RTX: the network is strongly typed, so that
precision is what the ONNX graph says (front end, logarithms and ratios in float32), without TF32,
which would round the spectrum's products. Each batch size has an optimisation profile of its own
with one shape, and a runner keeps to one profile: other profiles are other programs, whose sums
differ in their last bits.

The file is a safetensors file: the plan as a tensor, its `Recipe` and what a verdict needs of the
weights in the header. Neither building from an exported ONNX file nor running needs jax or onnx.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax import fine_head
from artifactnet_jax.backends import BackendError
from artifactnet_jax.backends.cuda import Device, find_device
from artifactnet_jax.convert.export import build_onnx
from artifactnet_jax.files import cache_folder, replace_file
from artifactnet_jax.text import brief
from artifactnet_jax.weights import (
    ENGINE_SUFFIX,
    Engine,
    ForeignGraph,
    Model,
    WeightsError,
)

FORMAT = "artifactnet-jax/engine/1"
REVISION = 1  # of the graph and of how it is built: raise it when the same source builds otherwise
BATCH = 8  # segments per call, unless told otherwise
INPUT, OUTPUT = "audio", "p_ai"  # of the exported graph
RTX, RTX_CAPABILITIES = "tensorrt_rtx", ("SM80", "SM86", "SM89", "SM120")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides whether an engine will do."""

    source: str  # SHA-256 of weights, or of an exported ONNX file
    library: str  # "tensorrt" or "tensorrt_rtx"
    version: str  # of the library
    device: str  # "Orin sm87"; with TensorRT for RTX the generations, "sm80 sm86 sm89 sm120"
    precision: str  # "fp32" or "fp16"
    batches: tuple[int, ...] = (BATCH,)  # segments of each profile, ascending
    samples: int = 176_400  # of a segment
    compatible: bool = False  # runs in later versions of the same major one
    refittable: bool = False  # takes other weights of the same shapes
    revision: int = REVISION

    def name(self) -> str:
        """File name of the engine in the cache."""
        marks = [self.source[:16], self.library, self.version, self.device, self.precision]
        marks += ["x".join(map(str, self.batches)), str(self.samples)]
        marks += ["compatible"] * self.compatible + ["refittable"] * self.refittable
        return _file_name(*marks, f"r{self.revision}{ENGINE_SUFFIX}")

    def misfit(self, wanted: Recipe) -> str:
        """Why an engine of this recipe will not do for `wanted`; empty when it will.

        It will if it has the batches and properties that are wanted, and perhaps others.
        """
        for what in ("source", "library", "device", "precision", "samples", "revision"):
            mine, other = getattr(self, what), getattr(wanted, what)
            if mine != other and what == "source":
                return f"it is of weights {mine[:16]}, not {other[:16]}"
            if mine != other:
                return f"it is of {what} {mine}, not {other}"
        major = self.version.split(".")[0] == wanted.version.split(".")[0]
        later = _numbers(self.version) <= _numbers(wanted.version)
        if self.version != wanted.version and not (self.compatible and major and later):
            return f"it is of {self.library} {self.version}, not {wanted.version}"
        if lacking := [batch for batch in wanted.batches if batch not in self.batches]:
            return f"it has no profile of {lacking[0]} segments"
        if wanted.compatible and not self.compatible:
            return "it is not version-compatible"
        return "it is not refittable" if wanted.refittable and not self.refittable else ""


def _file_name(*parts: str) -> str:
    return "-".join(re.sub(r"[^0-9A-Za-z.]+", "_", part) for part in parts)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


# --- files ---------------------------------------------------------------------------------------


def write_engine(path: str | os.PathLike[str], recipe: Recipe, weights: Model, plan: Any) -> None:
    """Write an engine file atomically; `plan` is a buffer. OSError where that fails."""
    from safetensors.numpy import save

    header = {
        "format": FORMAT,
        "recipe": json.dumps(dataclasses.asdict(recipe)),
        "name": weights.name,
        "config": json.dumps(weights.config.to_dict(), sort_keys=True),
        "licence": weights.licence,
        "sha256": weights.sha256,
        "provenance": json.dumps(dict(weights.provenance), sort_keys=True),
        **({} if weights.fine is None else {fine_head.NOTE: fine_head.to_text(weights.fine)}),
    }
    replace_file(path, save({"plan": np.frombuffer(plan, np.uint8)}, metadata=header))


def read_recipe(path: str | os.PathLike[str]) -> tuple[Recipe, Engine]:
    """What an engine file is of, and the engine. WeightsError: it is none."""
    return _read(path)[:2]


def read_plan(path: str | os.PathLike[str]) -> bytes:
    """The plan of an engine. WeightsError: it is no engine."""
    return _read(path)[2]()


def _read(path: str | os.PathLike[str]) -> tuple[Recipe, Engine, Callable[[], bytes]]:
    from safetensors import SafetensorError, safe_open

    where = os.fspath(path)
    cure = "build it again with artifactnet-jax build"
    if not os.path.isfile(where):
        raise WeightsError(f"{where}: no such engine: make it with artifactnet-jax build")
    try:
        with safe_open(where, framework="np") as file:
            header = file.metadata() or {}
        if header.get("format") != FORMAT:
            raise WeightsError(f"{where}: its header is not {FORMAT!r}: {cure}")
        fields = json.loads(header["recipe"])
        recipe = Recipe(**{**fields, "batches": tuple(fields["batches"])})
        config = cfg.Config.from_dict(json.loads(header["config"]))
        provenance = json.loads(header["provenance"])
        name, sha256, licence = header["name"], header["sha256"], header["licence"]
        fine = fine_head.noted(header)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{where}: not a readable engine ({brief(error)}): {cure}") from error

    def plan() -> bytes:
        with safe_open(where, framework="np") as file:
            data: bytes = file.get_tensor("plan").tobytes()
        return data

    return recipe, Engine(name, config, sha256, licence, provenance, where, fine), plan


# --- building ------------------------------------------------------------------------------------


def why_unavailable() -> str:
    """One line saying why no engine can run here and the cure; empty when one can."""
    try:
        find_library()
    except BackendError as error:
        return f"backend 'tensorrt': {error}"
    device = find_device()
    if isinstance(device, str):
        return f"backend 'tensorrt': {device}; use --backend numpy"
    return ""


def find_library(target: str | None = None) -> str:
    """Name of the module for "local" or "rtx"; None takes the one that is installed.

    BackendError: it is not.
    """
    names = {"local": ("tensorrt",), "rtx": (RTX,), None: ("tensorrt", RTX)}[target]
    for name in names:
        if importlib.util.find_spec(name) is not None:
            return name
    cure = {
        "tensorrt": "install it, or on a Jetson let the environment see the system's "
        "(python3 -m venv --system-site-packages)",
        RTX: "pip install 'artifactnet-jax[rtx]'",
    }[names[0]]
    raise BackendError(f"there is no Python package {names[0]}: {cure}")


def load_library(name: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`. BackendError: it does not load, or is too old."""
    try:
        trt = importlib.import_module(name)
        version = trt.__version__
    except (ImportError, OSError, AttributeError) as error:
        raise BackendError(f"{name} does not load: {brief(error)}; install it again") from error
    if name != RTX and _numbers(version)[0] < 10:
        raise BackendError(
            f"{name} {version} is too old: 10 or newer, which is JetPack 6.1 or newer"
        )
    return trt


def logger(trt: Any) -> Any:
    """A logger for TensorRT that says nothing, and knows the last error."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # of a module without types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.error = ""

        def log(self, severity: Any, message: str) -> None:
            _log.debug("%s", message)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.error = message.splitlines()[0] if message else ""

    return Logger()


def device_for(library: str, device: Device | str) -> str:
    """`Recipe.device` of this library on a GPU, or on the one that there is not and why.

    BackendError: it does not run there.
    """
    generations = " ".join(RTX_CAPABILITIES).lower()
    if library == RTX:
        if isinstance(device, Device) and str(device).split()[-1] not in generations.split():
            cure = "install TensorRT itself"
            raise BackendError(f"TensorRT for RTX runs on {generations}, not on {device}: {cure}")
        return generations  # one engine for all of them, built without any
    if isinstance(device, str):
        raise BackendError(f"{device}: build on the machine that is to run it, or use --target rtx")
    return str(device)


def recipe_for(
    weights: Model,
    library: str,
    device: Device | str,
    *,
    precision: str,
    batches: Sequence[int] = (BATCH,),
    compatible: bool = False,
    refittable: bool = False,
) -> Recipe:
    """The engine of these weights for this library here.

    Raises ValueError for weights that no engine can be made of, and for what TensorRT for RTX does
    not build (1.7 without a GPU); BackendError as `device_for`.
    """
    foreign = isinstance(weights, ForeignGraph)
    if foreign or weights.whole_song:
        what = "a foreign graph" if foreign else "of a model that joins a song"
        raise ValueError(
            f"weights {weights.name!r} are {what}: TensorRT scores segments one by one"
        )
    if library == RTX and (compatible or refittable):
        # The one needs a library that its package lacks, the other compiles on a GPU.
        raise ValueError(
            "TensorRT for RTX builds neither version-compatible nor refittable engines"
        )
    source = weights.sha256
    if isinstance(weights, Engine):
        own = weights.precision
        if own == "int8":
            cure = "export it again in fp16"
            raise ValueError(f"{weights.file} is int8, for onnxruntime on a CPU: {cure}")
        if own != precision:
            raise ValueError(f"{weights.file} is {own}, not {precision}: export it again")
        source = hashlib.sha256(Path(weights.file).read_bytes()).hexdigest()
    return Recipe(
        source=source,
        library=library,
        version=load_library(library).__version__,
        device=device_for(library, device),
        precision=precision,
        batches=tuple(sorted(set(batches))),
        samples=weights.config.front_end.segment_samples,
        compatible=compatible,
        refittable=refittable,
    )


def to_onnx(weights: Model, precision: Any) -> bytes:
    """The graph of weights as ONNX: the file itself where they are one.

    BackendError: the onnx package is missing. ValueError: there is no such graph.
    """
    if isinstance(weights, Engine):
        return Path(weights.file).read_bytes()
    try:
        data: bytes = build_onnx(weights, precision=precision).SerializeToString()
    except ImportError as error:
        cure = "pip install onnx, or export the weights elsewhere and name the ONNX file here"
        raise BackendError(f"an engine of a weights file needs {error.name}: {cure}") from error
    return data


def build_plan(recipe: Recipe, model: bytes, *, workspace: int | None = None) -> Any:
    """Plan (a buffer) of an ONNX graph; `workspace` in MB limits what kernels are tried with.

    BackendError with TensorRT's own words where it fails.
    """
    trt = load_library(recipe.library)
    said = logger(trt)
    builder = trt.Builder(said)
    # Version 11 has no other networks, and no flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, said)
    if not parser.parse(model):
        first = parser.get_error(0)
        raise BackendError(f"{recipe.library} cannot read the graph: {first.desc()}: report this")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    for wanted, name in ((recipe.compatible, "VERSION_COMPATIBLE"), (recipe.refittable, "REFIT")):
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, name))
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace << 20)
    for batch in recipe.batches:
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT, *3 * [(batch, recipe.samples)])
        config.add_optimization_profile(profile)
    timings: Path | None = None
    if recipe.library == RTX:  # ahead of time, without timing anything
        config.num_compute_capabilities = len(RTX_CAPABILITIES)
        for k, name in enumerate(RTX_CAPABILITIES):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), k)
    else:
        timings = cache_folder("engines") / _file_name(
            "timings", recipe.version, f"{recipe.device}.bin"
        )
        _use_timings(config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(
            f"{recipe.library} cannot build the engine: {said.error or 'it does not say why'}; "
            "if memory is short, set --workspace or fewer --batches"
        )
    if timings is not None:
        with contextlib.suppress(OSError):  # it only saves time
            timings.parent.mkdir(parents=True, exist_ok=True)
            replace_file(timings, bytes(config.get_timing_cache().serialize()))
    return plan


def _use_timings(config: Any, path: Path) -> None:
    """Attach the timings of earlier builds with this version on this device, if there are any."""
    known = b""
    with contextlib.suppress(OSError):
        known = path.read_bytes()
    if not config.set_timing_cache(config.create_timing_cache(known), False) and known:
        config.set_timing_cache(config.create_timing_cache(b""), False)


def refit_plan(recipe: Recipe, plan: bytes, model: bytes) -> Any:
    """The plan with the weights of another ONNX graph of the same shape; on its own device.

    BackendError where TensorRT refuses.
    """
    trt = load_library(recipe.library)
    said = logger(trt)
    engine = load_plan(trt, said, recipe, plan)
    refitter = trt.Refitter(engine, said)
    parser = trt.OnnxParserRefitter(refitter, said)
    if not parser.refit_from_bytes(model) or not refitter.refit_cuda_engine():
        raise BackendError(
            f"{recipe.library} cannot refit the engine: {said.error or 'it does not say why'}; "
            "build it again without --refit"
        )
    return engine.serialize()


def load_plan(trt: Any, said: Any, recipe: Recipe, plan: bytes) -> Any:
    """TensorRT's engine of a plan. BackendError where it refuses."""
    runtime = trt.Runtime(said)
    if recipe.compatible:  # its plan carries the runtime of its version
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(
            f"{recipe.library} cannot load the engine: {said.error or 'it does not say why'}; "
            "build it again with artifactnet-jax build"
        )
    return engine


def cached_engine(wanted: Recipe, folder: Path) -> tuple[Path | None, str]:
    """An engine in a folder that will do, or None; and what is wrong with one of these weights."""
    if (folder / wanted.name()).is_file():
        with contextlib.suppress(WeightsError):
            if not read_recipe(folder / wanted.name())[0].misfit(wanted):
                return folder / wanted.name(), ""
    reason = ""
    for path in sorted(folder.glob(f"{wanted.source[:16]}-*{ENGINE_SUFFIX}")):
        with contextlib.suppress(WeightsError):
            reason = read_recipe(path)[0].misfit(wanted)
            if not reason:
                return path, ""
            reason = f"{path.name}: {reason}"
    return None, reason


def make_engine(
    weights: Model, recipe: Recipe, path: Path, reason: str, *, workspace: int | None = None
) -> None:
    """Build an engine into a file, and say so on stderr. BackendError, ValueError, OSError."""
    why = f" ({reason})" if reason else ""
    what = f"{recipe.precision}, batches {', '.join(map(str, recipe.batches))}"
    where = f"{recipe.library} {recipe.version} on {recipe.device}"
    print(
        f"artifactnet-jax: building an engine of {weights.name!r}, {what}, {where}{why}; "
        "this takes minutes",
        file=sys.stderr,
    )
    began = time.monotonic()
    plan = build_plan(recipe, to_onnx(weights, recipe.precision), workspace=workspace)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_engine(path, recipe, weights, plan)
    took = time.monotonic() - began
    print(f"artifactnet-jax: built in {took:.0f} s: {path}", file=sys.stderr)
