"""The one door: a path in, a model out, and the backend that runs it.

A model is `Weights` (any backend), a `ForeignGraph` (XLA, node by node) or an `Engine` (the library
that it is for). `backends_of` is the only place that says so.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable

from artifactnet_jax.backends import BACKENDS, Backend, BackendError
from artifactnet_jax.presets import flops
from artifactnet_jax.weights import (
    ENGINE_SUFFIX,
    Engine,
    ForeignGraph,
    Model,
    Weights,
    load_weights,
)

EXPORTED = ("onnxruntime", "onnxruntime-cuda", "tensorrt")  # they run the graphs of `export`
HEAVY_FLOPS = 50e9  # per segment


def open_model(
    path: str | os.PathLike[str] | None, backend: str = "auto"
) -> Weights | ForeignGraph | Engine:
    """The model of a weights file, an engine or an ONNX file; None: the weights of the package.

    A graph that `export` wrote is an `Engine` for a backend that runs it, for "auto" where
    onnxruntime is installed, and in int8 for any. All other ONNX files are converted once, then
    cached; the notes of `export` on thresholds and segments hold there too. Raises WeightsError.
    """
    name = "" if path is None else os.fspath(path).lower()
    if path is not None and name.endswith(ENGINE_SUFFIX):
        from artifactnet_jax.backends.engine import read_recipe

        return read_recipe(path)[1]
    if path is not None and name.endswith(".onnx"):
        from artifactnet_jax.convert.export_cache import noted_config, read_exported
        from artifactnet_jax.convert.import_cache import load_onnx

        runs = backend in EXPORTED or (backend == "auto" and not why_unavailable(EXPORTED[0]))
        if found := read_exported(path, only="" if runs else "int8"):
            return found
        model, noted = load_onnx(path), noted_config(path)
        if noted is None:
            return model
        # How a track is judged is a matter of the file, whatever runs its network.
        config = dataclasses.replace(model.config, verdict=noted.verdict)
        return dataclasses.replace(model, config=config)
    return load_weights(path) if path is not None else load_weights()


def backends_of(model: Model) -> tuple[str, ...]:
    """Names of the backends that run a model, installed or not."""
    if isinstance(model, ForeignGraph):
        return ("xla",)
    if isinstance(model, Engine):
        return ("tensorrt",) if model.compiled else EXPORTED
    return tuple(BACKENDS)


def why_unavailable(name: str) -> str:
    """One line saying why a backend cannot run here and the cure; empty when it can."""
    needs = BACKENDS[name]
    if sys.version_info < needs.python:
        version = ".".join(map(str, needs.python))
        return f"backend {name!r} needs Python {version} or newer; use --backend numpy"
    if name == "tensorrt":  # from the system or from PyPI, under either name; and a GPU
        from artifactnet_jax.backends import engine

        return engine.why_unavailable()
    missing = [p for p in needs.packages if importlib.util.find_spec(p) is None]
    if missing:
        return (
            f"backend {name!r} needs {' and '.join(missing)}: "
            f"pip install 'artifactnet-jax[{needs.extra}]'"
        )
    if name == "onnxruntime-cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            cure = "pip install onnxruntime-gpu in place of onnxruntime"
            return f"backend {name!r} needs onnxruntime's CUDA provider: {cure}"
    return ""


def pick(model: Model) -> str:
    """What "auto" means here: the fastest of what is installed, as measured in docs/speed.md.

    That is `xla` on a GPU. On a CPU it is `onnxruntime`; without it, `numpy` for light weights,
    which has scored a track before `xla` has started, and `xla` for heavy ones.
    """
    if not isinstance(model, Weights):
        return backends_of(model)[0]
    gpu = any(importlib.util.find_spec(f"jax_{kind}_plugin") for kind in ("cuda12", "cuda13"))
    compiles = not why_unavailable("xla")
    if gpu and compiles:
        return "xla"
    ready = not why_unavailable("onnxruntime") and importlib.util.find_spec("onnx") is not None
    if ready and not model.whole_song:
        return "onnxruntime"
    heavy = flops(model.config)["total"] > HEAVY_FLOPS
    return "xla" if compiles and heavy else "numpy"


def load_backend(
    name: str, model: Model, *, dtype: str = "float32", batch_size: int | None = None
) -> Backend:
    """Build a backend; "auto" is what `pick` says, or `xla` where the dtype needs it.

    Raises ValueError for an unknown name or dtype, BackendError when it cannot run here.
    """
    if name == "auto":
        name = "xla" if dtype != "float32" and isinstance(model, Weights) else pick(model)
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: use auto, {', '.join(BACKENDS)}")
    if reason := why_unavailable(name):
        raise BackendError(reason)
    own = backends_of(model)
    if isinstance(model, Engine) and name not in own:
        what = "an engine" if model.compiled else "an exported graph"
        cure = f"use --backend {own[0]}, or name the weights file"
        raise ValueError(f"{model.file} is {what}, which {name} cannot run: {cure}")
    if name not in own:
        raise ValueError(f"these weights are a foreign graph, which {name} cannot run: use xla")
    return _maker(name, model)(model, dtype, batch_size)


def _maker(name: str, model: Model) -> Callable[..., Backend]:
    """The class of a backend, whose packages are imported only here."""
    if isinstance(model, ForeignGraph):
        from artifactnet_jax.convert.runtime import GraphBackend

        return GraphBackend
    if name == "xla":
        from artifactnet_jax.backends.xla import XlaBackend

        return XlaBackend
    if name == "numpy":
        from artifactnet_jax.backends.numpy import NumpyBackend

        return NumpyBackend
    if name == "tensorrt":
        from artifactnet_jax.backends.tensorrt import TensorRTBackend

        return TensorRTBackend
    from artifactnet_jax.backends import onnxruntime

    if name == "onnxruntime-cuda":
        return onnxruntime.OnnxruntimeCudaBackend
    return onnxruntime.OnnxruntimeBackend
