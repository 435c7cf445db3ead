"""Weights as ONNX: a lean graph of our own, or the tuned values in the original graph.

The lean graph is NCHW, opset 18, without functions, strongly typed, with a dynamic batch axis, and
made of operators that onnxruntime and TensorRT (10 and later, TensorRT-RTX) parse. Three things
keep it small and fast:

- The spectrum is a two-stage DFT of constant matrix products, window and twiddle factors inside
  (`_magnitude`), 0.4 MB. Measured in onnxruntime on two cores at 2048 / 512, milliseconds per
  segment: 19; the STFT operator 49; two DFT convolutions 51 and 16.8 MB; one matrix product 39;
  one of the symmetric halves 39 and 8.4 MB. All lie within 1e-4 of the float64 truth at magnitudes
  of several hundred. TensorRT must build it without TF32, which would round the products.
- A median is the min/max program of `kernels` over strided planes, without a shifted copy
  (`_median`): 15 ms along frequency and 21 along time, the TopK of 31 stacked slices 710 each.
- Batch norms of presets are folded into their convolutions.

A texture head takes a spectrum for each of its resolutions; of `edge` it makes half of the time, 55
of 110 ms per segment on one thread. Its means over frames are products with the column of their
weights, its local means poolings.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from artifactnet_jax import __version__, texture
from artifactnet_jax import config as cfg
from artifactnet_jax.files import replace_file
from artifactnet_jax.filterbank import hann, mel_filterbank
from artifactnet_jax.forward import STAGES
from artifactnet_jax.kernels.median import median_program
from artifactnet_jax.layers import (
    INPUT,
    PRODUCTS,
    Layer,
    shapes,
)
from artifactnet_jax.operators import sampling
from artifactnet_jax.passes import folded
from artifactnet_jax.weights import Weights

if TYPE_CHECKING:
    from onnx import ModelProto

Form = Literal["segment", "song", "network"]
Precision = Literal["fp32", "fp16"]

OPSET = 18
IR_VERSION = 8  # of that opset: read by every onnxruntime and TensorRT in question

# In float16 these overflow, or lose what matters, within the range of their inputs.
_SINGLE = frozenset(
    ("group_norm", "mean", "sum", "softmax", "softplus", "mish", "gelu", "elu", "celu", "selu")
) | {"exp", "log", "sqrt", "reciprocal", "div", "pow"}


def export(
    weights: Weights,
    path: str | os.PathLike[str],
    *,
    form: Form = "segment",
    precision: Precision = "fp32",
    template: str | os.PathLike[str] | None = None,
) -> None:
    """Write weights as an ONNX file, atomically: see `build_onnx`, or `fill_template`.

    Raises ValueError for what these raise, and for a form or precision beside a template; OSError
    where the file cannot be written.
    """
    if template is None:
        replace_file(path, build_onnx(weights, form=form, precision=precision).SerializeToString())
        return
    if (form, precision) != ("segment", "fp32"):
        raise ValueError("a template keeps its own form and precision: leave both out")
    from artifactnet_jax.convert.template import fill_template

    fill_template(weights, template, path)


def build_onnx(
    weights: Weights,
    *,
    form: Form = "segment",
    precision: Precision = "fp32",
    stages: bool = False,
) -> ModelProto:
    """The lean graph of any weights.

    "segment": `audio` float32 [batch, segment_samples] -> `p_ai` float32 [batch]. "song":
    `audio_chunks` float32 [chunks, segment_samples] of ONE song -> `p_ai` float64 [1], the
    aggregation of `config.verdict` taken in float64 (which TensorRT does not have), the top-dB
    maximum over all chunks where `front_end.joint` says so. "network": `audio` -> the CNN's `logit`
    float32 [batch], a texture head left out, for a caller that computes it by other means.

    "fp16" computes the convolutions and linear layers in float16, with float16 weights, except
    those that read a network's own input, whose range float16 does not hold; front end, texture
    head, norms, reductions, exponentials and the last sigmoid stay float32. `stages` adds the
    outputs `STAGES`, each with the batch axis first; "views" in dB before the clamp.

    Raises ValueError: an unknown form or precision; weights that are a foreign graph; layers that
    cannot be (naming the layer); a weight beyond float16's range.
    """
    if weights.graph is not None:
        raise ValueError(
            f"weights {weights.name!r} are a graph whose networks were not recognised: name its "
            "ONNX file as template"
        )
    if weights.file is not None:
        raise ValueError(f"{weights.file} has no tensors to export: name the weights file")
    if form not in ("segment", "song", "network"):
        raise ValueError(f"unknown form {form!r}: use 'segment', 'song' or 'network'")
    if precision not in ("fp32", "fp16"):
        raise ValueError(f"unknown precision {precision!r}: use 'fp32' or 'fp16'")
    import onnx
    from onnx import helper

    config, fe = weights.config, weights.config.front_end
    parts, tensors = folded(config, weights.tensors)
    batch, source = ("chunks", "audio_chunks") if form == "song" else ("batch", "audio")
    plane, map_shape = (fe.n_bins, fe.n_frames), (len(fe.channels), fe.n_mels, fe.n_frames)
    half = precision == "fp16"

    g = _Graph()
    with g.scope("stft"):
        magnitude = _magnitude(g, source, fe, _window(weights), "stft")
    with g.scope("unet"):
        x = g.op("Unsqueeze", magnitude, g.ints(1))
        mask = _network(g, parts["unet"], tensors, "unet", x, (1, *plane), half)
        mask = g.reshape(mask, -1, *plane)
    residual = g.op("Mul", mask, magnitude)
    with g.scope("hpss"):
        harmonic, percussive = _hpss(g, residual, fe)
    with g.scope("mel"):
        views = _views(g, (residual, harmonic, percussive), fe, _mel(weights))
    with g.scope("channels"):
        channels = _channels(g, views, fe, form)
    with g.scope("cnn"):
        logit = _network(g, parts["cnn"], tensors, "cnn", channels, map_shape, half)
        logit = g.reshape(logit, -1)
    if config.texture is not None and form != "network":
        with g.scope("texture"):
            logit = g.op("Add", logit, _texture(g, source, magnitude, config, tensors))
    if form == "network":
        g.op("Identity", logit, name="logit")
        score = helper.make_tensor_value_info("logit", onnx.TensorProto.FLOAT, [batch])
    elif form == "segment":
        g.op("Sigmoid", logit, name="p_ai")
        score = helper.make_tensor_value_info("p_ai", onnx.TensorProto.FLOAT, [batch])
    else:
        with g.scope("song"):
            _aggregate(g, source, g.op("Sigmoid", logit), config.verdict)
        score = helper.make_tensor_value_info("p_ai", onnx.TensorProto.DOUBLE, [1])
    outputs = [score]
    if stages:
        maps = (fe.n_mels, fe.n_frames)
        values = (magnitude, mask, residual, harmonic, percussive, views, channels, logit)
        sizes = (*5 * (plane,), (3, *maps), map_shape, ())
        for stage, value, size in zip(STAGES, values, sizes, strict=True):
            g.op("Identity", value, name=stage)
            stage_shape: list[str | int | None] = [batch, *size]
            outputs.append(
                helper.make_tensor_value_info(stage, onnx.TensorProto.FLOAT, stage_shape)
            )

    audio = helper.make_tensor_value_info(
        source, onnx.TensorProto.FLOAT, [batch, fe.segment_samples]
    )
    model = helper.make_model(
        helper.make_graph(g.nodes, "artifactnet", [audio], outputs, g.initialisers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="artifactnet-jax",
        producer_version=__version__,
        doc_string=f"P(AI) of a {form} of {fe.sample_rate} Hz mono music, {precision}",
    )
    helper.set_model_props(
        model,
        {
            "licence": weights.licence,
            "weights": weights.name,
            "weights_sha256": weights.sha256,
            "source_sha256": str(weights.provenance.get("source_sha256", "")),
            "config_sha256": config.digest(),
            "artifactnet_jax.config": json.dumps(config.to_dict(), sort_keys=True),
            "form": form,
            "precision": precision,
        },
    )
    return model


class _Graph:
    """Nodes and initialisers in the making; values go by name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initialisers: list[Any] = []
        self._scope = ""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix of the names of what is made inside."""
        before, self._scope = self._scope, f"{self._scope}{name}/"
        yield
        self._scope = before

    def ops(self, kind: str, *inputs: str, outputs: int, name: str = "", **attributes: Any):
        """Append a node; the names of its outputs."""
        from onnx import helper

        self._count += 1
        name = name or f"{self._scope}{kind.lower()}.{self._count}"
        names = [name] if outputs == 1 else [f"{name}.{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **attributes))
        return names

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node of one output; its name."""
        return self.ops(kind, *inputs, outputs=1, name=name, **attributes)[0]

    def constant(self, value: Any, dtype: Any = np.float32, name: str = "") -> str:
        """Name of an initialiser; equal ones are stored once, unless they have their own name."""
        from onnx import numpy_helper

        array = np.ascontiguousarray(value, dtype).reshape(np.shape(value))
        key = (array.dtype.str, array.shape, array.tobytes())
        if not name and key in self._constants:
            return self._constants[key]
        if not name:
            name = self._constants[key] = f"constant.{len(self._constants)}"
        self.initialisers.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.ints(*shape))

    def cut(self, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        """x[start:stop:step] along one axis."""
        ints = (self.ints(value) for value in (start, stop, axis, step))
        return self.op("Slice", x, *ints)

    def power(self, x: str, exponent: float) -> str:
        if exponent == 1:
            return x
        return self.op("Mul", x, x) if exponent == 2 else self.op("Pow", x, self.constant(exponent))


def _window(weights: Weights) -> np.ndarray:
    fe = weights.config.front_end
    given = weights.tensors["front_end.window"] if fe.window == "given" else hann(fe.n_fft)
    return np.asarray(given, np.float64)


def _mel(weights: Weights) -> np.ndarray:
    fe = weights.config.front_end
    return weights.tensors["front_end.mel"] if fe.mel_scale == "given" else mel_filterbank(fe)


def _magnitude(g: _Graph, audio: str, fe: cfg.FrontEnd, window: np.ndarray, name: str) -> str:
    """Audio [B, segment_samples] -> magnitude [B, n_bins, n_frames], a DFT in two stages.

    With n = cols * r + c and k = p + rows * q, bin k is the sum over c of exp(-2 pi i c q / cols)
    times exp(-2 pi i c p / n_fft) times the DFT over r of column c. The signal is real, so p up to
    rows / 2 gives every bin, or the bin that mirrors it, which has the same magnitude.
    """
    n, hop, frames = fe.n_fft, fe.hop, fe.n_frames
    x = audio
    if fe.stft_pad:
        pads = g.ints(0, fe.stft_pad, 0, fe.stft_pad)
        x = g.op("Pad", x, pads, mode=fe.stft_edge)
    # A frame is a row of blocks, as short as hop and window need, so that a gather copies blocks.
    block = math.gcd(n, hop)
    length = fe.segment_samples + 2 * fe.stft_pad
    if length % block:
        x = g.cut(x, 1, 0, length // block * block)
    x = g.reshape(x, -1, length // block, block)
    blocks = np.arange(frames)[:, None] * (hop // block) + np.arange(n // block)
    x = g.op("Gather", x, g.constant(blocks, np.int64), axis=1)

    def cost(rows: int) -> float:
        """Size of the constants, and a share of the multiplications of a frame."""
        first, second, kept = 2 * n * (rows // 2 + 1), (n // rows) ** 2 * 4, rows // 2 + 1
        return first + second + (first + kept * second) / 4

    rows = min((d for d in range(1, n + 1) if n % d == 0), key=cost)
    cols, kept = n // rows, rows // 2 + 1
    r, p, c = np.arange(rows), np.arange(kept), np.arange(cols)
    x = g.reshape(x, -1, frames, rows, cols)
    x = g.op("Transpose", x, perm=[0, 3, 1, 2])
    # [cols, rows, kept, 2]: exact integers before the angle, so that it is exact for any n.
    angle = 2 * np.pi / n * ((cols * np.outer(r, p)[None] + np.outer(c, p)[:, None]) % n)
    first = (
        np.stack([np.cos(angle), -np.sin(angle)], -1)
        * window.reshape(rows, cols).T[..., None, None]
    )
    x = g.op("MatMul", x, g.constant(first.reshape(cols, rows, 2 * kept), name=f"{name}.first"))
    x = g.reshape(x, -1, cols, frames, kept, 2)
    x = g.op("Transpose", x, perm=[0, 3, 2, 1, 4])
    x = g.reshape(x, -1, kept, frames, 2 * cols)
    angle = 2 * np.pi / cols * (np.outer(c, c) % cols)
    cos, sin = np.cos(angle), np.sin(angle)
    second = np.stack([np.stack([cos, -sin], 1), np.stack([sin, cos], 1)], 1)  # [c, in, out, q]
    x = g.op("MatMul", x, g.constant(second.reshape(2 * cols, 2 * cols), name=f"{name}.second"))
    real, imaginary = g.ops("Split", x, outputs=2, axis=3, num_outputs=2)
    x = g.op("Add", g.op("Mul", real, real), g.op("Mul", imaginary, imaginary))
    x = g.op("Transpose", x, perm=[0, 1, 3, 2])
    x = g.reshape(x, -1, kept * cols, frames)
    k = np.arange(fe.n_bins)
    k = np.where(k % rows < kept, k, n - k)
    x = g.op("Gather", x, g.constant(k % rows * cols + k // rows, np.int64), axis=1)
    if fe.spectrum_eps:
        x = g.op("Add", x, g.constant(fe.spectrum_eps))
    if fe.spectrum_power != 2:
        x = g.power(g.op("Sqrt", x), fe.spectrum_power)
    scale = fe.spectrum_scale**fe.spectrum_power
    return x if scale == 1 else g.op("Mul", x, g.constant(scale))


def _texture(
    g: _Graph, audio: str, magnitude: str, config: cfg.Config, tensors: Mapping[str, np.ndarray]
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
                plain = _magnitude(g, audio, fe, hann(n_fft), f"texture.{n_fft}.{hop}")
            parts.append(_statistics(g, plain, fe, head))

    def tensor(name: str) -> str:
        return g.constant(tensors[f"texture.{name}"], name=f"texture.{name}")

    x = g.op("Sub", g.op("Concat", *parts, axis=1), tensor("mean"))
    limits = g.constant(-head.limit), g.constant(head.limit)
    x = g.op("Clip", g.op("Div", x, tensor("spread")), *limits)
    for name in (f"hidden.{level}" for level in range(len(head.hidden))):
        x = g.op("Relu", g.op("Gemm", x, tensor(f"{name}.kernel"), tensor(f"{name}.bias")))
    return g.reshape(g.op("Gemm", x, tensor("out.kernel"), tensor("out.bias")), -1)


def _statistics(g: _Graph, magnitude: str, fe: cfg.FrontEnd, head: cfg.Texture) -> str:
    """`texture.statistics` of one resolution: [B, n_bins, n_frames] -> [B, K].

    Everything is [B, 1, bins, frames] until the means over frames are taken. Those of all kinds
    then lie side by side, [B, kinds, bins], and one product takes the means over bands.
    """
    from onnx import TensorProto

    rows = texture.band_rows(head, fe.n_fft, fe.sample_rate)
    bins, frames = min(int(rows[-1]) + texture.MARGIN, fe.n_bins), fe.n_frames
    bands, number = len(rows) - 1, g.constant

    def part(x: str, f: int, t: int, size: tuple[int, int]) -> str:
        ends = g.ints(f + size[0], t + size[1])
        return g.op("Slice", x, g.ints(f, t), ends, g.ints(2, 3))

    def pad(x: str, f: int, t: int, mode: str) -> str:
        return g.op("Pad", x, g.ints(0, 0, f, t, 0, 0, f, t), mode=mode)

    def pool(x: str, f: int, t: int) -> str:
        return g.op("AveragePool", x, kernel_shape=[f, t])

    def over(weights: str, *values: str) -> str:
        """Means over frames: [B, 1, bins, frames] each -> [B, number of values, bins, 1]."""
        return g.op("Concat", *(g.op("MatMul", x, weights) for x in values), axis=1)

    def squared(x: str) -> str:
        return g.op("Mul", x, x)

    p = g.op("Unsqueeze", g.cut(magnitude, 1, 0, bins), g.ints(1))
    square = squared(p)
    power = g.op("ReduceSum", square, g.ints(2))
    least = g.op("Mul", g.op("ReduceMax", power, g.ints(3)), number(head.frame_floor))
    counts = g.op("Cast", g.op("Greater", power, least), to=TensorProto.FLOAT)
    total = g.op("Max", g.op("ReduceSum", counts, g.ints(3)), number(1.0))
    weights = g.reshape(g.op("Div", counts, total), -1, 1, frames, 1)
    loudest = g.op("ReduceMax", p, g.ints(2, 3))
    floor = g.op("Add", g.op("Mul", loudest, number(head.floor)), number(1e-12))
    level = g.op("Mul", g.op("Log", g.op("Add", p, floor)), number(20 / math.log(10)))
    smooth = pad(level, texture.BOX // 2, texture.BOX // 2, "reflect")
    grain = g.op("Sub", level, pool(pool(smooth, 1, texture.BOX), texture.BOX, 1))

    matrix, place = np.zeros((bins, bands)), np.full(bins, bands)
    for band, (a, b) in enumerate(itertools.pairwise(rows)):
        matrix[a:b, band] = 1 / (b - a)
        place[a:b] = band
    to_bands = g.constant(matrix)
    by_band = g.op("Transpose", to_bands, perm=[1, 0])
    # Bins along the last axis: a product with one column is what TensorRT for RTX 1.7 fails on.
    mean = g.op("MatMul", g.reshape(over(weights, grain), -1, 1, 1, bins), to_bands)
    mean = g.op("Pad", mean, g.ints(0, 0, 0, 0, 0, 0, 0, 1))  # 0: of the bins outside every band
    mean = g.op("Gather", mean, g.constant(place, np.int64), axis=3)
    z = g.op("Sub", grain, g.reshape(mean, -1, 1, bins, 1))
    padded = pad(z, 8, 8, "constant")
    others = (part(padded, 8 - df, 8 - dt, (bins, frames)) for df, dt in head.lags)
    grains = over(weights, squared(z), *(g.op("Mul", z, other) for other in others))

    # Peaks are looked for within 8 bins and a frame of the rim, so that no neighbour is outside.
    @functools.cache
    def at(f: int, t: int = 0) -> str:
        return part(level, 8 + f, 1 + t, (bins - 16, frames - 2))

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
    inner = g.cut(weights, 2, 1, frames - 1)
    peaks = over(inner, peak, *falls, *map(squared, falls), *changes, *bounded)

    x = g.op("Concat", grains, pad(peaks, 8, 0, "constant"), axis=1)
    sizes = [1, len(head.lags), 1, len(falls), len(falls), 2, 2]
    x = g.op("MatMul", g.reshape(x, -1, sum(sizes), bins), to_bands)
    kinds = g.ops("Split", x, g.ints(*sizes), outputs=len(sizes), axis=1)
    variance = g.op("Add", kinds[0], number(0.05))
    share = g.op("Add", kinds[2], number(3 / (np.diff(rows) * frames)))
    fall, fall2, change, bound = (g.op("Div", x, share) for x in kinds[3:])
    spread = g.op("Sqrt", g.op("Max", g.op("Sub", fall2, squared(fall)), number(0.0)))
    kinds = [
        g.op("Log", variance),
        g.op("Div", kinds[1], variance),
        g.op("Log", share),
        g.op("Div", fall, number(10.0)),
        g.op("Div", spread, number(10.0)),
        g.op("Log", g.op("Add", change, number(0.1))),
        bound,
    ]
    # Mean and spread of a flank stand together, and so do the two means of a change.
    starts = np.cumsum([0, *sizes])
    pairs = (np.arange(a, b).reshape(2, -1).T.ravel() for a, b in (starts[[3, 5]], starts[[5, 7]]))
    order = np.concatenate([np.arange(starts[3]), *pairs])
    x = g.op("Gather", g.op("Concat", *kinds, axis=1), g.constant(order, np.int64), axis=1)

    power = g.op("MatMul", by_band, square)
    least = g.op("Add", g.op("Mul", squared(loudest), number(1e-10)), number(1e-20))
    level = g.op("Mul", g.op("Log", g.op("Add", power, least)), number(10 / math.log(10)))
    smooth = pad(level, 0, texture.ENVELOPE // 2, "reflect")
    level = g.op("Sub", level, pool(smooth, 1, texture.ENVELOPE))
    level = g.op("Sub", level, over(weights, level))
    spread = g.op("Sqrt", g.op("Add", over(weights, squared(level)), number(1e-6)))
    level = g.op("Div", level, spread)
    ends = [x]
    for step in (1, 2):
        low, high = g.cut(level, 2, 0, bands - step), g.cut(level, 2, step, bands)
        ends.append(over(weights, g.op("Mul", low, high)))
    ends.append(g.op("Log", g.op("Add", spread, number(0.1))))
    return g.op("Concat", *(g.op("Flatten", end) for end in ends), axis=1)


def _median(g: _Graph, x: str, n: int, size: int, edge: str) -> str:
    """Running median of an odd window along axis 1: [B, n, m] -> [B, n, m].

    The program of `kernels.median` with every row's own samples as planes, so that no plane is
    read with a shift: that takes a quarter more steps than the program has, but not one Slice.
    """
    if size == 1:
        return x
    tile = 1 << ((size + 1) // 2).bit_length() - 1
    program = median_program(size, tile)
    padded = np.pad(np.arange(n), size // 2, mode="edge" if edge == "constant" else edge)  # type: ignore[call-overload]
    if edge == "constant":
        padded[: size // 2] = padded[n + size // 2 :] = n
        x = g.op("Pad", x, g.ints(0, 0, 0, 0, 1, 0))
    rows = -(-n // tile)
    samples = np.arange(tile + size - 1)[:, None] + tile * np.arange(rows)
    samples = padded[np.minimum(samples, len(padded) - 1)]
    x = g.op("Gather", x, g.constant(samples, np.int64), axis=1)
    planes = g.ops("Split", x, outputs=len(samples), axis=1, num_outputs=len(samples))
    known: dict[tuple[int, int], str] = {}

    def value(plane: int, shift: int) -> str:
        if plane < tile:
            return planes[plane + tile * shift]
        if (plane, shift) not in known:
            kind, a, b, further = program.steps[plane - tile]
            inputs = value(a, shift), value(b, shift + further)
            known[plane, shift] = g.op(kind.capitalize(), *inputs)
        return known[plane, shift]

    x = g.op("Concat", *(value(*output) for output in program.outputs), axis=1)
    x = g.op("Transpose", x, perm=[0, 2, 1, 3])
    x = g.op("Reshape", x, g.ints(0, rows * tile, -1))
    return x if rows * tile == n else g.cut(x, 1, 0, n)


def _hpss(g: _Graph, residual: str, fe: cfg.FrontEnd) -> tuple[str, str]:
    """Residual [B, F, T] -> its harmonic and its percussive part, 0 where both medians are 0."""
    turned = g.op("Transpose", residual, perm=[0, 2, 1])
    h = _median(g, turned, fe.n_frames, fe.hpss_width, fe.hpss_edge)
    h = g.power(g.op("Transpose", h, perm=[0, 2, 1]), fe.hpss_power)
    p = _median(g, residual, fe.n_bins, fe.percussive_width, fe.hpss_edge)
    p = g.power(p, fe.hpss_power)
    total = g.op("Add", h, p)
    if fe.hpss_eps:
        total = g.op("Add", total, g.constant(fe.hpss_eps))
    zero, some = g.constant(0.0), g.op("Greater", total, g.constant(0.0))
    total = g.op("Where", some, total, g.constant(1.0))
    shares = (g.op("Where", some, g.op("Div", part, total), zero) for part in (h, p))
    harmonic, percussive = (g.op("Mul", residual, share) for share in shares)
    return harmonic, percussive


def _views(g: _Graph, parts: Sequence[str], fe: cfg.FrontEnd, mel: np.ndarray) -> str:
    """Residual and its parts [B, F, T] -> dB of their mel bands [B, 3, n_mels, T], unclamped."""
    x = g.op("Concat", *(g.op("Unsqueeze", part, g.ints(1)) for part in parts), axis=1)
    x = g.op("MatMul", g.constant(mel, name="mel"), g.power(x, fe.mel_power))
    x = g.op("Max" if fe.amin_rule == "max" else "Add", x, g.constant(fe.amin))
    return g.op("Mul", g.op("Log", x), g.constant(fe.db_factor / math.log(10)))


def _channels(g: _Graph, views: str, fe: cfg.FrontEnd, form: Form) -> str:
    """Views [B, 3, n_mels, T] -> channels [B, len(channels), n_mels, T], clamped at top_db."""
    if fe.top_db is not None:
        axes = [2, 3] if fe.joint.endswith("view") else [1, 2, 3]
        if form == "song" and fe.joint.startswith("song"):
            axes = [0, *axes]
        loudest = g.op("ReduceMax", views, g.ints(*axes), keepdims=1)
        views = g.op("Max", views, g.op("Sub", loudest, g.constant(fe.top_db)))
    known = dict(
        zip(
            ("mel_res", "mel_H", "mel_P"),
            g.ops("Split", views, outputs=3, axis=1, num_outputs=3),
            strict=True,
        )
    )

    def delta(x: str) -> str:
        steps = g.op("Sub", g.cut(x, 3, 1, fe.n_frames), g.cut(x, 3, 0, fe.n_frames - 1))
        return g.op("Pad", steps, g.ints(0, 0, 0, 1, 0, 0, 0, 0))

    def channel(name: str) -> str:
        if name not in known:
            if name == "ratio":
                known[name] = g.op("Sub", known["mel_H"], known["mel_P"])
            elif name == "flux":
                known[name] = g.op("Abs", channel("delta"))
            else:
                known[name] = delta(channel("delta" if name == "delta2" else "mel_res"))
        return known[name]

    return g.op("Concat", *map(channel, fe.channels), axis=1)


def _aggregate(g: _Graph, audio: str, scores: str, verdict: cfg.Verdict) -> None:
    """Scores of a song's chunks -> the output `p_ai` float64 [1]."""
    from onnx import TensorProto

    p = g.op("Cast", scores, to=TensorProto.DOUBLE)
    first = g.ints(0)
    if verdict.aggregate == "rms":
        energy = g.op("ReduceMean", g.op("Mul", audio, audio), g.ints(1), keepdims=0)
        rms = g.op("Cast", g.op("Sqrt", energy), to=TensorProto.DOUBLE)
        total = g.op("ReduceSum", rms, first, keepdims=1)
        total = g.op("Add", total, g.constant([verdict.rms_eps], np.float64))
        p = g.op("ReduceSum", g.op("Mul", p, g.op("Div", rms, total)), first, keepdims=1)
    elif verdict.aggregate == "mean":
        p = g.op("ReduceMean", p, first, keepdims=1)
    else:
        n, two = g.op("Shape", p), g.ints(2)
        ordered, _ = g.ops("TopK", p, n, outputs=2, largest=0)
        lower = g.op("Gather", ordered, g.op("Div", g.op("Sub", n, g.ints(1)), two))
        upper = g.op("Gather", ordered, g.op("Div", n, two))
        p = g.op("Mul", g.op("Add", lower, upper), g.constant([0.5], np.float64))
    # Rounding may leave [0, 1].
    g.op("Clip", p, g.constant(0.0, np.float64), g.constant(1.0, np.float64), name="p_ai")


def _network(
    g: _Graph,
    layers: Sequence[Layer],
    tensors: Mapping[str, np.ndarray],
    prefix: str,
    x: str,
    shape: tuple[int, ...],
    half: bool,
) -> str:
    """Layers on a map [B, *shape] float32 -> their output, float32; `half` as in "fp16"."""
    from onnx import TensorProto

    sizes = shapes(layers, shape)
    last = max((k for k, layer in enumerate(layers) if layer.op in PRODUCTS), default=-1)
    values: dict[str, dict[Any, str]] = {
        INPUT: {np.float32: x}
    }  # name -> dtype -> value; the first one is what was computed
    raw = {INPUT}  # float32 from the input on, through no product

    def cast(name: str, dtype: Any) -> str:
        kinds = values[name]
        if dtype not in kinds:
            to = TensorProto.FLOAT if dtype == np.float32 else TensorProto.FLOAT16
            kinds[dtype] = g.op("Cast", next(iter(kinds.values())), to=to)
        return kinds[dtype]

    for k, layer in enumerate(layers):
        dtype: Any = np.float32
        if half and k <= last and layer.op not in _SINGLE and not raw.issuperset(layer.inputs):
            computed = [next(iter(values[name])) for name in layer.inputs]
            if layer.op in PRODUCTS or np.float16 in computed:
                dtype = np.float16
        if layer.op not in PRODUCTS and raw.issuperset(layer.inputs):
            raw.add(layer.name)
        own = {leaf: tensors[f"{prefix}.{layer.name}.{leaf}"] for leaf, _ in layer.tensors}
        if dtype == np.float16:
            for leaf, tensor in own.items():
                if np.abs(tensor).max(initial=0) > np.finfo(np.float16).max:
                    raise ValueError(
                        f"tensor {prefix}.{layer.name}.{leaf} leaves the range of float16: "
                        "export with precision 'fp32'"
                    )
        inputs = [cast(name, dtype) for name in layer.inputs]
        with g.scope(layer.name):
            emit = _Emitter(g, layer, own, sizes, dtype, f"{prefix}.{layer.name}")
            values[layer.name] = {dtype: emit(inputs)}
    return cast(layers[-1].name, np.float32)


_PLAIN = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "softplus": "Softplus",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "reciprocal": "Reciprocal",
    "abs": "Abs",
    "neg": "Neg",
    "erf": "Erf",
}
_SCALED = {  # with their attributes
    "leaky_relu": ("LeakyRelu", ("alpha",)),
    "elu": ("Elu", ("alpha",)),
    "selu": ("Selu", ("alpha", "gamma")),
    "hard_sigmoid": ("HardSigmoid", ("alpha", "beta")),
}
_BINARY = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "pow": "Pow",
    "maximum": "Max",
    "minimum": "Min",
}
_REDUCE = {"mean": "ReduceMean", "max": "ReduceMax", "sum": "ReduceSum"}


class _Emitter:
    """One layer as nodes, NCHW; operators that TensorRT lacks in terms of those that it has."""

    def __init__(
        self,
        g: _Graph,
        layer: Layer,
        tensors: Mapping[str, np.ndarray],
        sizes: Mapping[str, tuple[int, ...]],
        dtype: Any,
        name: str,
    ):
        self.g, self.attrs, self.op = g, layer.attrs, layer.op
        self.tensors, self.dtype, self.name = tensors, dtype, name
        self.size_in = sizes[layer.inputs[0]]
        self.size = sizes[layer.name]

    def __call__(self, inputs: Sequence[str]) -> str:
        g, op, attrs = self.g, self.op, self.attrs
        if op in _BINARY:
            return self.binary(inputs)
        if op == "concat":
            return g.op("Concat", *inputs, axis=self.axis())
        (x,) = inputs
        if op in _PLAIN:
            return g.op(_PLAIN[op], x)
        if op in _SCALED:
            kind, names = _SCALED[op]
            numbers: dict[str, Any] = {name: float(attrs[name]) for name in names}
            return g.op(kind, x, **numbers)
        if op in _REDUCE:
            # Axis by axis, the last first: a runtime may add up a whole plane one number after
            # another, in float32.
            for axis in sorted(("chw".index(letter) + 1 for letter in attrs["axes"]), reverse=True):
                x = g.op(_REDUCE[op], x, g.ints(axis), keepdims=1)
            return x
        return getattr(self, op)(x)

    def axis(self) -> int:
        return "chw".index(self.attrs["axis"]) + 1

    def number(self, value: float) -> str:
        return self.g.constant(value, self.dtype)

    def tensor(self, leaf: str, perm: tuple[int, ...] | None = None) -> str:
        """A tensor under its own name, its axes permuted."""
        value = self.tensors[leaf]
        value = value if perm is None else value.transpose(perm)
        return self.g.constant(value, self.dtype, f"{self.name}.{leaf}")

    def along_c(self, value: np.ndarray, leaf: str) -> str:
        """A vector [C] as an initialiser that broadcasts over the map."""
        shape = (-1, *(1 for _ in self.size[1:]))
        return self.g.constant(value.reshape(shape), self.dtype, f"{self.name}.{leaf}")

    def bias(self) -> list[str]:
        return [self.tensor("bias")] if "bias" in self.tensors else []

    def pads(self) -> list[int]:
        (top, bottom), (left, right) = self.attrs["padding"]
        return [top, left, bottom, right]

    def binary(self, inputs: Sequence[str]) -> str:
        operands = list(inputs)
        if "value" in self.tensors:
            operands.append(self.tensor("value"))
        elif len(operands) == 1:
            operands.append(self.number(self.attrs["value"]))
        if len(inputs) == 1 and self.attrs.get("reverse"):
            operands.reverse()
        return self.g.op(_BINARY[self.op], *operands)

    def conv(self, x: str) -> str:
        return self.g.op(
            "Conv",
            x,
            self.tensor("kernel", (3, 2, 0, 1)),
            *self.bias(),
            strides=self.attrs["strides"],
            pads=self.pads(),
            dilations=self.attrs["dilations"],
            group=self.attrs["groups"],
        )

    def conv_transpose(self, x: str) -> str:
        return self.g.op(
            "ConvTranspose",
            x,
            self.tensor("kernel", (2, 3, 0, 1)),
            *self.bias(),
            strides=self.attrs["strides"],
            pads=self.pads(),
            output_padding=self.attrs["output_padding"],
        )

    def linear(self, x: str) -> str:
        return self.g.op("Gemm", x, self.tensor("kernel"), *self.bias())

    def batch_norm(self, x: str) -> str:
        wide = {leaf: tensor.astype(np.float64) for leaf, tensor in self.tensors.items()}
        scale = wide["scale"] / np.sqrt(wide["var"] + self.attrs["epsilon"])
        x = self.g.op("Mul", x, self.along_c(scale, "scale"))
        return self.g.op("Add", x, self.along_c(wide["bias"] - wide["mean"] * scale, "bias"))

    def group_norm(self, x: str) -> str:
        g, groups = self.g, self.attrs["groups"]
        if groups == self.size[0] and len(self.size) == 3:
            # Axis by axis, as in `__call__`: onnxruntime's own operator adds up carelessly.
            def mean(y: str) -> str:
                return g.op("ReduceMean", g.op("ReduceMean", y, g.ints(3)), g.ints(2))

            x = g.op("Sub", x, mean(x))
            variance = g.op("Add", mean(g.op("Mul", x, x)), self.number(self.attrs["epsilon"]))
            x = g.op("Div", x, g.op("Sqrt", variance))
        else:
            x = g.reshape(x, -1, groups, math.prod(self.size) // groups)
            one, zero = (g.constant(np.full(groups, value)) for value in (1.0, 0.0))
            x = g.op("InstanceNormalization", x, one, zero, epsilon=float(self.attrs["epsilon"]))
            x = g.reshape(x, -1, *self.size)
        if "scale" in self.tensors:
            x = self.g.op("Mul", x, self.along_c(self.tensors["scale"], "scale"))
        if "bias" in self.tensors:
            x = self.g.op("Add", x, self.along_c(self.tensors["bias"], "bias"))
        return x

    def prelu(self, x: str) -> str:
        return self.g.op("PRelu", x, self.along_c(self.tensors["slope"], "slope"))

    def max_pool(self, x: str) -> str:
        return self.g.op(
            "MaxPool",
            x,
            kernel_shape=self.attrs["kernel"],
            strides=self.attrs["strides"],
            pads=self.pads(),
        )

    def avg_pool(self, x: str) -> str:
        return self.g.op(
            "AveragePool",
            x,
            kernel_shape=self.attrs["kernel"],
            strides=self.attrs["strides"],
            pads=self.pads(),
            count_include_pad=int(self.attrs["count_include_pad"]),
        )

    def resize(self, x: str) -> str:
        g, mode, coordinates = self.g, self.attrs["mode"], self.attrs["coordinates"]
        scales = np.array(self.attrs["scales"], np.float32)
        sizes = list(zip(self.size_in[1:], self.size[1:], strict=True))
        fits = (
            all(  # in float32, in which a runtime multiplies, and in float64, in which another does
                int(np.float32(m) * s) == n == int(m * float(s))
                for (m, n), s in zip(sizes, scales, strict=True)
            )
        )
        if fits and (mode == "linear" or (scales == np.round(scales)).all()):
            more = {"nearest_mode": self.attrs["rounding"]} if mode == "nearest" else {}
            return g.op(
                "Resize",
                x,
                "",
                g.constant([1.0, 1.0, *scales]),
                mode=mode,
                coordinate_transformation_mode=coordinates,
                **more,
            )
        # No scale in float32 says what is wanted: read the very samples instead.
        for axis, ((m, n), scale) in enumerate(zip(sizes, scales, strict=True), start=2):
            if m == n and scale == 1:
                continue
            low, high, share = sampling(m, n, scale, mode, coordinates, self.attrs["rounding"])
            read = g.op("Gather", x, g.constant(low, np.int64), axis=axis)
            if mode == "linear":
                step = g.op("Gather", x, g.constant(high, np.int64), axis=axis)
                share = share.reshape((-1, 1) if axis == 2 else (-1,))
                step = g.op("Mul", g.op("Sub", step, read), g.constant(share, self.dtype))
                read = g.op("Add", read, step)
            x = read
        return x

    def pad(self, x: str) -> str:
        top, left, bottom, right = self.pads()
        pads = self.g.ints(0, 0, top, left, 0, 0, bottom, right)
        value = [self.number(self.attrs["value"])] if self.attrs["mode"] == "constant" else []
        return self.g.op("Pad", x, pads, *value, mode=self.attrs["mode"])

    def slice(self, x: str) -> str:
        attrs = self.attrs
        return self.g.cut(x, self.axis(), attrs["start"], attrs["stop"], attrs["step"])

    def transpose_hw(self, x: str) -> str:
        return self.g.op("Transpose", x, perm=[0, 1, 3, 2])

    def depth_to_space(self, x: str) -> str:
        (c, h, w), rows, cols = self.size_in, self.attrs["rows"], self.attrs["cols"]
        if self.attrs["order"] == "DCR":
            split, perm = (rows, cols, c // (rows * cols)), [0, 3, 4, 1, 5, 2]
        else:
            split, perm = (c // (rows * cols), rows, cols), [0, 1, 4, 2, 5, 3]
        x = self.g.op("Transpose", self.g.reshape(x, -1, *split, h, w), perm=perm)
        return self.g.reshape(x, -1, *self.size)

    def space_to_depth(self, x: str) -> str:
        (c, h, w), rows, cols = self.size_in, self.attrs["rows"], self.attrs["cols"]
        x = self.g.reshape(x, -1, c, h // rows, rows, w // cols, cols)
        perm = [0, 3, 5, 1, 2, 4] if self.attrs["order"] == "DCR" else [0, 1, 3, 5, 2, 4]
        return self.g.reshape(self.g.op("Transpose", x, perm=perm), -1, *self.size)

    def flatten(self, x: str) -> str:
        return self.g.reshape(x, -1, *self.size)

    def softmax(self, x: str) -> str:
        return self.g.op("Softmax", x, axis=self.axis())

    def softsign(self, x: str) -> str:
        return self.g.op("Div", x, self.g.op("Add", self.g.op("Abs", x), self.number(1.0)))

    def hard_swish(self, x: str) -> str:
        return self.g.op("Mul", x, self.g.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))

    def mish(self, x: str) -> str:
        return self.g.op("Mul", x, self.g.op("Tanh", self.g.op("Softplus", x)))

    def celu(self, x: str) -> str:
        alpha = self.number(self.attrs["alpha"])
        return self.g.op("Mul", self.g.op("Elu", self.g.op("Div", x, alpha), alpha=1.0), alpha)

    def gelu(self, x: str) -> str:
        g = self.g
        if self.attrs["approximate"] == "tanh":
            cube = g.op("Mul", g.op("Mul", g.op("Mul", x, x), x), self.number(0.044715))
            inner = g.op("Mul", g.op("Add", x, cube), self.number(math.sqrt(2 / math.pi)))
            gate = g.op("Tanh", inner)
        else:
            gate = g.op("Erf", g.op("Mul", x, self.number(math.sqrt(0.5))))
        gate = g.op("Mul", g.op("Add", gate, self.number(1.0)), self.number(0.5))
        return g.op("Mul", x, gate)

    def clip(self, x: str) -> str:
        low, high = (
            "" if bound is None else self.number(bound)
            for bound in (self.attrs["low"], self.attrs["high"])
        )
        return self.g.op("Clip", x, low, high)
