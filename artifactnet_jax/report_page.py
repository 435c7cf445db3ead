"""Pages of the verb `report`: the data of a track, and of all tracks, as HTML."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from artifactnet_jax import __version__
from artifactnet_jax.decision import Span
from artifactnet_jax.pages import page
from artifactnet_jax.results import WORDS, Failure, Verdict, where

LEVELS = 64  # colours of a spectrogram
DRAWN = 4000  # bars of the timeline at most
LISTED = 400  # rows of the table at most


def track_page(
    verdict: Verdict,
    data: Mapping[str, Any],
    pictures: Sequence[tuple[str, str]],
    charts: Sequence[tuple[str, Markup]],
    lines: Sequence[tuple[str, Markup]],
    audio: bytes,
) -> str:
    """The page of a track.

    Args:
        verdict: the row of the track.
        data: what is written beside the page as JSON.
        pictures: as of `pictures`.
        charts: as of `charts`.
        lines: as of `lines_charts`.
        audio: MP3, to listen to.
    """
    duration, bars = verdict.duration_s, _bars(verdict, data["segment_s"])
    sound = data.get("audio", {"seconds": duration})
    return page(
        "report-track.html",
        track=verdict,
        facts=data,
        audio=Markup(base64.b64encode(audio).decode()),
        sound=sound,
        timeline=_timeline(bars, data["segment_threshold"], duration),
        spans=[
            (f"{1000 * span.start_s / duration:.2f}", f"{_width(span, duration):.2f}")
            for span in verdict.spans
        ],
        where=where(map(dataclasses.asdict, verdict.spans)),
        scale=_scale(verdict),
        evidence=adding_up(verdict.evidence or {}),
        ticks=_ticks(duration),
        pictures=pictures,
        charts=charts,
        lines=lines,
        segments=bars[:LISTED],
        more=len(bars) - LISTED,
        data={
            "duration": duration,
            "heard": sound["seconds"],
            "bars": [[round(a, 3), round(b, 3), round(p, 4)] for a, b, p in bars],
        },
    )


def index_page(entries: Sequence[tuple[str, Verdict | Failure]]) -> str:
    """The page that lists all tracks, failures among them; entries: page and result."""
    found = Counter(getattr(result, "verdict", "failed") for _, result in entries)
    kinds = [kind for kind in (*WORDS, "failed") if found[kind]]
    counts = ", ".join(f"{found[kind]} {WORDS.get(kind, kind)}" for kind in kinds)
    return page("report-index.html", entries=entries, counts=counts, version=__version__)


def pictures(images: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    """View and data URI of spectrograms uint8 [rows, columns], low frequencies first."""
    return [(view, _png(image)) for view, image in images.items()]


def _png(image: np.ndarray) -> str:
    """A picture [rows, COLUMNS], low frequencies first, as the data URI of a PNG."""
    import matplotlib
    from PIL import Image

    colours = matplotlib.colormaps["magma"](np.linspace(0, 1, LEVELS), bytes=True)[:, :3]
    file = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image[::-1]), "P")
    picture.putpalette([*colours.ravel().tolist(), 0, 0, 0])
    picture.save(file, "PNG", optimize=True, transparency=LEVELS)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


_INK = "#010203"  # becomes the page's own colour of text


def _chart(
    draw: Callable[[Any], None],
    label: str,
    size: tuple[float, float] = (4.6, 2.7),
    along: str = "kHz",
) -> Markup:
    """A plot as SVG to be put into a page; its text and axes take the page's colour."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9}
    settings |= {f"{part}.color": _INK for part in ("text", "xtick", "ytick")}
    settings |= {"axes.labelcolor": _INK, "axes.edgecolor": _INK, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(along)
        draw(axes)
        axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def charts(data: Mapping[str, Any], curves: Mapping[str, np.ndarray]) -> list[tuple[str, Markup]]:
    """Label and SVG of the plots by frequency; none without curves."""
    if not curves:
        return []
    khz = np.arange(len(curves["input_db"])) * data["by_frequency"]["step_hz"] / 1000
    facts = data["figures"]

    def spectra(axes: Any) -> None:
        for key, name, colour in (
            ("input_db", "input", "#3a86c8"),
            ("residual_db", "residual", "#d1603d"),
        ):
            if key in curves:
                axes.plot(khz, curves[key], color=colour, linewidth=1, label=name)
                band = facts[f"{name}_bandwidth_hz"] / 1000
                axes.axvline(band, color=colour, linewidth=1, linestyle=":", label=f"95 %, {name}")
        axes.set_ylabel("dB")

    def mask(axes: Any) -> None:
        mean, deviation = curves["mask"], curves["mask_deviation"]
        axes.fill_between(
            khz, mean - deviation, mean + deviation, color="#3a86c8", alpha=0.3, linewidth=0
        )
        axes.plot(khz, mean, color="#3a86c8", linewidth=1, label="mean and deviation")
        bound = facts.get("mask_max")
        if bound:
            axes.axhline(bound, color=_INK, linewidth=0.8, linestyle=":", label="its bound")
        axes.set_ylim(0, 1.1 * (bound or 1))
        axes.set_ylabel("mask")

    parts = [("Mean spectrum", spectra)]
    if "mask" in curves:
        parts.append(("Mask by frequency", mask))
    return [(label, _chart(draw, label)) for label, draw in parts]


TRACK, DECODER = "#3a86c8", "#d1603d"
PARTS = 2  # where the lines are strongest
WIDTHS = {"fine": 400.0, "wide": 3_000.0}  # Hz of such a part, by the kind of lines
COLUMNS = 900  # of a plot of the whole band


def lines_charts(seen: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """Label and SVG of the plots of a decoder's lines: whole band, real music, parts of the band.

    `seen` is as of `report_lines.view`; without `lines` there is none.
    """
    if "lines" not in seen:
        return []
    track, lines = np.array(seen["track"]), np.array(seen["lines"])
    khz = (seen["hz"]["first"] + np.arange(len(track)) * seen["hz"]["step"]) / 1000
    best = seen["match"] or seen["nearest"]
    name = f"lines of {best['name']}'s decoder"

    def whole(axes: Any) -> None:
        up, down = columns(seen["track"]), columns(seen["lines"])
        at = np.linspace(khz[0], khz[-1], len(up))
        axes.fill_between(at, np.maximum(0, up), color=TRACK, linewidth=0, label="track")
        axes.fill_between(at, -np.maximum(0, down), color=DECODER, linewidth=0, label=name)
        axes.set_xlim(khz[0], khz[-1])
        axes.set_ylabel("deviations")

    def real(axes: Any) -> None:
        z = seen["real_z"]
        if z:
            axes.hist(z, bins=20, color=_INK, alpha=0.35, label=f"{len(z)} real tracks")
        at = seen["threshold_z"]
        axes.axvline(at, color=_INK, linewidth=1, linestyle="--", label="named from here on")
        axes.axvline(best["z"], color=DECODER, linewidth=2, label="this track")
        axes.set_ylabel("real tracks")

    out = [("Whole band", _chart(whole, f"{name}, whole band", (9.4, 2.6)))]
    label = "What real music reaches against the same lines"
    label += "" if best["speed"] == 1 else ", each track at its best speed"
    out.append((label, _chart(real, label, along="z, standard score")))
    for start, end in parts(seen):
        part = slice(start, end)

        def zoomed(axes: Any, part: slice = part) -> None:
            axes.plot(khz[part], track[part], color=TRACK, linewidth=1.2, label="track")
            axes.plot(khz[part], lines[part], color=DECODER, linewidth=1.2, label=name)
            axes.set_xlim(khz[part][0], khz[part][-1])
            axes.set_ylabel("deviations")

        label = f"Strong lines, {khz[start]:.2f} to {khz[end - 1]:.2f} kHz"
        out.append((label, _chart(zoomed, label)))
    return out


def parts(seen: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Where the decoder's lines are strongest: first and last place in `lines`, by frequency."""
    lines = np.maximum(0, np.array(seen["lines"]))
    size = min(len(lines), round(WIDTHS[seen["kind"]] / seen["hz"]["step"]))
    energy = np.convolve(np.square(lines), np.ones(size), "valid")
    found: list[int] = []
    while len(found) < PARTS and energy.max() > 0:
        start = int(energy.argmax())
        found.append(start)
        energy[max(0, start - size) : start + size] = 0
    return [(start, start + size) for start in sorted(found)]


def columns(row: list[float]) -> np.ndarray:
    """The highest value in each of at most `COLUMNS` parts of a row."""
    edges = np.linspace(0, len(row), min(COLUMNS, len(row)) + 1).astype(int)
    return np.asarray(np.maximum.reduceat(np.array(row), edges[:-1]))


def _bars(verdict: Verdict, segment_s: float) -> list[tuple[float, float, float]]:
    """Start, end and score of every bar: a segment, or the median of some where they are many."""
    segments, duration = verdict.segments, verdict.duration_s
    each = max(1, math.ceil(len(segments) / DRAWN))
    bars = []
    for k in range(0, len(segments), each):
        part = segments[k : k + each]
        end = min(part[-1].start_s + segment_s, duration)
        following = segments[k + each].start_s if k + each < len(segments) else end
        middle = float(np.median([segment.score for segment in part]))
        bars.append((part[0].start_s, max(min(end, following), part[0].start_s), middle))
    return bars


def _timeline(
    bars: Sequence[tuple[float, float, float]], threshold: float, duration: float
) -> dict[str, str]:
    """Paths of the bars at or above the threshold and below, in a box of 1000 by 100."""
    paths = {"ai": "", "real": ""}
    for start, end, score in bars:
        x, width = 1000 * start / duration, max(0.3, 1000 * (end - start) / duration - 0.3)
        height = max(1.0, 100 * score)
        side = "ai" if score >= threshold else "real"
        paths[side] += f"M{x:.2f} 100v-{height:.1f}h{width:.2f}V100z"
    return paths


def _width(span: Span, duration: float) -> float:
    return 1000 * (span.end_s - span.start_s) / duration


def _scale(verdict: Verdict) -> dict[str, str] | None:
    """Where score, threshold and band lie in a box of 1000; None without a score."""
    if verdict.score is None:
        return None
    low, high = verdict.band or (verdict.threshold, verdict.threshold)
    high = min(high, 1.0)
    parts = {"low": low, "unclear": high - low, "high": high, "ai": 1 - high}
    return {key: f"{1000 * at:.1f}" for key, at in (parts | {"score": verdict.score}).items()}


def adding_up(evidence: Mapping[str, float]) -> list[tuple[str, float]]:
    """The witnesses, each to two digits in such a way that what is shown adds up as well."""
    shown, before, total = [], 0.0, 0.0
    for witness, value in evidence.items():
        total += value
        shown.append((witness, round(round(total, 2) - before, 2)))
        before = round(total, 2)
    return shown


def _ticks(duration: float) -> list[tuple[int, str]]:
    """Times under the plots, six at most: seconds, and how far to the right in percent."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 43_200)
    step = next((s for s in steps if duration / s <= 6), 86_400)
    times = (t for t in range(0, int(duration) + 1, step) if t <= 0.94 * duration)
    return [(t, f"{100 * t / duration:.2f}") for t in times]
