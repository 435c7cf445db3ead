"""The whole pipeline in NumPy: DSP, network and the `numpy` backend's forward pass. No jax.

The same maths as `artifactnet_jax.dsp` and `artifactnet_jax.model`, one segment at a time. The
dtype of the input is kept: float32 to score, float64 as the oracle of everything else. Batch norm
is folded into the convolutions once, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax.filterbank import hann, mel_filterbank
from artifactnet_jax.kernels import median_filter

BN_EPSILON = 1e-5


def stft_magnitude(audio: np.ndarray, front_end: cfg.FrontEnd) -> np.ndarray:
    """Magnitude spectrogram: [N] -> [n_bins, n_frames], periodic Hann, centred, reflected edges."""
    n_fft, hop = front_end.n_fft, front_end.hop
    padded = np.pad(audio, n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    spectrum = np.fft.rfft(frames * hann(n_fft).astype(audio.dtype))
    return np.ascontiguousarray(np.sqrt(spectrum.real**2 + spectrum.imag**2).T)


def hpss(residual: np.ndarray, front_end: cfg.FrontEnd) -> tuple[np.ndarray, np.ndarray]:
    """Harmonic and percussive parts of a magnitude: [F, T] -> two [F, T]."""
    h = median_filter(residual, front_end.hpss_width, axis=1) ** 2
    p = median_filter(residual, front_end.hpss_width, axis=0) ** 2
    total = h + p + residual.dtype.type(front_end.hpss_eps)
    share = np.zeros_like(residual)  # a part is exactly 0 where both medians are 0
    np.divide(h, total, out=share, where=total > 0)
    harmonic = residual * share
    share[:] = 0
    np.divide(p, total, out=share, where=total > 0)
    return harmonic, residual * share


def mel_db(magnitude: np.ndarray, front_end: cfg.FrontEnd) -> np.ndarray:
    """Mel power in dB: [F, T] -> [n_mels, T], floored at `amin`, no top-dB clamp."""
    mel = mel_filterbank(front_end).astype(magnitude.dtype) @ magnitude**2
    return 10 * np.log10(np.maximum(mel, magnitude.dtype.type(front_end.amin)))


def delta(x: np.ndarray) -> np.ndarray:
    """First difference along the last axis with a zero first frame: [..., T] -> [..., T]."""
    return np.diff(x, axis=-1, prepend=x[..., :1])


def seven_channels(residual: np.ndarray, front_end: cfg.FrontEnd) -> np.ndarray:
    """Forensic features (paper, Table I): residual magnitude [F, T] -> [7, n_mels, T]."""
    views = np.stack([mel_db(part, front_end) for part in (residual, *hpss(residual, front_end))])
    views = np.maximum(views, views.max() - views.dtype.type(front_end.top_db))
    mel_res, mel_h, mel_p = views
    d = delta(mel_res)
    return np.stack([mel_res, mel_h, mel_p, d, delta(d), mel_h - mel_p, np.abs(d)])


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function that never overflows; same shape and dtype."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def fold(tensors: Mapping[str, np.ndarray], dtype=np.float32) -> dict[str, np.ndarray]:
    """Tensors with every batch norm folded into the convolution before it.

    Names follow `artifactnet_jax.weights.parameter_shapes`; each convolution `x` ends up with
    `x.kernel` and `x.bias` in `dtype`, and no norm is left.
    """
    wide = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    for name in [n for n in wide if n.endswith(".var")]:
        norm = name.removesuffix(".var")
        # unet: block.norm1 follows block.conv1; cnn: cnn.norm.0 follows cnn.conv.0
        conv = norm.replace(".norm", ".conv")
        scale = wide.pop(f"{norm}.scale") / np.sqrt(wide.pop(name) + BN_EPSILON)
        bias = wide.get(f"{conv}.bias", 0.0) - wide.pop(f"{norm}.mean")
        wide[f"{conv}.kernel"] = wide[f"{conv}.kernel"] * scale
        wide[f"{conv}.bias"] = bias * scale + wide.pop(f"{norm}.bias")
    return {name: np.ascontiguousarray(tensor, dtype) for name, tensor in wide.items()}


def conv3x3(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3x3 convolution with zero padding: [H, W, I], [3, 3, I, O] -> [H, W, O].

    The three columns of the window are laid side by side once; each of its three rows is then one
    matrix product over a contiguous slice, so that BLAS does all the work without an im2col of 9.
    """
    h, w, i = x.shape
    o = kernel.shape[-1]
    columns = np.zeros((h + 2, w, 3, i), x.dtype)
    columns[1:-1, 1:, 0] = x[:, :-1]
    columns[1:-1, :, 1] = x
    columns[1:-1, :-1, 2] = x[:, 1:]
    rows = columns.reshape(h + 2, w, 3 * i)
    out = rows[:h].reshape(h * w, 3 * i) @ kernel[0].reshape(3 * i, o)
    for r in (1, 2):
        out += rows[r : r + h].reshape(h * w, 3 * i) @ kernel[r].reshape(3 * i, o)
    out += bias
    return out.reshape(h, w, o)


def patches(x: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Space to depth: [H, W, C] -> [H / rows, W / cols, rows * cols * C]."""
    h, w, c = x.shape
    x = x.reshape(h // rows, rows, w // cols, cols, c).transpose(0, 2, 1, 3, 4)
    return x.reshape(h // rows, w // cols, rows * cols * c)


def depth_to_space(x: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Inverse of `patches`: [H, W, rows * cols * C] -> [H * rows, W * cols, C]."""
    h, w, _ = x.shape
    x = x.reshape(h, w, rows, cols, -1).transpose(0, 2, 1, 3, 4)
    return x.reshape(h * rows, w * cols, -1)


class Network:
    """UNet and CNN over folded tensors; `mask` and `logit` follow the modules of `model`."""

    def __init__(self, config: cfg.Config, tensors: Mapping[str, np.ndarray], dtype=np.float32):
        self.config = config
        self.tensors = fold(tensors, dtype)

    def _dense(self, name: str, x: np.ndarray) -> np.ndarray:
        """1x1 convolution or linear layer over the last axis, with bias where there is one."""
        kernel = self.tensors[f"{name}.kernel"]
        out = x @ kernel.reshape(-1, kernel.shape[-1])
        return out + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else out

    def _conv3x3(self, name: str, x: np.ndarray) -> np.ndarray:
        return conv3x3(x, self.tensors[f"{name}.kernel"], self.tensors[f"{name}.bias"])

    def _down(self, name: str, x: np.ndarray) -> np.ndarray:
        """4x4 convolution, stride 2, padding 1: a 2x2 one over 2x2 patches of the padded input."""
        kernel = self.tensors[f"{name}.kernel"]
        i, o = kernel.shape[2:]
        x = patches(np.pad(x, ((1, 1), (1, 1), (0, 0))), 2, 2)
        kernel = (
            kernel.reshape(2, 2, 2, 2, i, o).transpose(0, 2, 1, 3, 4, 5).reshape(2, 2, 4 * i, o)
        )
        out = self.tensors[f"{name}.bias"]
        for r in (0, 1):
            for c in (0, 1):
                out = out + x[r : r + x.shape[0] - 1, c : c + x.shape[1] - 1] @ kernel[r, c]
        return out

    def _residual(self, name: str, x: np.ndarray) -> np.ndarray:
        h = self._conv3x3(f"{name}.conv1", x)
        np.maximum(h, 0, out=h)
        return self._conv3x3(f"{name}.conv2", h)

    def _block(self, name: str, x: np.ndarray) -> np.ndarray:
        h = self._residual(name, x)
        h += self._dense(f"{name}.shortcut", x) if f"{name}.shortcut.kernel" in self.tensors else x
        return np.maximum(h, 0, out=h)

    def mask(self, magnitude: np.ndarray) -> np.ndarray:
        """Magnitude [n_bins, n_frames] -> mask in [0, mask_max], same shape."""
        unet, (n_bins, n_frames) = self.config.unet, magnitude.shape
        x = magnitude
        if unet.input_scale == "log":
            x = np.log(np.maximum(x, x.dtype.type(unet.log_floor)))
            x = x - x.mean()
        pad = [(0, -n_bins % unet.stride[0]), (0, -n_frames % unet.stride[1])]
        x = np.pad(x, pad, mode="reflect")[..., None]
        if unet.patch != (1, 1):
            x = self._dense("unet.stem", patches(x, *unet.patch))
        skips = []
        for level in range(len(unet.widths)):
            x = self._block(f"unet.encoder.{level}", x)
            skips.append(x)
            x = self._down(f"unet.down.{level}", x)
        x = self._block("unet.bottom", x)
        h = self._residual("unet.gated", x)
        x = np.maximum(x + h * sigmoid(self._dense("unet.gated.gate", h)), 0)
        for level in range(len(unet.widths)):
            x = depth_to_space(self._dense(f"unet.up.{level}.conv", x), 2, 2)
            x += self.tensors[f"unet.up.{level}.bias"]
            x = self._block(f"unet.decoder.{level}", np.concatenate([x, skips.pop()], axis=-1))
        logits = depth_to_space(self._dense("unet.head", x), *unet.patch)
        return sigmoid(logits[:n_bins, :n_frames, 0]) * magnitude.dtype.type(unet.mask_max)

    def logit(self, channels: np.ndarray) -> np.ndarray:
        """Seven channels [7, n_mels, T] -> logit, a scalar array."""
        x = np.ascontiguousarray(np.moveaxis(channels, 0, -1))
        depth = len(self.config.cnn.widths)
        for level in range(depth):
            x = np.maximum(self._conv3x3(f"cnn.conv.{level}", x), 0)
            if level < depth - 1:
                h, w = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
                x = np.maximum(x[0:h:2, :w], x[1:h:2, :w])
                x = np.maximum(x[:, 0::2], x[:, 1::2])
        x = np.maximum(self._dense("cnn.hidden", x.mean(axis=(0, 1))), 0)
        return self._dense("cnn.out", x)[0]

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """P(AI) of one segment: audio [N] -> scalar array in [0, 1]."""
        magnitude = stft_magnitude(audio, self.config.front_end)
        residual = self.mask(magnitude) * magnitude
        return sigmoid(self.logit(seven_channels(residual, self.config.front_end)))
