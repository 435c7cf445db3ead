"""Writes what documents and the weights' header take from reports and code; --check only compares.

    python scripts/documents.py [--check]

- MODEL_CARD.md, from its template MODEL_CARD.md.j2, the reports and the weights
- the tables of modules in docs/architecture.md, from their docstrings
- the tables of docs/fingerprints.md, from the reports of the bank and of the head beside it
- what README.md says of the weights, from the reports
- the repository's address in all documents, from pyproject.toml
- the version in CITATION.cff, from the package
- `limits` in the header of the embedded weights, from edge-limits.txt
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from artifactnet_jax import __version__
from artifactnet_jax.presets import flops
from artifactnet_jax.weights import load_weights, parameter_counts

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
WEIGHTS = ROOT / "artifactnet_jax" / "assets" / "edge.safetensors"
ADDRESSED = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff")


def limits() -> list[str]:
    """Where the embedded weights fail, a sentence each."""
    return (SCRIPTS / "edge-limits.txt").read_text(encoding="utf-8").splitlines()


def with_limits(file: bytes, sentences: list[str]) -> bytes:
    """A weights file with other `limits` in its provenance. Tensors and digest stay byte for byte.

    A safetensors file is the length of its header (8 bytes, little-endian), the header in JSON,
    filled up with spaces to a multiple of 8, and the tensors.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    metadata = header["__metadata__"]
    provenance = json.loads(metadata["provenance"]) | {"limits": sentences}
    metadata["provenance"] = json.dumps(provenance, sort_keys=True)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[end:]


def read(name: str) -> Any:
    """A report beside this script."""
    return json.loads((SCRIPTS / name).read_text(encoding="utf-8"))


def percent(share: float, digits: int = 0) -> str:
    """0.734 -> "73%"."""
    return f"{100 * share:.{digits}f}%"


def table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ("---",) * len(heads), *rows))


def results(part: Mapping[str, Any]) -> str:
    """Table of the figures of `texture`'s report, with intervals."""

    def shown(name: str, scale: int) -> str:
        low, high = (scale * bound for bound in part[f"{name}_interval"])
        if scale == 1:
            return f"{part[name]:.3f} ({low:.3f} to {high:.3f})"
        return f"{percent(part[name], 1)} ({low:.1f} to {high:.1f})"

    rows = [
        ("AUC", shown("auc", 1)),
        ("F1 at `fpr5`", shown("f1", 1)),
        ("AI found at 5 % false positives", shown("tpr_at_fpr5", 100)),
        ("real recordings called AI at `fpr5`", shown("fpr", 100)),
        ("AI recordings found there", shown("tpr", 100)),
    ]
    return table(("", ""), rows)


def changes(real: Mapping[str, Any], ai: Mapping[str, Any]) -> str:
    """Table of scores of changed recordings of both classes."""

    def cells(row: Mapping[str, float]) -> tuple[str, ...]:
        return f"{row['mean']:.2f}", percent(row["called_ai"]), f"{row['moved']:.2f}"

    heads = ("", "real: mean score", "called AI", "moved", "AI: mean score", "called AI", "moved")
    return table(heads, [(name, *cells(real[name]), *cells(ai[name])) for name in real])


def card() -> str:
    """MODEL_CARD.md."""
    weights, report = load_weights(WEIGHTS), read("edge-report.json")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["pct"] = percent
    source = (SCRIPTS / "MODEL_CARD.md.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        weights=weights,
        report=report,
        robustness=read("edge-robustness.json"),
        noted=read("edge-noted.json"),
        limits=limits(),
        fusion=read("fusion-report.json"),
        hits=share,
        parameters=parameter_counts(weights.config)["total"],
        flops=flops(weights.config)["total"],
        bytes=WEIGHTS.stat().st_size,
        results=results,
        changes=changes,
        fine=read("fine-head-report.json"),
        with_interval=shown_with_interval,
    )


def trust() -> str:
    """What README.md says of the weights."""
    report = read("fusion-report.json")
    whole, short = (report["figures"]["all"][key] for key in ("whole files", "5 s, and clips"))
    services, pages = (percent(whole[name]["found"]) for name in ("field", "demo pages"))
    text = (
        f"On sources that they have never heard they call {services} of the tracks of services AI, "
        f"{pages} of those of generators' demo pages, and "
        f"{percent(whole['all']['false_alarms'], 1)} of real music. "
        f"Of 5 s they find {percent(short['all']['found_at_5'])} at 5 % false alarms. "
        "Between two thresholds they say that it is unclear."
    )
    return textwrap.fill(text, 99)


def share(cell: Mapping[str, Any] | None) -> str:
    """Hits of a report's cell with the interval in %, "" for none."""
    if not cell or not cell["n"]:
        return ""
    low, high = (100 * end for end in cell["interval"])
    return f"{cell['hits']} of {cell['n']} ({low:.0f} to {high:.0f} %)"


def fingerprints() -> dict[str, str]:
    """The tables of docs/fingerprints.md, by their part."""
    report = read("fingerprint-report.json")
    bank = [
        (
            *(decoder["name"], str(decoder["tracks"]), str(len(decoder["repositories"]))),
            ", ".join(decoder["dates"]),
            f"{decoder['band_hz'][1] / 1000:.1f} kHz",
            percent(decoder["stability"]),
        )
        for decoder in report["bank"]["decoders"]
    ]
    found = [
        (name, *(share(cells.get(part, {}).get("named")) for part in report["lengths"]))
        for name, cells in report["found"].items()
    ]
    real = [
        (f"p < {p}", *(share(report["real"]["p"][part][p]) for part in report["lengths"]))
        for p in ("0.1", "0.01", "0.001", "0.0001")
    ]
    systems = list(next(iter(report["stress"].values())))
    stress = [
        (name, *(f"{c['hits']} of {c['n']} ({c['median_z']:g})" for c in cells.values()))
        for name, cells in report["stress"].items()
    ]
    longest = report["lengths"][::-1]
    beside = []
    for name, cells in report["fakeprint"].items():
        if name in report["found"]:
            part = next(part for part in longest if part in report["found"][name])
            ours = share(report["found"][name][part]["named"])
            beside.append((name, ours, share(cells["0.01"]), share(cells["0.05"])))
    return {
        "bank": table(
            ("decoder", "tracks", "repositories", "years", "band up to", "found by the others'"),
            bank,
        ),
        "found": table(("decoder", *report["lengths"]), found),
        "real": table(("stated", *report["lengths"]), real),
        "stress": table(("changed by", *systems), stress),
        "fakeprint": table(
            ("", "named here", "fakeprint at 1 % false alarms", "at 5 %"),
            beside,
        ),
    }


def shown_with_interval(cell: Mapping[str, Any], name: str) -> str:
    """A figure of fine-head-report.json, an AUC or a share."""
    low, high = cell[f"{name}_interval"]
    if name == "auc":
        return f"{cell[name]:.3f} ({low:.3f} to {high:.3f})"
    return f"{percent(cell[name])} ({100 * low:.0f} to {percent(high)})"


def beside_the_bank() -> dict[str, str]:
    """The tables of docs/fingerprints.md on decoders in no bank, by their part."""
    report, shown = read("fine-head-report.json"), shown_with_interval
    names = ("auc", "found_at_5", "found_at_1")
    heads = ("AI", "n", "groups", "real", "AUC", "found at 5 % false alarms", "at 1 %")
    whole, bands = [], []
    for parted in ("groups left out", "systems left out"):
        for length in ("whole", "20 s", "5 s"):
            for name, cell in report[parted][length].items():
                counts = (str(cell[key]) for key in ("n", "groups", "real"))
                first = f"{name}, {length}" + ("" if parted[0] == "g" else f", {parted}")
                whole.append((first, *counts, *(shown(cell, key) for key in names)))
    for band, cells in report["groups left out"]["by band"].items():
        for name, cell in cells.items():
            counts = (str(cell[key]) for key in ("n", "groups", "real"))
            first = f"{name}, band to {int(band) / 1000:g} kHz"
            bands.append((first, *counts, *(shown(cell, key) for key in names[:2])))
    neither = [
        (kind, str(cell["n"]), *(percent(x) for x in cell["above_5_and_1_percent"]))
        for kind, cell in report["apart"].items()
    ]
    return {
        "head": table(heads, whole),
        "head by band": table(heads[:-1], bands),
        "head apart": table(("kind", "n", "above the limit of 5 %", "of 1 %"), neither),
    }


def modules() -> str:
    """Tables of all modules, by folder: a row is a link and the first line of the docstring."""
    inner = sorted(path.parent.name for path in (ROOT / "artifactnet_jax").glob("*/__init__.py"))
    folders = ["artifactnet_jax", *(f"artifactnet_jax/{name}" for name in inner)]
    parts = []
    for folder in (*folders, "convert", "kernels", "bench", "scripts"):
        rows = []
        for path in sorted((ROOT / folder).glob("*.py")):
            first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split(
                "\n"
            )[0]
            rows.append((f"[{path.stem}](../{folder}/{path.name})", first.replace("|", "\\|")))
        parts.append(f"### {folder}/\n\n{table(('module', 'what it is'), rows)}")
    return "\n\n".join(parts)


def filled(text: str, name: str, content: str) -> str:
    """A document with the part `name` between its marks replaced. ValueError without the marks."""
    begin, end = f"<!-- made by scripts/documents.py: {name} -->\n", "<!-- end -->"
    before, found, rest = text.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"no part {name!r} between marks")
    return f"{before}{begin}\n{content}\n\n{end}{rest.partition(end)[2]}"


def repository() -> str:
    """The repository's address, from pyproject.toml: the one place to fill it in."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (address,) = re.findall(r'^Repository = "(.*)"$', text, flags=re.M)
    return str(address)


def made() -> dict[Path, bytes]:
    """Path -> content of every file that this script writes or writes in."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ADDRESSED}
    (old,) = re.findall(r"git clone (\S+)", texts["README.md"])
    texts = {name: text.replace(old, repository()) for name, text in texts.items()}
    texts["README.md"] = filled(texts["README.md"], "trust", trust())
    texts["CITATION.cff"] = re.sub(
        "^version: .*$", f"version: {__version__}", texts["CITATION.cff"], flags=re.M
    )
    page = "docs/architecture.md"
    texts[page] = filled((ROOT / page).read_text(encoding="utf-8"), "modules", modules())
    texts["MODEL_CARD.md"] = card()
    page = "docs/fingerprints.md"
    texts[page] = (ROOT / page).read_text(encoding="utf-8")
    for name, content in (fingerprints() | beside_the_bank()).items():
        texts[page] = filled(texts[page], name, content)
    return {
        WEIGHTS: with_limits(WEIGHTS.read_bytes(), limits()),
        **{ROOT / name: text.encode() for name, text in texts.items()},
    }


def main() -> int:
    """Write the files; with --check name those that differ and return 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one differs")
    check = parser.parse_args().check
    stale = [(path, new) for path, new in made().items() if path.read_bytes() != new]
    for path, new in stale:
        print(path.relative_to(ROOT), "is stale" if check else "written", file=sys.stderr)
        if not check:
            path.write_bytes(new)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
