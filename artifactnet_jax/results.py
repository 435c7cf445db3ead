"""Results: the verdict on a track, the failure of one, and how both are written.

One result is one row. JSON Lines rows follow the schema `artifactnet-jax/score/2`; csv and table
are views of the same rows. Rows of the schema before it are read, and written where they are asked
for. Programs read the plain word of a verdict, people read `WORDS`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from artifactnet_jax.decision import EVEN, Span, VerdictWord
from artifactnet_jax.decoders import FOUND, Match
from artifactnet_jax.text import clock, printable

SCHEMA = "artifactnet-jax/score/2"
SCHEMA_1 = "artifactnet-jax/score/1"
# What schema 1 does not have, and its words for verdicts that it does not have.
_NOT_IN_1 = ("band", "reason", "prior", "evidence", "spans", "ai_share")
_IN_1 = {"partly-ai": "ai", "unclear": "undecided"}

# What people read. A verdict of "real" is no certificate: nothing was found, and that is all.
WORDS: dict[str, str] = {
    "ai": "AI",
    "partly-ai": "partly AI",
    "unclear": "unclear",
    "real": "no sign of AI",
    "undecided": "undecided",
}


@dataclasses.dataclass(frozen=True)
class SegmentScore:
    """P(AI) of one 4 s segment."""

    start_s: float
    score: float


@dataclasses.dataclass(frozen=True)
class Fine:
    """What the head for decoders in no bank says of the fine spectrum: high for a decoder."""

    logit: float


# Keys of a row that are there where they say something, and what they are where they do not.
_OPTIONAL = {"skipped": None, "lost_s": 0.0, "track": None, "file": None}


@dataclasses.dataclass(frozen=True, repr=False)
class Verdict:
    """What the detector says of one track.

    `verdict` is "partly-ai" where a stretch of the track is AI and the whole is not, "unclear"
    where the score lies in `band`, and "undecided" where there is too little to judge: `reason`
    says what is missing. `score` is None when the whole input is silent. It is a calibrated
    probability where `prior` is not None; it is not evidence by itself.
    """

    path: str
    verdict: VerdictWord
    score: float | None  # in [0, 1]
    threshold: float
    segments: tuple[SegmentScore, ...]
    duration_s: float
    sample_rate: int  # Hz, of the source
    channels: int  # of the source
    weights: dict[str, str]
    backend: str
    dtype: str
    aggregate: str  # "graph": by a whole-song graph itself, which shows no segment scores
    plan: int | str  # of segments: "all", "first60" or a count
    warnings: tuple[str, ...] = ()
    timings: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds
    operating_point: str | None = None  # what the threshold was called, where a name was given
    margin: float = 0.0  # log-odds
    band: tuple[float, float] | None = None  # scores that are "unclear": from, and below
    reason: str | None = None  # of "undecided", and what to do with "unclear"
    # Share of AI among the tracks that `score` is meant for; None where it is not calibrated.
    prior: float | None = None
    evidence: dict[str, float] | None = None  # log-odds of each witness; they add up to the score
    spans: tuple[Span, ...] = ()  # stretches that are AI
    ai_share: float | None = None  # of the length; None where stretches were not looked for
    # Audible segments that were not scored because they could not change the verdict any more
    # (`score` is the median of the others); None where all are scored in any case.
    skipped: int | None = None
    # Whose decoder's lines the track carries. It counts where `evidence` has it, else not at all.
    decoder: Match | None = None
    decoder_reason: str | None = None  # why there is no match
    bank: dict[str, Any] | None = None  # that was asked: sha256, and number of decoders
    fine: Fine | None = None  # of all decoders; it counts where `evidence` has it
    fine_reason: str | None = None  # why it says nothing
    notices: tuple[str, ...] = ()  # what the file says of itself; no evidence of the sound
    lost_s: float = 0.0  # seconds of a lossy file that are damaged, and left out
    track: str | None = None  # which of several audio tracks, such as "2 of 3"
    # Of the file that was read: size in bytes, time of change in ns since 1970, sha256.
    file: dict[str, Any] | None = None

    def __repr__(self) -> str:
        score = "no score" if self.score is None else f"{self.score:.4f}"
        told = f", {' '.join(self.warnings)}" if self.warnings else ""
        length = f"{len(self.segments)} segments of {self.duration_s:.1f} s{told}"
        return f"<Verdict {self.verdict}, {score}: {printable(self.path)}, {length}>"

    def to_dict(self) -> dict[str, Any]:
        """The row as written to JSON."""
        row = dataclasses.asdict(self)
        for key, nothing in _OPTIONAL.items():
            if row[key] == nothing:
                del row[key]
        head = {"schema": SCHEMA, "path": row.pop("path"), "verdict": row.pop("verdict")}
        head |= {"score": row.pop("score"), "threshold": row.pop("threshold")}
        head |= {key: row.pop(key) for key in ("operating_point", "margin")}
        row |= {key: list(row[key]) for key in ("segments", "warnings", "notices", "spans")}
        row["band"] = None if self.band is None else list(self.band)
        row["decoder"] = None if self.decoder is None else decoder_row(self.decoder)
        return head | {"n_segments": len(self.segments)} | row


def decoder_row(match: Match) -> dict[str, Any]:
    """A match as rows have it."""
    row = dataclasses.asdict(match)
    del row["decoder"]  # its place in the bank
    row |= {key: list(row[key]) for key in ("band_hz", "windows", "rivals")}
    return row | {"sentence": sentence(match)}


def sentence(match: Match) -> str:
    """What people are told of a match, in the words that they are told it everywhere.

    "1 in 1,000" whatever p is: what p says beyond that is a model's word, not a count.
    """
    text = f"its spectrum carries the lines of {_whose(match.name, match.rivals)}"
    if match.speed != 1:
        way = "sped up" if match.speed > 1 else "slowed down"
        text += f", {way} by {abs(100 * (match.speed - 1)):.1f} %"
    return f"{text}; fewer than 1 in {round(1 / FOUND):,} real tracks does"


def _whose(name: str, rivals: Iterable[str]) -> str:
    """The decoder that a match names, and those that cannot be told from it."""
    return " or ".join(f"{printable(one)}'s" for one in (name, *rivals)) + " decoder"


@dataclasses.dataclass(frozen=True)
class Failure:
    """An input that could not be scored: a row like any other, never a made-up score.

    `kind` is that of the AudioError, or "model" (a score outside [0, 1]), or "internal" (a bug).
    """

    path: str
    kind: str
    message: str

    def to_dict(self) -> dict[str, Any]:
        """The row as written to JSON."""
        error = {"kind": self.kind, "message": self.message}
        return {"schema": SCHEMA, "path": self.path, "error": error}


def aggregate(scores: list[float], rms: list[float], rule: str, rms_eps: float) -> float:
    """Song score of segment scores.

    "median" is the rule of the paper and the public runner; "rms" is the raw-song graph's mean
    weighted by each segment's RMS, in float64, its weights being rms / (sum + rms_eps); "mean" is
    the plain one.
    """
    if rule == "median":
        ordered, half = sorted(scores), len(scores) // 2
        return ordered[half] if len(scores) % 2 else (ordered[half - 1] + ordered[half]) / 2
    if rule == "mean":
        return min(1.0, math.fsum(scores) / len(scores))
    total = math.fsum(rms) + rms_eps
    if total == 0:  # digital silence, and nothing added
        return 0.0
    return min(1.0, math.fsum(p * w / total for p, w in zip(scores, rms, strict=True)))


def to_json(row: dict[str, Any]) -> str:
    """One line of strict JSON; surrogates of undecodable file names are escaped."""
    return json.dumps(row, allow_nan=False)


def from_json(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds; None when it holds none of this schema or the one before it."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    ours = isinstance(row, dict) and row.get("schema") in (SCHEMA, SCHEMA_1)
    return row if ours and isinstance(row.get("path"), str) else None


def as_schema_1(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as programs read it that know schema 1: "partly-ai" is "ai", "unclear" undecided."""
    old = {key: value for key, value in row.items() if key not in _NOT_IN_1} | {"schema": SCHEMA_1}
    if "verdict" in row:
        old["verdict"] = _IN_1.get(row["verdict"], row["verdict"])
    return old


def filled(row: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """A row with what it means by the keys that it is too old to have.

    Of a bank it says nothing, so that any goes with it. Its prior is the even one, if there is any.
    """
    said = {"margin": 0.0} | {key: expected.get(key) for key in ("bank", "band")}
    said["prior"] = None if expected.get("prior") is None else EVEN
    return said | dict(row)


CSV_COLUMNS = (
    *("path", "verdict", "score", "threshold", "n_segments", "duration_s", "sample_rate"),
    *("channels", "warnings", "weights", "backend", "dtype", "error_kind", "error"),
    # What is newer comes last, so that the columns before it keep their numbers.
    *("operating_point", "margin", "decoder", "decoder_z", "decoder_p", "decoder_speed"),
    "notices",
    *("ai_share", "spans", "reason", "prior"),
    *("evidence_segments", "evidence_fine", "evidence_decoder"),
)
_CSV_1 = CSV_COLUMNS[: CSV_COLUMNS.index("ai_share")]


def to_cells(row: dict[str, Any]) -> list[Any]:
    """What the row has in each of `CSV_COLUMNS`; None for nothing."""
    error, decoder = row.get("error", {}), row.get("decoder") or {}
    flat = {
        **row,
        "path": printable(row["path"], keep="\n"),
        "warnings": " ".join(row.get("warnings", [])),
        "weights": row.get("weights", {}).get("sha256", ""),
        "error_kind": error.get("kind", ""),
        "error": error.get("message", ""),
        "decoder": printable(decoder["name"]) if decoder else None,
        **{f"decoder_{key}": decoder.get(key) for key in ("z", "p", "speed")},
        "notices": "; ".join(row.get("notices", [])),
        "spans": "; ".join(f"{s['start_s']:g}-{s['end_s']:g}" for s in row.get("spans", [])),
        **{f"evidence_{key}": value for key, value in (row.get("evidence") or {}).items()},
    }
    return [flat.get(column) for column in CSV_COLUMNS]


def to_csv(row: dict[str, Any] | None, schema: int = 2) -> str:
    """One CSV record with its line end (RFC 4180); None gives the header."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    width = len(_CSV_1 if schema == 1 else CSV_COLUMNS)
    writer.writerow((CSV_COLUMNS if row is None else to_cells(row))[:width])  # None: nothing
    return out.getvalue()


def in_words(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the verdict as people read it."""
    return row | ({"verdict": WORDS[row["verdict"]]} if "verdict" in row else {})


def where(spans: Iterable[Mapping[str, Any]]) -> str:
    """Stretches that are AI, as people read them: "AI from 0:32 to 1:04"."""
    parts = [f"from {clock(span['start_s'])} to {clock(span['end_s'])}" for span in spans]
    return f"AI {', '.join(parts)}" if parts else ""


TABLE_HEADER = f"{'verdict':<13} {'score':>6} {'segments':>8} {'length':>9}  track\n"


def to_table(row: dict[str, Any]) -> str:
    """One line of the table that people read, with its line end."""
    if "error" in row:  # the message names the track
        return f"{'error':<13} {'-':>6} {'-':>8} {'-':>9}  {row['error']['message']}\n"
    score = "-" if row["score"] is None else f"{row['score']:.3f}"
    minutes, seconds = divmod(round(row["duration_s"], 1), 60)
    length = f"{int(minutes)}:{seconds:04.1f}"
    path = printable(row["path"])
    reason = row.get("reason") or ""
    said = [where(row.get("spans", []))] if row["verdict"] == "partly-ai" else []
    said += [reason] if reason else []
    said += [warning for warning in row["warnings"] if not reason.startswith(warning)]
    if decoder := row.get("decoder"):
        said.append(f"lines of {_whose(decoder['name'], decoder['rivals'])}")
    notes = f"  ({', '.join(said)})" if said else ""
    word = WORDS[row["verdict"]]
    return f"{word:<13} {score:>6} {row['n_segments']:>8} {length:>9}  {path}{notes}\n"
