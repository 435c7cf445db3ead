"""The verbs `serve` and `token`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from artifactnet_jax.console.detectors import banks
from artifactnet_jax.detector import EMBEDDED
from artifactnet_jax.files import make_folder, replace_file, writing
from artifactnet_jax.serve.limits import DecodeLimits, Limits
from artifactnet_jax.serve.store import Store, new_id
from artifactnet_jax.text import NO_BACKEND, OK, USAGE, CommandError, brief

DATABASE = "ARTIFACTNET_DATABASE"  # in the environment: a password is not in the command line then
DRAIN_S = 10  # what a stop waits for answers under way
CONNECTIONS = 500


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; returns the exit code. CommandError: it cannot start."""
    from artifactnet_jax.serve.service import Settings
    from artifactnet_jax.serve.uploads import lock

    root = _root(args)
    try:
        held = lock(root / "server.lock")
    except BlockingIOError:
        text = f"another server runs on {root}: stop it, or give another --root"
        raise CommandError(text, USAGE) from None
    local = _is_loopback(args.host)
    limits = Limits(
        file_bytes=args.max_file_mb * 2**20,
        files=args.max_files,
        waiting=args.max_waiting,
        requests=args.rate,
        retention_s=3600.0 * args.retention_hours,
    )
    decode = DecodeLimits(
        wall_s=args.decode_seconds,
        memory_mb=args.decode_memory_mb,
        audio_s=60.0 * args.max_minutes,
    )
    names = ("weights", "backend", "segments", "threshold", "margin", "prior", "batch_size", "jobs")
    detector = {name: getattr(args, name) for name in names}
    detector["banks"] = [b if b == EMBEDDED else os.path.abspath(b) for b in banks(args)]
    if detector["weights"] is not None:
        detector["weights"] = os.path.abspath(detector["weights"])
    database = _database(args, root)
    settings = Settings(root, database, args.quota_gb * 2**30, limits, decode, detector)
    with held, _open_store(database) as store:
        if not store.belongs_to(_place(root)):
            text = "the database belongs to another --root: name that, or another database"
            raise CommandError(text, USAGE)
        if not local and not store.has_tokens():
            text = f"{args.host} can be reached from other machines: make a token first"
            raise CommandError(f"{text} (artifactnet-jax token create)", USAGE)
        with _listen(args.host, args.port) as listener:
            signal.signal(signal.SIGTERM, _terminated)
            signal.signal(signal.SIGINT, _interrupted)
            asyncio.run(_serve(settings, store, local, listener))
    return OK


async def _serve(settings: Any, store: Store, local: bool, listener: socket.socket) -> None:
    import uvicorn

    from artifactnet_jax.serve.app import create_app
    from artifactnet_jax.serve.service import Service

    service = Service(settings, store, local)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            loop.call_soon_threadsafe(service.begin_stop)

    loop = asyncio.get_running_loop()
    config = uvicorn.Config(
        create_app(service),
        log_level="warning",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=DRAIN_S,
    )
    try:
        await service.start()
        host, port = listener.getsockname()[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"artifactnet-jax: serving on http://{where}", file=sys.stderr, flush=True)
        await Server(config).serve(sockets=[listener])
    finally:
        await service.stop()


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(OK)


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def token(args: argparse.Namespace) -> int:
    """Make, list or revoke bearer tokens; returns the exit code."""
    with _open_store(_database(args, _root(args))) as store:
        if args.action == "create":
            print(store.add_token(args.name, args.days))
        elif args.action == "list":
            for row in store.tokens():
                print(json.dumps({key: _when(key, value) for key, value in row.items()}))
        elif not store.revoke(args.id):
            raise CommandError(f"there is no token {args.id}: see token list", USAGE)
    return OK


def _when(key: str, value: Any) -> Any:
    """Times as people read them."""
    if key not in ("created", "expires", "revoked") or value is None:
        return value
    return datetime.fromtimestamp(value, timezone.utc).isoformat(timespec="seconds")


def _root(args: argparse.Namespace) -> Path:
    """The folder for everything that is kept, made if it is missing, readable by nobody else."""
    os.umask(0o077)
    root = Path(args.root).absolute()
    make_folder(root, "--root", 0o700)
    if not os.access(root, os.W_OK):
        raise CommandError(f"--root {root}: no permission to write there", USAGE)
    return root


def _place(root: Path) -> str:
    """What a root is called in its database, wherever it is moved to."""
    path = root / "id"
    if not path.exists():
        with writing(path):
            replace_file(path, new_id().encode())
    return path.read_text()


def _database(args: argparse.Namespace, root: Path) -> str:
    return args.database or os.environ.get(DATABASE) or f"sqlite:///{root / 'service.db'}"


@contextlib.contextmanager
def _open_store(url: str) -> Iterator[Store]:
    try:
        store = Store(url)
    except ModuleNotFoundError as error:
        cure = 'pip install "artifactnet-jax[postgres]"'
        raise CommandError(f"the database needs {error.name}: {cure}", NO_BACKEND) from None
    except (ArgumentError, NoSuchModuleError, ValueError):
        text = "no database URL: use sqlite:///FILE or postgresql://USER@HOST/NAME"
        raise CommandError(text, USAGE) from None
    except DBAPIError as error:
        raise CommandError(f"the database cannot be opened: {brief(error)}", USAGE) from None
    with contextlib.closing(store):
        yield store


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
        return listener
    except (OSError, OverflowError) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"cannot listen on {host}:{port}: {text}", USAGE) from None
