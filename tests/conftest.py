"""Settings that hold in every test, and in the commands that tests start, and shared fixtures."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before anything imports jax: silent promotion of a dtype or a rank is how numbers go wrong.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.pop("PYTHONUNBUFFERED", None)  # what is left in a buffer at the end is tested too

# A cache of the run's own, for the workers of pytest-xdist and the commands that tests start too:
# nobody's home is touched, and jax compiles no program twice.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="artifactnet-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["XDG_CACHE_HOME"], "jax")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from artifactnet_jax.cli import main
from artifactnet_jax.detector import Detector
from artifactnet_jax.weights import random_tensors, save_weights
from audio_files import noise, write
from tiny_model import SMALL

# Files whose tests are all `slow`, those that take longest first: begun first, they leave no worker
# alone at the end.
SLOW = (
    *(
        "convert",
        "styles",
        "ray_engine",
        "training_loop",
        "verify",
        "throughput",
        "rvq",
        "export",
        "layers",
    ),
    *("train_run", "finetune", "serve", "tensorrt", "backends", "bench", "imports", "median"),
    *("train_data", "train_texture", "export_texture", "model", "quantise", "teachers", "page"),
    *("operators", "losses", "presets", "shapes", "accuracy_report", "live", "texture", "dsp"),
    *("bench_accuracy", "audio_fuzz", "documents", "distribution", "one_edit"),
    *("fingerprint_command", "fingerprint", "gpu", "gpu_ahead"),
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where no slow test is wanted, their files are not even read: what they import takes long."""
    fast = config.option.markexpr == "not slow"
    return True if fast and collection_path.stem.removeprefix("test_") in SLOW else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, and marked as such."""
    place = {f"test_{name}": k for k, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.stem, len(SLOW)))
    for item in items:
        if item.path.stem in place:
            item.add_marker("slow")


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Its JSON Lines by path; a path twice is an error."""
        rows = [json.loads(line) for line in self.out.splitlines()]
        assert len({row["path"] for row in rows}) == len(rows)
        return {row["path"]: row for row in rows}


Command = Callable[..., Outcome]


@pytest.fixture(scope="session")
def weights_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights whose scores of noise lie well inside (0, 1)."""
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    tensors = random_tensors(SMALL)
    tensors["cnn.out.bias"] -= 1
    save_weights(path, SMALL, tensors, name="random", licence="none", provenance={})
    return path


@pytest.fixture(scope="session")
def detector(weights_path: Path) -> Detector:
    """On backend numpy; tests leave it as it is."""
    return Detector(weights_path, "numpy")


@pytest.fixture(scope="session")
def tracks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tracks of 1, 3 and 2 segments: a.wav, b.wav, c.flac."""
    folder = tmp_path_factory.mktemp("tracks")
    for seed, (name, seconds) in enumerate({"a.wav": 4, "b.wav": 12, "c.flac": 7}.items()):
        write(folder, name, (seed + 1) * noise(seconds, channels=1, seed=seed))
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process."""

    def run(*args: Any) -> Outcome:
        capsys.readouterr()
        try:
            code = main([os.fspath(arg) if isinstance(arg, Path) else str(arg) for arg in args])
        except SystemExit as error:  # argparse
            code = error.code  # type: ignore[assignment]
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def score(command: Command, weights_path: Path) -> Command:
    """`artifactnet-jax score` with JSON Lines from backend numpy, unless told otherwise."""

    def run(*args: Any) -> Outcome:
        return command(
            *("score", "--weights", weights_path, "--backend", "numpy", "--format", "jsonl", *args)
        )

    return run
