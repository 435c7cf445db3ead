"""The network: audio [B, 176400] -> P(AI) [B], read from top to bottom as the paper's figure.

Convolutions are NHWC (height = frequency, width = time) with HWIO kernels. Parameters and the
front end are float32; `dtype` chooses what the convolutions compute in, `precision` how float32
products are taken on hardware that would round them to TF32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from artifactnet_jax import config as cfg
from artifactnet_jax import dsp


class Layers:
    """The three layer kinds with dtype, precision and random keys filled in."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any, precision: Any):
        self.rngs, self.dtype, self.precision = rngs, dtype, precision

    def conv(self, i: int, o: int, kernel: int | tuple[int, int], *, bias: bool, **kw) -> nnx.Conv:
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        return nnx.Conv(
            i,
            o,
            size,
            use_bias=bias,
            dtype=self.dtype,
            precision=self.precision,
            rngs=self.rngs,
            **kw,
        )

    def norm(self, features: int) -> nnx.BatchNorm:
        return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, dtype=self.dtype, rngs=self.rngs)

    def linear(self, i: int, o: int) -> nnx.Linear:
        return nnx.Linear(i, o, dtype=self.dtype, precision=self.precision, rngs=self.rngs)


def depth_to_space(x: jax.Array, rows: int, cols: int) -> jax.Array:
    """Sub-pixel rearrangement: [B, H, W, rows * cols * C] -> [B, H * rows, W * cols, C]."""
    b, h, w, _ = x.shape
    x = x.reshape(b, h, w, rows, cols, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * rows, w * cols, -1)


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max pooling, odd edges dropped: [B, H, W, C] -> [B, H // 2, W // 2, C].

    As four strided slices: the gradient of XLA's own pooling (select-and-scatter) is slow on CPU.
    """
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = jnp.maximum(x[:, 0:h:2, :w], x[:, 1:h:2, :w])
    return jnp.maximum(x[:, :, 0::2], x[:, :, 1::2])


class ResidualBlock(nnx.Module):
    """conv3x3-BN-ReLU-conv3x3-BN plus shortcut (1x1 where the width changes), then ReLU."""

    def __init__(self, i: int, o: int, layers: Layers):
        self.conv1 = layers.conv(i, o, 3, bias=False)
        self.norm1 = layers.norm(o)
        self.conv2 = layers.conv(o, o, 3, bias=False)
        self.norm2 = layers.norm(o)
        self.shortcut = layers.conv(i, o, 1, bias=True) if i != o else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nnx.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return nnx.relu(h + (x if self.shortcut is None else self.shortcut(x)))


class GatedResidualBlock(nnx.Module):
    """conv3x3-BN-ReLU-conv3x3-BN, gated by a sigmoid of a 1x1 convolution of itself."""

    def __init__(self, features: int, layers: Layers):
        self.conv1 = layers.conv(features, features, 3, bias=False)
        self.norm1 = layers.norm(features)
        self.conv2 = layers.conv(features, features, 3, bias=False)
        self.norm2 = layers.norm(features)
        self.gate = layers.conv(features, features, 1, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nnx.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return nnx.relu(x + h * nnx.sigmoid(self.gate(h)))


class Up(nnx.Module):
    """2x2 transposed convolution of stride 2, as a 1x1 convolution and depth-to-space.

    Exactly the same sums; XLA would multiply the inserted zeros of a transposed convolution.
    Kernel columns are ordered (row, column, feature).
    """

    def __init__(self, i: int, o: int, layers: Layers):
        self.features = o
        self.conv = layers.conv(i, 4 * o, 1, bias=False)
        self.bias = nnx.Param(jnp.zeros(o))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = depth_to_space(self.conv(x), 2, 2)
        return x + self.bias[...].astype(x.dtype)[None, None, None, :]


class ArtifactUNet(nnx.Module):
    """Bounded-mask UNet: magnitude [B, n_bins, n_frames] -> mask of the same shape (III-B)."""

    def __init__(self, unet: cfg.UNet, layers: Layers):
        self.config = unet
        area, i = unet.patch[0] * unet.patch[1], 1
        if area > 1:
            i = unet.stem
            stem = layers.conv(1, i, unet.patch, bias=True, strides=unet.patch, padding="VALID")
        self.stem = stem if area > 1 else None
        blocks, downs, ups, outs = [], [], [], []
        for o in unet.widths:
            blocks.append(ResidualBlock(i, o, layers))
            downs.append(layers.conv(o, o, 4, bias=True, strides=2, padding=((1, 1), (1, 1))))
            i = o
        self.bottom = ResidualBlock(i, unet.bottleneck, layers)
        self.gated = GatedResidualBlock(unet.bottleneck, layers)
        i = unet.bottleneck
        for o in reversed(unet.widths):
            ups.append(Up(i, o, layers))
            outs.append(ResidualBlock(2 * o, o, layers))
            i = o
        self.encoder, self.down = nnx.List(blocks), nnx.List(downs)
        self.up, self.decoder = nnx.List(ups), nnx.List(outs)
        self.head = layers.conv(i, area, 1, bias=True)

    def __call__(self, magnitude: jax.Array) -> jax.Array:
        unet, (_, n_bins, n_frames) = self.config, magnitude.shape
        x, skips = self.encode(magnitude)
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(jnp.concatenate([up(x), skips.pop()], axis=-1))
        logits = depth_to_space(self.head(x), *unet.patch)[:, :n_bins, :n_frames, 0]
        return unet.mask_max * nnx.sigmoid(logits.astype(jnp.float32))

    def encode(self, magnitude: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Magnitude [B, n_bins, n_frames] -> bottleneck [B, H, W, C], skips from the top down."""
        unet, (_, n_bins, n_frames) = self.config, magnitude.shape
        x = magnitude
        if unet.input_scale == "log":  # without the segment's mean: the level tells nothing
            x = jnp.log(jnp.maximum(x, unet.log_floor))
            x = x - jnp.mean(x, axis=(1, 2), keepdims=True)
        pad = [(0, -n_bins % unet.stride[0]), (0, -n_frames % unet.stride[1])]
        x = jnp.pad(x, [(0, 0), *pad], mode="reflect")[..., None]
        if self.stem is not None:
            x = self.stem(x)
        skips = []
        for block, down in zip(self.encoder, self.down, strict=True):
            x = block(x)
            skips.append(x)
            x = down(x)
        return self.gated(self.bottom(x)), skips


class ForensicCNN(nnx.Module):
    """Compact classifier: seven channels [B, 7, n_mels, T] -> logit [B] (III-D).

    `rngs` gives the dropout key and is needed in training mode only.
    """

    def __init__(self, cnn: cfg.CNN, layers: Layers):
        convs, norms, i = [], [], cfg.N_CHANNELS
        for o in cnn.widths:
            convs.append(layers.conv(i, o, 3, bias=True))
            norms.append(layers.norm(o))
            i = o
        self.conv, self.norm = nnx.List(convs), nnx.List(norms)
        self.hidden = layers.linear(i, cnn.hidden)
        self.dropout = nnx.Dropout(cnn.dropout)
        self.out = layers.linear(cnn.hidden, 1)

    def __call__(self, channels: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = jnp.moveaxis(channels, 1, -1)
        for level, (conv, norm) in enumerate(zip(self.conv, self.norm, strict=True)):
            x = nnx.relu(norm(conv(x)))
            if level < len(self.conv) - 1:
                x = max_pool(x)
        x = jnp.mean(x, axis=(1, 2))
        x = self.dropout(nnx.relu(self.hidden(x)), rngs=rngs)
        return self.out(x)[:, 0].astype(jnp.float32)


class ArtifactNet(nnx.Module):
    """Audio [B, 176400] float32, 44.1 kHz, in [-1, 1] -> P(AI) [B] float32 in [0, 1].

    `dtype` is what the convolutions compute in (float32 or bfloat16); `precision` applies to
    their float32 products: HIGHEST by default, DEFAULT lets a GPU use TF32.
    """

    def __init__(
        self,
        config: cfg.Config,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        precision: Any = jax.lax.Precision.HIGHEST,
    ):
        layers = Layers(rngs, dtype, precision)
        self.config = config
        self.unet = ArtifactUNet(config.unet, layers)
        self.cnn = ForensicCNN(config.cnn, layers)

    def __call__(self, audio: jax.Array) -> jax.Array:
        return nnx.sigmoid(self.logit(audio))

    def logit(self, audio: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logit of P(AI): [B, 176400] -> [B]; `rngs` as in `ForensicCNN`."""
        magnitude = dsp.stft_magnitude(audio, self.config.front_end)
        residual = self.unet(magnitude) * magnitude
        return self.cnn(dsp.seven_channels(residual, self.config.front_end), rngs)
