"""Progress of a command, on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from artifactnet_jax.results import Failure


@contextlib.contextmanager
def progress(quiet: bool, output: str | None, total: int) -> Iterator[Callable[[object], None]]:
    """A function that tells stderr of a result: a line for a `Failure`, a bar on a terminal.

    Where stdout shows the rows on the terminal already, neither is needed.
    """
    shown = not quiet and (output is not None or not sys.stdout.isatty())
    bar: Any = None
    if shown and sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(total=total, unit="track", file=sys.stderr, dynamic_ncols=True)

    def tell(result: object) -> None:
        if shown and isinstance(result, Failure):
            (print if bar is None else bar.write)(result.message, file=sys.stderr)
        if bar is not None:
            bar.update()

    with contextlib.nullcontext() if bar is None else bar:
        yield tell


class Teller:
    """Says a line on stderr, above the progress bar if there is one."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.bar: Any = None

    def __call__(self, text: str) -> None:
        """Say it, unless the command is to be quiet."""
        if not self.quiet:
            (print if self.bar is None else self.bar.write)(text, file=sys.stderr)


@contextlib.contextmanager
def step_progress(tell: Teller, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """A function that is told of the steps done, and moves a bar where stderr is a terminal."""
    if tell.quiet or not sys.stderr.isatty():
        yield lambda step: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, unit="step", file=sys.stderr, dynamic_ncols=True) as bar:
        tell.bar = bar
        try:
            yield lambda step: bar.update(step - bar.n) and None
        finally:
            tell.bar = None
