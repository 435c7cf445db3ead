"""The front end as ONNX nodes: audio -> magnitude, and residual -> the channels of the CNN.

- The spectrum is a two-stage DFT of constant matrix products, window and twiddle factors inside
  (`magnitude`), 0.4 MB. Measured in onnxruntime on two cores at 2048 / 512, milliseconds per
  segment: 19; the STFT operator 49; two DFT convolutions 51 and 16.8 MB; one matrix product 39;
  one of the symmetric halves 39 and 8.4 MB. All lie within 1e-4 of the float64 truth at magnitudes
  of several hundred. TensorRT must build it without TF32, which would round the products.
- A median is the min/max program of `kernels` over strided planes, without a shifted copy
  (`median`): 15 ms along frequency and 21 along time, the TopK of 31 stacked slices 710 each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax.convert.onnx_graph import OnnxGraph
from artifactnet_jax.kernels.median import median_program


def magnitude(g: OnnxGraph, audio: str, fe: cfg.FrontEnd, window: np.ndarray, name: str) -> str:
    """Audio [B, segment_samples] -> magnitude [B, n_bins, n_frames], a DFT in two stages.

    With n = cols * r + c and k = p + rows * q, bin k is the sum over c of exp(-2 pi i c q / cols)
    times exp(-2 pi i c p / n_fft) times the DFT over r of column c. The signal is real, so p up to
    rows / 2 gives every bin, or the bin that mirrors it, which has the same magnitude.
    """
    n, hop, frames = fe.n_fft, fe.hop, fe.n_frames
    x = _levelled(g, audio, fe)
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


def _levelled(g: OnnxGraph, x: str, fe: cfg.FrontEnd) -> str:
    """Audio [B, N] -> the same with its mean taken off, and its level: `forward.levelled`."""
    if not fe.centred and fe.level == "none":
        return x
    axis = g.ints(1)
    if fe.centred:
        x = g.op("Sub", x, g.op("ReduceMean", x, axis))
    if fe.level == "none":
        return x
    peak, eps = fe.level == "peak", g.constant(fe.level_eps)
    level = g.op("ReduceMax", g.op("Abs", x), axis) if peak else ""
    if not peak or fe.level_rule == "root":
        square = g.op("Mul", level, level) if peak else g.op("ReduceMean", g.op("Mul", x, x), axis)
        level = g.op("Sqrt", g.op("Add", square, eps) if fe.level_rule == "root" else square)
    if fe.level_rule != "root":
        level = g.op("Add" if fe.level_rule == "add" else "Max", level, eps)
    silent = g.op("Equal", level, g.constant(0.0))
    return g.op("Div", x, g.op("Where", silent, g.constant(1.0), level))


def median(g: OnnxGraph, x: str, n: int, size: int, edge: str) -> str:
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
    computed: dict[tuple[int, int], str] = {}

    def value(plane: int, shift: int) -> str:
        if plane < tile:
            return planes[plane + tile * shift]
        if (plane, shift) not in computed:
            kind, a, b, further = program.steps[plane - tile]
            inputs = value(a, shift), value(b, shift + further)
            computed[plane, shift] = g.op(kind.capitalize(), *inputs)
        return computed[plane, shift]

    x = g.op("Concat", *(value(*output) for output in program.outputs), axis=1)
    x = g.op("Transpose", x, perm=[0, 2, 1, 3])
    x = g.op("Reshape", x, g.ints(0, rows * tile, -1))
    return x if rows * tile == n else g.cut(x, 1, 0, n)


def hpss(g: OnnxGraph, residual: str, fe: cfg.FrontEnd) -> tuple[str, str]:
    """Residual [B, F, T] -> its harmonic and its percussive part, 0 where both medians are 0."""
    turned = g.op("Transpose", residual, perm=[0, 2, 1])
    h = median(g, turned, fe.n_frames, fe.hpss_width, fe.hpss_edge)
    h = g.power(g.op("Transpose", h, perm=[0, 2, 1]), fe.hpss_power)
    p = median(g, residual, fe.n_bins, fe.percussive_width, fe.hpss_edge)
    p = g.power(p, fe.hpss_power)
    total = g.op("Add", h, p)
    if fe.hpss_eps:
        total = g.op("Add", total, g.constant(fe.hpss_eps))
    zero, some = g.constant(0.0), g.op("Greater", total, g.constant(0.0))
    total = g.op("Where", some, total, g.constant(1.0))
    soft_masks = (g.op("Where", some, g.op("Div", part, total), zero) for part in (h, p))
    harmonic, percussive = (g.op("Mul", residual, mask) for mask in soft_masks)
    return harmonic, percussive


def views(g: OnnxGraph, parts: Sequence[str], fe: cfg.FrontEnd, mel: np.ndarray) -> str:
    """Residual and its parts [B, F, T] -> dB of their mel bands [B, 3, n_mels, T], unclamped."""
    x = g.op("Concat", *(g.op("Unsqueeze", part, g.ints(1)) for part in parts), axis=1)
    x = g.op("MatMul", g.constant(mel, name="mel"), g.power(x, fe.mel_power))
    x = g.op("Max" if fe.amin_rule == "max" else "Add", x, g.constant(fe.amin))
    return g.op("Mul", g.op("Log", x), g.constant(fe.db_factor / math.log(10)))


def channels(g: OnnxGraph, views: str, fe: cfg.FrontEnd, over_song: bool) -> str:
    """Views [B, 3, n_mels, T] -> channels [B, len(channels), n_mels, T], clamped at top_db.

    over_song: B are the segments of one song, so that its joint rules hold.
    """
    if fe.top_db is not None:
        axes = [2, 3] if fe.joint.endswith("view") else [1, 2, 3]
        if over_song and fe.joint.startswith("song"):
            axes = [0, *axes]
        loudest = g.op("ReduceMax", views, g.ints(*axes), keepdims=1)
        views = g.op("Max", views, g.op("Sub", loudest, g.constant(fe.top_db)))
    made = dict(
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
        if name not in made:
            if name == "ratio":
                made[name] = g.op("Sub", made["mel_H"], made["mel_P"])
            elif name == "flux":
                made[name] = g.op("Abs", channel("delta"))
            else:
                made[name] = delta(channel("delta" if name == "delta2" else "mel_res"))
        return made[name]

    return g.op("Concat", *map(channel, fe.channels), axis=1)
