"""Protobuf's wire format, field by field: an ONNX file without the `onnx` package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Bytes = bytes | memoryview


class Field(NamedTuple):
    """A field of a message, and where in it the field, its payload and its end lie."""

    message: Bytes
    number: int
    wire: int
    start: int
    at: int
    end: int  # past the end of a message that is cut off

    @property
    def sized(self) -> bool:
        """Whether it has a length: text, bytes, a message, or packed numbers."""
        return self.wire == 2

    @property
    def payload(self) -> Bytes:
        """What it holds."""
        return self.message[self.at : self.end]


def fields(message: Bytes) -> Iterator[Field]:
    """The fields of a message in order. Raises ValueError where it is none."""
    start = 0
    while start < len(message):
        key, at = varint(message, start)
        wire = key & 7
        if wire == 2:
            size, at = varint(message, at)
            end = at + size
        elif wire == 0:
            _, end = varint(message, at)
        elif wire in (1, 5):
            end = at + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"byte {start}: there is no wire type {wire}")
        yield Field(message, key >> 3, wire, start, at, end)
        start = end


def varint(message: Bytes, at: int) -> tuple[int, int]:
    """An integer and where it ends. Raises ValueError where the message ends before it."""
    value = shift = 0
    while at < len(message):
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError(f"byte {at}: an integer is cut off")


def varints(field: Field) -> Iterator[int]:
    """Integers of a repeated field, packed or not."""
    at = field.at
    while at < field.end:
        value, at = varint(field.message, at)
        yield value


def encoded(value: int) -> bytes:
    """Inverse of `varint`."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
