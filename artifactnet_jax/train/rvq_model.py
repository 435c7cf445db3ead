"""One RVQ autoencoder: its training on real music, what it makes of a recording, and its file."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import soundfile
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from artifactnet_jax import dsp_jax
from artifactnet_jax.config import FrontEnd
from artifactnet_jax.data.augment import RATE, to_int16
from artifactnet_jax.data.decoded import AudioCache
from artifactnet_jax.data.manifest import Row
from artifactnet_jax.files import replace_file, whole_file, writing
from artifactnet_jax.filterbank import hann, mel_filterbank
from artifactnet_jax.text import USAGE, CommandError, brief, printable
from artifactnet_jax.train.autoencoder import (
    EMPHASIS,
    Autoencoder,
    Codebooks,
    Codec,
    dequantise,
    first_codebooks,
    moved,
    quantise,
    straight_through,
)
from artifactnet_jax.train.losses import multi_resolution_stft, waveform_l1

FORMAT = "artifactnet-jax/rvq/1"

# Training
BATCH = 8  # crops
CROP = 16_384  # samples, 0.37 s
CHECK = 20  # steps between two looks at the loss
LEVEL = 0.1  # rms, full scale, of tracks before they are coded, after pre-emphasis
LEVEL_SPREAD_DB = 6.0  # each crop is made louder or softer by up to that
RATE_OF_LEARNING = 1e-3  # peak; a cosine leads to a twentieth of it
WARMUP = 50  # steps, at most a tenth of all
UNQUANTISED = 0.2  # share of the steps, at the start, without the quantiser
ENVELOPE = 1.0  # weight of the distance of the envelopes
BAND = 8  # bins of 43 Hz, in the envelopes
BAND_FLOOR = 1e-3  # power in a band: that of 16-bit noise, and some
COMMITMENT = 0.25  # weight of the commitment loss
VECTORS_PER_CODE = 6  # that k-means sees

CHUNK = 2**18  # samples re-synthesised at once, 5.9 s; a multiple of every codec's hop
MEASURED = 32  # crops, one of a track
MEASURED_CROP = 2**16  # samples, 1.5 s
FLOOR_DB = 80.0  # below the strongest bin of a crop: the front end's top_db
HIGH_HZ = 10_000.0


@dataclasses.dataclass(frozen=True)
class Track:
    """A real recording, mono on demand."""

    row: Row
    audio: np.ndarray  # int16 [n, 1 or 2], memory-mapped
    gain: float  # that brings it to `LEVEL`

    @classmethod
    def open(cls, row: Row, cache: AudioCache) -> Track:
        """AudioError: the recording cannot be read."""
        audio = cache.get(row.path)
        energy = 0.0
        for start in range(0, len(audio), CHUNK):
            block = _mono(audio, start - 1, min(CHUNK, len(audio) - start) + 1)
            energy += _energy(block[1:] - EMPHASIS * block[:-1])
        return cls(row, audio, LEVEL / max(math.sqrt(energy / len(audio)), 1e-6))


def _energy(block: np.ndarray) -> float:
    return float(np.sum(np.square(block, dtype=np.float64)))


def _mono(audio: np.ndarray, start: int, n: int) -> np.ndarray:
    """float32 [n] of int16 [m, c] from `start` on, zeros where there is nothing."""
    first, stop = max(0, start), max(0, min(start + n, len(audio)))
    out = np.zeros(n, np.float32)
    out[first - start : stop - start] = audio[first:stop].mean(axis=1, dtype=np.float32) / 32768
    return out


class Diverged(Exception):
    """Training came to a loss that is not finite."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained codec: parameters by name, "codebooks" [depth, codes, latent], and its figures."""

    codec: Codec
    tensors: dict[str, np.ndarray]
    figures: dict[str, float]

    @functools.cached_property
    def apply(self) -> Callable[[np.ndarray], tuple[jax.Array, jax.Array]]:
        """Compiled: audio float32 [B, n] -> what the codec makes of it, codes int32 [depth, N]."""

        @jax.jit
        def apply(
            net: Autoencoder, books: jax.Array, audio: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            latent = net.encode(audio)
            codes, _ = quantise(latent.reshape(-1, latent.shape[-1]), books)
            return net.decode(dequantise(codes, books).reshape(latent.shape)), codes

        tensors = {name: jnp.asarray(tensor) for name, tensor in self.tensors.items()}
        books = tensors.pop("codebooks")
        return functools.partial(apply, _network(self.codec, tensors), books)


def _split(codec: Codec) -> tuple[nnx.GraphDef[Autoencoder], nnx.State[Any, Any]]:
    """A codec's network in Flax's two halves, shapes in place of tensors."""
    return nnx.split(nnx.eval_shape(lambda: Autoencoder(codec)))


def _network(codec: Codec, tensors: dict[str, jax.Array]) -> Autoencoder:
    """ValueError when the tensors are not the codec's."""
    graph, state = _split(codec)
    leaves = {_name(path): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    for name in leaves.keys() ^ tensors.keys():
        raise ValueError(f"tensor {name} is {'missing' if name in leaves else 'unexpected'}")
    for name, (_, leaf) in leaves.items():
        if tensors[name].shape != leaf.shape:
            raise ValueError(f"tensor {name} has shape {tensors[name].shape}, not {leaf.shape}")
    filled = [(path, leaf.replace(tensors[name])) for name, (path, leaf) in leaves.items()]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def crops(tracks: Sequence[Track], rng: np.random.Generator) -> np.ndarray:
    """A batch to train on, float32 [BATCH, CROP], zero-padded. All tracks are equally likely."""
    batch = np.zeros((BATCH, CROP), np.float32)
    for crop in batch:
        track = tracks[int(rng.integers(len(tracks)))]
        start = int(rng.integers(max(0, len(track.audio) - CROP) + 1))
        decibel = rng.uniform(-LEVEL_SPREAD_DB, LEVEL_SPREAD_DB)
        crop[:] = _mono(track.audio, start, CROP) * np.float32(track.gain * 10 ** (decibel / 20))
    return batch


def envelope_distance(made: jax.Array, real: jax.Array) -> jax.Array:
    """Mean |difference| of the log power in bands: two [B, n] -> [B].

    Noise cannot be coded as a waveform, and its spectrum is noise in every bin: those two losses
    would give every track the same treble. The power in a band can be coded.
    """
    grid = dataclasses.replace(FrontEnd(), n_fft=1024, hop=256, stft_pad=512)

    def envelope(audio: jax.Array) -> jax.Array:
        power = dsp_jax.stft_magnitude(audio, grid)[:, 1:] ** 2
        batch, bins, frames = power.shape
        bands = power.reshape(batch, bins // BAND, BAND, frames)
        return jnp.log(jnp.mean(bands, axis=2) + BAND_FLOOR)

    return jnp.mean(jnp.abs(envelope(made) - envelope(real)), axis=(1, 2))


def train(
    codec: Codec,
    tracks: Sequence[Track],
    steps: int,
    seed: int,
    tell: Callable[[int], None] = lambda step: None,
) -> Model:
    """Train one codec. The same arguments give the same bits on the same machine.

    The first `UNQUANTISED` of the steps are those of a plain autoencoder; then k-means on its
    latent gives the codebooks, which from there on are moving averages. `tell` is called with the
    number of steps done. Raises Diverged.
    """
    start = time.monotonic()
    begin, step, encode = _functions(codec, steps)
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    net = nnx.state(Autoencoder(codec, seed))
    state, books = begin(net)
    per_batch = BATCH * CROP // codec.hop
    plain = int(UNQUANTISED * steps)
    for k in range(steps):
        if k == plain:
            needed = -(-VECTORS_PER_CODE * codec.codes // per_batch)
            latents = jnp.concatenate([encode(net, crops(tracks, rng)) for _ in range(needed)])
            books = first_codebooks(latents, key, codec.depth, codec.codes, per_batch)
        here = jax.random.fold_in(key, k)
        quantised = np.float32(k >= plain)
        net, state, books, loss = step(net, state, books, crops(tracks, rng), here, quantised)
        if (k + 1) % CHECK == 0 or k + 1 == steps:
            if not math.isfinite(float(loss)):
                raise Diverged(f"the loss is {float(loss)} at step {k + 1} of {steps}")
            tell(k + 1)
    tensors = {_name(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(net)}
    tensors["codebooks"] = np.asarray(books.vectors)
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise Diverged("its parameters are not finite")
    return Model(codec, tensors, {"steps": steps, "seconds": round(time.monotonic() - start, 1)})


@functools.cache
def _functions(codec: Codec, steps: int) -> tuple[Callable[..., Any], ...]:
    """Compiled: what a training begins with besides the network, a step, audio -> latents [N, D].

    A step is the same code with and without the quantiser, `quantised` 1 or 0: to compile it takes
    longer than many steps.
    """
    graph = _split(codec)[0]
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(_schedule(steps), b1=0.8, b2=0.99)
    )

    @jax.jit
    def begin(net: nnx.State[Any, Any]) -> tuple[Any, Codebooks]:
        count = jnp.zeros((codec.depth, codec.codes))
        vectors = jnp.zeros((codec.depth, codec.codes, codec.latent))
        return optimiser.init(net), Codebooks(vectors, count, vectors)

    def loss_of(
        net: nnx.State[Any, Any], books: Codebooks, audio: jax.Array, quantised: jax.Array
    ) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, net)
        latent = model.encode(audio)
        passed, commitment, codes, inputs = straight_through(latent, books.vectors)
        made = model.decode(latent + quantised * (passed - latent))
        distance = waveform_l1(made, audio, audio) + multi_resolution_stft(made, audio)
        distance = distance + ENVELOPE * envelope_distance(made, audio)
        return jnp.mean(distance) + COMMITMENT * quantised * commitment, (codes, inputs)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(
        net: nnx.State[Any, Any],
        state: Any,
        books: Codebooks,
        audio: jax.Array,
        key: jax.Array,
        quantised: jax.Array,
    ) -> tuple[Any, Any, Codebooks, jax.Array]:
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (codes, inputs)), slope = gradient(net, books, audio, quantised)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its int32 counts
            updates, state = optimiser.update(slope, state, net)
        books = moved(books, codes, inputs, key)
        return optax.apply_updates(net, updates), state, books, loss

    @jax.jit
    def encode(net: nnx.State[Any, Any], audio: jax.Array) -> jax.Array:
        return nnx.merge(graph, net).encode(audio).reshape(-1, codec.latent)

    return begin, step, encode


def _schedule(steps: int) -> optax.Schedule:
    peak = RATE_OF_LEARNING
    warm = max(1, min(WARMUP, steps // 10))
    return optax.warmup_cosine_decay_schedule(
        peak / warm, peak, warm, max(steps, warm + 1), peak / 20
    )


# --- what a codec makes of a recording -------------------------------------------------------


def resynthesise(model: Model, track: Track, chunk: int = CHUNK) -> Iterator[np.ndarray]:
    """The track through the codec, in blocks: float32 [<= chunk], as many samples in all.

    Memory does not grow with the track. Each chunk (whole frames) is coded with `Codec.context`
    around it, so that its size makes no difference but for rounding.
    """
    gain, context = np.float32(track.gain), model.codec.context
    for start in range(0, len(track.audio), chunk):
        piece = _mono(track.audio, start - context, chunk + 2 * context)
        made = np.asarray(model.apply(gain * piece[None])[0])[0] / gain
        yield made[context : context + min(chunk, len(track.audio) - start)]


def write_positive(model: Model, track: Track, path: str) -> None:
    """Re-synthesise a track into a 16-bit FLAC file of the same rms. CommandError: a full disk.

    The file appears once it is whole. Samples that would exceed full scale are clipped.
    """
    with writing(path), tempfile.TemporaryFile(dir=os.path.dirname(path)) as raw:
        made, real, place = 0.0, 0.0, 0
        for block in resynthesise(model, track):
            raw.write(block.tobytes())
            made += _energy(block)
            real += _energy(_mono(track.audio, place, len(block)))
            place += len(block)
        scale = np.float32(math.sqrt(real / made) if made > 0 else 1)
        raw.seek(0)
        with whole_file(path) as file:
            sink = _Sink(file)
            try:
                with soundfile.SoundFile(sink, "w", RATE, 1, "PCM_16", format="FLAC") as flac:
                    while data := raw.read(4 * CHUNK):
                        flac.write(to_int16(np.frombuffer(data, np.float32) * scale))
            except (soundfile.SoundFileError, AssertionError):
                if sink.error is None:
                    raise
            if sink.error is not None:
                raise sink.error


class _Sink:
    """A file as libsndfile writes to it: no exception may cross its C code, so it is kept."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.error: OSError | None = None
        self.seek, self.tell, self.read = file.seek, file.tell, file.read

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            return 0


def measure(model: Model, tracks: Sequence[Track]) -> dict[str, float]:
    """Means over a crop from the middle of each of up to `MEASURED` tracks.

    "si_sdr" dB; "lsd" dB, the log-spectral distance (rms over frequency of the difference in dB of
    the power spectra, mean over frames); "mel" dB, mean absolute difference in the front end's mel
    bands; "high" dB, difference of level above `HIGH_HZ`, over crops that have any there; "used" in
    (0, 1], share of the codes that are used, by the perplexity of their counts.
    """
    picks = np.unique(np.linspace(0, len(tracks) - 1, MEASURED).astype(int))
    picked = [tracks[k] for k in picks.tolist()]
    made, real, codes = [], [], []
    for track in picked:
        start = max(0, (len(track.audio) - MEASURED_CROP) // 2)
        audio = _mono(track.audio, start, MEASURED_CROP) * np.float32(track.gain)
        one, code = model.apply(audio[None])
        made.append(np.asarray(one)[0])
        real.append(audio)
        codes.append(np.asarray(code))
    figures = distances(np.stack(made), np.stack(real))
    share = [np.bincount(c, minlength=1) / len(c) for c in np.concatenate(codes, axis=1)]
    entropy = [-float(np.sum(p[p > 0] * np.log(p[p > 0]))) for p in share]
    used = float(np.mean(np.exp(entropy))) / model.codec.codes
    return {**figures, "used": used, "crops": len(picked)}


def distances(made: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Figures "si_sdr", "lsd", "mel", "high" of `measure`: two [N, n], silent crops left out."""
    front_end = FrontEnd()
    kept = np.abs(real).max(axis=1) > 1e-5
    if not kept.any():
        return dict.fromkeys(("si_sdr", "lsd", "mel", "high"), math.nan)
    made, real = made[kept].astype(np.float64), real[kept].astype(np.float64)
    scaled = real * (np.sum(made * real, axis=1) / np.sum(real**2, axis=1))[:, None]
    noise = np.maximum(np.sum((made - scaled) ** 2, axis=1), 1e-30)
    si_sdr = 10 * np.log10(np.maximum(np.sum(scaled**2, axis=1) / noise, 1e-12))

    starts = np.arange(0, real.shape[1] - front_end.n_fft + 1, front_end.hop)
    index = starts[:, None] + np.arange(front_end.n_fft)[None, :]
    window = hann(front_end.n_fft)
    bins = [np.abs(np.fft.rfft(x[:, index] * window)) ** 2 for x in (made, real)]
    bands = [power @ mel_filterbank(front_end).T for power in bins]

    def gap(powers: list[np.ndarray]) -> np.ndarray:
        """Level of made over real in dB; what is FLOOR_DB below the crop's strongest counts not."""
        floor = powers[1].max(axis=(1, 2), keepdims=True) * 10 ** (-FLOOR_DB / 10)
        made_db, real_db = (10 * np.log10(np.maximum(power, floor)) for power in powers)
        difference: np.ndarray = made_db - real_db
        return difference

    high = np.fft.rfftfreq(front_end.n_fft, 1 / RATE) > HIGH_HZ
    treble = [power[..., high].mean(axis=(1, 2), keepdims=True) for power in bins]
    audible = treble[1] > bins[1].max(axis=(1, 2), keepdims=True) * 10 ** (-FLOOR_DB / 10)
    above = [10 * np.log10(np.maximum(power[audible], 1e-30)) for power in treble]
    return {
        "si_sdr": float(np.mean(si_sdr)),
        "lsd": float(np.mean(np.sqrt(np.mean(gap(bins) ** 2, axis=2)))),
        "mel": float(np.mean(np.abs(gap(bands)))),
        "high": float(np.mean(above[0] - above[1])) if audible.any() else math.nan,
    }


# --- files -----------------------------------------------------------------------------------


def save_model(path: str, model: Model) -> None:
    """Write a model atomically. CommandError: the disk takes no more."""
    header = {
        "format": FORMAT,
        "codec": json.dumps(dataclasses.asdict(model.codec)),
        "figures": json.dumps(model.figures),
    }
    with writing(path):
        replace_file(path, save(model.tensors, metadata=header))


def load_model(path: str) -> Model:
    """CommandError when the file is not a model of this format, or damaged."""
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
        codec = Codec.from_dict(json.loads(header["codec"]))
        model = Model(codec, tensors, json.loads(header["figures"]))
        _ = model.apply
        return model
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        cause = f"{printable(path)}: not a model that rvq wrote ({brief(error)})"
        raise CommandError(f"{cause}: delete it, and it is trained again", USAGE) from error
