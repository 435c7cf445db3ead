"""The public runner's output files: written for its tools, and read to compare with.

A folder of one detector holds

    per_source.json            {source: {n, attempted, failures, threshold, label, prob_mean,
                               prob_median, prob_p10, prob_p90, tpr or fpr}}, null if none is scored
    track_probs.json           [{prob, label (0 or 1), source, track_id}]
    codec_pair.json            [{track_id, source, label, probs {wav, mp3_128, aac_128, opus_128},
                               delta}]
    inference_failures.json    [{track_id, source, stage (resolve, decode or inference),
                               error_type, error}]
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from artifactnet_jax.bench.sanity import CODEC_PAIR
from artifactnet_jax.files import write_json
from artifactnet_jax.text import USAGE, CommandError, brief, printable


def write(
    folder: Path,
    tracks: Sequence[Mapping[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
    stressed: Mapping[str, Mapping[str, float | None]],
    threshold: float,
) -> None:
    """Write one detector's files.

    tracks: id, label, source; results: its rows by id; stressed: scores by change and id.
    `codec_pair.json` is written where all four codecs were scored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probs, failures = [], []
    sources: dict[tuple[str, int], list[float | None]] = defaultdict(list)
    for track in tracks:
        row = results[track["id"]]
        sources[track["source"], track["label"]].append(row["score"])
        known = {"source": track["source"], "track_id": track["id"]}
        if row["score"] is not None:
            probs.append({"prob": row["score"], "label": track["label"], **known})
            continue
        error = row["error"]
        failures.append(
            {
                **known,
                "stage": error["stage"],
                "error_type": error["kind"],
                "error": error["message"],
            }
        )
    labels = {source: [label for name, label in sources if name == source] for source, _ in sources}
    per_source = {
        source if len(labels[source]) == 1 else f"{source} ({label})": _source(
            scores, label, threshold
        )
        for (source, label), scores in sources.items()
    }
    write_json(folder / "per_source.json", per_source)
    write_json(folder / "track_probs.json", probs)
    write_json(folder / "inference_failures.json", failures)
    if set(CODEC_PAIR) <= set(stressed):
        pairs = []
        for track in tracks:
            views = {name: stressed[name].get(track["id"]) for name in CODEC_PAIR}
            known_views = [value for value in views.values() if value is not None]
            if len(known_views) == len(views):  # as the runner: a track needs all four
                pairs.append(
                    {
                        "track_id": track["id"],
                        "source": track["source"],
                        "label": track["label"],
                        "probs": {name.replace("-", "_"): value for name, value in views.items()},
                        "delta": max(known_views) - min(known_views),
                    }
                )
        write_json(folder / "codec_pair.json", pairs)


def _source(scores: Sequence[float | None], label: int, threshold: float) -> dict[str, Any]:
    known = np.array([score for score in scores if score is not None])
    row: dict[str, Any] = {"n": len(known), "attempted": len(scores)}
    row |= {"failures": len(scores) - len(known), "threshold": threshold, "label": label}
    some = len(known) > 0
    row["prob_mean"] = float(known.mean()) if some else None
    for name, q in (("median", 0.5), ("p10", 0.1), ("p90", 0.9)):
        row[f"prob_{name}"] = float(np.quantile(known, q)) if some else None
    row["tpr" if label else "fpr"] = float((known >= threshold).mean()) if some else None
    return row


def read(
    folder: str, tracks: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One detector's results of the public runner in our form: plain rows, and those of codecs.

    There is a plain row for each of `tracks`; a track that the files do not know is a failure of
    kind "absent". CommandError: no such folder or file, or none of its ids is in `tracks`.
    """
    probs = _read(folder, "track_probs.json")
    failures = _read(folder, "inference_failures.json", needed=False)
    pairs = _read(folder, "codec_pair.json", needed=False)
    try:
        score_of = {row["track_id"]: _score(row["prob"], folder) for row in probs}
        error_of = {
            row["track_id"]: {
                "kind": row.get("error_type") or "unknown",
                "message": str(row.get("error", "")),
                "stage": row.get("stage", "inference"),
            }
            for row in failures
        }
        views = [
            _row(row["track_id"], name, _score(score, folder), None, codec.replace("_", "-"))
            for row in pairs
            for codec, score in row["probs"].items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        cause = f"{printable(folder)}: not the public runner's files ({brief(error)})"
        raise CommandError(f"{cause}: give the folder of one of its models", USAGE) from error
    rows = []
    for track in tracks:
        score = score_of.get(track["id"])
        absent = {"kind": "absent", "message": "not in its files", "stage": "resolve"}
        problem = None if score is not None else error_of.get(track["id"], absent)
        rows.append(_row(track["id"], name, score, problem))
    if all(row["error"] and row["error"]["kind"] == "absent" for row in rows):
        cause = f"{printable(folder)}: none of its track ids is in the manifest"
        raise CommandError(f"{cause}: give the manifest that it was run on", USAGE)
    return rows, views


def _row(
    track: str, name: str, score: float | None, error: Any, change: str = ""
) -> dict[str, Any]:
    row = {"id": track, "detector": name} | ({"stress": change} if change else {})
    return row | {"score": score, "segments": [], "error": error, "seconds": None}


def read_per_source(path: str) -> dict[str, dict[str, Any]]:
    """A `per_source.json`. CommandError: it is none."""
    data = _load(path)
    if isinstance(data, dict) and all(isinstance(row, dict) for row in data.values()):
        return data
    raise CommandError(f"{printable(path)}: not a per_source.json: give one", USAGE)


def _score(value: Any, folder: str) -> float:
    if isinstance(value, (int, float)) and 0 <= value <= 1:
        return float(value)
    cause = f"{printable(folder)}: the score {printable(repr(value))[:40]} is not in [0, 1]"
    raise CommandError(f"{cause}: leave this detector out", USAGE)


def _read(folder: str, name: str, needed: bool = True) -> list[dict[str, Any]]:
    path = os.path.join(folder, name)
    if not needed and not os.path.exists(path):
        return []
    data = _load(path)
    if not isinstance(data, list):
        raise CommandError(f"{printable(path)}: it is no list: copy it again", USAGE)
    return data


def _load(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        cause = f"{printable(path)}: {error.strerror}"
        raise CommandError(f"{cause}: give the public runner's output", USAGE) from error
    except ValueError as error:
        raise CommandError(f"{printable(path)}: not JSON: copy it again", USAGE) from error
