"""The magnitude, and the residual that a mask makes of it, among the tensors of a graph."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from artifactnet_jax.convert.trace import Plane, Trace, Unmapped, decimal, planes, scalars
from artifactnet_jax.filterbank import hann

EDGES = ("reflect", "edge", "constant")  # the names are NumPy's too


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
            n_bins = trace.shapes[node.outputs[0]][-2]
            n_fft = 2 * (n_bins - 1) if node.attributes.get("onesided", 1) else n_bins
            window = node.inputs[2] if len(node.inputs) > 2 else ""
            if window:
                rows.append(trace.static[window].reshape(-1).astype(np.float64))
                n_fft = len(rows[0])
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
                candidates = [
                    plane
                    for plane in planes(trace, *magnitude.shape[1:])
                    if plane.roles is not None and np.isfinite(plane.array[0, 0, 0])
                ]
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
    """Planes that are a multiple of `expected` but for rounding, equal ones together, and the
    factor. (A floor under the magnitude is no rounding: it comes after, and begins the UNet.)"""
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
