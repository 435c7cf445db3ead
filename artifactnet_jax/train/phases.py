"""The phases of training, as data: what is trained, what is minimised, and every default.

distill, steer, codec are phases 1 to 3 of the paper (III-B), head its round 2 (V-A); cnn trains
the classifier on the seven channels. encoder and joint are ours: plain joint training from random
weights stalls, with the loss near chance; a throw-away linear classifier on the UNet's bottleneck
gives the encoder a short path to the label, first alone, then beside the whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from artifactnet_jax.config import Checked, Count, From0, Natural, Positive, Share, require
from artifactnet_jax.data.augment import CODECS, Augment, Codec
from artifactnet_jax.text import USAGE, CommandError


class SettingsError(CommandError):
    """A setting that does not exist or cannot have that value; the message says which may."""

    def __init__(self, message: str):
        super().__init__(message, USAGE)


Inside = Annotated[float, "between 0 and 1", lambda x: 0 < x < 1]


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Everything that decides a run, besides its data and where it starts from."""

    trainable: tuple[str, ...] = ("unet", "cnn")  # parts that are trained; all others are frozen
    batch_statistics: Literal["update", "frozen"] = "update"  # of the trainable parts
    needs_init: bool = False  # random weights make no sense here

    # Weights of the terms of the loss; a term of weight 0 is not computed.
    distill: From0 = 0.0  # L1 + multi-resolution STFT against the teacher's residual
    bce: From0 = 0.0  # binary cross-entropy of the score
    auxiliary: From0 = 0.0  # cross-entropy of an auxiliary classifier on the bottleneck
    consistency: From0 = 0.0  # range of the score over codec versions of a track
    label_smoothing: Share = 0.05
    boundary: Inside = 0.5  # score at which the cross-entropy is even; for tuning: the threshold

    steps: Count = 2000
    batch: Count = 16  # tracks; with `versions` each counts once
    seconds: Positive = 4.0  # length of a crop; shorter trains faster, scoring always takes 4 s
    versions: tuple[Codec, ...] = ()  # codecs that each track is shown in, all in one batch
    accumulate: Count = 1  # batches per update
    learning_rate: Positive = 1e-3  # of AdamW, at its peak
    unet_learning_rate_scale: From0 = 1.0  # factor on it for the UNet
    cnn_learning_rate_scale: From0 = 1.0  # factor on it for the CNN
    warmup: Share = 0.05  # share of the steps with a rising learning rate
    final_learning_rate: Share = 0.02  # share of the peak that the cosine ends at
    weight_decay: From0 = 1e-2  # of kernels only
    clip: Positive = 1.0  # global norm of the gradient
    ema: Share = 0.99  # decay of the moving average that is watched and written; 0: none
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the convolutions
    precision: Literal["highest", "default"] = "highest"  # default: TF32 on new GPUs
    seed: int = 0

    log_every: Count = 10  # steps between rows of metrics.jsonl
    watch_every: Count = 200  # steps between looks at the validation tracks
    watch_tracks: int = 200  # how many of those, at most, evenly over sources
    checkpoint_every: Count = 200  # steps

    # Collapse: a mask that passes everything or nothing, or is the same everywhere.
    mask_high: float = 0.98  # mean mask over its bound
    mask_low: float = 0.002
    mask_spread: float = 0.02  # standard deviation within a segment over its bound (paper 0.01/0.5)
    patience: Count = 100  # steps in a row (means of log_every); the first are not judged

    split_by: Literal["source", "model", "group"] = "source"  # what no two splits may share
    max_bad: Share = 0.05  # share of unreadable rows at which the run stops
    source_power: float = 0.5  # a source counts by its size to this power, within its label
    near_p: float = 0.5  # crops of a mined track that lie around its worst segment
    draws: Natural = 0  # changed crops kept on disk per track; 0: fresh ones, encoded at every step
    workers: Natural = 0  # threads that prepare batches; 0: one per CPU
    augment: Augment = dataclasses.field(default_factory=Augment)

    licence: str = ""  # of the weights written; without: that of --init


_PARTS = ("unet", "cnn", "texture")
PHASES: dict[str, Settings] = {
    "distill": Settings(trainable=("unet",), distill=1.0),
    "cnn": Settings(trainable=("cnn",), bce=1.0),
    "steer": Settings(trainable=("unet",), needs_init=True, bce=1.0, learning_rate=3e-4),
    "codec": Settings(
        needs_init=True, bce=1.0, consistency=0.5, versions=CODECS, batch=8, learning_rate=3e-4
    ),
    "head": Settings(
        trainable=("cnn", "texture"),
        batch_statistics="frozen",
        needs_init=True,
        bce=1.0,
        learning_rate=1e-4,
        steps=500,
    ),
    "encoder": Settings(trainable=("unet",), auxiliary=1.0, learning_rate=1.5e-3),
    "joint": Settings(bce=1.0, auxiliary=0.5, learning_rate=1.5e-3),
}
# Settings that are called otherwise in files and on the command line.
_KEYS = {
    "trainable": "moves",
    "learning_rate": "rate",
    "unet_learning_rate_scale": "unet_rate",
    "cnn_learning_rate_scale": "cnn_rate",
    "final_learning_rate": "final_rate",
}
_FIELDS = {key: name for name, key in _KEYS.items()}
# What may differ between a run and its continuation: none of it moves a weight.
FREE = (
    *("workers", "log_every", "watch_every", "watch_tracks", "checkpoint_every", "licence"),
    *("patience", "mask_high", "mask_low", "mask_spread"),
)


def settings_of(phase: str, config: str | None, assignments: Iterable[str]) -> Settings:
    """A phase's settings, changed by a TOML or JSON file and then by "key=value" texts.

    Augmentation is set as "augment.key=value", or by a table of that name. SettingsError.
    """
    values = _flat(PHASES[phase])
    if config is not None:
        for key, value in _read(config).items():
            values[_known(key, values, config)] = value
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"--set {text}: write KEY=VALUE")
        values[_known(key.strip(), values, "--set")] = value.strip()
    return from_flat(values)


def to_flat(settings: Settings) -> dict[str, Any]:
    """Plain values by name, those of the augmentation as "augment.NAME"; for JSON."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in _flat(settings).items()
    }


def from_flat(values: dict[str, Any]) -> Settings:
    """Inverse of `to_flat`; texts are converted. SettingsError names what cannot be."""
    parts: dict[type, dict[str, Any]] = {Settings: {}, Augment: {}}
    for key, text in values.items():
        kind: type = Augment if key.startswith("augment.") else Settings
        name = key.removeprefix("augment.")
        name = name if kind is Augment else _FIELDS.get(name, name)
        hint = typing.get_type_hints(kind, include_extras=True)[name]
        parts[kind][name] = value = _parsed(text, hint)
        try:
            require(key, value, hint)
        except ValueError as error:
            raise SettingsError(str(error)) from None
    try:
        settings = Settings(**parts[Settings], augment=Augment(**parts[Augment]))
    except ValueError as error:
        raise SettingsError(str(error)) from None
    _check(settings)
    return settings


def _flat(settings: Settings) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(Settings)]
    own = {_KEYS.get(name, name): getattr(settings, name) for name in names}
    augment = own.pop("augment")
    return own | {
        f"augment.{f.name}": getattr(augment, f.name) for f in dataclasses.fields(Augment)
    }


def _read(path: str) -> dict[str, Any]:
    import tomllib

    try:
        text = Path(path).read_text(encoding="utf-8")
        toml = os.path.splitext(path)[1].lower() == ".toml"
        data = tomllib.loads(text) if toml else json.loads(text)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}: give a TOML or JSON file") from None
    if not isinstance(data, dict):
        raise SettingsError(f"{path}: not a table of settings")
    nested = data.pop("augment", {})
    if not isinstance(nested, dict):
        raise SettingsError(f"{path}: augment is not a table of settings")
    return data | {f"augment.{key}": value for key, value in nested.items()}


def _known(key: str, values: dict[str, Any], where: str) -> str:
    if key not in values:
        raise SettingsError(f"{where}: no setting {key!r}: train PHASE --list shows them")
    return key


def _parsed(value: Any, hint: Any) -> Any:
    """A text or a JSON value as an annotation has it, where that can be; else as it is."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _parsed(value, args[0])
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, (list, tuple)):
            hints = args[:1] * len(value) if args[1:] == (...,) else args
            return tuple(map(_parsed, value, hints)) if len(value) == len(hints) else value
    if hint is bool:
        named = {"true": True, "false": False, "1": True, "0": False}
        return named.get(str(value).lower(), value)
    if hint in (int, float):
        with contextlib.suppress(TypeError, ValueError):
            number = float(value)
            return int(number) if hint is int and number.is_integer() else number
    return value


def _check(settings: Settings) -> None:
    """SettingsError where settings make no sense together."""
    s = settings
    if not s.distill + s.bce + s.auxiliary:
        raise SettingsError("distill, bce and auxiliary are all 0: there is nothing to minimise")
    if not s.trainable or not all(part.split(".")[0] in _PARTS for part in s.trainable):
        named = ",".join(s.trainable)
        raise SettingsError(f"moves={named}: name unet, cnn or parts such as cnn.out")
    if s.consistency and len(s.versions) < 2:
        raise SettingsError("consistency needs at least two versions, such as versions=wav,mp3")
    if s.distill and (s.versions or s.draws):
        raise SettingsError(
            "distill takes fresh crops of what the teacher heard: no versions, draws"
        )
