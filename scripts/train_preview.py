"""Train the preview weights: the short run behind `assets/edge-preview.safetensors`.

Input is a folder made by `scripts/preview_data.py` (crops.npy, index.csv). Two stages:

1. `--encoder-steps` steps of the UNet's encoder alone, with a linear classifier on the mean of the
   bottleneck. That classifier is training scaffolding and is thrown away: it gives the encoder a
   short path to the label, which the way through mask, HPSS and mel is not;
2. `--steps` steps of the whole, binary cross-entropy through the differentiable front end, half
   weight on the scaffolding. The mean and the spread of the mask are logged: a mean near 0.5 is
   pass-through collapse.

Sources are split whole, never by clip: codec reconstructions stay with their originals and the
members of a generator family with each other; autoencoders may occur on both sides. `CALIBRATION`
sources give the threshold (highest recall with a false-positive rate of at most 5 %), `TEST`
sources are only reported. Batches hold as many AI as real crops; within a class every source counts
by the square root of its size.

    python scripts/train_preview.py --data DIR --out edge-preview.safetensors --report report.json
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.metrics import roc_auc_score

from artifactnet_jax import dsp
from artifactnet_jax.config import Config
from artifactnet_jax.model import ArtifactNet
from artifactnet_jax.weights import save_weights

CALIBRATION = (
    *("presto", "presto-base", "sao-prestosite", "diffrhythm", "melody", "vbrrvq", "vbrrvq-gt"),
    *("beat-feet", "opensurge", "clue-cards-lofi", "deb-singularity-music", "deb-flare-game"),
)
TEST = (
    *("ace-step-v1", "songcreator", "yue", "musicgen", "m2ugen", "snac", "mucodec"),
    *("tuxemon", "musichifi-fma-gt", "digabi-muzak", "evf-cc0-stems", "sonic-pi-samples"),
    *("deb-warzone2100-music", "deb-drascula-music", "deb-hedgewars-data"),
)


def split_of(source: str) -> str:
    """ "calibration", "test" or "train": by whole source name or by its prefix before a dash."""
    for name, sources in (("calibration", CALIBRATION), ("test", TEST)):
        if any(source == s or source.startswith(f"{s}-") for s in sources):
            return name
    return "train"


def read_index(folder: Path) -> dict[str, np.ndarray]:
    with open(folder / "index.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {key: np.array([row[key] for row in rows]) for key in ("source", "file")}
    columns["row"] = np.array([int(row["row"]) for row in rows])
    columns["label"] = np.array([float(row["label"]) for row in rows], np.float32)
    plain = np.array([row["chain"].startswith("plain") for row in rows])
    columns["split"] = np.array([split_of(row["source"]) for row in rows])
    # A plain crop still has its source's own codec, which tells the classes apart: do not train.
    columns["split"][plain & (columns["split"] == "train")] = "unused"
    return columns


def sampling_weights(index: dict[str, np.ndarray]) -> np.ndarray:
    """Probability of each row: 0 outside train, classes equal, sources by sqrt of their size."""
    weights = np.zeros(len(index["row"]))
    train = index["split"] == "train"
    for label in (0, 1):
        chosen = train & (index["label"] == label)
        for source in np.unique(index["source"][chosen]):
            rows = chosen & (index["source"] == source)
            weights[rows] = 1 / math.sqrt(rows.sum())
        weights[chosen] /= 2 * weights[chosen].sum()
    return weights


def scores(forward, crops: np.ndarray, rows: np.ndarray, batch: int = 8) -> np.ndarray:
    out = []
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        padded = np.resize(chunk, batch)
        audio = crops[padded].astype(np.float32) / 32768
        out.append(np.asarray(forward(audio))[: len(chunk)])
    return np.concatenate(out)


def threshold_at_fpr(label: np.ndarray, score: np.ndarray, fpr: float) -> float:
    """Lowest threshold whose false-positive rate on these scores is at most `fpr`."""
    real = np.sort(score[label == 0])
    allowed = math.floor(fpr * len(real))
    return float(np.nextafter(real[len(real) - 1 - allowed], np.float32(2), dtype=np.float32))


def interval(values: np.ndarray, files: np.ndarray, seed: int = 0) -> list[float]:
    """95 % percentile bootstrap over files (2,000 resamples) of the mean of `values`."""
    names, inverse = np.unique(files, return_inverse=True)
    total = np.bincount(inverse, values)
    count = np.bincount(inverse)
    picks = np.random.default_rng(seed).integers(0, len(names), (2000, len(names)))
    means = total[picks].sum(1) / count[picks].sum(1)
    return [round(float(v), 4) for v in np.percentile(means, [2.5, 97.5])]


def report(index: dict[str, np.ndarray], score: np.ndarray, threshold: float) -> dict:
    """Figures of the test sources, overall and per source, with n and 95 % intervals."""
    test = index["split"] == "test"
    label, source, files = index["label"][test], index["source"][test], index["file"][test]
    hit = (score[test] >= threshold).astype(float)
    rows, ai, real = score[test], label == 1, label == 0
    recall, fpr = hit[ai].mean(), hit[real].mean()
    precision = hit[ai].sum() / max(hit.sum(), 1)
    names, inverse = np.unique(files, return_inverse=True)
    rng, aucs = np.random.default_rng(0), []
    members = [np.flatnonzero(inverse == k) for k in range(len(names))]
    for _ in range(500):
        pick = np.concatenate([members[k] for k in rng.integers(0, len(names), len(names))])
        aucs.append(roc_auc_score(label[pick], rows[pick]))
    result = {
        "threshold": threshold,
        "n_crops": {"ai": int(ai.sum()), "real": int(real.sum())},
        "n_files": {"ai": len(set(files[ai])), "real": len(set(files[real]))},
        "auc": round(float(roc_auc_score(label, rows)), 4),
        "auc_95": [round(float(v), 4) for v in np.percentile(aucs, [2.5, 97.5])],
        "tpr": round(float(recall), 4),
        "fpr": round(float(fpr), 4),
        "fpr_95": interval(hit[real], files[real]),
        "f1": round(float(2 * precision * recall / max(precision + recall, 1e-9)), 4),
        "sources": {},
    }
    for name in np.unique(source):
        rows_of = source == name
        result["sources"][str(name)] = {
            "label": int(label[rows_of][0]),
            "n_files": len(set(files[rows_of])),
            "n_crops": int(rows_of.sum()),
            "called_ai": round(float(hit[rows_of].mean()), 4),
            "called_ai_95": interval(hit[rows_of], files[rows_of]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--encoder-steps", type=int, default=2400)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=1.47, help="length of a training crop")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--patch", type=int, nargs=2, help="override the preset's patch")
    parser.add_argument("--watch", type=int, default=200, help="calibration crops watched")
    parser.add_argument("--eval-crops", type=int, default=60, help="per held-out source, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    config = Config.edge()
    if args.patch:
        unet = dataclasses.replace(config.unet, patch=tuple(args.patch))
        config = dataclasses.replace(config, unet=unet)
    index = read_index(args.data)
    crops = np.load(args.data / "crops.npy", mmap_mode="r")
    weights = sampling_weights(index)
    print(
        {s: int((index["split"] == s).sum()) for s in ("train", "calibration", "test")},
        file=sys.stderr,
    )

    model = ArtifactNet(config, rngs=nnx.Rngs(args.seed))
    model.unet.head.kernel[...] = jnp.zeros_like(model.unet.head.kernel[...])
    model.train()
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    aux = nnx.state(nnx.Linear(config.unet.bottleneck, 1, rngs=nnx.Rngs(args.seed)))
    params = {"model": params, "aux": aux}

    def encoder_logit(model, params, magnitude):
        bottleneck = jnp.mean(model.unet.encode(magnitude)[0], axis=(1, 2))
        return (bottleneck @ params["aux"]["kernel"][...])[:, 0] + params["aux"]["bias"][...]

    def loss_fn(params, stats, key, audio, label, whole):
        model = nnx.merge(graph, params["model"], stats, copy=True)
        magnitude = dsp.stft_magnitude(audio, config.front_end)
        target = 0.05 + 0.9 * label
        logit = encoder_logit(model, params, magnitude)
        loss, mask = optax.sigmoid_binary_cross_entropy(logit, target).mean(), jnp.zeros(2)
        if whole:
            mask = model.unet(magnitude)
            channels = dsp.seven_channels(mask * magnitude, config.front_end)
            logit = model.cnn(channels, nnx.Rngs(dropout=key))
            loss = 0.5 * loss + optax.sigmoid_binary_cross_entropy(logit, target).mean()
        stats = nnx.state(model, nnx.BatchStat)
        return loss, (stats, jnp.mean(mask), jnp.std(mask), logit)

    def make_step(tx, whole):
        def step(params, stats, ema, opt, key, audio, label):
            gradient = jax.value_and_grad(loss_fn, has_aux=True)
            audio = audio.astype(jnp.float32) / 32768
            (loss, out), grads = gradient(params, stats, key, audio, label, whole)
            stats, *metrics = out
            updates, opt = tx.update(grads, opt, params)
            params = optax.apply_updates(params, updates)
            ema = jax.tree.map(lambda e, p: 0.99 * e + 0.01 * p, ema, params)
            return params, stats, ema, opt, loss, metrics

        return jax.jit(step, donate_argnums=(0, 1, 2, 3))

    @jax.jit
    def forward(params, stats, audio):
        model = nnx.merge(graph, params["model"], stats, copy=True)
        model.eval()
        return model(audio)

    @jax.jit
    def encoder_score(params, stats, audio):
        model = nnx.merge(graph, params["model"], stats, copy=True)
        model.eval()
        return encoder_logit(model, params, dsp.stft_magnitude(audio, config.front_end))

    rng = np.random.default_rng(args.seed)
    length, began = int(args.seconds * 44_100), time.time()
    losses, seen = [], []
    watched = np.flatnonzero(index["split"] == "calibration")
    watched = np.random.default_rng(0).permutation(watched)[: args.watch]
    ema = jax.tree.map(jnp.copy, params)
    for whole, steps in ((False, args.encoder_steps), (True, args.steps)):
        if not steps:
            continue
        rate = optax.warmup_cosine_decay_schedule(
            0.0, args.rate, max(steps // 20, 1), steps, args.rate / 50
        )
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2))
        opt, step_fn = tx.init(params), make_step(tx, whole)
        for step in range(steps):
            pick = rng.choice(len(weights), args.batch, p=weights)
            starts = rng.integers(0, 176_400 - length + 1, args.batch)
            rows = index["row"][pick]
            audio = np.stack([crops[r, s : s + length] for r, s in zip(rows, starts, strict=True)])
            label = index["label"][pick]
            key = jax.random.key(args.seed + len(losses))
            out = step_fn(params, stats, ema, opt, key, audio, label)
            params, stats, ema, opt, loss, (mean_mask, std_mask, logit) = out
            seen.append((label, np.asarray(logit)))
            losses.append(float(loss))
            if not np.isfinite(losses[-1]):
                sys.exit(f"loss is not finite at step {step}")
            if step % 50 == 49:
                auc = roc_auc_score(*map(np.concatenate, zip(*seen[-50:], strict=True)))
                print(
                    f"{'whole' if whole else 'encoder'} {step + 1}/{steps} loss "
                    f"{np.mean(losses[-50:]):.4f} AUC {auc:.3f} mask {float(mean_mask):.3f} +- "
                    f"{float(std_mask):.3f} {time.time() - began:.0f} s",
                    file=sys.stderr,
                )

            if step % 200 == 199 or step == steps - 1:
                judge = functools.partial(forward if whole else encoder_score, ema, stats)
                found = scores(judge, crops, index["row"][watched])
                auc = roc_auc_score(index["label"][watched], found)
                print(f"calibration AUC {auc:.3f} ({len(watched)} crops)", file=sys.stderr)

    keep = np.zeros(len(weights), bool)
    held = np.isin(index["split"], ("calibration", "test"))
    for source in np.unique(index["source"][held]):
        rows = np.flatnonzero(held & (index["source"] == source))
        keep[rng.permutation(rows)[: args.eval_crops]] = True
    index["split"][~keep & (index["split"] != "train")] = "unused"
    held_out = np.flatnonzero(keep)
    score = np.full(len(weights), np.nan)
    score[held_out] = scores(functools.partial(forward, ema, stats), crops, index["row"][held_out])
    calibration = index["split"] == "calibration"
    threshold = threshold_at_fpr(index["label"][calibration], score[calibration], 0.05)
    threshold = math.ceil(threshold * 1e4) / 1e4
    config = dataclasses.replace(
        config, verdict=dataclasses.replace(config.verdict, threshold=threshold)
    )
    figures = {
        "steps": [args.encoder_steps, args.steps],
        "batch": args.batch,
        "seconds": round(time.time() - began),
        "calibration_auc": round(
            float(roc_auc_score(index["label"][calibration], score[calibration])), 4
        ),
        "test": report(index, score, threshold),
        "test_at_0.5": report(index, score, 0.5),
    }
    args.report.write_text(json.dumps(figures, indent=1))
    merged = {}
    for state in (ema["model"], stats):
        for path, value in nnx.to_flat_state(state):
            merged[".".join(map(str, path))] = np.asarray(value[...], np.float32)
    test = figures["test"]
    save_weights(
        args.out,
        config,
        merged,
        name="edge-preview",
        licence="Apache-2.0",
        provenance={
            "status": "preview",
            "trained_by": "artifactnet-jax, scripts/train_preview.py",
            "figures": {k: v for k, v in test.items() if k != "sources"},
            "note": "not evidence by itself; see MODEL_CARD.md",
        },
        dtype=np.float16,
    )
    print(json.dumps(test, indent=1))


if __name__ == "__main__":
    main()
