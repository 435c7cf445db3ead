"""What a command line names: files, folders and lists of files; and files written whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from artifactnet_jax.text import SOME_FAILED, USAGE, CommandError, brief, printable

_SUFFIXES = (
    ".wav .wave .w64 .rf64 .flac .aif .aiff .aifc .au .snd .caf .ogg .oga .opus .mp2 .mp3 .m4a "
    ".m4b .mp4 .aac .ac3 .3gp .wma .ape .wv .tta .mka .webm"
)
SUFFIXES = frozenset(_SUFFIXES.split())  # what a folder is searched for; a named file may be any


def cache_folder(part: str) -> Path:
    """Where things of a kind are kept: in $XDG_CACHE_HOME/artifactnet-jax, by default ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "artifactnet-jax" / part


def find_audio(paths: Iterable[str | bytes | os.PathLike[Any]], recursive: bool) -> list[str]:
    """Expand the arguments of a command line to recordings, in order, each path once.

    A file is taken whatever its suffix, and so is a path that does not exist: reading it gives the
    error. A folder gives its files with a suffix in `SUFFIXES`, sorted, and with `recursive` those
    of its subfolders; hidden names and links to folders are skipped; without any such file, the
    folder itself is the entry. `@list.txt` gives the paths in that UTF-8 file, one per line, blank
    lines and lines that start with # skipped, relative to the current folder. "-" stays.

    Names that are not UTF-8 come back in Python's surrogate form, which `open` understands.
    ValueError: a list file cannot be read.
    """
    found: dict[str, None] = {}
    for path in map(os.fsdecode, paths):
        for entry in _listed(path[1:]) if path.startswith("@") else [path]:
            if entry != "-" and os.path.isdir(entry):
                found.update(dict.fromkeys(audio_in(entry, recursive) or [entry]))
            else:
                found[entry] = None
    return list(found)


def _listed(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = [line.rstrip("\n") for line in file]
    except OSError as error:
        raise ValueError(f"list file {printable(path)}: {error.strerror}") from None
    return [line for line in lines if line.strip() and not line.startswith("#")]


def audio_in(folder: str, recursive: bool) -> list[str]:
    """Audio files in a folder, sorted, and subfolders that cannot be listed (to fail later)."""
    found: list[str] = []
    walk = os.walk(folder, onerror=lambda error: found.append(os.fsdecode(error.filename)))
    for root, folders, files in walk:
        folders[:] = sorted(f for f in folders if recursive and not f.startswith("."))
        found += [
            os.path.join(root, file)
            for file in sorted(files)
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in SUFFIXES
        ]
    return found


def sha256_of(file: BinaryIO) -> str:
    """SHA-256 of what is left of an open file, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


class TemporaryCopy(io.BufferedRandom):
    """A temporary file for what comes as a stream: decoders seek, and hours must not sit in memory.

    `name` is what the row of it is called. OSError where none can be made.
    """

    name = ""

    def __init__(self, name: str):
        super().__init__(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
        self.name = name


def check_output(path: str | os.PathLike[str], said: str) -> None:
    """CommandError, which begins with `said`, when no file can be written there: before the work.

    Raises:
        CommandError: exit code 2.
    """
    if problem := output_problem(path):
        raise CommandError(f"{said}: {problem}", USAGE)


def output_problem(path: str | os.PathLike[str]) -> str:
    """Why a file cannot be written there, and the cure; empty when it can."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        return "its folder does not exist: create it first"
    if os.path.exists(path) and not os.path.isfile(path):
        return "not a regular file: name a file"
    if not all(os.access(p, os.W_OK) for p in (folder, path) if os.path.exists(p)):
        return "no permission to write there: name another file"
    return ""


@contextlib.contextmanager
def writing(where: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a failure to write `where` into the end of the command: a full disk is no wrong usage.

    Raises:
        CommandError: an OSError, exit code 1. BrokenPipeError passes: the reader has had enough.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        cause = f"cannot write to {os.fspath(where)}: {error.strerror or brief(error)}"
        raise CommandError(f"{cause}; free space or name another file", SOME_FAILED) from error


def make_folder(path: str | os.PathLike[str], option: str, mode: int = 0o777) -> None:
    """Make the folder that `option` names, and those above it, where they are missing.

    Raises:
        CommandError: exit code 1 on a full disk; 2 where another name is the cure.
    """
    try:
        os.makedirs(path, mode, exist_ok=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "free space or name another folder" if full else "name another folder"
        cause = f"{option} {printable(os.fspath(path))}: {error.strerror}"
        raise CommandError(f"{cause}: {cure}", SOME_FAILED if full else USAGE) from error


def claim(
    path: str | os.PathLike[str],
    facts: dict[str, Any],
    decisive: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """Write `facts` of a run into its folder as JSON, or find there those of an earlier call.

    `decisive` picks what of such facts must be equal: a dict, of dicts at most.

    Returns:
        What an earlier call wrote, or `facts`.

    Raises:
        CommandError: exit code 2, the facts are of another run or cannot be read; 1, a full disk.
    """
    name = printable(os.fspath(path))
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        old, new = _flat(decisive(found)), _flat(decisive(facts))
    except FileNotFoundError:
        with writing(path):
            write_json(path, facts)
        return facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"{name} cannot be read ({brief(error)})"
        raise CommandError(f"{cause}: name another --out", USAGE) from error
    other = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if other:
        pairs = [f"{key} {old.get(key)!s:.60} there, {new.get(key)!s:.60} here" for key in other]
        told = ", ".join(pairs[:3])
        cause = f"{os.path.dirname(name)} holds another run ({printable(told)})"
        raise CommandError(f"{cause}: give the same settings, or another --out", USAGE)
    return dict(found)


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    nested = {f"{k}.{j}": w for k, v in facts.items() if isinstance(v, dict) for j, w in v.items()}
    return {k: v for k, v in facts.items() if not isinstance(v, dict)} | nested


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write a JSON file atomically, indented. ValueError: a number is infinite or NaN."""
    replace_file(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file atomically, with the permissions of the one it replaces."""
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write (and seek in) that takes the place of `path` when the context ends.

    An exception leaves `path` as it was. Threads and processes may write the same path at once: the
    last one stays. The permissions are those of the file that it replaces.
    """
    folder = os.path.dirname(os.path.abspath(path))
    name = f".artifactnet-jax-{os.getpid()}-{threading.get_ident()}.tmp"
    temporary = os.path.join(folder, name)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
