"""Inputs of a command line: recordings by name, and streams."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from artifactnet_jax.files import TemporaryCopy, find_audio
from artifactnet_jax.text import SOME_FAILED, USAGE, CommandError, printable


def find_inputs(args: argparse.Namespace) -> list[str]:
    """Recordings that a command line names; stderr says what folders left out.

    Raises:
        CommandError: a list file cannot be read.
    """

    def tell(text: str) -> None:
        if not getattr(args, "quiet", False):
            print(text, file=sys.stderr)

    try:
        return find_audio(args.paths, args.recursive, tell)
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error


def is_stream(path: str) -> bool:
    """Whether a path is standard input, a pipe or a device: it can be read once only."""
    if path == "-":
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


@contextlib.contextmanager
def sources(paths: Sequence[str]) -> Iterator[list[Any]]:
    """The same paths, streams among them replaced by temporary files that hold all of them.

    Streams are copied before anything is scored: Ctrl-C could not reach a decoding thread that
    reads one. CommandError: the copy fails, as on a full disk.
    """
    found: list[Any] = list(paths)
    with contextlib.ExitStack() as stack:
        for k, path in enumerate(paths):
            if is_stream(path):
                with contextlib.suppress(PermissionError, FileNotFoundError):  # a row says it
                    found[k] = _copied(path, stack)
        yield found


def _copied(path: str, stack: contextlib.ExitStack) -> BinaryIO:
    what = "standard input" if path == "-" else printable(path)
    try:
        spool = stack.enter_context(TemporaryCopy(path))
        if path != "-":
            with open(path, "rb") as stream:
                shutil.copyfileobj(stream, spool)
        elif sys.stdin is not None:  # else closed, the same as empty
            shutil.copyfileobj(sys.stdin.buffer, spool)
        spool.flush()
    except (PermissionError, FileNotFoundError):
        raise
    except OSError as error:
        cause = f"{what} cannot be copied to a temporary file: {error.strerror}"
        raise CommandError(f"{cause}; is the disk full? TMPDIR moves it", SOME_FAILED) from error
    return spool
