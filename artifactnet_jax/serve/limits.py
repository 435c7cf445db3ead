"""What clients may ask for, and what decoding their files may take."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of requests, batches and the queue."""

    file_bytes: int = 200 * 2**20
    files: int = 10_000  # in a batch
    waiting: int = 100_000  # files in the queue
    requests: int = 1200  # per minute, of one token or address
    retention_s: float = 7 * 86_400.0  # of results, and of batches that were never committed
    stall_s: float = 30.0  # without a byte of an upload
    answer_s: float = 300.0  # what /v1/score waits for its result


@dataclasses.dataclass(frozen=True)
class DecodeLimits:
    """Of decoding one file."""

    wall_s: float = 60.0  # seconds that the reader waits for the process, in all
    memory_mb: int = 1024  # address space beyond what the interpreter has (Linux)
    audio_s: float = 7200.0  # length of a recording
