"""What the parsers of all families share: types of values, arguments that several verbs have."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from artifactnet_jax.text import BACKENDS

Parser = argparse.ArgumentParser
Verbs = Any  # what ArgumentParser.add_subparsers returns: argparse has no public name for it

PRESETS = ("edge", "v94")  # of a `Config`


# --- types of values ------------------------------------------------------------------------------


def segments(text: str) -> int | str:
    """A plan of segments: "all", "first60" or a count."""
    return text if text in ("all", "first60") else _count(text, "'all', 'first60' or a count")


def positive(text: str) -> int:
    """A whole number above 0."""
    return _count(text, "a whole number")


def batches(text: str) -> list[int]:
    """Whole numbers above 0, joined by commas."""
    return [_count(part, "whole numbers joined by commas, each") for part in text.split(",")]


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of names out of these, joined by commas."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return found

    return parse


def _count(text: str, expected: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected} above 0")
    return count


def number(low: float, high: float, expected: str) -> Callable[[str], float]:
    """The type of numbers from `low` to `high`; `expected` says so in the error."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


fraction = number(0, 1, "a number from 0 to 1")
margin = number(0, float("inf"), "a number from 0 up")


def prior(text: str) -> float:
    """A share between 0 and 1, neither of them."""
    expected = "a share between 0 and 1"
    value = number(0, 1, expected)(text)
    if value in (0, 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def seconds(low: float, high: float) -> Callable[[str], float]:
    """The type of seconds from `low` to `high`."""
    return number(low, high, f"seconds from {low:g} to {high:g}")


def threshold(text: str) -> float | str:
    """A number from 0 to 1; what is no number at all names an operating point of the weights."""
    try:
        float(text)
    except ValueError:
        if text.strip():
            return text
    return fraction(text)


# --- verbs and arguments --------------------------------------------------------------------------

_SHARED: dict[str, dict[str, Any]] = {
    "--weights": {"metavar": "W", "help": "as of score (default: embedded weights)"},
    "--backend": {"default": "auto", "choices": ("auto", *BACKENDS)},
    "--segments": {"type": segments, "metavar": "all|first60|N"},
    "--aggregate": {"choices": ("median", "rms", "mean")},
    "--threshold": {"type": threshold, "metavar": "T"},
    "--margin": {"type": margin, "metavar": "M"},
    "--prior": {"type": prior, "metavar": "P"},
    "--batch-size": {"type": positive, "metavar": "B", "help": "segments per call"},
    "--jobs": {"type": positive, "metavar": "N", "help": "decoding threads"},
    "--cache": {"metavar": "DIR", "help": "decoded audio (default: in the user's cache folder)"},
    "--recursive": {"action": "store_true", "help": "descend into subfolders"},
    "--quiet": {"action": "store_true", "help": "no progress on stderr"},
    "--debug": {"action": "store_true", "help": "show tracebacks on stderr"},
}
_SHORT = {"--recursive": ("-r",), "--quiet": ("-q",)}
# Of every verb that scores.
AS_OF_SCORE = ("--weights", "--backend", "--threshold", "--margin", "--prior")


def add_verb(verbs: Verbs, name: str, runs: str, extra: str = "", **texts: Any) -> Parser:
    """A verb that "module:function" `runs`; `extra` of the package brings what the module needs."""
    verb: Parser = verbs.add_parser(name, **texts)
    verb.set_defaults(runs=runs, extra=extra, called=verb.prog.partition(" ")[2])
    return verb


def add(verb: Parser, *options: str, **changed: Any) -> None:
    """Options that several verbs have, as in the table above but for what is `changed`."""
    for option in options:
        settings = {"help": "as of score"} | _SHARED[option] | changed
        verb.add_argument(*_SHORT.get(option, ()), option, **settings)


def add_banks(verb: Parser) -> None:
    """Banks of decoders whose lines are looked for; see `console.detectors.banks`."""
    group = verb.add_argument_group(
        "decoders",
        "Rows name the decoder whose lines a track's spectrum carries, if there is one. With "
        "weights whose score is calibrated it counts in the score.",
    )
    either = group.add_mutually_exclusive_group()
    text = "look for the decoders of this bank too (repeatable)"
    either.add_argument("--bank", action="append", default=[], metavar="FILE", help=text)
    either.add_argument("--no-decoder", action="store_true", help="look for none")


def add_count(verb: Parser, name: str, default: int | None, text: str, metavar: str = "N") -> None:
    """A whole number above 0."""
    verb.add_argument(name, type=positive, default=default, metavar=metavar, help=text)


def add_repeated(verb: Parser, name: str, metavar: str, text: str) -> None:
    """An option that may be given several times."""
    verb.add_argument(name, action="append", default=[], metavar=metavar, help=text)
