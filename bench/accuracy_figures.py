"""Figures of a benchmark's report: lines, histograms, bars, points and cells, as SVG of a page."""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from artifactnet_jax.pages import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Colours of the figures stand for those of the page, which has two schemes.
INK, LINE, BAD = "#1b1c1e", "#c9cbcf", "#c62f2e"
COLOURS = ("#0067b1", "#c4500a", "#00795c", "#a6458d", "#806000", "#5a5fc8")
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (5, 1.5)),
    (0, (1.5, 1.2)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (3, 1)),
    (0, (8, 2, 1, 1, 1, 2)),
)
MARKERS = "os^Dvp"
_POINTS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "p": "⬟"}
_STYLE: Any = {
    "svg.fonttype": "none",  # texts stay texts
    "svg.hashsalt": "artifactnet-jax",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.pad": 5,  # points, as for y: the two 0 at the origin are apart
    "ytick.major.pad": 5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
}
_WIDE = 12.2  # inches
_SCALE = 96 / 72  # pixels of the page for a point


def _short_name(text: str, most: int) -> str:
    """A name that fits, on one line: its middle may be left out."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _line_style(k: int) -> dict[str, Any]:
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)]}


def lines(
    names: Sequence[str],
    lines: Mapping[str, Sequence[np.ndarray]],
    x: str,
    y: str,
    known: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    limits: Mapping[str, float] | None = None,
    diagonal: bool = False,
) -> Figure:
    """A line for each detector; with `known` and `limits` a point at its threshold."""
    figure = _figure(5.9, 4.1)
    axes = figure.add_subplot()
    if diagonal:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, alpha=0.4)
    for k, name in enumerate(names):
        if name not in lines:
            continue
        marker: dict[str, Any] = {"marker": MARKERS[k % 6], "markersize": 3.5} if diagonal else {}
        axes.plot(lines[name][0], lines[name][1], linewidth=1.4, **_line_style(k), **marker)
        if known and limits:
            label, score = known[name]
            called = score >= limits[name]
            point = called[label == 0].mean(), called[label == 1].mean()
            style: dict[str, Any] = {"marker": MARKERS[k % 6], "color": COLOURS[k % len(COLOURS)]}
            axes.plot(*point, **style, markersize=5, clip_on=False, zorder=4)
    axes.set(xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1.01))
    return figure


def histograms(
    names: Sequence[str],
    shares: Mapping[tuple[str, int], np.ndarray],
    edges: np.ndarray,
    limits: Mapping[str, float],
) -> Figure:
    """Shares of scores by class, a panel for each detector, its threshold dashed."""
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = _figure(_WIDE * (columns / 3 if columns < 3 else 1), 2.3 * lines + 0.3)
    for k, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, k + 1)
        for kind, text in ((0, "real"), (1, "AI")):
            colour = COLOURS[kind]
            axes.stairs(shares[name, kind], edges, color=colour, fill=True, alpha=0.25)
            axes.stairs(shares[name, kind], edges, color=colour, linewidth=1.2, label=text)
        axes.axvline(limits[name], color=INK, linestyle=(0, (4, 2)), linewidth=1)
        axes.set(xlim=(0, 1), xlabel="Score")
        axes.set_title(_short_name(name, 44))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, prune="lower"))  # 0 is at the x axis
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False
    )
    return figure


def bars(
    names: Sequence[str], data: Sequence[Sequence[Any]], order: Sequence[str], title: str
) -> Figure:
    """A row for each source, a panel for each detector."""
    found = {(detector, source): rest for detector, source, *rest in data}
    tracks = {source: max(row[2] for row in data if row[1] == source) for source in order}
    height = 0.19 * len(order) + 0.75
    figure = _figure(_WIDE if len(names) > 2 else 0.7 * _WIDE, height)
    first: Axes | None = None
    for k, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), k + 1, sharey=first)
        colour = COLOURS[k % len(COLOURS)]
        for y, source in enumerate(order):
            if (name, source) not in found:
                continue
            _, value, low, high = found[name, source]
            axes.barh(y, value, height=0.66, color=colour, alpha=0.45)
            axes.plot([value, value], [y - 0.33, y + 0.33], color=colour, linewidth=1.6)
            if low is not None:
                axes.plot([low, high], [y, y], color=INK, linewidth=0.9, solid_capstyle="butt")
        axes.set(xlim=(0, 1.005), xticks=[0, 0.5, 1], xlabel=title)
        axes.set_xticklabels(["0", "0.5", "1"])
        axes.set_title("\n".join(textwrap.wrap(_short_name(name, 54), max(12, 80 // len(names)))))
        axes.grid(axis="y", visible=False)
        if first is None:
            first = axes
            labels = [f"{_short_name(s, 44)} ({tracks[s]})" for s in order]
            axes.set_yticks(range(len(order)), labels)
            axes.set_ylim(len(order) - 0.4, -0.6)
        else:
            axes.tick_params(labelleft=False)
    return figure


def scatter(
    names: Sequence[str], points: Sequence[Sequence[Any]], axes_of: Sequence[tuple[int, str]]
) -> Figure:
    """F1 over size or cost, a panel for each of `axes_of` (column of `points`, title)."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = _figure(0.5 * _WIDE * len(axes_of), 3.6)
    for place, (column, title) in enumerate(axes_of):
        axes = figure.add_subplot(1, len(axes_of), place + 1)
        known = []
        for k, point in enumerate(points):
            x, f1, low, high = point[column], *point[4:]
            if not x or f1 is None:
                continue
            known.append(x)
            colour = COLOURS[k % len(COLOURS)]
            if low is not None:
                axes.plot([x, x], [low, high], color=colour, linewidth=1.2)
            axes.plot(x, f1, marker=MARKERS[k % 6], color=colour, markersize=7)
        axes.set_xscale("log")
        axes.set_xlim(min(known) / 3, max(known) * 3)
        few = max(known) < 30 * min(known)  # then the decades alone would be too few ticks
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.xaxis.set_major_formatter(lambda value, _: count(value))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=title, ylabel="F1", ylim=(0, 1.02))
    return figure


def heat(names: Sequence[str], rows: Sequence[Row]) -> Figure:
    """Panels of cells, a row for each change and a column for each detector."""
    from matplotlib.patches import Rectangle

    found = {(row["stress"], row["detector"]): row for row in rows}
    order = list(dict.fromkeys(row["stress"] for row in rows))
    keys = {"tpr": "Recall (TPR)", "fpr": "FPR", "moved": "Shift of the score"}
    keys |= {"flipped": "Judged otherwise"}
    width = 2.2 + len(keys) * (max(len(names) * 0.38, 1.1) + 0.15)  # inches
    figure = _figure(min(width, _WIDE), 0.21 * len(order) + 2.3)
    for place, key in enumerate(keys):
        axes = figure.add_subplot(1, len(keys), place + 1)
        for y, stress in enumerate(order):
            for x, name in enumerate(names):
                value = found.get((stress, name), {}).get(key)
                if value is None:
                    axes.text(x + 0.5, y + 0.5, "-", ha="center", va="center", fontsize=7)
                    continue
                bad = 1 - value if key == "tpr" else value
                cell = Rectangle((x, y), 1, 1, facecolor=BAD, alpha=0.75 * bad, linewidth=0)
                axes.add_patch(cell)
                text = f"{value:.2f}"
                axes.text(x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=7)
        axes.set(xlim=(0, len(names)), ylim=(len(order), 0))
        axes.set_xticks(np.arange(len(names)) + 0.5)
        axes.set_xticklabels([_short_name(name, 26) for name in names], rotation=90)
        axes.xaxis.tick_top()
        axes.set_yticks(np.arange(len(order)) + 0.5)
        axes.set_yticklabels([_short_name(s, 34) for s in order] if place == 0 else [])
        axes.set_xlabel(keys[key])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


_VARIABLES = {INK: "ink", LINE: "line", BAD: "bad"}
_VARIABLES |= {colour: f"c{k}" for k, colour in enumerate(COLOURS)}


def svg(name: str, title: str, draw: Callable[[], Figure]) -> Markup:
    """A figure as an element of a page: its colours are the page's, its ids begin with `name`."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        # The page's fonts draw what the font that texts are measured with lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure = draw()
        figure.savefig(buffer, format="svg", metadata=none, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    width, height = (72 * side for side in figure.get_size_inches())  # points
    size = f'width="{_SCALE * width:.0f}" height="{_SCALE * height:.0f}"'
    label = f'role="img" aria-label="{escape(clean(title))}"'
    box = f'viewBox="0 0 {width:g} {height:g}"'
    return Markup(re.sub("<svg[^>]*>", f"<svg {size} {box} {label}>", text, count=1))


def count(value: float | None) -> str:
    """A count with a unit: 4.03 M."""
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def swatch(k: int) -> dict[str, Any]:
    """How the page draws a piece of a detector's line with its marker: colour, dashes, marker."""
    dash = DASHES[k % len(DASHES)]
    dashes = "none" if dash == "solid" else " ".join(f"{2 * part:g}" for part in dash[1])
    return {"colour": k % len(COLOURS), "dashes": dashes, "marker": _POINTS[MARKERS[k % 6]]}
