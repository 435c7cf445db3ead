"""A learned head for decoders in no bank: what the fine spectrum's residual is like, as one logit.

A bank knows lines by where they lie. The head knows what lines are like: of each of the four
residuals of `fingerprint.residuals` it reads how high the comb of any spacing stands, what its
Fourier transform along frequency has, how its values are distributed, how they go with their
neighbours, and where in the band they are large. Every figure is of the band that is there, and
becomes a standard score against real music cut to the same band and of the same length. A small
network makes one logit of them: the higher, the more like a decoder. It is not calibrated.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from artifactnet_jax import fingerprint as fp
from artifactnet_jax.kernels import median_filter

NOTE = "artifactnet_jax.fine"  # metadata of an ONNX file or an engine: `to_text`
BANDS = (7_000.0, 8_800.0, 10_600.0, 13_000.0, 16_000.0)  # Hz; upper ends of what is read
LENGTHS = (20, 64, 216)  # frames; a length class begins: about 4, 12 and 40 s
PART_FRAMES = 540  # a long track is judged in parts of at most so many: 100 s

SPACINGS = (20.0, 1_500.0)  # Hz, of combs
COMBS, FOURIER = 48, 48  # cells of spacings, and of delays
LAGS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20)  # bins
PARTS = 12  # of the band
SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
DELAYS = (0.6e-3, 0.1)  # s: combs of 1,667 to 10 Hz
MOST = 5.0  # of a standard score

COMB_VALUES = COMBS + 6
FEATURES = 4 * (COMB_VALUES + FOURIER + len(SHARES) + 2 + len(LAGS) + PARTS)
_FFT, _COMB_FFT = 1 << 13, 1 << 16
_FLOOR = 101  # delays; running median that the Fourier transform is compared with
_LEAST_LINES = 8  # of a comb; fewer count as so many
_ORDER = ("mean", "spread", "hidden.kernel", "hidden.bias", "out.kernel", "out.bias")


@dataclasses.dataclass(frozen=True, eq=False)
class FineHead:
    """The head's tensors by name, float32, and what is known of them.

    mean, spread [bands, lengths, FEATURES]: of real music; hidden.kernel [FEATURES, H], hidden.bias
    [H], out.kernel [H, 1], out.bias [1]: the network. ValueError: other tensors, or not finite.
    """

    tensors: Mapping[str, np.ndarray]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        if sorted(self.tensors) != sorted(_ORDER):
            raise ValueError(f"it has the tensors {sorted(self.tensors)}, not {sorted(_ORDER)}")
        hidden = self.tensors["hidden.bias"].size
        real = (len(BANDS), len(LENGTHS), FEATURES)
        shapes = (real, real, (FEATURES, hidden), (hidden,), (hidden, 1), (1,))
        for name, shape in zip(_ORDER, shapes, strict=True):
            tensor = self.tensors[name]
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tensor.shape}, not {shape}")
            if not np.isfinite(tensor).all():
                raise ValueError(f"{name} has non-finite values")
        if not (self.tensors["spread"] > 0).all():
            raise ValueError("spread has values that are not above 0")

    @functools.cached_property
    def sha256(self) -> str:
        """Digest over tensors, as float16, and provenance."""
        return hashlib.sha256(to_text(self).encode()).hexdigest()

    def standard(self, features: np.ndarray, band: int, length: int) -> np.ndarray:
        """The `FEATURES` of a stretch as standard scores, clipped: what the network reads."""
        mean, spread = (self.tensors[name][band, length] for name in ("mean", "spread"))
        return np.asarray(np.clip((features - mean) / spread, -MOST, MOST))

    def logit(self, features: np.ndarray, band: int, length: int) -> float:
        """Of the `FEATURES` of a stretch, in these classes."""
        t = self.tensors
        # Not by BLAS, whose sums depend on how many threads it may use.
        standard = self.standard(features, band, length)
        hidden = np.einsum("i,ij->j", standard, t["hidden.kernel"])
        hidden = np.maximum(hidden + t["hidden.bias"], 0)
        return float(np.einsum("i,ij->j", hidden, t["out.kernel"])[0] + t["out.bias"][0])


def stored(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors as files hold them: float16."""
    return {name: np.asarray(tensor, np.float16) for name, tensor in tensors.items()}


def read(tensors: Mapping[str, np.ndarray], provenance: Mapping[str, Any], sha256: str) -> FineHead:
    """The head that a file holds. ValueError: it is damaged."""
    head = FineHead({k: np.asarray(v, np.float32) for k, v in tensors.items()}, provenance)
    if head.sha256 != sha256:
        raise ValueError("the tensors do not match the digest of the head")
    return head


def to_text(head: FineHead) -> str:
    """The head as one line of JSON, for files that have room for text only."""
    data = {
        name: {"shape": tensor.shape, "float16": base64.b64encode(tensor.tobytes()).decode()}
        for name, tensor in sorted(stored(head.tensors).items())
    }
    return json.dumps({"tensors": data, "provenance": dict(head.provenance)}, sort_keys=True)


def from_text(text: str) -> FineHead:
    """The head that `to_text` wrote. ValueError: it is damaged."""
    try:
        data = json.loads(text)
        tensors = {
            name: np.frombuffer(base64.b64decode(entry["float16"], validate=True), "<f2")
            .reshape(entry["shape"])
            .astype(np.float32)
            for name, entry in data["tensors"].items()
        }
        return FineHead(tensors, data["provenance"])
    except (AttributeError, KeyError, TypeError, binascii.Error) as error:
        raise ValueError(f"not a head ({error!r})") from error


def noted(notes: Mapping[str, str]) -> FineHead | None:
    """The head in a file's metadata; None where there is none. ValueError: it is damaged."""
    return from_text(notes[NOTE]) if NOTE in notes else None


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What the head reads of a part of a track: its frames with sound, features and classes."""

    frames: int
    features: np.ndarray  # float32 [FEATURES]
    band: int
    length: int


def judge(spectrum: fp.Accumulator, head: FineHead) -> tuple[float | None, str | None]:
    """(logit, None) of audio, or (None, the reason why nothing is said)."""
    found, reason = parts(spectrum)
    return (together(found, head), None) if found else (None, reason)


def together(found: Sequence[Part], head: FineHead) -> float:
    """The logit of a track: the mean of its parts, by sound."""
    total = 0.0
    for part in found:
        total += part.frames * head.logit(part.features, part.band, part.length)
    return total / sum(part.frames for part in found)


def parts(spectrum: fp.Accumulator) -> tuple[list[Part], str | None]:
    """The parts of audio that are judged, or none and the reason why nothing is said.

    A track of more than 100 s is judged in equal parts.
    """
    if spectrum.frames < LENGTHS[0]:
        return [], f"too short: {LENGTHS[0] * fp.HOP / fp.RATE:.0f} s are needed"
    windows = spectrum.windows
    each = max(1, PART_FRAMES // spectrum.window_frames)
    bounds = np.linspace(0, len(windows), -(-len(windows) // each) + 1).astype(int)
    means = [sum(windows[a:b], fp.Mean()) for a, b in itertools.pairwise(bounds)]
    classes = [(mean, length_class(mean.frames)) for mean in means]
    heard = [(mean, length) for mean, length in classes if length is not None]
    if not heard:
        return [], "silent above 3.5 kHz"
    end = fp.band_end(sum((mean for mean, _ in heard), fp.Mean()).levels()[1])
    band = band_class(end)
    if band is None:
        return [], f"its band ends at {end:.0f} Hz, {BANDS[0]:.0f} Hz are needed"
    return [_part(mean.frames, mean.levels(), band, length) for mean, length in heard], None


def _part(frames: int, levels: np.ndarray, band: int, length: int) -> Part:
    """What is read of a stretch with these levels."""
    return Part(frames, features(fp.residuals(levels), BANDS[band]), band, length)


def stretches(spectrum: fp.Accumulator, head: FineHead) -> list[tuple[float, float, float | None]]:
    """(start and end in s, logit) of every window; None where nothing can be said of it."""
    step, found = spectrum.window_frames * fp.HOP / fp.RATE, []
    for n, mean in enumerate(spectrum.windows):
        length, logit = length_class(mean.frames), None
        if length is not None:
            levels = mean.levels()
            band = band_class(fp.band_end(levels[1]))
            if band is not None:
                part = _part(mean.frames, levels, band, length)
                logit = head.logit(part.features, band, length)
        found.append((n * step, (n + 1) * step, logit))
    return found


def length_class(frames: int) -> int | None:
    """Which of `LENGTHS`; None below."""
    return int(np.searchsorted(LENGTHS, frames, "right")) - 1 if frames >= LENGTHS[0] else None


def band_class(end_hz: float) -> int | None:
    """Which of `BANDS`, for a band that ends there; None below."""
    return int(np.searchsorted(BANDS, end_hz, "right")) - 1 if end_hz >= BANDS[0] else None


def features(residuals: np.ndarray, high: float) -> np.ndarray:
    """Residuals [4, bins] -> float32 [FEATURES], of the band from 5 kHz to `high`."""
    inside = (fp.LOW_HZ <= fp.HZ) & (high > fp.HZ)
    rows = residuals[:, inside].astype(np.float32)
    unit = rows - rows.mean(axis=1, keepdims=True)
    unit /= unit.std(axis=1, keepdims=True) + np.float32(1e-6)
    parts = [_combs(rows, fp.HZ[inside]), _fourier(unit), _values(unit), _neighbours(unit)]
    return np.concatenate(parts, axis=1).astype(np.float32).ravel()


@functools.cache
def _scores(n: int) -> np.ndarray:
    """Normal scores of ranks: [n]."""
    inverse = NormalDist().inv_cdf
    return np.array([inverse((rank + 0.5) / n) for rank in range(n)])


_AXIS = fp.LOW_HZ * np.exp(
    fp.GRID_STEP * np.arange(int(math.log(BANDS[-1] / fp.LOW_HZ) / fp.GRID_STEP))
)
_STEPS = round(math.log(SPACINGS[1] / SPACINGS[0]) / fp.GRID_STEP)
_SPACING = SPACINGS[1] * np.exp(-fp.GRID_STEP * np.arange(_STEPS + 1))
_COMB_EDGES = np.searchsorted(-_SPACING, -np.geomspace(*SPACINGS[::-1], COMBS + 1))


@functools.cache
def _harmonics() -> np.ndarray:
    """Conjugate transform of the harmonics' places on the log axis."""
    low, high = SPACINGS
    order = np.arange(math.floor(fp.LOW_HZ / high), math.ceil(_AXIS[-1] / low) + 1)
    place = np.rint((np.log(order) - math.log(fp.LOW_HZ / high)) / fp.GRID_STEP).astype(int)
    place = place[(place >= 0) & (place < _COMB_FFT)]
    lines = np.bincount(place, minlength=_COMB_FFT)
    return np.conj(np.fft.rfft(lines))


def _sums(grid: np.ndarray) -> np.ndarray:
    """Rows on `_AXIS` -> their sums over the multiples of each of `_SPACING`."""
    sums = np.fft.irfft(np.fft.rfft(grid, _COMB_FFT) * _harmonics(), _COMB_FFT)
    # A spacing below the highest by a factor exp(k step) puts its lines k steps lower.
    return np.asarray(np.roll(sums, _STEPS, axis=-1)[..., : _STEPS + 1][..., ::-1])


@functools.cache
def _lines(low: float, high: float) -> np.ndarray:
    """Root of the number of multiples in a band of each of `_SPACING`."""
    count = _sums(((low <= _AXIS) & (high > _AXIS)).astype(np.float64))
    return np.asarray(np.sqrt(np.maximum(_LEAST_LINES, count)))


def _combs(rows: np.ndarray, hz: np.ndarray) -> np.ndarray:
    """How high combs stand in rows [n, bins]: float64 [n, COMBS + 6].

    Bins count by rank, so that no single peak makes a comb. In each cell of spacings the highest
    sum over a comb's lines, in standard deviations of so many independent bins; the 1st, 2nd, 4th
    and 8th highest of the cells; two measures of all spacings' spread.
    """
    ranks = rows.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    score = np.pad(_scores(len(hz))[ranks], ((0, 0), (1, 1)), mode="edge")
    score = score[:, :-2] / 2 + score[:, 1:-1] + score[:, 2:] / 2
    score /= score.std(axis=1, keepdims=True)
    inside = (hz[0] <= _AXIS) & (hz[-1] > _AXIS)
    grid = np.zeros((len(rows), len(_AXIS)))
    grid[:, inside] = [np.interp(_AXIS[inside], hz, row) for row in score]
    height = _sums(grid) / _lines(float(hz[0]), float(hz[-1]))
    cells = np.maximum.reduceat(height, _COMB_EDGES[:-1], axis=1)
    best = np.sort(cells, axis=1)[:, ::-1][:, [0, 1, 3, 7]]
    spread = np.stack([np.log(height.std(axis=1)), (height**4).mean(axis=1) ** 0.25], axis=1)
    return np.concatenate([cells, best, spread], axis=1)


_DELAYS = np.arange(_FFT // 2 + 1) / (_FFT * fp.BIN_HZ)
_DELAY_EDGES = np.searchsorted(_DELAYS, np.geomspace(*DELAYS, FOURIER + 1))


def _fourier(unit: np.ndarray) -> np.ndarray:
    """The Fourier transform along frequency of rows [n, bins]: float32 [n, FOURIER].

    In each cell of delays the highest of the log power above its running median.
    """
    window = np.hanning(unit.shape[1] + 2)[1:-1].astype(np.float32)
    window /= np.sqrt(np.square(window).sum())
    spectrum = np.fft.rfft(unit * window, _FFT)[:, : _DELAY_EDGES[-1] + 60]
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    log = np.log(power + 1e-6).astype(np.float32)
    above = (log - median_filter(log, _FLOOR, 1))[:, : _DELAY_EDGES[-1]]
    return np.asarray(np.maximum.reduceat(above, _DELAY_EDGES[:-1], axis=1))


def _values(unit: np.ndarray) -> np.ndarray:
    """How the values of rows [n, bins] are distributed: quantiles, skewness, log kurtosis."""
    quantiles = np.quantile(unit, SHARES, axis=1).T
    skewness = (unit**3).mean(axis=1, keepdims=True)
    return np.concatenate(
        [quantiles, skewness, np.log((unit**4).mean(axis=1, keepdims=True) + 1e-9)], axis=1
    )


def _neighbours(unit: np.ndarray) -> np.ndarray:
    """Of rows [n, bins]: autocorrelation at `LAGS`, and the log spread in `PARTS` of the band."""
    lagged = [(unit[:, lag:] * unit[:, :-lag]).mean(axis=1) for lag in LAGS]
    parts = np.array_split(unit, np.linspace(0, unit.shape[1], PARTS + 1).astype(int)[1:-1], axis=1)
    return np.stack([*lagged, *(np.log(part.std(axis=1) + 1e-3) for part in parts)], axis=1)
