"""Arguments of the verbs that score: `score`, `live`, `report`; and of `doctor`."""

from __future__ import annotations

from artifactnet_jax.commands import arguments as shared
from artifactnet_jax.commands.arguments import Parser, Verbs


def score(verbs: Verbs) -> None:
    """`score`; with --engine ray another module's `run` takes the same arguments."""
    verb = shared.add_verb(
        verbs,
        "score",
        "artifactnet_jax.score:run",
        help="score tracks",
        description="Score tracks: one row per input, AI, partly AI, unclear or no sign of AI, "
        "with each segment's score.",
        epilog="Exit codes: 0 all scored, 1 some inputs failed (each a row with its error), "
        "2 usage, 3 backend not available, 130 interrupted.",
    )
    verb.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="file, folder, @list.txt (one path per line), or - for a WAV or FLAC stream on stdin",
    )
    shared.add(verb, "--recursive")
    _detector(verb)
    _rows(verb)
    shared.add(verb, "--debug")
    shared.add_banks(verb)
    _engine(verb)


def _detector(verb: Parser) -> None:
    add = verb.add_argument
    add(
        "--weights",
        metavar="W",
        help="weights file, ONNX model or engine (default: embedded weights)",
    )
    shared.add(
        verb,
        "--backend",
        help="auto takes the fastest of those installed for these weights, tensorrt for an engine; "
        "onnxruntime and tensorrt also score with a graph that export wrote, as it is",
    )
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the convolutions, bfloat16 on xla and float16 on tensorrt; the front end is "
        "always float32",
    )
    shared.add(
        verb,
        "--segments",
        help="all 4 s segments, those of the first 60 s, or N evenly spaced ones (default: what "
        "the weights say, else all)",
    )
    shared.add(
        verb,
        "--aggregate",
        help="from segments to a song, which then are all that counts (default: what the weights "
        "say, else median)",
    )
    shared.add(
        verb,
        "--threshold",
        help="AI at or above: a number from 0 to 1, or the name of an operating point of the "
        "weights, such as fpr1 (default: the weights')",
    )
    shared.add(
        verb,
        "--margin",
        help="call tracks unclear whose score is within M of the threshold, in log-odds; 1.1 is "
        "a factor of three in the odds (default: the weights', else 0)",
    )
    shared.add(
        verb,
        "--prior",
        help="share of AI in what is scored, between 0 and 1: the score becomes the probability "
        "for a collection like that (0.5; for weights whose score is calibrated)",
    )
    add(
        "--until-decided",
        action="store_true",
        help="leave out the segments that cannot change a track's verdict any more, at most half "
        "of them; its score is then the median of the others",
    )
    shared.add(verb, "--batch-size", "--jobs")


def _rows(verb: Parser) -> None:
    add = verb.add_argument
    add("--format", default="table", choices=("table", "jsonl", "json", "csv"))
    add(
        "--schema",
        type=int,
        default=2,
        choices=(1, 2),
        help="of the rows in jsonl, json and csv; 1: as before there was partly-ai or unclear (2)",
    )
    add("-o", "--output", metavar="FILE", help="write rows here, not to stdout (- is stdout)")
    add(
        "--resume",
        action="store_true",
        help="with --format jsonl -o FILE: keep its whole rows, score what is missing or failed",
    )
    add("--fail-fast", action="store_true", help="stop at the first failed input")
    shared.add(verb, "--quiet", help="nothing on stderr unless the command fails")


def _engine(verb: Parser) -> None:
    engine = verb.add_argument_group(
        "catalogues",
        "With --engine ray a PATH may also be a Parquet manifest (columns path, and sha256 where "
        "known), and any of them a URI such as s3://bucket/folder. -o names the folder of the "
        "results, in Parquet; --resume goes on there, and knows files by their bytes.",
    )
    engine.add_argument(
        "--engine", default="local", choices=("local", "ray"), help="default: this process"
    )
    engine.add_argument(
        "--address", metavar="A", help="of a Ray cluster: auto, HOST:PORT (default: starts one)"
    )
    engine.add_argument(
        "--workers", type=shared.positive, metavar="N", help="default: as many as the cluster holds"
    )
    engine.add_argument(
        "--cpus", type=shared.positive, default=1, metavar="N", help="of each worker: threads (1)"
    )
    engine.add_argument(
        "--gpus",
        type=shared.fraction,
        metavar="G",
        help="of each worker, 0.5 puts two on one (default: 1 if there are any)",
    )


def live(verbs: Verbs) -> None:
    """`live`."""
    verb = shared.add_verb(
        verbs,
        "live",
        "artifactnet_jax.live:run",
        help="score a stream while it runs",
        description="Score a stream while it runs: every hop the last 4 s, and the running median. "
        "stderr shows it; stdout has rows with --format jsonl.",
        epilog="Exit codes: 0 the source ended, 1 it stalled or broke off, or windows failed, "
        "2 usage, 3 a backend or package is missing, 130 interrupted.",
    )
    add = verb.add_argument
    add(
        "source",
        nargs="?",
        metavar="FILE|-",
        help="a file, or - for WAV or raw samples on stdin: ffmpeg ... -f wav - | "
        "artifactnet-jax live -",
    )
    add("--device", metavar="NAME", help="an input: part of its name, its number, or default")
    add(
        "--hop",
        type=shared.seconds(0.25, 60),
        default=1.0,
        metavar="S",
        help="from one window to the next, 0.25 to 60 s, rounded to whole STFT frames (1)",
    )
    add(
        "--over",
        type=shared.seconds(1, 86_400),
        default=60.0,
        metavar="S",
        help="what the running median and its verdict are of (60)",
    )
    add("--realtime", action="store_true", help="play a file, or stdin, at its own pace")
    add(
        "--every-window",
        action="store_true",
        help="drop no window of stdin: let it wait (a file waits anyway, unless --realtime)",
    )
    add("--pcm", choices=("s16le", "f32le"), help="stdin is raw samples of this kind")
    shared.add_count(verb, "--rate", None, "of raw samples, or the device", "HZ")
    shared.add_count(verb, "--channels", None, "of the same, interleaved")
    add(
        "--timeout",
        type=shared.seconds(0, 86_400),
        default=30.0,
        metavar="S",
        help="end when nothing has come for so long (30; 0: never)",
    )
    shared.add(verb, *shared.AS_OF_SCORE)
    add("--format", default="text", choices=("text", "jsonl"))
    shared.add(verb, "--quiet", help="nothing on stderr but errors")
    shared.add(verb, "--debug")
    shared.add_banks(verb)


def report(verbs: Verbs) -> None:
    """`report`."""
    verb = shared.add_verb(
        verbs,
        "report",
        "artifactnet_jax.report:run",
        "report",
        help="write a page for each track: verdict, sound, spectrograms",
        description="Score tracks and write a page for each, to be read offline: verdict, score "
        "along the song with its sound, spectrograms of input and residual, figures, origin; an "
        "index of them; and the same as JSON. stdout has the path of the index.",
        epilog="Exit codes: 0 all written, 1 some inputs failed (rows of the index), 2 usage, "
        "3 a backend or package is missing, 130 interrupted.",
    )
    verb.add_argument("paths", nargs="+", metavar="TRACK", help="file, folder or @list.txt")
    verb.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write to")
    shared.add(verb, "--recursive", *shared.AS_OF_SCORE, "--segments", "--aggregate", "--jobs")
    shared.add(verb, "--quiet", help="nothing on stderr but errors")
    shared.add(verb, "--debug")
    shared.add_banks(verb)


def doctor(verbs: Verbs) -> None:
    """`doctor`."""
    verb = shared.add_verb(
        verbs,
        "doctor",
        "artifactnet_jax.doctor:run",
        help="show versions, devices and backends, and what to install",
    )
    verb.add_argument("--json", action="store_true", help="the same as one JSON object")
