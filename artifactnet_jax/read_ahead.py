"""Sources read ahead of what computes: threads, and one bounded queue."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

STOP_S = 2.0  # what closing waits for the threads
THREAD_NAME = "artifactnet-decode"


class Closed(Exception):
    """The consumer has gone: stop decoding."""


class ReadAhead:
    """Threads that decode sources ahead of the backend, into one bounded queue.

    decode(number, source, this) reads one source, and calls `put` with whatever it finds.
    """

    def __init__(
        self,
        sources: Iterable[Any],
        decode: Callable[[int, Any, ReadAhead], None],
        jobs: int,
        size: int,
    ) -> None:
        self._todo, self._decode, self._jobs = enumerate(sources), decode, jobs
        self._feed, self._stop = threading.Lock(), threading.Event()
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=size)

    def items(self) -> Generator[Any, None, None]:
        """Start the threads, and yield what they put, or None while there is nothing.

        What a thread raises is raised here. Closing stops the threads.
        """
        threads: list[threading.Thread] = []
        running = self._jobs
        try:
            for _ in range(self._jobs):
                thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
                thread.start()
                threads.append(thread)
            while running:
                try:
                    item = self._ready.get(timeout=0.05)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            self._stop.set()
            # Nothing can interrupt a thread that waits inside the caller's iterable: it is a
            # daemon, and ends without a further item once that returns.
            deadline = time.monotonic() + STOP_S
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))

    def put(self, item: Any) -> None:
        """Queue an item, as soon as there is room. Raises Closed once the consumer has gone."""
        while True:
            self.check()
            with contextlib.suppress(queue.Full):
                return self._ready.put(item, timeout=0.1)

    def check(self) -> None:
        """Raise Closed once the consumer has gone."""
        if self._stop.is_set():
            raise Closed

    def _run(self) -> None:
        """Decode one source after another; at the end put None, or what was raised."""
        try:
            while True:
                with self._feed:
                    entry = None if self._stop.is_set() else next(self._todo, None)
                if entry is None:
                    break
                self._decode(*entry, self)
            self.put(None)
        except Closed:
            pass
        except BaseException as error:  # a bug, or the caller's iterable: raised to the caller
            with contextlib.suppress(Closed):
                self.put(error)
