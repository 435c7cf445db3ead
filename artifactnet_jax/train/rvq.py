"""Self-synthesis: small RVQ autoencoders of our own, and the verb `rvq`.

Neural codecs leave their traces in whatever they code: vectors quantised in a latent, images and
notches of the upsampling in the decoder, fine structure lost. Autoencoders with a residual vector
quantiser (RVQ), trained for minutes on real music, leave such traces in music of one's own: every
real track becomes a positive of the same content. They differ in strides, sizes of the codebooks,
number of them, decoders and activations. In the folder that the verb writes:

    settings.json               what the folder was made with; other settings need another folder
    models/NAME.safetensors     a trained autoencoder, its figures in the header
    audio/NAME/KEY.flac         a positive, named by path, size and time of change of its original
    manifest.csv                the positives

Real music is mixed to mono first, and so the positives are mono, at 44.1 kHz, as long as their
originals and of the same level.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
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

from artifactnet_jax import dsp_jax, score
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.config import FrontEnd
from artifactnet_jax.data.augment import RATE, to_int16
from artifactnet_jax.data.manifest import (
    ManifestError,
    Row,
    check_output,
    read_manifest,
    write_manifest,
)
from artifactnet_jax.data.records import AudioCache, prepare
from artifactnet_jax.files import replace_file, whole_file
from artifactnet_jax.filterbank import hann, mel_filterbank
from artifactnet_jax.results import OK, SOME_FAILED, USAGE, CommandError, brief, printable
from artifactnet_jax.train.autoencoder import (
    EMPHASIS,
    Autoencoder,
    Codebooks,
    Codec,
    codecs,
    dequantise,
    first_codebooks,
    moved,
    quantise,
    straight_through,
)
from artifactnet_jax.train.losses import multi_resolution_stft, waveform_l1
from artifactnet_jax.train.residuals import storing

FORMAT = "artifactnet-jax/rvq/1"
KIND = "codec-recon"
MAX_BAD = 0.5  # share of unreadable rows at which the command stops

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


# --- training --------------------------------------------------------------------------------


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
        def apply(net: Autoencoder, books: jax.Array, audio: jax.Array):
            latent = net.encode(audio)
            codes, _ = quantise(latent.reshape(-1, latent.shape[-1]), books)
            return net.decode(dequantise(codes, books).reshape(latent.shape)), codes

        tensors = {name: jnp.asarray(tensor) for name, tensor in self.tensors.items()}
        books = tensors.pop("codebooks")
        return functools.partial(apply, _network(self.codec, tensors), books)


def _split(codec: Codec) -> tuple[nnx.GraphDef[Autoencoder], nnx.State]:
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
    """A batch to train on, float32 [BATCH, CROP]: tracks as likely as each other, zero-padded."""
    batch = np.zeros((BATCH, CROP), np.float32)
    for crop in batch:
        track = tracks[int(rng.integers(len(tracks)))]
        start = int(rng.integers(max(0, len(track.audio) - CROP) + 1))
        decibel = rng.uniform(-LEVEL_SPREAD_DB, LEVEL_SPREAD_DB)
        crop[:] = _mono(track.audio, start, CROP) * np.float32(track.gain * 10 ** (decibel / 20))
    return batch


def envelope_distance(made: jax.Array, real: jax.Array) -> jax.Array:
    """Mean |difference| of the log power in bands: two [B, n] -> [B].

    What is noise cannot be coded as a waveform, and bin by bin its spectrum is noise too: those
    losses would give every track the same treble. The power in a band can be coded.
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
    def begin(net: nnx.State) -> tuple[Any, Codebooks]:
        count = jnp.zeros((codec.depth, codec.codes))
        vectors = jnp.zeros((codec.depth, codec.codes, codec.latent))
        return optimiser.init(net), Codebooks(vectors, count, vectors)

    def loss_of(net: nnx.State, books: Codebooks, audio: jax.Array, quantised: jax.Array):
        model = nnx.merge(graph, net)
        latent = model.encode(audio)
        passed, commitment, codes, inputs = straight_through(latent, books.vectors)
        made = model.decode(latent + quantised * (passed - latent))
        distance = waveform_l1(made, audio, audio) + multi_resolution_stft(made, audio)
        distance = distance + ENVELOPE * envelope_distance(made, audio)
        return jnp.mean(distance) + COMMITMENT * quantised * commitment, (codes, inputs)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(
        net: nnx.State,
        state: Any,
        books: Codebooks,
        audio: jax.Array,
        key: jax.Array,
        quantised: jax.Array,
    ):
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (codes, inputs)), slope = gradient(net, books, audio, quantised)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its int32 counts
            updates, state = optimiser.update(slope, state, net)
        books = moved(books, codes, inputs, key)
        return optax.apply_updates(net, updates), state, books, loss

    @jax.jit
    def encode(net: nnx.State, audio: jax.Array) -> jax.Array:
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
    """Blocks of what the codec makes of a track: float32 [<= chunk], as many samples in all.

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
    with storing(path), tempfile.TemporaryFile(dir=os.path.dirname(path)) as raw:
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
    figures = compare(np.stack(made), np.stack(real))
    share = [np.bincount(c, minlength=1) / len(c) for c in np.concatenate(codes, axis=1)]
    entropy = [-float(np.sum(p[p > 0] * np.log(p[p > 0]))) for p in share]
    used = float(np.mean(np.exp(entropy))) / model.codec.codes
    return {**figures, "used": used, "crops": len(picked)}


def compare(made: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """ "si_sdr", "lsd", "mel" and "high" of `measure`: two [N, n], silent crops left out."""
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
        """made - real in dB; nothing counts that is FLOOR_DB below the strongest of the crop."""
        floor = powers[1].max(axis=(1, 2), keepdims=True) * 10 ** (-FLOOR_DB / 10)
        made_db, real_db = (10 * np.log10(np.maximum(power, floor)) for power in powers)
        return made_db - real_db

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
    with storing(path):
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


# --- the verb --------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Train what is missing, re-synthesise what is missing; returns the exit code."""
    if args.per_track > args.models:
        cause = f"--per-track {args.per_track} is more than --models {args.models}"
        raise CommandError(f"{cause}: give fewer, or more models", USAGE)
    family = codecs(args.models, args.seed)
    rows = _real_rows(args)
    _claim(args, family)
    cache = AudioCache(args.cache)
    with score.progress(args.quiet, args.out, len(rows)) as tell:
        good, failures = prepare(
            rows,
            cache,
            max_bad=MAX_BAD,
            jobs=cpu_count(),
            tell=tell,
        )
    if args.quiet:
        for failure in failures:
            print(failure.message, file=sys.stderr)
    tracks = [Track.open(row, cache) for row in good]
    models, diverged = _models(args, family, tracks)
    written = _positives(args, models, tracks, cache)
    try:
        write_manifest(_manifest(args), written)
    except ManifestError as error:
        raise CommandError(str(error), USAGE) from error
    if not args.quiet:
        text = f"{len(written)} positives of {len(tracks)} tracks"
        print(f"{text}, listed in {printable(_manifest(args))}", file=sys.stderr)
    return SOME_FAILED if failures or diverged else OK


def _manifest(args: argparse.Namespace) -> str:
    return os.path.join(args.out, "manifest.csv")


def _real_rows(args: argparse.Namespace) -> list[Row]:
    """The real rows of the manifest; makes the folders. CommandError: none, or no place for it."""
    try:
        rows = [row for row in read_manifest(args.data) if row.label == 0]
        if os.path.exists(_manifest(args)) and os.path.samefile(args.data, _manifest(args)):
            cause = "it is what the command writes"
            raise CommandError(f"--data {args.data}: {cause}; give the one before it", USAGE)
        if not rows:
            cause = f"{printable(args.data)}: no row is real (label 0)"
            raise CommandError(f"{cause}: give real music, which is what rvq learns from", USAGE)
        os.makedirs(os.path.join(args.out, "models"), exist_ok=True)
        check_output(_manifest(args))
    except ManifestError as error:
        raise CommandError(str(error), USAGE) from error
    except OSError as error:
        cause = f"--out {printable(args.out)}: {error.strerror}"
        raise CommandError(f"{cause}; name another", USAGE) from error
    return rows


def _claim(args: argparse.Namespace, family: Sequence[Codec]) -> None:
    """Write what the folder is made with; CommandError when it was made with something else."""
    path = os.path.join(args.out, "settings.json")
    said: dict[str, Any] = {"format": FORMAT}
    said |= {name: getattr(args, name) for name in ("models", "steps", "per_track", "seed")}
    said["codecs"] = [codec.name for codec in family]
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except FileNotFoundError:
        with storing(path):
            replace_file(path, (json.dumps(said, indent=1) + "\n").encode())
        return
    except (OSError, ValueError) as error:
        cause = f"{printable(path)} cannot be read ({brief(error)})"
        raise CommandError(f"{cause}: name another --out", USAGE) from error
    differing = [name for name in said if found.get(name) != said[name]]
    if differing:
        name = differing[0]
        cause = f"{name} was {found.get(name)!r} there, and is {said[name]!r} now"
        cure = "give the same settings, or another --out"
        raise CommandError(f"{printable(path)}: {cause}: {cure}", USAGE)


def _parts(tracks: Sequence[Track], seed: int) -> tuple[list[Track], list[Track], bool]:
    """Tracks to train on, tracks to measure on, and whether these are others.

    Trained on are those of the part "train" and of none, measured on the rest. Where there is no
    rest, every tenth group is kept back for it; where there is one group only, it serves both.
    """
    train = [track for track in tracks if track.row.split in ("train", "")]
    rest = [track for track in tracks if track.row.split not in ("train", "")]
    if train and not rest:
        groups = sorted({track.row.group for track in train})
        np.random.default_rng(seed).shuffle(groups)
        kept_back = set(groups[: -(-len(groups) // 10)]) if len(groups) > 1 else set()
        rest = [track for track in train if track.row.group in kept_back]
        train = [track for track in train if track.row.group not in kept_back]
    if not train:
        cause = "no readable real row is in the part 'train', or in none"
        raise CommandError(f"{cause}: there is nothing to train on", USAGE)
    return train, rest or train, bool(rest)


_COLUMNS = "{:<42} {:>6} {:>7} {:>6} {:>6} {:>6} {:>6} {:>6} {:>5}"


def _models(
    args: argparse.Namespace, family: Sequence[Codec], tracks: Sequence[Track]
) -> tuple[dict[str, Model], int]:
    """Models by name, those that are there already loaded; and how many training diverged for.

    Prints a line on stdout for each. CommandError: there is none.
    """
    learnt, measured, held_out = _parts(tracks, args.seed)
    models: dict[str, Model] = {}
    print(
        _COLUMNS.format(
            *("model", "steps", "seconds", "kbit/s", "SI-SDR", "LSD", "mel", ">10k", "used")
        )
    )
    for k, codec in enumerate(family):
        path = os.path.join(args.out, "models", f"{codec.name}.safetensors")
        if os.path.exists(path):
            model = load_model(path)
            if model.codec != codec:
                cause = f"{printable(path)}: its codec differs from that of this version"
                raise CommandError(f"{cause}: name another --out", USAGE)
        else:
            try:
                with _bar(args.quiet, args.steps, f"{k + 1}/{len(family)} {codec.name}") as tell:
                    model = train(codec, learnt, args.steps, args.seed + k, tell)
            except Diverged as error:
                text = f"{codec.name}: {error}; it is left out, the other models go on"
                print(text, file=sys.stderr)
                continue
            model.figures.update(measure(model, measured))
            save_model(path, model)
        models[codec.name] = model
        print(_line(model), flush=True)
    note = "tracks that were not trained on" if held_out else "the tracks trained on (no others)"
    print(f"SI-SDR, LSD, mel, >10kHz in dB, used of 1; crops of {note}")
    if not models:
        raise CommandError("training diverged for every model: try another --seed", SOME_FAILED)
    return models, len(family) - len(models)


def _line(model: Model) -> str:
    f = model.figures
    return _COLUMNS.format(
        *(model.codec.name, f["steps"], f"{f['seconds']:.0f}", f"{model.codec.kbps:.1f}"),
        *(f"{f[name]:.1f}" for name in ("si_sdr", "lsd", "mel", "high")),
        f"{f['used']:.2f}",
    )


@contextlib.contextmanager
def _bar(quiet: bool, total: int, name: str) -> Iterator[Callable[[int], None]]:
    """A function that shows on stderr how many steps are done; a line if that is no terminal."""
    if quiet or not sys.stderr.isatty():
        if not quiet:
            print(f"training {name}", file=sys.stderr)
        yield lambda step: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="step", desc=name, file=sys.stderr, dynamic_ncols=True) as bar:
        yield lambda step: bar.update(step - bar.n) and None


def _positives(
    args: argparse.Namespace,
    models: dict[str, Model],
    tracks: Sequence[Track],
    cache: AudioCache,
) -> list[Row]:
    """Write the positives that are not there yet; the rows of all of them."""
    names = [codec.name for codec in codecs(args.models, args.seed)]
    rows = []
    for name in models:
        folder = os.path.join(args.out, "audio", name)
        with storing(folder):
            os.makedirs(folder, exist_ok=True)
    with score.progress(args.quiet, args.out, len(tracks)) as tell:
        for track in tracks:
            order = [name for name in turns(track.row, names, args.seed) if name in models]
            for name in order[: args.per_track]:
                key = cache.key(track.row.path)
                path = os.path.join(args.out, "audio", name, f"{key}.flac")
                if not os.path.exists(path):
                    write_positive(models[name], track, path)
                rows.append(_positive_row(track.row, name, path))
            tell(track.row)
    return rows


def turns(row: Row, names: Sequence[str], seed: int) -> list[str]:
    """The order in which models are taken for a track.

    By group and file name, so that another machine, or another folder, comes to the same.
    """
    text = f"{row.group}/{os.path.basename(row.path)}"
    rng = np.random.default_rng([seed % 2**32, *text.encode("utf-8", "surrogateescape")])
    return [names[k] for k in rng.permutation(len(names))]


def _positive_row(original: Row, name: str, path: str) -> Row:
    """The source follows the original's, so that a source stays in one part."""
    return Row(
        path=path,
        label=1,
        kind=KIND,
        source=f"rvq-{original.source}",
        model=f"rvq-{name}",
        group=original.group,
        split=original.split,
        weight=original.weight,
        extra=(("original", original.path),),
    )
