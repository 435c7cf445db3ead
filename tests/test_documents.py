"""Documents say what the code and the reports say, and their links lead somewhere."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

import artifactnet_jax
import documents
from artifactnet_jax import fine_head
from artifactnet_jax.cli import build_parser
from artifactnet_jax.weights import load_weights

ROOT = Path(__file__).parent.parent
REPORT = json.loads((ROOT / "scripts" / "edge-report.json").read_text())
ROBUST = json.loads((ROOT / "scripts" / "edge-robustness.json").read_text())


def markdown_files():
    """All of the repository but what is installed, built or kept by tools."""
    skipped = {"build", "dist", "node_modules"}
    for path in sorted(ROOT.rglob("*.md")):
        parts = path.relative_to(ROOT).parts
        if not any(part.startswith(".") or part in skipped for part in parts):
            yield path


def test_what_is_generated_is_what_stands_there():
    command = [sys.executable, ROOT / "scripts" / "documents.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_module_is_in_the_table():
    table = (ROOT / "docs" / "architecture.md").read_text()
    for folder in ("artifactnet_jax", "convert", "kernels", "bench", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"](../{path.relative_to(ROOT).as_posix()}) | " in table


def test_modules_of_the_picture_stand_on_a_floor():
    floors = (ROOT / "docs" / "architecture.md").read_text()
    picture = (ROOT / "docs" / "architecture.svg").read_text()
    named = re.findall(r'class="module"[^>]*>([^<]+)<', picture)
    assert len(named) > 10
    for name in ", ".join(named).split(", "):
        assert f"`{name}`" in floors or f"`{name}/*`" in floors


def test_the_parts_between_marks_alone_are_replaced():
    text = "a\n<!-- made by scripts/documents.py: x -->\nold\n<!-- end -->\nb\n<!-- end -->\n"
    new = documents.filled(text, "x", "new")
    begin = "<!-- made by scripts/documents.py: x -->"
    assert new == f"a\n{begin}\n\nnew\n\n<!-- end -->\nb\n<!-- end -->\n"
    with pytest.raises(ValueError, match="'y'"):
        documents.filled(text, "y", "new")


# --- README, version, address ---------------------------------------------------------------------


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 200
    assert max(map(len, lines)) <= 100


def test_one_version_and_one_address():
    assert artifactnet_jax.__version__ == importlib.metadata.version("artifactnet-jax")
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in pyproject
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall("^version: (.*)$", citation, re.M) == [artifactnet_jax.__version__]
    changes = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", changes, re.M)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", one) for one in headings[1:])
    assert headings[1].startswith(f"[{artifactnet_jax.__version__}]")
    (address,) = re.findall(r'^Repository = "(.+)"$', pyproject, re.M)
    assert f"repository-code: {address}\n" in citation
    assert address in (ROOT / "SECURITY.md").read_text()
    for name in ("README.md", "CONTRIBUTING.md"):
        assert re.findall(r"git clone (\S+)", (ROOT / name).read_text()) == [address]


def test_every_extra_is_documented():
    pyproject = (ROOT / "pyproject.toml").read_text()
    table = pyproject.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    page = (ROOT / "docs" / "install.md").read_text()
    first = " ".join(re.findall(r"^\| (.*?) \|", page, re.M))
    assert sorted(re.findall(r"^(\w+) = ", table, re.M)) == sorted(re.findall("`(.*?)`", first))


def commands_of(path):
    """The commands of this package in a document's console blocks, each as its words."""
    for block in re.findall(r"^```console\n(.*?)^```", path.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r" 2?>>? ?\S+", "", line.removeprefix("$ "))
            for part in re.split(r" \| | && |; ", line.split("   #")[0]):
                words = shlex.split(part, comments=True)
                if words and words[0].endswith("artifactnet-jax"):
                    yield words[1:]


DOCUMENTED = [
    pytest.param(words, id=f"{path.stem}: {' '.join(words)}")
    for path in markdown_files()
    for words in commands_of(path)
]


def test_documents_have_commands():
    verbs = {words.values[0][0] for words in DOCUMENTED}
    assert {"score", "report", "live", "serve", "convert", "train", "bench", "build"} <= verbs


@pytest.fixture(scope="module")
def parser():
    return build_parser()


@pytest.mark.parametrize("words", DOCUMENTED)
def test_documented_commands_are_understood(parser, words):
    parser.parse_args(words)


# --- Links ----------------------------------------------------------------------------------------


def without_code(text):
    """Markdown without its code, in which a link is no link and a hash no heading."""
    text = re.sub(r"^( *)(```+).*?^\1\2 *$", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", lambda found: "`" * len(found[0]), text)


def anchors(path):
    """What `#...` may name in a Markdown file: its headings, as GitHub writes them."""
    text = re.sub(r"^( *)(```+).*?^\1\2 *$", "", path.read_text(), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ +(.*?) *#* *$", text, flags=re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = next(n for n in range(99) if (f"{slug}-{n}" if n else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def dead_links(path):
    for target in re.findall(
        r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", without_code(path.read_text())
    ):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        lost = not there.is_relative_to(ROOT.resolve()) or not there.exists()
        if lost or (anchor and anchor not in anchors(there)):
            yield f"{path.relative_to(ROOT)}: {target}"


def test_relative_links_and_anchors_lead_somewhere():
    paths = list(markdown_files())
    assert {"README.md", "MODEL_CARD.md", "speed.md"} <= {path.name for path in paths}
    assert [link for path in paths for link in dead_links(path)] == []


def test_modules_and_files_that_documents_name_exist():
    inner = "tests|scripts|docs|examples|artifactnet_jax|convert|kernels|bench|train|serve|commands"
    for path in markdown_files():
        text = path.read_text()
        for name in re.findall(r"\bartifactnet_jax(?:\.[a-z_]+)+", text):
            known = name.endswith(".__version__") or name == fine_head.NOTE  # metadata
            assert known or importlib.util.find_spec(name), name
        for name in re.findall(rf"\b(?:{inner})/[\w/.-]+\.\w+", text):
            near = (ROOT, ROOT / "artifactnet_jax", path.parent)
            assert any((folder / name).exists() for folder in near), f"{path.name}: {name}"


def test_dead_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "there.md").write_text("# A `code` heading, twice\n\n# A `code` heading, twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#a-code-heading-twice) [c](there.md#a-code-heading-twice-1)\n"
        "[d](lost.md) ![e](lost.png) [f](there.md#nowhere) [g](#own) [h](https://x.org/lost)\n"
        "`[i](lost)` [j](../outside.md)\n```\n# own\n[k](lost)\n```\n"
    )
    targets = ["lost.md", "lost.png", "there.md#nowhere", "#own", "../outside.md"]
    assert list(dead_links(page)) == [f"page.md: {target}" for target in targets]


# --- Limits ---------------------------------------------------------------------------------------


def test_the_header_has_the_limits_and_the_digest_stays():
    weights = load_weights()
    limits = weights.provenance["limits"]
    assert limits == (ROOT / "scripts" / "edge-limits.txt").read_text().splitlines()
    assert weights.sha256 == "bf3f4a740c35991222cb19aa5f9a9a9e23de384b8cd7bcb7f0231d80b8ede95e"


def test_other_limits_change_nothing_but_the_header():
    tensors = {"a": np.arange(3, dtype=np.float16), "b": np.arange(8, dtype=np.float32)}
    metadata = {"provenance": json.dumps({"note": "kept"}), "sha256": "kept"}
    old = save(tensors, metadata=metadata)
    new = documents.with_limits(old, ["One."])
    assert documents.with_limits(new, ["One."]) == new
    found = load(new)
    assert all((found[name] == tensor).all() for name, tensor in tensors.items())
    (size,) = struct.unpack("<Q", new[:8])
    assert size % 8 == 0
    header = json.loads(new[8 : 8 + size])["__metadata__"]
    assert json.loads(header["provenance"]) == {"note": "kept", "limits": ["One."]}
    assert header["sha256"] == "kept"


def test_limits_are_what_was_measured():
    """Every quantity in edge-limits.txt, against the reports."""
    said = (ROOT / "scripts" / "edge-limits.txt").read_text()
    report = json.loads((ROOT / "scripts" / "fusion-report.json").read_text())
    figures = report["figures"]["all"]
    assert "Half of the AI recordings of generators' demo pages are not called ai" in said
    assert figures["whole files"]["demo pages"]["found"] == pytest.approx(0.5, abs=0.08)
    assert "a third of those of services in clips of 5 s" in said
    assert figures["5 s, and clips"]["field"]["found"] == pytest.approx(2 / 3, abs=0.05)
    assert "are called ai, or unclear, more often" in said
    real = {name: cells["whole"] for name, cells in report["by_kind"]["real"].items()}

    def not_clear(cell):
        return cell["share"] + cell["unclear"]

    assert max(real, key=lambda name: not_clear(real[name])) == "stems and loops"
    assert "in three cases of four" in said
    assert report["scan"]["splices"]["found"] == pytest.approx(0.75, abs=0.04)
    assert "is called ai more often" in said
    changed, ai = ROBUST["real"], ROBUST["ai"]
    usual = changed["versions"]["as it is"]["called_ai"]
    for name in ("24khz", "16khz", "mp3-64", "noise-20db"):
        assert changed["versions"][name]["called_ai"] / usual == pytest.approx(3, rel=0.15)
    found = ai["versions"]["as it is"]["called_ai"]
    assert "less than half as often" in said
    assert ai["laundered"]["room"]["called_ai"] < found / 2
    assert "about a quarter as often" in said
    assert ROBUST["mixed"]["+0 dB"]["called_ai"] / found == pytest.approx(0.25, abs=0.05)
    assert "about three quarters as often" in said
    for name in ("clipped-6db", "soft-6db"):
        assert ai["versions"][name]["called_ai"] / found == pytest.approx(0.75, abs=0.1)
    assert "adds next to nothing" in said
    noted = json.loads((ROOT / "scripts" / "edge-noted.json").read_text())
    assert noted["network_alone"]["adds"] < 0.01


def test_limits_are_short_sentences():
    for sentence in load_weights().provenance["limits"]:
        assert re.fullmatch(r"[A-Z][^`\[\]]{20,220}\.", sentence)
