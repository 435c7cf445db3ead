"""Pages of the verb `report`: the data of a track, and of all tracks, as HTML."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from artifactnet_jax import __version__
from artifactnet_jax.pages import page
from artifactnet_jax.results import Failure, Verdict
from artifactnet_jax.text import clock, printable

LEVELS = 64  # colours of a spectrogram
DRAWN = 4000  # bars of the timeline at most
LISTED = 400  # rows of the table at most
_VIEWS = {
    "input": "Input",
    "residual": "Residual (what the mask lets through)",
    "H": "Harmonic part of the residual",
    "P": "Percussive part of the residual",
}
_WARNINGS = {
    "resampled": "The source has another sample rate than the detector and was resampled.",
    "short": "The track is shorter than one segment: the rest of it was filled with zeros.",
    "silent": "Every segment is silent: there is nothing to judge.",
    "silent-segments": "Silent segments were left out.",
    "clipped": "Many samples lie at full scale.",
    "band-limited": "Nothing above 16 kHz. Such music, if real, is called AI more often.",
    "truncated": "The file ends before its declared length.",
}
_VERDICTS = {
    "ai": ("AI", "The score lies at or above the threshold."),
    "real": ("Real", "The score lies below the threshold."),
    "undecided": ("Undecided", "The score is too close to the threshold, or there is none."),
}


def track_page(
    verdict: Verdict,
    data: Mapping[str, Any],
    pictures: Sequence[tuple[str, str]],
    charts: Sequence[tuple[str, Markup]],
    audio: bytes,
) -> str:
    """The page of a track.

    Args:
        verdict: the row of the track.
        data: what is written beside the page as JSON.
        pictures: as of `pictures`.
        charts: as of `charts`.
        audio: MP3, to listen to.
    """
    duration, bars = verdict.duration_s, _bars(verdict, data["segment_s"])
    word, meaning = _VERDICTS[verdict.verdict]
    facts = data.get("audio", {"seconds": duration})
    return page(
        "report-track.html",
        title=printable(Path(verdict.path).name),
        verdict=verdict.verdict,
        word=word,
        meaning=meaning,
        score=_score(verdict),
        threshold=_threshold(verdict, data),
        statements=data["statements"],
        audio=Markup(base64.b64encode(audio).decode()),
        audio_note=_audio_note(facts, duration),
        timeline=_timeline(bars, verdict.threshold, duration),
        limit=verdict.threshold,
        ticks=_ticks(duration),
        seconds=f"{duration:.1f}",
        pictures=pictures,
        looked=_looked(verdict, data),
        charts=charts,
        figures=_figure_texts(data["figures"]),
        warnings=[_WARNINGS.get(code, code) for code in verdict.warnings],
        segments=bars[:LISTED],
        more=len(bars) - LISTED,
        limits=data["limits"],
        provenance=_provenance(verdict, data),
        data={
            "duration": duration,
            "heard": facts["seconds"],
            "bars": [[round(a, 3), round(b, 3), round(p, 4)] for a, b, p in bars],
        },
    )


def index_page(entries: Sequence[tuple[str, Verdict | Failure]]) -> str:
    """The page that lists all tracks, failures among them; entries: page and result."""
    counts = {"ai": 0, "real": 0, "undecided": 0, "failed": 0}
    tracks: list[dict[str, Any]] = []
    for name, result in entries:
        track: dict[str, Any] = {"page": name, "name": printable(Path(result.path).name)}
        if isinstance(result, Failure):
            counts["failed"] += 1
            tracks.append(track | {"failure": result.message})
            continue
        counts[result.verdict] += 1
        track |= {"failure": "", "verdict": result.verdict, "word": _VERDICTS[result.verdict][0]}
        track |= {"score": _score(result), "seconds": result.duration_s}
        tracks.append(track | {"warnings": ", ".join(result.warnings)})
    return page(
        "report-index.html",
        tracks=tracks,
        counts=", ".join(f"{n} {name}" for name, n in counts.items() if n),
        version=__version__,
    )


def pictures(images: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    """Label and data URI of spectrograms uint8 [rows, columns], low frequencies first, by view."""
    return [(_VIEWS[view], _png(image)) for view, image in images.items()]


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


def _chart(draw: Callable[[Any], None], label: str) -> Markup:
    """A plot as SVG to be put into a page; its text and axes take the page's colour."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9}
    settings |= {f"{part}.color": _INK for part in ("text", "xtick", "ytick")}
    settings |= {"axes.labelcolor": _INK, "axes.edgecolor": _INK, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("kHz")
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


def _threshold(verdict: Verdict, data: Mapping[str, Any]) -> str:
    name = data["operating_point"]
    text = f"threshold {verdict.threshold:.3f}" + (f", operating point {name}" if name else "")
    return text + (f", undecided within {verdict.margin:g}" if verdict.margin else "")


def _audio_note(facts: Mapping[str, Any], duration: float) -> str:
    if "codec" not in facts:
        return ""
    text = f"To listen only: mono MP3 of {facts['kbit_s']} kbit/s, {facts['sample_rate']:,} Hz"
    if facts["shortened"]:
        text += f", the first {clock(facts['seconds'])} of {clock(duration)}"
    return f"{text}, so that the page stays small. The scores are those of the file itself."


def _looked(verdict: Verdict, data: Mapping[str, Any]) -> str:
    shown, scored = data["figures"].get("segments_looked_at", 0), len(verdict.segments)
    if not shown:
        return "There is nothing to show."
    of = f"all {shown}" if not scored or shown == scored else f"{shown} of {scored}"
    apart = of != f"all {shown}" or isinstance(verdict.plan, int)
    drawn = ", evenly spaced, each drawn until the next one" if apart else ""
    return f"Of {of} segments{drawn}. 0 to {data['spectrograms']['top_hz'] / 1000:g} kHz."


def _score(verdict: Verdict) -> str:
    return "-" if verdict.score is None else f"{verdict.score:.3f}"


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


def _ticks(duration: float) -> list[tuple[int, str]]:
    """Times under the plots, six at most: seconds, and how far to the right in percent."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 43_200)
    step = next((s for s in steps if duration / s <= 6), 86_400)
    times = (t for t in range(0, int(duration) + 1, step) if t <= 0.94 * duration)
    return [(t, f"{100 * t / duration:.2f}") for t in times]


def _figure_texts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value, with its unit, of the figures that there are."""

    def khz(value: float) -> str:
        return f"{value / 1000:.1f} kHz"

    forms: dict[str, tuple[str, Callable[[float], str]]] = {
        "residual_bandwidth_hz": ("Effective bandwidth, residual (95 % of the energy)", khz),
        "input_bandwidth_hz": ("Effective bandwidth, input", khz),
        "cutoff_hz": ("Cut-off of the input (90 dB down)", khz),
        "mean_mask": ("Mean mask", "{:.3f}".format),
        "mask_max": ("... of at most", "{:g}".format),
        "mask_spread": ("Standard deviation of the mask", "{:.3f}".format),
        "residual_energy_fraction": ("Energy of the residual, of the input's", "{:.2%}".format),
        "H_energy_fraction": ("Energy of H, of the residual's", "{:.1%}".format),
        "P_energy_fraction": ("Energy of P, of the residual's", "{:.1%}".format),
        "network_logit": ("Log-odds from the network (median)", "{:+.2f}".format),
        "texture_logit": ("Log-odds from the texture head (median)", "{:+.2f}".format),
    }
    return [
        (text, form(facts[key]))
        for key, (text, form) in forms.items()
        if facts.get(key) is not None
    ]


def _provenance(verdict: Verdict, data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what tells where a verdict comes from."""
    weights = verdict.weights
    made = data["versions"]
    return [
        ("File", printable(verdict.path)),
        ("SHA-256 of the file", data["file_sha256"]),
        ("Length", f"{clock(verdict.duration_s)} ({verdict.duration_s:.2f} s)"),
        ("Source", f"{verdict.sample_rate:,} Hz, {verdict.channels} channels"),
        ("Weights", f"{weights['name']} (preset {weights['preset']})"),
        ("SHA-256 of the weights", weights["sha256"]),
        ("Licence of the weights", data["licence"]),
        ("Backend", f"{verdict.backend}, {verdict.dtype}"),
        ("Segments", f"{len(verdict.segments)}, plan {verdict.plan}, by {verdict.aggregate}"),
        ("Made by", ", ".join(f"{name} {version}" for name, version in made.items())),
    ]
