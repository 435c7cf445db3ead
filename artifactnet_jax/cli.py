"""The command `artifactnet-jax`. Heavy imports happen inside the verbs, so that --help is instant.

stdout is data, stderr is progress. Exit codes: 0 all done, 1 some inputs failed or the run broke
off (as on a full disk), 2 usage, 3 backend not available, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable

from artifactnet_jax import __version__
from artifactnet_jax.files import writing
from artifactnet_jax.text import NO_BACKEND, SOME_FAILED, CommandError, brief, printable

BACKENDS = ("auto", "xla", "numpy", "onnxruntime", "onnxruntime-cuda", "tensorrt")


def _segments(text: str) -> int | str:
    return text if text in ("all", "first60") else _count(text, "'all', 'first60' or a count")


def _positive(text: str) -> int:
    return _count(text, "a whole number")


def _count(text: str, expected: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected} above 0")
    return count


def _batches(text: str) -> list[int]:
    return [_count(part, "whole numbers joined by commas, each") for part in text.split(",")]


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _threshold(text: str) -> float | str:
    """A number from 0 to 1; what is no number at all names an operating point of the weights."""
    try:
        float(text)
    except ValueError:
        if text.strip():
            return text
    return _fraction(text)


def _margin(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value


def _seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not seconds from {low:g} to {high:g}")
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    """The parser of every verb."""
    parser = argparse.ArgumentParser(
        prog="artifactnet-jax",
        description="Detect AI-generated music by the residue that neural codecs leave.",
    )
    parser.add_argument("--version", action="version", version=f"artifactnet-jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    score = verbs.add_parser(
        "score",
        help="score tracks",
        description="Score tracks: one row per input, AI or real, with each segment's score.",
        epilog="Exit codes: 0 all scored, 1 some inputs failed (each a row with its error), "
        "2 usage, 3 backend not available, 130 interrupted.",
    )
    score.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="file, folder, @list.txt (one path per line), or - for a WAV or FLAC stream on stdin",
    )
    score.add_argument("-r", "--recursive", action="store_true", help="descend into subfolders")
    score.add_argument(
        "--weights",
        metavar="W",
        help="weights file, ONNX model or engine (default: embedded weights)",
    )
    score.add_argument(
        "--backend",
        default="auto",
        choices=BACKENDS,
        help="auto takes the fastest of those installed for these weights, tensorrt for an engine; "
        "onnxruntime and tensorrt also score with a graph that export wrote, as it is",
    )
    score.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the convolutions, bfloat16 on xla and float16 on tensorrt; the front end is "
        "always float32",
    )
    score.add_argument(
        "--segments",
        type=_segments,
        metavar="all|first60|N",
        help="all 4 s segments, those of the first 60 s, or N evenly spaced ones (default: what "
        "the weights say, else all)",
    )
    score.add_argument(
        "--aggregate",
        choices=("median", "rms", "mean"),
        help="from segments to a song (default: what the weights say, else median)",
    )
    score.add_argument(
        "--threshold",
        type=_threshold,
        metavar="T",
        help="AI at or above: a number from 0 to 1, or the name of an operating point of the "
        "weights, such as fpr1 (default: the weights')",
    )
    score.add_argument(
        "--margin",
        type=_margin,
        metavar="M",
        help="call tracks undecided whose score is within M of the threshold, in log-odds; 1.1 is "
        "a factor of three in the odds (default: the weights', else 0)",
    )
    score.add_argument(
        "--until-decided",
        action="store_true",
        help="leave out the segments that cannot change a track's verdict any more, at most half "
        "of them; its score is then the median of the others",
    )
    score.add_argument("--batch-size", type=_positive, metavar="B", help="segments per call")
    score.add_argument("--jobs", type=_positive, metavar="N", help="decoding threads")
    score.add_argument("--format", default="table", choices=("table", "jsonl", "json", "csv"))
    score.add_argument(
        "-o", "--output", metavar="FILE", help="write rows here, not to stdout (- is stdout)"
    )
    score.add_argument(
        "--resume",
        action="store_true",
        help="with --format jsonl -o FILE: keep its whole rows, score what is missing or failed",
    )
    score.add_argument("--fail-fast", action="store_true", help="stop at the first failed input")
    score.add_argument(
        "-q", "--quiet", action="store_true", help="nothing on stderr unless the command fails"
    )
    score.add_argument("--debug", action="store_true", help="show tracebacks on stderr")
    _score_engine(score)

    convert = verbs.add_parser(
        "convert",
        help="turn an ONNX model into a weights file",
        description="Recognise an ONNX model of audio to score, print what was found, and write it "
        "as weights: native where every part is recognised, else as the graph itself.",
        epilog="Exit codes: 0 written, 2 the model cannot be used, 3 a package is missing.",
    )
    convert.add_argument("model", metavar="MODEL.onnx", help="external data beside it is read too")
    convert.add_argument(
        "-o", "--output", metavar="W.safetensors", help="default: MODEL.safetensors, here"
    )
    convert.add_argument(
        "--route",
        default="auto",
        choices=("auto", "native"),
        help="native: fail rather than fall back to running the graph",
    )
    convert.add_argument(
        "--score-output", metavar="NAME", help="which output is the score, where several could be"
    )
    convert.add_argument(
        "--licence", metavar="TEXT", help="the model's licence, where its metadata do not state it"
    )
    convert.add_argument("--debug", action="store_true", help="show tracebacks on stderr")

    export = verbs.add_parser(
        "export",
        help="write weights as an ONNX model",
        description="Write weights as an ONNX model: our own lean graph, or with --template the "
        "original file with its weights replaced.",
        epilog="Exit codes: 0 written, 1 written but tracks of --calibrate failed, 2 usage, 3 a "
        "package is missing.",
    )
    export.add_argument("weights", metavar="W", help="weights file, or an ONNX model")
    export.add_argument("-o", "--output", metavar="M.onnx", required=True)
    export.add_argument(
        "--form",
        choices=("segment", "song"),
        help="a score for each segment, or one for all (default: as the source)",
    )
    export.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        help="of the convolutions (default: fp32); the front end is always float32. int8 is for "
        "onnxruntime on a CPU and needs --calibrate",
    )
    export.add_argument(
        "--calibrate",
        nargs="+",
        metavar="PATH",
        help="tracks, folders or @list.txt for int8: half of the tracks give its ranges, the "
        "others are scored by both, and stdout says what flips",
    )
    export.add_argument(
        "--template",
        metavar="ORIGINAL.onnx",
        help="the model that the weights came from: only its initialisers change",
    )
    export.add_argument("--debug", action="store_true", help="show tracebacks on stderr")

    verify = verbs.add_parser(
        "verify",
        help="compare an ONNX model in onnxruntime with every backend here",
        description="Run an ONNX model in onnxruntime and what it converts to in every backend, "
        "and compare them stage by stage and track by track.",
        epilog="Exit codes: 0 equal, 1 beyond the tolerance or tracks that cannot be read, "
        "2 usage, 3 onnxruntime or a backend not available, 130 interrupted.",
    )
    verify.add_argument("model", metavar="MODEL.onnx", help="the original")
    verify.add_argument(
        "weights", nargs="?", metavar="W", help="weights to compare (default: MODEL converted)"
    )
    verify.add_argument(
        "--audio",
        nargs="+",
        metavar="PATH",
        help="tracks, folders or @list.txt (default: eight synthetic segments)",
    )
    verify.add_argument(
        "--backends",
        metavar="LIST",
        help="of numpy,xla,xla-bfloat16,onnxruntime,onnx,onnx-fp16 (default: all that run here; "
        "onnx is the exported graph stage by stage; half precision is reported beside)",
    )
    verify.add_argument(
        "--tolerance",
        type=_fraction,
        default=1e-4,
        metavar="D",
        help="on the difference of a track's score (default: 1e-4)",
    )
    verify.add_argument("--json", action="store_true", help="the report as one JSON object")
    verify.add_argument("--debug", action="store_true", help="show tracebacks on stderr")

    _build_verb(verbs)
    _live_verb(verbs)
    _report_verb(verbs)
    _training_verbs(verbs)

    bench = verbs.add_parser("bench", help="measure detectors: accuracy, throughput")
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND")
    _bench_accuracy(kinds)
    _bench_throughput(kinds)

    doctor = verbs.add_parser(
        "doctor", help="show versions, devices and backends, and what to install"
    )
    doctor.add_argument("--json", action="store_true", help="the same as one JSON object")
    _serve(verbs)
    return parser


def _score_engine(score: argparse.ArgumentParser) -> None:
    """Options of `score` for catalogues."""
    engine = score.add_argument_group(
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
        "--workers", type=_positive, metavar="N", help="default: as many as the cluster holds"
    )
    engine.add_argument(
        "--cpus", type=_positive, default=1, metavar="N", help="of each worker: threads (1)"
    )
    engine.add_argument(
        "--gpus",
        type=_fraction,
        metavar="G",
        help="of each worker, 0.5 puts two on one (default: 1 if there are any)",
    )


def _bench_accuracy(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    accuracy = kinds.add_parser(
        "accuracy",
        help="how well detectors tell AI from real, on the tracks of a manifest",
        description="Score the tracks of a manifest with one or more detectors, and report: "
        "accuracy with intervals, by generator and source, sanity checks, stress, mechanism.",
        epilog="Exit codes: 0 all scored, 1 some tracks failed (each a row with its error), "
        "2 usage, 3 a package is missing, 130 interrupted.",
    )
    accuracy.add_argument(
        "--manifest",
        nargs="+",
        required=True,
        metavar="M",
        help="csv, json or parquet; a folder of parquet shards; the public runner's manifests",
    )
    accuracy.add_argument(
        "--audio",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="where to look for audio: by SHA-256, or by name where the manifest has none",
    )
    accuracy.add_argument(
        "--detector",
        action="append",
        default=[],
        metavar="[NAME=]SPEC",
        help="artifactnet[:W], onnx:FILE, fakeprint[:FILE], separation[:TEACHER], "
        "spectttra:FOLDER, clam:FOLDER, tiered:FAST+SECOND[@LOW-HIGH], module:Class, or a command "
        "that takes a WAV file and prints a score; repeat (default: artifactnet)",
    )
    accuracy.add_argument("--out", required=True, metavar="DIR")
    accuracy.add_argument(
        "--resume", action="store_true", help="go on with the run in DIR; what failed, again"
    )
    accuracy.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="PART",
        help="score this part; repeat (default: test and calibration, or all but train)",
    )
    accuracy.add_argument("--origin", choices=("test", "train"), help="only this bench_origin")
    accuracy.add_argument(
        "--each", type=_positive, default=0, metavar="N", help="tracks of a source at most"
    )
    accuracy.add_argument(
        "--threshold",
        type=_threshold,
        default=0.5,
        metavar="T",
        help="a number, or fpr5 or fpr1: chosen for each detector on the part calibration (0.5)",
    )
    accuracy.add_argument(
        "--stress",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,...",
        help="all, codecs, bandwidth, resampling, loudness, clipping, speed, stretch, pitch, "
        "noise, position, laundering, or single changes",
    )
    accuracy.add_argument(
        "--mechanism",
        action="store_true",
        help="look into artifactnet: residuals by source, and what each channel is worth",
    )
    accuracy.add_argument(
        "--subsets",
        metavar="paper|NAME,...",
        help="of the sanity protocol (default: every source of the manifest)",
    )
    accuracy.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="results of the public runner, as one more detector; repeat",
    )
    accuracy.add_argument(
        "--baseline",
        metavar="per_source.json",
        help="of an earlier run: name the sources that got worse (FPR by 0.03, TPR by 0.05)",
    )
    accuracy.add_argument(
        "--teacher",
        metavar="builtin|demucs[:MODEL]|FILE.onnx",
        help="separator of laundering and mechanism (default: demucs where installed)",
    )
    accuracy.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    accuracy.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    accuracy.add_argument("--debug", action="store_true", help="show tracebacks on stderr")


def _build_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    build = verbs.add_parser(
        "build",
        help="make a TensorRT engine",
        description="Make a TensorRT engine of weights, or of an ONNX file that `export` wrote (no "
        "onnx package is needed then). stdout has its path. In the cache it is what "
        "`score --backend tensorrt` finds for the same weights.",
        epilog="Exit codes: 0 built, or there already, 2 usage, 3 TensorRT, driver or GPU missing.",
    )
    build.add_argument(
        "weights", nargs="?", metavar="W", help="weights file, or ONNX model (default: embedded)"
    )
    build.add_argument(
        "-o",
        "--output",
        metavar="ENGINE|FOLDER",
        help="FILE.engine for score --weights, or a folder (default: the cache)",
    )
    build.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        help="of the convolutions (default: the ONNX file's, else fp32); the front end is float32",
    )
    build.add_argument(
        "--target",
        choices=("local", "rtx"),
        help="local: TensorRT, for this GPU; rtx: TensorRT for RTX, for GeForce RTX 30 to 50 and "
        "the like, without any GPU here (default: what is installed, local first)",
    )
    build.add_argument(
        "--workspace", type=_positive, metavar="MB", help="memory that kernels may be tried with"
    )
    build.add_argument(
        "--batches",
        type=_batches,
        metavar="N,N,...",
        help="segments per call, a profile for each (default: 8)",
    )
    build.add_argument(
        "--version-compatible",
        action="store_true",
        help="runs in later versions of the same major one too, a little slower",
    )
    build.add_argument(
        "--refittable", action="store_true", help="can take other weights later, see --refit"
    )
    build.add_argument(
        "--refit",
        metavar="ENGINE",
        help="put the weights into this engine, built with --refittable, in seconds",
    )
    build.add_argument("--debug", action="store_true", help="show tracebacks on stderr")


def _as_of_score(verb: argparse.ArgumentParser) -> None:
    """What every verb that scores takes as `score` does."""
    verb.add_argument("--weights", metavar="W", help="as of score (default: embedded weights)")
    verb.add_argument("--backend", default="auto", choices=BACKENDS, help="as of score")
    verb.add_argument("--threshold", type=_threshold, metavar="T", help="as of score")
    verb.add_argument("--margin", type=_margin, metavar="M", help="as of score")


def _live_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    live = verbs.add_parser(
        "live",
        help="score a stream while it runs",
        description="Score a stream while it runs: every hop the last 4 s, and the running median. "
        "stderr shows it; stdout has rows with --format jsonl.",
        epilog="Exit codes: 0 the source ended, 1 it stalled or broke off, or windows failed, "
        "2 usage, 3 a backend or package is missing, 130 interrupted.",
    )
    live.add_argument(
        "source",
        nargs="?",
        metavar="FILE|-",
        help="a file, or - for WAV or raw samples on stdin: ffmpeg ... -f wav - | "
        "artifactnet-jax live -",
    )
    live.add_argument(
        "--device", metavar="NAME", help="an input: part of its name, its number, or default"
    )
    live.add_argument(
        "--hop",
        type=_seconds(0.25, 60),
        default=1.0,
        metavar="S",
        help="from one window to the next, 0.25 to 60 s, rounded to whole STFT frames (1)",
    )
    live.add_argument(
        "--over",
        type=_seconds(1, 86_400),
        default=60.0,
        metavar="S",
        help="what the running median and its verdict are of (60)",
    )
    live.add_argument(
        "--realtime", action="store_true", help="play a file, or stdin, at its own pace"
    )
    live.add_argument(
        "--every-window",
        action="store_true",
        help="drop no window of stdin: let it wait (a file waits anyway, unless --realtime)",
    )
    live.add_argument("--pcm", choices=("s16le", "f32le"), help="stdin is raw samples of this kind")
    live.add_argument("--rate", type=_positive, metavar="HZ", help="of raw samples, or the device")
    live.add_argument("--channels", type=_positive, metavar="N", help="of the same, interleaved")
    live.add_argument(
        "--timeout",
        type=_seconds(0, 86_400),
        default=30.0,
        metavar="S",
        help="end when nothing has come for so long (30; 0: never)",
    )
    _as_of_score(live)
    live.add_argument("--format", default="text", choices=("text", "jsonl"))
    live.add_argument("-q", "--quiet", action="store_true", help="nothing on stderr but errors")
    live.add_argument("--debug", action="store_true", help="show tracebacks on stderr")


def _report_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = verbs.add_parser(
        "report",
        help="write a page for each track: verdict, sound, spectrograms",
        description="Score tracks and write a page for each, to be read offline: verdict, score "
        "along the song with its sound, spectrograms of input and residual, figures, origin; an "
        "index of them; and the same as JSON. stdout has the path of the index.",
        epilog="Exit codes: 0 all written, 1 some inputs failed (rows of the index), 2 usage, "
        "3 a backend or package is missing, 130 interrupted.",
    )
    report.add_argument("paths", nargs="+", metavar="TRACK", help="file, folder or @list.txt")
    report.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write to")
    report.add_argument("-r", "--recursive", action="store_true", help="descend into subfolders")
    _as_of_score(report)
    report.add_argument("--segments", type=_segments, metavar="all|first60|N", help="as of score")
    report.add_argument("--aggregate", choices=("median", "rms", "mean"), help="as of score")
    report.add_argument("--jobs", type=_positive, metavar="N", help="decoding threads")
    report.add_argument("-q", "--quiet", action="store_true", help="nothing on stderr but errors")
    report.add_argument("--debug", action="store_true", help="show tracebacks on stderr")


def _training_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The verbs of `artifactnet_jax.train`."""
    codes = "Exit codes: 0 done, 1 some rows failed or the run broke off, 2 usage, "
    codes += "3 a package is missing, 130 interrupted."
    manifest = "csv or parquet: path, label; kind, source, model, group, split where known"

    split = verbs.add_parser(
        "split",
        help="divide a manifest into train, validation and test, by source",
        description="Write a manifest again with its column `split`: whole sources (and with them "
        "whole groups) go to one part, never single clips.",
        epilog=codes,
    )
    split.add_argument("manifest", metavar="MANIFEST", help=manifest)
    split.add_argument("-o", "--output", metavar="FILE", required=True, help="csv or parquet")
    split.add_argument(
        "--by",
        default="source",
        choices=("source", "model", "group"),
        help="what stays together; rows of one group always do (default: source)",
    )
    split.add_argument(
        "--parts",
        default="train=0.7,validation=0.15,test=0.15",
        metavar="NAME=SHARE,...",
        help="names and shares, by tracks and for each label (default: %(default)s)",
    )
    split.add_argument(
        "--put",
        action="append",
        default=[],
        metavar="VALUE=PART",
        help="put this source (or model, or group) there; * at its end matches any ending; repeat",
    )
    split.add_argument("--seed", type=int, default=0)

    train = verbs.add_parser(
        "train",
        help="train the detector: one phase",
        description="Train one phase. A run folder that holds the same run goes on where it was "
        "stopped or killed, to the same weights.",
        epilog=codes,
    )
    train.add_argument(
        "phase",
        choices=("distill", "cnn", "steer", "codec", "head", "encoder", "joint"),
        help="distill: UNet from a teacher's residuals; cnn: the classifier; steer: UNet through "
        "the frozen classifier; codec: both, every track in four codecs; head: the classifier on "
        "hard negatives, its statistics frozen; encoder, joint: the UNet's encoder under a "
        "throw-away classifier, then all at once",
    )
    train.add_argument("--data", nargs="+", metavar="MANIFEST", help=f"{manifest}; one or more")
    train.add_argument("--init", metavar="W", help="weights to start from (default: random)")
    train.add_argument("--preset", choices=("edge", "v94"), help="without --init (default: edge)")
    train.add_argument("--out", metavar="RUN_DIR")
    train.add_argument("--config", metavar="FILE", help="settings as TOML or JSON")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; repeat"
    )
    train.add_argument("--list", action="store_true", help="print the phase's settings and stop")

    mine = verbs.add_parser(
        "mine",
        help="rank tracks by how wrong their scores are",
        description="Score tracks of known label and write them as a manifest, the most wrong "
        "first: hard negatives (real music called AI) and missed AI tracks.",
        epilog=codes,
    )
    mine.add_argument(
        "paths", nargs="+", metavar="PATH", help="manifest, or audio files and folders"
    )
    mine.add_argument("-r", "--recursive", action="store_true", help="descend into subfolders")
    mine.add_argument(
        "--label", choices=("real", "ai"), help="of files and folders (default: real)"
    )
    mine.add_argument(
        "--threshold", type=_threshold, metavar="T", help="as of score (default: the weights')"
    )
    mine.add_argument("--top", type=_positive, metavar="N", help="write the N most wrong only")
    mine.add_argument(
        "--wrong-only", action="store_true", help="write only what is on the wrong side"
    )
    mine.add_argument("-o", "--output", metavar="FILE", required=True, help="csv or parquet")

    finetune = verbs.add_parser(
        "finetune",
        help="adapt weights to hard negatives",
        description="Mine hard negatives, tune the classifier on them, check on the keep-set that "
        "nothing else got worse, and write weights and a before/after report.",
        epilog=codes,
    )
    finetune.add_argument(
        "--hard-negatives", required=True, metavar="FOLDER|MANIFEST", help="real music called AI"
    )
    finetune.add_argument(
        "--keep", metavar="MANIFEST", help="both labels: what must not get worse, and is rehearsed"
    )
    finetune.add_argument("--out", required=True, metavar="W2", help="weights file to write")
    finetune.add_argument(
        "--phase", default="head", choices=("head", "cnn", "steer", "codec"), help="default: head"
    )
    finetune.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the phase"
    )
    finetune.add_argument(
        "--accept-worse", action="store_true", help="write W2 even if a source got worse"
    )
    for verb in (mine, finetune):
        verb.add_argument("--weights", metavar="W", help="default: the embedded weights")
        verb.add_argument("--backend", default="auto", choices=BACKENDS)
        verb.add_argument("--jobs", type=_positive, metavar="N", help="decoding threads")

    residuals = verbs.add_parser(
        "residuals",
        help="compute a teacher's residuals, for phase distill",
        description="Separate every track of a manifest with a teacher, and store what no stem "
        "explains. Goes on where it was stopped.",
        epilog=codes,
    )
    residuals.add_argument("--data", required=True, metavar="MANIFEST", help=manifest)
    residuals.add_argument("--out", required=True, metavar="DIR")
    residuals.add_argument(
        "--teacher",
        default="builtin",
        metavar="builtin|demucs[:MODEL]|FILE.onnx",
        help="built in: no download; demucs: that package; an HTDemucs ONNX file in onnxruntime",
    )
    residuals.add_argument(
        "--teacher-weights", metavar="FOLDER", help="local weights for the demucs package"
    )

    rvq = verbs.add_parser(
        "rvq",
        help="make AI-like positives from real music",
        description="Train small RVQ autoencoders on the real tracks of a manifest, and re-"
        "synthesise each of them: the same music, with a neural codec's traces.",
        epilog=codes,
    )
    rvq.add_argument("--data", required=True, metavar="MANIFEST", help=manifest)
    rvq.add_argument("--out", required=True, metavar="DIR")
    rvq.add_argument("--models", type=_positive, default=4, metavar="N", help="default: 4")
    rvq.add_argument("--steps", type=_positive, default=1500, metavar="N", help="of each model")
    rvq.add_argument(
        "--per-track", type=_positive, default=1, metavar="N", help="models applied to a track"
    )
    rvq.add_argument("--seed", type=int, default=0)
    texture = verbs.add_parser(
        "texture",
        help="fit the texture head, calibrate, and write weights",
        description="Fit the texture head of weights to the tracks of a manifest, calibrate what "
        "it and the network say together, and report on groups that were left out.",
        epilog=codes,
    )
    texture.add_argument("--data", required=True, nargs="+", metavar="MANIFEST", help=manifest)
    texture.add_argument(
        "--also",
        nargs="+",
        metavar="MANIFEST",
        help="more tracks to fit to, such as those of rvq; neither judged nor calibrated with",
    )
    texture.add_argument("--init", metavar="W", help="weights with the network (default: ours)")
    texture.add_argument("-o", "--output", required=True, metavar="FILE")
    texture.add_argument("--name", help="of the weights (default: the file's)")
    texture.add_argument(
        "--segments", type=_positive, default=3, metavar="N", help="of a track at most (3)"
    )
    texture.add_argument(
        "--draws",
        type=_positive,
        default=3,
        metavar="N",
        help="changed versions of a single segment; of several half as many each (3)",
    )
    texture.add_argument(
        "--steps", type=_positive, default=2500, metavar="N", help="of a fit (2500)"
    )
    texture.add_argument(
        "--least-segments",
        type=_positive,
        metavar="N",
        help="that a shorter track is judged by, overlapping where need be (default: as in --init)",
    )
    texture.add_argument(
        "--folds", type=_positive, default=6, metavar="N", help="parts that are left out in turn"
    )
    texture.add_argument(
        "--point",
        choices=("fpr1", "fpr2", "fpr5", "balanced"),
        default="fpr5",
        help="operating point whose threshold becomes the default (fpr5)",
    )
    texture.add_argument("--half", action="store_true", help="store in float16")
    texture.add_argument(
        "--limits",
        metavar="FILE",
        help="where the weights fail, a sentence a line: stored with them, shown by report",
    )
    texture.add_argument("--seed", type=int, default=0)
    for verb in (train, mine, finetune, residuals, rvq, texture):
        verb.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    for verb in (train, finetune, residuals, rvq, texture):
        verb.add_argument(
            "--cache", metavar="DIR", help="decoded audio (default: in the user's cache folder)"
        )
    for verb in (split, train, mine, finetune, residuals, rvq, texture):
        verb.add_argument("--debug", action="store_true", help="show tracebacks on stderr")


def _serve(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`serve` and `token`."""
    serve = verbs.add_parser(
        "serve",
        help="a batch service over HTTP, with a page",
        description="Score what clients upload: an HTTP API with batches, and a page. Runs until "
        "SIGTERM or Ctrl-C.",
        epilog="Exit codes: 0 stopped, 2 usage, 3 backend or package not available, "
        "130 interrupted.",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    serve.add_argument("--batch-size", type=_positive, metavar="B", help="segments per call")
    _as_of_score(serve)
    serve.add_argument("--segments", type=_segments, metavar="all|first60|N", help="as of score")
    serve.add_argument("--jobs", type=_positive, metavar="N", help="decoders at a time")
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
        help_text = f"{text} (default: {default})"
        serve.add_argument(option, type=_positive, default=default, metavar="N", help=help_text)

    token = verbs.add_parser(
        "token",
        help="bearer tokens of the service",
        description="Make, list or revoke the tokens that the service asks for.",
        epilog="Exit codes: 0 done, 2 usage, 3 a package is missing.",
    )
    actions = token.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make one and print it, this one time")
    create.add_argument("--name", default="", help="to know it by in the list")
    create.add_argument("--days", type=_positive, metavar="N", help="valid for (default: for ever)")
    listing = actions.add_parser("list", help="their ids, names and dates as JSON Lines")
    revoke = actions.add_parser("revoke", help="refuse one from now on")
    revoke.add_argument("id", help="as token list shows it")
    for verb in (serve, create, listing, revoke):
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
        verb.add_argument("--debug", action="store_true", help="show tracebacks on stderr")


def _bench_throughput(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`bench throughput`."""
    kind = kinds.add_parser(
        "throughput",
        help="speed, memory and agreement of the backends, from file to verdict",
        description="Time every backend from file to verdict, in turns; where the time goes, what "
        "a cold start costs, how scores differ, what the machine could do. JSON on stdout.",
        epilog="Exit codes: 0 all measured, 1 some tracks failed (each a row with its error), "
        "2 usage, 3 a backend or package is missing, 130 interrupted.",
    )
    kind.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="tracks, folders or @list.txt (default: four generated ones of 30 s)",
    )
    model = kind.add_mutually_exclusive_group()
    model.add_argument("--weights", metavar="W", help="as of score (default: embedded weights)")
    model.add_argument(
        "--preset", choices=("edge", "v94"), help="random weights of this size instead"
    )
    kind.add_argument(
        "--backends", metavar="LIST", help="such as numpy,xla-bfloat16 (default: all that run here)"
    )
    kind.add_argument(
        "--batch", type=_batches, metavar="B,...", help="segments per call; several are compared"
    )
    kind.add_argument("--segments", type=_segments, metavar="all|first60|N", help="as of score")
    kind.add_argument(
        "--scenario",
        default="offline",
        choices=("offline", "single", "scaling"),
        help="all tracks at once; one after the other, for latency; or time and memory over the "
        "length and number of tracks (default: offline)",
    )
    kind.add_argument(
        "--onnx", metavar="MODEL.onnx", help="also time this model in onnxruntime, as the peer"
    )
    kind.add_argument(
        "--torch", action="store_true", help="also the same network in PyTorch (size v94 only)"
    )
    kind.add_argument("--rounds", type=_positive, default=5, metavar="N", help="default: 5")
    kind.add_argument(
        "--long",
        action="store_true",
        help="scaling up to 10 hours and 10,000 files: takes hours, and 2 GB of disk",
    )
    kind.add_argument("-o", "--out", metavar="FILE.json", help="write the JSON here")
    kind.add_argument(
        "--from", dest="read", metavar="FILE.json", help="measure nothing: read an earlier --out"
    )
    kind.add_argument("--table", action="store_true", help="Markdown on stdout instead of JSON")
    kind.add_argument("--plots", metavar="DIR", help="write plots (SVG) into this folder")
    kind.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    kind.add_argument("--debug", action="store_true", help="show tracebacks on stderr")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    # Closed by the caller. Without a stderr print() would write to stdout, among the data.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a C locale must not stop a name from printing
        sys.stdout.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        if args.verb == "doctor":
            from artifactnet_jax.doctor import run
        elif args.verb == "verify":
            from artifactnet_jax.convert.verify import run
        elif args.verb == "convert":
            from artifactnet_jax.convert.command import convert as run
        elif args.verb == "export":
            from artifactnet_jax.convert.command import export as run
        elif args.verb == "score" and args.engine == "ray":
            from artifactnet_jax.ray_engine import run
        elif args.verb == "score":
            from artifactnet_jax.score import run
        elif args.verb == "live":
            from artifactnet_jax.live import run
        elif args.verb == "report":
            from artifactnet_jax.report import run
        elif args.verb == "bench":
            run = _benchmark(args.kind)  # type: ignore[assignment]
        elif args.verb in ("serve", "token"):
            run = _service(args.verb)  # type: ignore[assignment]
        elif args.verb == "build":
            from artifactnet_jax.build import run
        else:
            run = _training(args.verb)  # type: ignore[assignment]
        code = run(args)
        with writing("stdout"):
            sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as error:
        return _failed(error, getattr(args, "debug", False))


def _training(verb: str) -> Callable[[argparse.Namespace], int]:
    """The function behind a verb of `artifactnet_jax.train`; CommandError without its packages."""
    modules = {"split": "train.split", "train": "train.run"}
    try:
        module = importlib.import_module(f"artifactnet_jax.{modules.get(verb, f'train.{verb}')}")
    except ModuleNotFoundError as error:
        cause = f"{verb} needs a package that is missing ({error.name})"
        raise CommandError(f'{cause}: pip install "artifactnet-jax[train]"', NO_BACKEND) from error
    return module.run


def _service(verb: str) -> Callable[[argparse.Namespace], int]:
    """The function behind `serve` or `token`; CommandError without its packages."""
    try:
        module = importlib.import_module("artifactnet_jax.serve.command")
        for name in ("artifactnet_jax.serve.app", "uvicorn") if verb == "serve" else ():
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        cause = f"{verb} needs a package that is missing ({error.name})"
        raise CommandError(f'{cause}: pip install "artifactnet-jax[serve]"', NO_BACKEND) from error
    return module.run if verb == "serve" else module.token


def _benchmark(kind: str) -> Callable[[argparse.Namespace], int]:
    """The function behind a kind of benchmark; CommandError without its packages."""
    try:
        return importlib.import_module(f"artifactnet_jax.bench.{kind}").run
    except ModuleNotFoundError as error:
        cause = f"bench {kind} needs a package that is missing ({error.name})"
        raise CommandError(f'{cause}: pip install "artifactnet-jax[bench]"', NO_BACKEND) from error


def _failed(error: BaseException, debug: bool) -> int:
    """Say in one line what ended the command; returns the exit code."""
    try:
        with writing("stdout"):
            sys.stdout.flush()
    except (BrokenPipeError, CommandError) as full:
        if not isinstance(error, (CommandError, BrokenPipeError)):  # a print that did not fit
            error = full
        # Python would try again at exit, and print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # the reader of stdout has gone: nothing to tell
        return SOME_FAILED
    if debug:
        traceback.print_exception(error)
    if isinstance(error, CommandError):
        text, code = str(error), error.code
    elif isinstance(error, KeyboardInterrupt):
        text, code = "interrupted", 128 + signal.SIGINT
    else:
        text, code = f"{brief(error)}; --debug shows where", SOME_FAILED
    print(f"artifactnet-jax: {printable(text)}", file=sys.stderr)
    return code
