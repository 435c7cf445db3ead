"""The verb `report`: what the detector says of a track, and what it saw, as one page to look at.

A page holds everything that it shows, the audio included, and asks nothing of the network. Verdict
and scores are those of the Detector; the spectrograms in between are taken again, in NumPy.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import platform
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from artifactnet_jax import __version__
from artifactnet_jax import config as cfg
from artifactnet_jax.audio import SegmentReader, resampled
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.console.detectors import open_detector
from artifactnet_jax.console.inputs import find_inputs
from artifactnet_jax.console.progress import progress
from artifactnet_jax.decode import AudioError, open_audio
from artifactnet_jax.dsp_numpy import effective_bandwidth, stft_magnitude
from artifactnet_jax.files import make_folder, replace_file, sha256_of, writing
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.results import Failure, Verdict
from artifactnet_jax.text import NO_BACKEND, OK, SOME_FAILED, USAGE, CommandError, clock, printable
from artifactnet_jax.weights import Model, Weights

if TYPE_CHECKING:
    from artifactnet_jax.detector import Detector

SCHEMA = "artifactnet-jax/report/1"
PAGE_BYTES = 3_000_000  # of a page at most
LOOKED = 60  # segments whose spectrograms are taken at most, evenly spaced
COLUMNS, ROWS = 900, 192  # of a spectrogram, at most
LEVELS, DEPTH_DB = 64, 90.0  # of its colours, and what they span below the loudest
DRAWN = 4000  # bars of the timeline at most
LISTED = 400  # rows of the table at most
# kbit/s and Hz of MP3, the first that fits; what is too long for the last one is cut.
RATES = ((64, 44_100), (48, 32_000), (32, 22_050), (24, 22_050), (16, 16_000))
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


def run(args: argparse.Namespace) -> int:
    """Write a page for each track, and an index; returns the exit code."""
    for package in ("av", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            cure = 'pip install "artifactnet-jax[report]"'
            raise CommandError(f"report needs {package}: {cure}", NO_BACKEND)
    paths = find_inputs(args)
    if "-" in paths:
        raise CommandError("report reads a track twice, which stdin cannot: save it first", USAGE)
    folder = Path(args.output)
    make_folder(folder, "-o")
    detector = open_detector(
        args.weights,
        args.backend,
        segments=args.segments,
        aggregate_rule=args.aggregate,
        threshold=args.threshold,
        margin=args.margin,
        jobs=args.jobs,
    )
    limits = card_limits() if args.weights is None else []
    entries: dict[int, tuple[str, Verdict | Failure]] = {}  # page and result
    with (
        progress(args.quiet, args.output, len(paths)) as tell,
        contextlib.closing(detector.score_many(paths)) as finished,
    ):
        for index, result in finished:
            name = page_name(index, len(paths), paths[index])
            if isinstance(result, Verdict):
                try:
                    text, data = make_page(detector, result, limits)
                except (AudioError, OSError) as error:  # it was there a moment ago
                    cause = f"{printable(result.path)}: changed while it was read ({error})"
                    result = Failure(result.path, "read", f"{cause}: try again")
                else:
                    _write(folder / f"{name}.json", _json(data))
                    _write(folder / f"{name}.html", text)
            entries[index] = name, result
            tell(result)
    ordered = [entries[index] for index in sorted(entries)]
    rows = [result.to_dict() for _, result in ordered]
    _write(folder / "index.json", _json({"schema": SCHEMA, "tracks": rows}))
    _write(folder / "index.html", index_page(ordered))
    print(printable(str(folder / "index.html")))
    return SOME_FAILED if any(isinstance(result, Failure) for _, result in ordered) else OK


def _write(path: Path, text: str) -> None:
    with writing(printable(str(path))):
        replace_file(path, text.encode("utf-8", "backslashreplace"))


def _json(data: Any) -> str:
    return json.dumps(data, allow_nan=False) + "\n"


def page_name(index: int, count: int, path: str) -> str:
    """Name of a track's files without their suffix: its number, and what is plain of its own."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", Path(path).stem).strip("-")[:60]
    return f"{index + 1:0{len(str(count))}}-{plain or 'track'}"


# --- What the detector saw ------------------------------------------------------------------------


@dataclasses.dataclass
class Look:
    """What was seen of one segment. Powers are means over frames."""

    start_s: float
    pictures: dict[str, np.ndarray]  # view: power [rows, frames]
    power: dict[str, np.ndarray]  # view: [n_bins]
    mask: tuple[np.ndarray, np.ndarray] | None  # mean and mean square over frames [n_bins]
    logits: tuple[float, float] | None  # of the network, and what the texture head adds


def look(
    samples: np.ndarray, start_s: float, front_end: cfg.FrontEnd, network: NumpyNetwork | None
) -> Look:
    """Look at one segment [N]: at its input alone where there is no network to run."""
    if network is None:
        views = {"input": stft_magnitude(samples, dataclasses.replace(front_end, window="hann"))}
        mask = logits = None
    else:
        stages = network.stages(samples)
        mask, magnitude = stages["mask"], stages["magnitude"]
        views = {"input": magnitude} | {name: stages[name] for name in ("residual", "H", "P")}
        logits = float(stages["network_logit"]), float(stages["texture_logit"])
    squares = {name: np.square(view) for name, view in views.items()}
    rows = min(ROWS, front_end.n_bins)
    edges = np.linspace(0, front_end.n_bins, rows + 1).astype(int)
    return Look(
        start_s,
        {
            name: np.add.reduceat(square, edges[:-1], axis=0) / np.diff(edges)[:, None]
            for name, square in squares.items()
        },
        {name: square.mean(axis=1, dtype=np.float64) for name, square in squares.items()},
        None if mask is None else (mask.mean(axis=1), np.square(mask).mean(axis=1)),
        logits,
    )


def looks(detector: Detector, verdict: Verdict, reader: SegmentReader) -> list[Look]:
    """Look at the scored segments of a track, or at `LOOKED` of them, evenly spaced."""
    config, weights = detector.weights.config, detector.weights
    front_end, silence = config.front_end, config.verdict.silence_peak
    network = NumpyNetwork(config, weights.tensors) if isinstance(weights, Weights) else None
    scored = len(verdict.segments) or math.ceil(verdict.duration_s / front_end.segment_s)
    chosen = set(np.linspace(0, scored - 1, min(scored, LOOKED)).round().astype(int).tolist())
    audible = (segment for segment in reader if segment.peak > silence)
    wanted = (segment for k, segment in enumerate(audible) if k in chosen)

    def one(segment: Any) -> Look:
        return look(segment.samples, segment.start_s, front_end, network)

    found: list[Look] = []
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(cpu_count()) as pool:
        while batch := list(itertools.islice(wanted, cpu_count())):
            found += pool.map(one, batch)
    return found


def figures(detector: Detector, seen: Sequence[Look]) -> dict[str, Any]:
    """Figures of what was seen, over all segments that were looked at; None where unknown.

    Bandwidths are those below which 95 % of the energy lies (paper, appendix C).
    """
    rate = detector.weights.config.front_end.sample_rate
    total = {name: np.sum([one.power[name] for one in seen], axis=0) for name in seen[0].power}
    energy = {name: float(power.sum()) for name, power in total.items()}
    out: dict[str, Any] = {
        "segments_looked_at": len(seen),
        "input_bandwidth_hz": effective_bandwidth(total["input"], rate),
    }
    masks = [one.mask for one in seen if one.mask is not None]
    pairs = [one.logits for one in seen if one.logits is not None]
    if not masks or not pairs:
        return out
    mean, square = np.mean([m for m, _ in masks], axis=0), np.mean([s for _, s in masks], axis=0)
    network, texture = np.median(np.array(pairs), axis=0)
    return out | {
        "residual_bandwidth_hz": effective_bandwidth(total["residual"], rate),
        "residual_energy_fraction": energy["residual"] / energy["input"],
        "H_energy_fraction": energy["H"] / (energy["residual"] or 1.0),
        "P_energy_fraction": energy["P"] / (energy["residual"] or 1.0),
        "mean_mask": float(mean.mean()),
        "mask_spread": math.sqrt(max(0.0, float(square.mean()) - float(mean.mean()) ** 2)),
        "mask_max": detector.weights.config.unet.mask_max,
        "network_logit": float(network),
        "texture_logit": float(texture) if detector.weights.config.texture else None,
    }


def picture(
    view: str, seen: Sequence[Look], front_end: cfg.FrontEnd, duration: float
) -> np.ndarray:
    """Spectrogram over the whole track: uint8 [rows, COLUMNS], low frequencies first.

    0 to LEVELS - 1 from `DEPTH_DB` below the loudest up to it; LEVELS where nothing was looked at.
    """
    out = np.full((len(seen[0].pictures[view]), COLUMNS), LEVELS, np.uint8)
    top = max(float(one.pictures[view].max()) for one in seen)
    following = [one.start_s for one in seen[1:]] + [duration]
    for one, until in zip(seen, following, strict=True):
        power, heard = one.pictures[view], duration - one.start_s
        # What a segment is filled up with behind the end of the track is not drawn.
        frames = math.ceil(power.shape[1] * min(1.0, heard / front_end.segment_s))
        # One that ends before the next one begins is stretched.
        end = min(max(one.start_s + front_end.segment_s, until), duration)
        first, last = (int(COLUMNS * t / duration) for t in (one.start_s, end))
        first, last = min(first, COLUMNS - 1), max(last, first + 1)
        low = np.linspace(0, frames, last - first + 1)[:-1].astype(int)
        if last - first <= frames:
            means = np.add.reduceat(power[:, :frames], low, axis=1)
            means = means / np.diff([*low.tolist(), frames])
        else:
            means = power[:, low]
        with np.errstate(divide="ignore"):
            level = 1 + 10 * np.log10(means / (top or 1.0)) / DEPTH_DB
        out[:, first:last] = np.clip(LEVELS * level, 0, LEVELS - 1)
    return out


# --- Audio ----------------------------------------------------------------------------------------


def encode_audio(path: str, seconds: float, budget: int) -> tuple[bytes, dict[str, Any]]:
    """A track as mono MP3 of at most `budget` bytes, and what was done to it.

    The rate falls with the length; of what is too long for the lowest one the beginning is kept.
    """
    import av

    room = budget - 4096  # header, and the frame that is begun
    fits = [pair for pair in RATES if seconds * pair[0] * 125 <= room]
    kbit, rate = fits[0] if fits else RATES[-1]
    kept = min(seconds, max(0, room) / (kbit * 125))
    left = int(kept * rate)
    out = io.BytesIO()
    with av.open(out, "w", format="mp3") as container, open_audio(path) as decoded:
        stream: Any = container.add_stream("libmp3lame", rate=rate, layout="mono")
        stream.bit_rate = 1000 * kbit
        stream.codec_context.format = "fltp"
        for block in resampled(decoded.blocks, decoded.rate, rate):
            block = np.clip(block[:left], -1, 1)[None]
            left -= block.shape[1]
            if block.shape[1]:
                frame = av.AudioFrame.from_ndarray(block, "fltp", "mono")
                frame.sample_rate = rate
                container.mux(stream.encode(frame))
            if not left:
                break
        container.mux(stream.encode(None))
    facts = {
        "codec": "mp3",
        "kbit_s": kbit,
        "sample_rate": rate,
        "channels": 1,
        "seconds": round(kept, 3),
        "shortened": kept < seconds,
    }
    return out.getvalue(), facts


# --- Pages ----------------------------------------------------------------------------------------


def make_page(
    detector: Detector, verdict: Verdict, limits: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """The page of a track, and the same as data."""
    config = detector.weights.config
    front_end = config.front_end
    reader = SegmentReader(verdict.path, front_end, config.verdict, detector.segments)
    seen = looks(detector, verdict, reader)
    duration = verdict.duration_s
    facts = figures(detector, seen) if seen else {}
    facts["cutoff_hz"] = reader.report.bandwidth_hz
    pictures = (
        {name: picture(name, seen, front_end, duration) for name in seen[0].power} if seen else {}
    )
    curves = _curves(seen)
    with open(verdict.path, "rb") as file:
        digest = sha256_of(file)
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "result": verdict.to_dict(),
        "statements": statements(detector.weights, verdict, facts),
        "figures": facts,
        "segment_s": front_end.segment_s,
        "operating_point": _point(config.verdict, verdict.threshold),
        "looked_at": [
            {
                "start_s": one.start_s,
                "mean_mask": None if one.mask is None else float(one.mask[0].mean()),
                "network_logit": None if one.logits is None else one.logits[0],
                "texture_logit": None if one.logits is None else one.logits[1],
            }
            for one in seen
        ],
        "by_frequency": {
            "step_hz": front_end.sample_rate / front_end.n_fft,
            **{name: [float(f"{v:.5g}") for v in curve] for name, curve in curves.items()},
        },
        "spectrograms": {
            "rows": min(ROWS, front_end.n_bins),
            "columns": COLUMNS,
            "top_hz": front_end.sample_rate / 2,
            "seconds": duration,
            "depth_db": DEPTH_DB,
            "levels": LEVELS,
            "uint8": {
                name: base64.b64encode(image.tobytes()).decode() for name, image in pictures.items()
            },
        },
        "file_sha256": digest,
        "limits": list(limits),
        "licence": detector.weights.licence,
        "versions": versions(),
    }
    drawn = "".join(_picture(view, image, data) for view, image in pictures.items())
    charts = _charts(data, curves)
    # What is left of the page is the audio's.
    rest = _track_page(verdict, data, drawn, charts, b"")
    budget = min((PAGE_BYTES - len(rest.encode()) - 1000) * 3 // 4, 2 * PAGE_BYTES // 3)
    audio, data["audio"] = encode_audio(verdict.path, duration, budget)
    return _track_page(verdict, data, drawn, charts, audio), data


def statements(weights: Model, verdict: Verdict, facts: dict[str, Any]) -> list[str]:
    """What is to be said of a verdict, in sentences, each from this track's and weights' data."""
    said = []
    points = dict(weights.config.verdict.operating_points)
    calibrated = any("calibration" in step for step in weights.provenance.get("history", ())[-1:])
    score = verdict.score
    if score is None:
        return ["There is no score: every segment is silent."]
    if calibrated:
        share = "99 or more" if score >= 0.99 else f"about {max(1, round(100 * score))}"
        share = "1 or fewer" if score <= 0.01 else share
        said.append(
            f"Calibrated: of segments with such a score, {share} in 100 were AI among the "
            "recordings that these weights were calibrated on. In other music that share differs."
        )
    else:
        said.append("These weights are not calibrated: the score is no probability.")
    rates = {name: int(name[3:]) for name in points if re.fullmatch(r"fpr\d+", name)}
    passed = [name for name in rates if score >= points[name]]
    if passed:
        best = min(passed, key=lambda name: rates[name])
        said.append(
            f"The score reaches {best} ({points[best]:.3f}): of the real recordings of the "
            f"calibration {rates[best]} % were called AI there."
        )
    elif rates:
        worst = max(rates, key=lambda name: rates[name])
        said.append(
            f"The score reaches no operating point, not even {worst} ({points[worst]:.3f})."
        )
    network, texture = facts.get("network_logit"), facts.get("texture_logit")
    if texture is not None and network is not None:
        more = "the texture head" if abs(texture) > abs(network) else "the network"
        said.append(
            f"Most of this score comes from {more}: in log-odds the texture head gives "
            f"{texture:+.2f}, the network on residual, H and P {network:+.2f} (medians over "
            "segments)."
        )
    bound = facts.get("mask_max")
    if bound:
        even = bound / math.sqrt(12)
        said.append(
            f"The mask is {facts['mean_mask']:.3f} in the mean, of at most {bound:g}, and its "
            f"standard deviation is {facts['mask_spread']:.3f}; {even:.3f} if it took all values "
            "alike."
            + (
                " So it is nearly flat, and the residual is close to the input made quieter."
                if facts["mask_spread"] < even / 2
                else ""
            )
        )
    if not facts.get("mean_mask"):
        said.append("There is nothing between input and score to show: no residual, H, P or mask.")
    return said


def card_limits() -> list[str]:
    """What the model card of the embedded weights says of where they fail; [] without a card."""
    near = Path(__file__).resolve().parent.parent / "MODEL_CARD.md"  # of a checkout
    try:
        text = near.read_text(encoding="utf-8")
    except OSError:
        try:
            package = importlib.metadata.distribution("artifactnet-jax")
        except importlib.metadata.PackageNotFoundError:
            return []
        text = package.read_text("licenses/MODEL_CARD.md") or ""
    part = re.search(r"^## Where it fails\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    items = re.split(r"^- ", part[1], flags=re.M)[1:] if part else []
    plain = (re.sub(r"\s*\(\[[^\]]*\]\([^)]*\)\)|`", "", " ".join(item.split())) for item in items)
    return [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", item) for item in plain]


def versions() -> dict[str, str]:
    """Of what made a page."""
    names = ("numpy", "soundfile", "soxr", "av", "matplotlib")
    known = {name: importlib.metadata.version(name) for name in names}
    return {"artifactnet-jax": __version__, "python": platform.python_version(), **known}


def _curves(seen: Sequence[Look]) -> dict[str, np.ndarray]:
    """Means over everything seen, by frequency: dB of each view, mask and its deviation."""
    if not seen:
        return {}
    curves = {}
    with np.errstate(divide="ignore"):
        for name in seen[0].power:
            power = np.mean([one.power[name] for one in seen], axis=0)
            curves[f"{name}_db"] = np.maximum(10 * np.log10(power), -120.0)
    masks = [one.mask for one in seen if one.mask is not None]
    if masks:
        mean, square = (np.mean([m[k] for m in masks], axis=0) for k in (0, 1))
        curves["mask"] = mean
        curves["mask_deviation"] = np.sqrt(np.maximum(square - mean**2, 0))
    return curves


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


def _chart(draw: Callable[[Any], None], label: str) -> str:
    """A plot as SVG to be put into a page; its text and axes take the page's colour."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
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
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def _charts(data: dict[str, Any], curves: dict[str, np.ndarray]) -> str:
    if not curves:
        return "<p>There is nothing to show.</p>"
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
    return "".join(
        f"<figure><figcaption>{label}</figcaption>{_chart(draw, label)}</figure>"
        for label, draw in parts
    )


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


def _track_page(
    verdict: Verdict,
    data: dict[str, Any],
    pictures: str,
    charts: str,
    audio: bytes,
) -> str:
    duration = verdict.duration_s
    bars = _bars(verdict, data["segment_s"])
    name = html.escape(printable(Path(verdict.path).name))
    word, meaning = _VERDICTS[verdict.verdict]
    facts = data.get("audio", {"seconds": duration})
    return _fill(
        "report-track.html",
        title=name,
        verdict=verdict.verdict,
        word=word,
        meaning=meaning,
        score="-" if verdict.score is None else f"{verdict.score:.3f}",
        threshold=html.escape(_threshold(verdict, data)),
        statements=_items(data["statements"]),
        audio=base64.b64encode(audio).decode(),
        audio_note=html.escape(_audio_note(facts, duration)),
        timeline=_timeline(bars, verdict.threshold, duration),
        ticks=_ticks(duration),
        seconds=f"{duration:.1f}",
        pictures=pictures,
        looked=html.escape(_looked(verdict, data)),
        charts=charts,
        figures=_definitions(_figure_texts(data["figures"])),
        warnings=_items([_WARNINGS.get(code, code) for code in verdict.warnings]) or "<p>None.</p>",
        segments=_table(verdict, bars),
        limits=_limits(data),
        provenance=_definitions(_provenance(verdict, data)),
        data=_script_json(
            {
                "duration": duration,
                "heard": facts["seconds"],
                "bars": [[round(a, 3), round(b, 3), round(p, 4)] for a, b, p in bars],
            }
        ),
    )


def _fill(template: str, **values: str) -> str:
    """A page of the package's assets; `values` are HTML already."""
    assets = Path(__file__).parent / "assets"
    script = (assets / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = Template((assets / template).read_text(encoding="utf-8"))
    style = (assets / "report.css").read_text(encoding="utf-8")
    return page.substitute(values, style=style, script=script, script_digest=digest)


def _script_json(data: Any) -> str:
    """JSON for the inside of a script element, which < could end."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def _items(texts: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def _definitions(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<dt>{html.escape(a)}</dt><dd>{html.escape(b)}</dd>" for a, b in pairs)


def _point(rules: cfg.Decision, threshold: float) -> str | None:
    """The operating point with this threshold, if there is one."""
    return next((name for name, at in rules.operating_points if at == threshold), None)


def _limits(data: dict[str, Any]) -> str:
    if data["limits"]:
        return '<p class="note">From their model card.</p>' + _items(data["limits"])
    return "<p>No model card is known for these weights: ask who made them.</p>"


def _threshold(verdict: Verdict, data: dict[str, Any]) -> str:
    name = data["operating_point"]
    text = f"threshold {verdict.threshold:.3f}" + (f", operating point {name}" if name else "")
    return text + (f", undecided within {verdict.margin:g}" if verdict.margin else "")


def _audio_note(facts: dict[str, Any], duration: float) -> str:
    if "codec" not in facts:
        return ""
    text = f"To listen only: mono MP3 of {facts['kbit_s']} kbit/s, {facts['sample_rate']:,} Hz"
    if facts["shortened"]:
        text += f", the first {clock(facts['seconds'])} of {clock(duration)}"
    return f"{text}, so that the page stays small. The scores are those of the file itself."


def _looked(verdict: Verdict, data: dict[str, Any]) -> str:
    shown, scored = data["figures"].get("segments_looked_at", 0), len(verdict.segments)
    if not shown:
        return "There is nothing to show."
    of = f"all {shown}" if not scored or shown == scored else f"{shown} of {scored}"
    apart = of != f"all {shown}" or isinstance(verdict.plan, int)
    drawn = ", evenly spaced, each drawn until the next one" if apart else ""
    return f"Of {of} segments{drawn}. 0 to {data['spectrograms']['top_hz'] / 1000:g} kHz."


def _timeline(bars: Sequence[tuple[float, float, float]], threshold: float, duration: float) -> str:
    """Bars in a box of 1000 by 100, stretched by the page."""
    paths = {"ai": "", "real": ""}
    for start, end, score in bars:
        x, width = 1000 * start / duration, max(0.3, 1000 * (end - start) / duration - 0.3)
        height = max(1.0, 100 * score)
        side = "ai" if score >= threshold else "real"
        paths[side] += f"M{x:.2f} 100v-{height:.1f}h{width:.2f}V100z"
    y = 100 * (1 - threshold)
    return (
        '<svg viewBox="0 0 1000 100" preserveAspectRatio="none" aria-hidden="true">'
        + "".join(f'<path class="{side}" d="{path}"/>' for side, path in paths.items())
        + f'<line class="threshold" x1="0" x2="1000" y1="{y:.2f}" y2="{y:.2f}"/></svg>'
    )


def _ticks(duration: float) -> str:
    """Times under the plots, six at most."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 43_200)
    step = next((s for s in steps if duration / s <= 6), 86_400)
    times = range(0, int(duration) + 1, step)
    return "".join(
        f'<span style="left:{100 * t / duration:.2f}%">{clock(t)}</span>'
        for t in times
        if t <= 0.94 * duration
    )


def _picture(view: str, image: np.ndarray, data: dict[str, Any]) -> str:
    label = html.escape(_VIEWS[view])
    return (
        f'<figure class="view"><figcaption>{label}</figcaption><div class="plot spectrogram">'
        f'<img src="{_png(image)}" alt="Spectrogram: {label}"><i class="head"></i></div></figure>'
    )


def _figure_texts(facts: dict[str, Any]) -> list[tuple[str, str]]:
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


def _table(verdict: Verdict, bars: Sequence[tuple[float, float, float]]) -> str:
    """A row and a button for every bar, for those who do not point at plots."""
    rows = "".join(
        f'<tr><td><button type="button" data-start="{start:.3f}">{clock(start)} to '
        f"{clock(end)}</button></td><td>{score:.3f}</td>"
        f"<td>{'at or above' if score >= verdict.threshold else 'below'}</td></tr>"
        for start, end, score in bars[:LISTED]
    )
    rest = len(bars) - LISTED
    note = f"<p>{rest:,} more are in the JSON file.</p>" if rest > 0 else ""
    head = "<tr><th>Play</th><th>Score</th><th>Threshold</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>{note}" if rows else ""


def _provenance(verdict: Verdict, data: dict[str, Any]) -> list[tuple[str, str]]:
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


def index_page(entries: Sequence[tuple[str, Verdict | Failure]]) -> str:
    """The page that lists all tracks, failures among them."""
    rows, counts = [], {"ai": 0, "real": 0, "undecided": 0, "failed": 0}
    for page, result in entries:
        name = html.escape(printable(Path(result.path).name))
        if isinstance(result, Failure):
            counts["failed"] += 1
            rows.append(
                f'<tr><td>{name}</td><td><span class="badge failed">Failed</span></td>'
                f'<td colspan="3">{html.escape(result.message)}</td></tr>'
            )
            continue
        counts[result.verdict] += 1
        score = "-" if result.score is None else f"{result.score:.3f}"
        rows.append(
            f'<tr><td><a href="{page}.html">{name}</a></td>'
            f'<td><span class="badge {result.verdict}">{_VERDICTS[result.verdict][0]}</span></td>'
            f"<td>{score}</td><td>{clock(result.duration_s)}</td>"
            f"<td>{html.escape(', '.join(result.warnings))}</td></tr>"
        )
    return _fill(
        "report-index.html",
        count=f"{len(entries):,} track{'s' if len(entries) != 1 else ''}",
        counts=", ".join(f"{n} {name}" for name, n in counts.items() if n),
        rows="".join(rows),
        version=html.escape(__version__),
    )
