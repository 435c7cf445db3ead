"""Sources of the verb `live`: a file or pipe, raw samples or WAV on stdin, an input device."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from artifactnet_jax.decode import open_audio
from artifactnet_jax.recording import MAX_CHANNELS, RATES, AudioError, Blocks, Decoded, to_float
from artifactnet_jax.text import NO_BACKEND, USAGE, CommandError, brief, printable

BLOCK_S = 0.02  # of a device, and of a file that is played in real time
READ_BYTES = 2**16
ENDLESS = 2**31 - 2**16  # bytes; a WAV header that declares more was written to a pipe

PCM: dict[str, np.dtype[Any]] = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}
_WAV = {(1, 16): "<i2", (1, 32): "<i4", (3, 32): "<f4", (3, 64): "<f8"}  # format tag, bits


def open_source(
    args: argparse.Namespace, gap: Callable[[], None], notes: list[str]
) -> contextlib.AbstractContextManager[Decoded]:
    """The source, to be opened in the thread that reads it."""
    if args.device is not None:
        return open_device(args.device, args.rate, args.channels, gap)
    if args.source != "-":
        return _played(open_audio(args.source), args.realtime)
    descriptor = sys.stdin.fileno()

    def read(size: int) -> bytes:  # sys.stdin's own lock would be held where this waits
        return os.read(descriptor, size)

    kind = PCM[args.pcm] if args.pcm else None
    return _played(open_pcm(read, notes, kind, args.rate, args.channels), args.realtime)


@contextlib.contextmanager
def _played(
    source: contextlib.AbstractContextManager[Decoded], realtime: bool
) -> Iterator[Decoded]:
    """The same source; in real time its samples come no sooner than they would be heard."""

    def blocks(decoded: Decoded) -> Blocks:
        began, frames, size = time.monotonic(), 0, max(1, round(BLOCK_S * decoded.rate))
        for block in decoded.blocks:
            for k in range(0, len(block), size):
                piece = block[k : k + size]
                frames += len(piece)
                time.sleep(max(0.0, began + frames / decoded.rate - time.monotonic()))
                yield piece

    with source as decoded:
        if not realtime:
            yield decoded
            return
        yield dataclasses.replace(decoded, blocks=blocks(decoded))


@contextlib.contextmanager
def open_pcm(
    read: Callable[[int], bytes],
    notes: list[str],
    kind: np.dtype | None = None,
    rate: int = 0,
    channels: int = 0,
) -> Iterator[Decoded]:
    """A stream of raw samples of dtype `kind`, or of WAV, which says itself what it holds.

    `read(n)` gives 1 to n bytes, as soon as there are any, and none at the end. Nothing is sought,
    so a pipe will do, and a WAV stream may be longer than its header can tell. A torn frame at the
    end is left out and told in `notes`. CommandError: no WAV stream, or of a kind not known here.
    """

    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size and (more := read(size - len(data))):
            data += more
        return data

    head, frames = exactly(12), None
    is_wav = head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE"
    if kind is None and not head:
        raise AudioError("empty", "it ended before it began: did what writes it start?")
    if kind is not None and is_wav:
        raise CommandError(
            "standard input is a WAV stream: leave --pcm, --rate and --channels out", USAGE
        )
    if kind is None and not is_wav:
        cure = "declare raw samples by --pcm, --rate and --channels, or send -f wav from ffmpeg"
        raise CommandError(f"standard input is no WAV stream: {cure}", USAGE)
    if kind is None:
        kind, rate, channels, frames = _wav_header(exactly)
        head = b""
    width = kind.itemsize * channels

    def blocks(data: bytes) -> Blocks:
        left = math.inf if frames is None else frames * width
        while True:
            whole = len(data) // width * width
            if whole:
                pcm = np.frombuffer(data[:whole], kind).reshape(-1, channels)
                yield to_float(pcm)
            data = data[whole:]
            left -= whole
            if left <= len(data) or not (more := read(READ_BYTES)):
                break
            data += more
            data = data[: int(min(left, len(data)))]
        if data:
            notes.append(f"{len(data)} bytes at the end are no whole frame: left out")

    yield Decoded(rate, channels, blocks(head), frames)


def _wav_header(exactly: Callable[[int], bytes]) -> tuple[np.dtype, int, int, int | None]:
    """Dtype, rate, channels and frames (None: unknown) from what follows "WAVE", up to the data."""
    kind, rate, channels = None, 0, 0
    while len(chunk := exactly(8)) == 8:
        name, size = chunk[:4], struct.unpack("<I", chunk[4:])[0]
        if name == b"data" and kind is not None:
            frames = size // (kind.itemsize * channels)
            return kind, rate, channels, frames if 0 < size < ENDLESS else None
        body = exactly(size + size % 2) if size < READ_BYTES else b""
        if name == b"data" or len(body) < size:
            break
        if name != b"fmt " or len(body) < 16:
            continue
        tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
        if tag == 0xFFFE and len(body) >= 26:  # extensible: the tag begins the sub-format
            tag = struct.unpack("<H", body[24:26])[0]
        if (tag, bits) not in _WAV or not 0 < channels <= MAX_CHANNELS:
            text = f"a WAV stream of format {tag} with {bits} bits and {channels} channels"
            cure = "send 16-bit, 32-bit or float samples (ffmpeg: -c:a pcm_s16le)"
            raise CommandError(f"{text} on standard input: {cure}", USAGE)
        if not RATES[0] <= rate <= RATES[1]:
            raise AudioError("sample-rate", f"a WAV header of {rate} Hz: is it damaged?")
        kind = np.dtype(_WAV[tag, bits])
    raise AudioError("decode", "it ended in its WAV header, or the header is damaged")


@contextlib.contextmanager
def open_device(
    name: str, rate: int | None, channels: int | None, gap: Callable[[], None]
) -> Iterator[Decoded]:
    """An input of sounddevice (PortAudio), by number or part of its name; "default" is its own.

    rate, channels: None for the device's own rate, and for two channels at most. `gap` is called
    where the device lost samples. CommandError: no such device, or it cannot be opened.
    """
    try:
        import sounddevice
    except ImportError as error:
        cure = 'pip install "artifactnet-jax[live]"'
        raise CommandError(f"--device needs sounddevice: {cure}", NO_BACKEND) from error
    except OSError as error:
        cure = "apt install libportaudio2, or pipe: ffmpeg ... -f wav - | artifactnet-jax live -"
        raise CommandError(f"--device needs the PortAudio library: {cure}", NO_BACKEND) from error
    device = None if name == "default" else int(name) if name.isdigit() else name
    try:
        facts: Any = sounddevice.query_devices(device, "input")
        rate = rate or int(facts["default_samplerate"])
        channels = channels or min(2, facts["max_input_channels"])
        stream = sounddevice.InputStream(
            device=device, samplerate=rate, channels=channels, dtype="float32"
        )
    except (ValueError, sounddevice.PortAudioError) as error:
        inputs = [d["name"] for d in sounddevice.query_devices() if d["max_input_channels"]]
        cure = f"there are {', '.join(map(repr, inputs))}" if inputs else "there is no input at all"
        text = f"device {printable(name)} cannot be opened ({brief(error)})"
        raise CommandError(f"{text}: {cure}", USAGE) from error

    def blocks() -> Blocks:
        while True:
            try:
                block, lost = stream.read(max(1, round(BLOCK_S * rate)))
            except sounddevice.PortAudioError as error:
                text = f"the device stopped ({brief(error)}): is it still connected?"
                raise AudioError("read", text) from error
            if lost:
                gap()
            yield block

    with stream:
        yield Decoded(rate, channels, blocks())
