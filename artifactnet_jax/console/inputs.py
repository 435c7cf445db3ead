"""Inputs of a command line: recordings by name, and standard input."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from artifactnet_jax.files import TemporaryCopy, find_audio
from artifactnet_jax.text import SOME_FAILED, USAGE, CommandError


def find_inputs(args: argparse.Namespace) -> list[str]:
    """Recordings that a command line names. CommandError: a list file cannot be read."""
    try:
        return find_audio(args.paths, args.recursive)
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error


@contextlib.contextmanager
def sources(paths: Sequence[str]) -> Iterator[list[Any]]:
    """The same paths, "-" replaced by a temporary file that holds all of standard input.

    Standard input is copied before anything is scored: Ctrl-C could not reach a decoding thread
    that reads it. CommandError: the copy fails, as on a full disk.
    """
    found: list[Any] = list(paths)
    with contextlib.ExitStack() as stack:
        if "-" in paths:
            try:
                spool = stack.enter_context(TemporaryCopy("-"))
                if sys.stdin is not None:  # else closed, the same as empty
                    shutil.copyfileobj(sys.stdin.buffer, spool)
                spool.flush()
            except OSError as error:
                cause = f"standard input cannot be copied to a temporary file: {error.strerror}"
                cure = "is the disk full? TMPDIR moves it"
                raise CommandError(f"{cause}; {cure}", SOME_FAILED) from error
            found[paths.index("-")] = spool
        yield found
