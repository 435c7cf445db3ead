"""What a file says of itself: its tags, and notes of provenance (C2PA, IPTC).

Anybody can write or remove them. So they are notices beside a result, and no evidence of the sound.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from artifactnet_jax.text import printable

# Modules of mutagen, an optional extra, and the formats in them whose tags are read.
MODULES = {
    **{"mutagen.mp3": "MP3", "mutagen.mp4": "MP4", "mutagen.flac": "FLAC", "mutagen.wave": "WAVE"},
    **{"mutagen.aiff": "AIFF", "mutagen.asf": "ASF", "mutagen.oggvorbis": "OggVorbis"},
    **{"mutagen.oggopus": "OggOpus", "mutagen.oggflac": "OggFLAC", "mutagen.aac": "AAC"},
    "mutagen.apev2": "APEv2File",
}
ENDS = 2**20  # bytes at the beginning and at the end that are searched for notes of provenance
MOST, LENGTH = 20, 160  # notices, and characters of a value
LONG = 10_000  # characters; a longer value is a picture, or lyrics

_SYSTEMS = (
    r"(?:suno|udio|eleven ?labs|eleven music|minimax|hailuo|mureka|riffusion|stable ?audio|"
    r"musicgen|audiocraft|lyria|synthid|soundraw|aiva|beatoven|mubert|ace-step|sonauto|diffrhythm)"
)
_SYSTEM = re.compile(rf"\b{_SYSTEMS}\b", re.IGNORECASE)
_SOURCE = r"(?:composite(?:With|Synthetic)?)?[Tt]rainedAlgorithmicMedia"
_SAYING = re.compile(
    rf"\b(?:made|created|generated|composed|produced)\s+(?:with|by|using|on|in)\s+"
    rf"(?:{_SYSTEMS}|ai|artificial intelligence)\b|\b{_SYSTEMS}\.(?:com|ai|io)\b|"
    rf"\bai[- ](?:generated|created|composed)\b|{_SOURCE}",
    re.IGNORECASE,
)
# Fields with names of people and works, which may be called as a system is: ID3, Vorbis, MP4, ASF.
_NAMES = {
    *("tit1", "tit2", "tit3", "tpe1", "tpe2", "tpe3", "tpe4", "talb", "tope", "tcom", "uslt"),
    *("title", "artist", "album", "albumartist", "album artist", "performer", "composer"),
    *("lyrics", "unsyncedlyrics", "\xa9nam", "\xa9art", "aart", "\xa9alb", "\xa9lyr", "\xa9wrt"),
    *("author", "wm/albumtitle", "wm/albumartist", "wm/composer", "wm/lyrics"),
}
# What the box of a manifest store begins with, in JUMBF and in MP4.
_C2PA = (
    bytes.fromhex("63327061 0011 0010 8000 00aa00389b71"),
    bytes.fromhex("d8fec3d6 1b0e 483c 9297 5828877ec481"),
)


def notices(file: BinaryIO) -> tuple[str, ...]:
    """What a seekable file says of being generated; nothing without mutagen, or of bad tags.

    A text of a tag counts if it names a generator of music, or says that a machine made it. The
    file is left at its beginning.
    """
    try:
        kinds = _kinds()
    except ImportError:
        return ()
    found: list[str] = []
    for read in (_of_tags, _of_provenance):
        try:
            file.seek(0)
            found += read(file, kinds)
        except Exception:  # of any kind: mutagen's, of a damaged file, or the disk's, told later
            continue
    file.seek(0)
    return tuple(dict.fromkeys(found))[:MOST]


@functools.cache
def _kinds() -> list[Any]:
    return [getattr(importlib.import_module(name), kind) for name, kind in MODULES.items()]


def _of_tags(file: BinaryIO, kinds: list[Any]) -> Iterator[str]:
    import mutagen

    found: Any = mutagen.File(file, options=kinds)
    tags = found.tags if found is not None else None
    for key, values in tags.items() if tags is not None else ():
        field = str(key).partition(":")[0]
        for value in values if isinstance(values, list) else [values]:
            if "c2pa" in getattr(value, "mime", "").lower():
                yield "C2PA manifest, not verified"
                continue
            text = _text(value)
            wanted = _SAYING if field.lower() in _NAMES else _SYSTEM
            if len(text) <= LONG and (wanted.search(text) or _SAYING.search(text)):
                yield f"tag {printable(field)}: {printable(text.strip())[:LENGTH]}"


def _text(value: Any) -> str:
    """The text of a frame, atom, comment or attribute; "" for a picture."""
    data = getattr(value, "data", value)
    if isinstance(data, bytes):
        return data.decode("utf-8", "replace") if len(data) <= LONG else ""
    return str(value)


def _of_provenance(file: BinaryIO, _: list[Any]) -> Iterator[str]:
    head = file.read(ENDS)
    size = file.seek(0, 2)
    file.seek(max(0, size - ENDS))
    data = head + file.read(ENDS)
    if any(mark in data for mark in _C2PA):
        yield "C2PA manifest, not verified"
    for source in sorted(set(re.findall(_SOURCE.encode(), data))):
        yield f"digital source type: {source.decode()}"
