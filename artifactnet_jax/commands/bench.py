"""Arguments of the benchmarks: `bench accuracy`, `bench throughput`, `bench gpu`."""

from __future__ import annotations

from artifactnet_jax.commands import arguments as shared
from artifactnet_jax.commands.arguments import Parser, Verbs

CARDS = (  # of assets/cards.json, which --help need not read
    *("rtx3090", "rtx4090", "rtx5090", "l4", "a100", "h100", "h200"),
    *("orin-nano", "orin-nx", "orin-agx", "thor"),
)


def bench(verbs: Verbs) -> None:
    """`bench`, with its kinds."""
    verb = verbs.add_parser("bench", help="measure detectors: accuracy, throughput, GPUs")
    kinds = verb.add_subparsers(dest="kind", required=True, metavar="KIND")
    _accuracy(kinds)
    _throughput(kinds)
    _gpu(kinds)


def _accuracy(kinds: Verbs) -> None:
    verb = shared.add_verb(
        kinds,
        "accuracy",
        "artifactnet_jax.bench.accuracy:run",
        "bench",
        help="how well detectors tell AI from real, on the tracks of a manifest",
        description="Score the tracks of a manifest with one or more detectors, and report: "
        "accuracy with intervals, by generator and source, sanity checks, stress, mechanism.",
        epilog="Exit codes: 0 all scored, 1 some tracks failed (each a row with its error), "
        "2 usage, 3 a package is missing, 130 interrupted.",
    )
    add = verb.add_argument
    add(
        "--manifest",
        nargs="+",
        required=True,
        metavar="M",
        help="csv, json or parquet; a folder of parquet shards; the public runner's manifests",
    )
    add(
        "--audio",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="where to look for audio: by SHA-256, or by name where the manifest has none",
    )
    shared.add_repeated(
        verb,
        "--detector",
        "[NAME=]SPEC",
        "artifactnet[:W], fingerprint[:BANK], onnx:FILE, fakeprint[:FILE], separation[:TEACHER], "
        "spectttra:FOLDER, clam:FOLDER, tiered:FAST+SECOND[@LOW-HIGH], module:Class, or a command "
        "that takes a WAV file and prints a score; repeat (default: artifactnet)",
    )
    add("--out", required=True, metavar="DIR")
    _accuracy_tracks(verb)
    _accuracy_views(verb)
    shared.add(verb, "--quiet", "--debug")


def _accuracy_tracks(verb: Parser) -> None:
    add = verb.add_argument
    add("--resume", action="store_true", help="go on with the run in DIR; what failed, again")
    shared.add_repeated(
        verb,
        "--split",
        "PART",
        "score this part; repeat (default: test and calibration, or all but train)",
    )
    add("--origin", choices=("test", "train"), help="only this bench_origin")
    shared.add_count(verb, "--each", 0, "tracks of a source at most")
    add(
        "--threshold",
        type=shared.threshold,
        metavar="T",
        help="a number, or fpr5 or fpr1: chosen for each detector on the part calibration "
        "(default: that of score for artifactnet, 0.5 for others)",
    )


def _accuracy_views(verb: Parser) -> None:
    add = verb.add_argument
    add(
        "--stress",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,...",
        help="all, codecs, bandwidth, resampling, loudness, clipping, speed, stretch, pitch, "
        "noise, rerecording, remover, position, laundering, or single changes",
    )
    add(
        "--mechanism",
        action="store_true",
        help="look into artifactnet: residuals by source, and what each channel is worth",
    )
    add(
        "--subsets",
        metavar="paper|NAME,...",
        help="of the sanity protocol (default: every source of the manifest)",
    )
    shared.add_repeated(
        verb,
        "--compare",
        "NAME=FOLDER",
        "results of the public runner, as one more detector; repeat",
    )
    add(
        "--baseline",
        metavar="per_source.json",
        help="of an earlier run: name the sources that got worse (FPR by 0.03, TPR by 0.05)",
    )
    add(
        "--teacher",
        metavar="builtin|demucs[:MODEL]|FILE.onnx",
        help="separator of laundering and mechanism (default: demucs where installed)",
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))


def _throughput(kinds: Verbs) -> None:
    verb = shared.add_verb(
        kinds,
        "throughput",
        "artifactnet_jax.bench.throughput:run",
        "bench",
        help="speed, memory and agreement of the backends, from file to verdict",
        description="Time every backend from file to verdict, in turns; where the time goes, what "
        "a cold start costs, how scores differ, what the machine could do. JSON on stdout.",
        epilog="Exit codes: 0 all measured, 1 some tracks failed (each a row with its error), "
        "2 usage, 3 a backend or package is missing, 130 interrupted.",
    )
    add = verb.add_argument
    add(
        "paths",
        nargs="*",
        metavar="PATH",
        help="tracks, folders or @list.txt (default: four generated ones of 30 s)",
    )
    model = verb.add_mutually_exclusive_group()
    model.add_argument("--weights", metavar="W", help="as of score (default: embedded weights)")
    model.add_argument(
        "--preset", choices=shared.PRESETS, help="random weights of this size instead"
    )
    add(
        "--backends", metavar="LIST", help="such as numpy,xla-bfloat16 (default: all that run here)"
    )
    add(
        "--batch",
        type=shared.batches,
        metavar="B,...",
        help="segments per call; several are compared",
    )
    shared.add(verb, "--segments")
    _throughput_runs(verb)
    add("-o", "--out", metavar="FILE.json", help="write the JSON here")
    add("--from", dest="read", metavar="FILE.json", help="measure nothing: read an earlier --out")
    add("--table", action="store_true", help="Markdown on stdout instead of JSON")
    add("--plots", metavar="DIR", help="write plots (SVG) into this folder")
    shared.add(verb, "--quiet", "--debug")


def _throughput_runs(verb: Parser) -> None:
    add = verb.add_argument
    add(
        "--scenario",
        default="offline",
        choices=("offline", "single", "scaling"),
        help="all tracks at once; one after the other, for latency; or time and memory over the "
        "length and number of tracks (default: offline)",
    )
    add("--onnx", metavar="MODEL.onnx", help="also time this model in onnxruntime, as the peer")
    add("--torch", action="store_true", help="also the same network in PyTorch (size v94 only)")
    shared.add_count(verb, "--rounds", 5, "default: 5")
    add(
        "--long",
        action="store_true",
        help="scaling up to 10 hours and 10,000 files: takes hours, and 2 GB of disk",
    )


def _gpu(kinds: Verbs) -> None:
    verb = shared.add_verb(
        kinds,
        "gpu",
        "artifactnet_jax.bench.gpu:run",
        "gpu_ahead",
        help="what the detector would cost on a named NVIDIA card, without one",
        description="Compile for named NVIDIA cards, without any here: kernels, memory, registers, "
        "and the time that a roofline predicts. Where a card of the same generation is here, what "
        "the program takes on it stands beside. JSON on stdout.",
        epilog="Exit codes: 0 all compiled, 2 usage, 3 jax's CUDA plugin is missing, or knows no "
        "such card, 130 interrupted.",
    )
    add = verb.add_argument
    add(
        "--card",
        type=shared.names(CARDS),
        required=True,
        metavar="CARD,...",
        help=f"of {', '.join(CARDS)}",
    )
    model = verb.add_mutually_exclusive_group()
    model.add_argument("--weights", metavar="W", help="as of score (default: embedded weights)")
    model.add_argument(
        "--preset", choices=shared.PRESETS, help="random weights of this size instead"
    )
    add(
        "--dtype",
        type=shared.names(("float32", "bfloat16")),
        default=["float32"],
        metavar="D,...",
        help="of the convolutions: float32, bfloat16 (default: float32)",
    )
    add(
        "--batch",
        type=shared.batches,
        default=[8],
        metavar="B,...",
        help="segments per call (default: 8)",
    )
    add("-o", "--out", metavar="FILE.json", help="write the JSON here")
    add("--table", action="store_true", help="Markdown on stdout instead of JSON")
    shared.add(verb, "--quiet", "--debug")
