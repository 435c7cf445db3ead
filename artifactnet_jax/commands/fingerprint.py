"""Arguments of `fingerprint`, with its actions: `learn`, `list`, `match`, `test`."""

from __future__ import annotations

from artifactnet_jax.commands import arguments as shared
from artifactnet_jax.commands.arguments import Parser, Verbs

_CODES = "Exit codes: {}, 2 usage or a bank that cannot be used, 130 interrupted."


def fingerprint(verbs: Verbs) -> None:
    """`fingerprint`, with its actions."""
    verb = verbs.add_parser("fingerprint", help="which decoder's lines tracks carry")
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    _learn(actions)
    _list(actions)
    _match(actions)
    _test(actions)


def _add(actions: Verbs, name: str, text: str, about: str, codes: str) -> Parser:
    epilog = _CODES.format(codes)
    runs = "artifactnet_jax.fingerprint_command:run"
    return shared.add_verb(actions, name, runs, help=text, description=about, epilog=epilog)


def _bank(verb: Parser) -> None:
    shared.add_repeated(verb, "--bank", "FILE", "decoders beside the embedded ones; repeat")


def _learn(actions: Verbs) -> None:
    verb = _add(
        actions,
        "learn",
        "learn a decoder from 10 tracks or more",
        "Learn a decoder's lines from tracks of one generator, and write a bank of it. If the bank "
        "is there already, the decoder is added; one of the same name is replaced.",
        "0 learnt, 1 some inputs failed, or (then nothing is written) the tracks share no decoder",
    )
    add = verb.add_argument
    add("name", metavar="NAME", help="what a match is to be called")
    add("paths", nargs="+", metavar="PATH", help="file, folder or @list.txt")
    add("-o", "--output", required=True, metavar="BANK", help="file to write: bank.npz")
    add(
        "--group-by",
        choices=("folder", "file"),
        default="folder",
        help="tracks of a group are left out together when the lines are tested: those of a "
        "folder (default; of one folder in halves), or each file by itself",
    )
    _bank(verb)
    shared.add(verb, "--recursive", "--jobs")
    add("--json", action="store_true", help="what was found, as one JSON object")
    shared.add(verb, "--quiet", "--debug")


def _list(actions: Verbs) -> None:
    verb = _add(
        actions,
        "list",
        "list the decoders that are known",
        "List decoders: tracks and groups that each was learnt from, band, share of tracks that "
        "lines learnt from the other groups find.",
        "0 listed",
    )
    _bank(verb)
    verb.add_argument("--json", action="store_true", help="the same as one JSON object")
    shared.add(verb, "--debug")


def _match(actions: Verbs) -> None:
    verb = _add(
        actions,
        "match",
        "name the decoder whose lines tracks carry",
        "Look for decoders' lines in the mean spectrum of each track. p is the chance of a real "
        "track to carry those of any decoder of the banks so well; from 0.001 on none is named.",
        "0 all read, 1 some inputs failed",
    )
    add = verb.add_argument
    add("paths", nargs="+", metavar="PATH", help="file, folder, @list.txt, or - for stdin")
    _bank(verb)
    add("--format", default="table", choices=("table", "jsonl", "json"))
    add("-o", "--output", metavar="FILE", help="write rows here, not to stdout (- is stdout)")
    add(
        "--verbose",
        action="store_true",
        help="in the table also stretches of 20 s, and the nearest decoder where none is named",
    )
    shared.add(verb, "--recursive", "--jobs", "--quiet", "--debug")


def _test(actions: Verbs) -> None:
    verb = _add(
        actions,
        "test",
        "count what a bank finds in labelled tracks",
        "Count what banks find in the tracks of a manifest, by generator (column model, else "
        "source), and false alarms by source of real music, with 95 % intervals. A decoder learnt "
        "from a track, or from its group, is replaced by the same one learnt without that.",
        "0 all read, 1 some inputs failed",
    )
    add = verb.add_argument
    add("banks", nargs="+", metavar="BANK", help="files, tested as one; embedded: our own")
    add("--data", required=True, metavar="MANIFEST", help="csv or parquet: path,label,model,group")
    add("--json", action="store_true", help="the same as one JSON object")
    shared.add(verb, "--jobs", "--quiet", "--debug")
