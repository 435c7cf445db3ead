"""Catalogues: `score --engine ray`. Manifests in, partitioned Parquet out, on one machine or many.

A Ray Data pool of actors, one Detector each, takes blocks of tracks; an actor has one block at a
time, so that nothing waits behind a long track while another actor is idle. Rows come back to this
process, which alone writes: Ray Data's own writer leaves behind what a task wrote before it was
killed, and one writer needs no protocol for that. Ray Data repeats the block of a killed worker. A
block that kills its worker every time is taken track by track, until the one to blame is a row with
its error.

Results are known by the SHA-256 of the file's bytes: a run that goes on does not score what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import socket
import sys
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from artifactnet_jax import results
from artifactnet_jax.catalogue import Folder, filesystem_of, list_entries, utf8
from artifactnet_jax.console.detectors import comparable, detector_options, open_detector
from artifactnet_jax.console.progress import progress
from artifactnet_jax.decoders import BankError, load
from artifactnet_jax.detector import EMBEDDED
from artifactnet_jax.files import TemporaryCopy, sha256_of
from artifactnet_jax.results import Failure
from artifactnet_jax.text import NO_BACKEND, OK, SOME_FAILED, USAGE, CommandError, brief, printable

if TYPE_CHECKING:
    from artifactnet_jax.weights import Model

BLOCK = 32  # tracks in a block at most
BLOCKS = 8  # ... and so many blocks for each worker at least, so that they end together

_CURE = 'pip install "artifactnet-jax[ray]"'


@dataclasses.dataclass(frozen=True)
class Pool:
    """Actors, and what each of them reserves.

    None: as many as the cluster holds, and a whole GPU each where the cluster has any and the
    backend may use one.
    """

    workers: int | None = None
    cpus: int = 1  # threads that compute; one more decodes
    gpus: float | None = None


# --- in the workers ----------------------------------------------------------------------------


def _open(path: str) -> BinaryIO:
    """A seekable file named as the row is to be."""
    if "://" not in path:
        return open(path, "rb")
    filesystem, inner = filesystem_of(path)
    copy = TemporaryCopy(path)
    with filesystem.open_input_stream(inner) as remote:
        shutil.copyfileobj(remote, copy, 2**20)
    copy.seek(0)
    return cast(BinaryIO, copy)


def _digest(file: BinaryIO) -> str:
    """SHA-256 of the bytes, in hexadecimal; leaves the file at its beginning."""
    digest = sha256_of(file)
    file.seek(0)
    return digest


def _detector(weights: Model, backend: str, options: Mapping[str, Any], pool: Pool) -> Any:
    """The Detector of one worker; its threads bounded by what it has reserved."""
    # Without a GPU a call takes as many segments as there are processors, a thread for each.
    batch = {} if pool.gpus or options.get("batch_size") else {"batch_size": pool.cpus}
    jobs = options.get("jobs") or (pool.cpus if pool.gpus else 1)
    return open_detector(weights, backend, **{**options, **batch, "jobs": jobs})


def _describe(*arguments: Any) -> tuple[dict[str, Any], str, int]:
    """What rows of these options have in common; or the message and code of a CommandError."""
    try:
        return comparable(_detector(*arguments)), "", OK
    except CommandError as error:
        return {}, str(error), error.code


class _Attempts:
    """An actor that counts how often a block has been begun: Ray Data repeats one without end."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, block: str) -> int:
        self._begun[block] += 1
        return self._begun[block]


class _Scorer:
    """An actor: blocks of `path` (bytes) and `sha256` in, rows as JSON out.

    No rows at all of a block that was the death of `tries` workers, or that the backend fails on;
    of a single track that is the row of a failure.
    """

    tries = 3

    def __init__(
        self, weights: Any, done: Any, attempts: Any, backend: str, options: Any, pool: Pool
    ):
        import ray

        self._detector = _detector(ray.get(weights), backend, options, pool)
        self._done: np.ndarray = ray.get(done)  # sorted, in memory that a machine's actors share
        self._attempts = attempts

    def __call__(self, block: Any) -> Any:
        import pyarrow
        import ray

        paths = list(map(os.fsdecode, block["path"].to_pylist()))
        if ray.get(self._attempts.begin.remote(paths[0])) > self.tries:
            rows = self._lost(paths, "its worker died again and again", "convert it to WAV")
        else:
            try:
                rows = self._rows(zip(paths, block["sha256"].to_pylist(), strict=True))
            except Exception as error:  # of the backend: no input makes the detector raise
                rows = self._lost(paths, brief(error), "try another backend, and report this")
        lines = [results.to_json(row) for row in rows]
        return pyarrow.table({"row": pyarrow.array(lines, pyarrow.string())})

    @staticmethod
    def _lost(paths: list[str], cause: str, cure: str) -> list[dict[str, Any]]:
        if len(paths) > 1:  # one of them is to blame, and which one is found out next
            return []
        text = f"{printable(paths[0])}: {cause}: {cure}"
        return [{**Failure(paths[0], "lost", text).to_dict(), "sha256": None}]

    def _is_done(self, digest: str) -> bool:
        at = np.searchsorted(self._done, digest.encode())
        return bool(at < len(self._done) and self._done[at] == digest.encode())

    def _rows(self, entries: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        scored: list[tuple[Any, str | None]] = []  # by the detector's index

        def sources() -> Iterator[Any]:  # runs in the decoding threads, one at a time
            for path, expected in entries:
                remote = "://" in path
                file = digest = None
                try:
                    if remote or os.path.isfile(path):  # opening a pipe would block
                        file = _open(path)
                        digest = _digest(file)
                except (OSError, CommandError) as error:
                    if remote:
                        rows.append(_unreadable(path, error))
                        continue
                    file = None
                if file is None:
                    scored.append((None, None))
                    yield path  # the detector tells what is wrong with it
                    continue
                assert digest is not None
                if expected and digest != expected:
                    cause = f"{printable(path)}: its bytes are not those of its sha256"
                    text = f"{cause} in the manifest: correct it, or get the file again"
                    row = Failure(path, "digest", text).to_dict()
                    rows.append({**row, "sha256": digest})
                elif self._is_done(digest):
                    rows.append({"path": path, "sha256": digest})
                else:
                    scored.append((file, digest))
                    yield file
                    continue
                file.close()

        for index, result in self._detector.score_many(sources()):
            file, digest = scored[index]
            if file is not None:
                file.close()
            rows.append({**result.to_dict(), "sha256": digest})
        return rows


def _unreadable(path: str, error: Exception) -> dict[str, Any]:
    missing = isinstance(error, FileNotFoundError)
    cure = "check the path" if missing else "check the access to it"
    text = f"{printable(path)}: cannot be read ({brief(error)}): {cure}"
    return {**Failure(path, "not-found" if missing else "read", text).to_dict(), "sha256": None}


# --- the pool ----------------------------------------------------------------------------------


def connect(address: str | None = None) -> None:
    """Join a cluster, or start one of this machine; no more than once. Sends no statistics.

    `address` is Ray's: "auto", HOST:PORT, ray://HOST:PORT. Raises CommandError.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters comes as an exception
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise CommandError(f"--engine ray needs {error.name}: {_CURE}", NO_BACKEND) from error
    if not ray.is_initialized():
        local: dict[str, Any] = {} if address else {"include_dashboard": False}
        try:
            host, _, port = (address or "").rpartition("//")[2].rpartition(":")
            if host:  # Ray itself would try for minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            with _no_stderr():
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except (OSError, RuntimeError, ValueError) as error:
            cause = f"--address {address or '(none)'}: {brief(error)}"
            raise CommandError(f"{cause}: is the cluster up (ray status)?", NO_BACKEND) from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Ray's C++ part reports its log level on descriptor 2, whatever that level is."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def settle(pool: Pool, backend: str) -> Pool:
    """The same with numbers for what it leaves open, by what the cluster has."""
    import ray

    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    may = backend not in ("numpy", "onnxruntime")
    gpus = pool.gpus if pool.gpus is not None else float(may and have.get("GPU", 0) >= 1)
    most = have.get("GPU", 0) / gpus if gpus else have.get("CPU", 1) / pool.cpus
    return Pool(pool.workers or max(1, int(most)), pool.cpus, gpus)


def score_many(
    entries: Mapping[str, str],
    weights: Model,
    backend: str = "auto",
    options: Mapping[str, Any] | None = None,
    pool: Pool | None = None,
    done: Iterable[str] = (),
) -> Generator[dict[str, Any], None, None]:
    """Rows of recordings as they finish, each path once: the score schema, and `sha256`.

    entries: as of `list_entries`. options: as of `Detector`. done: digests that are not to be
    scored; the row of such a file has `path` and `sha256` alone. `connect` comes first.
    """
    import pyarrow
    import ray
    import ray.data

    settled = settle(pool or Pool(), backend)
    ray.data.DataContext.get_current().enable_progress_bars = False
    shared = ray.put(weights), ray.put(np.array(sorted(done), "S64"))
    rest = dict(entries)
    blocks = BLOCKS * cast(int, settled.workers)
    for size in dict.fromkeys((min(BLOCK, -(-len(rest) // blocks)), 1)):
        if not rest:
            return
        attempts = ray.remote(num_cpus=0)(_Attempts).remote()
        paths = pyarrow.array(map(os.fsencode, rest), pyarrow.binary())
        table = pyarrow.table({"path": paths, "sha256": pyarrow.array(rest.values())})
        data: Any = ray.data.from_arrow([table.slice(k, size) for k in range(0, len(table), size)])
        data = data.map_batches(
            _Scorer,
            fn_constructor_args=(*shared, attempts, backend, dict(options or {}), settled),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=min(cast(int, settled.workers), -(-len(table) // size)),
                max_tasks_in_flight_per_actor=1,
            ),
            num_cpus=settled.cpus,
            num_gpus=settled.gpus,
        )
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for line in batch["row"].to_pylist():
                row = json.loads(line)
                del rest[row["path"]]
                yield row


def sizing(tracks: float, segment_s: float, segments: float, price: float) -> dict[str, float]:
    """Core-hours of a catalogue, and their cost at `price` per core-hour in any currency.

    `segment_s` is measured: processor seconds per segment of a worker with one thread, all cores of
    the machine being at work (docs/catalogue.md). Cores for a deadline are hours over hours.
    """
    hours = tracks * segments * segment_s / 3600
    return {"core_hours": hours, "cost": hours * price}


# --- the command -------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Score a catalogue; returns the exit code. CommandError: it cannot go on."""
    from artifactnet_jax.models import open_model
    from artifactnet_jax.weights import WeightsError

    if args.output in (None, "-") or args.format != "table":
        raise CommandError("--engine ray writes Parquet: give -o DIR, and no --format", USAGE)
    if args.schema == 1:
        raise CommandError("--engine ray writes rows of schema 2: leave --schema out", USAGE)
    connect(args.address)
    folder = Folder(args.output)
    entries = list_entries(args.paths, args.recursive)
    try:
        weights = open_model(args.weights, args.backend)
    except WeightsError as error:
        raise CommandError(str(error), USAGE) from error
    options = detector_options(args)
    try:  # the workers may be on other machines
        options["banks"] = [b if b == EMBEDDED else load(b) for b in options["banks"]]
    except BankError as error:
        raise CommandError(str(error), USAGE) from error
    pool = settle(Pool(args.workers, args.cpus, args.gpus), args.backend)
    folder.begin(describe(weights, args.backend, options, pool), args.resume)
    return _score(args, folder, entries, weights, options, pool)


def describe(
    weights: Model, backend: str, options: Mapping[str, Any], pool: Pool
) -> dict[str, Any]:
    """What all rows of these options have in common, as a worker of the pool finds it.

    CommandError when no Detector can be had there. `pool` is a settled one.
    """
    import ray

    # Of a GPU a process of its own gives its share back when it ends.
    held: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus}
    held |= {"max_calls": 1} if pool.gpus else {}
    ask = ray.remote(**held)(_describe)
    common: dict[str, Any]
    common, problem, code = ray.get(ask.remote(weights, backend, dict(options), pool))
    if problem:
        raise CommandError(problem, code)
    return common


def _score(
    args: argparse.Namespace,
    folder: Folder,
    entries: Mapping[str, str],
    weights: Model,
    options: Mapping[str, Any],
    pool: Pool,
) -> int:
    known = folder.known()
    digests = {digest for digest, _ in known}
    renamed: dict[str, list[str]] = defaultdict(list)
    failed = before = 0

    def scored_before(path: str, digest: str) -> None:
        nonlocal before
        before += 1
        if (digest, utf8(path)) not in known:
            renamed[digest].append(path)

    todo = {path: digest for path, digest in entries.items() if digest not in digests}
    for path in entries.keys() - todo.keys():
        scored_before(path, entries[path])
    folder.drop_failures(entries)
    with (
        progress(args.quiet, args.output, len(todo)) as tell,
        contextlib.closing(
            score_many(todo, weights, args.backend, options, pool, digests)
        ) as finished,
    ):
        try:
            for row in finished:
                if "schema" not in row:
                    scored_before(row["path"], row["sha256"])
                    tell(row)
                    continue
                folder.add(row)
                tell(Failure(row["path"], **row["error"]) if "error" in row else row)
                failed += "error" in row
                if failed and args.fail_fast:
                    break
            for row in folder.copies(renamed):
                folder.add(row)
        finally:
            folder.flush()
    if args.resume and not args.quiet:
        print(f"resume: {before} had been scored", file=sys.stderr)
    return SOME_FAILED if failed else OK
