"""What a benchmark found: scores and thresholds by detector, and every figure of metrics.json."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from artifactnet_jax import evaluation

SCHEMA = "artifactnet-jax/bench/1"
OPEN = ("unclear", "undecided")  # verdicts that leave it open
DEVELOPMENT = ("train", "dev", "development")  # splits
Row = Mapping[str, Any]


class Study:
    """Rows, scores and thresholds by detector, in the order in which detectors were given."""

    def __init__(
        self,
        rows: Sequence[Row],
        results: Sequence[Row],
        detectors: Sequence[Row],
        threshold: str | float | None,
        resamples: int,
        seed: int,
    ):
        if not detectors:
            raise ValueError("there is no detector to report on")
        self.names = [str(detector["name"]) for detector in detectors]
        self.details = dict(zip(self.names, detectors, strict=True))
        self.drawing = {"resamples": resamples, "seed": seed}
        known = {row["id"] for row in rows}
        self.results: dict[str, dict[Any, Row]] = {name: {} for name in self.names}
        for result in results:
            if result["detector"] in self.results and result["id"] in known:
                self.results[result["detector"]][result["id"]] = result
        self.scored = {name: self._scored(rows, self.results[name]) for name in self.names}
        rule = threshold if isinstance(threshold, str) else None
        self.rule = rule
        splits = Counter(row.get("split") or "" for row in rows)
        if rule and "calibration" not in splits:
            cause = f"threshold {rule!r} is chosen on the split 'calibration'"
            raise ValueError(f"{cause}, and no track is of it: give a number, as 0.5")
        left_out = "calibration" if set(splits) != {"calibration"} else None
        self.judged = {
            name: [row for row in own if row.get("split") != left_out]
            for name, own in self.scored.items()
        }
        self.splits = sorted(split for split in splits if split) if len(splits) > 1 else []
        if rule and not left_out:
            raise ValueError("every track is of the split 'calibration': none is left to judge")
        self.thresholds = {name: self._threshold(name, threshold) for name in self.names}

    def _scored(self, rows: Sequence[Row], own: Mapping[Any, Row]) -> list[dict[str, Any]]:
        return [{**row, "score": own.get(row["id"], {}).get("score")} for row in rows]

    def _threshold(self, name: str, threshold: str | float | None) -> tuple[float, str]:
        """Value and origin."""
        if threshold is None:
            return float(self.details[name].get("own_threshold", 0.5)), "the detector's own"
        if not isinstance(threshold, str):
            return float(threshold), "fixed"
        chosen = [row for row in self.scored[name] if row.get("split") == "calibration"]
        limit = (
            f"FPR <= {evaluation.RULES.get(threshold, 0):.0%} on {len(chosen)} calibration tracks"
        )
        try:
            return evaluation.choose_threshold(chosen, threshold), f"highest TPR at {limit}"
        except ValueError as error:
            if threshold not in evaluation.RULES:
                raise
            return 0.5, f"fixed, as none could be chosen: {error}"

    def notice(self) -> str:
        """What a reader must know of the tracks, "" nothing."""
        rows = self.judged[self.names[0]]
        named = [r for r in rows if r.get("development") or r.get("split") in DEVELOPMENT]
        if named:
            text = f"{len(named)} of the {len(rows)} judged tracks are development data"
            return f"{text}: what was made with them looks better here than it is."
        if not any(row.get("split") == "test" for row in rows):
            text = "No track is of a split named test. Where detectors or thresholds were developed"
            return f"{text} on these sources, the figures are better than they would be elsewhere."
        return ""

    def seconds(self, name: str) -> float | None:
        """Cost of a track."""
        if (stated := self.details[name].get("seconds")) is not None:
            return float(stated)
        spent = [r["seconds"] for r in self.results[name].values() if r.get("seconds") is not None]
        return float(statistics.median(spent)) if spent else None

    def decided(self, name: str) -> float | None:
        """Share of the judged tracks with a verdict whose verdict is not open."""
        own = self.results[name]
        said = [
            word for row in self.judged[name] if (word := own.get(row["id"], {}).get("verdict"))
        ]
        return sum(word not in OPEN for word in said) / len(said) if said else None

    def failures(self) -> list[dict[str, Any]]:
        """Judged tracks without a score, by detector and what kept them from one."""
        found = []
        for name in self.names:
            causes = defaultdict(list)
            for row in self.judged[name]:
                if row["score"] is None:
                    causes[_cause(self.results[name].get(row["id"]))].append(row)
            for (kind, message), rows in sorted(causes.items(), key=lambda c: -len(c[1])):
                entry = {"detector": name, "kind": kind, "message": message, "n": len(rows)}
                found.append(entry | {"example": str(rows[0]["id"])})
        return found

    def found(
        self, stress: Sequence[Row], sanity: Sequence[Row], mechanism: Sequence[Row]
    ) -> dict[str, Any]:
        """Everything, as metrics.json has it."""
        by_detector = {}
        for name in self.names:
            value, origin = self.thresholds[name]
            detail = self.details[name]
            entry: dict[str, Any] = {"params": detail.get("params"), "gflops": detail.get("gflops")}
            entry |= {"seconds_per_track": self.seconds(name), "decided": self.decided(name)}
            entry |= {"threshold": value, "threshold_origin": origin}
            entry["judged"] = evaluation.evaluate(self.judged[name], value, **self.drawing)
            entry["by_split"] = {
                split: evaluation.evaluate_rows(
                    [row for row in self.scored[name] if row.get("split") == split],
                    value,
                    **self.drawing,
                )
                for split in self.splits
            }
            if value != 0.5:
                entry["at_0.5"] = evaluation.evaluate_rows(self.judged[name], 0.5, **self.drawing)
            by_detector[name] = entry
        pairs = []
        for a, b in itertools.combinations(self.names, 2):
            pair = evaluation.evaluate_pair(
                self.judged[a],
                self.judged[b],
                threshold_a=self.thresholds[a][0],
                threshold_b=self.thresholds[b][0],
                **self.drawing,
            )
            pairs.append({"a": a, "b": b, **pair})
        return {
            "schema": SCHEMA,
            "notice": self.notice() or None,
            "detectors": by_detector,
            "comparisons": pairs,
            "failures": self.failures(),
            "stress": [dict(row) for row in stress],
            "sanity": [dict(row) for row in sanity],
            "mechanism": [dict(row) for row in mechanism],
        }


def _cause(result: Row | None) -> tuple[str, str]:
    """Kind and message of what kept a track from a score."""
    if result is None:
        return "missing", "there is no result"
    error = result.get("error")
    if isinstance(error, Mapping):
        return str(error.get("kind", "error")), str(error.get("message", ""))
    return "error", str(error or "no score and no reason")
