"""The networks of `presets`, or of a foreign graph, as Flax modules; and the whole detector.

    audio [B, 176400] -> ArtifactNet -> P(AI) [B]

`ArtifactUNet` and `ForensicCNN` run a list of layers: to change a block, edit the list. Values are
NHWC (height = frequency, width = time), kernels HWIO. Parameters and the front end are float32.
`dtype` chooses what the products compute in, `precision` how float32 products are taken on hardware
that would round them to TF32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from artifactnet_jax import config as cfg
from artifactnet_jax import dsp_jax, texture
from artifactnet_jax.forward import Forward
from artifactnet_jax.layers import FACTORS, PRODUCTS, Layer
from artifactnet_jax.operators import apply, depth_to_space, evaluate
from artifactnet_jax.presets import Layers, networks

if TYPE_CHECKING:
    from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST
MOMENTUM = 0.9  # of the running statistics of batch norms


def _wide(x: jax.Array) -> jax.Array:
    """float32, or float64 where that is computed in: what follows is no matter of `dtype`."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


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
    "selu": lambda x, alpha, gamma: gamma * jax.nn.elu(x, alpha),
    "hard_sigmoid": lambda x, alpha, beta: jnp.clip(alpha * x + beta, 0, 1),
    "gelu": lambda x, approximate: jax.nn.gelu(x, approximate=approximate == "tanh"),
}
# Sums over many positions, or over samples of uneven weight: in float32 whatever `dtype` is.
WIDE = ("batch_norm", "group_norm", "mean", "sum", "avg_pool", "softmax", "resize")


def transposed_conv(
    x: Float[Array, "B H W I"],
    kernel: Float[Array, "kh kw I O"],
    attrs: Mapping[str, Any],
    precision: Any,
) -> Float[Array, "B H2 W2 O"]:
    """Transposed convolution without bias.

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
    out: jax.Array = _conv(x, kernel, (1, 1), ends, precision=precision)
    out = depth_to_space(out, rows, cols)
    short = [(0, max(0, n - m)) for n, m in zip(size, out.shape[1:3], strict=True)]
    if short != [(0, 0), (0, 0)]:  # output padding that no input reaches
        out = jnp.pad(out, ((0, 0), *short, (0, 0)))
    (top, bottom), (left, right) = attrs["padding"]
    return out[:, top : size[0] - bottom, left : size[1] - right]


_conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Given(nnx.Variable[Any]):
    """A constant that is never trained: of the front end of a graph, of the texture head."""


class Group(nnx.Module):
    """Variables whose names go on alike: a place in the tree of parameters."""

    def __init__(self, leaves: Mapping[str, nnx.Variable[Any]]):
        """`leaves` by dotted name; numbers in names become places in an `nnx.List`."""
        for part, child in _tree(leaves).items():
            setattr(self, part, child)

    def variable(self, name: str) -> nnx.Variable[Any]:
        """The parameter or statistic of a dotted name."""
        node: Any = self
        for part in [name] if hasattr(self, name) else name.split("."):
            node = node[int(part)] if isinstance(node, nnx.List) else getattr(node, part)
        found: nnx.Variable[Any] = node
        return found


def _tree(leaves: Mapping[str, nnx.Variable[Any]]) -> dict[str, Any]:
    """First part of the names -> the variable of that name, a List or a Group."""
    parts: dict[str, dict[str, nnx.Variable[Any]]] = {}
    for name, variable in leaves.items():
        first, _, rest = name.partition(".")
        parts.setdefault(first, {})[rest] = variable
    done: dict[str, Any] = {}
    for part, below in parts.items():
        if all(name.split(".")[0].isdigit() for name in below):
            done[part] = nnx.List(list(_tree(below).values()))
        else:
            done[part] = below[""] if "" in below else Group(below)
    return done


def _drawn(leaf: str, shape: tuple[int, ...], rngs: nnx.Rngs) -> jax.Array:
    """First value of a tensor.

    A key is drawn for a bias too, and for a scale: a seed gives the network that `nnx.Conv`,
    `nnx.Linear` and `nnx.BatchNorm` would make of it.
    """
    if leaf in (*FACTORS, "bias"):
        key = rngs.params()
    if leaf == "kernel":
        return nnx.initializers.lecun_normal()(key, shape, jnp.float32)
    return jnp.ones(shape) if leaf in ("scale", "var", "value", "spread") else jnp.zeros(shape)


class ListNetwork(Group):
    """A network drawn as layers: [B, H, W, C] or [B, C] -> the last layer's value.

    State paths are the names of a weights file, such as encoder.0.conv1.kernel. Products compute in
    `dtype`. Norms, sums over many positions, and what follows the last product, are float32 or
    better. Unless `train()` is called, batch norms use the running statistics, and dropout does
    nothing.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        precision: Any = HIGHEST,
        flat: bool = False,
    ):
        """`flat` for names that may be anything: variables are attributes "layer.leaf" then."""
        self.layers, self.dtype, self.precision = layers, dtype, precision
        self.use_running_average = self.deterministic = True
        self.last_product = [x.name for x in layers if x.op in PRODUCTS][-1:]
        leaves: dict[str, nnx.Variable[Any]] = {}
        for x in layers:
            for leaf, shape in sorted(x.tensors, key=lambda pair: pair[0] not in FACTORS):
                kind = nnx.BatchStat if leaf in ("mean", "var") else nnx.Param
                value = jnp.zeros(shape) if x.op == "bias" else _drawn(leaf, shape, rngs)
                leaves[f"{x.name}.{leaf}"] = kind(value)
        super().__init__({} if flat else leaves)
        for name, variable in leaves.items() if flat else ():
            setattr(self, name, variable)

    def run(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """The last layer's value; `rngs` gives the dropout key, in training mode."""
        last = self.layers[-1].name
        return self.values(x, [last], rngs)[last]

    def values(
        self, x: jax.Array, names: Sequence[str], rngs: nnx.Rngs | None = None
    ) -> dict[str, jax.Array]:
        """The values of these layers by name. What comes behind the last of them is not run."""
        last = max(k for k, layer in enumerate(self.layers) if layer.name in names)
        seen: dict[str, jax.Array] = {}

        def compute(layer: Layer, inputs: list[jax.Array], spare: bool) -> jax.Array:
            value = self._compute(layer, inputs, rngs)
            if layer.name in names:
                seen[layer.name] = value
            return value

        evaluate(self.layers[: last + 1], x, compute)
        return {name: seen[name] for name in names}

    def _compute(self, x: Layer, inputs: list[jax.Array], rngs: nnx.Rngs | None) -> jax.Array:
        if len({value.dtype for value in inputs}) > 1:
            inputs = [_wide(value) for value in inputs]
        first, dtype = inputs[0], inputs[0].dtype
        own = {leaf: self.variable(f"{x.name}.{leaf}")[...] for leaf, _ in x.tensors}
        if x.op in PRODUCTS:
            first = first if dtype == jnp.float64 else first.astype(self.dtype)
            product = self._product(x, first, own)
            return _wide(product) if x.name in self.last_product else product
        if x.op in ELEMENTWISE:
            return ELEMENTWISE[x.op](first, **x.attrs)
        if x.op == "dropout" and not self.deterministic:
            return _dropout(first, x.attrs["rate"], rngs)
        if x.op in WIDE:
            inputs = [_wide(value) for value in inputs]
        own = {leaf: value.astype(inputs[0].dtype) for leaf, value in own.items()}
        if x.op == "batch_norm" and not self.use_running_average:
            own |= self._batch_statistics(x, inputs[0])
        out: jax.Array = apply(x, inputs, own, jnp).astype(dtype)
        return out

    def _product(self, x: Layer, value: jax.Array, own: Mapping[str, jax.Array]) -> jax.Array:
        kernel = own["kernel"].astype(value.dtype)
        if x.op == "conv":
            out = _conv(
                value,
                kernel,
                x.attrs["strides"],
                x.attrs["padding"],
                rhs_dilation=x.attrs["dilations"],
                feature_group_count=x.attrs["groups"],
                precision=self.precision,
            )
        elif x.op == "conv_transpose":
            out = transposed_conv(value, kernel, x.attrs, self.precision)
        else:
            out = jnp.matmul(value, kernel, precision=self.precision)
        if "bias" not in own:
            return out
        return out + own["bias"].astype(out.dtype).reshape((1,) * (out.ndim - 1) + (-1,))

    def _batch_statistics(self, x: Layer, value: jax.Array) -> dict[str, jax.Array]:
        """Mean and variance of this batch; the running ones move towards them."""
        axes = tuple(range(value.ndim - 1))
        batch = {"mean": jnp.mean(value, axis=axes), "var": jnp.var(value, axis=axes)}
        for leaf, new in batch.items():
            running = self.variable(f"{x.name}.{leaf}")
            moved = MOMENTUM * running[...] + (1 - MOMENTUM) * new.astype(running.dtype)
            running[...] = moved
        return batch


def _dropout(x: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    if rngs is None:
        raise ValueError("dropout in training mode needs rngs")
    kept = jax.random.bernoulli(rngs.dropout(), 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))


class ArtifactUNet(ListNetwork):
    """Bounded-mask UNet: magnitude [B, F, T] -> mask of the same shape in [0, mask_max] (III-B).

    The layers of `presets.unet_layers`, read from top to bottom; (C, H, W) of v94 at 4 s:

        input         (1, 1025, 345)      edge: log, less its mean
        pad           (1, 1032, 352)      to a multiple of 8
        encoder.0     (32, 1032, 352) ------------------------------+   a residual block,
          down.0                                                    |   then 4x4, stride 2
        encoder.1     (64, 516, 176) ------------------------+      |
          down.1                                             |      |
        encoder.2     (128, 258, 88) ----------------+       |      |
          down.2                                     |       |      |
        bottom, gated (256, 129, 44)                 |       |      |
          up.0                                       |       |      |   2x2 transposed, stride 2
        decoder.0     (128, 258, 88) <-- concat -----+       |      |
          up.1                                               |      |
        decoder.1     (64, 516, 176) <-- concat -------------+      |
          up.2                                                      |
        decoder.2     (32, 1032, 352) <-- concat -------------------+
        head          (1, 1032, 352)      1x1; crop, sigmoid, times mask_max
    """

    def __call__(self, magnitude: Float[Array, "B F T"]) -> Float[Array, "B F T"]:
        """Magnitude -> mask."""
        return self.run(magnitude[..., None])[..., 0]


class ForensicCNN(ListNetwork):
    """Compact classifier: channels [B, C, n_mels, T] -> logit [B] (III-D).

    The layers of `presets.cnn_layers`; (C, H, W) of the presets at 4 s:

        input     (7, 128, 345)
        conv.0    (32, 128, 345)   3x3, batch norm, ReLU; pool.0: 2x2
        conv.1    (64, 64, 172)    the same
        conv.2    (128, 32, 86)    the same
        conv.3    (256, 16, 43)    without pooling
        mean      (256, 1, 1)
        hidden    (128,)           ReLU, dropout
        out       (1,)
    """

    def __call__(
        self, channels: Float[Array, "B C M T"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, " B"]:
        """Channels -> logit; `rngs` gives the dropout key in training."""
        return self.run(jnp.moveaxis(channels, 1, -1), rngs).reshape(len(channels))


class ArtifactNet(Forward, nnx.Module):
    """Audio [B, segment_samples] float32, in [-1, 1] -> P(AI) [B] float32 in [0, 1].

    Its stages are those of `Forward`. `dtype` is what the products compute in (float32 or
    bfloat16). `precision` applies to float32 products: HIGHEST by default, DEFAULT lets a GPU use
    TF32. Every segment stands by itself; the maximum of a joint rule "song" comes from the caller
    of `channels`.
    """

    lib = dsp_jax
    stft = staticmethod(dsp_jax.stft_magnitude)
    # Whose kernels are whose: a compiled program names these scopes.
    magnitude = jax.named_scope("front_end")(Forward.magnitude)
    parts = jax.named_scope("hpss")(Forward.parts)
    mel_db = jax.named_scope("front_end")(Forward.mel_db)
    channels = jax.named_scope("front_end")(Forward.channels)
    texture_logit = jax.named_scope("texture")(Forward.texture_logit)

    def __init__(
        self,
        config: cfg.Config,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        precision: Any = HIGHEST,
        parts: Mapping[str, Layers] | None = None,
    ):
        """`parts`: the networks as they are run, by default as they are trained."""
        fe, parts = config.front_end, parts or networks(config)
        how: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "precision": precision}
        self.config = config
        window = {"window": Given(jnp.zeros(fe.n_fft))} if fe.window == "given" else {}
        mel = {"mel": Given(jnp.zeros((fe.n_mels, fe.n_bins)))} if fe.mel_scale == "given" else {}
        self.front_end = Group(window | mel)
        foreign = [isinstance(part, cfg.Imported) for part in (config.unet, config.cnn)]
        self.unet = ArtifactUNet(parts["unet"], **how, flat=foreign[0])
        self.cnn = ForensicCNN(parts["cnn"], **how, flat=foreign[1])
        self.texture = None if config.texture is None else TextureHead(config, rngs)

    @property
    def window(self) -> jax.Array | None:
        """Window [n_fft] that a foreign graph gives."""
        found = getattr(self.front_end, "window", None)
        return None if found is None else found[...]

    @property
    def mel(self) -> jax.Array | None:
        """Mel matrix [n_mels, n_bins] that a foreign graph gives."""
        found = getattr(self.front_end, "mel", None)
        return None if found is None else found[...]

    def __call__(self, audio: Float[Array, "B N"]) -> Float[Array, " B"]:
        """Audio -> P(AI)."""
        return nnx.sigmoid(self.logit(audio))

    def mask(self, magnitude: Float[Array, "B F T"]) -> Float[Array, "B F T"]:
        """Magnitude -> mask in [0, mask_max]."""
        with jax.named_scope("unet"):
            return self.unet(magnitude)

    def classify(
        self, channels: Float[Array, "B C M T"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, " B"]:
        """Channels -> the CNN's logit; `rngs` as in `ForensicCNN`."""
        with jax.named_scope("cnn"):
            return self.cnn(channels, rngs)

    def texture_head(self, statistics: Float[Array, "B K"]) -> Float[Array, " B"]:
        """Statistics -> what is added to the CNN's logit."""
        assert self.texture is not None
        return self.texture(statistics)


class TextureHead(Group):
    """Statistics of spectrograms [B, K] -> what is added to the CNN's logit [B].

    The output starts at 0: a network that is trained from scratch does not feel it.
    """

    def __init__(self, config: cfg.Config, rngs: nnx.Rngs):
        assert config.texture is not None
        self.config, self.names = config.texture, tuple(texture.texture_shapes(config))
        leaves: dict[str, nnx.Variable[Any]] = {}
        for name, shape in texture.texture_shapes(config).items():
            leaf = name.rsplit(".", 1)[1]
            kind = Given if leaf in ("mean", "spread") else nnx.Param
            value = _drawn(leaf, shape, rngs)
            leaves[name.removeprefix("texture.")] = kind(value)
        leaves["out.kernel"][...] = jnp.zeros_like(leaves["out.kernel"][...])
        super().__init__(leaves)

    def __call__(self, statistics: Float[Array, "B K"]) -> Float[Array, " B"]:
        """Statistics -> logits; no gradient reaches the statistics."""
        tensors = {name: self.variable(name.removeprefix("texture."))[...] for name in self.names}
        x = jax.lax.stop_gradient(statistics)
        logit: jax.Array = texture.logit(x, self.config, tensors, dsp_jax)
        return logit
