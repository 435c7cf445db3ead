"""The null of a decoder: what real music reaches against its lines, by band and length."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from artifactnet_jax import decoders as dc
from artifactnet_jax import fingerprint as fp

BEYOND = 0.1  # share of the real tracks that a tail is fitted to
# What tails of real scores are like, from 30 templates on 193 tracks that no null had seen:
# threshold and scale in standard deviations, and shape. At speed 1, and best of other speeds.
COMMON, COMMON_SPEED = (1.28, 0.48, 0.08), (1.25, 0.75, 0.05)
PRIOR = 16  # excesses that these count for


@dataclasses.dataclass(eq=False)
class Real:
    """Stretches of real music of one length class."""

    ends: np.ndarray  # [n], Hz
    weights: np.ndarray  # [n]
    grid: np.ndarray  # [n, 4, GRID], residuals
    transforms: list[np.ndarray]  # of each band class, of those whose band reaches so far
    combs: dict[tuple[int, int], np.ndarray] = dataclasses.field(default_factory=dict)

    def agreement(self, n: int, i: int, lines: np.ndarray) -> np.ndarray:
        """`decoders.agreement` [4] of the n-th stretch of band class `i` with lines [2, GRID]."""
        at = int(np.flatnonzero(self.ends >= dc.CLASSES[i])[n])
        rows = fp.in_band(self.grid[at].astype(np.float32), fp.LOW_HZ, dc.CLASSES[i])
        if (at, i) not in self.combs:
            self.combs[at, i] = fp.combs(rows)[0].astype(np.float32)
        return dc.agreement(rows, lines, self.combs[at, i])


def tail(values: np.ndarray, weights: np.ndarray, common: tuple[float, float, float]) -> np.ndarray:
    """[threshold, share beyond, scale, shape] of real scores: generalised Pareto above threshold.

    `common` is what such tails are like: threshold and scale in standard deviations above the mean,
    and shape. It counts as `PRIOR` excesses beside those that there are, so that few real tracks
    do not bring a wild tail. The shape is the most likely one with a normal prior, +- 0.1.
    """
    w = weights / weights.sum()
    mean = float(w @ values)
    spread = math.sqrt(float(w @ np.square(values - mean)) / (1 - float(np.square(w).sum())))
    order = np.argsort(values)
    own = float(values[order][np.searchsorted(np.cumsum(w[order]), 1 - BEYOND)])
    above = values > own
    part = w[above] / w[above].sum()
    size = 1 / np.square(part).sum()  # effective number
    threshold = (size * own + PRIOR * (mean + common[0] * spread)) / (size + PRIOR)
    quantiles = 1 - (np.arange(PRIOR) + 0.5) / PRIOR
    usual = spread * common[1] / common[2] * (quantiles ** -common[2] - 1)
    excess, count = np.append(values[above] - own, usual), np.append(size * part, np.ones(PRIOR))
    best = (-math.inf, 1.0, 0.0)
    scales = (count @ excess) / count.sum() * np.geomspace(0.4, 2.5, 40)
    for xi in np.arange(-6, 13) / 20:
        inner = 1 + xi * excess / scales[:, None]
        log = np.log(np.maximum(inner, 1e-12)) * (1 + 1 / xi) if xi else excess / scales[:, None]
        likelihood = -count.sum() * np.log(scales) - log @ count - (xi - common[2]) ** 2 / 0.02
        likelihood[inner.min(axis=1) <= 0] = -math.inf
        k = int(likelihood.argmax())
        best = max(best, (float(likelihood[k]), float(scales[k]), float(xi)))
    return np.array([threshold, BEYOND, best[1], best[2]], np.float32)


def _below(
    values: np.ndarray,
    weights: np.ndarray,
    common: tuple[float, float, float],
    own: Callable[[int], bool],
) -> np.ndarray:
    """Real scores with those of mere combs put below the tail."""
    threshold = tail(values, weights, common)[0]
    middle = float(np.median(values))
    high = np.flatnonzero(values > threshold)
    out = values.copy()
    out[[n for n in high if not own(int(n))]] = middle
    return out


def fit(template: np.ndarray, mean: np.ndarray, real: Sequence[Real]) -> dict[str, np.ndarray]:
    """The null of one template [2, GRID], for every class of band and length.

    `mean` [classes, lengths, 4]: the inner products that the decoder's own tracks reach, each
    against a template without its repository. `real`: the real music of each length class.

    A real track that agrees with the template by a comb is no match whatever its score
    (`decoders.own_lines`): it lies below the tail that is fitted. So it is where less than half of
    the score is left without combs, and no match by itself.
    """
    with threadpool_limits(limits=1, user_api="blas"):  # the same sums on every machine
        rows = [
            [_cell(template, mean[i, j], real[j], i) for j in range(len(dc.LENGTHS))]
            for i in range(len(dc.CLASSES))
        ]
    return {
        key: np.array([[cell[key] for cell in row] for row in rows], np.float32)
        for key in rows[0][0]
    }


def _cell(
    template: np.ndarray, mean: np.ndarray, real: Real, i: int
) -> dict[str, np.ndarray | float]:
    """The null of one template in one class of band and length."""
    w = real.weights[real.ends >= dc.CLASSES[i]]
    w = w / w.sum()
    moved, conjugate = real.transforms[i], dc.transform(template, dc.CLASSES[i])
    s = dc.at_speed_one(moved, conjugate)
    mu = w @ s
    spread = np.cov(s.T, aweights=w)
    # Shrunk by 0.3 of its diagonal: members of other repositories differ.
    solved = np.linalg.solve(spread + 0.3 * np.diag(np.diag(spread)), mean - mu)
    solved = np.maximum(solved, 0)
    if not solved.any():
        solved[0] = 1
    solved /= math.sqrt(solved @ spread @ solved)
    offset = float(solved @ mu)
    chunks = np.array_split(moved, max(1, len(moved) // 64))
    speeds = np.concatenate([dc.products(part, conjugate, solved) for part in chunks])
    z = speeds[:, dc.ORIGINAL].max(1) - offset
    others = speeds[:, ~dc.ORIGINAL]
    centre, deviation = float(w @ others.mean(1)), float(np.sqrt(w @ others.var(1)))
    best = (others.max(1) - centre) / deviation
    shift = dc.LAGS[~dc.ORIGINAL][others.argmax(1)]
    first, lines = tail(z, w, COMMON), dc.unit(template, dc.CLASSES[i])

    def own(n: int, lag: int, score: float) -> bool:
        left = float(real.agreement(n, i, np.roll(lines, lag, axis=-1)) @ solved) - offset
        return left > score / 2 or bool(dc.beyond(left, first) < dc.OWN)

    at_one = _below(z, w, COMMON, lambda n: own(n, 0, z[n]))
    at_other = _below(best, w, COMMON_SPEED, lambda n: own(n, int(shift[n]), best[n]))
    return {
        "weights": solved,
        "offset": offset,
        "lags": np.array([centre, deviation]),
        "tail": tail(at_one, w, COMMON),
        "speed_tail": tail(at_other, w, COMMON_SPEED),
    }
