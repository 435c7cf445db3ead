"""The verb `doctor`: what is here, what each backend needs, what to report with a bug."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

from artifactnet_jax import __version__
from artifactnet_jax.backends import BACKENDS, cpu_count
from artifactnet_jax.files import cache_folder, writing
from artifactnet_jax.models import pick, why_unavailable
from artifactnet_jax.text import NO_BACKEND, OK, brief

PACKAGES = (
    *("numpy", "soundfile", "soxr", "safetensors", "threadpoolctl", "tqdm", "av", "mutagen"),
    *("jax", "jaxlib", "flax", "optax", "onnx", "onnxruntime"),
)

BOARD = ("/proc/device-tree/model", "/etc/nv_tegra_release")  # of a Jetson


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """Devices of jax, or why there are none. Imports jax."""
    try:
        import jax

        return [f"{d.platform}: {d.device_kind}" for d in jax.devices()]
    except Exception as error:  # a broken driver must not stop the report on it
        return [f"error: {brief(error)}"]


def _nvidia() -> dict[str, Any]:
    """What running an engine here depends on, and what a report of a board should say."""
    from artifactnet_jax.backends import BackendError, engine
    from artifactnet_jax.backends.cuda import find_device
    from artifactnet_jax.weights import ENGINE_SUFFIX

    found: dict[str, Any] = {"gpu": None, "capability": None, "memory": None, "cuda": None}
    device = find_device()
    if isinstance(device, str):
        found["gpu"] = f"none: {device}"
    else:
        found |= {"gpu": device.name, "capability": ".".join(map(str, device.capability))}
        found |= {"memory": device.memory, "cuda": device.driver}
    for name in ("tensorrt", engine.RTX):
        found[name] = None
        if importlib.util.find_spec(name) is not None:
            try:
                found[name] = engine.load_library(name).__version__
            except BackendError as error:
                found[name] = f"error: {error}"
    found["board"], found["l4t"] = map(first_line, BOARD)
    found["power_mode"] = None
    if tool := shutil.which("nvpmodel"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run([tool, "-q"], capture_output=True, text=True, timeout=10)
            found["power_mode"] = next(iter(done.stdout.splitlines()), None)
    folder = cache_folder("engines")
    found["engine_cache"] = os.fspath(folder)
    found["engines"] = sorted(path.name for path in folder.glob(f"*{ENGINE_SUFFIX}"))
    return found


def first_line(path: str) -> str | None:
    """Of a small system file; None where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().rstrip("\n\0") or None
    except OSError:
        return None


def examine() -> dict[str, Any]:
    """Everything the report shows, as plain data."""
    from artifactnet_jax.weights import WeightsError, default_path, load_weights

    backends = {name: why_unavailable(name) for name in BACKENDS}
    auto = next((name for name, reason in backends.items() if not reason), None)
    try:
        loaded = load_weights()
        weights: dict[str, Any] = {**loaded.summary(), "licence": loaded.licence}
        weights["provenance"] = dict(loaded.provenance)
        weights["threshold"] = loaded.config.verdict.threshold
        weights["operating_points"] = dict(loaded.config.verdict.operating_points)
        auto = auto and pick(loaded)
    except WeightsError as error:
        weights = {"error": str(error)}
    try:
        import soundfile

        formats = sorted(soundfile.available_formats())
    except (ImportError, OSError) as error:
        formats = [f"error: {error}"]
    return {
        "artifactnet_jax": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": cpu_count(),
        "packages": {package: _version(package) for package in PACKAGES},
        "backends": {name: reason or "ok" for name, reason in backends.items()},
        "auto": auto,  # with the weights below
        "jax_devices": [] if backends["xla"] else _devices(),
        "nvidia": _nvidia(),
        "audio_formats": formats,
        "pyav": "ok" if _version("av") else "AAC, M4A: pip install 'artifactnet-jax[av]'",
        "tags": "ok" if _version("mutagen") else "notices: pip install 'artifactnet-jax[tags]'",
        "weights_file": os.fspath(default_path()),
        "weights": weights,
    }


def _nvidia_lines(found: dict[str, Any]) -> list[str]:
    gpu = found["gpu"]
    if found["capability"] is not None:
        gpu += f", compute capability {found['capability']}, {found['memory'] / 2**30:.1f} GiB, "
        gpu += f"driver for CUDA {found['cuda']}"
    rows = {"GPU": gpu, "TensorRT": found["tensorrt"] or "-"}
    rows["TensorRT for RTX"] = found["tensorrt_rtx"] or "-"
    board = [found[key] for key in ("board", "l4t", "power_mode") if found[key]]
    if found["l4t"]:
        rows["board"] = "; ".join(board)
    rows["engines"] = f"{len(found['engines'])} in {found['engine_cache']}"
    lines = [f"  {name:<17} {text}" for name, text in rows.items()]
    return ["\nNVIDIA:", *lines, *(f"    {name}" for name in found["engines"])]


def run(args: argparse.Namespace) -> int:
    """Print the report to stdout; 3 when no backend can run."""
    found = examine()
    if args.json:
        with writing("stdout"):
            print(json.dumps(found, indent=1))
        return OK if found["auto"] else NO_BACKEND
    print(f"artifactnet-jax {found['artifactnet_jax']}, Python {found['python']}")
    print(f"{found['platform']}, {found['cores']} cores\n")
    print(f"backends (auto takes {found['auto'] or 'none'}):")
    for name, state in found["backends"].items():
        print(f"  {name:<17} {state}")
    for device in found["jax_devices"]:
        print(f"  {'':<17} jax device {device}")
    for line in _nvidia_lines(found["nvidia"]):
        print(line)
    print("\npackages:")
    for package, version in found["packages"].items():
        print(f"  {package:<13} {version or '-'}")
    formats = ", ".join(found["audio_formats"])
    print(f"\naudio by libsndfile: {formats}\naudio by PyAV:       {found['pyav']}")
    print(f"tags by mutagen:     {found['tags']}")
    weights = found["weights"]
    if "error" in weights:
        print(f"\nweights: {weights['error']}")
    else:
        status = weights["provenance"].get("status", "release")
        print(f"\nweights: {weights['name']} ({status}, {weights['preset']}, {weights['licence']})")
        print(f"         sha256 {weights['sha256']}")
        points = ", ".join(f"{k} {v:g}" for k, v in weights["operating_points"].items())
        print(f"         threshold {weights['threshold']:g}; operating points: {points or 'none'}")
    return OK if found["auto"] else NO_BACKEND
