"""The verb `doctor`: what is here, what each backend needs, what to report with a bug."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from typing import Any

from artifactnet_jax import __version__
from artifactnet_jax.backends import BACKENDS, cpu_count, pick, why_unavailable
from artifactnet_jax.results import NO_BACKEND, OK, brief

PACKAGES = (
    *("numpy", "soundfile", "soxr", "safetensors", "threadpoolctl", "tqdm", "av", "jax"),
    *("jaxlib", "flax", "optax", "onnx", "onnxruntime", "tensorrt"),
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """jax's devices, or why there are none. Imports jax."""
    try:
        import jax

        return [f"{d.platform}: {d.device_kind}" for d in jax.devices()]
    except Exception as error:  # a broken driver must not stop the report on it
        return [f"error: {brief(error)}"]


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
        "audio_formats": formats,
        "pyav": "ok" if _version("av") else "AAC, M4A: pip install 'artifactnet-jax[av]'",
        "weights_file": os.fspath(default_path()),
        "weights": weights,
    }


def run(args: argparse.Namespace) -> int:
    """Print the report to stdout; 3 when no backend can run."""
    found = examine()
    if args.json:
        json.dump(found, sys.stdout, indent=1)
        print()
        return OK if found["auto"] else NO_BACKEND
    print(f"artifactnet-jax {found['artifactnet_jax']}, Python {found['python']}")
    print(f"{found['platform']}, {found['cores']} cores\n")
    print(f"backends (auto takes {found['auto'] or 'none'}):")
    for name, state in found["backends"].items():
        print(f"  {name:<17} {state}")
    for device in found["jax_devices"]:
        print(f"  {'':<17} jax device {device}")
    print("\npackages:")
    for package, version in found["packages"].items():
        print(f"  {package:<13} {version or '-'}")
    formats = ", ".join(found["audio_formats"])
    print(f"\naudio by libsndfile: {formats}\naudio by PyAV:       {found['pyav']}")
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
