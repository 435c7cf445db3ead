"""The report of a benchmark: what it found as a page (HTML and Markdown), as CSV and as JSON.

The page is one file: styles and figures (SVG) are in it, and it asks nothing of any other place.
"""

from __future__ import annotations

import csv
import html
import io
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from artifactnet_jax import evaluation
from artifactnet_jax.bench import accuracy_figures as figures
from artifactnet_jax.bench.accuracy_parts import FIGURES, Cell, Chart, Section, Table
from artifactnet_jax.bench.accuracy_sections import limit_text, sections_of
from artifactnet_jax.bench.accuracy_study import Row, Study
from artifactnet_jax.files import replace_file, writing
from artifactnet_jax.pages import clean, page


def write_report(
    out: Path,
    manifest_rows: Sequence[Row],
    results: Sequence[Row],
    *,
    detectors: Sequence[Row],
    threshold: str | float | None,
    stress: Sequence[Row] | None,
    sanity: Sequence[Row] | None,
    mechanism: Sequence[Row] | None,
    resamples: int = 2000,
    seed: int = 0,
) -> None:
    """Judge the results and write report.html, report.md, metrics.json and figures/*.csv.

    Files are replaced whole; metrics.json, which holds every figure of the page, comes last.

    manifest_rows: `id`, `label` (1 AI, 0 real), `source`, `generator`, `group`, `lineage`, `split`.
    All are judged but those of the split "calibration"; with several splits each by itself too.

    results: `id`, `detector`, `score` (None: failed), `error` (None, a text, or `kind` and
    `message`), `seconds`. A track without a result is missing. detectors: `name`, `params` (None:
    unknown), `gflops` (None: unknown), and maybe `seconds` per track (default: the median of its
    results) and `second_share`, of tracks that a tiered detector sent on. threshold: a number, or a
    rule of `evaluation.RULES`, by which each detector's is chosen on the split "calibration"; where
    its scores there do not allow it, it is 0.5, and the page says so.

    stress: for each detector `changes`, as of `stress.summarise`, and `codec_delta`, as of
    `sanity.codec_delta`. sanity: rows as of `sanity.evaluate`, with `detector`. mechanism: for each
    detector `sources` and `ablations`, rows as of `mechanism.by_source` and `mechanism.ablations`.

    Raises ValueError: no detectors, rows that `evaluation.evaluate` refuses, or a rule without a
    calibration split. CommandError: the disk takes no more.
    """
    study = Study(manifest_rows, results, detectors, threshold, resamples, seed)
    found = study.found(stress or (), sanity or (), mechanism or ())
    sections = sections_of(study, found)
    out = Path(out)
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    with writing(out):
        (out / FIGURES).mkdir(parents=True, exist_ok=True)
        for part in itertools.chain.from_iterable(section.parts for section in sections):
            if isinstance(part, Chart):
                replace_file(out / part.file, _csv([part.columns, *part.data]))
        replace_file(out / "report.md", _markdown(study, sections).encode())
        replace_file(out / "report.html", _html(study, sections).encode())
        replace_file(out / "metrics.json", text.encode())


def _html(study: Study, sections: Sequence[Section]) -> str:
    shown = [
        {
            "id": section.title.lower().replace(" ", "-"),
            "title": section.title,
            "text": section.text,
            "charts_or_tables": [
                (charts, [_chart(p) if isinstance(p, Chart) else _table(p) for p in parts])
                for charts, parts in itertools.groupby(
                    section.parts, lambda part: isinstance(part, Chart)
                )
            ],
        }
        for section in sections
    ]
    return page(
        "bench-report.html",
        about=_about(study),
        notice=study.notice(),
        sections=shown,
        key=[{"name": name, **figures.swatch(k)} for k, name in enumerate(study.names)],
        definitions=escape(_definitions()),
    )


def _chart(chart: Chart) -> dict[str, Any]:
    caption = f"{chart.caption} Data: {chart.file}"
    svg = figures.svg(chart.name, chart.title, chart.draw)
    wide = "wide" if chart.wide else ""
    return {"title": chart.title, "caption": caption, "svg": svg, "key": chart.key, "wide": wide}


def _table(table: Table) -> dict[str, Any]:
    """A table as its template takes it: a column without numbers is text, and its words may break.

    A cell is its words, what is beneath them, and its classes.
    """
    textual = [
        k == 0 or not any(re.match(r"[-+.\d]", _of(row[k]).text) for row in table.rows)
        for k in range(len(table.header))
    ]
    rows = []
    for row in table.rows:
        cells = []
        for text, cell in zip(textual, map(_of, row), strict=True):
            names = " ".join(filter(None, ("text" if text else "", cell.state)))
            words = _breakable(cell.text) if text else cell.text
            cells.append((words, cell.small, names))
        rows.append(cells)
    head = [(_breakable(name), text) for text, name in zip(textual, table.header, strict=True)]
    known = {"title": table.title, "note": table.note, "folded": table.folded}
    return {**known, "head": head, "rows": rows}


def _breakable(value: str) -> Markup:
    """Text as HTML, with places where a word above 16 characters may be broken."""
    words = []
    for word in clean(value).split(" "):
        parts = re.findall(r"[A-Z]*[^A-Z:/_.-]{0,16}[:/_.-]*", word) if len(word) > 16 else [word]
        words.append(Markup("<wbr>").join(part for part in parts if part))
    return Markup(" ").join(words)


def _of(value: Cell | str) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)


def _definitions() -> str:
    return (evaluation.__doc__ or "").strip()


def _about(study: Study) -> str:
    rows = study.judged[study.names[0]]
    ai = sum(row["label"] for row in rows)
    text = f"{len(rows)} tracks, {ai} AI and {len(rows) - ai} real"
    text += f", of {len({row.get('source') for row in rows})} sources"
    text += f". {len(study.names)} detector{'s' if len(study.names) > 1 else ''}"
    if study.rule is None:
        value, origin = study.thresholds[study.names[0]]
        if origin != "fixed":
            return f"{text}, each at its own threshold."
        return f"{text}, threshold {limit_text(value)}, fixed."
    return f"{text}, thresholds chosen on the calibration split ({study.rule})."


def _markdown(study: Study, sections: Sequence[Section]) -> str:
    lines = ["# Benchmark report", "", _about(study), ""]
    if study.notice():
        lines += [f"> {study.notice()}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.text:
            lines += [_mark(section.text), ""]
        for part in section.parts:
            if isinstance(part, Chart):
                lines += [f"{part.title}: [{part.file}]({part.file})", ""]
                continue
            lines += [f"### {part.title}", ""] if part.title else []
            lines += [_mark(part.note), ""] if part.note else []
            lines += [_pipes(part.header), "|---" + "|--:" * (len(part.header) - 1) + "|"]
            lines += [_pipes([_words(cell) for cell in row]) for row in part.rows]
            lines.append("")
    lines += ["## How the figures are defined", "", "```text", _definitions(), "```", ""]
    return "\n".join(lines)


def _words(value: Cell | str) -> str:
    cell = _of(value)
    return f"{cell.text} ({cell.small})" if cell.small else cell.text


def _mark(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = html.escape(clean(text), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_mark(cell) for cell in cells)} |"


def _csv(rows: Iterable[Sequence[Any]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode("utf-8", "backslashreplace")
