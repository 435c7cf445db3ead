"""Self-synthesis: small RVQ autoencoders of our own, and the verb `rvq`.

Neural codecs leave their traces in whatever they code: vectors quantised in a latent, images and
notches of the upsampling in the decoder, fine structure lost. Autoencoders with a residual vector
quantiser (RVQ), trained for minutes on real music, leave such traces in music of one's own: every
real track becomes a positive of the same content. They differ in strides, sizes of the codebooks,
number of them, decoders and activations. In the folder that the verb writes:

    settings.json               what the folder was made with; other settings need another folder
    models/NAME.safetensors     a trained autoencoder, its figures in the header
    audio/NAME/KEY.flac         a positive, named by path, size and time of change of its original
    manifest.csv                the positives

Real music is mixed to mono first, and so the positives are mono, at 44.1 kHz, as long as their
originals and of the same level.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from artifactnet_jax.backends import cpu_count
from artifactnet_jax.console.progress import Teller, progress, step_progress
from artifactnet_jax.data.decoded import AudioCache, prepare
from artifactnet_jax.data.manifest import Row, check_output, read_other, write_manifest
from artifactnet_jax.files import claim, make_folder, writing
from artifactnet_jax.text import OK, SOME_FAILED, USAGE, CommandError, printable
from artifactnet_jax.train import published
from artifactnet_jax.train.autoencoder import (
    Codec,
    codecs,
)
from artifactnet_jax.train.rvq_model import (
    FORMAT,
    Diverged,
    Model,
    Track,
    load_model,
    measure,
    save_model,
    train,
    write_positive,
)

KIND = "codec-recon"
MAX_BAD = 0.5  # share of unreadable rows at which the command stops


def run(args: argparse.Namespace) -> int:
    """Train what is missing, re-synthesise what is missing; returns the exit code."""
    if args.per_track > args.models:
        cause = f"--per-track {args.per_track} is more than --models {args.models}"
        raise CommandError(f"{cause}: give fewer, or more models", USAGE)
    family = codecs(args.models, args.seed)
    rows = _real_rows(args)
    settings: dict[str, Any] = {"format": FORMAT}
    if args.codec:
        settings |= {"seed": args.seed, "published": published.digest(args.codec)}
    else:
        settings |= {name: getattr(args, name) for name in ("models", "steps", "per_track", "seed")}
        settings["codecs"] = [codec.name for codec in family]
    claim(os.path.join(args.out, "settings.json"), settings, lambda facts: facts)
    cache = AudioCache(args.cache)
    with progress(args.quiet, args.out, len(rows)) as tell:
        good, failures = prepare(rows, cache, max_bad=MAX_BAD, jobs=cpu_count(), tell=tell)
    if args.quiet:
        for failure in failures:
            print(failure.message, file=sys.stderr)
    diverged = 0
    if args.codec:
        written = published.positives(args, good, cache)
    else:
        tracks = [Track.open(row, cache) for row in good]
        models, diverged = _models(args, family, tracks)
        written = _positives(args, models, tracks, cache)
    write_manifest(_manifest(args), written)
    if not args.quiet:
        text = f"{sum(row.label for row in written)} positives of {len(good)} tracks"
        print(f"{text}, listed in {printable(_manifest(args))}", file=sys.stderr)
    return SOME_FAILED if failures or diverged else OK


def _manifest(args: argparse.Namespace) -> str:
    return os.path.join(args.out, "manifest.csv")


def _real_rows(args: argparse.Namespace) -> list[Row]:
    """The real rows of the manifest; makes the folders. CommandError: none, or no place for it."""
    rows = [row for row in read_other(args.data, _manifest(args)) if row.label == 0]
    if not rows:
        cause = f"{printable(args.data)}: no row is real (label 0)"
        raise CommandError(f"{cause}: give real music, which is what rvq learns from", USAGE)
    make_folder(os.path.join(args.out, "models"), "--out")
    check_output(_manifest(args))
    return rows


def _parts(tracks: Sequence[Track], seed: int) -> tuple[list[Track], list[Track], bool]:
    """Tracks to train on, tracks to measure on, and whether these are others.

    Trained on are those of the part "train" and of none, measured on the rest. Where there is no
    rest, every tenth group is kept back for it; where there is one group only, it serves both.
    """
    train = [track for track in tracks if track.row.split in ("train", "")]
    rest = [track for track in tracks if track.row.split not in ("train", "")]
    if train and not rest:
        groups = sorted({track.row.group for track in train})
        np.random.default_rng(seed).shuffle(groups)
        kept_back = set(groups[: -(-len(groups) // 10)]) if len(groups) > 1 else set()
        rest = [track for track in train if track.row.group in kept_back]
        train = [track for track in train if track.row.group not in kept_back]
    if not train:
        cause = "no readable real row is in the part 'train', or in none"
        raise CommandError(f"{cause}: there is nothing to train on", USAGE)
    return train, rest or train, bool(rest)


_COLUMNS = "{:<42} {:>6} {:>7} {:>6} {:>6} {:>6} {:>6} {:>6} {:>5}"


def _models(
    args: argparse.Namespace, family: Sequence[Codec], tracks: Sequence[Track]
) -> tuple[dict[str, Model], int]:
    """Models by name, those that are there already loaded; and how many training diverged for.

    Prints a line on stdout for each. CommandError: there is none.
    """
    learnt, measured, held_out = _parts(tracks, args.seed)
    models: dict[str, Model] = {}
    tell = Teller(args.quiet)
    print(
        _COLUMNS.format(
            *("model", "steps", "seconds", "kbit/s", "SI-SDR", "LSD", "mel", ">10k", "used")
        )
    )
    for k, codec in enumerate(family):
        path = os.path.join(args.out, "models", f"{codec.name}.safetensors")
        if os.path.exists(path):
            model = load_model(path)
            if model.codec != codec:
                cause = f"{printable(path)}: its codec differs from that of this version"
                raise CommandError(f"{cause}: name another --out", USAGE)
        else:
            try:
                tell(f"training {k + 1}/{len(family)} {codec.name}")
                with step_progress(tell, 0, args.steps) as bar:
                    model = train(codec, learnt, args.steps, args.seed + k, bar)
            except Diverged as error:
                text = f"{codec.name}: {error}; it is left out, the other models go on"
                print(text, file=sys.stderr)
                continue
            model.figures.update(measure(model, measured))
            save_model(path, model)
        models[codec.name] = model
        print(_line(model), flush=True)
    note = "tracks that were not trained on" if held_out else "the tracks trained on (no others)"
    print(f"SI-SDR, LSD, mel, >10kHz in dB, used of 1; crops of {note}")
    if not models:
        raise CommandError("training diverged for every model: try another --seed", SOME_FAILED)
    return models, len(family) - len(models)


def _line(model: Model) -> str:
    f = model.figures
    return _COLUMNS.format(
        *(model.codec.name, f["steps"], f"{f['seconds']:.0f}", f"{model.codec.kbps:.1f}"),
        *(f"{f[name]:.1f}" for name in ("si_sdr", "lsd", "mel", "high")),
        f"{f['used']:.2f}",
    )


def _positives(
    args: argparse.Namespace,
    models: dict[str, Model],
    tracks: Sequence[Track],
    cache: AudioCache,
) -> list[Row]:
    """Write the positives that are not there yet; the rows of all of them."""
    names = [codec.name for codec in codecs(args.models, args.seed)]
    rows = []
    for name in models:
        folder = os.path.join(args.out, "audio", name)
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
    with progress(args.quiet, args.out, len(tracks)) as tell:
        for track in tracks:
            order = [name for name in turns(track.row, names, args.seed) if name in models]
            for name in order[: args.per_track]:
                key = cache.key(track.row.path)
                path = os.path.join(args.out, "audio", name, f"{key}.flac")
                if not os.path.exists(path):
                    write_positive(models[name], track, path)
                rows.append(_positive_row(track.row, name, path))
            tell(track.row)
    return rows


def turns(row: Row, names: Sequence[str], seed: int) -> list[str]:
    """The order in which models are taken for a track.

    By group and file name, so that another machine, or another folder, comes to the same.
    """
    text = f"{row.group}/{os.path.basename(row.path)}"
    rng = np.random.default_rng([seed % 2**32, *text.encode("utf-8", "surrogateescape")])
    return [names[k] for k in rng.permutation(len(names))]


def _positive_row(original: Row, name: str, path: str) -> Row:
    """The source follows the original's, so that a source stays in one part."""
    return Row(
        path=path,
        label=1,
        kind=KIND,
        source=f"rvq-{original.source}",
        model=f"rvq-{name}",
        group=original.group,
        split=original.split,
        weight=original.weight,
        extra=(("original", original.path),),
    )
