"""Decoders: any recording -> blocks of float32 [frames, channels], in constant memory.

soundfile (libsndfile) reads WAV, FLAC, AIFF, Ogg, Opus and MP3; what it cannot open goes to PyAV
(AAC and M4A, ALAC, WMA, Matroska, ...), an optional extra. Neither is believed where a file ends:
`containers` looks for itself. Both read through one Python file object, so any file name works and
no file can make a decoder open another file or the network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from artifactnet_jax import arrays, containers, ffmpeg, sndfile
from artifactnet_jax.files import audio_in
from artifactnet_jax.packets import Part, Survey
from artifactnet_jax.recording import (
    MAX_CHANNELS,
    RATES,
    SHORT_S,
    AtRate,
    AudioError,
    Blocks,
    Decoded,
    Flaws,
    Stream,
    detail,
    size_of,
)
from artifactnet_jax.tags import notices
from artifactnet_jax.text import printable

LONGEST_PATH = 4096  # bytes
Opener = Callable[[], contextlib.AbstractContextManager[Decoded]]  # decodes by itself; AudioError
Source = str | bytes | os.PathLike[Any] | BinaryIO | arrays.Array | Opener


@contextlib.contextmanager
def open_audio(source: Source) -> Iterator[Decoded]:
    """Start decoding a source; the end of the context closes everything.

    A source that is called gives the context itself, with decoded audio.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(source, tuple):
            decoded = arrays.decode(*arrays.checked(*source))
        elif callable(source):
            decoded = stack.enter_context(source())
        else:
            if isinstance(source, (str, bytes, os.PathLike)):
                _check_path(source)
                try:
                    source = stack.enter_context(open(source, "rb"))
                except PermissionError:
                    text = "no permission to read it: change its mode or owner"
                    raise AudioError("permission", text) from None
                except OSError as error:
                    raise AudioError("read", f"cannot be opened: {detail(error)}") from None
            size = size_of(source)
            said = notices(source)
            decoded = dataclasses.replace(_decode_file(source, size), notices=said)
        for kind, value, low, high in (
            ("sample-rate", decoded.rate, *RATES),
            ("channels", decoded.channels, 1, MAX_CHANNELS),
        ):
            if not low <= value <= high:
                array = isinstance(source, tuple)
                cure = "is it [channels, n]? transpose it" if array else "damaged header?"
                text = f"{kind} {value} is outside {low} to {high}: {cure}"
                raise AudioError(kind, text)
        stack.callback(decoded.blocks.close)
        if decoded.lossless and not callable(source):
            decoded = dataclasses.replace(decoded, blocks=_music(decoded.blocks, decoded.rate))
            stack.callback(decoded.blocks.close)
        yield decoded


def _check_path(path: str | bytes | os.PathLike[Any]) -> None:
    """AudioError unless `path` is a regular file; nothing is opened (a pipe would block)."""
    if isinstance(path, bytes) and (b"\0" in path or len(path) > LONGEST_PATH):
        text = "no path but the bytes of a file: wrap them in io.BytesIO"
        raise AudioError("not-found", text)
    try:
        mode = os.stat(path).st_mode
    except PermissionError:
        text = "no permission to enter its folder: change its mode or owner"
        raise AudioError("permission", text) from None
    except (OSError, ValueError):  # ValueError: a NUL in the name
        try:
            target = os.readlink(os.fsdecode(path))
        except (OSError, ValueError):
            raise AudioError("not-found", "no such file: check the path") from None
        text = f"a symbolic link to {printable(target)}, which does not exist: restore that"
        raise AudioError("broken-link", text) from None
    if stat.S_ISDIR(mode):
        if audio_in(os.fsdecode(path), recursive=False):
            raise AudioError("is-directory", "a folder, not a file: name the files in it")
        deeper = audio_in(os.fsdecode(path), recursive=True)
        cure = "pass -r to search its subfolders too" if deeper else "name a file or another folder"
        raise AudioError("no-audio", f"the folder holds no audio file: {cure}")
    if not stat.S_ISREG(mode):
        text = "not a regular file: pipe it to standard input, or save it first"
        raise AudioError("unsupported", text)


def _decode_file(file: BinaryIO, size: int) -> Decoded:
    """What a file holds, part after part."""
    try:
        survey = containers.survey(file, size)
    except (OSError, ValueError) as error:
        raise AudioError("read", f"reading failed ({detail(error)}): check the disk") from None
    if survey is None:
        survey = Survey([Part(((0, size),), looked=False)])
    if survey.as_text:
        text = "damaged: it was copied or saved as text, and what is left is no music"
        raise AudioError("decode", f"{text}: copy it again in binary mode")
    if not survey.parts:
        text = "damaged, nothing in it is whole: copy, download or export it again"
        raise AudioError("decode", text)
    flaws = Flaws(survey.lost_s, survey.missing_s)
    first = _open_part(file, survey.parts[0], flaws)

    def blocks() -> Blocks:
        at_rate = AtRate(first.rate)
        for k, part in enumerate(survey.parts):
            decoded = _open_part(file, part, flaws) if k else first
            with contextlib.closing(_counted(decoded, survey)) as inner:
                for block in inner:
                    yield from at_rate(block, decoded.rate)
        yield from at_rate.end()

    several = len(survey.parts) > 1
    return dataclasses.replace(
        first,
        blocks=blocks(),
        frames=None if several else first.frames,
        exact=first.exact and not several,
    )


def _open_part(file: BinaryIO, part: Part, flaws: Flaws) -> Decoded:
    """A part as the reader that can has it."""
    stream = Stream(file, part.pieces)
    second = part.mixed and importlib.util.find_spec("av") is not None
    decoded = (None if second else sndfile.decode(stream, flaws, part.looked)) or ffmpeg.decode(
        stream, flaws
    )
    return dataclasses.replace(decoded, frames=part.frames) if part.frames else decoded


def _counted(decoded: Decoded, survey: Survey) -> Blocks:
    """The blocks of a part; at their end what falls short of its declared length is a flaw."""
    before, frames = decoded.flaws.lost_s, 0
    with contextlib.closing(decoded.blocks):
        for block in decoded.blocks:
            frames += len(block)
            yield block
    if decoded.frames is None or (survey.counted and not decoded.lossless):
        return
    flaws = decoded.flaws
    short = (decoded.frames - frames) / decoded.rate - (flaws.lost_s - before)
    if short > SHORT_S and survey.holes and not decoded.lossless:
        flaws.lost_s += short
    elif short > SHORT_S:
        flaws.missing_s = max(flaws.missing_s, short)


# What may be packed into PCM, by two samples in a row, as 24 bits: IEC 61937 (AC-3, E-AC-3, DTS,
# AAC), SMPTE 337 (Dolby E) of 16, 20 and 24 bits, and DTS of 16 and 14 bits; the bytes either way.
_PACKED = {
    "Dolby or DTS (IEC 61937)": ((0xF872, 0x4E1F), (0x72F8, 0x1F4E)),
    "DTS": ((0x7FFE, 0x8001), (0xFE7F, 0x0180), (0x1FFF, 0xE800), (0xFF1F, 0x00E8)),
}
_PACKED_24 = ((0x6F8720, 0x54E1F0), (0x96F872, 0xA54E1F))
_LOOK_S = 5.0  # s of sound that are looked at


def _music(blocks: Blocks, rate: int) -> Blocks:
    """The same blocks; AudioError where they are a bit stream packed into samples."""
    looked, seen = 0, dict.fromkeys(_PACKED, 0)
    with contextlib.closing(blocks):
        for block in blocks:
            if looked < _LOOK_S * rate and block.any():
                looked += len(block)
                for what, count in _packed(block).items():
                    seen[what] += count
                    if seen[what] >= 2:  # one is chance
                        text = (
                            f"{what} is packed into its samples, which are no sound by themselves"
                        )
                        cure = "unpack it first, as with ffmpeg -f spdif or -f dts -i FILE"
                        raise AudioError("unsupported", f"{text}: {cure}")
            yield block


def _packed(block: np.ndarray) -> dict[str, int]:
    """How often the beginnings of packed streams are found in float32 samples."""
    finite = np.nan_to_num(np.clip(block.reshape(-1), -1, 1))
    words = np.rint(finite * np.float32(2**23)).astype(np.int32)
    words &= 0xFFFFFF
    now, following = words[:-1], words[1:]
    found = {}
    for what, pairs in _PACKED.items():
        wide = [(a << 8, b << 8) for a, b in pairs]
        wide += _PACKED_24 if "61937" in what else ()
        found[what] = sum(int(np.count_nonzero((now == a) & (following == b))) for a, b in wide)
    return found
