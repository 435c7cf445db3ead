"""The service behind the API: its worker process, who waits for which batch, retention, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client as prometheus
from sqlalchemy.exc import DBAPIError
from starlette.concurrency import run_in_threadpool

from artifactnet_jax.serve.limits import DecodeLimits, Limits
from artifactnet_jax.serve.store import Store
from artifactnet_jax.serve.uploads import Disk
from artifactnet_jax.text import SOME_FAILED, CommandError, brief, printable

GRACE_S = 20.0  # what a stop waits for the files at hand
TIDY_S = 60.0  # between removals of what has expired
BACKOFF_S = 30.0  # most between two starts of a worker that keeps dying


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a service is set up."""

    root: Path
    database: str  # SQLAlchemy URL
    quota: int  # bytes of audio on disk
    limits: Limits
    decode: DecodeLimits
    detector: dict[str, Any]  # arguments of `console.detectors.open_detector`


class Metrics:
    """Prometheus metrics."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        prefix, to = "artifactnet_", self.registry
        self.requests = prometheus.Histogram(
            f"{prefix}request_seconds",
            "Time to the end of the answer",
            ("method", "route", "status"),
            registry=to,
        )
        self.uploaded = prometheus.Counter(f"{prefix}uploaded_bytes", "Audio taken", registry=to)
        self.results = prometheus.Counter(
            f"{prefix}results", "Files with a result", ("verdict",), registry=to
        )
        self.audio = prometheus.Counter(f"{prefix}audio_seconds", "Audio scored", registry=to)
        self.stages = prometheus.Counter(
            f"{prefix}stage_seconds", "Time that files took", ("stage",), registry=to
        )
        self.restarts = prometheus.Counter(
            f"{prefix}worker_restarts", "Starts of the worker after the first", registry=to
        )
        self.up = prometheus.Gauge(f"{prefix}worker_up", "Whether the worker runs", registry=to)
        self.waiting = prometheus.Gauge(f"{prefix}waiting_files", "Files in the queue", registry=to)
        self.disk = prometheus.Gauge(f"{prefix}disk_bytes", "Audio on disk", registry=to)


class Service:
    """One root, one database, one worker process at a time. Its methods run in the event loop."""

    def __init__(self, settings: Settings, store: Store, local: bool):
        self.settings, self.store, self.local = settings, store, local
        self.limits = settings.limits
        self.disk = Disk(settings.root, settings.quota)
        self.metrics = Metrics()
        self.engine: dict[str, Any] | None = None  # what the worker said when it was ready
        self.stopping = False
        self._process: asyncio.subprocess.Process | None = None
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the worker, and clear up after a kill; CommandError when it cannot be had."""
        await run_in_threadpool(self.store.drop_singles)
        await self._spawn()  # from now on no worker of an earlier server runs
        needed = await run_in_threadpool(self.store.on_disk)
        await run_in_threadpool(self.disk.sweep, needed)
        self._tasks = [asyncio.create_task(task) for task in (self._supervise(), self._tidy())]

    def begin_stop(self) -> None:
        """Whoever waits for a batch waits no longer."""
        self.stopping = True
        for batch in self._watchers:
            self.tell(batch)

    async def stop(self) -> None:
        """Let the worker finish the files at hand; what waits stays in the database."""
        for task in self._tasks:
            task.cancel()
        process = self._process
        if process is not None and process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), GRACE_S)
            except asyncio.TimeoutError:
                process.kill()
                await process.wait()

    def wake(self) -> None:
        """Tell the worker that files wait. It would look by itself a little later."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(ConnectionError, RuntimeError):  # it has just died
                self._process.stdin.write(b"\n")

    @contextlib.contextmanager
    def watching(self, batch: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever something happens to a batch."""
        event = asyncio.Event()
        self._watchers.setdefault(batch, set()).add(event)
        try:
            yield event
        finally:
            self._watchers[batch].discard(event)
            if not self._watchers[batch]:
                del self._watchers[batch]

    def tell(self, batch: str) -> None:
        """Something has happened to a batch."""
        for event in self._watchers.get(batch, ()):
            event.set()

    async def _spawn(self) -> None:
        """Start a worker and wait until it is ready."""
        arguments = (sys.executable, "-m", "artifactnet_jax.serve.worker")
        pipe = asyncio.subprocess.PIPE
        self._process = process = await asyncio.create_subprocess_exec(
            *arguments, stdin=pipe, stdout=pipe
        )
        assert process.stdin is not None
        assert process.stdout is not None
        settings = {
            "root": str(self.settings.root),
            "database": self.settings.database,
            "detector": self.settings.detector,
            "decode": dataclasses.asdict(self.settings.decode),
        }
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            await process.stdin.drain()
        line = await process.stdout.readline()
        said = json.loads(line) if line else {}
        if "ready" not in said:
            code = await process.wait()
            text = said.get("error", f"the worker ended before it was ready (exit code {code})")
            raise CommandError(text, said.get("code", SOME_FAILED))
        self.engine = said["ready"]
        self.metrics.up.set(1)

    async def _supervise(self) -> None:
        """Read what the worker says; start another when it dies."""
        pause = 0.0
        while True:
            began, process = time.monotonic(), self._process
            assert process is not None
            assert process.stdout is not None
            while line := await process.stdout.readline():
                await self._scored(json.loads(line))
            await process.wait()
            self.engine = None
            self.metrics.up.set(0)
            self.metrics.restarts.inc()
            text = f"the worker died (exit code {process.returncode}); starting another"
            print(f"artifactnet-jax: {text}", file=sys.stderr)
            lived = time.monotonic() - began
            pause = 0.0 if lived > BACKOFF_S else min(2 * pause + 0.5, BACKOFF_S)
            await asyncio.sleep(pause)
            try:
                await self._spawn()
            except CommandError as error:
                print(f"artifactnet-jax: {printable(str(error))}", file=sys.stderr)

    async def _scored(self, said: dict[str, Any]) -> None:
        self.metrics.results.labels(said["verdict"]).inc()
        self.metrics.audio.inc(said["audio_s"])
        for stage in ("decode", "compute"):
            self.metrics.stages.labels(stage).inc(said.get(f"{stage}_s", 0.0))
        await run_in_threadpool(self.disk.remove, [said["file"]])
        self.tell(said["batch"])

    async def _tidy(self) -> None:
        """Remove what has expired."""
        while True:
            try:
                gone = await run_in_threadpool(self.store.expire, self.limits.retention_s)
                await run_in_threadpool(self.disk.remove, gone)
            except DBAPIError as error:
                text = f"database: {printable(brief(error))}; trying again"
                print(f"artifactnet-jax: {text}", file=sys.stderr)
            await asyncio.sleep(TIDY_S)


class RateLimit:
    """`requests` per minute of each client, a minute's worth at once (GCRA)."""

    MOST = 10_000  # clients that are remembered

    def __init__(self, requests: int):
        self._step = 60.0 / requests
        self._due: dict[str, float] = {}  # client -> when its last minute's worth is used up

    def wait_s(self, client: str) -> float:
        """0 and the request counts, or how long to wait for the next one."""
        now = time.monotonic()
        due = max(self._due.get(client, now), now) + self._step
        if due > now + 60.0:
            return due - now - 60.0
        if len(self._due) >= self.MOST:
            self._due = {name: when for name, when in self._due.items() if when > now}
        self._due[client] = due
        return 0.0
