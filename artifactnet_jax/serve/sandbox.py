"""Decoding in a process of its own, with limits: an attacker's bytes reach decoders first.

The process decodes one file, sends float32 blocks through a pipe and ends. What it sends is taken
as bytes and JSON, never unpickled, and is checked. Reading is `decode.open_audio`, as elsewhere:
the same samples, bit for bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from artifactnet_jax.decode import open_audio
from artifactnet_jax.recording import AudioError, Blocks, Decoded, Flaws
from artifactnet_jax.serve.limits import DecodeLimits
from artifactnet_jax.tags import MODULES, MOST
from artifactnet_jax.text import printable

MESSAGE_BYTES = 2**20  # of audio in a message, at most
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def context() -> Any:
    """What starts processes: forks of one that has loaded the decoders and nothing else."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(
        ["soundfile", "soxr", "av", *MODULES, __name__]
    )  # those that are installed
    first = forks.Process(target=int)  # loading takes a while, which is no file's fault
    first.start()
    first.join()
    return forks


class Sandboxed:
    """A file as a source of the detector (a `decode.Opener`). `name` is what its row calls it.

    AudioError, besides those of `open_audio`: kind "timeout", "memory", "too-long",
    "crashed" or "killed" (from outside).
    """

    def __init__(self, path: str, name: str, limits: DecodeLimits, forks: Any):
        self.name = name
        self._path, self._limits, self._forks = path, limits, forks

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Decoded]:
        """Decoded audio, from a process of its own. AudioError."""
        ours, theirs = self._forks.Pipe(duplex=False)
        process = self._forks.Process(target=_decode, args=(self._path, theirs, self._limits))
        with ours:
            process.start()
            theirs.close()
            try:
                yield self._read(ours, process)
            finally:
                process.kill()
                process.join()
                process.close()

    def _read(self, pipe: Connection, process: Any) -> Decoded:
        waits = [self._limits.wall_s]
        head, _ = self._receive(pipe, process, waits)
        try:
            rate, channels, frames = (head[key] for key in ("rate", "channels", "frames"))
            exact, lossless = head["exact"] is True, head["lossless"] is True
            track = None if head["track"] is None else printable(str(head["track"]))[:40]
            if not all(type(n) is int and 0 < n < 2**31 for n in (rate, channels)):
                raise ValueError("no whole numbers")
            if not (frames is None or (type(frames) is int and 0 <= frames < 2**62)):
                raise ValueError("no length")
            notices = tuple(head["notices"])
            if len(notices) > MOST or not all(type(text) is str for text in notices):
                raise ValueError("no notices")
        except (KeyError, TypeError, ValueError) as error:
            raise AudioError("crashed", f"its decoder broke off: {_CURE}") from error
        if exact and frames is not None:
            self._check_length(frames / rate)

        flaws = Flaws()

        def blocks() -> Blocks:
            total = 0
            while True:
                end, data = self._receive(pipe, process, waits)
                if end is not None:
                    flaws.lost_s, flaws.missing_s = _seconds(end, "lost"), _seconds(end, "missing")
                    return
                if not data or len(data) % (4 * channels):
                    raise AudioError("crashed", f"its decoder broke off: {_CURE}")
                block = np.frombuffer(data, np.float32).reshape(-1, channels)
                total += len(block)
                self._check_length(total / rate)
                yield block

        return Decoded(rate, channels, blocks(), frames, exact, lossless, notices, track, flaws)

    def _check_length(self, seconds: float) -> None:
        if seconds > self._limits.audio_s:
            text = f"longer than {self._limits.audio_s:g} s, which is the limit here: cut it"
            raise AudioError("too-long", text)

    def _receive(self, pipe: Connection, process: Any, waits: list[float]) -> tuple[Any, bytes]:
        """The next message: (its JSON, b"") or (None, audio). `waits[0]` is the time that is left.

        Only waiting counts: a process whose audio is not taken yet is not slow.
        """
        late = threading.Event()

        def end() -> None:  # the pipe's too
            late.set()
            process.kill()

        watch = threading.Timer(waits[0], end)
        watch.daemon = True
        began = time.monotonic()
        watch.start()
        try:
            message = pipe.recv_bytes(MESSAGE_BYTES + 1)
        except (EOFError, OSError):
            process.join(1.0)
            raise self._death(process.exitcode, late.is_set()) from None
        finally:
            watch.cancel()
            waits[0] = max(0.0, waits[0] - (time.monotonic() - began))
        if message[:1] == b"a":
            return None, message[1:]
        try:
            said = json.loads(message[1:])
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise AudioError("crashed", f"its decoder broke off: {_CURE}")
        if "error" in said:
            kind, text = (printable(str(said.get(key)))[:500] for key in ("error", "message"))
            raise AudioError(kind, text)
        return said, b""

    def _death(self, code: int | None, late: bool) -> AudioError:
        if late or code == -signal.SIGXCPU:
            return AudioError("timeout", f"decoding took over {self._limits.wall_s:g} s: {_CURE}")
        if code in (-signal.SIGKILL, -signal.SIGTERM):
            text = "somebody killed its decoder; was the system out of memory? Send it again"
            return AudioError("killed", text)
        why = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        return AudioError("crashed", f"it crashed its decoder ({why}): {_CURE}")


def _seconds(said: dict[str, Any], name: str) -> float:
    """A flaw as the process tells it: seconds, infinite for null."""
    value = said.get(name, 0.0)
    if value is None:
        return math.inf
    return max(0.0, float(value)) if isinstance(value, (int, float)) else 0.0


_CURE = "damaged, or made to do harm; export it again"


def _decode(path: str, pipe: Connection, limits: DecodeLimits) -> None:
    """Decode a file into the pipe (the process's whole life)."""
    _confine(limits)

    def say(**said: Any) -> None:
        pipe.send_bytes(b"j" + json.dumps(said).encode())

    try:
        with open_audio(path) as decoded:
            names = ("rate", "channels", "frames", "exact", "lossless", "track", "notices")
            say(**{name: getattr(decoded, name) for name in names})
            frames = max(1, MESSAGE_BYTES // (4 * decoded.channels))
            for block in decoded.blocks:
                for start in range(0, len(block), frames):
                    pipe.send_bytes(b"a" + block[start : start + frames].astype("<f4").tobytes())
            lost, missing = decoded.flaws.lost_s, decoded.flaws.missing_s
        say(end=True, lost=lost, missing=missing if math.isfinite(missing) else None)
    except AudioError as error:
        say(error=error.kind, message=str(error)[:500])
    except MemoryError:
        text = f"decoding took over {limits.memory_mb} MB of memory"
        say(error="memory", message=f"{text}: {_CURE}")
    except BrokenPipeError:  # the reader has had enough
        pass
    except Exception as error:
        text = f"{type(error).__name__} in the decoder: {printable(str(error))[:200]}"
        say(error="internal", message=f"{text}: convert it to WAV, and report this")


def _confine(limits: DecodeLimits) -> None:
    """Limits of this process: memory, processor time, no file written, dies with its parent."""
    with contextlib.suppress(OSError, AttributeError):  # Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):  # Linux
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        memory = held + limits.memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    seconds = int(limits.wall_s) + 1
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(what, (most, most))
