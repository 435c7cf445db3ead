"""The network: audio [B, 176400] -> P(AI) [B], read from top to bottom as the paper's figure.

Convolutions are NHWC (height = frequency, width = time) with HWIO kernels. Parameters and the
front end are float32; `dtype` chooses what the convolutions compute in, `precision` how float32
products are taken on hardware that would round them to TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from artifactnet_jax import config as cfg
from artifactnet_jax import dsp, texture, texture_xla
from artifactnet_jax import layers as nets


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


def _wide(x: jax.Array) -> jax.Array:
    """float32, or float64 where that is computed in: what follows is no matter of `dtype`."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def depth_to_space(x: jax.Array, rows: int, cols: int) -> jax.Array:
    """Sub-pixel rearrangement: [B, H, W, rows * cols * C] -> [B, H * rows, W * cols, C]."""
    return nets.rearrange(x, rows, cols, "DCR")


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
        return self.decode(*self.encode(magnitude), magnitude.shape[1:])

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

    def decode(self, x: jax.Array, skips: list[jax.Array], size: tuple[int, ...]) -> jax.Array:
        """What `encode` gives, and (n_bins, n_frames) -> mask [B, n_bins, n_frames]."""
        for up, block, skip in zip(self.up, self.decoder, reversed(skips), strict=True):
            x = block(jnp.concatenate([up(x), skip], axis=-1))
        logits = depth_to_space(self.head(x), *self.config.patch)[:, : size[0], : size[1], 0]
        return self.config.mask_max * nnx.sigmoid(_wide(logits))


class ForensicCNN(nnx.Module):
    """Compact classifier: seven channels [B, 7, n_mels, T] -> logit [B] (III-D).

    `rngs` gives the dropout key and is needed in training mode only.
    """

    def __init__(self, cnn: cfg.CNN, channels: int, layers: Layers):
        convs, norms, i = [], [], channels
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
        return _wide(self.out(x)[:, 0])


def _selu(x: jax.Array, alpha: float, gamma: float) -> jax.Array:
    return gamma * jax.nn.elu(x, alpha)


# By operator: (x, **attributes) -> array of the same shape and dtype. jax.nn has the gradients
# that formulas get wrong at 0 or where an exponential overflows.
ELEMENTWISE: dict[str, Callable[..., jax.Array]] = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "hard_swish": jax.nn.hard_swish,
    "mish": jax.nn.mish,
    "exp": jnp.exp,
    "log": jnp.log,
    "sqrt": jnp.sqrt,
    "reciprocal": lambda x: 1 / x,
    "abs": jnp.abs,
    "neg": jnp.negative,
    "erf": jax.lax.erf,
    "leaky_relu": lambda x, alpha: jax.nn.leaky_relu(x, alpha),
    "elu": jax.nn.elu,
    "celu": jax.nn.celu,
    "selu": _selu,
    "hard_sigmoid": lambda x, alpha, beta: jnp.clip(alpha * x + beta, 0, 1),
    "gelu": lambda x, approximate: jax.nn.gelu(x, approximate=approximate == "tanh"),
}
# Sums over many positions, or over samples of uneven weight: in float32 whatever `dtype` is.
WIDE = ("batch_norm", "group_norm", "mean", "sum", "avg_pool", "softmax", "resize")


def transposed_conv(x: jax.Array, kernel: jax.Array, attrs: dict[str, Any], precision: Any):
    """Transposed convolution without bias: [B, H, W, I], [kh, kw, I, O] -> [B, H', W', O].

    As a plain convolution to stride * stride * O features, and depth-to-space: XLA would multiply
    the zeros that it inserts.
    """
    (rows, cols), (kh, kw, i, o) = attrs["strides"], kernel.shape
    down, across = -(-kh // rows), -(-kw // cols)  # inputs that meet in one output
    kernel = jnp.pad(kernel, ((0, down * rows - kh), (0, across * cols - kw), (0, 0), (0, 0)))
    kernel = kernel.reshape(down, rows, across, cols, i, o).transpose(0, 2, 4, 1, 3, 5)
    kernel = kernel.reshape(down, across, i, rows * cols * o)[::-1, ::-1]
    size = [
        s * (n - 1) + k + more
        for s, n, k, more in zip(
            (rows, cols), x.shape[1:3], (kh, kw), attrs["output_padding"], strict=True
        )
    ]
    ends = [(n - 1, n - 1) for n in (down, across)]
    out = depth_to_space(_conv(x, kernel, padding=ends, precision=precision), rows, cols)
    short = [(0, max(0, n - m)) for n, m in zip(size, out.shape[1:3], strict=True)]
    if short != [(0, 0), (0, 0)]:  # output padding that no input reaches
        out = jnp.pad(out, ((0, 0), *short, (0, 0)))
    (top, bottom), (left, right) = attrs["padding"]
    return out[:, top : size[0] - bottom, left : size[1] - right]


def _conv(x, kernel, *, strides=(1, 1), padding, dilations=(1, 1), groups=1, precision):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilations,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=precision,
    )


class LayerNetwork(nnx.Module):
    """A network from a foreign graph: maps [B, C, H, W] -> [B, C', H', W'] or vectors [B, C'].

    Parameters are attributes "layer.leaf" (batch statistics too), so that state paths are the
    weights' names. Convolutions and linear layers compute in `dtype`; what follows the last of
    them, and every wide sum, is float32. Batch norms use the running statistics unless `train()`
    is called.
    """

    def __init__(self, layers: tuple[nets.Layer, ...], part: Layers):
        self.layers = layers
        self.dtype, self.precision = part.dtype, part.precision
        self.use_running_average = True
        self.momentum = 0.9
        kernel = nnx.initializers.lecun_normal()
        for layer in layers:
            for leaf, shape in layer.tensors:
                if leaf == "kernel":
                    value = kernel(part.rngs.params(), shape, jnp.float32)
                elif leaf in ("scale", "var", "value"):
                    value = jnp.ones(shape)
                else:
                    value = jnp.zeros(shape)
                kind = nnx.BatchStat if leaf in ("mean", "var") else nnx.Param
                setattr(self, f"{layer.name}.{leaf}", kind(value))
        self.last_product = max(
            (layer.name for layer in layers if layer.op in nets.PRODUCTS),
            key=[layer.name for layer in layers].index,
            default="",
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nets.evaluate(self.layers, jnp.moveaxis(x, 1, -1), self._compute)
        return jnp.moveaxis(x, -1, 1).astype(jnp.float32)

    def _compute(self, layer: nets.Layer, inputs: list[jax.Array], spare: bool) -> jax.Array:
        attrs, dtype = layer.attrs, jnp.result_type(*{x.dtype for x in inputs})
        if len({x.dtype for x in inputs}) > 1:
            dtype = jnp.dtype(jnp.float32)
            inputs = [x.astype(dtype) for x in inputs]
        if layer.op in nets.PRODUCTS:
            out = self._product(layer, inputs[0].astype(self.dtype))
            return out.astype(jnp.float32) if layer.name == self.last_product else out
        if layer.op in ELEMENTWISE:
            return ELEMENTWISE[layer.op](inputs[0], **attrs)
        wide = jnp.float32 if layer.op in WIDE else dtype
        tensors = {leaf: self._tensor(layer, leaf).astype(wide) for leaf, _ in layer.tensors}
        inputs = [x.astype(wide) for x in inputs]
        if layer.op == "batch_norm" and not self.use_running_average:
            tensors |= self._batch_statistics(layer, inputs[0])
        return nets.apply(layer, inputs, tensors, jnp).astype(dtype)

    def _tensor(self, layer: nets.Layer, leaf: str) -> jax.Array:
        return getattr(self, f"{layer.name}.{leaf}")[...]

    def _product(self, layer: nets.Layer, x: jax.Array) -> jax.Array:
        attrs = layer.attrs
        kernel = self._tensor(layer, "kernel").astype(x.dtype)
        if layer.op == "conv":
            out = _conv(x, kernel, precision=self.precision, **attrs)
        elif layer.op == "conv_transpose":
            out = transposed_conv(x, kernel, attrs, self.precision)
        else:
            out = jnp.matmul(x, kernel, precision=self.precision)
        if "bias" not in dict(layer.tensors):
            return out
        bias = self._tensor(layer, "bias").astype(x.dtype)
        return out + bias.reshape((1,) * (out.ndim - 1) + bias.shape)

    def _batch_statistics(self, layer: nets.Layer, x: jax.Array) -> dict[str, jax.Array]:
        """Mean and variance of this batch; the running ones move towards them."""
        axes = tuple(range(x.ndim - 1))
        batch = {"mean": jnp.mean(x, axis=axes), "var": jnp.var(x, axis=axes)}
        for leaf, value in batch.items():
            running = getattr(self, f"{layer.name}.{leaf}")
            running[...] = self.momentum * running[...] + (1 - self.momentum) * value
        return batch


class Given(nnx.Variable):
    """A constant that is never trained: of the front end of a graph, of the texture head."""


class TextureHead(nnx.Module):
    """Audio [B, segment_samples] and its magnitude -> what is added to the CNN's logit [B].

    The output starts at 0: a network that is trained from scratch does not feel it.
    """

    def __init__(self, config: cfg.Config, layers: Layers):
        assert config.texture is not None
        self.config = config
        i = texture.texture_shapes(config)["texture.mean"][0]
        self.mean, self.spread = Given(jnp.zeros(i)), Given(jnp.ones(i))
        single = Layers(layers.rngs, jnp.float32, jax.lax.Precision.HIGHEST)
        hidden = []
        for o in config.texture.hidden:
            hidden.append(single.linear(i, o))
            i = o
        self.hidden = nnx.List(hidden)
        self.out = single.linear(i, 1)
        self.out.kernel[...] = jnp.zeros((i, 1))

    def __call__(self, audio: jax.Array, magnitude: jax.Array) -> jax.Array:
        x = jax.lax.stop_gradient(self.statistics(audio, magnitude))
        head = self.config.texture
        assert head is not None
        x = texture.normalised(x, self.mean[...], self.spread[...], head, jnp)
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.out(x)[:, 0]

    def statistics(self, audio: jax.Array, magnitude: jax.Array) -> jax.Array:
        """What the head reads: audio [B, N], its magnitude [B, n_bins, n_frames] -> [B, K]."""
        head, rate = self.config.texture, self.config.front_end.sample_rate
        assert head is not None
        spectrograms = texture.spectrograms(audio, magnitude, self.config, dsp.stft_magnitude)
        parts = [texture_xla.statistics(m, n, head, rate) for n, m in spectrograms]
        return jnp.concatenate(parts, axis=-1)


class FrontEndTensors(nnx.Module):
    """What the front end is given as tensors; empty for the presets."""

    def __init__(self, front_end: cfg.FrontEnd):
        size = (front_end.n_mels, front_end.n_bins)
        window, mel = front_end.window == "given", front_end.mel_scale == "given"
        self.window = Given(jnp.zeros(front_end.n_fft)) if window else None
        self.mel = Given(jnp.zeros(size)) if mel else None


class ArtifactNet(nnx.Module):
    """Audio [B, segment_samples] float32, in [-1, 1] -> P(AI) [B] float32 in [0, 1].

    `dtype` is what the convolutions compute in (float32 or bfloat16); `precision` applies to
    their float32 products: HIGHEST by default, DEFAULT lets a GPU use TF32. Every segment stands
    by itself; the maximum of a joint rule "song" comes from the caller of `classify`.
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
        self.front_end = FrontEndTensors(config.front_end)
        self.unet: ArtifactUNet | LayerNetwork
        self.cnn: ForensicCNN | LayerNetwork
        if isinstance(config.unet, cfg.Imported):
            self.unet = LayerNetwork(config.unet.layers, layers)
        else:
            self.unet = ArtifactUNet(config.unet, layers)
        if isinstance(config.cnn, cfg.Imported):
            self.cnn = LayerNetwork(config.cnn.layers, layers)
        else:
            self.cnn = ForensicCNN(config.cnn, len(config.front_end.channels), layers)
        self.texture = None if config.texture is None else TextureHead(config, layers)

    def __call__(self, audio: jax.Array) -> jax.Array:
        return nnx.sigmoid(self.logit(audio))

    def logit(self, audio: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logit of P(AI): [B, segment_samples] -> [B]; `rngs` as in `ForensicCNN`."""
        magnitude = self.magnitude(audio)
        views = self.views(self.mask(magnitude) * magnitude)
        logit = self.classify(views, dsp.loudest(views, self.config.front_end), rngs)
        return logit if self.texture is None else logit + self.texture(audio, magnitude)

    def magnitude(self, audio: jax.Array) -> jax.Array:
        """Audio [B, segment_samples] -> magnitude [B, n_bins, n_frames]."""
        window = self.front_end.window
        return dsp.stft_magnitude(
            audio, self.config.front_end, None if window is None else window[...]
        )

    def mask(self, magnitude: jax.Array) -> jax.Array:
        """Magnitude [B, n_bins, n_frames] -> mask in [0, mask_max], same shape."""
        if isinstance(self.unet, LayerNetwork):
            return self.unet(magnitude[:, None])[:, 0]
        return self.unet(magnitude)

    def views(self, residual: jax.Array) -> jax.Array:
        """Residual [B, n_bins, n_frames] -> dB of its views [B, 3, n_mels, T], before the clamp."""
        mel = self.front_end.mel
        return dsp.mel_views(residual, self.config.front_end, None if mel is None else mel[...])

    def classify(
        self, views: jax.Array, loudest: jax.Array, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Views and the maxima to clamp below [B, 3] (see `dsp.loudest`) -> logit [B]."""
        channels = dsp.channels(views, self.config.front_end, loudest)
        return self.decide(channels, rngs)

    def decide(self, channels: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Channels [B, C, n_mels, T] -> logit [B]."""
        if isinstance(self.cnn, LayerNetwork):
            return self.cnn(channels).reshape(len(channels))
        return self.cnn(channels, rngs)
