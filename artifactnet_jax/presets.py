"""The two networks, each read from top to bottom as the paper's figure.

They are as they are trained: batch norms stand apart, and no size of the input is written down.
`passes` makes of them what is run and exported.
"""

from __future__ import annotations

from typing import Any

from artifactnet_jax import config as cfg
from artifactnet_jax.layers import INPUT, Layer, Shape, Size, layer, layer_flops, tensor_shapes
from artifactnet_jax.texture import texture_shapes

Layers = tuple[Layer, ...]


def unet_layers(unet: cfg.UNet) -> Layers:
    """ArtifactUNet: magnitude (1, F, T) of any size -> mask of the same shape in [0, mask_max]."""
    figure, (rows, cols) = Figure(), unet.patch
    patches = rows * cols > 1

    if unet.input_scale == "log":  # without the segment's mean: the level tells nothing
        figure.add("clip", "input.floor", low=unet.log_floor, high=None)
        log = figure.add("log", "input.log")
        mean = figure.add("mean", "input.mean", axes="chw")
        figure.add("sub", "input.centred", log, mean)
    figure.add("pad_to_multiple", "pad", multiple=unet.stride)
    if patches:
        figure.conv("stem", 1, unet.stem, unet.patch, stride=unet.patch)
    i, skips = unet.stem if patches else 1, []

    for level, o in enumerate(unet.widths):
        skips.append(figure.residual_block(f"encoder.{level}", i, o))
        figure.conv(f"down.{level}", o, o, (4, 4), stride=(2, 2))
        i = o

    figure.residual_block("bottom", i, unet.bottleneck)
    figure.gated_block("gated", unet.bottleneck)
    i = unet.bottleneck

    for level, o in enumerate(reversed(unet.widths)):
        up = figure.up(f"up.{level}", i, o)
        figure.add("concat", f"decoder.{level}.concat", up, skips.pop(), axis="c")
        figure.residual_block(f"decoder.{level}", 2 * o, o)
        i = o

    figure.conv("head", i, rows * cols)
    if patches:
        figure.add("depth_to_space", "head.map", rows=rows, cols=cols, order="DCR")
    figure.add("crop_to", "crop", figure.last, INPUT)
    figure.add("sigmoid", "sigmoid")
    figure.add("mul", "mask", value=unet.mask_max)
    return tuple(figure.layers)


BOTTLENECK = "gated.relu2"  # of the UNet: what the auxiliary classifier of training reads


def cnn_layers(cnn: cfg.CNN, channels: int) -> Layers:
    """ForensicCNN: channels (C, n_mels, T) of any size -> logit (1,)."""
    figure, i = Figure(), channels
    for level, o in enumerate(cnn.widths):
        figure.conv(f"conv.{level}", i, o, (3, 3))
        figure.norm(f"norm.{level}", o)
        figure.add("relu", f"relu.{level}")
        if level < len(cnn.widths) - 1:
            zero = ((0, 0), (0, 0))
            figure.add("max_pool", f"pool.{level}", kernel=(2, 2), strides=(2, 2), padding=zero)
        i = o
    figure.add("mean", "mean", axes="hw")
    figure.add("flatten", "flatten")
    figure.linear("hidden", i, cnn.hidden)
    figure.add("relu", "hidden.relu")
    figure.add("dropout", "dropout", rate=cnn.dropout)
    figure.linear("out", cnn.hidden, 1)
    return tuple(figure.layers)


class Figure:
    """A network being drawn. Each method adds layers and returns the name of what they give.

    A layer reads the layer before it, unless `of` names others.
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    @property
    def last(self) -> str:
        """Name of what the next layer reads."""
        return self.layers[-1].name if self.layers else INPUT

    def add(
        self, op: str, name: str, *of: str, tensors: dict[str, Shape] | None = None, **attrs: Any
    ) -> str:
        """One layer with these attributes and shapes of tensors."""
        self.layers.append(layer(name, op, of or (self.last,), attrs, tensors))
        return name

    def conv(
        self,
        name: str,
        i: int,
        o: int,
        kernel: Size = (1, 1),
        *of: str,
        stride: Size = (1, 1),
        bias: bool = True,
    ) -> str:
        """Convolution with zero padding that keeps the size, or halves it exactly at stride 2."""
        sides = zip(kernel, stride, strict=True)
        padding = tuple(((k - s + 1) // 2, (k - s) // 2) for k, s in sides)
        attrs = {"strides": stride, "padding": padding, "dilations": (1, 1), "groups": 1}
        tensors: dict[str, Shape] = {"kernel": (*kernel, i, o)} | ({"bias": (o,)} if bias else {})
        return self.add("conv", name, *of, tensors=tensors, **attrs)

    def linear(self, name: str, i: int, o: int) -> str:
        """Product of a vector."""
        return self.add("linear", name, tensors={"kernel": (i, o), "bias": (o,)})

    def norm(self, name: str, features: int) -> str:
        """Batch norm."""
        leaves = ("scale", "bias", "mean", "var")
        return self.add("batch_norm", name, tensors=dict.fromkeys(leaves, (features,)))

    def two_convs(self, name: str, i: int, o: int) -> str:
        """conv3x3-BN-ReLU-conv3x3-BN."""
        self.conv(f"{name}.conv1", i, o, (3, 3), bias=False)
        self.norm(f"{name}.norm1", o)
        self.add("relu", f"{name}.relu1")
        self.conv(f"{name}.conv2", o, o, (3, 3), bias=False)
        return self.norm(f"{name}.norm2", o)

    def residual_block(self, name: str, i: int, o: int) -> str:
        """ReLU of two convolutions plus a shortcut, which is 1x1 where the width changes."""
        x = self.last
        h = self.two_convs(name, i, o)
        short = x if i == o else self.conv(f"{name}.shortcut", i, o, (1, 1), x)
        self.add("add", f"{name}.add", h, short)
        return self.add("relu", f"{name}.relu2")

    def gated_block(self, name: str, features: int) -> str:
        """ReLU of x + h * sigmoid(1x1 convolution of h), where h is two convolutions of x."""
        x = self.last
        h = self.two_convs(name, features, features)
        self.conv(f"{name}.gate", features, features)
        gate = self.add("sigmoid", f"{name}.sigmoid")
        gated = self.add("mul", f"{name}.mul", h, gate)
        self.add("add", f"{name}.add", x, gated)
        return self.add("relu", f"{name}.relu2")

    def up(self, name: str, i: int, o: int) -> str:
        """2x2 transposed convolution of stride 2, as a 1x1 convolution and depth to space.

        Exactly the same sums. XLA would multiply the inserted zeros of a transposed convolution.
        """
        self.conv(f"{name}.conv", i, 4 * o, bias=False)
        self.add("depth_to_space", f"{name}.map", rows=2, cols=2, order="DCR")
        return self.add("bias", name, tensors={"bias": (o,)})


def networks(config: cfg.Config) -> dict[str, Layers]:
    """{"unet", "cnn"} of a config: drawn in a preset's sizes, or as a foreign graph has them."""
    unet, cnn, channels = config.unet, config.cnn, len(config.front_end.channels)
    return {
        "unet": unet.layers if isinstance(unet, cfg.Imported) else unet_layers(unet),
        "cnn": cnn.layers if isinstance(cnn, cfg.Imported) else cnn_layers(cnn, channels),
    }


def input_shapes(config: cfg.Config) -> dict[str, Shape]:
    """{"unet", "cnn"}: shape (C, H, W) of each network's input, for one segment."""
    fe = config.front_end
    return {
        "unet": (1, fe.n_bins, fe.n_frames),
        "cnn": (len(fe.channels), fe.n_mels, fe.n_frames),
    }


def parameter_shapes(config: cfg.Config) -> dict[str, Shape]:
    """Name -> shape of every tensor of a weights file, batch statistics (mean, var) included.

    Convolution kernels are HWIO. A converted graph may also give front_end.window [n_fft] and
    front_end.mel [n_mels, n_bins].
    """
    fe, shapes = config.front_end, dict[str, Shape]()
    if fe.window == "given":
        shapes["front_end.window"] = (fe.n_fft,)
    if fe.mel_scale == "given":
        shapes["front_end.mel"] = (fe.n_mels, fe.n_bins)
    parts = networks(config)
    shapes |= tensor_shapes(parts["unet"], "unet")
    return shapes | texture_shapes(config) | tensor_shapes(parts["cnn"], "cnn")


def flops(config: cfg.Config) -> dict[str, int]:
    """Floating-point operations of the convolutions and linear layers, per segment.

    A multiply-add counts as two. Biases, norms and activations are left out, as is usual.
    Returns {"unet", "cnn", "total"}.
    """
    sizes = input_shapes(config)
    work = {part: layer_flops(found, sizes[part]) for part, found in networks(config).items()}
    return {**work, "total": sum(work.values())}
