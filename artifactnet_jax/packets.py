"""A walk over the pages of Ogg and the frames of MPEG audio: what is whole, and what lies between.

Each says its own size, so that a walk costs little. Where the next one is not where it should be,
something is damaged or foreign: that is left out. The rest is glued together, and counted.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

Piece = bytes | tuple[int, int]  # bytes as they are, or [start, end) of the file

_BLOCK = 2**20  # bytes read at a time
_WINDOW = 2**16  # in front of the first frame


@dataclasses.dataclass
class Part:
    """What is to be given to a decoder as one file."""

    pieces: tuple[Piece, ...]
    frames: int | None = None  # samples per channel, where the format states it
    mixed: bool = False  # it holds other tracks too
    looked: bool = True  # it was looked into


@dataclasses.dataclass
class Survey:
    """Where the sound of a file lies."""

    parts: list[Part]
    missing_s: float = 0.0  # what the header promises beyond the end; infinite: nobody knows
    lost_s: float = 0.0  # left out, since it is damaged
    holes: int = 0  # damaged places, whose length only decoding tells
    counted: bool = False  # what is missing is counted here: a decoder's word is no use
    as_text: bool = False  # copied as if it were text


class Bytes:
    """Any part of a file."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self.size = file, size
        self._window, self._from = b"", 0  # what was read last

    def at(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, fewer at the end of the file."""
        if size <= 0 or start < 0 or start >= self.size:
            return b""
        offset = start - self._from
        if offset < 0 or offset + min(size, self.size - start) > len(self._window):
            self._file.seek(start)
            # Little is asked for at the places that a header names, much on a walk.
            near = 0 <= offset <= len(self._window)
            ahead = _BLOCK if near else 2**12
            self._window, self._from, offset = self._file.read(max(size, ahead)), start, 0
        return self._window[offset : offset + size]

    def blocks(self, start: int, overlap: int = 0) -> Iterator[tuple[int, bytes]]:
        """(position, bytes) from `start` to the end, each with the last bytes of the one before."""
        while start < self.size:
            block = self.at(start, _BLOCK)
            if not block:
                return
            yield start, block
            if start + len(block) >= self.size:
                return
            start += max(1, len(block) - overlap)

    def all_zero(self, start: int, end: int) -> bool:
        """Whether nothing but zeros stands in [start, end)."""
        return not any(block[: end - at].strip(b"\0") for at, block in self.blocks(start))

    def last_byte(self) -> int:
        """Where the zeros at the end begin."""
        for end in range(self.size, 0, -_BLOCK):
            start = max(0, end - _BLOCK)
            if rest := self.at(start, end - start).rstrip(b"\0"):
                return start + len(rest)
        return 0

    def find_all(self, pattern: re.Pattern[bytes], start: int) -> list[int]:
        """Where a pattern of at most 16 bytes is found from `start` on."""
        hits = (at + m.start() for at, b in self.blocks(start, 16) for m in pattern.finditer(b))
        return sorted(set(hits))


def span(place: tuple[int, int]) -> tuple[int, int]:
    """[start, end) as (start, size)."""
    return place[0], place[1] - place[0]


def id3_size(head: bytes) -> int:
    """Bytes of the ID3v2 tag that begins with these ten; 0 for none."""
    if head[:3] != b"ID3" or len(head) < 10 or head[3] == 255:
        return 0
    size = 0
    for byte in head[6:10]:  # four groups of seven bits
        size = size << 7 | byte & 127
    return 10 + size + (10 if head[5] & 16 else 0)


def copied_as_text(sound: bytes) -> bool:
    """Whether bytes that should be sound went through a program for text.

    Such a copy has a carriage return before every line feed, or is valid UTF-8 throughout.
    """
    feeds = sound.count(b"\n")
    if feeds >= 16 and feeds == sound.count(b"\r\n"):
        return True
    try:
        text = sound.decode()
    except UnicodeDecodeError as error:
        if error.start < len(sound) - 3:  # no cut character at the end
            return False
        text = sound[: error.start].decode()
    return len(sound) - len(text) > 64  # bytes of characters beyond ASCII


# --- FLAC -----------------------------------------------------------------------------------------


def flac_total(info: bytes) -> int:
    """Samples per channel by the 34 bytes of STREAMINFO; 0: unknown."""
    return (info[13] & 15) << 32 | int.from_bytes(info[14:18], "big")


def flac_last(tail: bytes, block: int) -> int | None:
    """The sample after the last of the frames whose headers stand in `tail`; None: there is none.

    One header in some thousand bytes is chance: a frame counts that goes on with another.
    """
    found = [flac_frame(tail, m.start(), block) for m in re.finditer(rb"\xff[\xf8\xf9]", tail)]
    stretches = [each for each in found if each is not None]
    ends = {end for _, end in stretches}
    linked = [end for first, end in stretches if first in ends]
    if linked:
        return linked[-1]
    return stretches[0][1] if len(stretches) == 1 else None


def flac_frame(tail: bytes, at: int, block: int) -> tuple[int, int] | None:
    """First sample and the one after the last of the frame whose header stands at `at`, or None.

    `block` is the samples per frame in a stream of equal frames.
    """
    head = tail[at : at + 16]
    if len(head) < 16 or head[3] & 1 or head[2] >> 4 == 0 or head[2] & 15 == 15:
        return None
    lead, more = head[4], 0
    if lead >= 0x80:
        more = next((k for k in range(1, 7) if lead >> (6 - k) & 1 == 0), 0)
        if lead < 0xC0 or more == 0:
            return None
    number = lead & (127 if more == 0 else (1 << (6 - more)) - 1)
    for byte in head[5 : 5 + more]:
        if byte >> 6 != 2:
            return None
        number = number << 6 | byte & 63
    p = 5 + more
    code = head[2] >> 4
    wide = {6: 1, 7: 2}.get(code, 0)
    size = int.from_bytes(head[p : p + wide], "big") + 1 if wide else 0
    size = size or (192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8)
    p += wide + {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    if p >= len(head) or _crc8(head[:p]) != head[p]:
        return None
    first = number if head[1] & 1 else number * block
    return first, first + size


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 7 if crc & 128 else crc << 1) & 255
    return crc


# --- Ogg ------------------------------------------------------------------------------------------

_MIRROR = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_crc(page: bytes) -> int:
    """The checksum of a page, by zlib's, which takes the bits from the other end."""
    mirrored = zlib.crc32(page.translate(_MIRROR), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)


@dataclasses.dataclass
class _Link:
    """One of the streams (or groups of them, as with video) that follow one another in Ogg."""

    start: int
    end: int
    first: bytes  # of the first page
    serials: set[int]
    open: bool = True  # only first pages so far
    ended: bool = False
    holes: int = 0
    next: dict[int, int] = dataclasses.field(default_factory=dict)  # number of the next page


def ogg(data: Bytes, base: int) -> Survey:
    """Every page of an Ogg file whose checksum is right, by links."""
    links: list[_Link] = []
    position = base
    bad = 0
    while True:
        page = data.at(position, 27)
        if page[:4] == b"OggS" and len(page) == 27:
            table = data.at(position + 27, page[26])
            size = 27 + page[26] + sum(table)
            whole = data.at(position, size)
            crc = struct.unpack("<I", page[22:26])[0]
            if len(whole) == size and _ogg_crc(whole[:22] + bytes(4) + whole[26:]) == crc:
                _take(links, position, whole, bad)
                bad = 0
                position += size
                continue
        following = next(iter(_find(data, b"OggS", position + 1)), None)
        if following is None:
            break
        bad = 1
        position = following
    parts = []
    for link in links:
        total = None
        if (at := link.first.find(b"\x7fFLAC")) >= 0:
            total = flac_total(link.first[at + 17 : at + 51].ljust(34, b"\0")) or None
        parts.append(Part(((link.start, link.end),), total, mixed=len(link.serials) > 1))
    cut = not links or not links[-1].ended
    holes = sum(link.holes for link in links)
    return Survey(parts, missing_s=math.inf if cut else 0.0, holes=holes, counted=not holes)


def _take(links: list[_Link], position: int, page: bytes, bad: int) -> None:
    """Add a page to the link that it belongs to."""
    flags, serial, number = page[5], *struct.unpack("<II", page[14:22])
    if flags & 2 and not (links and links[-1].open):
        links.append(_Link(position, position, page, {serial}))
        bad = 0  # what stands between two links is foreign, or the end of the former
    elif not links:
        return
    link = links[-1]
    link.open = bool(flags & 2)
    link.serials.add(serial)
    if bad or number != link.next.get(serial, number):
        link.holes += 1
    link.next[serial] = number + 1 & 0xFFFFFFFF
    link.end = position + len(page)
    link.ended = bool(flags & 4) or (link.ended and len(link.serials) > 1)


def _find(data: Bytes, what: bytes, start: int) -> Iterator[int]:
    for at, block in data.blocks(start, len(what) - 1):
        found = block.find(what)
        if found >= 0:
            yield at + found


# --- MPEG audio and ADTS --------------------------------------------------------------------------

_KBITS = {  # by version 1 or 2, and layer
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_KBITS[2, 3] = _KBITS[2, 2]
_SYNC = re.compile(rb"\xff[\xe0-\xff]")


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What the frames of one stream have in common."""

    rate: int  # Hz
    samples: int  # per frame
    mono: bool
    version: int  # 1, or 2 for the low rates
    sizes: dict[bytes, int]  # of a frame by its first three bytes; empty: ADTS

    def step(self, head: bytes) -> int:
        """Bytes of the frame that begins with `head`; 0: none of this kind."""
        if self.sizes:
            return self.sizes.get(head[:3], 0) if (head[3] >= 192) == self.mono else 0
        if _kind(head) is not self:
            return 0
        return (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5

    def tag(self, frame: bytes) -> int | None:
        """Frames that the tag of an encoder states, 0 where it does not; None: no tag."""
        at = (
            4
            + {(1, False): 32, (1, True): 17, (2, False): 17, (2, True): 9}[self.version, self.mono]
        )
        if frame[at : at + 4] in (b"Xing", b"Info"):
            stated = frame[at + 7] & 1 if len(frame) > at + 12 else 0
            return int.from_bytes(frame[at + 8 : at + 12], "big") if stated else 0
        if frame[36:40] == b"VBRI":
            return int.from_bytes(frame[50:54], "big")
        return None

    def tagged(self, frame: bytes, count: int) -> bytes:
        """A frame with a tag that states `count` frames; made of `frame`, if that has a tag."""
        at = 4 + self._side
        if frame[at : at + 4] in (b"Xing", b"Info") and frame[at + 7] & 1:
            return frame[: at + 8] + count.to_bytes(4, "big") + frame[at + 12 :]
        head = bytes((255, frame[1] | 1, 0x90 | frame[2] & 12, frame[3]))
        body = bytes(self._side) + b"Info" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
        return (head + body).ljust(self.sizes[head[:3]], b"\0")

    @property
    def _side(self) -> int:
        """Bytes between the header and the tag."""
        if self.version == 1:
            return 17 if self.mono else 32
        return 9 if self.mono else 17


_kinds: dict[tuple[int, ...], _Kind] = {}


def _kind(head: bytes) -> _Kind | None:
    """The kind of the frame that begins with `head`, six bytes; None: it is no frame."""
    if len(head) < 6 or head[0] != 255 or head[1] < 0xE0:
        return None
    if head[1] & 0xF6 == 0xF0:
        return _adts_kind(head)
    version, layer, index = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), head[2] >> 2 & 3
    if version == 1 or layer == 4 or index == 3 or not 0 < head[2] >> 4 < 15:
        return None
    mono = head[3] >= 192
    key = (1, version, layer, index, mono)
    if key not in _kinds:
        low = version != 3
        rate = (44100, 48000, 32000)[index] >> {3: 0, 2: 1, 0: 2}[version]
        samples = 384 if layer == 1 else 576 if layer == 3 and low else 1152
        sizes = {}
        for k, kbits in enumerate(_KBITS[1 + low, layer], 1):
            for rest in range(4):  # padding, and a private bit
                slots = samples // (32 if layer == 1 else 8) * kbits * 1000 // rate + (rest >> 1)
                for first in (0xE0 | version << 3 | 4 - layer << 1 | p for p in (0, 1)):
                    name = bytes((255, first, k << 4 | index << 2 | rest))
                    sizes[name] = slots * (4 if layer == 1 else 1)
        _kinds[key] = _Kind(rate, samples, mono, 1 + low, sizes)
    return _kinds[key]


_ADTS_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)


def _adts_kind(head: bytes) -> _Kind | None:
    index, channels = head[2] >> 2 & 15, (head[2] & 1) << 2 | head[3] >> 6
    if index >= len(_ADTS_RATES) or (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5 < 8:
        return None
    key = (0, head[1] & 8, head[2] & 254, channels)
    if key not in _kinds:
        _kinds[key] = _Kind(_ADTS_RATES[index], 1024, channels == 1, 1, {})
    return _kinds[key]


@dataclasses.dataclass
class _Run:
    """Frames of one stream that follow one another."""

    start: int
    end: int
    kind: _Kind
    count: int = 0
    last: int = 0  # where the last of them begins
    tag: int | None = None  # frames that an encoder's tag at its beginning states
    body: int = 0  # where the frame after the tag begins
    head: bytes = b""  # of the first frame; with a tag, all of it


def _chain(data: Bytes, at: int, end: int, count: int = 4) -> _Kind | None:
    """The kind of the frames at `at`, if `count` follow one another, or fewer up to `end`."""
    kind = _kind(head := data.at(at, 6))
    for k in range(count):
        step = kind.step(head) if kind and len(head) == 6 else 0
        if not step:
            foreign = len(head) < 6 or head.startswith(TAGS)
            return kind if k > 1 and foreign else None
        at += step
        if at > end:
            return None
        head = data.at(at, min(6, end - at))
    return kind


def _run(data: Bytes, start: int, end: int, kind: _Kind) -> _Run:
    """The frames from `start` on, up to the next tag of an encoder."""
    run = _Run(start, start, kind, body=start, head=data.at(start, 4))
    position = start
    while True:
        block = data.at(position, min(_BLOCK, end - position))
        tags = _tags_in(block, kind)
        full = position + len(block) >= end
        p, before, last = 0, 0, len(block) - (6 if full else 64)  # a tag is seen whole
        sizes, mono = kind.sizes, kind.mono
        while p <= last:
            if sizes:
                step = sizes.get(block[p : p + 3], 0) if (block[p + 3] >= 192) == mono else 0
            else:
                step = kind.step(block[p : p + 6])
            if not step or (full and p + step > len(block)):
                break
            if p in tags:
                if run.count:
                    run.end = position + p
                    run.last = position + before if p else run.last
                    return run
                run.tag, run.body = kind.tag(block[p : p + 64]), position + p + step
                run.head = block[p : p + step]
            before = p
            p += step
            run.count += 1
        run.last = position + before if p else run.last
        position += p
        if p <= last or full:
            run.end = position
            return run


def _tags_in(block: bytes, kind: _Kind) -> set[int]:
    """Where frames with the tag of an encoder may begin."""
    found: set[int] = set()
    if kind.sizes:
        for name in (b"Xing", b"Info", b"VBRI"):
            at = block.find(name)
            while at >= 0:
                found |= {at - 36, at - 21, at - 13}
                at = block.find(name, at + 4)
        found = {at for at in found if at >= 0 and kind.tag(block[at : at + 64]) is not None}
    return found


TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")


def _after_tags(data: Bytes, at: int, end: int) -> int:
    """Where the tags that stand at `at` end."""
    while at < end:
        head = data.at(at, 32)
        if step := id3_size(head):
            at += step
        elif head[:3] == b"TAG":
            at += 128
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            size, flags = int.from_bytes(head[12:16], "little"), head[23]
            at += size + (32 if flags & 0x20 else 0)
        elif head[:11] == b"LYRICSBEGIN":
            found = re.search(rb"LYRICS200|LYRICSEND", data.at(at, 2**16))
            at += found.end() if found else 11
        else:
            break
    return min(at, end)


def _after_zeros(data: Bytes, at: int) -> int:
    """Where the zeros that stand at `at` end."""
    for start, block in data.blocks(at):
        if rest := block.lstrip(b"\0"):
            return start + len(block) - len(rest)
    return data.size


def _next(data: Bytes, at: int, end: int) -> tuple[int, _Kind] | None:
    """Where the next frames begin, and of what kind; None: nowhere."""
    for start, block in data.blocks(at, 2):
        for found in _SYNC.finditer(block):
            position = start + found.start()
            if position >= end:
                return None
            kind = _chain(data, position, end)
            if kind is not None:
                return position, kind
    return None


def frames(data: Bytes, base: int, end: int) -> Survey | None:
    """Every frame of MPEG audio or ADTS in [base, end); None: it is neither.

    Frames behind a gap belong to the stream before it, unless they are of another kind or begin
    with a tag of their own. MPEG audio that is wrapped in another format is left to its reader.
    """
    start = _after_zeros(data, _after_tags(data, base, end))
    if re.match(_OTHERS, data.at(start, 16)):
        return None
    found = _next(data, start, min(end, start + _WINDOW))
    survey = Survey([], counted=True)
    runs: list[_Run] = []  # of the stream at work
    lost = 0  # frames of it
    while found is not None:
        run = _run(data, found[0], end, found[1])
        if runs:
            before = runs[-1]
            gap = run.start - _after_tags(data, before.end, end)
            if gap > 0:
                size = (run.end - run.start) / run.count
                frames_lost = max(1, round(gap / size))
                if before.count > 1:  # what follows its last header may be of the gap
                    before.end, before.count = before.last, before.count - 1
                    frames_lost += 1
                survey.lost_s += frames_lost * run.kind.samples / run.kind.rate
                lost += frames_lost
            if run.tag is not None or run.kind is not before.kind:
                _close(survey, runs, lost)
                runs, lost = [], 0
        runs.append(run)
        found = _next(data, run.end, end)
    if not runs:
        return None
    _close(survey, runs, lost)
    return survey


def _close(survey: Survey, runs: list[_Run], lost: int) -> None:
    """Add the runs of one stream as parts: behind a gap a decoder begins anew.

    libsndfile reads as many frames as the encoder's tag says, and guesses them without one. Where
    the tag has too few, or is not there, one with the right number stands in front.
    """
    tag = runs[0].tag
    for run in runs:
        count = run.count - (run.tag is not None)
        pieces: tuple[Piece, ...] = ((run.start, run.end),)
        if run.kind.sizes and (run.tag is None or run.tag < count):
            pieces = (run.kind.tagged(run.head, count), (run.body, run.end))
        survey.parts.append(Part(pieces))
    if tag is not None:
        count = sum(run.count for run in runs) - 1 + lost
        short = max(0, tag - count) * runs[0].kind.samples / runs[0].kind.rate
        if lost:  # bytes are gone from its middle
            survey.lost_s += short
        else:
            survey.missing_s += short


_OTHERS = (  # that may hold MPEG audio, as their first bytes show
    rb"(?s)....(ftyp|moov|mdat|wide|free|skip|pnot)|\x1aE\xdf\xa3|RIFF|FLV|\.RMF|\x30\x26\xb2\x75|"
    rb"\x47|\0\0\1|OggS|fLaC|wvpk|TTA|MAC |MP\+|MPCK|\x06\x0e\x2b\x34|nut/|#!AMR|FORM|caff"
)
