"""What a graph computes, found by what its tensors hold, not by how nodes are named or arranged.

The graph is run on a probe: synthetic audio with tones, noise, clicks and near-silence. A tensor is
the magnitude if it equals the magnitude of the probe under some convention; two tensors are the
medians of the residual if they equal them; and so on through the front end. Each step starts from
the graph's own result of the step before, so that errors do not add up. What lies between is read
layer by layer (`networks`). Nothing is assumed: what is not found raises `Unmapped`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from artifactnet_jax.config import CHANNELS, Channel
from artifactnet_jax.convert.operators import evaluate
from artifactnet_jax.convert.trace import Plane, Trace, Unmapped, decimal, planes, scalars
from artifactnet_jax.filterbank import hann
from artifactnet_jax.forward import delta, running_median

EDGES = ("reflect", "edge", "constant")  # the names are NumPy's too
MAX_MEDIAN = 101
SHARE_ERROR = 1e-4  # of a soft mask
STRETCH = 2.0
DB_ERROR = 2e-3  # dB; a float32 logarithm of a float32 sum


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-4) -> bool:
    """Whether two arrays agree within a fraction of the larger one's peak."""
    peak = float(np.max(np.abs(b)))
    return bool(np.max(np.abs(a - b)) <= tolerance * peak) if peak > 0 else not np.any(a)


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """The magnitude as the graph has it, and the convention that gives it."""

    planes: list[Plane]  # the same values in tensors of other shapes
    values: dict[str, Any]  # of FrontEnd
    window: np.ndarray


def _transforms(trace: Trace) -> Iterator[tuple[int, int | None, list[np.ndarray]]]:
    """(n_fft, hop or None, windows) of what might be a Fourier transform."""
    vectors: dict[int, list[np.ndarray]] = {}
    for array in trace.static.values():
        if array.size >= 16 and array.size == max(array.shape, default=0):
            vectors.setdefault(array.size, []).append(array.reshape(-1).astype(np.float64))
    for node in trace.graph.nodes:
        n_fft, hop = 0, None
        rows: list[np.ndarray] = []
        if node.op == "STFT":
            hop = int(trace.static[node.inputs[1]].reshape(()))
            window, length = (*node.inputs[2:], "", "")[:2]
            if window:
                rows.append(trace.static[window].reshape(-1).astype(np.float64))
                n_fft = len(rows[0])
            else:
                n_fft = int(trace.static[length].reshape(()))
        elif node.op == "Conv" and node.inputs[1] in trace.static:
            weight = trace.static[node.inputs[1]]
            n_fft = max(weight.shape[2:])
            if weight.shape[1] != 1 or np.prod(weight.shape[2:]) != n_fft or n_fft < 16:
                continue
            hop = max(node.attributes.get("strides", (1,)))
            rows.append(weight[0].reshape(-1).astype(np.float64))  # the cosine of bin 0 is 1
        elif node.op in ("MatMul", "Gemm"):
            for name in node.inputs[:2]:
                given = trace.static.get(name)
                if given is None or given.ndim < 2 or given.size != np.prod(given.shape[-2:]):
                    continue
                flat = given.reshape(given.shape[-2], given.shape[-1])
                for matrix in (flat, flat.T):
                    size = len(matrix)
                    if matrix.shape[-1] in (size // 2 + 1, size + 2):
                        n_fft = size
                        rows.append(matrix[:, 0].astype(np.float64))
        if n_fft >= 16:
            yield n_fft, hop, [*rows, *vectors.get(n_fft, []), hann(n_fft), np.ones(n_fft)]
    # Any other transform shows by the size of its result alone.
    bins = {n for name in trace.values for n in trace.shapes[name] if n > 16 and (n - 1) % 16 == 0}
    for n_fft in sorted((2 * (n - 1) for n in bins), key=lambda n: (n & (n - 1), n)):
        yield n_fft, None, [hann(n_fft), *vectors.get(n_fft, []), np.ones(n_fft)]


def find_spectrum(trace: Trace, audio: np.ndarray) -> list[Spectrum]:
    """Tensors that hold the magnitude of the probe, by convention. Raises Unmapped."""
    n, samples = audio.shape
    pads = {(0, "reflect")}
    for name, values in trace.values.items():  # the padded audio shows how it was padded
        length = max(trace.shapes[name], default=0)
        if values.size == n * length and length > samples and (length - samples) % 2 == 0:
            pad = (length - samples) // 2
            for edge in EDGES:
                if np.array_equal(
                    values.reshape(n, -1),
                    np.pad(audio, ((0, 0), (pad, pad)), mode=edge),  # type: ignore[call-overload]
                ):
                    pads.add((pad, edge))
    found: list[Spectrum] = []
    tried = set()
    sized: dict[tuple[int, int], list[Plane]] = {}
    for n_fft, hop, windows in _transforms(trace):
        n_bins = n_fft // 2 + 1
        widths = {
            size
            for name in trace.values
            for size in trace.shapes[name]
            if n_bins in trace.shapes[name]
            and size > 1
            and (size != n_bins or trace.shapes[name].count(n_bins) > 1)
        }
        windows = [
            w for k, w in enumerate(windows) if not any(close(w, v, 1e-6) for v in windows[:k])
        ]
        for (pad, edge), window in itertools.product(sorted(pads), windows):
            hops = [hop] if hop else _hops(samples + 2 * pad - n_fft, widths)
            for step in hops:
                key = (n_fft, step, pad, edge, window.tobytes())
                if key in tried or samples + 2 * pad < n_fft:
                    continue
                tried.add(key)
                padded = np.pad(audio, ((0, 0), (pad, pad)), mode=edge)
                frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=1)
                if (samples + 2 * pad - n_fft) // step + 1 not in widths:
                    continue
                magnitude = np.abs(np.fft.rfft(frames[:, ::step] * window)).swapaxes(1, 2)
                size = (magnitude.shape[1], magnitude.shape[2])
                if size not in sized:
                    sized[size] = [
                        plane
                        for plane in planes(trace, *size)
                        if plane.roles is not None and np.isfinite(plane.array[0, 0, 0])
                    ]
                candidates = sized[size]
                for power in (1.0, 2.0):
                    for matched, scale in _match_spectrum(candidates, magnitude**power):
                        figures: dict[str, Any] = {
                            **{"n_fft": n_fft, "hop": step, "stft_pad": pad, "stft_edge": edge},
                            **{"spectrum_power": power, "spectrum_scale": scale ** (1 / power)},
                        }
                        eps = _spectrum_eps(trace, matched[0].array, magnitude, figures)
                        figures["spectrum_eps"] = eps
                        found.append(Spectrum(matched, figures, window))
        if found:
            return found
    raise Unmapped("no tensor holds the magnitude spectrogram of the audio")


def _hops(span: int, widths: set[int]) -> list[int]:
    """Hops that give one of these numbers of frames, the usual ones only."""
    usual = [2**k for k in range(4, 13)] + [10 * k for k in range(4, 200)] + [441, 882]
    return [hop for hop in usual if span // hop + 1 in widths]


def _match_spectrum(
    candidates: list[Plane], expected: np.ndarray
) -> list[tuple[list[Plane], float]]:
    """Planes that are a multiple of `expected`, equal ones together, and the factor.

    A floor under the magnitude is no rounding: it comes after, and begins the UNet.
    """
    found: list[tuple[list[Plane], float]] = []
    some = expected.reshape(-1)[::101]  # enough to turn away what is something else
    for plane in candidates:
        part = plane.array.reshape(-1)[::101]
        ratio = float(np.sum(part * some) / np.sum(some**2))
        if not ratio > 0 or not close(part, ratio * some, 1e-5):
            continue
        ratio = float(np.sum(plane.array * expected) / np.sum(expected**2))
        if not close(plane.array, ratio * expected, 1e-5):
            continue
        for group, _ in found:
            if np.array_equal(group[0].array, plane.array):
                group.append(plane)
                break
        else:
            found.append(([plane], 1.0 if abs(ratio - 1) < 1e-5 else ratio))
    return found


def _spectrum_eps(
    trace: Trace, got: np.ndarray, magnitude: np.ndarray, values: Mapping[str, Any]
) -> float:
    """What was added to re^2 + im^2, by the quietest bins: one of the graph's numbers, or 0."""
    power, scale = values["spectrum_power"], values["spectrum_scale"]
    quiet = magnitude <= np.quantile(magnitude, 0.05)

    def error(eps: float) -> float:
        model = (scale * np.sqrt(magnitude[quiet] ** 2 + eps)) ** power
        return float(np.mean(np.abs(np.log((got[quiet] + 1e-30) / (model + 1e-30)))))

    candidates = [0.0, *(x for x in scalars(trace) if x < 1e-3)]
    best = min(candidates, key=error)
    return best if error(best) < 0.5 * error(0.0) else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Residual:
    """residual = factor * mask * magnitude, as tensors of the graph."""

    spectrum: Spectrum
    mask: str
    mask_plane: Plane
    plane: Plane
    factor: float = 1.0


def find_residuals(trace: Trace, spectra: list[Spectrum], output: str) -> list[Residual]:
    """Products of the magnitude and a mask in [0, 1] that the output depends on."""
    used = trace.before(output)
    found = []
    for spectrum in spectra:
        f, t = spectrum.planes[0].array.shape[1:]
        by_name = {p.tensor: p for p in planes(trace, f, t) if p.roles is not None}
        same = {plane.tensor for plane in spectrum.planes}
        for node in trace.graph.nodes:
            if node.op != "Mul" or node.outputs[0] not in used or node.outputs[0] not in by_name:
                continue
            for magnitude, mask in (node.inputs, node.inputs[::-1]):
                if magnitude in same and mask not in same and mask in by_name:
                    values = by_name[mask].array
                    inside = values.min() >= -1e-6 and values.max() <= 1 + 1e-6
                    if inside and np.std(values) > 1e-6:
                        plane = by_name[node.outputs[0]]
                        found.append(Residual(spectrum, mask, by_name[mask], plane))
                        found += _scaled(trace, found[-1], by_name)
    if not found:
        raise Unmapped("no tensor is a mask in [0, 1] times the magnitude")
    return found


def _scaled(trace: Trace, residual: Residual, planes: Mapping[str, Plane]) -> list[Residual]:
    """The same where the mask's factor is multiplied in last: 0.5 * (sigmoid * magnitude)."""
    found = []
    for node in trace.graph.nodes:
        if node.op not in ("Mul", "Div") or residual.plane.tensor not in node.inputs:
            continue
        number = trace.static.get(node.inputs[1 - node.inputs.index(residual.plane.tensor)])
        if number is None or number.size != 1 or node.outputs[0] not in planes:
            continue
        factor = decimal(number) if node.op == "Mul" else 1 / decimal(number)
        found.append(dataclasses.replace(residual, plane=planes[node.outputs[0]], factor=factor))
    return found


def _windows(residual: np.ndarray, axis: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Some places in [n, F, T] away from the edges, and the widest window around each."""
    size = residual.shape[axis]
    half = min(MAX_MEDIAN, size // 2 * 2 - 1) // 2
    inside = [slice(None)] * 3
    inside[axis] = slice(half, size - half)
    places = np.argwhere(residual[tuple(inside)] > np.quantile(residual, 0.5))
    places = places[np.random.default_rng(0).permutation(len(places))[:48]]
    places[:, axis] += half
    index = [places[:, k, None] for k in range(3)]
    index[axis] = index[axis] + np.arange(-half, half + 1)
    return tuple(places.T), residual[tuple(index)]


def _median_width(windows: np.ndarray, got: np.ndarray) -> int | None:
    """Width of the medians of [places, width] windows that are the values got [places]."""
    half = windows.shape[1] // 2
    if not np.all(np.any(windows == got[:, None], axis=1)):
        return None
    for width in range(3, windows.shape[1] + 1, 2):
        cut = windows[:, half - width // 2 : half + width // 2 + 1]
        if np.array_equal(np.median(cut, axis=1).astype(got.dtype), got):
            return width
    return None


def find_medians(trace: Trace, residual: Plane) -> dict[str, Any]:
    """The two medians: {"hpss_width", "percussive_width", "hpss_edge", "h", "p"} (planes)."""
    found: dict[str, Any] = {}
    array = residual.array
    below = trace.after(residual.tensor)
    around = {axis: _windows(array, axis) for axis in (1, 2)}
    for plane in planes(trace, array.shape[1], array.shape[2], among=below):
        if plane.array.shape != array.shape:
            continue
        for axis, width_key, key in ((2, "hpss_width", "h"), (1, "percussive_width", "p")):
            if key in found:
                continue
            places, windows = around[axis]
            width = _median_width(windows, plane.array[places])
            if width is None:
                continue
            for edge in EDGES if "hpss_edge" not in found else (found["hpss_edge"],):
                if np.array_equal(running_median(array, width, axis, edge, np), plane.array):
                    found |= {width_key: width, key: plane, "hpss_edge": edge}
                    break
        if "h" in found and "p" in found:
            return found
    raise Unmapped("no tensors are running medians of the residual along time and frequency")


def find_parts(trace: Trace, residual: Plane, medians: Mapping[str, Any]) -> dict[str, Any]:
    """Harmonic and percussive part: {"hpss_power", "hpss_eps", "H", "P"} (planes)."""
    r = residual.array.astype(np.float64)
    h, p = (medians[key].array.astype(np.float64) for key in "hp")
    loud = r > 1e-12
    candidates = [
        plane
        for plane in planes(
            trace,
            r.shape[1],
            r.shape[2],
            among=trace.after(medians["h"].tensor) & trace.after(medians["p"].tensor),
        )
    ]
    numbers = scalars(trace)
    powers = [2.0, 1.0, *(x for x in numbers if 1 < x <= 4 and x != 2)]
    floors = [0.0, *(x for x in numbers if x < 1e-2)]
    best: tuple[float, dict[str, Any]] = (np.inf, {})
    for power, eps in itertools.product(powers, floors):
        hp, pp = h**power, p**power
        total = hp + pp + eps
        valid = loud & (total > 0)
        harmonic = np.where(valid, hp / np.where(total > 0, total, 1), 0)
        percussive = np.where(valid, pp / np.where(total > 0, total, 1), 0)
        result: dict[str, Any] = {"hpss_power": power, "hpss_eps": eps}
        worst = 0.0
        for key, part in (("H", harmonic), ("P", percussive)):
            errors = [
                float(np.max(np.abs(c.array[valid] / r[valid] - part[valid]))) for c in candidates
            ]
            if not errors or not np.isfinite(min(errors)):
                worst = np.inf
                break
            result[key] = candidates[int(np.argmin(errors))]
            worst = max(worst, min(errors))
        if worst < best[0]:
            best = worst, result
    if best[0] > SHARE_ERROR:
        raise Unmapped("no tensors are the residual times soft masks of its medians")
    return best[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Mel:
    """The mel step: the matrix, its figures, and the three views in dB before the clamp."""

    matrix: np.ndarray  # [n_mels, n_bins]
    values: dict[str, Any]  # of FrontEnd
    views: np.ndarray  # [segments, 3, n_mels, frames], 10 log10
    logs: list[str]  # the tensors that hold their logarithms


def find_mel(trace: Trace, parts: Mapping[str, np.ndarray], below: set[str]) -> Mel:
    """parts: residual, H and P [n, F, T]. Raises Unmapped."""
    n_bins, frames = parts["residual"].shape[1:]
    matrices: dict[bytes, np.ndarray] = {}
    for node in trace.graph.nodes:
        if not below.intersection(node.outputs):
            continue
        for name in node.inputs:
            array = np.squeeze(trace.static.get(name, np.zeros(0)))
            if array.ndim == 2 and n_bins in array.shape and min(array.shape) >= 4:
                matrix = array if array.shape[1] == n_bins else array.T
                matrices[matrix.tobytes()] = np.ascontiguousarray(matrix, np.float32)
    logs = [
        node.outputs[0]
        for node in trace.graph.nodes
        if node.op == "Log" and node.outputs[0] in below and node.outputs[0] in trace.values
    ]
    for log in logs:
        node = trace.producer[log]
        floor = _floor(trace, node.inputs[0])
        if floor is None:
            continue
        amin, rule, gain = floor
        for matrix, power in itertools.product(matrices.values(), (2.0, 1.0)):
            sums = {
                key: np.einsum(
                    "mf,nft->nmt", matrix.astype(np.float64), part.astype(np.float64) ** power
                )
                for key, part in parts.items()
            }
            floored = {
                key: gain * (np.maximum(x, amin) if rule == "max" else x + amin)
                for key, x in sums.items()
            }
            seen: dict[str, np.ndarray] = {}
            for plane in planes(trace, len(matrix), frames, among=below):
                for key, expected in floored.items():
                    if key in seen or not np.all(plane.array > 0):
                        continue
                    if np.max(np.abs(np.log10(plane.array / expected))) < 1e-3:
                        seen[key] = plane.array
                if len(seen) == 3:
                    given = (seen[key].astype(np.float64) / gain for key in parts)
                    views = np.stack([10 * np.log10(x) for x in given], 1)
                    values = {"n_mels": len(matrix), "mel_power": power}
                    values |= {"amin": amin, "amin_rule": rule}
                    return Mel(matrix, values, views, logs)
    if not logs:
        raise Unmapped("no logarithm is taken of what the medians are made of")
    raise Unmapped("no logarithm is taken of mel spectra of residual, harmonic and percussive part")


def _floor(trace: Trace, name: str) -> tuple[float, str, float] | None:
    """(amin, rule, gain) of what a logarithm is taken of: gain * (x + amin), or of their maximum.

    A gain is that of log(1 + c x), which is log c + log(x + 1 / c).
    """
    while True:
        node = trace.producer.get(name)
        if node is None:
            return None
        if node.op in (
            "Reshape",
            "Squeeze",
            "Unsqueeze",
            "Identity",
            "Transpose",
            "Concat",
            "Cast",
        ):
            name = node.inputs[0]
            continue
        if node.op == "Clip":
            low = node.attributes.get("min")
            if len(node.inputs) > 1 and node.inputs[1]:
                low = decimal(trace.static[node.inputs[1]])
            if low is None or not low > 0:
                return None
            gain = _gain(trace, node.inputs[0])
            return float(low) / gain, "max", gain
        if node.op in ("Max", "Add"):
            numbers = [trace.static[i] for i in node.inputs if i in trace.static]
            if len(numbers) == 1 and numbers[0].size == 1 and numbers[0].reshape(()) > 0:
                (other,) = (i for i in node.inputs if i not in trace.static)
                gain = _gain(trace, other)
                return decimal(numbers[0]) / gain, "max" if node.op == "Max" else "add", gain
        return None


def _gain(trace: Trace, name: str) -> float:
    """The number that a tensor is a multiple by, 1 where it is made in another way."""
    node = trace.producer.get(name)
    if node is None or node.op not in ("Mul", "Div"):
        return 1.0
    numbers = [trace.static[i] for i in node.inputs if i in trace.static]
    if len(numbers) != 1 or numbers[0].size != 1 or not numbers[0].reshape(()) > 0:
        return 1.0
    if node.op == "Div":
        return 1 / decimal(numbers[0]) if node.inputs[1] in trace.static else 1.0
    return decimal(numbers[0])


def clamped(views: np.ndarray, top_db: float | None, joint: str) -> np.ndarray:
    """Views [n, 3, M, T] in dB after the clamp of `FrontEnd.joint`."""
    if top_db is None:
        return views
    axes = {"segment": (1, 2, 3), "view": (2, 3), "song": (0, 1, 2, 3), "song_view": (0, 2, 3)}
    floor = views.max(axis=axes[joint], keepdims=True) - top_db
    return np.asarray(np.maximum(views, floor))


def seven(views: np.ndarray) -> dict[str, np.ndarray]:
    """The named channels, each [n, M, T], of clamped views [n, 3, M, T]."""
    mel_res, mel_h, mel_p = views[:, 0], views[:, 1], views[:, 2]
    d = delta(mel_res, np)
    parts = (mel_res, mel_h, mel_p, d, delta(d, np), mel_h - mel_p, np.abs(d))
    return dict(zip(CHANNELS, parts, strict=True))


def find_clamp(trace: Trace, mel: Mel, below: set[str]) -> dict[str, Any]:
    """{"top_db", "joint"}, by the lowest values of the views further on.

    What follows the logarithm is computed again from logarithms that are `STRETCH` times as large:
    else the floor under the logarithm would hide a clamp on all but loud audio.
    """
    later = set().union(*(trace.after(log) for log in mel.logs)) & below & set(trace.values)
    names = [
        name
        for name in sorted(later, key=lambda tensor: trace.order.get(tensor, -1))
        if set(mel.views.shape[2:]) <= set(trace.shapes[name])
    ]
    feeds = {log: STRETCH * trace.values[log] for log in mel.logs}
    others = {name: trace.values[name] for name in trace.inputs()}
    values = evaluate(trace.graph, feeds | others, [n for n in names if n not in feeds])
    values = {name: np.asarray(value) for name, value in values.items()} | feeds
    trace = dataclasses.replace(trace, values=values)
    views = STRETCH * mel.views
    n = len(views)
    shape = views.shape[2:]
    floors = np.full(views.shape[:2], np.nan)
    flat = views.reshape(n, 3, -1)
    top = flat.max(axis=2) - 50  # dB; no clamp in use reaches higher
    for plane in planes(trace, shape[0], shape[1], among=below):
        for v in range(3):
            if not np.isnan(floors[:, v]).all():
                continue
            got = plane.array.reshape(n, -1).astype(np.float64)
            loud = flat[:, v] > top[:, v, None]
            a, b = np.polyfit(flat[:, v][loud], got[loud], 1)
            if abs(a) < 1e-6:
                continue
            level = (got - b) / a
            if np.max(np.abs(level[loud] - flat[:, v][loud])) > DB_ERROR:
                continue
            low = level.min(axis=1)
            bound = np.maximum(flat[:, v], low[:, None])
            if np.max(np.abs(bound - level)) > DB_ERROR:
                continue
            active = low > flat[:, v].min(axis=1) + DB_ERROR
            floors[active, v] = low[active]
    if np.isnan(floors).all():
        return {"top_db": None, "joint": "segment"}
    clamped_views = ~np.isnan(floors)
    peaks = views.max(axis=(2, 3))
    rules = {
        "segment": np.broadcast_to(peaks.max(axis=1, keepdims=True), peaks.shape),
        "view": peaks,
        "song": np.full(peaks.shape, peaks.max()),
        "song_view": np.broadcast_to(peaks.max(axis=0, keepdims=True), peaks.shape),
    }
    for joint, peak in rules.items():
        distance = (peak - floors)[clamped_views]
        if np.ptp(distance) < 2 * DB_ERROR:
            return {"top_db": round(float(np.mean(distance)), 2), "joint": joint}
    raise Unmapped("the views are clamped by a rule that is not known")


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """The tensor that the classifier reads, and which channels it holds."""

    tensor: str
    roles: tuple[str, ...]
    names: tuple[Channel, ...]
    scale: np.ndarray  # of each channel, after which `offset` is added
    offset: np.ndarray


def find_channels(trace: Trace, views: np.ndarray, start: str, output: str) -> Channels:
    """The tensor with most of the channels that everything after it depends on alone."""
    n = trace.segments
    named = seven(views)
    m, t = views.shape[2:]
    best: Channels | None = None
    used = trace.before(output) & trace.after(start)
    for name in sorted(used & set(trace.values), key=lambda tensor: trace.order.get(tensor, -1)):
        shape = trace.shapes[name]
        if len(shape) != 4 or shape[0] != n or sorted(shape[1:]) == sorted((1, m, t)):
            continue
        for axes in itertools.permutations((1, 2, 3)):
            c, h, w = (shape[a] for a in axes)
            if (h, w) != (m, t) or not 2 <= c <= 16:
                continue
            if best is not None and c <= len(best.names):
                break
            stack = trace.values[name].transpose(0, *axes)
            matches = [_channel(stack[:, k], named) for k in range(c)]
            if None in matches or not trace.cuts({start}, name, output):
                break
            roles = [""] * 4
            for role, axis in zip("nchw", (0, *axes), strict=True):
                roles[axis] = role
            names, scales, offsets = zip(*matches, strict=True)
            best = Channels(name, tuple(roles), names, np.array(scales), np.array(offsets))
            break
    if best is None:
        raise Unmapped("no tensor holds channels made of the three mel views alone")
    return best


def _channel(got: np.ndarray, named: Mapping[str, np.ndarray]) -> tuple[str, float, float] | None:
    for name, expected in named.items():
        a, b = np.polyfit(expected.reshape(-1), got.reshape(-1).astype(np.float64), 1)
        a = 1.0 if abs(a - 1) < 1e-5 else float(a)
        b = 0.0 if abs(b) < 1e-4 * max(1.0, abs(a) * 100) else float(b)
        if abs(a) > 1e-6 and np.max(np.abs(a * expected + b - got)) < 3 * DB_ERROR * abs(a):
            return name, a, b
    return None
