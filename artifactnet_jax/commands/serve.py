"""Arguments of the service: `serve`, `token`."""

from __future__ import annotations

from artifactnet_jax.commands import arguments as shared
from artifactnet_jax.commands.arguments import Parser, Verbs


def serve(verbs: Verbs) -> None:
    """`serve`."""
    verb = shared.add_verb(
        verbs,
        "serve",
        "artifactnet_jax.serve.command:run",
        "serve",
        help="a batch service over HTTP, with a page",
        description="Score what clients upload: an HTTP API with batches, and a page. Runs until "
        "SIGTERM or Ctrl-C.",
        epilog="Exit codes: 0 stopped, 2 usage, 3 backend or package not available, "
        "130 interrupted.",
    )
    verb.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    verb.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    shared.add(verb, "--batch-size", *shared.AS_OF_SCORE, "--segments")
    shared.add(verb, "--jobs", help="decoders at a time")
    for option, default, text in (
        ("--quota-gb", 20, "audio on disk at most, in GiB"),
        ("--retention-hours", 168, "until results, and batches left open, are removed"),
        ("--max-file-mb", 200, "size of a file"),
        ("--max-minutes", 120, "length of a recording"),
        ("--max-files", 10_000, "files in a batch"),
        ("--max-waiting", 100_000, "files in the queue"),
        ("--rate", 1200, "requests per minute of one token or address"),
        ("--decode-seconds", 60, "time for decoding a file"),
        ("--decode-memory-mb", 1024, "memory for decoding a file"),
    ):
        shared.add_count(verb, option, default, f"{text} (default: {default})")
    _add_store(verb)
    shared.add_banks(verb)


def token(verbs: Verbs) -> None:
    """`token`, with its actions."""
    verb = shared.add_verb(
        verbs,
        "token",
        "artifactnet_jax.serve.command:token",
        "serve",
        help="bearer tokens of the service",
        description="Make, list or revoke the tokens that the service asks for.",
        epilog="Exit codes: 0 done, 2 usage, 3 a package is missing.",
    )
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make one and print it, this one time")
    create.add_argument("--name", default="", help="to know it by in the list")
    shared.add_count(create, "--days", None, "valid for (default: for ever)")
    listing = actions.add_parser("list", help="their ids, names and dates as JSON Lines")
    revoke = actions.add_parser("revoke", help="refuse one from now on")
    revoke.add_argument("id", help="as token list shows it")
    for action in (create, listing, revoke):
        _add_store(action)


def _add_store(verb: Parser) -> None:
    verb.add_argument(
        "--root",
        default="artifactnet-service",
        metavar="DIR",
        help="folder of everything that is kept (default: artifactnet-service, here)",
    )
    verb.add_argument(
        "--database",
        metavar="URL",
        help="such as postgresql://USER@HOST/NAME (default: $ARTIFACTNET_DATABASE, else "
        "SQLite in the root)",
    )
    shared.add(verb, "--debug")
