"""Arguments of the verbs about files of weights: `convert`, `export`, `verify`, `build`."""

from __future__ import annotations

from artifactnet_jax.commands import arguments as shared
from artifactnet_jax.commands.arguments import Verbs


def convert(verbs: Verbs) -> None:
    """`convert`."""
    verb = shared.add_verb(
        verbs,
        "convert",
        "artifactnet_jax.convert.command:convert",
        help="turn an ONNX model into a weights file",
        description="Recognise an ONNX model of audio to score, print what was found, and write it "
        "as weights: native where every part is recognised, else as the graph itself.",
        epilog="Exit codes: 0 written, 2 the model cannot be used, 3 a package is missing.",
    )
    add = verb.add_argument
    add("model", metavar="MODEL.onnx", help="external data beside it is read too")
    add("-o", "--output", metavar="W.safetensors", help="default: MODEL.safetensors, here")
    add(
        "--route",
        default="auto",
        choices=("auto", "native"),
        help="native: fail rather than fall back to running the graph",
    )
    add(
        "--score-output",
        metavar="NAME[:COLUMN]",
        help="which output is the score, where several could be; COLUMN, from 0: which of its "
        "columns is AI's",
    )
    add(
        "--logit",
        action="store_true",
        help="the output is a logit: its sigmoid is the score, of columns their softmax",
    )
    add("--licence", metavar="TEXT", help="the model's licence, where its metadata do not state it")
    shared.add(verb, "--debug")


def export(verbs: Verbs) -> None:
    """`export`."""
    verb = shared.add_verb(
        verbs,
        "export",
        "artifactnet_jax.convert.command:export",
        help="write weights as an ONNX model",
        description="Write weights as an ONNX model: our own lean graph, or with --template the "
        "original file with its weights replaced.",
        epilog="Exit codes: 0 written, 1 written but tracks of --calibrate failed, 2 usage, 3 a "
        "package is missing.",
    )
    add = verb.add_argument
    add("weights", metavar="W", help="weights file, or an ONNX model")
    add("-o", "--output", metavar="M.onnx", required=True)
    add(
        "--form",
        choices=("segment", "song"),
        help="a score for each segment, or one for all (default: as the source)",
    )
    add(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        help="of the convolutions (default: fp32); the front end is always float32. int8 is for "
        "onnxruntime on a CPU and needs --calibrate",
    )
    add(
        "--calibrate",
        nargs="+",
        metavar="PATH",
        help="tracks, folders or @list.txt for int8: half of the tracks give its ranges, the "
        "others are scored by both, and stdout says what flips",
    )
    add(
        "--template",
        metavar="ORIGINAL.onnx",
        help="the model that the weights came from: only its initialisers change",
    )
    shared.add(verb, "--debug")


def verify(verbs: Verbs) -> None:
    """`verify`."""
    verb = shared.add_verb(
        verbs,
        "verify",
        "artifactnet_jax.convert.verify:run",
        help="compare an ONNX model in onnxruntime with every backend here",
        description="Run an ONNX model in onnxruntime and what it converts to in every backend, "
        "and compare them stage by stage and track by track.",
        epilog="Exit codes: 0 equal, 1 beyond the tolerance or tracks that cannot be read, "
        "2 usage, 3 onnxruntime or a backend not available, 130 interrupted.",
    )
    add = verb.add_argument
    add("model", metavar="MODEL.onnx", help="the original")
    add("weights", nargs="?", metavar="W", help="weights to compare (default: MODEL converted)")
    add(
        "--audio",
        nargs="+",
        metavar="PATH",
        help="tracks, folders or @list.txt (default: eight synthetic segments)",
    )
    add(
        "--backends",
        metavar="LIST",
        help="of numpy,xla,xla-bfloat16,onnxruntime,onnx,onnx-fp16 (default: all that run here; "
        "onnx is the exported graph stage by stage; half precision is reported beside)",
    )
    add(
        "--tolerance",
        type=shared.fraction,
        default=1e-4,
        metavar="D",
        help="on the difference of a track's score (default: 1e-4)",
    )
    add(
        "--exact",
        action="store_true",
        help="hold all, onnxruntime too, against the graph in float64, and say which is nearer; "
        "slow",
    )
    add("--json", action="store_true", help="the report as one JSON object")
    shared.add(verb, "--debug")


def build(verbs: Verbs) -> None:
    """`build`."""
    verb = shared.add_verb(
        verbs,
        "build",
        "artifactnet_jax.build:run",
        help="make a TensorRT engine",
        description="Make a TensorRT engine of weights, or of an ONNX file that `export` wrote (no "
        "onnx package is needed then). stdout has its path. In the cache it is what "
        "`score --backend tensorrt` finds for the same weights.",
        epilog="Exit codes: 0 built, or there already, 2 usage, 3 TensorRT, driver or GPU missing.",
    )
    add = verb.add_argument
    add("weights", nargs="?", metavar="W", help="weights file, or ONNX model (default: embedded)")
    add(
        "-o",
        "--output",
        metavar="ENGINE|FOLDER",
        help="FILE.engine for score --weights, or a folder (default: the cache)",
    )
    add(
        "--precision",
        choices=("fp32", "fp16"),
        help="of the convolutions (default: the ONNX file's, else fp32); the front end is float32",
    )
    add(
        "--target",
        choices=("local", "rtx"),
        help="local: TensorRT, for this GPU; rtx: TensorRT for RTX, for GeForce RTX 30 to 50 and "
        "the like, without any GPU here (default: what is installed, local first)",
    )
    shared.add_count(verb, "--workspace", None, "memory that kernels may be tried with", "MB")
    add(
        "--batches",
        type=shared.batches,
        metavar="N,N,...",
        help="segments per call, a profile for each (default: 8)",
    )
    add(
        "--version-compatible",
        action="store_true",
        help="runs in later versions of the same major one too, a little slower",
    )
    add("--refittable", action="store_true", help="can take other weights later, see --refit")
    add(
        "--refit",
        metavar="ENGINE",
        help="put the weights into this engine, built with --refittable, in seconds",
    )
    shared.add(verb, "--debug")
