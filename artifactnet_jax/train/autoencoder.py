"""Small autoencoders with a residual vector quantiser (RVQ): what `rvq` trains.

SoundStream's layout (Zeghidour et al. 2021), small enough to be trained in minutes on two cores:
convolutions take the waveform down by strides, a stack of codebooks quantises what comes out, each
what the ones before it left, and the decoder goes the same way back. Nothing wide runs at 44.1 kHz.
float32 throughout, [batch, time, features].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from artifactnet_jax.data.augment import RATE

EMPHASIS = 0.85  # of a / z in 1 - a / z, before the encoder: the treble of music is faint
FIRST_OVERLAP = 4  # strides that the kernel next to the waveform covers; the others two
LAST_KERNEL = 7  # taps, at 44.1 kHz
DECAY = 7  # a power of 2: taps of the de-emphasis, after which it is at 1e-9
CODE_DECAY = 0.98  # per step, of the moving averages that the codebooks are
DEAD = 0.03  # a code with less than this share of its even part of the vectors is drawn anew
LLOYD = 8  # iterations of k-means at the start of the quantiser

# Strides of the encoder's stages from the waveform on, and features after each.
LAYOUTS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((16, 8), (64, 192)),
    ((8, 4, 4), (32, 96, 192)),
    ((32, 8), (96, 224)),
    ((16, 4), (64, 160)),
    ((16, 4, 4), (48, 96, 192)),
    ((8, 8), (48, 160)),
    ((32, 4, 4), (96, 160, 256)),
    ((64, 2), (160, 224)),
)
KBPS = (8.0, 32.0)  # range that `codecs` draws from

Decoder = Literal["transposed", "nearest", "linear"]


@dataclasses.dataclass(frozen=True)
class Codec:
    """One autoencoder of the family.

    A decoder of kind "transposed" upsamples by transposed convolutions, "nearest" and "linear" by
    repetition or linear interpolation, each followed by a convolution.
    """

    strides: tuple[int, ...] = (16, 8)  # of the encoder's stages; their product is the hop
    widths: tuple[int, ...] = (64, 192)  # features after each stage
    latent: int = 64  # features that are quantised
    codes: int = 512  # in a codebook
    depth: int = 8  # codebooks
    decoder: Decoder = "transposed"
    activation: Literal["snake", "elu"] = "snake"
    kernel: int = 5  # taps of the residual units
    dilations: tuple[int, ...] = (1, 3)  # one residual unit for each
    full_rate: int = 8  # features at 44.1 kHz, before the last convolution

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.strides)

    @property
    def kbps(self) -> float:
        """kbit/s of the codes."""
        return RATE / self.hop * self.depth * math.log2(self.codes) / 1000

    @property
    def context(self) -> int:
        """Samples on either side of a frame that its reconstruction may depend on; whole frames."""
        units = sum(self.kernel // 2 * dilation for dilation in self.dilations)
        frames = [math.prod(self.strides[: i + 1]) for i in range(len(self.strides))]
        # Per stage units in encoder and decoder, a strided convolution, an upsampling.
        reach = sum(frame * (2 * units + 2) + 2 * frame for frame in frames)
        reach += 2 * self.hop + LAST_KERNEL // 2  # around the quantiser, and at 44.1 kHz
        reach += 2**DECAY
        frames_reached: int = math.ceil(reach / self.hop)
        return frames_reached * self.hop

    @property
    def name(self) -> str:
        """Strides, codes, decoder and activation: different codecs have different names."""
        strides = "x".join(map(str, self.strides))
        return f"{strides}-{self.codes}x{self.depth}-{self.decoder}-{self.activation}"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Codec:
        """Inverse of dataclasses.asdict, through JSON; TypeError for an unknown key."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }
        return cls(**values)


def codecs(n: int, seed: int) -> list[Codec]:
    """The first n of an endless row of different codecs; fewer are the beginning of more.

    Layouts and decoders take turns, in an order that the seed gives; sizes are drawn so that the
    codes come to `KBPS`.
    """
    rng = np.random.default_rng(seed)
    layouts = rng.permutation(len(LAYOUTS))
    decoders = rng.permutation(np.array(["transposed", "nearest", "linear"]))
    activations = rng.permutation(np.array(["snake", "elu"]))
    found: dict[str, Codec] = {}
    turn = 0
    while len(found) < n:
        strides, widths = LAYOUTS[layouts[turn % len(LAYOUTS)]]
        drawn = Codec(
            strides,
            widths,
            codes=int(rng.choice([256, 512, 1024])),
            depth=int(rng.integers(4, 13)),
            decoder=str(decoders[turn % len(decoders)]),  # type: ignore[arg-type]
            activation=str(activations[turn // 2 % 2]),  # type: ignore[arg-type]
        )
        if KBPS[0] <= drawn.kbps <= KBPS[1] and drawn.name not in found:
            found[drawn.name] = drawn
            turn += 1
    return list(found.values())


# --- the network -----------------------------------------------------------------------------


def emphasise(audio: jax.Array) -> jax.Array:
    """Pre-emphasis of [B, n], which is taken to begin after silence."""
    return audio - EMPHASIS * jnp.pad(audio, ((0, 0), (1, 0)))[:, :-1]


def deemphasise(audio: jax.Array) -> jax.Array:
    """The inverse: 1 / (1 - a / z) to 2**DECAY taps, as the product of 1 + (a / z)**(2**k)."""
    for k in range(DECAY):
        shift = 2**k
        audio = audio + EMPHASIS**shift * jnp.pad(audio, ((0, 0), (shift, 0)))[:, :-shift]
    return audio


class Activation(nnx.Module):
    """Snake, x + sin^2(a x) / a with a learned for each feature, or ELU."""

    def __init__(self, features: int, kind: str):
        self.frequency = nnx.Param(jnp.ones(features)) if kind == "snake" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, features] -> the same shape."""
        if self.frequency is None:
            return nnx.elu(x)
        a = self.frequency[...][None, None, :]
        return x + jnp.sin(a * x) ** 2 / (a + 1e-6)


class Random:
    """Initial tensors, drawn by NumPy: compiling as many random functions takes a minute."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)
        self._unused = nnx.Rngs(0)

    def normal(self, shape: tuple[int, ...], variance: float) -> jax.Array:
        """Normal numbers of mean 0."""
        draws = self._rng.standard_normal(shape, np.float32)
        return jnp.asarray(draws * np.float32(math.sqrt(variance)))

    def conv(self, i: int, o: int, taps: int, *, zero: bool = False, **options: Any) -> nnx.Conv:
        """A 1-D convolution that keeps the variance, or gives zeros."""
        variance = 0.0 if zero else 1 / (taps * i)
        return nnx.Conv(
            i,
            o,
            (taps,),
            kernel_init=lambda key, shape, *_: self.normal(shape, variance),
            rngs=self._unused,
            **options,
        )


class ResidualUnit(nnx.Module):
    """Dilated and pointwise convolution, each after an activation; the identity at first."""

    def __init__(self, features: int, codec: Codec, dilation: int, random: Random):
        self.activation1 = Activation(features, codec.activation)
        self.conv1 = random.conv(features, features, codec.kernel, kernel_dilation=dilation)
        self.activation2 = Activation(features, codec.activation)
        self.conv2 = random.conv(features, features, 1, zero=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, features] -> the same shape."""
        return x + self.conv2(self.activation2(self.conv1(self.activation1(x))))


@functools.cache
def _interpolation(stride: int, overlap: int, kind: Decoder) -> tuple[np.ndarray, tuple[int, int]]:
    """Float32 [L, taps] from a learned kernel to the whole one, and positions before and after.

    L is a multiple of the stride; a position's own samples come after `before` strides of it.
    """
    taps = overlap * stride + (kind != "transposed")
    response = {
        "transposed": np.ones(1),
        "nearest": np.ones(stride),
        "linear": np.bartlett(2 * stride + 1)[1:-1],
    }[kind]
    size = taps + len(response) - 1
    left = (size - stride) // 2  # the middle of the response lies in that of its samples
    before, after = -(-left // stride), -(-(size - stride - left) // stride)
    matrix = np.zeros(((before + 1 + after) * stride, taps), np.float32)
    for tap in range(taps):
        start = before * stride - left + tap
        matrix[start : start + len(response), tap] = response
    return matrix, (before, after)


class Upsample(nnx.Module):
    """[B, T, i] -> [B, T * stride, o]: zero-stuffing, interpolation, then a convolution.

    Interpolation and convolution are one transposed convolution, whose kernel is the learned one
    convolved with a box ("nearest") or a triangle ("linear"), computed phase by phase at the low
    rate. The spectrum of the box is 0 at multiples of that rate, the triangle's twice so: such are
    the notches and the images that these decoders leave.
    """

    def __init__(self, i: int, o: int, stride: int, overlap: int, kind: Decoder, random: Random):
        self.shape = stride, overlap, kind
        matrix, _ = _interpolation(*self.shape)
        power = float(np.sum(matrix**2)) / stride  # output and input begin with equal variance
        self.kernel = nnx.Param(random.normal((matrix.shape[1], i, o), 1 / (i * power)))
        self.bias = nnx.Param(jnp.zeros(o))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, i] -> [B, T * stride, o]."""
        matrix, (before, after) = _interpolation(*self.shape)
        stride, (_, i, o) = self.shape[0], self.kernel.shape
        whole = jnp.einsum("lk,kio->lio", jnp.asarray(matrix), self.kernel[...])
        phases = whole.reshape(-1, stride, i, o)[::-1]
        kernel = jnp.swapaxes(phases, 1, 2).reshape(len(phases), i, stride * o)
        y = jax.lax.conv_general_dilated(
            x, kernel, (1,), [(after, before)], dimension_numbers=("NWC", "WIO", "NWC")
        )
        return y.reshape(len(x), -1, o) + self.bias[...][None, None, :]


class Autoencoder(nnx.Module):
    """Encoder and decoder of a codec; the quantiser goes between them. float32."""

    def __init__(self, codec: Codec, seed: int = 0):
        random = Random(seed)

        def units(features: int) -> list[nnx.Module]:
            return [ResidualUnit(features, codec, d, random) for d in codec.dilations]

        encoder: list[Any] = []
        i, overlap = 1, FIRST_OVERLAP
        for stride, o in zip(codec.strides, codec.widths, strict=True):
            pad = (overlap - 1) * stride
            padding = [(pad // 2, pad - pad // 2)]
            encoder.append(random.conv(i, o, overlap * stride, strides=stride, padding=padding))
            encoder += units(o)
            i, overlap = o, 2
        encoder += [Activation(i, codec.activation), random.conv(i, codec.latent, 3)]
        decoder: list[Any] = [random.conv(codec.latent, i, 3)]
        outs = (codec.full_rate, *codec.widths[:-1])
        for k in reversed(range(len(outs))):
            i, o, overlap = codec.widths[k], outs[k], 2 if k else FIRST_OVERLAP
            decoder += [*units(i), Activation(i, codec.activation)]
            decoder.append(Upsample(i, o, codec.strides[k], overlap, codec.decoder, random))
        decoder += [Activation(o, codec.activation), random.conv(o, 1, LAST_KERNEL)]
        self.encoder, self.decoder = nnx.List(encoder), nnx.List(decoder)

    def encode(self, audio: jax.Array) -> jax.Array:
        """[B, n], n a multiple of the hop -> latent [B, n / hop, latent]."""
        x = emphasise(audio)[..., None]
        for layer in self.encoder:
            x = layer(x)
        return x

    def decode(self, latent: jax.Array) -> jax.Array:
        """[B, T, latent] -> audio [B, T * hop]."""
        x = latent
        for layer in self.decoder:
            x = layer(x)
        return deemphasise(x[..., 0])


# --- the quantiser ---------------------------------------------------------------------------


class Codebooks(NamedTuple):
    """Moving averages over training: `vectors` are the codes, `total` / `usage`."""

    vectors: jax.Array  # [depth, codes, latent]
    usage: jax.Array  # [depth, codes], vectors per batch
    total: jax.Array  # [depth, codes, latent]


def nearest(vectors: jax.Array, book: jax.Array) -> jax.Array:
    """Index of the code at the least distance: [N, D], [codes, D] -> int32 [N]."""
    products = jnp.matmul(vectors, book.T, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.sum(book**2, axis=1)[None, :] - 2 * products
    return jnp.argmin(distance, axis=1).astype(jnp.int32)


def quantise(vectors: jax.Array, books: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes int32 [depth, N] of vectors [N, D], and what each codebook was given [depth, N, D].

    Each of `books` [depth, codes, D] quantises what the ones before it have left.
    """

    def level(rest: jax.Array, book: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        code = nearest(rest, book)
        return rest - book[code], (code, rest)

    return jax.lax.scan(level, vectors, books)[1]


def dequantise(codes: jax.Array, books: jax.Array) -> jax.Array:
    """Codes int32 [depth, N] -> vectors [N, D]: the sum over the codebooks."""
    return jnp.sum(jax.vmap(lambda book, code: book[code])(books, codes), axis=0)


def straight_through(
    latent: jax.Array, books: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Latent [B, T, D] -> quantised latent, commitment loss, codes and inputs as of `quantise`.

    The quantised latent's gradient goes to the latent as if there were no quantiser. The loss is
    the mean square of what each codebook leaves, over that of the latent; it moves the latent only.
    """
    books = jax.lax.stop_gradient(books)
    vectors = latent.reshape(-1, latent.shape[-1])
    codes, inputs = quantise(vectors, books)
    quantised = dequantise(codes, books)
    left = jnp.concatenate([inputs[1:], (vectors - quantised)[None]])
    scale = jax.lax.stop_gradient(jnp.mean(vectors**2)) + 1e-12
    commitment = jnp.sum(jnp.mean(left**2, axis=(1, 2))) / scale
    passed = latent + jax.lax.stop_gradient(quantised.reshape(latent.shape) - latent)
    return passed, commitment, codes, jax.lax.stop_gradient(inputs)


def _sums(vectors: jax.Array, code: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Number and sum of the vectors of each of n codes."""
    ones = jnp.ones(len(vectors), vectors.dtype)
    return jax.ops.segment_sum(ones, code, n), jax.ops.segment_sum(vectors, code, n)


def moved(books: Codebooks, codes: jax.Array, inputs: jax.Array, key: jax.Array) -> Codebooks:
    """Codebooks after a batch; a code that hardly any vector chooses becomes one of the batch."""
    n = books.vectors.shape[1]
    even = inputs.shape[1] / n

    def level(
        usage: jax.Array, total: jax.Array, code: jax.Array, rest: jax.Array, key: jax.Array
    ) -> Codebooks:
        number, vectors = _sums(rest, code, n)
        usage = CODE_DECAY * usage + (1 - CODE_DECAY) * number
        total = CODE_DECAY * total + (1 - CODE_DECAY) * vectors
        drawn = rest[jax.random.randint(key, (n,), 0, len(rest))]
        dead = usage < DEAD * even
        usage = jnp.where(dead, even, usage)
        total = jnp.where(dead[:, None], drawn * even, total)
        return Codebooks(total / usage[:, None], usage, total)

    keys = jax.random.split(key, len(codes))
    return jax.vmap(level)(books.usage, books.total, codes, inputs, keys)


@functools.partial(jax.jit, static_argnames=("depth", "n", "per_batch"))
def first_codebooks(
    vectors: jax.Array, key: jax.Array, depth: int, n: int, per_batch: int
) -> Codebooks:
    """Codebooks of n codes by k-means on vectors [N, D], N >= n, level by level."""

    def level(rest: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def lloyd(_: int, book: jax.Array) -> jax.Array:
            number, total = _sums(rest, nearest(rest, book), n)
            mean = total / jnp.maximum(number, 1)[:, None]
            return jnp.where(number[:, None] > 0, mean, book)

        start = rest[jax.random.permutation(key, len(rest))[:n]]
        book = jax.lax.fori_loop(0, LLOYD, lloyd, start)
        return rest - book[nearest(rest, book)], book

    books = jax.lax.scan(level, vectors, jax.random.split(key, depth))[1]
    usage = jnp.full((depth, n), per_batch / n, vectors.dtype)
    return Codebooks(books, usage, books * usage[..., None])
