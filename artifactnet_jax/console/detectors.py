"""The detector that a command line asks for."""

from __future__ import annotations

import argparse
from typing import Any

from artifactnet_jax.backends import BackendError
from artifactnet_jax.decoders import BankError
from artifactnet_jax.detector import EMBEDDED, Detector
from artifactnet_jax.text import NO_BACKEND, USAGE, CommandError, brief
from artifactnet_jax.weights import Model, WeightsError


def detector_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `Detector`, besides weights and backend, as the verb `score` has them."""
    return {
        "segments": args.segments,
        "aggregate_rule": args.aggregate,
        "threshold": args.threshold,
        "margin": args.margin,
        "prior": args.prior,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "jobs": args.jobs,
        "until_decided": args.until_decided,
        "banks": banks(args),
    }


def banks(args: argparse.Namespace) -> tuple[str, ...]:
    """Banks of decoders that --bank and --no-decoder ask for, as `Detector` takes them."""
    return () if args.no_decoder else (EMBEDDED, *args.bank)


def open_detector(weights: str | Model | None, backend: str, **options: Any) -> Detector:
    """The Detector that arguments ask for. CommandError: it cannot be had."""
    try:
        return Detector(weights, backend, **options)
    except BackendError as error:
        raise CommandError(str(error), NO_BACKEND) from error
    except (WeightsError, BankError, ValueError) as error:
        raise CommandError(str(error), USAGE) from error
    except Exception as error:  # a broken installation or driver, of which jax says what it likes
        cure = "see artifactnet-jax doctor, or use --backend numpy"
        message = f"backend {backend!r} does not start: {brief(error)}; {cure}"
        raise CommandError(message, NO_BACKEND) from error


def comparable(detector: Detector) -> dict[str, Any]:
    """Keys and values that rows must have in common to be compared with each other."""
    return {
        "weights": detector.weights.summary(),
        "threshold": detector.threshold,
        "margin": detector.margin,
        "band": None if detector.band[0] == detector.band[1] else list(detector.band),
        "prior": None if detector.fusion is None else detector.prior,
        "aggregate": detector.rule,
        "plan": detector.segments,
        "dtype": detector.backend.dtype,
        "until_decided": detector.until_decided,
        "bank": detector.asked,
    }
