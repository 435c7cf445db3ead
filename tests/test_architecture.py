"""Layers are law: every module stands on a floor of docs/architecture.md, and imports point down.

Imports inside functions count, those for type checking too, and modules that a string names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"artifactnet_jax": "", "convert": "convert/", "kernels": "kernels/", "bench": "bench/"}
FOLDERS["scripts"] = "scripts/"
DOOR = "__init__"  # the package's own: public names, looked up on first use


def floors() -> dict[str, int]:
    """Pattern of a module's name -> its floor, as the document's table has them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", text, re.MULTILINE)
    table = {name: int(floor) for floor, cell in rows for name in re.findall(r"`([^`]+)`", cell)}
    assert len(table) > 40
    return table


def floor_of(module: str, table: Mapping[str, int]) -> int:
    """Floor of one module; a row that names it goes before one that names its folder."""
    found = {table[name] for name in (module, f"{module.rpartition('/')[0]}/*") if name in table}
    assert found, f"{module} stands on no floor: give it a row in docs/architecture.md"
    return table[module] if module in table else found.pop()


def modules() -> dict[str, Path]:
    """Name -> file of every module: `config`, `backends/numpy`, `convert/export`, `scripts/...`."""
    found = {}
    for folder, prefix in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            found[prefix + path.relative_to(ROOT / folder).with_suffix("").as_posix()] = path
    return found


def named(tree: ast.AST, folder: str = "") -> Iterator[str]:
    """Dotted names of the package in a file: imports wherever they stand, and strings.

    A string counts if all of it is a dotted name below the package, with or without ":attribute";
    the fixed beginning of an f-string stands for the folder that it names.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or (node.level == 1 and folder), f"line {node.lineno}: relative"
            base = ["artifactnet_jax", folder, node.module] if node.level else [node.module]
            parent = ".".join(part for part in base if part)
            yield from (f"{parent}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            yield str(node.values[0].value).rstrip(".")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.partition(":")[0]


def imported(path: Path, known: Iterable[str], folder: str = "") -> set[str]:
    """Modules of the repository that a file (of that folder) names; a folder is its `__init__`."""
    known, found = set(known), set()
    for name in named(ast.parse(path.read_text(encoding="utf-8")), folder):
        parts = name.split(".")
        if parts[0] != "artifactnet_jax" or not all(part.isidentifier() for part in parts):
            continue
        full, above = "/".join(parts[1:]), "/".join(parts[1:-1])
        whole = [f"{full}/__init__", f"{above}/__init__"]
        for candidate in (full, above, *whole):
            if candidate in known and candidate != DOOR:
                found.add(candidate)
                break
    return found


KNOWN = modules()
IMPORTS = {
    name: imported(path, KNOWN, name.rpartition("/")[0]) - {name}
    for name, path in KNOWN.items()
    if name != DOOR
}


def upward(imports: Mapping[str, set[str]], table: Mapping[str, int]) -> set[str]:
    """Imports that the rule forbids, as "importing -> imported"."""
    wrong = set()
    for name, others in imports.items():
        for other in others:
            same_folder = name.rpartition("/")[0] == other.rpartition("/")[0] != ""
            here, there = floor_of(name, table), floor_of(other, table)
            if there > here or (there == here and not same_folder):
                wrong.add(f"{name} -> {other}")
    return wrong


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Circles of imports: a path of modules each, the first one again at the end."""
    done: set[str] = set()
    found = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(imports.get(name, ())):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(imports):
        visit(name, [])
    return found


def test_every_module_stands_on_one_floor():
    table = floors()
    for name in IMPORTS:
        floor_of(name, table)


def test_every_row_names_a_module():
    folders = {f"{name.rpartition('/')[0]}/*" for name in KNOWN}
    assert not set(floors()) - set(KNOWN) - folders


def test_imports_point_down():
    assert not upward(IMPORTS, floors())


def test_no_circle():
    assert not circles(IMPORTS)


def test_the_kernels_import_nothing_of_the_package():
    for name, others in IMPORTS.items():
        if name.startswith("kernels/"):
            assert all(other.startswith("kernels/") for other in others), name


@pytest.mark.parametrize(
    "source",
    [
        "from artifactnet_jax import cli",
        "import artifactnet_jax.cli",
        "from artifactnet_jax.cli import main",
        "def f():\n    from artifactnet_jax.cli import main",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from artifactnet_jax import cli",
        "import importlib\nimportlib.import_module('artifactnet_jax.cli')",
        "TABLE = {'a': 'artifactnet_jax.cli:main'}",
    ],
)
def test_the_walk_sees_an_import(tmp_path, source):
    path = tmp_path / "x.py"
    path.write_text(source)
    assert imported(path, KNOWN) == {"cli"}
    assert upward({"layers": {"cli"}}, floors()) == {"layers -> cli"}


def test_the_walk_sees_a_folder_of_a_string(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import importlib\nimportlib.import_module(f'artifactnet_jax.bench.{kind}')")
    assert imported(path, KNOWN) == {"bench/__init__"}


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c", "b"]]


# Files of more than 600 lines. The list may only get shorter.
LONG = {"make_onnx_fixtures", "test_cli", "test_convert", "test_export", "test_finetune"}
LONG |= {"test_layers", "test_live", "test_manifest", "test_operators", "test_serve"}
LONG |= {"test_tensorrt", "test_throughput", "test_train_data"}


def test_no_file_is_long_and_no_function():
    own = [path for path in KNOWN.values() if path.stem != DOOR]
    for path in [*own, *sorted((ROOT / "tests").glob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 600 or path.stem in LONG, f"{path.name}: over 600 lines"
        if path not in own:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines < 80, f"{path.name}: {node.name} has {lines} lines"
