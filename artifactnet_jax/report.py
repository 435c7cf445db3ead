"""The verb `report`: what the detector says of a track, and what it saw, as one page to look at.

A page holds everything that it shows, the audio included, and asks nothing of the network. Verdict
and scores are those of the Detector; the spectrograms in between are taken again, in NumPy.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import platform
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from artifactnet_jax import __version__, report_lines, report_page
from artifactnet_jax import config as cfg
from artifactnet_jax.audio import SegmentReader, resampled
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.console.detectors import banks, open_detector
from artifactnet_jax.console.inputs import find_inputs
from artifactnet_jax.console.progress import progress
from artifactnet_jax.decision import EVEN
from artifactnet_jax.decode import open_audio
from artifactnet_jax.dsp_numpy import effective_bandwidth, stft_magnitude
from artifactnet_jax.files import make_folder, replace_file, sha256_of, writing
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.recording import AudioError
from artifactnet_jax.report_page import LEVELS
from artifactnet_jax.results import Failure, Verdict, where
from artifactnet_jax.text import NO_BACKEND, OK, SOME_FAILED, USAGE, CommandError, printable
from artifactnet_jax.weights import Model, Weights

if TYPE_CHECKING:
    from artifactnet_jax.detector import Detector

SCHEMA = "artifactnet-jax/report/1"
PAGE_BYTES = 3_000_000  # of a page at most
LOOKED = 60  # segments whose spectrograms are taken at most, evenly spaced
COLUMNS, ROWS = 900, 192  # of a spectrogram, at most
DEPTH_DB = 90.0  # what its colours span below the loudest
# kbit/s and Hz of MP3, the first that fits; what is too long for the last one is cut.
RATES = ((64, 44_100), (48, 32_000), (32, 22_050), (24, 22_050), (16, 16_000))


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
        prior=args.prior,
        jobs=args.jobs,
        banks=banks(args),
    )
    entries: dict[int, tuple[str, Verdict | Failure]] = {}  # page and result
    with (
        progress(args.quiet, args.output, len(paths)) as tell,
        contextlib.closing(detector.score_many(paths)) as finished,
    ):
        for index, result in finished:
            name = page_name(index, len(paths), paths[index])
            if isinstance(result, Verdict):
                try:
                    text, data = make_page(detector, result)
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
    _write(folder / "index.html", report_page.index_page(ordered))
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
            block = np.clip(block[:, :left], -1, 1)
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


def make_page(detector: Detector, verdict: Verdict) -> tuple[str, dict[str, Any]]:
    """The page of a track, and the same as data."""
    config = detector.weights.config
    front_end = config.front_end
    bank = detector.bank
    reader = SegmentReader(
        verdict.path,
        front_end,
        config.verdict,
        detector.segments,
        fingerprint=bank is not None,
    )
    seen = looks(detector, verdict, reader)
    duration = verdict.duration_s
    facts = figures(detector, seen) if seen else {}
    facts["cutoff_hz"] = reader.report.bandwidth_hz
    images = {
        name: picture(name, seen, front_end, duration) for name in (seen[0].power if seen else ())
    }
    curves = _curves(seen)
    lines = None if bank is None else report_lines.view(reader.spectrum, bank)
    with open(verdict.path, "rb") as file:
        digest = sha256_of(file)
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "result": verdict.to_dict(),
        "statements": statements(detector.weights, verdict, facts),
        "figures": facts,
        "segment_s": front_end.segment_s,
        "segment_threshold": verdict.threshold if verdict.evidence is None else EVEN,
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
                name: base64.b64encode(image.tobytes()).decode() for name, image in images.items()
            },
        },
        "decoder_lines": lines,
        "file_sha256": digest,
        "limits": limits(detector.weights),
        "licence": detector.weights.licence,
        "versions": versions(),
    }
    shown = (
        report_page.pictures(images),
        report_page.charts(data, curves),
        report_page.lines_charts(lines or {}),
    )
    # What is left of the page is the audio's.
    rest = report_page.track_page(verdict, data, *shown, b"")
    budget = min((PAGE_BYTES - len(rest.encode()) - 1000) * 3 // 4, 2 * PAGE_BYTES // 3)
    audio, data["audio"] = encode_audio(verdict.path, duration, budget)
    return report_page.track_page(verdict, data, *shown, audio), data


def statements(weights: Model, verdict: Verdict, facts: dict[str, Any]) -> list[str]:
    """What is to be said of a verdict, in sentences, each from this track's and weights' data.

    What matters first comes first.
    """
    said = list(_first(verdict))
    points = dict(weights.config.verdict.operating_points)
    calibrated = any("calibration" in step for step in weights.provenance.get("history", ())[-1:])
    score = verdict.score
    if score is None:
        return said
    share = "99 or more" if score >= 0.99 else f"about {max(1, round(100 * score))}"
    share = "1 or fewer" if score <= 0.01 else share
    if verdict.prior is not None:
        said.append(
            f"Calibrated: of 100 tracks with such a score, {share} are AI, in a collection that is "
            f"{100 * verdict.prior:g} % AI. In a collection with less of it they are fewer."
        )
    elif calibrated:
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
        what = "this score" if verdict.evidence is None else "what the segments say"
        more = "the texture head" if abs(texture) > abs(network) else "the network"
        said.append(
            f"Most of {what} comes from {more}: in log-odds the texture head gives "
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


def _first(verdict: Verdict) -> Iterator[str]:
    """The sentences that a verdict needs most."""
    reason = verdict.reason
    if verdict.score is None:
        yield "There is no score: every segment is silent."
    elif verdict.verdict == "undecided":
        yield f"There is too little to judge: {reason}." if reason else "There is no verdict."
    elif verdict.verdict == "partly-ai":
        share = "" if verdict.ai_share is None else f", {verdict.ai_share:.0%} of its length"
        yield f"A part of this track is {where(map(dataclasses.asdict, verdict.spans))}{share}."
    elif verdict.verdict == "unclear":
        yield f"The detector does not know: {reason}."
    elif verdict.verdict == "real":
        yield "No sign of AI was found. That is no certificate: what is new can leave no sign."
    else:
        yield "This sounds like the output of an AI music generator."


def limits(weights: Model) -> list[str]:
    """Sentences of a weights file on where its weights fail; [] where it states none."""
    stated = weights.provenance.get("limits")
    return [str(sentence) for sentence in stated] if isinstance(stated, list) else []


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


def _point(rules: cfg.Decision, threshold: float) -> str | None:
    """The operating point with this threshold, if there is one."""
    return next((name for name, at in rules.operating_points if at == threshold), None)
