"""Where the sound lies in a file: the sizes that its headers state, held against what is there.

Decoders take a header's word for the end of the file. This module looks for itself: at the chunks
of WAV, W64, AIFF, CAF and AU, at the header and the last frames of FLAC, and through `packets` at
every page of Ogg and every frame of MPEG audio. What is damaged or foreign is left out, a size
that was never filled in is put right, and what a header promises in vain is counted.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from typing import BinaryIO

from artifactnet_jax import packets
from artifactnet_jax.packets import Bytes, Part, Piece, Survey, id3_size

# Streams of packets that zeros may follow: AC-3, DTS, MPEG transport, ASF.
_PADDED = (b"\x0b\x77", b"\x7f\xfe\x80\x01", b"\x47\x40", b"\x30\x26\xb2\x75")
_TRUEHD = b"\xf8\x72\x6f\xba"
_FEW_S = 0.1  # s; so much behind the data chunk is padding rather than sound
_PROBE = 2**16  # bytes that are looked at where one must guess
_ENDLESS = 2**62  # a size that nobody has
# What else may stand behind the sound: pages, pictures, archives, tags, text.
_FOREIGN: tuple[bytes, ...] = (
    b"<",
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"GIF8",
    b"%PDF",
    b"PK\3\4",
    b"{",
    b"\r\n",
    b"\n",
)
_FOREIGN += (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"RIFF", b"OggS", b"fLaC")


def survey(file: BinaryIO, size: int) -> Survey:
    """Where the sound lies in a file of `size` bytes: all of it in kinds that are not looked into.

    The position of the file afterwards is anywhere. OSError.
    """
    data = Bytes(file, size)
    base = 0
    while step := id3_size(data.at(base, 10)):  # some programs put two
        base += step
    head = data.at(base, 16)
    found: Survey | None
    if head[:4] in (b"RIFF", b"RF64", b"BW64", b"RIFX") and head[8:12] == b"WAVE":
        found = _riff(data, base)
    elif head[:4] == b"riff" and head[4:] == _W64[4:]:
        found = _w64(data, base)
    elif head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        found = _aiff(data, base)
    elif head[:4] == b"caff":
        found = _caf(data, base)
    elif head[:4] == b".snd":
        found = _au(data, base)
    elif head[:4] == b"fLaC":
        found = _flac(data, base)
    elif head[:4] == b"OggS":
        found = packets.ogg(data, base)
    elif head[:4] == b"RIFF":
        found = _other_riff(data, base)
    elif head[:4] == b"DSD " and len(head) == 16:
        cut = struct.unpack("<I", head[12:])[0] > size - base
        found = Survey([Part(((base, size),))], missing_s=math.inf if cut else 0.0)
    elif data.at(base, 20) == _VOC:
        found = _voc(data, base)
    elif base == 0 and (head.startswith(_PADDED) or head[4:8] == _TRUEHD):
        found = Survey([Part(((0, data.last_byte()),))])
    else:
        found = packets.frames(data, base, size)
    return found or Survey([Part(((base, size),), looked=False)])


# --- chunks ---------------------------------------------------------------------------------------

_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """How a family of formats writes its chunks: a name, a size, a body, perhaps padding."""

    name: int  # bytes
    size: struct.Struct
    aligned: int  # bodies begin at multiples of so many bytes
    whole: bool = False  # the size counts name and size too

    def step(self, size: int) -> int:
        return -(-size // self.aligned) * self.aligned


@dataclasses.dataclass
class _Body:
    """The chunk that holds the sound."""

    start: int
    stated: int | None  # bytes; None: the header does not know
    size_at: int  # where the size is written


def _walk(
    data: Bytes, at: int, kind: _Chunks, sound: bytes
) -> tuple[dict[bytes, tuple[int, int]], _Body | None]:
    """Chunks in front of the chunk `sound` by name, as [start, end) of their bodies; and that."""
    found: dict[bytes, tuple[int, int]] = {}
    head = kind.name + kind.size.size
    while len(start := data.at(at, head)) == head:
        size = int(kind.size.unpack(start[kind.name :])[0])
        size -= head if kind.whole else 0
        name = start[:4]
        if name == sound:
            return found, _Body(at + head, size, at + kind.name)
        if size < 0 or size > data.size:
            break
        found[name] = (at + head, at + head + size)
        at += head + kind.step(size)
    return found, None


def _end(data: Bytes, body: _Body, kind: _Chunks, byte_rate: float) -> int | None:
    """Where the sound really ends; None where the header has it right, or promises too much.

    A stated size is too small where neither a chunk, nor padding, nor anything foreign follows.
    Sizes of 32 bits wrap: then the right one is found by what follows.
    """
    size = body.stated
    if size is None:
        return data.size
    steps = [0]
    if kind.size.size == 4 and data.size >= 2**32:
        steps = [k * 2**32 for k in range(data.size // 2**32 + 1)]
    for more in steps:
        after = body.start + kind.step(size + more)
        if after <= data.size and _in_order(data, after, kind, byte_rate):
            return body.start + size + more if more else None
    if body.start + size > data.size:
        return None
    return _before_chunks(data, body.start)


def _in_order(data: Bytes, at: int, kind: _Chunks, byte_rate: float) -> bool:
    """Whether what stands at `at`, behind the sound, is no sound."""
    rest = data.size - at
    if rest <= max(8, _FEW_S * byte_rate):
        return True
    head = data.at(at, 24)
    name = head[: kind.name][:4]
    if all(32 <= byte < 127 for byte in name) and len(head) >= kind.name + kind.size.size:
        size = int(kind.size.unpack_from(head, kind.name)[0])
        if 0 <= size <= rest:
            return True
    return head.startswith(_FOREIGN) or data.all_zero(at, data.size)


def _before_chunks(data: Bytes, start: int) -> int:
    """The end of sound that reaches to the end of the file, or to a list of names there."""
    at = max(start, data.size - _PROBE)
    tail = data.at(at, _PROBE)
    for found in re.finditer(rb"LIST|id3 |bext|cue |smpl", tail):
        if found.start() + 8 <= len(tail):
            size = struct.unpack_from("<I", tail, found.start() + 4)[0]
            if at + found.start() + 8 + size + size % 2 == data.size:
                return at + found.start()
    return data.size


def _chunked(
    data: Bytes, base: int, body: _Body, end: int | None, head: bytes | None, byte_rate: float
) -> Survey:
    """The survey of a file of chunks whose head, if its sizes are wrong, is put right by `head`."""
    missing = 0.0
    pieces: tuple[Piece, ...] = ((base, data.size),)
    if end is not None and head is not None:
        pieces = (head, (body.start, end))
    elif body.stated is not None and byte_rate:
        missing = max(0, body.start + body.stated - data.size) / byte_rate
    sound = data.at(body.start, _PROBE)
    return Survey([Part(pieces)], missing_s=missing, as_text=packets.copied_as_text(sound))


def _unknown(size: int, present: int) -> bool:
    """Whether a size of 32 bits is what a program writes that cannot know: into a pipe."""
    near = (2**31, 2**32, 0x7F000000)
    return size == 0 or (size > present and min(abs(size - n) for n in near) <= 2**16)


def _format(data: Bytes, chunks: dict[bytes, tuple[int, int]]) -> bytes | None:
    """The chunk "fmt ", at most 1 KiB of it; None where it is not there, or cut off."""
    fmt = data.at(*packets.span(chunks[b"fmt "]))[:1024] if b"fmt " in chunks else b""
    return fmt if len(fmt) >= 16 else None


def _riff(data: Bytes, base: int) -> Survey | None:
    order = ">" if data.at(base, 4) == b"RIFX" else "<"
    kind = _Chunks(4, struct.Struct(f"{order}I"), 2)
    chunks, body = _walk(data, base + 12, kind, b"data")
    fmt = _format(data, chunks)
    if body is None or fmt is None:
        return None
    tag, _, _, byte_rate, align = struct.unpack(f"{order}HHIIH", fmt[:14])
    present = data.size - body.start
    if body.stated == 2**32 - 1 and b"ds64" in chunks:
        body.stated = struct.unpack("<Q", data.at(chunks[b"ds64"][0] + 8, 8))[0]
        if not 0 < body.stated < _ENDLESS or _unknown(body.stated, present):
            body.stated = None
    elif _unknown(body.stated or 0, present) and not (
        body.stated == 0 and _in_order(data, body.start, kind, byte_rate)
    ):
        body.stated = None
    end = _end(data, body, kind, byte_rate)
    if tag in (0x50, 0x55):  # MPEG audio in a WAV file
        last = data.size if end is not None else body.start + (body.stated or 0)
        inner = packets.frames(data, body.start, min(data.size, last))
        if inner is not None:
            inner.missing_s += _missing(body, data, byte_rate)
        return inner
    head = None
    if end is not None:
        end -= (end - body.start) % max(1, align)
        fact = data.at(*packets.span(chunks.get(b"fact", (0, 0))))
        head = _wave_head(order, fmt, fact, end - body.start, max(1, align))
    found = _chunked(data, base, body, end, head, byte_rate)
    stop = end if end is not None else body.start + kind.step(body.stated or 0)
    follower = data.at(stop, 12)
    if follower[:4] == b"RIFF" and follower[8:] == b"WAVE":  # one file behind another
        more = _riff(data, stop)
        if more is not None:
            first = found.parts[0] if end is not None else Part(((base, stop),))
            return dataclasses.replace(more, parts=[first, *more.parts])
    return found


def _wave_head(order: str, fmt: bytes, fact: bytes, size: int, align: int) -> bytes:
    """The head of a WAV file of `size` bytes of sound, RF64 where 32 bits do not hold them."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return name + struct.pack(f"{order}I", len(body)) + body + bytes(len(body) % 2)

    inner = chunk(b"fmt ", fmt) + (chunk(b"fact", fact) if fact and size < 2**31 else b"")
    whole = 4 + len(inner) + 8 + size
    if whole < 2**32 - 2**17:
        riff = b"RIFX" if order == ">" else b"RIFF"
        sizes = struct.pack(f"{order}I", whole), struct.pack(f"{order}I", size)
        return riff + sizes[0] + b"WAVE" + inner + b"data" + sizes[1]
    ds64 = chunk(b"ds64", struct.pack("<QQQI", whole + 36, size, size // align, 0))
    return b"RF64\xff\xff\xff\xffWAVE" + ds64 + inner + b"data\xff\xff\xff\xff"


def _w64(data: Bytes, base: int) -> Survey | None:
    kind = _Chunks(16, struct.Struct("<Q"), 8, whole=True)
    chunks, body = _walk(data, base + 40, kind, b"data")
    fmt = _format(data, chunks)
    if body is None or fmt is None:
        return None
    byte_rate, align = struct.unpack("<IH", fmt[8:14])
    present = data.size - body.start
    stated = body.stated or 0
    if stated <= 0 or stated > _ENDLESS or _unknown(stated, present):
        body.stated = None
    end = _end(data, body, kind, byte_rate)
    if end is None and body.stated is not None:  # libsndfile reads on, or refuses what is cut off
        end = min(data.size, body.start + body.stated)
    head = None
    if end is not None:
        end -= (end - body.start) % max(1, align)
        head = _wave_head("<", fmt, b"", end - body.start, max(1, align))
    found = _chunked(data, base, body, end, head, byte_rate)
    return dataclasses.replace(found, missing_s=_missing(body, data, byte_rate))


def _missing(body: _Body, data: Bytes, byte_rate: float) -> float:
    """Seconds that a size promises and the file does not have."""
    short = 0 if body.stated is None else max(0, body.start + body.stated - data.size)
    return short / byte_rate if byte_rate else math.inf if short else 0.0


def _aiff(data: Bytes, base: int) -> Survey | None:
    kind = _Chunks(4, struct.Struct(">I"), 2)
    chunks, body = _walk(data, base + 12, kind, b"SSND")
    if body is None:
        return None
    after = body.start + kind.step(body.stated or 0)
    if b"COMM" not in chunks:  # it may stand behind the sound
        chunks |= _walk(data, after, kind, b"SSND")[0]
    comm = data.at(*packets.span(chunks.get(b"COMM", (0, 0))))[:512]
    if len(comm) < 18:
        return None
    channels, _, bits = struct.unpack(">HIH", comm[:8])
    rate = _extended(comm[8:18])
    width = _AIFC_BYTES.get(comm[18:22], -(-bits // 8) if len(comm) == 18 else 0)
    byte_rate = rate * channels * (width or -(-bits // 8))
    present = data.size - body.start
    if _unknown(body.stated or 0, present) and not (
        body.stated == 0 and _in_order(data, body.start, kind, byte_rate)
    ):
        body.stated = None
    end = _end(data, body, kind, byte_rate)
    head = None
    if end is not None and width and channels:
        align = width * channels
        sound = min(end - body.start - 8, 2**32 - 2**17) // align * align
        end = body.start + 8 + sound
        comm = comm[:2] + struct.pack(">I", sound // align) + comm[6:]
        inner = b"COMM" + struct.pack(">I", len(comm)) + comm + bytes(len(comm) % 2)
        whole = 4 + len(inner) + 16 + sound
        ssnd = b"SSND" + struct.pack(">I", 8 + sound) + data.at(body.start, 8)
        kind_of = data.at(base + 8, 4)
        body.start += 8
        head = b"FORM" + struct.pack(">I", whole) + kind_of + inner + ssnd
    found = _chunked(data, base, body, end, head, byte_rate)
    if head is not None and width:  # AIFF of over 4 GiB
        found.missing_s = max(0, data.size - (end or 0) - _PROBE) / byte_rate
    return found


_AIFC_BYTES = {b"NONE": 0, b"twos": 2, b"sowt": 2, b"in24": 3, b"in32": 4, b"fl32": 4, b"FL32": 4}
_AIFC_BYTES |= {b"fl64": 8, b"FL64": 8, b"ulaw": 1, b"alaw": 1, b"ULAW": 1, b"ALAW": 1, b"raw ": 1}


def _extended(data: bytes) -> float:
    """A number of 80 bits, as AIFF has the rate; 0.0 for what is none."""
    exponent, fraction = struct.unpack(">HQ", data)
    try:
        return math.ldexp(fraction, (exponent & 0x7FFF) - 16383 - 63)
    except OverflowError:
        return 0.0


def _caf(data: Bytes, base: int) -> Survey | None:
    kind = _Chunks(4, struct.Struct(">q"), 1)
    chunks, body = _walk(data, base + 8, kind, b"data")
    desc = data.at(*packets.span(chunks.get(b"desc", (0, 0))))
    if body is None or len(desc) < 32:
        return None
    rate, _, _, width, frames, _, _ = struct.unpack(">d4sIIIII", desc[:32])
    byte_rate = rate * width / frames if frames and 0 < rate < 1e7 else 0.0
    present = data.size - body.start
    if body.stated == -1 or (body.stated or 0) < 4 or (body.stated or 0) > _ENDLESS:
        body.stated = None
    end = _end(data, body, kind, byte_rate)
    missing = _missing(body, data, byte_rate)
    if not byte_rate and body.stated is not None and body.stated > present:
        missing = math.inf  # packets of different sizes: how many is not known, that is enough
    if end is None and body.stated is not None and body.stated > present:
        end = data.size
    head = None
    if end is not None:
        end -= (end - body.start - 4) % max(1, width)
        head = data.at(base, body.size_at - base) + struct.pack(">q", end - body.start)
    found = _chunked(data, base, body, end, head, byte_rate)
    return dataclasses.replace(found, missing_s=missing)


_AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}


def _au(data: Bytes, base: int) -> Survey | None:
    head = data.at(base, 24)
    if len(head) < 24:
        return None
    offset, stated, encoding, rate, channels = struct.unpack(">IIIII", head[4:])
    byte_rate = float(_AU_BYTES.get(encoding, 0) * rate * channels)
    start = base + offset
    body = _Body(start, None if _unknown(stated, data.size - start) else stated, base + 8)
    kind = _Chunks(4, struct.Struct(">I"), 1)
    end = _end(data, body, kind, byte_rate)
    patched = None
    if end is not None and start < data.size:
        size = struct.pack(">I", min(end - start, 2**32 - 1))
        patched = head[:8] + size + head[12:] + data.at(base + 24, max(0, offset - 24))
    return _chunked(data, base, body, end, patched, byte_rate)


_VOC = b"Creative Voice File\x1a"
_VOC_RATE = struct.Struct("<IBB")


def _voc(data: Bytes, base: int) -> Survey | None:
    """Blocks of a VOC file: a kind, a size of 24 bits, a body; 0 is the end."""
    at = base + int.from_bytes(data.at(base + 20, 2), "little")
    byte_rate = 0.0
    # Some programs state a few bytes too few: then a block seems to begin among the last samples.
    while data.size - at > 64 and (head := data.at(at, 10))[0]:
        size = int.from_bytes(head[1:4], "little")
        if byte_rate and at + 4 + size > data.size:
            break
        if head[0] == 9:
            rate, bits, channels = _VOC_RATE.unpack(head[4:10])
            byte_rate = rate * channels * bits / 8
        elif head[0] == 1:
            byte_rate = 1e6 / (256 - head[4])
        at += 4 + size
    missing = (at - data.size) / byte_rate if byte_rate and at > data.size else 0.0
    end = data.size if data.size - at <= 64 else at + 1
    return Survey([Part(((base, end),))], missing_s=missing)


def _other_riff(data: Bytes, base: int) -> Survey:
    """RIFF of another kind, as AVI: whether it is as long as it says."""
    at = base
    while len(head := data.at(at, 8)) == 8 and head[:4] == b"RIFF":  # from 1 GiB on AVI has several
        size = struct.unpack("<I", head[4:])[0]
        at += 8 + size + size % 2
    stated = at - base
    cut = data.size - base + 1 < stated < 2**31 - 2**16
    return Survey([Part(((base, data.size),))], missing_s=math.inf if cut else 0.0)


# --- FLAC -----------------------------------------------------------------------------------------

_FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")


def _flac(data: Bytes, base: int) -> Survey | None:
    """FLAC without a container: one stream, or one behind another."""
    info = data.at(base, 42)
    if len(info) < 42 or not _FLAC_START.match(info):
        return Survey([Part(((base, data.size),))])
    starts = [base, *data.find_all(_FLAC_START, base + 42)]
    parts = []
    for start, end in zip(starts, [*starts[1:], data.size], strict=True):
        info = data.at(start, 42)
        total = packets.flac_total(info[8:42])
        last = _flac_last(data, start, info, end)
        pieces: tuple[Piece, ...] = ((start, end),)
        if last is not None and total and last > total:  # libFLAC would stop there
            head = bytearray(info)
            head[21] &= 0xF0
            head[22:26] = bytes(4)
            pieces = (bytes(head), (start + 42, end))
            total = last
        parts.append(Part(pieces, total or last))
    return Survey(parts)


def _flac_last(data: Bytes, base: int, info: bytes, end: int | None = None) -> int | None:
    """The sample after the last frame, by the headers of frames near the end; None: none found."""
    end = data.size if end is None else end
    for reach in (_PROBE, 2**20):
        start = max(base + 42, end - reach)
        last = packets.flac_last(data.at(start, end - start), int.from_bytes(info[10:12], "big"))
        if last is not None or start == base + 42:
            return last
    return None
