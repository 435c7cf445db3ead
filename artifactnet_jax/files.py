"""What a command line names: files, folders and lists of files; and files written whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.request import url2pathname

from artifactnet_jax.text import SOME_FAILED, USAGE, CommandError, brief, printable

# What is read, once for all: FFmpeg's demuxers, and the suffixes of their files. Playlists (hls,
# concat), devices and generators are not among them: they would open other files.
FORMATS = {
    "3gp": ".3gp .3g2 .3gpp",
    "aac": ".aac .adts",
    "ac3": ".ac3",
    "aiff": ".aif .aiff .aifc .aff",
    "amr": ".amr .awb",
    "ape": ".ape",
    "asf": ".wma .asf .wmv",
    "au": ".au .snd",
    "avi": ".avi",
    "caf": ".caf",
    "dsf": ".dsf",
    "dts": ".dts",
    "dtshd": ".dtshd",
    "eac3": ".eac3 .ec3",
    "flac": ".flac .fla",
    "flv": ".flv .f4v",
    "iff": ".dff .iff .8svx",
    "loas": ".loas .latm",
    "matroska": ".mka .mkv .mk3d",
    "mlp": ".mlp",
    "mov": ".mov .qt",
    "mp3": ".mp3 .mp2 .mp1 .mpa .mpga",
    "mp4": ".mp4 .m4a .m4b .m4p .m4r .m4v .f4a .f4b .ismv .isma",
    "mpc": ".mpc",
    "mpc8": ".mpp",
    "mpeg": ".mpg .mpeg .vob .m2p",
    "mpegts": ".ts .m2ts .mts .m2t",
    "mxf": ".mxf",
    "nut": ".nut",
    "ogg": ".ogg .oga .ogv .ogx .opus .spx",
    "oma": ".oma .aa3 .omg",
    "qoa": ".qoa",
    "rm": ".rm .ra .rmvb",
    "shn": ".shn",
    "tak": ".tak",
    "truehd": ".thd .truehd",
    "tta": ".tta",
    "voc": ".voc",
    "w64": ".w64",
    "wav": ".wav .wave .bwf .rf64",
    "webm": ".webm .weba",
    "wsd": ".wsd",
    "wtv": ".wtv",
    "wv": ".wv",
    "xwma": ".xwma",
}
SUFFIXES = frozenset(" ".join(FORMATS.values()).split())  # what a folder is searched for


def cache_folder(part: str) -> Path:
    """Where things of a kind are kept: in $XDG_CACHE_HOME/artifactnet-jax, by default ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "artifactnet-jax" / part


Tell = Callable[[str], None]


def find_audio(
    paths: Iterable[str | bytes | os.PathLike[Any]], recursive: bool, tell: Tell = lambda text: None
) -> list[str]:
    """Expand the arguments of a command line to recordings, in order, each path once.

    A file is taken whatever its suffix, and so is a path that does not exist: reading it gives the
    error. A folder gives its files with a suffix in `SUFFIXES`, sorted, and with `recursive` those
    of its subfolders; hidden names and links to folders are skipped; without any such file, the
    folder itself is the entry. `tell` gets a line for each folder where something was left out.
    `@list.txt`, unless that is the name of a file, gives the paths in that file: see `_listed`.
    "-" stays. What is not there under its name is looked for as a file:// URL, with slashes for
    backslashes, and in the other Unicode forms of its letters.

    Names that are not UTF-8 come back in Python's surrogate form, which `open` understands.
    ValueError: a list file cannot be read, or is none.
    """
    found: dict[str, None] = {}
    for path in map(os.fsdecode, paths):
        listed = path.startswith("@") and not os.path.lexists(path)
        for entry in _listed(path[1:]) if listed else [_there(path) or path]:
            if entry != "-" and os.path.isdir(entry):
                found.update(dict.fromkeys(audio_in(entry, recursive, tell) or [entry]))
            else:
                found[entry] = None
    return list(found)


def _there(path: str, folder: str = "") -> str | None:
    """The path under which a name is there, in `folder` if it is relative; None: under none."""
    if path == "-":
        return path
    names = [path]
    if path.lower().startswith("file:"):
        names.append(url2pathname(re.sub(r"(?i)^file:(//(localhost)?(?=/))?", "", path)))
    if "\\" in path:
        names.append(path.replace("\\", "/"))
    for find in (lambda name: name if os.path.lexists(name) else None, _respelled):
        for name in names:
            with contextlib.suppress(ValueError):  # a NUL in the name
                if there := find(os.path.join(folder, name)):
                    return there
    return None


def _respelled(path: str) -> str | None:
    """The path of the file whose name has the same letters, in another Unicode form."""
    if path.isascii():
        return None
    root, name = os.path.split(path)
    if not name:
        return None
    folder = root if not root or os.path.isdir(root) else _respelled(root)
    if folder is None:
        return None
    wanted = unicodedata.normalize("NFC", name)
    with contextlib.suppress(OSError):
        for other in sorted(os.listdir(folder or ".")):
            if unicodedata.normalize("NFC", other) == wanted:
                return os.path.join(folder, other)
    return None


def _listed(path: str) -> list[str]:
    """The paths in a list: one per line, or each before a NUL as `find -print0` writes them.

    The text is UTF-8, or UTF-16 as PowerShell writes it. Relative paths are in the folder of the
    list, or else in the current one. Blank lines do not count, nor do those that begin with # and
    name no file.
    """
    there = _there(path) or path
    name = printable(path)
    try:
        with open(there, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ValueError(f"list file {name}: {error.strerror}") from None
    pairs = data[:4096]
    wide = next((c for b, c in _MARKS.items() if data.startswith(b)), None)
    if wide is None and len(pairs) > 3 and pairs[1::2].count(0) > 0.4 * len(pairs):
        wide = "utf-16-le"
    try:
        text = data.decode(wide) if wide else data.decode("utf-8-sig", "surrogateescape")
    except UnicodeDecodeError:
        text = "\1"
    control = sum(c < " " and c not in "\t\r\n\0" for c in text[: 2**16])
    if control * 100 > len(text[: 2**16]):
        cure = "leave the @ out to score it, or name a text file with a path on each line"
        raise ValueError(f"list file {name}: no list but binary data: {cure}")
    lines = text.split("\0") if "\0" in text else text.splitlines()
    folder, found = os.path.dirname(there), []
    for line in lines:
        if not line.strip():
            continue
        tries = (_there(each, where) for each in (line, line.strip()) for where in (folder, ""))
        entry = next((each for each in tries if each), None)
        if entry or not line.startswith("#"):
            found.append(entry or line)
    return found


_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def audio_in(folder: str, recursive: bool, tell: Tell = lambda text: None) -> list[str]:
    """Audio files in a folder, sorted, and subfolders that cannot be listed (to fail later).

    `tell` gets a line that says what was left out, and why.
    """
    found: list[str] = []
    others: Counter[str] = Counter()
    left: Counter[str] = Counter()
    walk = os.walk(folder, onerror=lambda error: found.append(os.fsdecode(error.filename)))
    for root, folders, files in walk:
        linked = [f for f in folders if os.path.islink(os.path.join(root, f))]
        left["hidden"] += sum(f.startswith(".") for f in [*folders, *files])
        left["linked"] += sum(not f.startswith(".") for f in linked)
        inner = sorted(f for f in folders if f not in linked and not f.startswith("."))
        left["inner"] += 0 if recursive else len(inner)
        folders[:] = inner if recursive else []
        for file in sorted(f for f in files if not f.startswith(".")):
            suffix, path = os.path.splitext(file)[1].lower(), os.path.join(root, file)
            if suffix not in SUFFIXES:
                others[printable(suffix) or "no suffix"] += 1
            elif os.path.exists(path) and not os.path.isfile(path):
                left["special"] += 1
            else:
                found.append(path)
    if parts := _left_out(others, left):
        tell(f"{printable(folder)}: left out {', '.join(parts)}")
    return found


def _left_out(others: Counter[str], left: Counter[str]) -> list[str]:
    """What a folder has besides audio, in words."""
    parts = []
    if count := others.total():
        ordered = sorted(others.items(), key=lambda item: (-item[1], item[0]))
        kinds = [f"{suffix} {n}" for suffix, n in ordered[:5]]
        kinds += ["..."] if len(others) > 5 else []
        parts.append(f"{_some(count, 'file')} of no audio suffix ({', '.join(kinds)})")
    names = {"inner": "subfolder", "linked": "linked folder", "hidden": "hidden name"}
    for key, name in (names | {"special": "pipe or device"}).items():
        if left[key]:
            parts.append(_some(left[key], name) + (" (-r searches them)" if key == "inner" else ""))
    return parts


def _some(count: int, name: str) -> str:
    return f"{count} {name}" + ("" if count == 1 else "s")


def sha256_of(file: BinaryIO) -> str:
    """SHA-256 of what is left of an open file, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def facts_of(file: BinaryIO) -> dict[str, Any]:
    """Size in bytes, time of change in ns since 1970 (None: no file on a disk) and SHA-256.

    OSError.
    """
    modified = None
    with contextlib.suppress(OSError, AttributeError, TypeError):
        status = os.fstat(file.fileno())
        modified = status.st_mtime_ns if stat.S_ISREG(status.st_mode) else None
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return {"size": size, "modified": modified, "sha256": sha256_of(file)}


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
