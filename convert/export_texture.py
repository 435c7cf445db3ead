"""The texture head as ONNX nodes.

It takes a spectrum for each of its resolutions; of `edge` it makes half of the time, 55 of 110 ms
per segment on one thread. Its means over frames are products with the column of their weights, its
local means poolings.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax import texture
from artifactnet_jax.convert import export_front_end as front_end
from artifactnet_jax.convert.onnx_graph import OnnxGraph
from artifactnet_jax.filterbank import hann


def texture_logit(
    g: OnnxGraph, audio: str, magnitude: str, config: cfg.Config, tensors: Mapping[str, np.ndarray]
) -> str:
    """Audio [B, N] and the front end's magnitude -> what the texture head adds to the logit [B]."""
    own, head = config.front_end, config.texture
    assert head is not None
    parts = []
    for n_fft, hop in head.resolutions:
        fe = texture.front_end(own, n_fft, hop)
        with g.scope(f"{n_fft}.{hop}"):
            plain = magnitude
            if fe != own:
                plain = front_end.magnitude(g, audio, fe, hann(n_fft), f"texture.{n_fft}.{hop}")
            parts.append(_Statistics(g, fe, head)(plain))

    def tensor(name: str) -> str:
        return g.constant(tensors[f"texture.{name}"], name=f"texture.{name}")

    x = g.op("Sub", g.op("Concat", *parts, axis=1), tensor("mean"))
    limits = g.constant(-head.limit), g.constant(head.limit)
    x = g.op("Clip", g.op("Div", x, tensor("spread")), *limits)
    for name in (f"hidden.{level}" for level in range(len(head.hidden))):
        x = g.op("Relu", g.op("Gemm", x, tensor(f"{name}.kernel"), tensor(f"{name}.bias")))
    return g.reshape(g.op("Gemm", x, tensor("out.kernel"), tensor("out.bias")), -1)


class _Statistics:
    """`texture.statistics` of one resolution: [B, n_bins, n_frames] -> [B, K].

    Everything is [B, 1, bins, frames] until the means over frames are taken. Those of all kinds
    then lie side by side, [B, kinds, bins], and one product takes the means over bands.
    """

    def __init__(self, g: OnnxGraph, fe: cfg.FrontEnd, head: cfg.Texture):
        self.g, self.head = g, head
        self.rows = texture.band_rows(head, fe.n_fft, fe.sample_rate)
        self.bins = min(int(self.rows[-1]) + texture.MARGIN, fe.n_bins)
        self.frames, self.bands = fe.n_frames, len(self.rows) - 1

    def __call__(self, magnitude: str) -> str:
        """The statistics of a magnitude."""
        from onnx import TensorProto

        g, head, number = self.g, self.head, self.g.constant
        p = g.op("Unsqueeze", g.cut(magnitude, 1, 0, self.bins), g.ints(1))
        square = self.squared(p)
        power = g.op("ReduceSum", square, g.ints(2))
        least = g.op("Mul", g.op("ReduceMax", power, g.ints(3)), number(head.frame_floor))
        counts = g.op("Cast", g.op("Greater", power, least), to=TensorProto.FLOAT)
        total = g.op("Max", g.op("ReduceSum", counts, g.ints(3)), number(1.0))
        weights = g.reshape(g.op("Div", counts, total), -1, 1, self.frames, 1)
        loudest = g.op("ReduceMax", p, g.ints(2, 3))
        floor = g.op("Add", g.op("Mul", loudest, number(head.floor)), number(1e-12))
        level = g.op("Mul", g.op("Log", g.op("Add", p, floor)), number(20 / math.log(10)))
        smooth = self.pad(level, texture.BOX // 2, texture.BOX // 2, "reflect")
        smooth = self.pool(self.pool(smooth, 1, texture.BOX), texture.BOX, 1)
        grain = g.op("Sub", level, smooth)

        matrix, place = np.zeros((self.bins, self.bands)), np.full(self.bins, self.bands)
        for band, (a, b) in enumerate(itertools.pairwise(self.rows)):
            matrix[a:b, band] = 1 / (b - a)
            place[a:b] = band
        to_bands = g.constant(matrix)
        by_band = g.op("Transpose", to_bands, perm=[1, 0])
        grains = self.grains(grain, weights, to_bands, place)
        peaks = self.pad(self.peaks(level, weights), 8, 0, "constant")
        kinds = self.kinds(g.op("Concat", grains, peaks, axis=1), to_bands)
        power = g.op("MatMul", by_band, square)
        ends = [kinds, *self.envelopes(power, loudest, weights)]
        return g.op("Concat", *(g.op("Flatten", end) for end in ends), axis=1)

    def grains(self, grain: str, weights: str, to_bands: str, place: np.ndarray) -> str:
        """Power of the grain about its band's mean, and its products with its neighbours."""
        g, bins = self.g, self.bins
        # Bins along the last axis: a product with one column is what TensorRT for RTX 1.7 fails on.
        mean = g.op("MatMul", g.reshape(self.over(weights, grain), -1, 1, 1, bins), to_bands)
        mean = g.op("Pad", mean, g.ints(0, 0, 0, 0, 0, 0, 0, 1))  # 0: bins outside every band
        mean = g.op("Gather", mean, g.constant(place, np.int64), axis=3)
        z = g.op("Sub", grain, g.reshape(mean, -1, 1, bins, 1))
        padded = self.pad(z, 8, 8, "constant")
        size = bins, self.frames
        others = (self.part(padded, 8 - df, 8 - dt, size) for df, dt in self.head.lags)
        return self.over(weights, self.squared(z), *(g.op("Mul", z, other) for other in others))

    def peaks(self, level: str, weights: str) -> str:
        """How many peaks there are, and their flanks and changes.

        Peaks are looked for within 8 bins and a frame of the rim, so that no neighbour is outside.
        """
        from onnx import TensorProto

        g, number = self.g, self.g.constant

        @functools.cache
        def at(f: int, t: int = 0) -> str:
            return self.part(level, 8 + f, 1 + t, (self.bins - 16, self.frames - 2))

        side, centre, before, after = texture.PEAK_SIDE, at(0), at(0, -1), at(0, 1)
        around = g.op("Add", g.op("Max", at(-side), at(side)), number(texture.PEAK_DB))
        top = g.op("GreaterOrEqual", centre, g.op("Max", at(-1), at(1)))
        top = g.op("And", top, g.op("Greater", centre, around))
        peak = g.op("Cast", top, to=TensorProto.FLOAT)
        twice = g.op("Add", centre, centre)  # falls stay doubled until they are means
        tops = g.op("Where", top, twice, number(-1e30))  # from elsewhere nothing falls
        bounds = number(0.0), number(2 * texture.SHAPE_DB)
        flanks = (g.op("Add", at(-q), at(q)) for q in texture.SHAPE)
        falls = [g.op("Clip", g.op("Sub", tops, flank), *bounds) for flank in flanks]
        bend = g.op("Sub", g.op("Add", before, after), twice)
        changes = [g.op("Mul", g.op("Abs", x), peak) for x in (bend, g.op("Sub", before, after))]
        bounded = [g.op("Min", x, number(texture.WAVER_DB)) for x in changes]
        inner = g.cut(weights, 2, 1, self.frames - 1)
        return self.over(inner, peak, *falls, *map(self.squared, falls), *changes, *bounded)

    def kinds(self, x: str, to_bands: str) -> str:
        """Sums of grains and peaks over bins -> the statistics of each kind and band."""
        g, number, flanks = self.g, self.g.constant, len(texture.SHAPE)
        sizes = [1, len(self.head.lags), 1, flanks, flanks, 2, 2]
        x = g.op("MatMul", g.reshape(x, -1, sum(sizes), self.bins), to_bands)
        kinds = g.ops("Split", x, g.ints(*sizes), outputs=len(sizes), axis=1)
        variance = g.op("Add", kinds[0], number(0.05))
        count = g.op("Add", kinds[2], number(3 / (np.diff(self.rows) * self.frames)))
        fall, fall2, change, bound = (g.op("Div", x, count) for x in kinds[3:])
        square = g.op("Sub", fall2, self.squared(fall))
        spread = g.op("Sqrt", g.op("Max", square, number(0.0)))
        kinds = [
            g.op("Log", variance),
            g.op("Div", kinds[1], variance),
            g.op("Log", count),
            g.op("Div", fall, number(10.0)),
            g.op("Div", spread, number(10.0)),
            g.op("Log", g.op("Add", change, number(0.1))),
            bound,
        ]
        # Mean and deviation of a flank stand together, and so do the two means of a change.
        starts = np.cumsum([0, *sizes])
        ends = starts[[3, 5]], starts[[5, 7]]
        pairs = (np.arange(a, b).reshape(2, -1).T.ravel() for a, b in ends)
        order = np.concatenate([np.arange(starts[3]), *pairs])
        return g.op("Gather", g.op("Concat", *kinds, axis=1), g.constant(order, np.int64), axis=1)

    def envelopes(self, power: str, loudest: str, weights: str) -> list[str]:
        """How the levels of neighbouring bands go together, and their deviation."""
        g, number, bands = self.g, self.g.constant, self.bands
        least = g.op("Add", g.op("Mul", self.squared(loudest), number(1e-10)), number(1e-20))
        level = g.op("Mul", g.op("Log", g.op("Add", power, least)), number(10 / math.log(10)))
        smooth = self.pad(level, 0, texture.ENVELOPE // 2, "reflect")
        level = g.op("Sub", level, self.pool(smooth, 1, texture.ENVELOPE))
        level = g.op("Sub", level, self.over(weights, level))
        square = self.over(weights, self.squared(level))
        spread = g.op("Sqrt", g.op("Add", square, number(1e-6)))
        level = g.op("Div", level, spread)
        ends = []
        for step in (1, 2):
            low, high = g.cut(level, 2, 0, bands - step), g.cut(level, 2, step, bands)
            ends.append(self.over(weights, g.op("Mul", low, high)))
        return [*ends, g.op("Log", g.op("Add", spread, number(0.1)))]

    def part(self, x: str, f: int, t: int, size: tuple[int, int]) -> str:
        """So many bins and frames, from (f, t) on."""
        ends = self.g.ints(f + size[0], t + size[1])
        return self.g.op("Slice", x, self.g.ints(f, t), ends, self.g.ints(2, 3))

    def pad(self, x: str, f: int, t: int, mode: str) -> str:
        """Bins and frames added at both ends."""
        return self.g.op("Pad", x, self.g.ints(0, 0, f, t, 0, 0, f, t), mode=mode)

    def pool(self, x: str, f: int, t: int) -> str:
        """Means over windows of f bins and t frames."""
        return self.g.op("AveragePool", x, kernel_shape=[f, t])

    def over(self, weights: str, *values: str) -> str:
        """Means over frames: [B, 1, bins, frames] each -> [B, number of values, bins, 1]."""
        return self.g.op("Concat", *(self.g.op("MatMul", x, weights) for x in values), axis=1)

    def squared(self, x: str) -> str:
        """Its square, as a product."""
        return self.g.op("Mul", x, x)
