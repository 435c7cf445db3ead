"""The detector in PyTorch, as a peer: the layouts of the presets, without a texture head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from artifactnet_jax.config import FrontEnd
from artifactnet_jax.filterbank import mel_filterbank
from artifactnet_jax.layers import Layer
from artifactnet_jax.operators import evaluate
from artifactnet_jax.passes import folded
from artifactnet_jax.weights import ForeignGraph, Model, Weights

OPERATORS = {"conv", "conv_transpose", "linear", "relu", "sigmoid", "add", "mul", "concat"}
OPERATORS |= {"pad", "slice", "max_pool", "mean", "flatten"}
AXES = {"c": 1, "h": 2, "w": 3}  # of NCHW


def why_not(weights: Model) -> str:
    """Why these weights cannot run here; empty when they can."""
    config = weights.config
    if not isinstance(weights, Weights):
        return "a foreign graph" if isinstance(weights, ForeignGraph) else "an engine"
    if config.texture is not None:
        return "a texture head"
    sizes = ("segment_samples", "hpss_width", "percussive_width", "hpss_eps", "n_mels")
    known = {name: getattr(config.front_end, name) for name in sizes}
    if config.front_end != dataclasses.replace(FrontEnd(), **known):
        return "a front end of other conventions"
    used = {layer.op for network in folded(config)[0].values() for layer in network}
    return f"operators {sorted(used - OPERATORS)}" if used - OPERATORS else ""


class TorchNetwork:
    """Audio float32 [B, N] -> P(AI) float32 [B], on the first GPU where there is one.

    There it is compiled by torch.compile; on a CPU it runs operator by operator. `dtype`
    "bfloat16" is that of the two networks, by autocast; in "float32" a GPU takes TF32 for
    convolutions, PyTorch's default. ValueError where `why_not` says something.
    """

    def __init__(self, weights: Model, dtype: str = "float32"):
        if (reason := why_not(weights)) or not isinstance(weights, Weights):
            raise ValueError(f"the PyTorch network does not have {reason}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = weights.config
        self._half = dtype == "bfloat16"
        self._parts, tensors = folded(self.config, weights.tensors)
        kinds = {f"{part}.{x.name}": x.op for part, layers in self._parts.items() for x in layers}
        self._tensors: dict[str, torch.Tensor] = {}
        for name, value in tensors.items():
            layer, leaf = name.rsplit(".", 1)
            if leaf == "kernel":  # HWIO here, OIHW there; IOHW of transposed ones; OI of linear
                axes = {"conv": (3, 2, 0, 1), "conv_transpose": (2, 3, 0, 1), "linear": (1, 0)}
                value = value.transpose(axes[kinds[layer]])
            self._tensors[name] = torch.from_numpy(value.copy()).to(self.device)
        fe = self.config.front_end
        self._window = torch.hann_window(fe.n_fft, device=self.device)
        mel = torch.from_numpy(np.asarray(mel_filterbank(fe), np.float32))
        self._mel = mel.to(self.device)
        self._run = torch.compile(self._forward) if self.device.type == "cuda" else self._forward

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """Audio float32 [B, N] -> P(AI) float32 [B]."""
        with torch.inference_mode():
            score: np.ndarray = self._run(torch.from_numpy(audio).to(self.device)).cpu().numpy()
        return score

    def _forward(self, audio: Any) -> Any:
        fe = self.config.front_end
        magnitude = torch.stft(
            audio, fe.n_fft, fe.hop, window=self._window, pad_mode="reflect", return_complex=True
        ).abs()
        residual = self._network("unet", magnitude[:, None])[:, 0] * magnitude
        h = _median(residual, fe.hpss_width, 2)
        p = _median(residual, fe.percussive_width, 1)
        h, p = h * h, p * p
        total = h + p + fe.hpss_eps
        safe = torch.where(total > 0, total, 1.0)
        parts = torch.stack([residual, residual * h / safe, residual * p / safe], 1)
        views = 10 * torch.log10((self._mel @ (parts * parts)).clamp(min=fe.amin))
        if fe.top_db is not None:
            views = torch.maximum(views, views.amax((1, 2, 3), keepdim=True) - fe.top_db)
        mel, mel_h, mel_p = views.unbind(1)
        delta = _delta(mel)
        channels = [mel, mel_h, mel_p, delta, _delta(delta), mel_h - mel_p, delta.abs()]
        return torch.sigmoid(self._network("cnn", torch.stack(channels, 1))[:, 0])

    def _network(self, part: str, x: Any) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._half):
            out = evaluate(self._parts[part], x, functools.partial(self._layer, part))
        return out.float()

    def _layer(self, part: str, layer: Layer, inputs: list[Any], spare: bool) -> Any:
        x, op, attrs = inputs[0], layer.op, layer.attrs
        own = {leaf: self._tensors[f"{part}.{layer.name}.{leaf}"] for leaf, _ in layer.tensors}
        if op == "conv":
            (top, bottom), (left, right) = attrs["padding"]
            x = F.pad(x, (left, right, top, bottom)) if any((top, bottom, left, right)) else x
            rest = {"stride": attrs["strides"], "dilation": attrs["dilations"]}
            return F.conv2d(x, own["kernel"], own.get("bias"), groups=attrs["groups"], **rest)
        if op == "conv_transpose":
            (top, bottom), (left, right) = attrs["padding"]
            if (top, left) != (bottom, right):
                raise ValueError(f"layer {layer.name!r}: uneven padding")
            rest = {"stride": attrs["strides"], "output_padding": attrs["output_padding"]}
            return F.conv_transpose2d(
                x, own["kernel"], own.get("bias"), padding=(top, left), **rest
            )
        if op == "linear":
            return F.linear(x, own["kernel"], own.get("bias"))
        if op == "pad":
            (top, bottom), (left, right) = attrs["padding"]
            value = attrs["value"] if attrs["mode"] == "constant" else None
            return F.pad(x, (left, right, top, bottom), attrs["mode"], value)
        if op == "max_pool":
            return F.max_pool2d(x, attrs["kernel"], attrs["strides"])
        if op == "slice":
            index = [slice(None)] * x.ndim
            index[AXES[attrs["axis"]]] = slice(attrs["start"], attrs["stop"], attrs["step"])
            return x[tuple(index)]
        if op == "mean":
            return x.mean([AXES[letter] for letter in attrs["axes"]], keepdim=True)
        simple: dict[str, Callable[[], Any]] = {
            "relu": lambda: F.relu(x),
            "sigmoid": lambda: torch.sigmoid(x),
            "add": lambda: x + inputs[1],
            "mul": lambda: x * (inputs[1] if len(inputs) > 1 else attrs["value"]),
            "concat": lambda: torch.cat(inputs, AXES[attrs["axis"]]),
            "flatten": lambda: x.flatten(1),
        }
        return simple[op]()


def _median(x: Any, width: int, axis: int) -> Any:
    """Running median along an axis that is reflected without repetition: [B, F, T]."""
    half = width // 2
    pad = (half, half, 0, 0) if axis == 2 else (0, 0, half, half)
    padded = F.pad(x[:, None], pad, "reflect")[:, 0]
    return padded.unfold(axis, width, 1).median(dim=-1).values


def _delta(x: Any) -> Any:
    return torch.diff(x, dim=-1, prepend=x[..., :1])
