"""The verb `fingerprint`: decoders' lines, learnt, listed, matched and tested."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from artifactnet_jax import decoder_learning as learning
from artifactnet_jax import decoders
from artifactnet_jax.audio import read_spectrum
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.console.inputs import find_inputs, sources
from artifactnet_jax.console.progress import progress
from artifactnet_jax.console.writers import writer
from artifactnet_jax.data.manifest import Row, read_manifest
from artifactnet_jax.detector import EMBEDDED
from artifactnet_jax.files import check_output, sha256_of, writing
from artifactnet_jax.fingerprint import RATE, Accumulator
from artifactnet_jax.recording import AudioError
from artifactnet_jax.results import Failure, decoder_row
from artifactnet_jax.text import OK, SOME_FAILED, USAGE, CommandError, clock, printable

SCHEMA = "artifactnet-jax/fingerprint/1"
T = TypeVar("T")


def run(args: argparse.Namespace) -> int:
    """Do what the arguments name; returns the exit code. CommandError: it cannot go on."""
    actions = {"learn": learn, "list": list_banks, "match": match, "test": test}
    return actions[args.action](args)


def open_banks(paths: Sequence[str]) -> decoders.Bank:
    """The decoders of several banks as one; `EMBEDDED` is that of the package. CommandError."""
    try:
        banks = [decoders.load(None if path == EMBEDDED else path) for path in paths]
    except decoders.BankError as error:
        raise CommandError(str(error), USAGE) from error
    return decoders.join(*banks)


def _each(
    found: Sequence[Any], work: Callable[[Any], T], jobs: int | None
) -> Iterator[T | Failure]:
    """Results of `work` in order; what cannot be read is a Failure. In threads."""

    def one(source: Any) -> T | Failure:
        try:
            return work(source)
        except AudioError as error:
            return Failure(_name(source), error.kind, str(error))

    with ThreadPoolExecutor(jobs or cpu_count(), "artifactnet-fingerprint") as pool:
        try:
            yield from pool.map(one, found)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _name(source: Any) -> str:
    if isinstance(source, Row):
        return source.path
    return source if isinstance(source, str) else str(source.name)


# --- learn ----------------------------------------------------------------------------------------


def learn(args: argparse.Namespace) -> int:
    """Learn a decoder from tracks, and add it to a bank."""
    name, output = args.name.strip(), os.path.realpath(args.output)
    if not name or name != printable(name):
        raise CommandError("the decoder's name is empty or has control characters: name it", USAGE)
    check_output(output, f"-o {args.output}")
    paths = find_inputs(args)
    if len(paths) < learning.LEAST_TRACKS:
        cause = f"{len(paths)} tracks are named, {learning.LEAST_TRACKS} are needed"
        raise CommandError(f"{name}: {cause}: name more", USAGE)
    bank, own = open_banks([EMBEDDED, *args.bank]), None
    if os.path.exists(output):
        own = without(open_banks([output]), name)
    failed: list[Failure] = []
    with progress(args.quiet, "", len(paths)) as tell, sources(paths) as found:

        def tracks() -> Iterator[learning.Track]:
            for result in _each(found, functools.partial(_track, args.group_by), args.jobs):
                if isinstance(result, Failure):
                    failed.append(result)
                else:
                    yield result
                tell(result)

        try:
            beside = bank if own is None else decoders.join(bank, own)
            learned = learning.learn(name, tracks(), beside)
        except learning.LearningError as error:
            raise CommandError(str(error), SOME_FAILED) from error
    new = learned.bank if own is None else decoders.join(own, learned.bank)
    with writing(args.output):
        digest = decoders.save(new, output)
    facts = _facts(learned, name, args, digest, [d.name for d in new.decoders], len(failed))
    print(json.dumps(facts, indent=1, allow_nan=False) if args.json else _told(facts))
    return SOME_FAILED if failed else OK


def without(bank: decoders.Bank, name: str) -> decoders.Bank | None:
    """A bank without the decoders of a name; None if there are no others."""
    keep = [k for k, decoder in enumerate(bank.decoders) if decoder.name != name]
    return bank.only(keep) if keep else None


def _track(group_by: str, source: Any) -> learning.Track:
    """A track to learn from. AudioError: it cannot be read, or not be judged."""
    name = _name(source)
    spectrum = read_spectrum(source, name)
    heard = decoders.hear(spectrum)
    if isinstance(heard, str):
        raise AudioError("unfit", f"{printable(name)}: {heard}: name another track")
    if isinstance(source, str):
        with open(source, "rb") as file:
            digest = sha256_of(file)
    else:
        source.seek(0)
        digest = sha256_of(source)
    folder, file_name = os.path.split(os.path.abspath(name))
    group = file_name if group_by == "file" else os.path.basename(folder)
    return learning.Track(printable(group), digest, spectrum)


def _facts(
    learned: learning.Learned,
    name: str,
    args: argparse.Namespace,
    digest: str,
    names: list[str],
    failed: int,
) -> dict[str, Any]:
    before, after = learned.false_alarms
    return {
        "schema": SCHEMA,
        "name": name,
        "tracks": learned.tracks,
        "failed": failed,
        "groups": len(learned.bank.decoders[0].repositories),
        "parts": learned.parts,
        "shared": _rate(learned.shared),
        "already": {other: _rate(rate) for other, rate in learned.already.items()},
        "real": {"before": _rate(before), "after": _rate(after)},
        "asked": list(learned.asked),
        "bank": {"path": args.output, "digest": digest, "decoders": names},
    }


def _rate(rate: learning.Rate) -> dict[str, Any]:
    low, high = rate.interval
    share = round(rate.share, 4) if rate.n else None
    return {"n": rate.n, "hits": rate.hits, "share": share, "interval": [_4(low), _4(high)]}


def _4(value: float) -> float:
    return round(value, 4)


def _said(rate: dict[str, Any]) -> str:
    """Such as "11 of 12 (92 %, 65 to 99)"."""
    low, high = (round(100 * end) for end in rate["interval"])
    share = f"{100 * rate['share']:.0f} %" if rate["n"] else "none"
    return f"{rate['hits']} of {rate['n']} ({share}, {low} to {high})"


def _told(facts: dict[str, Any]) -> str:
    """What `learn` says, in lines."""
    what = f"{facts['groups']} groups" if facts["groups"] > 1 else "one group, in halves"
    lines = [
        f"tracks         {facts['tracks']} ({what}), {facts['failed']} left out",
        f"share lines    {_said(facts['shared'])}: found by the lines of the other parts, of "
        f"{facts['parts']}",
    ]
    for other, rate in facts["already"].items():
        lines.append(f"known already  {other} finds {_said(rate)}")
    if not facts["already"]:
        lines.append("known already  no: no decoder of the banks finds any of them")
    before, after = facts["real"]["before"], facts["real"]["after"]
    lines += [
        f"false alarms   {before['hits']} of {before['n']} real tracks before, {after['hits']} "
        "after (the null is fitted to the same tracks)",
        f"decoders       {facts['asked'][0]} before, {facts['asked'][1]} after: p is multiplied "
        "by their number",
        f"bank           {printable(facts['bank']['path'])}: "
        f"{', '.join(facts['bank']['decoders'])}; digest {facts['bank']['digest'][:16]}",
    ]
    if any(rate["share"] >= learning.SHARED for rate in facts["already"].values()):
        lines.append("               one of the banks knows them: both names will be rivals")
    return "\n".join(lines)


# --- list -----------------------------------------------------------------------------------------


def list_banks(args: argparse.Namespace) -> int:
    """List the decoders of banks."""
    bank = open_banks([EMBEDDED, *args.bank])
    if args.json:
        known = [dataclasses.asdict(decoder) for decoder in bank.decoders]
        for decoder in known:
            del decoder["without"]
        print(json.dumps({"schema": SCHEMA, "digest": bank.digest, "decoders": known}, indent=1))
        return OK
    print(
        f"{'decoder':<24} {'tracks':>6} {'groups':>6} {'band, kHz':>10} {'found':>5}  years, notes"
    )
    for one in bank.decoders:
        low, high = (hz / 1000 for hz in one.band_hz)
        notes = "; ".join(filter(None, [", ".join(one.dates), one.note]))
        print(
            f"{one.name:<24} {one.tracks:>6} {len(one.repositories):>6} {low:>5.1f}-{high:<4.1f} "
            f"{100 * one.stability:>4.0f}%  {notes}".rstrip()
        )
    print(f"{len(bank.decoders)} decoders, digest {bank.digest}")
    return OK


# --- match ----------------------------------------------------------------------------------------

_HEADER = f"{'decoder':<24} {'z':>6} {'p':>8} {'speed':>7} {'band, kHz':>10}  track\n"


def match(args: argparse.Namespace) -> int:
    """Say which decoder's lines tracks carry."""
    paths = find_inputs(args)
    bank = open_banks([EMBEDDED, *args.bank])
    output = None
    if args.output not in (None, "-"):
        output = os.path.realpath(args.output)
        check_output(output, f"-o {args.output}")
    failed = 0

    def one(source: Any) -> dict[str, Any]:
        spectrum = read_spectrum(source, _name(source))
        return row_of(_name(source), spectrum, decoders.match(spectrum, bank), bank)

    line = functools.partial(_line, verbose=args.verbose)
    with (
        writer(args.format, output, [], (_HEADER, line)) as write,
        progress(args.quiet, output, len(paths)) as tell,
        sources(paths) as found,
    ):
        for result in _each(found, one, args.jobs):
            if isinstance(result, Failure):
                failed += 1
                write(result.to_dict() | {"schema": SCHEMA})
            else:
                write(result)
            tell(result)
    return SOME_FAILED if failed else OK


def row_of(
    path: str, spectrum: Accumulator, outcome: decoders.Outcome, bank: decoders.Bank
) -> dict[str, Any]:
    """A row of `match`."""
    found, nearest = outcome.match, None
    if found is None and outcome.nearest is not None:
        nearest = decoder_row(outcome.nearest)
        del nearest["sentence"]  # which is true of a match alone
    return {
        "schema": SCHEMA,
        "path": path,
        "decoder": None if found is None else decoder_row(found),
        "reason": outcome.reason,
        "nearest": nearest,
        "duration_s": round(spectrum.samples / RATE, 3),
        "bank": bank.digest,
    }


def _line(row: dict[str, Any], verbose: bool) -> str:
    """Lines of the table, with their line ends."""
    if "error" in row:
        return f"{'error':<24} {'-':>6} {'-':>8} {'-':>7} {'-':>10}  {row['error']['message']}\n"
    found, path = row["decoder"], printable(row["path"])
    if found is None:
        text = f"{'-':<24} {'-':>6} {'-':>8} {'-':>7} {'-':>10}  {path}  ({row['reason']})\n"
        if verbose and row["nearest"]:
            text += f"  nearest: {_cells(row['nearest'])}\n"
        return text
    text = f"{_cells(found)}  {path}"
    if found["rivals"]:
        text += f"  (or {', '.join(found['rivals'])})"
    text += "\n"
    for window in found["windows"] if verbose else ():
        span = f"{clock(window['start_s'])} to {clock(window['end_s'])}"
        text += f"  {span:<22} {window['z']:>6.1f} {window['p']:>8.1g}\n"
    return text


def _cells(found: dict[str, Any]) -> str:
    low, high = (hz / 1000 for hz in found["band_hz"])
    band = f"{low:.1f}-{high:.1f}"
    numbers = f"{found['z']:>6.1f} {found['p']:>8.1g} {found['speed']:>7.4f} {band:>10}"
    return f"{found['name']:<24} {numbers}"


# --- test -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tested:
    """What a bank says of one labelled track."""

    row: Row
    name: str | None  # of the decoder that was found
    systems: tuple[str, ...]  # of it
    lost: tuple[str, ...]  # names of decoders that could not be asked


def test(args: argparse.Namespace) -> int:
    """Count what a bank finds in labelled tracks, and its false alarms."""
    bank, rows = open_banks(args.banks), read_manifest(args.data)
    failed = 0
    tested: list[_Tested] = []
    with progress(args.quiet, "", len(rows)) as tell:
        for result in _each(rows, functools.partial(_ask, bank), args.jobs):
            if isinstance(result, Failure):
                failed += 1
            else:
                tested.append(result)
            tell(result)
    facts = tally(tested) | {"schema": SCHEMA, "bank": bank.digest, "failed": failed}
    print(json.dumps(facts, indent=1, allow_nan=False) if args.json else _table(facts))
    if failed:
        print(f"{failed} of {len(rows)} tracks could not be read", file=sys.stderr)
    return SOME_FAILED if failed else OK


def _ask(bank: decoders.Bank, row: Row) -> _Tested:
    spectrum = read_spectrum(row.path, row.path)
    with open(row.path, "rb") as file:
        digest = sha256_of(file)
    asked, lost = learning.unseen(bank, row.group, digest)
    outcome = decoders.match(spectrum, asked) if asked else decoders.Outcome(None, None, None)
    found = outcome.match
    if found is None or asked is None:
        return _Tested(row, None, (), lost)
    return _Tested(row, found.name, asked.decoders[found.decoder].systems, lost)


def right(generator: str, name: str, systems: Sequence[str]) -> bool:
    """Whether a decoder is named as its generator, in any case, or made for it.

    "MusicGen" is right for "musicgen-large": the generator's name begins with the decoder's.
    """
    said = generator.casefold()
    return said.startswith(name.casefold()) or said in (other.casefold() for other in systems)


def tally(tested: Sequence[_Tested]) -> dict[str, Any]:
    """Rates by generator and by source of real music, and what was found where."""
    cells: dict[tuple[int, str], list[_Tested]] = defaultdict(list)
    for one in tested:
        row = one.row
        cells[row.label, (row.model or row.source) if row.label else row.source].append(one)
    out: dict[str, Any] = {"generators": {}, "real": {}}
    for (label, key), those in sorted(cells.items()):
        found = [one for one in those if one.name is not None]
        cell: dict[str, Any] = {"found": _rate(learning.Rate(len(those), len(found)))}
        if label:
            hits = sum(right(key, str(one.name), one.systems) for one in found)
            cell["named"] = _rate(learning.Rate(len(those), hits))
        cell["names"] = dict(Counter(str(one.name) for one in found).most_common())
        cell["not_asked"] = dict(Counter(name for one in those for name in one.lost))
        out["generators" if label else "real"][key] = cell
    for label, name in ((1, "generators"), (0, "real")):
        both = [one for (which, _), those in cells.items() if which == label for one in those]
        hits = sum(one.name is not None for one in both)
        out[f"all_{name}"] = _rate(learning.Rate(len(both), hits))
    return out


def _table(facts: dict[str, Any]) -> str:
    """What `test` says, in lines."""
    wide = max(map(len, map(printable, (*facts["generators"], *facts["real"], "real music"))))
    lines = []
    if facts["generators"]:
        lines.append(f"{'generator':<{wide}}  {'found':<28} {'named rightly':<28} found as")
    for key, cell in facts["generators"].items():
        rates = f"{_said(cell['found']):<28} {_said(cell['named']):<28}"
        lines.append(f"{printable(key):<{wide}}  {rates} {_names(cell)}".rstrip())
    if facts["real"]:
        lines += ["", f"{'real music':<{wide}}  {'false alarms':<28} found as"]
        for key, cell in facts["real"].items():
            lines.append(
                f"{printable(key):<{wide}}  {_said(cell['found']):<28} {_names(cell)}".rstrip()
            )
        lines.append(f"{'all':<{wide}}  {_said(facts['all_real'])}")
    lost: Counter[str] = Counter()
    for cell in (*facts["generators"].values(), *facts["real"].values()):
        lost.update(cell["not_asked"])
    for name, count in lost.most_common():
        lines.append(f"{name}: learnt from groups of {count} tracks, and not asked about those")
    return "\n".join(lines).lstrip("\n")


def _names(cell: dict[str, Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in cell["names"].items())
