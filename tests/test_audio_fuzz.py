"""Damaged files give finite samples or an AudioError; never a crash, a hang or another error.

Each batch runs in a process of its own, so that a crash or a hang of a decoder fails one test.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from audio_files import encode, noise

KINDS = ["wav", "flac", "aiff", "ogg", "opus", "mp3", "m4a", "aac"]
PER_KIND = 40

READ_ALL = """
import sys, numpy as np
from artifactnet_jax.audio import AudioError, SegmentReader
from artifactnet_jax.config import FrontEnd, Decision
for path in sys.argv[1:]:
    print(path, end=" ", flush=True)
    try:
        reader = SegmentReader(path, FrontEnd(), Decision())
        count = 0
        for segment in reader:
            assert segment.samples.dtype == np.float32 and segment.samples.shape == (176400,)
            assert np.abs(segment.samples).max() <= 1  # false for NaN
            count += 1
        assert count >= 1 and reader.report.duration_s > 0
        print("segments", flush=True)
    except AudioError as error:
        assert "\\n" not in str(error) and path in str(error)
        print(error.kind, flush=True)
"""


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One of: flipped bytes, a cut, another header, a repeated or a removed block, huge numbers."""
    out = bytearray(data)
    how = rng.integers(6)
    if how == 0:
        for place in rng.integers(len(out), size=rng.integers(1, 30)):
            out[place] = rng.integers(256)
    elif how == 1:
        del out[rng.integers(1, len(out)) :]
    elif how == 2:
        out[: rng.integers(1, 200)] = rng.bytes(int(rng.integers(1, 200)))
    elif how == 3:
        start, size = rng.integers(len(out)), rng.integers(1, 4000)
        out[start:start] = out[start : start + size] * int(rng.integers(1, 9))
    elif how == 4:
        start = rng.integers(len(out))
        del out[start : start + rng.integers(1, 4000)]
    else:  # lengths, counts and rates lie in the first or the last few hundred bytes
        for _ in range(rng.integers(1, 5)):
            place = rng.integers(min(400, len(out) - 4))
            place = place if rng.integers(2) else len(out) - 4 - place
            out[place : place + 4] = rng.choice(
                [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)]
            )
    return bytes(out)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_give_segments_or_an_audio_error(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    rate = 48_000 if kind == "opus" else 44_100
    seed = encode(noise(1.5, rate), kind, rate)
    paths = []
    for i in range(PER_KIND):
        path = tmp_path / f"{i}.{kind}"
        path.write_bytes(mutate(seed, rng))
        paths.append(str(path))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", READ_ALL, *paths],
        capture_output=True,
        text=True,
        timeout=60,
    )
    outcomes = [line.rsplit(" ", 1)[-1] for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"after {run.stdout[-200:]!r}: {run.stderr[-2000:]}"
    assert run.stderr == ""
    assert len(outcomes) == PER_KIND
