"""The process that scores: takes files by turn, whatever their batch, and writes their results.

Started by `service` as `python -m artifactnet_jax.serve.worker`. Standard input: one line of
settings, then a line whenever there is something new; its end means stop, after the files at hand.
Standard output: a line of JSON when ready, and one for each result.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from artifactnet_jax.detector import Detector
    from artifactnet_jax.serve.limits import DecodeLimits
    from artifactnet_jax.serve.store import Store, Waiting

POLL_S = 1.0  # between looks at the queue when nobody says that there is something new
RETRY_S = 1.0  # after the database has failed
TRIES = 3  # of a file whose decoder somebody killed: an administrator, or the system out of memory
NICE = 5  # the API answers while the processor is full


def main() -> None:
    """Run until standard input ends."""
    # The server says when to stop; a signal to its whole process group is not for this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = json.loads(sys.stdin.buffer.readline())
    replies = os.fdopen(os.dup(1), "wb", buffering=0)  # not inherited by decoders, unlike 1
    os.dup2(2, 1)

    def tell(**said: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the server was killed: finish what is at hand
            replies.write(json.dumps(said).encode() + b"\n")

    from artifactnet_jax.console.detectors import open_detector
    from artifactnet_jax.serve.limits import DecodeLimits
    from artifactnet_jax.serve.store import Store
    from artifactnet_jax.serve.uploads import lock
    from artifactnet_jax.text import CommandError

    os.nice(NICE)
    root = Path(settings["root"])
    with lock(root / "worker.lock", wait=True):  # that of a server which was killed may still run
        try:
            detector = open_detector(**settings["detector"])
        except CommandError as error:
            tell(error=str(error), code=error.code)
            return
        store, limits = Store(settings["database"]), DecodeLimits(**settings["decode"])
        worker = Worker(detector, store, root / "files", limits, tell)
        tell(ready=describe(detector))
        worker.run()


def describe(detector: Detector) -> dict[str, Any]:
    """What scores."""
    return {
        "weights": detector.weights.summary(),
        "backend": detector.backend.name,
        "dtype": detector.backend.dtype,
        "threshold": detector.threshold,
        "margin": detector.margin,
        "band": list(detector.band),
        "prior": None if detector.fusion is None else detector.prior,
        "aggregate": detector.rule,
        "plan": detector.segments,
        "bank": detector.asked,
    }


class Worker:
    """Keeps the detector busy with what waits in the store."""

    def __init__(
        self, detector: Detector, store: Store, files: Path, limits: DecodeLimits, tell: Any
    ):
        from artifactnet_jax.serve.sandbox import context

        self._detector, self._store, self._files = detector, store, files
        self._limits, self._tell, self._forks = limits, tell, context()
        self._stop, self._wake = threading.Event(), threading.Event()
        self._taken: set[str] = set()  # files at hand

    def run(self) -> None:
        """Score until standard input ends."""
        threading.Thread(target=self._listen, daemon=True).start()
        files: dict[int, Waiting] = {}
        tries: dict[str, int] = {}
        for index, result in self._detector.score_many(self._sources(files)):
            file = files.pop(index)
            said = result.to_dict()
            killed = said.get("error", {}).get("kind") == "killed"
            tries[file.id] = tries.get(file.id, 0) + 1
            if not killed or tries[file.id] == TRIES:
                del tries[file.id]
                self._record(file, said)
            self._taken.discard(file.id)

    def _listen(self) -> None:
        while sys.stdin.buffer.readline():
            self._wake.set()
        self._stop.set()
        self._wake.set()

    def _sources(self, files: dict[int, Waiting]) -> Iterator[Any]:
        """Files by turn, for ever; `files` gets what each index of `score_many` is."""
        from artifactnet_jax.serve.sandbox import Sandboxed

        index = 0
        while not self._stop.is_set():
            self._wake.clear()
            busy = set(self._taken)  # before the look: a result in between must not seem to wait
            due = [file for file in self._look(len(busy)) if file.id not in busy]
            for file in due:
                if self._stop.is_set():
                    return
                self._taken.add(file.id)
                files[index] = file
                index += 1
                path = os.fspath(self._files / file.id)
                yield Sandboxed(path, file.name, self._limits, self._forks)
            if not due:
                self._wake.wait(POLL_S)

    def _look(self, busy: int) -> list[Waiting]:
        """The next few files; later ones may come before the rest."""
        from sqlalchemy.exc import DBAPIError

        try:
            return self._store.waiting(busy + self._detector.jobs)
        except DBAPIError as error:
            self._complain(error)
            return []

    def _record(self, file: Waiting, row: dict[str, Any]) -> None:
        """Write a result, sooner or later; a stop leaves the file to the next worker."""
        from sqlalchemy.exc import DBAPIError

        from artifactnet_jax.results import to_json

        verdict = row.get("verdict", "failed")
        text = to_json(row | {"file": file.id})
        while True:
            try:
                if not self._store.record(file, verdict, text):  # deleted meanwhile
                    return
                break
            except DBAPIError as error:
                self._complain(error)
                if self._stop.wait(RETRY_S):
                    return
        timings = row.get("timings", {})
        seconds = row.get("duration_s", 0.0)
        self._tell(file=file.id, batch=file.batch, verdict=verdict, audio_s=seconds, **timings)

    def _complain(self, error: Exception) -> None:
        from artifactnet_jax.text import brief, printable

        text = printable(brief(error))
        print(f"artifactnet-jax: worker: database: {text}; trying again", file=sys.stderr)


if __name__ == "__main__":
    main()
