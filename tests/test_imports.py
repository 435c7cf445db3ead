"""What is imported when, and which way imports may point."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import artifactnet_jax
from artifactnet_jax import convert, kernels

PACKAGE = Path(artifactnet_jax.__file__).parent
KERNELS = Path(kernels.__file__).parent
CONVERT = Path(convert.__file__).parent
HEAVY = {"jax", "jaxlib", "flax", "onnx", "onnxruntime", "tensorrt", "av", "soundfile", "soxr"}
HEAVY |= {
    "tensorrt_rtx",
    "sounddevice",
    "matplotlib",
    "PIL",
    "scipy",
    "safetensors",
    "tqdm",
    "numpy",
    "optax",
    "orbax",
    "grain",
    "sklearn",
    "pyarrow",
    "ray",
    "fastapi",
    "sqlalchemy",
}

WITH_JAX = {"dsp_jax.py", "model.py", "xla.py", "started.py"}
WITH_JAX |= {"median_xla.py", "median_pallas.py", "texture_xla.py"}

SCORING = [*PACKAGE.glob("*.py"), *PACKAGE.glob("backends/*.py")]
KERNEL_FILES = sorted(KERNELS.glob("*.py"))


def modules_after(code: str, cwd: Path) -> set[str]:
    """Top-level names in sys.modules after a fresh Python has run this code."""
    code += "\nimport sys, json; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    args = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(args, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return set(json.loads(done.stdout.splitlines()[-1]))


VERBS = ("score", "live", "report", "convert", "export", "verify", "build", "doctor")
VERBS += ("bench", "split", "train", "mine", "finetune", "residuals", "rvq", "texture")


VERBS += ("bench accuracy", "bench throughput", "bench gpu", "serve", "token create")
HELP = [[*verb.split(), "--help"] for verb in ("", *VERBS)]


@pytest.mark.parametrize("arguments", [["--version"], *HELP])
def test_help_loads_nothing_heavy(tmp_path, arguments):
    code = f"""
from artifactnet_jax.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    assert end.code == 0, end
"""
    loaded = modules_after(code, tmp_path)
    assert "artifactnet_jax" in loaded
    assert not loaded & HEAVY


def test_importing_the_package_loads_nothing_and_does_nothing(tmp_path):
    code = """
import os, sys, threading
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
import artifactnet_jax
assert threading.active_count() == 1
others = [name for name in opened if not name.endswith((".py", ".pyc")) and os.path.isfile(name)]
assert not others, others
assert set(artifactnet_jax.__all__) <= set(dir(artifactnet_jax))
"""
    assert not modules_after(code, tmp_path) & HEAVY


@pytest.mark.parametrize("module", ["backends.xla", "train.run", "bench.training"])
def test_importing_a_module_leaves_the_environment(tmp_path, module):
    pytest.importorskip("orbax.checkpoint")
    code = f"""
import os, jax, orbax.checkpoint, sklearn.metrics  # these set some of their own
before = dict(os.environ)
import artifactnet_jax.{module}
assert dict(os.environ) == before
"""
    modules_after(code, tmp_path)


def test_scoring_with_numpy_never_loads_jax(tmp_path, tracks, weights_path):
    arguments = ["score", "--backend", "numpy", "--weights", str(weights_path), str(tracks)]
    code = f"from artifactnet_jax.cli import main; assert main({arguments!r}) == 0"
    loaded = modules_after(code, tmp_path)
    assert "numpy" in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "onnx", "onnxruntime", "tensorrt", "scipy", "av"}


def test_measuring_numpy_needs_no_jax(tmp_path):
    loaded = modules_after("import artifactnet_jax.bench.throughput", tmp_path)
    assert not loaded & {"jax", "flax", "onnx", "onnxruntime", "torch", "matplotlib", "scipy"}


def test_scoring_with_an_exported_graph_needs_onnxruntime_alone(tmp_path, tracks, weights_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from artifactnet_jax.convert.export import export
    from artifactnet_jax.weights import load_weights

    export(load_weights(weights_path), tmp_path / "lean.onnx")
    arguments = ["score", "--backend", "onnxruntime", "--weights", "lean.onnx", str(tracks)]
    code = f"from artifactnet_jax.cli import main; assert main({arguments!r}) == 0"
    loaded = modules_after(code, tmp_path)
    assert onnxruntime.__name__ in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "onnx", "tensorrt", "scipy", "av"}


def test_names_of_the_package():
    for name in artifactnet_jax.__all__:
        assert getattr(artifactnet_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        artifactnet_jax.nothing  # noqa: B018


def test_folders_of_the_repository_are_not_top_level_packages(tmp_path):
    code = """
import importlib.util
for name in ("kernels", "bench", "convert", "backends", "train", "scripts", "tests"):
    spec = importlib.util.find_spec(name)
    assert spec is None, spec
import artifactnet_jax.kernels, artifactnet_jax.bench
"""
    modules_after(code, tmp_path)


def test_reading_an_onnx_file_needs_no_jax(tmp_path):
    code = "import artifactnet_jax.convert.import_cache, artifactnet_jax.convert.export_cache"
    assert not modules_after(code, tmp_path) & {"jax", "flax", "onnx", "onnxruntime"}


def test_making_the_graph_of_an_engine_needs_no_jax(tmp_path):
    """A board without jax builds engines of weights files, with the onnx package alone."""
    code = """
from artifactnet_jax.convert.export import build_onnx
from artifactnet_jax.weights import load_weights
build_onnx(load_weights())
"""
    assert not modules_after(code, tmp_path) & {"jax", "flax", "onnxruntime"}


NUMPY_FILES = [path for path in sorted([*SCORING, *KERNEL_FILES]) if path.name not in WITH_JAX]


@pytest.mark.parametrize("path", NUMPY_FILES, ids=lambda path: path.name)
def test_the_numpy_path_is_python_3_10_without_jax(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name.split(".")[0] for node in top for alias in node.names}
    names |= {str(node.module).split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
    assert not names & {"jax", "flax", "tomllib", "onnx", "av"}
