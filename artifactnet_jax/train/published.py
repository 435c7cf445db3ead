"""Positives of `rvq --codec`: real music, re-synthesised by a published codec that a user has.

The folder holds TensorFlow Lite files of a SoundStream: `soundstream_encoder.tflite`,
`quantizer.tflite` (signatures "encode" and "decode") and `lyragan.tflite`, as google/lyra has them:
16 kHz, frames of 320 samples. They keep state from frame to frame, so that every track has its own
interpreters. A detector would learn the band: beside each positive its original is written at the
same 16 kHz, as a real track of its group.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from artifactnet_jax.audio import to_mono
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.console.progress import progress
from artifactnet_jax.data.augment import RATE
from artifactnet_jax.data.decoded import AudioCache
from artifactnet_jax.data.manifest import Row
from artifactnet_jax.files import whole_file, writing
from artifactnet_jax.recording import to_float
from artifactnet_jax.text import NO_BACKEND, USAGE, CommandError

CODEC_RATE, FRAME = 16_000, 320  # Hz; samples
QUANTIZERS = (16, 30, 46)  # 3.2, 6.0 and 9.2 kbit/s: drawn for every track
FILES = ("soundstream_encoder", "quantizer", "lyragan")


def digest(folder: str) -> str:
    """SHA-256 over the codec's files. CommandError: one is missing."""
    found = hashlib.sha256()
    for name in FILES:
        path = Path(folder, f"{name}.tflite")
        try:
            found.update(path.read_bytes())
        except OSError as error:
            cure = f"--codec takes a folder with {', '.join(f'{n}.tflite' for n in FILES)}"
            raise CommandError(f"{path}: {error.strerror}; {cure}", USAGE) from error
    return found.hexdigest()


def resynthesise(folder: str, audio: np.ndarray, quantizers: int) -> np.ndarray:
    """float32 [n] at 16 kHz -> float32 [n], as the codec gives it. CommandError: no interpreter."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        cure = 'pip install "artifactnet-jax[litert]"'
        raise CommandError(f"TensorFlow Lite is not installed: {cure}", NO_BACKEND) from error
    parts = [Interpreter(str(Path(folder, f"{name}.tflite")), num_threads=1) for name in FILES]
    for part in (parts[0], parts[2]):
        part.allocate_tensors()
    encoder, decoder = (parts[k].get_signature_runner("serving_default") for k in (0, 2))
    encode, decode = (parts[1].get_signature_runner(name) for name in ("encode", "decode"))
    padded = np.pad(audio.astype(np.float32), (0, -len(audio) % FRAME))
    out = np.empty_like(padded)
    for start in range(0, len(padded), FRAME):
        frame = slice(start, start + FRAME)
        latent = encoder(input_audio=padded[None, frame])["output_0"]
        coded = encode(input_frames=latent, num_quantizers=np.int32(quantizers))
        codes = next(value for value in coded.values() if value.dtype == np.int32)
        latent = decode(encoding_indices=codes)["output_0"]
        out[frame] = decoder(input_audio=latent)["output_0"][0]
    return out[: len(audio)]


def positives(args: argparse.Namespace, rows: Sequence[Row], cache: AudioCache) -> list[Row]:
    """Write what is not there yet; the rows of all positives, and of their originals at 16 kHz."""
    folders = [os.path.join(args.out, "audio", name) for name in ("soundstream", "original")]
    for folder in folders:
        with writing(folder):
            os.makedirs(folder, exist_ok=True)

    def one(row: Row) -> list[Row]:
        key = cache.key(row.path)
        seed = [args.seed % 2**32, *os.path.basename(row.path).encode("utf-8", "surrogateescape")]
        quantizers = int(np.random.default_rng(seed).choice(QUANTIZERS))
        made, plain = (os.path.join(folder, f"{key}.flac") for folder in folders)
        if not (os.path.exists(made) and os.path.exists(plain)):
            mono = to_mono(to_float(cache.get(row.path)))
            audio = soxr.resample(mono, RATE, CODEC_RATE).astype(np.float32)
            coded = resynthesise(args.codec, audio, quantizers)
            energy = float(np.vdot(coded, coded))
            coded *= np.float32(math.sqrt(float(np.vdot(audio, audio)) / energy) if energy else 1)
            for path, samples in ((made, coded), (plain, audio)):
                _write(path, samples)
        model = f"SoundStream, {quantizers} quantisers"
        return [
            _row(row, made, 1, "codec-recon", f"soundstream-{row.source}", model),
            _row(row, plain, 0, row.kind, f"narrow-{row.source}", "original at 16 kHz"),
        ]

    done: list[Row] = []
    with (
        progress(args.quiet, args.out, len(rows)) as tell,
        ThreadPoolExecutor(cpu_count()) as pool,
    ):
        for row, pair in zip(rows, pool.map(one, rows), strict=True):
            done += pair
            tell(row)
    return done


def _row(original: Row, path: str, label: int, kind: str, source: str, model: str) -> Row:
    same: dict[str, Any] = {"group": original.group, "split": original.split}
    extra = (("original", original.path),)
    return Row(path, label, kind, source, model, **same, weight=original.weight, extra=extra)


def _write(path: str, samples: np.ndarray) -> None:
    with writing(path), whole_file(path) as file:
        soundfile.write(file, np.clip(samples, -1, 1), CODEC_RATE, subtype="PCM_16", format="FLAC")
