"""Arguments of the verbs that train, and that prepare data for it."""

from __future__ import annotations

from artifactnet_jax.commands import arguments as shared
from artifactnet_jax.commands.arguments import Parser, Verbs

_CODES = (
    "Exit codes: 0 done, 1 some rows failed or the run broke off, 2 usage, "
    "3 a package is missing, 130 interrupted."
)
_MANIFEST = "csv or parquet: path, label; kind, source, model, group, split where known"


def _add_verb(verbs: Verbs, name: str, module: str, text: str, description: str) -> Parser:
    runs = f"{module}:run"
    texts = {"help": text, "description": description, "epilog": _CODES}
    return shared.add_verb(verbs, name, runs, "train", **texts)


def split(verbs: Verbs) -> None:
    """`split`."""
    verb = _add_verb(
        verbs,
        "split",
        "artifactnet_jax.train.split",
        "divide a manifest into train, validation and test, by source",
        "Write a manifest again with its column `split`: whole sources (and with them "
        "whole groups) go to one part, never single clips.",
    )
    add = verb.add_argument
    add("manifest", metavar="MANIFEST", help=_MANIFEST)
    add("-o", "--output", metavar="FILE", required=True, help="csv or parquet")
    add(
        "--by",
        default="source",
        choices=("source", "model", "group"),
        help="what stays together; rows of one group always do (default: source)",
    )
    add(
        "--parts",
        default="train=0.7,validation=0.15,test=0.15",
        metavar="NAME=SHARE,...",
        help="names and shares, by tracks and for each label (default: %(default)s)",
    )
    shared.add_repeated(
        verb,
        "--put",
        "VALUE=PART",
        "put this source (or model, or group) there; * at its end matches any ending; repeat",
    )
    add("--seed", type=int, default=0)
    shared.add(verb, "--debug")


def train(verbs: Verbs) -> None:
    """`train`."""
    verb = _add_verb(
        verbs,
        "train",
        "artifactnet_jax.train.run",
        "train the detector: one phase",
        "Train one phase. A run folder that holds the same run goes on where it was "
        "stopped or killed, to the same weights.",
    )
    add = verb.add_argument
    add(
        "phase",
        choices=("distill", "cnn", "steer", "codec", "head", "encoder", "joint"),
        help="distill: UNet from a teacher's residuals; cnn: the classifier; steer: UNet through "
        "the frozen classifier; codec: both, every track in four codecs; head: the classifier on "
        "hard negatives, its statistics frozen; encoder, joint: the UNet's encoder under a "
        "throw-away classifier, then all at once",
    )
    add("--data", nargs="+", metavar="MANIFEST", help=f"{_MANIFEST}; one or more")
    add("--init", metavar="W", help="weights to start from (default: random)")
    add("--preset", choices=shared.PRESETS, help="without --init (default: edge)")
    add("--out", metavar="RUN_DIR")
    add("--config", metavar="FILE", help="settings as TOML or JSON")
    shared.add_repeated(verb, "--set", "KEY=VALUE", "one setting; repeat")
    add("--list", action="store_true", help="print the phase's settings and stop")
    shared.add(verb, "--quiet", "--cache", "--debug")


def _add_detector(verb: Parser) -> None:
    shared.add(verb, "--weights", help="default: the embedded weights")
    shared.add(verb, "--backend", help=None)
    shared.add(verb, "--jobs")


def mine(verbs: Verbs) -> None:
    """`mine`."""
    verb = _add_verb(
        verbs,
        "mine",
        "artifactnet_jax.train.mine",
        "rank tracks by how wrong their scores are",
        "Score tracks of known label and write them as a manifest, the most wrong "
        "first: hard negatives (real music called AI) and missed AI tracks.",
    )
    add = verb.add_argument
    add("paths", nargs="+", metavar="PATH", help="manifest, or audio files and folders")
    shared.add(verb, "--recursive")
    add("--label", choices=("real", "ai"), help="of files and folders (default: real)")
    shared.add(verb, "--threshold", help="as of score (default: the weights')")
    shared.add_count(verb, "--top", None, "write the N most wrong only")
    add("--wrong-only", action="store_true", help="write only what is on the wrong side")
    add("-o", "--output", metavar="FILE", required=True, help="csv or parquet")
    _add_detector(verb)
    shared.add(verb, "--quiet", "--debug")


def finetune(verbs: Verbs) -> None:
    """`finetune`."""
    verb = _add_verb(
        verbs,
        "finetune",
        "artifactnet_jax.train.finetune",
        "adapt weights to hard negatives",
        "Move the layers that decide on hard negatives, keep the thresholds' promises on the "
        "keep-set, check on a part of it that nothing else got worse, and write weights and a "
        "before/after report. What is read of a recording is kept in the cache.",
    )
    add = verb.add_argument
    add("--hard-negatives", required=True, metavar="FOLDER|MANIFEST", help="real music called AI")
    add("--keep", metavar="MANIFEST", help="both labels: what must not get worse, and is rehearsed")
    add("--out", required=True, metavar="W2", help="weights file to write")
    add(
        "--deep",
        nargs="?",
        const="head",
        choices=("head", "cnn", "steer", "codec"),
        metavar="PHASE",
        help="train the whole CNN instead of the last layers, or what that phase of train moves: "
        "head (default), cnn, steer, codec; many times as slow",
    )
    shared.add_repeated(verb, "--set", "KEY=VALUE", "a setting of that phase")
    add("--accept-worse", action="store_true", help="write W2 even if a source got worse")
    shared.add(verb, "--weights", help="default: the embedded weights")
    shared.add(verb, "--jobs")
    shared.add(verb, "--quiet", "--cache", "--debug")


def residuals(verbs: Verbs) -> None:
    """`residuals`."""
    verb = _add_verb(
        verbs,
        "residuals",
        "artifactnet_jax.train.residuals",
        "compute a teacher's residuals, for phase distill",
        "Separate every track of a manifest with a teacher, and store what no stem "
        "explains. Goes on where it was stopped.",
    )
    add = verb.add_argument
    add("--data", required=True, metavar="MANIFEST", help=_MANIFEST)
    add("--out", required=True, metavar="DIR")
    add(
        "--teacher",
        default="builtin",
        metavar="builtin|demucs[:MODEL]|FILE.onnx",
        help="built in: no download; demucs: that package; an HTDemucs ONNX file in onnxruntime",
    )
    add("--teacher-weights", metavar="FOLDER", help="local weights for the demucs package")
    shared.add(verb, "--quiet", "--cache", "--debug")


def rvq(verbs: Verbs) -> None:
    """`rvq`."""
    verb = _add_verb(
        verbs,
        "rvq",
        "artifactnet_jax.train.rvq",
        "make AI-like positives from real music",
        "Train small RVQ autoencoders on the real tracks of a manifest, and re-"
        "synthesise each of them: the same music, with a neural codec's traces.",
    )
    add = verb.add_argument
    add("--data", required=True, metavar="MANIFEST", help=_MANIFEST)
    add("--out", required=True, metavar="DIR")
    add(
        "--codec",
        metavar="FOLDER",
        help="re-synthesise by the published SoundStream in it, and train none (extra: litert)",
    )
    shared.add_count(verb, "--models", 4, "default: 4")
    shared.add_count(verb, "--steps", 1500, "of each model")
    shared.add_count(verb, "--per-track", 1, "models applied to a track")
    add("--seed", type=int, default=0)
    shared.add(verb, "--quiet", "--cache", "--debug")


def texture(verbs: Verbs) -> None:
    """`texture`."""
    verb = _add_verb(
        verbs,
        "texture",
        "artifactnet_jax.train.texture",
        "fit the texture head, calibrate, and write weights",
        "Fit the texture head of weights to the tracks of a manifest, calibrate what "
        "it and the network say together, and report on groups that were left out.",
    )
    add = verb.add_argument
    add("--data", required=True, nargs="+", metavar="MANIFEST", help=_MANIFEST)
    add(
        "--also",
        nargs="+",
        metavar="MANIFEST",
        help="more tracks to fit to, such as those of rvq; neither judged nor calibrated with",
    )
    add("--init", metavar="W", help="weights with the network (default: ours)")
    add("-o", "--output", required=True, metavar="FILE")
    add("--name", help="of the weights (default: the file's)")
    shared.add_count(verb, "--segments", 5, "of a track at most (5)")
    shared.add_count(
        verb, "--draws", 3, "changed versions of a single segment; of several half as many each (3)"
    )
    shared.add_count(verb, "--steps", 2000, "of a fit (2000)")
    shared.add_count(
        verb,
        "--least-segments",
        None,
        "that a shorter track is judged by, overlapping where need be (default: as in --init)",
    )
    shared.add_count(verb, "--folds", 6, "parts that are left out in turn")
    add(
        "--point",
        choices=("fpr1", "fpr2", "fpr5", "balanced"),
        default="fpr5",
        help="operating point whose threshold becomes the default (fpr5)",
    )
    add("--half", action="store_true", help="store in float16")
    add(
        "--left-out",
        metavar="FILE",
        help="also write what is said of every track by a fit without its group (JSON Lines)",
    )
    add(
        "--limits",
        metavar="FILE",
        help="where the weights fail, a sentence a line: stored with them, shown by report",
    )
    add("--seed", type=int, default=0)
    shared.add(verb, "--quiet", "--cache", "--debug")
