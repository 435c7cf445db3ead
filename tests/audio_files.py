"""Recordings that the audio tests make for themselves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from artifactnet_jax import decoders, fingerprint

SOUNDFILE = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
PYAV = {  # suffix: container, codec, sample format
    "m4a": ("ipod", "aac", "fltp"),
    "alac.m4a": ("ipod", "alac", "s16p"),
    "aac": ("adts", "aac", "fltp"),
    "wma": ("asf", "wmav2", "fltp"),
    "mka": ("matroska", "pcm_f32le", "flt"),
}


def noise(seconds: float, rate: int = 44_100, channels: int = 2, seed: int = 0) -> np.ndarray:
    """16-bit noise, int16 [n, channels], at about -20 dB of full scale."""
    rng = np.random.default_rng(seed)
    return (3277 * rng.standard_normal((round(seconds * rate), channels))).astype(np.int16)


def carrying(name: str, seconds: float, seed: int = 0, channels: int = 2) -> np.ndarray:
    """Noise whose spectrum carries the lines of a decoder of the embedded bank, up to 6 dB high.

    int16 [n, channels] at 44.1 kHz, all channels alike.
    """
    bank, rate = decoders.load(), fingerprint.RATE
    (lines,) = (bank.lines[k, 0] for k, d in enumerate(bank.decoders) if d.name == name)
    hz = np.fft.rfftfreq(round(seconds * rate), 1 / rate)
    lift = np.interp(hz, fingerprint.HZ[decoders.BINS], 6 * lines / np.abs(lines).max(), 0, 0)
    spectrum = np.fft.rfft(np.random.default_rng(seed).normal(size=round(seconds * rate)))
    audio = np.fft.irfft(spectrum * np.maximum(hz, 40) ** -0.66 * 10 ** (lift / 20))
    pcm = np.rint(3277 * audio / audio.std()).clip(-32768, 32767).astype(np.int16)
    return np.repeat(pcm[:, None], channels, axis=1)


def encode(pcm: np.ndarray, suffix: str, rate: int = 44_100, bit_rate: int = 128_000) -> bytes:
    """int16 [n, channels] as a file of the kind that `suffix` names."""
    out = io.BytesIO()
    if suffix in SOUNDFILE:
        kind, subtype = SOUNDFILE[suffix]
        with soundfile.SoundFile(out, "w", rate, pcm.shape[1], subtype, format=kind) as file:
            # libsndfile garbles int16 on its way to MP3, and may crash on long Vorbis writes.
            for start in range(0, len(pcm), rate):
                file.write(pcm[start : start + rate] / np.float32(32768))
        return out.getvalue()
    av = pytest.importorskip("av")

    kind, codec, sample_format = PYAV.get(suffix, ("mp3", "libmp3lame", "fltp"))
    layout = "mono" if pcm.shape[1] == 1 else "stereo"
    with av.open(out, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.layout = layout
        stream.bit_rate = bit_rate
        resampler = av.AudioResampler(format=sample_format, layout=layout, rate=rate)
        for start in range(0, len(pcm), 8192):
            packed = np.ascontiguousarray(pcm[start : start + 8192]).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(packed, "s16", layout)
            frame.sample_rate, frame.pts = rate, start
            for converted in resampler.resample(frame):
                container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    return out.getvalue()


def write(folder: Path, name: str, pcm: np.ndarray, rate: int = 44_100) -> Path:
    """The same as a file in `folder`, whose suffix names the kind."""
    path = folder / name
    path.write_bytes(encode(pcm, name.split(".", 1)[1], rate))
    return path
