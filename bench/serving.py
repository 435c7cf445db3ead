"""Load on a service of its own: `python -m artifactnet_jax.bench.serving`. JSON on stdout.

Uploaders at once, each with a batch, one request for each clip, over loopback. With --kill the
server or its worker gets kill -9 several times meanwhile; a request without an answer is sent again
under its Idempotency-Key, as any client should. `lost` and `twice` count rows at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from artifactnet_jax.bench.candidates import music, write_audio
from artifactnet_jax.bench.rounds import percentiles

PATIENCE_S = 600.0  # until a load is given up
PAUSE_S = 0.25  # between looks at a batch, and before a request is sent again
CLIPS = 4  # different ones, which take turns
BOUNDARY = "clips-of-the-benchmark"


class Served:
    """A server in a process of its own, on a port that it keeps over its restarts."""

    def __init__(self, root: str, backend: str):
        self.root, self.backend, self.port = root, backend, 0
        self.start()

    def start(self) -> None:
        """Start the process and wait until it serves."""
        limits = ("--rate", "1000000000", "--root", self.root, "--port", str(self.port))
        command = [sys.executable, "-m", "artifactnet_jax", "serve", *limits]
        log, said = Path(f"{self.root}.log"), ""
        with open(log, "wb") as file:
            self.process = subprocess.Popen([*command, "--backend", self.backend], stderr=file)
        while "serving on" not in said or not said.endswith("\n"):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server does not start: {said}")
            time.sleep(PAUSE_S)
            said = log.read_text()
        self.port = int(said.splitlines()[-1].rsplit(":", 1)[1])

    def kill_worker(self) -> None:
        """Kill the worker with SIGKILL."""
        for tasks in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for child in tasks.read_text().split():
                os.kill(int(child), signal.SIGKILL)

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        self.process.kill()
        self.process.wait()


class Client:
    """One uploader with its connection, to be closed."""

    def __init__(self, served: Served):
        self._served = served
        self._connection: http.client.HTTPConnection | None = None
        self.sent_again = 0

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
        """The body of the answer; sends again until there is one."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            try:
                if self._connection is None:
                    port = self._served.port
                    self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                self._connection.request(method, path, body, headers)
                reply = self._connection.getresponse()
                data = reply.read()
                if reply.status < 300:
                    return data
                if reply.status != 503:
                    raise RuntimeError(f"{method} {path}: {reply.status} {data!r}")
            except (OSError, http.client.HTTPException):
                self.close()
            self.sent_again += 1
            time.sleep(PAUSE_S)
        raise RuntimeError(f"{method} {path}: no answer")

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def upload(served: Served, clips: Sequence[bytes], count: int) -> dict[str, Any]:
    """One uploader's part: a batch of `count` clips; what became of it."""
    with contextlib.closing(Client(served)) as client:
        return _upload(client, clips, count)


def _upload(client: Client, clips: Sequence[bytes], count: int) -> dict[str, Any]:
    created = client.send("POST", "/v1/batch/create", idempotency_key=uuid.uuid4().hex)
    url = f"/v1/batch/{json.loads(created)['id']}"
    took = []
    for i in range(count):
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{i}"\r\n'
        body = f"{head}\r\n".encode() + clips[i % len(clips)] + f"\r\n--{BOUNDARY}--\r\n".encode()
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        key = uuid.uuid4().hex
        began = time.perf_counter()
        client.send("POST", f"{url}/files", body, content_type=kind, idempotency_key=key)
        took.append(time.perf_counter() - began)
    client.send("POST", f"{url}/commit")
    while json.loads(client.send("GET", url))["state"] != "done":
        time.sleep(PAUSE_S)
    rows = [json.loads(line) for line in client.send("GET", f"{url}/results").splitlines()]
    names = Counter(row["path"] for row in rows)
    return {
        "took": took,
        "sent_again": client.sent_again,
        "lost": sum(not names[str(i)] for i in range(count)),
        "twice": sum(n - 1 for n in names.values()),
        "failed": sum("error" in row for row in rows),
        "scores": {(int(row["path"]) % len(clips), row.get("score")) for row in rows},
    }


def load(
    backend: str, uploaders: int, clips: Sequence[bytes], count: int, seconds: float, kill_s: float
) -> dict[str, Any]:
    """A load on a fresh server; `kill_s`: between kills of server and worker by turns, or 0."""
    kills, over = Counter[str](), threading.Event()
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(uploaders) as pool:
        served = Served(os.path.join(root, "service"), backend)

        def killer() -> None:
            while kill_s and not over.wait(kill_s):
                if sum(kills.values()) % 2:
                    kills["worker"] += 1
                    served.kill_worker()
                else:
                    kills["server"] += 1
                    served.kill()
                    served.start()

        killing = threading.Thread(target=killer)
        killing.start()
        began = time.perf_counter()
        try:
            part = functools.partial(upload, served, clips, count)
            done = list(pool.map(lambda _: part(), range(uploaders)))
        finally:
            wall_s = time.perf_counter() - began
            over.set()
            killing.join()
            served.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                served.process.wait(30)
            served.kill()
    files = uploaders * count
    return {
        "uploaders": uploaders,
        "files": files,
        "wall_s": wall_s,
        "files_per_s": files / wall_s,
        "times_real_time": files * seconds / wall_s,
        "upload_s": percentiles([t for each in done for t in each["took"]]),
        "kills": dict(kills),
        "different_scores_of_a_clip": max(
            Counter(clip for clip, _ in set().union(*(each["scores"] for each in done))).values()
        ),
        **{key: sum(d[key] for d in done) for key in ("lost", "twice", "failed", "sent_again")},
    }


def main() -> None:
    """Run the loads that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--uploaders", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--files", type=int, default=8, help="of each uploader (8)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip (10)")
    parser.add_argument("--kill", type=float, default=0.0, metavar="S", help="every S seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            write_audio(
                os.path.join(folder, f"{i}.flac"), iter([music(args.seconds, 44_100, i)]), 44_100
            )
            for i in range(CLIPS)
        ]
        clips = [Path(path).read_bytes() for path in paths]
    loads = [
        load(args.backend, n, clips, args.files, args.seconds, args.kill) for n in args.uploaders
    ]
    head = {"backend": args.backend, "clip_s": args.seconds, "clip_bytes": len(clips[0])}
    print(json.dumps(head | {"loads": loads}, indent=1))


if __name__ == "__main__":
    main()
