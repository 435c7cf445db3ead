"""Servers and databases that the tests of the service start for themselves."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

START_S = 60.0
WAIT_S = 60.0


def until(found: Callable[[], Any], what: str, seconds: float = WAIT_S) -> Any:
    """What `found` returns once it is true; AssertionError when that takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds:g} s for {what}")


def children(pid: int) -> list[int]:
    """Processes that a process has started (Linux)."""
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(child) for task in tasks for child in task.read_text().split()]
    return []


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Server:
    """`artifactnet-jax serve` as a process of its own, on backend numpy."""

    def __init__(self, root: Path, *arguments: str, token: str = "", env: Any = None):
        self.root, self.arguments = root, arguments
        self._log = root.parent / f"{root.name}.log"
        self._env = {**os.environ, **(env or {})}
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self.process: subprocess.Popen[bytes]

    def start(self) -> Server:
        with open(self._log, "wb") as log:
            command = [sys.executable, "-m", "artifactnet_jax", "serve", "--port", "0"]
            command += ["--root", str(self.root), "--backend", "numpy", *self.arguments]
            self.process = subprocess.Popen(command, stderr=log, env=self._env)

        def address() -> str | None:
            assert self.process.poll() is None, self.log
            _, found, rest = self.log.partition("serving on ")
            return rest.split("\n")[0] if found and "\n" in rest else None

        self.url = until(address, "the server", START_S)
        self.client = httpx.Client(base_url=self.url, headers=self._headers, timeout=60)
        return self

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def worker(self) -> int:
        """The process that scores."""
        return until(lambda: children(self.process.pid), "a worker")[0]

    def stop(self, sent: int = signal.SIGTERM) -> int:
        self.client.close()
        self.process.send_signal(sent)
        return self.process.wait(WAIT_S)

    def kill(self) -> None:
        """kill -9, as a power cut would, except that the worker may finish what is at hand."""
        self.client.close()
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.client.close()
        for pid in [*children(self.process.pid), self.process.pid]:
            kill(pid)
        self.process.wait()

    # What clients do

    def create(self) -> str:
        reply = self.client.post("/v1/batch/create")
        assert reply.status_code == 201, reply.text
        return reply.json()["id"]

    def upload(self, batch: str, files: dict[str, bytes], **headers: str) -> httpx.Response:
        parts = [("files", (name, data)) for name, data in files.items()]
        return self.client.post(f"/v1/batch/{batch}/files", files=parts, headers=headers)

    def commit(self, batch: str) -> None:
        reply = self.client.post(f"/v1/batch/{batch}/commit")
        assert reply.status_code == 200, reply.text

    def batch(self, files: dict[str, bytes]) -> str:
        """A committed batch."""
        batch = self.create()
        reply = self.upload(batch, files)
        assert reply.status_code == 201, reply.text
        self.commit(batch)
        return batch

    def status(self, batch: str) -> dict[str, Any]:
        reply = self.client.get(f"/v1/batch/{batch}")
        assert reply.status_code == 200, reply.text
        return reply.json()

    def wait(self, batch: str) -> dict[str, Any]:
        """The status of a batch when it is done."""

        def done() -> dict[str, Any] | None:
            status = self.status(batch)
            return status if status["state"] == "done" else None

        return until(done, "the batch")

    def results(self, batch: str, **query: str) -> str:
        reply = self.client.get(f"/v1/batch/{batch}/results", params=query)
        assert reply.status_code == 200, reply.text
        return reply.text


def make_token(root: Path, *arguments: str) -> str:
    """A token, made by the command."""
    command = [sys.executable, "-m", "artifactnet_jax", "token", "create", "--root", str(root)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def postgres_folder() -> str | None:
    """Where PostgreSQL's programs are, if they are."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
    return os.path.dirname(found[-1]) if found else None


@contextlib.contextmanager
def postgres() -> Iterator[Callable[[str], str]]:
    """A PostgreSQL of our own, on a socket in a folder; gives a function: name -> URL, new."""
    import psycopg

    programs = postgres_folder()
    assert programs is not None
    folder = tempfile.mkdtemp(prefix="artifactnet-postgres-")
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if os.geteuid() == 0:  # which PostgreSQL refuses
        shutil.chown(folder, "nobody", "nogroup")
        options |= {"user": "nobody", "group": "nogroup", "extra_groups": [], "cwd": "/"}
    data = os.path.join(folder, "data")
    initdb = [os.path.join(programs, "initdb"), "-D", data, "-U", "test", "-A", "trust"]
    subprocess.run([*initdb, "-E", "UTF8", "--no-sync"], check=True, timeout=120, **options)
    command = [os.path.join(programs, "postgres"), "-D", data, "-k", folder]
    server = subprocess.Popen([*command, "-c", "listen_addresses=", "-c", "fsync=off"], **options)
    address = f"host={folder} user=test dbname=postgres"

    def connect() -> Any:
        assert server.poll() is None
        with contextlib.suppress(psycopg.OperationalError):
            return psycopg.connect(address, autocommit=True)

    def make(name: str) -> str:
        with connection.cursor() as cursor:
            cursor.execute(f'CREATE DATABASE "{name}"')
        return f"postgresql://test@/{name}?host={folder}"

    try:
        connection = until(connect, "PostgreSQL", START_S)
        with connection:
            yield make
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait(WAIT_S)
        shutil.rmtree(folder)
