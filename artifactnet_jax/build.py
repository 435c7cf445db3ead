"""The verb `build`: weights or an exported ONNX file in, a TensorRT engine out."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from artifactnet_jax.backends import BackendError, engine
from artifactnet_jax.backends.cuda import find_device
from artifactnet_jax.files import cache_folder, writing
from artifactnet_jax.models import open_model
from artifactnet_jax.text import NO_BACKEND, OK, USAGE, CommandError
from artifactnet_jax.weights import ENGINE_SUFFIX, Engine, Model, WeightsError

REFIT_KEEPS = ("precision", "target", "workspace", "batches", "version_compatible", "refittable")


def run(args: argparse.Namespace) -> int:
    """Build or refit an engine and print its path. CommandError: it cannot be had."""
    try:
        weights = open_model(args.weights, "tensorrt")
        path = _refit(args, weights) if args.refit else _build(args, weights)
    except BackendError as error:
        raise CommandError(str(error), NO_BACKEND) from error
    except (WeightsError, ValueError) as error:
        raise CommandError(str(error), USAGE) from error
    print(path)
    return OK


def _build(args: argparse.Namespace, weights: Model) -> Path:
    if isinstance(weights, Engine) and weights.compiled:
        raise ValueError(f"{weights.file} is an engine already: name the weights, or the ONNX file")
    own = weights.precision if isinstance(weights, Engine) else "fp32"
    library = engine.find_library(args.target)
    recipe = engine.recipe_for(
        weights,
        library,
        find_device() if library != engine.RTX else "no matter which",
        precision=args.precision or own,
        batches=args.batches or [engine.BATCH],
        compatible=args.version_compatible,
        refittable=args.refittable,
    )
    path, reason = _output(args.output, recipe), ""
    if path.is_file():
        reason = engine.read_recipe(path)[0].misfit(recipe)
        if not reason:
            print(f"artifactnet-jax: {path} is that engine already", file=sys.stderr)
            return path
        reason = f"the one there will not do: {reason}"
    with writing(path):
        engine.make_engine(weights, recipe, path, reason, workspace=args.workspace)
    return path


def _refit(args: argparse.Namespace, weights: Model) -> Path:
    given = [f"--{name.replace('_', '-')}" for name in REFIT_KEEPS if getattr(args, name)]
    if given:
        raise ValueError(f"--refit keeps what the engine was built with: leave {given[0]} out")
    old, before = engine.read_recipe(args.refit)
    if not old.refittable:
        raise ValueError(f"{args.refit} takes no other weights: build it with --refittable")
    if dataclasses.replace(weights.config, verdict=before.config.verdict) != before.config:
        raise ValueError(f"{args.refit} is of another network than {weights.name!r}: build anew")
    device = find_device()
    if isinstance(device, str):
        raise BackendError(f"{device}: an engine is refitted on the machine that runs it")
    here = engine.recipe_for(
        weights, old.library, device, precision=old.precision, batches=old.batches, refittable=True
    )
    if reason := dataclasses.replace(old, source=here.source).misfit(here):
        raise BackendError(f"{args.refit} does not run here: {reason}; build it again")
    recipe = dataclasses.replace(old, source=here.source)
    path = _output(args.output, recipe)
    model = engine.to_onnx(weights, old.precision)
    plan = engine.refit_plan(recipe, engine.read_plan(args.refit), model)
    with writing(path):
        engine.write_engine(path, recipe, weights, plan)
    print(f"artifactnet-jax: refitted {args.refit} to {weights.name!r}", file=sys.stderr)
    return path


def _output(output: str | None, recipe: engine.Recipe) -> Path:
    """Where the engine goes: a file, or its own name in a folder, by default the cache."""
    if output is None:
        folder = cache_folder("engines")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder / recipe.name()
    if os.path.isdir(output):
        return Path(output) / recipe.name()
    if not output.endswith(ENGINE_SUFFIX):
        raise ValueError(f"-o {output}: name a file that ends in {ENGINE_SUFFIX}, or a folder")
    if not os.path.isdir(os.path.dirname(os.path.abspath(output))):
        raise ValueError(f"-o {output}: its folder does not exist: create it first")
    return Path(output)
