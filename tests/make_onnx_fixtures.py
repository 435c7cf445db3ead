"""Make ONNX builds of ArtifactNet-like detectors, as other people's exporters would.

Every model has random weights (norms calibrated by a forward pass, mask and score spread out) and
is the whole detector: audio -> STFT -> UNet mask -> HPSS -> mel -> seven channels -> CNN -> P(AI).
`Layout` holds what a build may vary, with the commonest choice as the default; `LAYOUTS` lists the
builds that the tests and the zoo are made of, each by what differs. One torch module family makes
them all. Each file is checked: onnxruntime and torch agree within 1e-4.

    python tests/make_onnx_fixtures.py fixtures tests/onnx   # the small ones that are committed
    python tests/make_onnx_fixtures.py zoo FOLDER [NAME...]  # all of LAYOUTS, or those named
    python tests/make_onnx_fixtures.py full FOLDER           # the inferred v94 layouts, full size
    python tests/make_onnx_fixtures.py random FOLDER --count 20 --seed 1

Beside NAME.onnx (and NAME.onnx.data) lies NAME.json: the layout, parameter counts and, on segments
0, 1, ... of `tests/onnx_audio.py`, onnxruntime's scores. Needs torch, onnx, onnxscript and
onnxruntime, of which the project itself needs none to install; `--audio FILE.npy` (float32
[n, 176400]) adds segments of real music, kept in NAME.npz with their scores.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onnx_audio import segments

CHANNELS = ("mel_res", "mel_H", "mel_P", "delta", "delta2", "ratio", "flux")
TOLERANCE = 1e-4  # of a score, onnxruntime against torch


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a build may vary. Comments list the values that are not plain numbers."""

    # Front end
    n_fft: int = 512
    hop: int = 512
    stft: str = "op"  # op | conv_pair | conv_joint | frames (framing and a matrix product)
    window: str = "hann"  # hann | hamming
    centre: bool = True  # n_fft / 2 samples of padding at both ends
    stft_edge: str = "reflect"  # reflect | constant
    magnitude: str = "sqrt"  # sqrt | abs (of the complex spectrum) | power
    spectrum_eps: float = 0.0
    hpss_width: int = 31
    percussive_width: int = 31
    hpss_edge: str = "reflect"  # reflect | replicate | constant
    hpss_power: float = 2.0
    hpss_eps: float = 1e-10
    median: str = "stack"  # stack (sort) | topk | unfold (sort)
    n_mels: int = 32
    mel_scale: str = "slaney"  # slaney | htk
    mel_norm: str = "slaney"  # slaney | none
    mel_power: float = 2.0
    mel_form: str = "matmul"  # matmul | linear | conv | einsum
    amin: float = 1e-10
    amin_rule: str = "max"  # max | add
    log: str = "log10"  # log10 | ln (times 4.3429)
    top_db: float | None = 80.0
    joint: str = "segment"  # segment | view | song | song_view
    channels: tuple[str, ...] = CHANNELS
    channel_norm: str = "none"  # none | affine: (x + 40) / 40 | statistics: per channel
    # UNet
    widths: tuple[int, ...] = (4, 8, 12)
    bottleneck: int = 16
    unet_input: str = "magnitude"  # log1p | log | db | log_mean | instance | batch_norm | bin_norm
    transposed: bool = False  # UNet on [B, 1, T, F]
    size: str = "pad_right"  # pad_right | pad_both | trim | match_pad | match_crop | match_resize
    pad_mode: str = "reflect"  # reflect | constant | replicate
    block: str = "residual"  # see `Block`
    shortcut: str = "conv"  # conv | conv_norm | conv_plain (no bias)
    act: str = "relu"
    norm: str = "batch"  # batch | group | instance | instance_affine | none
    squeeze: bool = False  # squeeze-and-excite at the end of each block
    down: str = "conv4"  # conv4 | conv3 | conv2 | max | avg
    up: str = "transpose2"  # transpose2/3/4 | bilinear[_conv] | align_conv | nearest_conv | shuffle
    skip: str = "concat"  # concat | concat_reversed | add
    attention_gates: bool = False
    bottom: str = "gated"  # block | gated | gated3 | glu | glu_conv | attention | lstm
    head: int = 1  # kernel
    mask: str = "half"  # half: 0.5 * sigmoid | divided | buffer | full: sigmoid | tanh | none: 1
    # CNN
    cnn_widths: tuple[int, ...] = (8, 12, 16, 16)
    cnn_hidden: int = 12
    cnn_block: str = "plain"  # plain | residual
    cnn_act: str = "relu"
    cnn_norm: str = "batch"
    cnn_pool: str = "max"  # max | avg
    cnn_pool_all: bool = False  # also after the last block
    cnn_head: str = "mean"  # mean | adaptive | mean_max
    classes: int = 1  # 2: the score is softmax[:, 1]
    # Graph
    samples: int = 176_400
    batch: str = "dynamic"  # dynamic | fixed (1) | one (declared dynamic, breaks beyond 1)
    output: str = "flat"  # flat: [B] | column: [B, 1] | scalar: [1] | no score: logits, mask
    song: bool = False  # all segments of a song in, one float64 score [1] out
    aggregate: str = "rms"  # of a song: rms | median | mean
    exporter: str = "torchscript"  # torchscript | dynamo
    opset: int = 17
    fold: bool = True  # batch norms into the convolutions before them, constants
    external: str = "no"  # no | data (NAME.onnx.data) | symlinks (as a download cache keeps files)
    optimised: str = "no"  # by onnxruntime: no | basic | extended
    seed: int = 0


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda c: nn.ReLU(),
    "leaky_relu": lambda c: nn.LeakyReLU(0.1),
    "silu": lambda c: nn.SiLU(),
    "gelu": lambda c: nn.GELU(),
    "gelu_tanh": lambda c: nn.GELU(approximate="tanh"),
    "elu": lambda c: nn.ELU(),
    "mish": lambda c: nn.Mish(),
    "hard_swish": lambda c: nn.Hardswish(),
    "prelu": lambda c: nn.PReLU(c),
    "none": lambda c: nn.Identity(),
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": lambda c: nn.BatchNorm2d(c, momentum=None),
    "group": lambda c: nn.GroupNorm(math.gcd(c, 4), c),
    "instance": lambda c: nn.InstanceNorm2d(c),
    "instance_affine": lambda c: nn.InstanceNorm2d(c, affine=True),
    "none": lambda c: nn.Identity(),
}


def mel_matrix(s: Layout) -> np.ndarray:
    """Triangular filters [n_mels, n_bins], float64, 0 Hz to Nyquist, as librosa's."""
    nyquist = 22_050.0
    if s.mel_scale == "htk":
        top = 2595 * math.log10(1 + nyquist / 700)
        edges = 700 * (10 ** (np.linspace(0, top, s.n_mels + 2) / 2595) - 1)
    else:  # linear below 1 kHz, 27 steps per factor 6.4 above
        top = 15 + 27 * math.log(nyquist / 1000) / math.log(6.4)
        mels = np.linspace(0, top, s.n_mels + 2)
        edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    bins = np.linspace(0, nyquist, s.n_fft // 2 + 1)
    ramps = (bins - edges[:, None]) / np.diff(edges, append=np.inf)[:, None]
    matrix = np.clip(np.minimum(ramps[:-2], 1 - ramps[1:-1]), 0, None)
    return matrix * (2 / (edges[2:] - edges[:-2]))[:, None] if s.mel_norm == "slaney" else matrix


class Spectrum(nn.Module):
    """Audio [B, N] -> magnitude [B, n_bins, n_frames]."""

    def __init__(self, s: Layout):
        super().__init__()
        self.s = s
        n = torch.arange(s.n_fft, dtype=torch.float64)
        a = {"hann": 0.5, "hamming": 0.54}[s.window]
        window = a - (1 - a) * torch.cos(2 * math.pi * n / s.n_fft)
        bins = torch.arange(s.n_fft // 2 + 1, dtype=torch.float64)
        angle = 2 * math.pi * (bins[:, None] * n % s.n_fft) / s.n_fft
        cosine, sine = (torch.cos(angle) * window).float(), (-torch.sin(angle) * window).float()
        if s.stft == "op":
            self.register_buffer("window", window.float())
        elif s.stft == "conv_pair":
            self.register_buffer("cosine", cosine[:, None])
            self.register_buffer("sine", sine[:, None])
        else:
            basis = torch.cat([cosine, sine])
            self.register_buffer("basis", basis[:, None] if s.stft == "conv_joint" else basis.T)

    def forward(self, audio: Tensor) -> Tensor:
        s = self.s
        if s.centre:
            half = s.n_fft // 2
            audio = F.pad(audio[:, None], (half, half), mode=s.stft_edge)[:, 0]
        if s.stft == "op":
            complex_ = s.magnitude == "abs" and s.exporter == "dynamo"
            z = torch.stft(
                audio, s.n_fft, s.hop, window=self.window, center=False, return_complex=complex_
            )
            if complex_:
                return z.abs()
            re, im = z[..., 0], z[..., 1]
        elif s.stft == "conv_pair":
            re = F.conv1d(audio[:, None], self.cosine, stride=s.hop)
            im = F.conv1d(audio[:, None], self.sine, stride=s.hop)
        elif s.stft == "conv_joint":
            z = F.conv1d(audio[:, None], self.basis, stride=s.hop)
            re, im = z.chunk(2, dim=1)
        else:
            z = (audio.unfold(1, s.n_fft, s.hop) @ self.basis).transpose(1, 2)
            re, im = z[:, : s.n_fft // 2 + 1], z[:, s.n_fft // 2 + 1 :]
        power = re**2 + im**2 + s.spectrum_eps if s.spectrum_eps else re**2 + im**2
        return power if s.magnitude == "power" else power.sqrt()


def conv(i: int, o: int, kernel: int = 3, bias: bool = True, **more: Any) -> nn.Conv2d:
    """Convolution that keeps the size, unless `more` says otherwise."""
    dilation = more.get("dilation", 1)
    return nn.Conv2d(i, o, kernel, padding=kernel // 2 * dilation, bias=bias, **more)


class Squeeze(nn.Module):
    """Squeeze-and-excite gate."""

    def __init__(self, c: int):
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(c, max(2, c // 4), 1), nn.Conv2d(max(2, c // 4), c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.wide(F.relu(self.narrow(F.adaptive_avg_pool2d(x, 1)))))


class Block(nn.Module):
    """Features [B, i, H, W] -> [B, o, H, W].

    double: conv-norm-act twice; separable, dilated: likewise with such convolutions; double_glu:
    convolutions to 2C and a gate instead of the activation; residual: the same as double with a
    shortcut; identity: a convolution to width o, then a residual block without convolution in the
    shortcut; narrow: 1x1, 3x3, 1x1 with a shortcut; preact: norm-act-conv; glu: one convolution to
    2C and a gate, with a shortcut.
    """

    def __init__(self, i: int, o: int, s: Layout):
        super().__init__()
        bias = s.norm == "none"

        def unit(i: int, o: int, kernel: int = 3, act: str = s.act, **more: Any) -> list[nn.Module]:
            return [conv(i, o, kernel, bias, **more), NORMS[s.norm](o), ACTIVATIONS[act](o)]

        self.stem: nn.Module = nn.Identity()
        self.last: nn.Module = ACTIVATIONS[s.act](o)
        kind = s.block
        if kind == "identity":
            self.stem = nn.Sequential(*unit(i, o))
            i, kind = o, "residual"
        self.plain = kind in ("double", "dilated", "separable", "double_glu")
        if kind == "double":
            body = unit(i, o) + unit(o, o)
        elif kind == "dilated":
            body = unit(i, o) + unit(o, o, dilation=2)
        elif kind == "separable":
            body = unit(i, i, groups=i) + unit(i, o, 1) + unit(o, o, groups=o) + unit(o, o, 1)
        elif kind == "double_glu":
            body = [m for a in (i, o) for m in (*unit(a, 2 * o, act="none"), nn.GLU(dim=1))]
        elif kind == "residual":
            body = unit(i, o) + unit(o, o, act="none")
        elif kind == "narrow":
            body = unit(i, max(2, o // 2), 1) + unit(max(2, o // 2), max(2, o // 2))
            body += unit(max(2, o // 2), o, 1, act="none")
        elif kind == "preact":
            body = [NORMS[s.norm](i), ACTIVATIONS[s.act](i), conv(i, o)]
            body += [NORMS[s.norm](o), ACTIVATIONS[s.act](o), conv(o, o)]
            self.last = nn.Identity()
        elif kind == "glu":
            body = [*unit(i, 2 * o, act="none"), nn.GLU(dim=1)]
        else:
            raise ValueError(f"no block {kind!r}")
        if s.squeeze:
            body.append(Squeeze(o))
        self.body = nn.Sequential(*body)
        self.shortcut: nn.Module = nn.Identity()
        if i != o and not self.plain:
            self.shortcut = conv(i, o, 1, bias=s.shortcut == "conv")
            if s.shortcut == "conv_norm":
                self.shortcut = nn.Sequential(self.shortcut, NORMS[s.norm](o))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.body(x) if self.plain else self.last(self.body(x) + self.shortcut(x))


class Gated(nn.Module):
    """Gated residual block of the bottleneck."""

    def __init__(self, c: int, s: Layout):
        super().__init__()
        self.kind = s.bottom
        bias = s.norm == "none"
        self.act = ACTIVATIONS[s.act](c)
        if self.kind in ("gated", "gated3"):
            self.body = nn.Sequential(
                conv(c, c, bias=bias), NORMS[s.norm](c), ACTIVATIONS[s.act](c),
                conv(c, c, bias=bias), NORMS[s.norm](c),
            )  # fmt: skip
            self.gate = conv(c, c, 1)
        else:
            wide = bias or self.kind == "glu"
            self.body = nn.Sequential(conv(c, 2 * c, bias=wide), NORMS[s.norm](2 * c), nn.GLU(1))
            self.mix = NORMS[s.norm](c) if self.kind == "glu" else conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        if self.kind in ("gated", "gated3"):
            return self.act(x + h * torch.sigmoid(self.gate(h)))
        return self.act(self.mix(x + h)) if self.kind == "glu" else self.act(x + self.mix(h))


class Positions(nn.Module):
    """Mixes the positions of the bottleneck by self-attention, or along time by an LSTM."""

    def __init__(self, c: int, kind: str):
        super().__init__()
        self.lstm = nn.LSTM(c, c, batch_first=True) if kind == "lstm" else None
        self.qkv = None if kind == "lstm" else conv(c, 3 * c, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.lstm is not None:
            return x + self.lstm(x.mean(dim=2).transpose(1, 2))[0].transpose(1, 2)[:, :, None]
        small = F.avg_pool2d(x, (4, 4), ceil_mode=True)
        q, k, v = self.qkv(small).flatten(2).chunk(3, dim=1)
        weights = torch.softmax(q.transpose(1, 2) @ k / c**0.5, dim=-1)
        mixed = (v @ weights.transpose(1, 2)).reshape(b, c, small.shape[2], small.shape[3])
        return x + F.interpolate(mixed, size=(h, w), mode="nearest")


class Down(nn.Sequential):
    """Halves H and W."""

    def __init__(self, c: int, kind: str):
        kernel = {"conv4": 4, "conv3": 3, "conv2": 2}.get(kind)
        if kernel:
            step: nn.Module = nn.Conv2d(c, c, kernel, stride=2, padding=(kernel - 1) // 2)
        else:
            step = nn.MaxPool2d(2) if kind == "max" else nn.AvgPool2d(2)
        super().__init__(step)


class Up(nn.Module):
    """Doubles H and W, from i to o features (plain "bilinear" keeps them)."""

    def __init__(self, i: int, o: int, kind: str):
        super().__init__()
        self.kind = kind
        if kind.startswith("transpose"):
            k, more = int(kind[-1]), {"output_padding": 1} if kind == "transpose3" else {}
            self.step: nn.Module = nn.ConvTranspose2d(
                i, o, k, stride=2, padding=(k - 1) // 2, **more
            )
        elif kind == "shuffle":
            self.step = nn.Sequential(conv(i, 4 * o, 1), nn.PixelShuffle(2))
        else:
            self.step = nn.Identity() if kind == "bilinear" else conv(i, o)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "nearest_conv":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        elif self.kind in ("bilinear", "bilinear_conv", "align_conv"):
            align = self.kind == "align_conv"
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=align)
        return self.step(x)


class SkipGate(nn.Module):
    """Additive attention of a skip by the features that come up (Attention U-Net)."""

    def __init__(self, c: int):
        super().__init__()
        self.up, self.skip, self.out = conv(c, c, 1), conv(c, c, 1), conv(c, 1, 1)

    def forward(self, up: Tensor, skip: Tensor) -> Tensor:
        return skip * torch.sigmoid(self.out(F.relu(self.up(up) + self.skip(skip))))


def match(x: Tensor, like: Tensor, s: Layout) -> Tensor:
    """`x` brought to the size of `like`."""
    rows, cols = like.shape[2] - x.shape[2], like.shape[3] - x.shape[3]
    if rows == 0 and cols == 0:
        return x
    if s.size == "match_resize":
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
    if s.size == "match_crop" and rows <= 0 and cols <= 0:
        return x[:, :, : like.shape[2], : like.shape[3]]
    return F.pad(x, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2))


class UNet(nn.Module):
    """Magnitude [B, n_bins, n_frames] -> mask of that shape."""

    def __init__(self, s: Layout):
        super().__init__()
        self.s = s
        widths, i = s.widths, 1
        if s.unet_input == "batch_norm":
            self.input_norm = NORMS["batch"](1)
        elif s.unet_input == "bin_norm":
            self.register_buffer("bin_mean", torch.linspace(2, 0.5, s.n_fft // 2 + 1)[:, None])
            self.register_buffer("bin_std", torch.linspace(1, 0.5, s.n_fft // 2 + 1)[:, None])
        if s.mask == "buffer":
            self.register_buffer("mask_max", torch.tensor(0.5))
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        for o in widths:
            self.encoder.append(Block(i, o, s))
            self.down.append(Down(o, s.down))
            i = o
        bottom: list[nn.Module] = [Block(i, s.bottleneck, s)]
        if s.bottom in ("attention", "lstm"):
            bottom.append(Positions(s.bottleneck, s.bottom))
        elif s.bottom != "block":
            bottom += [Gated(s.bottleneck, s) for _ in range(3 if s.bottom == "gated3" else 1)]
        self.bottom = nn.Sequential(*bottom)
        self.up, self.decoder, self.gates = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        i = s.bottleneck
        for o in reversed(widths):
            self.up.append(Up(i, o, s.up))
            risen = i if s.up == "bilinear" else o
            self.decoder.append(Block(o if s.skip == "add" else risen + o, o, s))
            if s.attention_gates:
                self.gates.append(SkipGate(o))
            i = o
        self.head = conv(i, 1, s.head)

    def scaled(self, x: Tensor) -> Tensor:
        """The input of the first convolution."""
        kind = self.s.unet_input
        if kind in ("log1p", "batch_norm", "bin_norm"):
            x = torch.log1p(x)
        if kind == "batch_norm":
            return self.input_norm(x)
        if kind == "bin_norm":
            return (x - self.bin_mean) / self.bin_std
        if kind == "log":
            return torch.log(x + (1e-8 if self.s.exporter == "torchscript" else 1e-6))
        if kind == "db":
            return 20 * torch.log10(torch.clamp(x, min=1e-5))
        if kind == "log_mean":
            x = torch.log(torch.clamp(x, min=1e-3))
            return x - x.mean(dim=(1, 2, 3), keepdim=True)
        if kind == "instance":
            x = x - x.mean(dim=(2, 3), keepdim=True)
            return x / (x.pow(2).mean(dim=(2, 3), keepdim=True).sqrt() + 1e-5)
        return x

    def logits(self, magnitude: Tensor) -> Tensor:
        """[B, 1, n_bins, n_frames] before the sigmoid."""
        s = self.s
        x = self.scaled(magnitude[:, None])
        if s.transposed:
            x = x.transpose(2, 3)
        if s.size == "trim":
            x = x[:, :, :, :-1] if s.transposed else x[:, :, :-1]
        full_h, full_w = x.shape[2], x.shape[3]
        whole, top, left = x, 0, 0
        if s.size in ("pad_right", "pad_both", "trim"):
            step = 2 ** len(s.widths)
            rows, cols = -full_h % step, -full_w % step
            if s.size == "pad_both":
                top, left = rows // 2, cols // 2
            if rows or cols:
                x = F.pad(x, (left, cols - left, top, rows - top), mode=s.pad_mode)
        skips = []
        for block, down in zip(self.encoder, self.down, strict=True):
            x = block(x)
            skips.append(x)
            x = down(x)
        x = self.bottom(x)
        for level, (up, block) in enumerate(zip(self.up, self.decoder, strict=True)):
            skip = skips.pop()
            x = match(up(x), skip, s)
            if s.attention_gates:
                skip = self.gates[level](x, skip)
            if s.skip == "add":
                x = block(x + skip)
            else:
                x = block(torch.cat([x, skip] if s.skip == "concat" else [skip, x], dim=1))
        x = match(self.head(x), whole, s) if s.size.startswith("match") else self.head(x)
        if s.size.startswith("pad") or s.size == "trim":
            x = x[:, :, top : top + full_h, left : left + full_w]
        return x.transpose(2, 3) if s.transposed else x

    def forward(self, magnitude: Tensor) -> Tensor:
        s, z = self.s, self.logits(magnitude)
        if s.mask == "half":
            mask = 0.5 * torch.sigmoid(z)
        elif s.mask == "divided":
            mask = torch.sigmoid(z) / 2
        elif s.mask == "buffer":
            mask = torch.sigmoid(z) * self.mask_max
        elif s.mask == "tanh":
            mask = 0.25 * (torch.tanh(z) + 1)
        else:
            mask = torch.sigmoid(z)
        return (F.pad(mask, (0, 0, 0, 1)) if s.size == "trim" else mask)[:, 0]


class Features(nn.Module):
    """Residual magnitude [B, n_bins, n_frames] -> channels [B, n, n_mels, n_frames]."""

    def __init__(self, s: Layout):
        super().__init__()
        self.s = s
        mel = torch.from_numpy(mel_matrix(s)).float()
        if s.mel_form == "linear":
            self.mel = nn.Linear(mel.shape[1], mel.shape[0], bias=False)
            self.mel.weight = nn.Parameter(mel, requires_grad=False)
        else:
            self.register_buffer("mel", mel[:, :, None] if s.mel_form == "conv" else mel)
        if s.channel_norm == "statistics":
            n = len(s.channels)
            self.register_buffer("mean", torch.linspace(-50, 5, n)[None, :, None, None])
            self.register_buffer("std", torch.linspace(25, 6, n)[None, :, None, None])

    def median(self, x: Tensor, width: int, axis: int) -> Tensor:
        s, half, n = self.s, width // 2, x.shape[axis]
        sides = (half, half, 0, 0) if axis == 2 else (0, 0, half, half)
        x = F.pad(x[:, None], sides, mode=s.hpss_edge)[:, 0]
        if s.median == "unfold":
            return x.unfold(axis, width, 1).sort(dim=-1)[0][..., half]
        stack = torch.stack([x.narrow(axis, i, n) for i in range(width)], dim=-1)
        if s.median == "topk":
            return stack.topk(half + 1, dim=-1)[0][..., -1]
        return stack.sort(dim=-1)[0][..., half]

    def hpss(self, r: Tensor) -> tuple[Tensor, Tensor]:
        s = self.s
        h = self.median(r, s.hpss_width, 2) ** s.hpss_power
        p = self.median(r, s.percussive_width, 1) ** s.hpss_power
        total = h + p + s.hpss_eps if s.hpss_eps else h + p
        return r * h / total, r * p / total

    def mels(self, x: Tensor) -> Tensor:
        """[B, 3, n_bins, n_frames] -> [B, 3, n_mels, n_frames], power."""
        s = self.s
        x = x**s.mel_power if s.mel_power != 1 else x
        if s.mel_form == "linear":
            return self.mel(x.transpose(2, 3)).transpose(2, 3)
        if s.mel_form == "conv":
            y = F.conv1d(x.flatten(0, 1), self.mel)
            return y.reshape(-1, 3, y.shape[1], y.shape[2])
        if s.mel_form == "einsum":
            return torch.einsum("mf,bvft->bvmt", self.mel, x)
        return torch.matmul(self.mel, x)

    def forward(self, r: Tensor) -> Tensor:
        s = self.s
        x = self.mels(torch.stack([r, *self.hpss(r)], dim=1))
        x = x + s.amin if s.amin_rule == "add" else torch.clamp(x, min=s.amin)
        x = 10 * torch.log10(x) if s.log == "log10" else torch.log(x) * 4.342944819032518
        if s.top_db is not None:
            if s.joint == "song" or (s.joint == "segment" and s.batch != "dynamic"):
                loudest = x.max()  # what most people write: at batch 1 it is the segment's
            else:
                axes = {"segment": (1, 2, 3), "view": (2, 3), "song_view": (0, 2, 3)}[s.joint]
                loudest = x.amax(dim=axes, keepdim=True)
            x = torch.maximum(x, loudest - s.top_db)
        d = F.pad(x[:, 0, :, 1:] - x[:, 0, :, :-1], (1, 0))
        d2 = F.pad(d[:, :, 1:] - d[:, :, :-1], (1, 0))
        views = {"mel_res": x[:, 0], "mel_H": x[:, 1], "mel_P": x[:, 2], "delta": d, "delta2": d2}
        views |= {"ratio": x[:, 1] - x[:, 2], "flux": d.abs()}
        out = torch.stack([views[name] for name in s.channels], dim=1)
        if s.channel_norm == "affine":
            return (out + 40) / 40
        return (out - self.mean) / self.std if s.channel_norm == "statistics" else out


class Stage(nn.Module):
    """A block of the CNN, without its pooling."""

    def __init__(self, i: int, o: int, s: Layout):
        super().__init__()
        act = ACTIVATIONS[s.cnn_act](o)
        self.first = nn.Sequential(conv(i, o), NORMS[s.cnn_norm](o), act)
        self.second = None
        if s.cnn_block == "residual":
            self.second = nn.Sequential(conv(o, o), NORMS[s.cnn_norm](o))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x if self.second is None else F.relu(x + self.second(x))


class CNN(nn.Module):
    """Channels [B, n, n_mels, n_frames] -> logits [B, classes]."""

    def __init__(self, s: Layout):
        super().__init__()
        self.s = s
        steps: list[nn.Module] = []
        i = len(s.channels)
        for level, o in enumerate(s.cnn_widths):
            steps.append(Stage(i, o, s))
            if s.cnn_pool_all or level < len(s.cnn_widths) - 1:
                steps.append(nn.MaxPool2d(2) if s.cnn_pool == "max" else nn.AvgPool2d(2))
            i = o
        self.steps = nn.Sequential(*steps)
        self.hidden = nn.Linear(2 * i if s.cnn_head == "mean_max" else i, s.cnn_hidden)
        self.act, self.dropout = ACTIVATIONS[s.cnn_act](s.cnn_hidden), nn.Dropout(0.3)
        self.head = nn.Linear(s.cnn_hidden, s.classes)

    def forward(self, x: Tensor) -> Tensor:
        s, x = self.s, self.steps(x)
        if s.cnn_head == "adaptive":
            x = F.adaptive_avg_pool2d(x, 1)
            x = x.view(1, -1) if s.batch == "one" else x.flatten(1)
        else:
            mean = x.mean(dim=(2, 3))
            x = torch.cat([mean, x.amax(dim=(2, 3))], 1) if s.cnn_head == "mean_max" else mean
            x = x.reshape(1, -1) if s.batch == "one" else x
        return self.head(self.dropout(self.act(self.hidden(x))))


class Detector(nn.Module):
    """Audio [B, N] -> P(AI), of each segment or of the song that they make up."""

    def __init__(self, s: Layout):
        super().__init__()
        self.s = s
        self.spectrum, self.unet = Spectrum(s), UNet(s)
        self.features, self.cnn = Features(s), CNN(s)

    def forward(self, audio: Tensor) -> Tensor:
        s = self.s
        magnitude = self.spectrum(audio)
        mask = self.unet(magnitude) if s.mask != "none" else None
        if mask is not None and s.output == "mask":
            return mask
        logits = self.cnn(self.features(magnitude if mask is None else mask * magnitude))
        if s.output == "logits":
            return logits
        p = torch.softmax(logits, 1)[:, 1] if s.classes == 2 else torch.sigmoid(logits)[:, 0]
        if not s.song:
            if s.output == "column":
                return p[:, None]
            return p.reshape(1) if s.output == "scalar" else p
        p = p.double()
        if s.aggregate == "mean":
            return p.mean().reshape(1)
        if s.aggregate == "median":  # of an even count, the mean of the middle two
            ranked = p.sort()[0]
            n = p.shape[0]
            return (0.5 * (ranked[(n - 1) // 2] + ranked[n // 2])).reshape(1)
        rms = audio.pow(2).mean(dim=1).sqrt().double()
        return (p * rms / (rms.sum() + 1e-9)).sum().reshape(1)


def standardise(head: nn.Module, outputs: list[Tensor], centre: float, spread: float) -> None:
    """Rescales a last layer to this mean and standard deviation, and no output beyond 15."""
    values = torch.cat([out.transpose(0, 1).flatten(1) for out in outputs], dim=1)
    mean = values.mean(dim=1)
    values -= mean[:, None]
    scale = min(spread / max(float(values.std()), 1e-6), 15 / float(values.abs().max()))
    head.weight *= scale
    head.bias -= mean
    head.bias *= scale
    head.bias += centre


@torch.no_grad()
def build(s: Layout, audio: np.ndarray) -> Detector:
    """A detector with random weights in eval mode, calibrated on segments [n, N]."""
    torch.manual_seed(s.seed)
    model = Detector(s)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)) and module.affine:
            nn.init.uniform_(module.weight, 0.6, 1.4)
            nn.init.normal_(module.bias, 0, 0.2)
    inputs = [model.spectrum(torch.from_numpy(x)[None]) for x in audio]
    for x in inputs:  # in train mode: running statistics
        model.unet(x)
    model.unet.eval()
    standardise(model.unet.head, [model.unet.logits(x) for x in inputs], -0.5, 1.5)
    masks = [torch.ones_like(x) if s.mask == "none" else model.unet(x) for x in inputs]
    channels = [model.features(mask * x) for mask, x in zip(masks, inputs, strict=True)]
    for x in channels:
        model.cnn(x)
    model.eval()
    standardise(model.cnn.head, [model.cnn(x) for x in channels], 0.2, 1.2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def export(model: nn.Module, s: Layout, path: Path) -> None:
    """Writes the model to `path`, the way `s` says."""
    names = ("audio_chunks", "p_ai") if s.song else ("audio", "probability")
    dynamic = s.song or s.batch != "fixed"
    rows = 1 if s.batch != "dynamic" and not s.song else 2
    example = torch.from_numpy(segments(rows, s.samples))
    axis = "chunks" if s.song else "batch"
    options: dict[str, Any] = {
        "input_names": names[:1], "output_names": names[1:], "opset_version": s.opset,
        "verbose": False, "dynamo": s.exporter == "dynamo",
    }  # fmt: skip
    if s.exporter == "dynamo":
        options |= {"external_data": False, "optimize": s.fold}
        if dynamic and s.batch != "one":
            options["dynamic_shapes"] = ({0: torch.export.Dim(axis, min=1, max=64)},)
    else:
        options["do_constant_folding"] = s.fold
        if not s.fold:
            options["training"] = torch.onnx.TrainingMode.PRESERVE
        if dynamic:
            options["dynamic_axes"] = {names[0]: {0: axis}}
            if not s.song and s.output != "scalar":
                options["dynamic_axes"][names[1]] = {0: axis}
    torch.onnx.export(model, (example,), str(path), **options)
    proto = onnx.load(path)
    if s.exporter == "dynamo" and s.batch == "one":
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = axis
    if s.optimised != "no":
        plain = path.with_suffix(".plain.onnx")
        onnx.save(proto, plain)
        settings = onnxruntime.SessionOptions()
        level = onnxruntime.GraphOptimizationLevel
        settings.graph_optimization_level = (
            level.ORT_ENABLE_BASIC if s.optimised == "basic" else level.ORT_ENABLE_EXTENDED
        )
        settings.optimized_model_filepath = str(path)
        settings.log_severity_level = 3
        onnxruntime.InferenceSession(plain, settings, providers=["CPUExecutionProvider"])
        plain.unlink()
        proto = onnx.load(path)
    for node in proto.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")  # the exporting machine's source paths
    for value in proto.graph.value_info:
        value.ClearField("metadata_props")
    onnx.helper.set_model_props(proto, {"license": "CC0-1.0", "description": "random weights"})
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)
    if s.external == "no":
        onnx.save(proto, path)
    else:
        onnx.save(proto, path, save_as_external_data=True, location=data.name)


def hide_behind_symlinks(path: Path) -> None:
    """Moves a model and its data to blobs named by hash, with links in their place."""
    blobs = path.parent / f"{path.stem}.blobs"
    shutil.rmtree(blobs, ignore_errors=True)
    blobs.mkdir()
    for file in (path, path.with_name(path.name + ".data")):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        file.symlink_to(Path(blobs.name) / blob.name)


SONGS = ((0, 1), (0, 3), (1, 3))  # first and last (excluded) segment of the songs that are scored


def run(call: Callable[[np.ndarray], np.ndarray], audio: np.ndarray, s: Layout) -> np.ndarray:
    """Scores [n] of segments, or of `SONGS`, by torch or onnxruntime."""
    if s.song:
        batches = [audio[a:b] for a, b in SONGS]
    elif s.batch == "dynamic":
        batches = [audio]
    else:
        batches = [audio[i : i + 1] for i in range(len(audio))]
    return np.concatenate([np.asarray(call(batch)).reshape(-1) for batch in batches])


def session(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """onnxruntime's function of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    runtime = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = runtime.get_inputs()[0].name
    return lambda batch: runtime.run(None, {name: batch})[0]


def lost_epsilons(s: Layout) -> list[str]:
    """Fields whose epsilon is not in the graph: optimising, the dynamo exporter takes x + c for x
    where c is 1e-8 or less."""
    if s.exporter != "dynamo" or not s.fold:
        return []
    return [key for key in ("hpss_eps", "spectrum_eps") if 0 < getattr(s, key) <= 1e-8]


@torch.no_grad()
def make(name: str, s: Layout, folder: Path, real: np.ndarray | None) -> None:
    """Builds, exports, checks and describes one detector; RuntimeError if a check fails."""
    audio = segments(2 if name in FULL else 3, s.samples)
    if real is not None:
        audio = np.concatenate([audio, real[:, : s.samples]])
    model = build(s, audio)
    path = folder / f"{name}.onnx"
    export(model, s, path)
    graph = onnx.load(path, load_external_data=False).graph
    lost = lost_epsilons(s)
    for module in model.modules():
        if lost and hasattr(module, "s"):
            module.s = dataclasses.replace(s, **dict.fromkeys(lost, 0.0))
    ours = session(path)
    scores = run(ours, audio, s)
    wanted = run(lambda x: model(torch.from_numpy(x)).numpy(), audio, s)
    error = float(np.abs(scores - wanted).max())
    if not error <= TOLERANCE:
        raise RuntimeError(f"onnxruntime and torch differ by {error:.1e}")
    mask = model.unet(model.spectrum(torch.from_numpy(audio[:1])))
    if not (scores.std() > 1e-3 and mask.std() > 0.01):
        raise RuntimeError(f"scores {scores} or mask (std {mask.std():.1e}) are constant")
    silence = np.ravel(ours(np.zeros((1, s.samples), np.float32)))
    if s.external == "symlinks":
        hide_behind_symlinks(path)
    counts = {
        part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("unet", "cnn")
    }
    if name in FULL and counts != PARAMETERS:
        raise RuntimeError(f"{counts} parameters, not {PARAMETERS}")
    truth = {
        "layout": dataclasses.asdict(s),
        "lost": lost,  # epsilons that the exporter took out
        "parameters": counts,
        "operators": sorted({node.op_type for node in graph.node}),
        "nodes": len(graph.node),
        "mask": {"mean": float(mask.mean()), "std": float(mask.std())},
        "songs": SONGS if s.song else None,
        "error": error,  # of onnxruntime against torch
    }
    if s.output not in ("mask", "logits"):
        truth["silence"] = float(silence[0]) if np.isfinite(silence[0]) else None
        truth["scores"] = scores[:3].tolist()
    (folder / f"{name}.json").write_text(json.dumps(truth, indent=1) + "\n")
    if real is not None:
        np.savez(folder / f"{name}.npz", audio=audio, scores=scores)
    print(
        f"{name}: {len(graph.node)} nodes, lost {lost}, {np.round(scores[:5], 3)}, {error:.0e}",
        flush=True,
    )


def image_classifier(folder: Path) -> None:
    """A model that is not a detector at all: [B, 3, 32, 32] -> 10 class probabilities."""
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 4), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(256, 10), nn.Softmax(1)
    )
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["classes"]}
    path = folder / "image_classifier.onnx"
    example = (torch.zeros(1, 3, 32, 32),)
    torch.onnx.export(model.eval(), example, str(path), dynamo=False, opset_version=17, **names)


def draw(rng: random.Random) -> Layout:
    """A random member of the family, small."""
    dynamo = rng.random() < 0.5
    opset = rng.choice((18, 20, 21) if dynamo else (14, 15, 16, 17, 18))
    pick: dict[str, Any] = {
        "widths": tuple(sorted(rng.choices(range(3, 13), k=rng.randint(2, 5)))),
        "bottleneck": 2 * rng.randint(3, 8),
        "cnn_widths": tuple(sorted(rng.choices(range(4, 17), k=rng.randint(3, 4)))),
        "cnn_hidden": rng.randint(8, 16),
        "n_fft": rng.choice((256, 512, 1024)),
        "hpss_width": rng.choice((17, 31)),
        "percussive_width": rng.choice((17, 31)),
        "n_mels": rng.choice((16, 24, 32)),
        "exporter": "dynamo" if dynamo else "torchscript",
        "opset": opset,
        "seed": rng.randrange(1_000_000),
    }
    pick["hop"] = pick["n_fft"] // rng.choice((1, 2) if pick["n_fft"] > 256 else (1,))
    choices: dict[str, tuple[Any, ...]] = {
        "stft": (
            "conv_pair", "conv_joint", *(["op"] if opset >= 17 else []), *(["frames"] * dynamo)
        ),
        "spectrum_eps": (0.0, 0.0, 1e-12, 1e-8),
        "hpss_edge": ("reflect", "reflect", "replicate"),
        "hpss_eps": (1e-10, 0.0, 1e-8),
        "median": ("stack", "topk", *(["unfold"] * dynamo)),
        "mel_scale": ("slaney", "htk"),
        "mel_norm": ("slaney", "none"),
        "mel_form": ("matmul", "linear", "conv", "einsum"),
        "joint": ("segment", "view"),
        "unet_input": (
            "magnitude", "log1p", "log", "db", "log_mean", "instance", "batch_norm", "bin_norm"
        ),
        "transposed": (False, False, True),
        "size": ("pad_right", "pad_both", "trim", "match_pad", "match_resize"),
        "pad_mode": ("reflect", "constant", "replicate"),
        "block": (
            "double", "dilated", "separable", "double_glu", "residual", "identity", "narrow",
            "preact", "glu"
        ),
        "shortcut": ("conv", "conv_norm", "conv_plain"),
        "act": tuple(ACTIVATIONS)[:-1],
        "norm": tuple(NORMS),
        "squeeze": (False, False, True),
        "down": ("conv4", "conv3", "conv2", "max", "avg"),
        "up": (
            "transpose2", "transpose3", "transpose4", "bilinear", "bilinear_conv", "align_conv",
            "nearest_conv", "shuffle"
        ),
        "skip": ("concat", "concat_reversed", "add"),
        "attention_gates": (False, False, True),
        "bottom": ("block", "gated", "gated3", "glu", "glu_conv"),
        "head": (1, 3),
        "mask": ("half", "divided", "buffer", "full", "tanh"),
        "cnn_block": ("plain", "residual"),
        "cnn_act": ("relu", "gelu", "silu", "leaky_relu"),
        "cnn_norm": ("batch", "group", "none"),
        "cnn_pool": ("max", "avg"),
        "cnn_head": ("mean", "adaptive", "mean_max"),
        "channel_norm": ("none", "none", "affine", "statistics"),
        "classes": (1, 1, 2),
        "batch": ("dynamic", "fixed", "one"),
        "output": ("flat", "column"),
        "fold": (True, True, False),
    }  # fmt: skip
    pick |= {key: rng.choice(values) for key, values in choices.items()}
    if pick["up"] == "bilinear":  # keeps its features
        pick |= {"skip": "concat", "attention_gates": False}
    if pick["size"] == "trim":  # a zero row, which replicated would be 0 / 0 in the soft masks
        pick["hpss_edge"] = "reflect"
    if rng.random() < 0.3:
        pick["channels"] = tuple(rng.sample(CHANNELS, len(CHANNELS)))
    return Layout(**pick)


RELEASE: dict[str, Any] = {"n_fft": 2048, "hop": 512, "n_mels": 128}  # the released model's
U4: dict[str, Any] = {"down": "conv3", "up": "bilinear_conv", "bottom": "glu", "head": 3}
U3: dict[str, Any] = {
    "block": "glu", "shortcut": "conv_norm", "act": "silu", "down": "conv3", "up": "bilinear",
    "bottom": "gated3", "head": 3,
}  # fmt: skip
U1: dict[str, Any] = {"down": "conv4", "up": "transpose2", "bottom": "glu_conv"}
# Seeds count the entries: append new ones, so that the others stay as they are.
LAYOUTS = {
    name: Layout(seed=seed, **differences)
    for seed, (name, differences) in enumerate(
        {
            # As the facts describe the released model and its siblings, small.
            "v94": RELEASE,
            "v94_dynamo": RELEASE | {
                "exporter": "dynamo", "opset": 18, "batch": "one", "external": "data",
                "magnitude": "abs", "bottleneck": 12, "n_mels": 64,
            },
            "v94_song": RELEASE | {"stft": "conv_pair", "song": True, "joint": "song", "opset": 18},
            "u4": U4,
            "u3": U3 | {"widths": (4, 8, 12, 12), "bottleneck": 12, "hop": 256},
            "u1": U1,
            # Committed: each differs from the others in several ways.
            "plain": {
                "block": "double", "down": "max", "bottom": "block", "opset": 14,
                "stft": "conv_pair", "n_fft": 128, "hop": 128, "n_mels": 16, "widths": (4, 8),
                "bottleneck": 12, "output": "column", "mask": "buffer", "hpss_width": 17,
            },
            "glu_dynamo": U3 | {
                "widths": (4, 6, 8), "bottleneck": 8, "exporter": "dynamo", "opset": 20,
                "hop": 256, "size": "pad_both", "pad_mode": "constant", "unet_input": "log1p",
                "cnn_widths": (8, 12, 16), "cnn_pool_all": True, "mel_scale": "htk",
                "hpss_eps": 1e-7,
            },
            "unfolded_gelu": {
                "act": "gelu", "block": "preact", "fold": False, "unet_input": "log_mean",
                "up": "nearest_conv", "down": "avg", "bottom": "block", "cnn_act": "gelu",
                "widths": (3, 4, 5, 6), "bottleneck": 6, "cnn_widths": (6, 8, 8),
                "cnn_head": "adaptive", "joint": "view", "opset": 18, "n_mels": 24,
                "hpss_width": 17, "percussive_width": 17,
            },
            "group_shuffle": {
                "norm": "group", "act": "leaky_relu", "up": "shuffle", "down": "conv2",
                "block": "narrow", "squeeze": True, "exporter": "dynamo", "opset": 21,
                "size": "match_pad", "unet_input": "log1p", "mel_norm": "none", "classes": 2,
                "cnn_pool": "avg", "hpss_width": 17, "bottleneck": 12,
            },
            "instance_gates": {
                "norm": "instance_affine", "act": "elu", "up": "bilinear_conv",
                "size": "match_resize", "attention_gates": True, "skip": "concat_reversed",
                "block": "identity", "down": "conv3", "bottom": "block", "opset": 16,
                "stft": "conv_joint", "n_fft": 128, "hop": 128, "n_mels": 16, "widths": (4, 6, 8),
                "bottleneck": 8, "channel_norm": "statistics", "batch": "fixed",
                "transposed": True, "percussive_width": 17, "cnn_widths": (6, 8, 12),
                "channels": ("mel_H", "mel_P", "mel_res", "ratio", "delta", "delta2", "flux"),
            },
            "no_eps": {
                "hpss_eps": 0.0, "opset": 18, "batch": "one", "output": "scalar",
                "hpss_width": 17, "median": "topk", "widths": (4, 6), "bottleneck": 8, "n_mels": 24,
            },
            "song": {
                "song": True, "joint": "song", "opset": 18, "bottom": "glu_conv", "widths": (4, 6),
                "bottleneck": 8, "n_mels": 24,
            },
            "attention": {
                "bottom": "attention", "unet_input": "log1p", "exporter": "dynamo", "opset": 18,
                "widths": (4, 6, 8), "bottleneck": 8, "n_mels": 24,
            },
            "logits": {
                "output": "logits", "classes": 8, "exporter": "dynamo", "opset": 18,
                "widths": (4, 6), "bottleneck": 8, "bottom": "block", "n_mels": 24,
            },
            # Downs and ups.
            "conv3_transpose3": {"down": "conv3", "up": "transpose3", "bottom": "glu", "head": 3},
            "conv2_transpose4": {"down": "conv2", "up": "transpose4", "opset": 16,
                                 "stft": "conv_pair", "n_fft": 1024},
            "max_align": {"down": "max", "up": "align_conv", "block": "double"},
            "max_align_dynamo": {"down": "max", "up": "align_conv", "exporter": "dynamo",
                                 "opset": 18, "block": "double"},
            "avg_shuffle": {"down": "avg", "up": "shuffle", "opset": 18},
            "conv3_bilinear": {"down": "conv3", "up": "bilinear_conv", "bottom": "glu",
                               "head": 3, "act": "silu", "opset": 18},
            "nearest_dynamo": {"up": "nearest_conv", "down": "avg", "exporter": "dynamo",
                               "opset": 21},
            # Depth and size.
            "depth2": {"widths": (6, 10), "block": "double", "bottom": "block", "down": "max"},
            "depth4": {"widths": (4, 6, 8, 10), "unet_input": "db"},
            "depth5": {"widths": (4, 4, 6, 6, 8), "block": "double", "down": "max",
                       "size": "match_pad"},
            "constant_both": {"size": "pad_both", "pad_mode": "constant"},
            "replicate": {"pad_mode": "replicate", "exporter": "dynamo", "opset": 20},
            "match_crop": {"size": "match_crop", "down": "conv3"},
            "match_crop_dynamo": {"size": "match_crop", "down": "conv3", "up": "nearest_conv",
                                  "exporter": "dynamo", "opset": 18},
            "match_resize": {"size": "match_resize", "down": "max", "up": "transpose2"},
            "trim": {"size": "trim", "down": "max", "hop": 256},
            "transposed": {"transposed": True, "unet_input": "log1p"},
            # Activations and norms.
            "mish": {"act": "mish"},
            "mish_dynamo": {"act": "mish", "exporter": "dynamo", "opset": 18},
            "hard_swish": {"act": "hard_swish", "block": "separable", "bottom": "block"},
            "prelu": {"act": "prelu", "fold": False},
            "gelu_tanh": {"act": "gelu_tanh", "exporter": "dynamo", "opset": 20},
            "gelu_tanh_torchscript": {"act": "gelu_tanh", "block": "dilated"},
            "elu": {"act": "elu", "bottom": "gated3"},
            "group_torchscript": {"norm": "group", "opset": 14, "stft": "conv_pair",
                                  "block": "double", "down": "max"},
            "group_dynamo18": {"norm": "group", "exporter": "dynamo", "opset": 18,
                               "cnn_norm": "group"},
            "instance": {"norm": "instance", "block": "double", "act": "leaky_relu"},
            "instance_dynamo": {"norm": "instance_affine", "exporter": "dynamo", "opset": 18},
            "no_norm": {"norm": "none", "skip": "add"},
            "unfolded_dynamo": {"fold": False, "exporter": "dynamo", "opset": 18},
            "unfolded_torchscript": {"fold": False, "opset": 15, "stft": "conv_joint"},
            "preact_dynamo": {"block": "preact", "exporter": "dynamo", "opset": 18},
            "double_glu": {"block": "double_glu", "bottom": "glu"},
            # Input and mask.
            "log": {"unet_input": "log", "mask": "divided"},
            "instance_input": {"unet_input": "instance", "mask": "full", "exporter": "dynamo",
                               "opset": 18},
            "batch_norm_input": {"unet_input": "batch_norm", "mask": "tanh"},
            "bin_norm_input": {"unet_input": "bin_norm", "mask": "buffer"},
            # Front end.
            "frames": {"stft": "frames", "spectrum_eps": 1e-8, "exporter": "dynamo", "opset": 18},
            "frames_torchscript": {
                "stft": "frames", "n_fft": 1024, "spectrum_eps": 1e-12, "centre": False,
                "batch": "fixed",
            },
            "zeros_hamming": {"stft_edge": "constant", "window": "hamming"},
            "not_centred": {"centre": False, "hop": 256},
            "power": {"magnitude": "power", "mel_power": 1.0, "unet_input": "log1p"},
            "narrow_medians": {"hpss_width": 17, "percussive_width": 21, "hpss_eps": 1e-8,
                               "hpss_edge": "replicate"},
            "zero_edge": {"hpss_edge": "constant", "median": "topk"},
            "unfold_medians": {"median": "unfold", "exporter": "dynamo", "opset": 20},
            "wiener1": {"hpss_power": 1.0, "mel_power": 1.0},
            "mel_linear": {"mel_form": "linear", "mel_scale": "htk", "mel_norm": "none"},
            "mel_conv": {"mel_form": "conv", "n_mels": 40, "log": "ln"},
            "mel_einsum": {"mel_form": "einsum", "exporter": "dynamo", "opset": 18},
            "no_clamp": {"top_db": None, "amin_rule": "add", "amin": 1e-6},
            "per_view60": {"joint": "view", "top_db": 60.0, "channel_norm": "affine"},
            "batch1_dynamo": {"batch": "one", "cnn_head": "adaptive", "exporter": "dynamo",
                              "opset": 18},
            "fixed_dynamo": {"batch": "fixed", "exporter": "dynamo", "opset": 20},
            "short": {"samples": 88_200},
            # CNN.
            "cnn_residual": {"cnn_block": "residual", "cnn_act": "leaky_relu",
                             "cnn_head": "mean_max"},
            "cnn_b": {"cnn_widths": (8, 16, 24), "cnn_hidden": 20, "cnn_pool_all": True},
            "cnn_unfolded": {"fold": False, "cnn_act": "silu", "cnn_head": "adaptive"},
            "two_classes": {"classes": 2, "cnn_pool": "avg"},
            # Songs, other containers, and what the native route cannot hold.
            "song_median": {"song": True, "aggregate": "median", "opset": 18},
            "song_mean": {"song": True, "aggregate": "mean", "joint": "song_view"},
            "song_dynamo": {"song": True, "joint": "song", "exporter": "dynamo", "opset": 20},
            "symlinks": {"external": "symlinks", "exporter": "dynamo", "opset": 20},
            "optimised": {"optimised": "basic"},
            "extended": {"optimised": "extended", "block": "double", "down": "max"},
            "lstm": {"bottom": "lstm"},
            "attention_torchscript": {"bottom": "attention"},
            "no_unet": {"mask": "none"},
            "mask_only": {"output": "mask"},
        }.items()
    )
}  # fmt: skip


FIXTURES = (
    "v94_dynamo", "plain", "glu_dynamo", "unfolded_gelu", "group_shuffle", "instance_gates",
    "no_eps", "song", "attention", "logits",
)  # fmt: skip
FULL_SIZE: dict[str, Any] = RELEASE | {
    "widths": (32, 64, 128), "bottleneck": 256, "cnn_widths": (32, 64, 128, 256), "cnn_hidden": 128
}  # fmt: skip
PARAMETERS = {"unet": 3_603_937, "cnn": 423_553}  # as published; every one of FULL has them
FULL = {
    name: Layout(seed=seed, **(FULL_SIZE | differences))
    for seed, (name, differences) in enumerate(
        {
            "v94_full": {"stft": "conv_pair"},
            "v94_full_dynamo": {
                "exporter": "dynamo", "opset": 18, "batch": "one", "external": "data"
            },
            "v94_full_song": {
                "stft": "conv_pair", "song": True, "joint": "song", "opset": 18
            },
            "u4_full": U4,
            "u3_full": U3 | {"widths": (32, 64, 128, 128), "bottleneck": 128, "opset": 18},
            "u1_full": U1 | {"exporter": "dynamo", "opset": 20, "external": "data"},
            "cnn_b_full": {
                "cnn_widths": (64, 128, 256), "cnn_hidden": 192, "cnn_pool_all": True
            },
        }.items()
    )
}  # fmt: skip


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("fixtures", "zoo", "full", "random"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--audio", type=Path, help="float32 .npy [n, 176400]: more segments")
    parser.add_argument("--count", type=int, default=10, help="of random members")
    parser.add_argument("--seed", type=int, default=0, help="of random members")
    args = parser.parse_intermixed_args()
    warnings.simplefilter("ignore")  # of tracing and of torch.stft
    logging.disable(logging.WARNING)
    args.folder.mkdir(parents=True, exist_ok=True)
    real = None if args.audio is None else np.load(args.audio)
    if args.what == "random":
        rng = random.Random(args.seed)
        layouts = {f"random_{args.seed}_{i}": draw(rng) for i in range(args.count)}
    elif args.what == "fixtures":
        layouts = {name: LAYOUTS[name] for name in FIXTURES}
        image_classifier(args.folder)
    else:
        layouts = LAYOUTS if args.what == "zoo" else FULL
    failed = []
    for name in args.names or layouts:
        try:
            make(name, layouts[name], args.folder, real)
        except Exception as error:  # report it and go on with the others
            failed.append(name)
            print(f"{name}: {type(error).__name__}: {str(error)[-200:]}", flush=True)
    if failed:
        raise SystemExit(f"failed: {' '.join(failed)}")


if __name__ == "__main__":
    main()
