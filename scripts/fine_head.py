"""Fit the learned head for decoders in no bank, and say what it is worth on groups left out.

    python scripts/fine_head.py FEATURES CLIPS... --weights artifactnet_jax/assets/edge.safetensors

FEATURES is what `fingerprint_bank.py features` wrote; CLIPS are manifests of short clips (see
default_data.py), measured here; `--cache` keeps what was read of all stretches. The head goes into
the weights file, whose other tensors and digest stay, and the figures to fine-head-report.json.

Generators and what codecs and vocoders re-synthesised count as AI. Restoration, enhancement, and
what is labelled ambiguous is judged, but fitted as neither; so is what a licence keeps from being
used in this way (FORBIDS). A group (page, artist, application) weighs the root of its recordings.
Every stretch is read in the band that it has and, with LOWER of the weight, in each lower one. Six
folds by group; and six by system, so that of Suno nothing is known where Suno is judged.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from default_data import APART, FORBIDS, clip_group, listed, package_row
from fingerprint_bank import stretches
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier

from artifactnet_jax import fine_head as fh
from artifactnet_jax import fingerprint as fp
from artifactnet_jax.recording import AudioError
from artifactnet_jax.weights import load_weights, save_weights

REPORT = Path(__file__).parent / "fine-head-report.json"
KNOWN = ("Suno", "MiniMax", "MusicGen", "ElevenLabs", "Lyria", "Udio")  # systems of several groups
FOLDS, LOWER, BOOTSTRAP = 6, 0.3, 300
HIDDEN, NETWORKS, DRAWN, EPOCHS, DECAY = 24, 4, 12_000, 12, 3.0
LENGTHS = ("whole", "20 s", "5 s")


@dataclasses.dataclass(eq=False)
class Data:
    """Recordings, and the stretches that are read of them."""

    rows: list[dict[str, str]]
    item: np.ndarray  # [n]: whose stretch it is
    part: np.ndarray  # [n]: of `LENGTHS`; another for what is only fitted to
    band: np.ndarray  # [n]: class of `fine_head.BANDS`, -1 below
    length: np.ndarray  # [n]: class of `fine_head.LENGTHS`
    features: np.ndarray  # float32 [n, bands, FEATURES], nan above the band

    def __post_init__(self) -> None:
        self.group = np.array([row["group"] for row in self.rows])
        self.set = np.array([which(row) for row in self.rows])
        self.system = np.array([family(row) for row in self.rows])
        self.label = np.where(self.set == "real", 0, np.where(self.set == "apart", -1, 1))
        free = np.array([not FORBIDS.search(row.get("licence", "")) for row in self.rows])
        self.fits = (free & (self.label >= 0))[self.item] & (self.band >= 0)


def which(row: dict[str, str]) -> str:
    """The set that a recording is judged in."""
    if row["label"] == "real":
        return "real"
    if row["label"] == "ambiguous" or row["kind"] in APART:
        return "apart"
    if row["label"] == "recon":
        return "reconstructions"
    page = row["group"].startswith(("demo-", "clip-"))
    return "demo pages" if page and row["kind"] != "service" else "field"


def family(row: dict[str, str]) -> str:
    """What is left out with a recording where systems are: all of its maker, or its group."""
    return next((name for name in KNOWN if name in row["system"]), row["group"])


def measured(folder: Path, clips: list[Path]) -> Iterator[tuple[dict[str, str], Any, Any, Any]]:
    """Rows with frames [k], mean dB and dB of mean power [k, bins] of every 5 s."""
    sources = listed()
    known = {path.stem: path for path in sorted(folder.glob("*.npz"))}
    for stem, path in known.items():
        row = package_row(stem) if stem.startswith(("deb-", "npm-")) else sources[stem]
        with np.load(path) as file:
            yield row, file["n"], file["log"], file["pw"]
    labels = {"ai": "ai", "codec-recon": "recon", "real": "real"}
    for manifest in clips:
        with manifest.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for clip in rows:
            row = sources.get(Path(clip["path"]).stem)
            if row is not None and row["id"] in known:
                continue
            if row is None:
                kind = "codec" if clip["kind"] == "codec-recon" else "clip"
                group = clip_group(clip["source"])
                system = clip["model"] or clip["source"]
                row = {**clip, "label": labels[clip["kind"]], "kind": kind, "group": group}
                row["system"] = system
            try:
                data = (manifest.parent / clip["path"]).read_bytes()
                windows = [mean for mean in stretches(data).windows if mean.frames]
            except AudioError as error:
                print(f"{clip['path']}: {error}", file=sys.stderr)
                continue
            if windows:
                log, power = np.moveaxis([mean.levels() for mean in windows], 0, 1)
                frames = np.array([mean.frames for mean in windows])
                yield row, frames, log.astype(np.float16), power.astype(np.float16)


def cuts(k: int, total: int) -> list[tuple[str, int, int]]:
    """Which of `k` stretches of 5 s with `total` frames are read together, and as what."""
    found = [("whole", 0, k)]
    if total >= 150:
        middle = max(0, k // 2 - 4)
        found.append(("20 s", middle, middle + 4))
        found += [("other", a, a + 4) for a in range(0, k - 3, 4) if a != middle]
    if total >= 54:
        found.append(("5 s", k // 2, k // 2 + 1))
        others = sorted(set(np.linspace(0, k - 1, 5).astype(int)) - {k // 2})[:3]
        found += [("other", int(a), int(a) + 1) for a in others]
    return found


def read(folder: Path, clips: list[Path]) -> Data:
    """Everything that is there, which takes a while."""
    rows, stretched = [], []
    for row, count, log, power in measured(folder, clips):
        rows.append(row)
        for part, a, b in cuts(len(count), int(count.sum())):
            frames = count[a:b].astype(float)
            length = fh.length_class(int(frames.sum()))
            if length is None:
                continue
            share = (frames / frames.sum())[:, None]
            sums = (10 ** (power[a:b].astype(float) / 10) * share).sum(0)
            mean = (log[a:b].astype(float) * share).sum(0)
            levels = np.stack([mean, 10 * np.log10(sums + fp.FLOOR)])
            band = fh.band_class(fp.band_end(levels[1]))
            values = np.full((len(fh.BANDS), fh.FEATURES), np.nan, np.float32)
            residuals = fp.residuals(levels)
            for i in range(0 if band is None else band + 1):
                values[i] = fh.features(residuals, fh.BANDS[i])
            stretched.append((len(rows) - 1, part, -1 if band is None else band, length, values))
    columns = (np.array(column) for column in zip(*stretched, strict=True))
    return Data(rows, *columns)


def root_weights(data: Data, keep: np.ndarray) -> np.ndarray:
    """Weight of each stretch of a mask, 1 in all for either label: see the module."""
    chosen = np.unique(data.item[keep])
    of_group = collections.Counter(data.group[chosen])
    of_item = np.bincount(data.item[keep], minlength=len(data.rows))
    size = np.array([of_group[g] for g in data.group])
    weight = np.where(keep, 1 / np.sqrt(np.maximum(size, 1))[data.item], 0)
    weight /= np.maximum(of_item, 1)[data.item]
    for value in (0, 1):
        weight[data.label[data.item] == value] /= weight[data.label[data.item] == value].sum()
    return np.asarray(weight)


def fit(data: Data, train: np.ndarray) -> fh.FineHead:
    """A head fitted to the stretches of a mask."""
    shape = (len(fh.BANDS), len(fh.LENGTHS), fh.FEATURES)
    mean, spread = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    weight, label = root_weights(data, train), data.label[data.item]
    inputs, wanted, chance = [], [], []
    for i in range(len(fh.BANDS)):
        for j in range(len(fh.LENGTHS)):
            here = train & (data.band >= i) & (data.length == j)
            real = np.flatnonzero(here & (label == 0))
            w = weight[real] / weight[real].sum()
            x = data.features[real, i]
            mean[i, j] = w @ x
            spread[i, j] = np.sqrt(w @ np.square(x - mean[i, j])) + 1e-3
            rows = np.flatnonzero(here)
            standard = (data.features[rows, i] - mean[i, j]) / spread[i, j]
            inputs.append(np.clip(standard, -fh.MOST, fh.MOST))
            wanted.append(label[rows])
            chance.append(weight[rows] * np.where(data.band[rows] == i, 1, LOWER))
    x, y, w = (np.concatenate(part) for part in (inputs, wanted, chance))
    for value in (0, 1):
        w[y == value] /= 2 * w[y == value].sum()
    layers = []
    for seed in range(NETWORKS):
        drawn = np.random.default_rng(seed).choice(len(y), DRAWN, p=w)
        network = MLPClassifier(
            (HIDDEN,), alpha=DECAY, max_iter=EPOCHS, batch_size=256, random_state=seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is stopped early on purpose
            layers.append(network.fit(x[drawn], y[drawn]))
    tensors = {
        "mean": mean,
        "spread": spread,
        "hidden.kernel": np.concatenate([n.coefs_[0] for n in layers], axis=1),
        "hidden.bias": np.concatenate([n.intercepts_[0] for n in layers]),
        "out.kernel": np.concatenate([n.coefs_[1] for n in layers]) / NETWORKS,
        "out.bias": np.mean([n.intercepts_[1] for n in layers], axis=0),
    }
    rounded = fh.stored(tensors)
    return fh.FineHead({k: v.astype(np.float32) for k, v in rounded.items()}, {})


def folds(data: Data, parted: np.ndarray) -> np.ndarray:
    """Fold of each recording: what is `parted` alike stays together, sets are spread evenly."""
    out: dict[str, int] = {}
    of_set = {name: data.set[np.flatnonzero(parted == name)[0]] for name in np.unique(parted)}
    for offset, which_set in enumerate(sorted(set(of_set.values()))):
        names = [name for name in of_set if of_set[name] == which_set]
        names.sort(key=lambda name: (-(parted == name).sum(), name))
        out |= {name: (k + offset) % FOLDS for k, name in enumerate(names)}
    return np.array([out[name] for name in parted])


def left_out(data: Data, parted: np.ndarray) -> tuple[np.ndarray, list[fh.FineHead]]:
    """Logit [n] of each stretch by a head that was fitted to the other folds, and the heads.

    Without a band it is nan.
    """
    fold = folds(data, parted)[data.item]
    logit, heads = np.full(len(data.item), np.nan), []
    for f in range(FOLDS):
        head = fit(data, data.fits & (fold != f))
        heads.append(head)
        for row in np.flatnonzero((fold == f) & (data.band >= 0)):
            band = data.band[row]
            logit[row] = head.logit(data.features[row, band], band, data.length[row])
        print(f"fold {f}", file=sys.stderr, flush=True)
    return logit, heads


def write_left_out(path: Path, data: Data, logit: np.ndarray, heads: list[fh.FineHead]) -> None:
    """What is said of every recording by a head without its group; fold of each group; the heads.

    Recordings go by their files' names.
    """
    name = np.array([row.get("id") or Path(row["path"]).stem for row in data.rows])
    keep = np.isin(data.part, LENGTHS)
    fold = dict(zip(data.group.tolist(), folds(data, data.group).tolist(), strict=True))
    np.savez(
        path,
        name=name[data.item][keep],
        view=data.part[keep],
        logit=logit[keep],
        group=np.array(list(fold)),
        fold=np.array(list(fold.values())),
        heads=np.array([fh.to_text(head) for head in heads]),
    )


def figures(
    ai: np.ndarray, real: np.ndarray, ai_group: np.ndarray, real_group: np.ndarray
) -> dict[str, Any]:
    """AUC, shares found at 5 and 1 % false alarms; intervals by bootstrap over groups, 95 %."""

    def three(a: np.ndarray, r: np.ndarray) -> list[float]:
        label = np.repeat([1, 0], [len(a), len(r)])
        limits = np.quantile(r, (0.95, 0.99))
        return [roc_auc_score(label, np.concatenate([a, r])), *(np.mean(a > x) for x in limits)]

    rng = np.random.default_rng(0)
    rows = [
        {name: np.flatnonzero(group == name) for name in np.unique(group)}
        for group in (ai_group, real_group)
    ]
    drawn = []
    for _ in range(BOOTSTRAP):
        a, r = (np.concatenate([of[name] for name in rng.choice(list(of), len(of))]) for of in rows)
        drawn.append(three(ai[a], real[r]))
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    out: dict[str, Any] = {"n": len(ai), "groups": len(rows[0]), "real": len(real)}
    names = ("auc", "found_at_5", "found_at_1")
    for name, value, a, b in zip(names, three(ai, real), low, high, strict=True):
        out[name] = round(float(value), 4)
        out[f"{name}_interval"] = [round(float(a), 4), round(float(b), 4)]
    return out


def judged(data: Data, logit: np.ndarray) -> dict[str, Any]:
    """Figures of each set by length, and of whole recordings by band."""
    of = data.set[data.item]
    group = data.group[data.item]
    short = {"whole": -1, "20 s": 1, "5 s": 0}  # a whole recording of that length counts too
    out: dict[str, Any] = {}

    def table(here: np.ndarray) -> dict[str, Any]:
        real = here & (of == "real")
        sets = ("field", "demo pages", "reconstructions")
        found = {name: here & (of == name) for name in sets}
        return {
            name: figures(logit[rows], logit[real], group[rows], group[real])
            for name, rows in found.items()
            if rows.sum() >= 20 and real.sum() >= 20
        }

    for part in LENGTHS:
        whole = data.part == "whole"
        here = (data.part == part) | (whole & (data.length == short[part]))
        out[part] = table(here & np.isfinite(logit))
    whole = (data.part == "whole") & np.isfinite(logit)
    out["by band"] = {
        f"{high:.0f}": table(whole & (data.band == i)) for i, high in enumerate(fh.BANDS)
    }
    return out


def apart(data: Data, logit: np.ndarray, limits: np.ndarray) -> dict[str, Any]:
    """Shares above the limits of 5 and 1 % false alarms, of the kinds that are neither."""
    kind = np.array([row["kind"] for row in data.rows])[data.item]
    here = (data.set[data.item] == "apart") & (data.part == "whole") & np.isfinite(logit)
    return {
        str(name): {
            "n": int((here & (kind == name)).sum()),
            "above_5_and_1_percent": [
                round(float(np.mean(logit[here & (kind == name)] > x)), 4) for x in limits
            ],
        }
        for name in np.unique(kind[here])
    }


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", type=Path)
    parser.add_argument("clips", type=Path, nargs="*")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--left-out", type=Path, metavar="FILE", help="for fusion.py")
    args = parser.parse_args()
    names = [field.name for field in dataclasses.fields(Data)][1:]
    if args.cache and args.cache.exists():
        with np.load(args.cache) as file:
            data = Data(json.loads(str(file["rows"])), *(file[name] for name in names))
    else:
        data = read(args.features, args.clips)
        if args.cache:
            arrays = {name: getattr(data, name) for name in names}
            np.savez(args.cache, rows=json.dumps(data.rows), **arrays)
    logit, heads = left_out(data, data.group)
    if args.left_out:
        write_left_out(args.left_out, data, logit, heads)
    whole = (data.part == "whole") & np.isfinite(logit)
    of = data.set[data.item]
    unread = (data.part == "whole") & (data.band < 0)
    limits = np.quantile(logit[whole & (of == "real")], (0.95, 0.99))
    report = {
        "recordings": dict(collections.Counter(data.set.tolist())),
        "groups": {s: len(set(data.group[data.set == s])) for s in sorted(set(data.set))},
        "not judged": dict(collections.Counter(of[unread].tolist())),
        "fitted": len(np.unique(data.item[data.fits])),
        "limits": {"5": round(float(limits[0]), 4), "1": round(float(limits[1]), 4)},
        "groups left out": judged(data, logit),
        "apart": apart(data, logit, limits),
        "systems left out": judged(data, left_out(data, data.system)[0]),
    }
    head = fit(data, data.fits)
    report["bytes"] = sum(tensor.nbytes for tensor in fh.stored(head.tensors).values())
    provenance = {"recordings": report["fitted"], "limits": report["limits"]}
    head = dataclasses.replace(head, provenance=provenance)
    report["sha256"] = head.sha256
    REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    model = load_weights(args.weights)
    save_weights(
        *(args.weights, model.config, model.tensors),
        name=model.name,
        licence=model.licence,
        provenance=model.provenance,
        dtype=np.float16,
        fine=head,
    )
    assert load_weights(args.weights).sha256 == model.sha256


if __name__ == "__main__":
    main()
