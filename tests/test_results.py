"""Rows in every format, and the two aggregation rules."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from typing import get_args

import numpy as np
import pytest

from artifactnet_jax import decision, results
from artifactnet_jax.decision import Span
from artifactnet_jax.decoders import Match, WindowMatch
from artifactnet_jax.results import Failure, SegmentScore, Verdict, aggregate
from artifactnet_jax.text import printable

VERDICT = Verdict(
    path="song.wav",
    verdict="ai",
    score=0.75,
    threshold=0.5,
    segments=(SegmentScore(0.0, 0.5), SegmentScore(4.0, 1.0)),
    duration_s=8.5,
    sample_rate=48_000,
    channels=2,
    weights={"name": "w", "sha256": "ab" * 32, "preset": "edge"},
    backend="numpy",
    dtype="float32",
    aggregate="median",
    plan="all",
    warnings=("resampled", "clipped"),
    timings={"decode_s": 0.1, "compute_s": 0.2},
    decoder_reason="too short",
    bank={"sha256": "cd" * 32, "decoders": 25},
    fine=results.Fine(-1.5),
    notices=("tag comment: made with Suno",),
)
MATCH = Match(
    name="Suno",
    z=12.5,
    p=3e-9,
    speed=1.04,
    band_hz=(5000.0, 16000.0),
    windows=(WindowMatch(0.0, 20.06, 9.25, 1e-6),),
    rivals=("MusicGen",),
    decoder=3,
)
FUSED = dataclasses.replace(
    VERDICT,
    verdict="partly-ai",
    score=0.5,
    band=(0.25, 0.5),
    reason="because",
    prior=0.5,
    evidence={"base": -1.0, "segments": 0.5, "fine": 0.25, "decoder": 0.25, "prior": 0.0},
    spans=(Span(32.0, 64.0, 0.97),),
    ai_share=0.5,
)
FAILURE = Failure("bad.mp3", "empty", "bad.mp3: the file has 0 bytes: copy it again")
NEWEST = (
    *("ai_share", "spans", "reason", "prior"),
    *("evidence_segments", "evidence_fine", "evidence_decoder"),
)
NASTY = [
    "naïve 音.wav",
    "two\nlines.wav",
    "\udcff\udcfe.wav",
    'quote",comma.wav',
    "bell\a\r\x1b[31m",
]


def records(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_a_row_is_the_documented_schema():
    assert VERDICT.to_dict() == {
        "schema": "artifactnet-jax/score/2",
        "path": "song.wav",
        "verdict": "ai",
        "score": 0.75,
        "threshold": 0.5,
        "operating_point": None,
        "margin": 0.0,
        "band": None,
        "reason": None,
        "prior": None,
        "evidence": None,
        "spans": [],
        "ai_share": None,
        "n_segments": 2,
        "segments": [{"start_s": 0.0, "score": 0.5}, {"start_s": 4.0, "score": 1.0}],
        "duration_s": 8.5,
        "sample_rate": 48_000,
        "channels": 2,
        "weights": {"name": "w", "sha256": "ab" * 32, "preset": "edge"},
        "backend": "numpy",
        "dtype": "float32",
        "aggregate": "median",
        "plan": "all",
        "warnings": ["resampled", "clipped"],
        "timings": {"decode_s": 0.1, "compute_s": 0.2},
        "decoder": None,
        "decoder_reason": "too short",
        "bank": {"sha256": "cd" * 32, "decoders": 25},
        "fine": {"logit": -1.5},
        "fine_reason": None,
        "notices": ["tag comment: made with Suno"],
    }
    head = ["schema", "path", "verdict", "score", "threshold", "operating_point"]
    assert list(VERDICT.to_dict())[: len(head)] == head
    row = FUSED.to_dict()
    assert row["band"] == [0.25, 0.5]
    assert row["spans"] == [{"start_s": 32.0, "end_s": 64.0, "score": 0.97}]
    assert (row["reason"], row["prior"], row["ai_share"]) == ("because", 0.5, 0.5)
    assert sum(row["evidence"].values()) == 0.0
    assert FAILURE.to_dict() == {
        "schema": "artifactnet-jax/score/2",
        "path": "bad.mp3",
        "error": {"kind": "empty", "message": FAILURE.message},
    }


@pytest.mark.parametrize("path", NASTY)
def test_json_is_one_ascii_line_and_comes_back(path):
    row = dataclasses.replace(VERDICT, path=path).to_dict()
    line = results.to_json(row)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line) == row
    assert results.from_json(line.encode() + b"\n") == row


def test_json_has_no_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.to_json({"score": math.nan})


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"null\n",
        b"[]\n",
        b"\xff\xfe\n",
        b'{"schema": "artifactnet-jax/score/2"}\n',
        b'{"schema": "artifactnet-jax/score/2", "path": 3}\n',
        b'{"schema": "another/1", "path": "a"}\n',
        results.to_json(VERDICT.to_dict()).encode()[:-1],
    ],
)
def test_what_is_not_a_row_is_not_taken_for_one(line):
    assert results.from_json(line) is None


def test_csv_columns():
    text = results.to_csv(None) + results.to_csv(VERDICT.to_dict())
    assert records(text + results.to_csv(FAILURE.to_dict())) == [
        {
            "path": "song.wav",
            "verdict": "ai",
            "score": "0.75",
            "threshold": "0.5",
            "n_segments": "2",
            "duration_s": "8.5",
            "sample_rate": "48000",
            "channels": "2",
            "warnings": "resampled clipped",
            "weights": "ab" * 32,
            "backend": "numpy",
            "dtype": "float32",
            "error_kind": "",
            "error": "",
            "operating_point": "",
            "margin": "0.0",
            **dict.fromkeys(("decoder", "decoder_z", "decoder_p", "decoder_speed"), ""),
            "notices": "tag comment: made with Suno",
            **dict.fromkeys(NEWEST, ""),
        },
        {
            **dict.fromkeys(results.CSV_COLUMNS, ""),
            "path": "bad.mp3",
            "error_kind": "empty",
            "error": FAILURE.message,
        },
    ]


@pytest.mark.parametrize("path", NASTY)
def test_any_name_is_one_csv_record_and_one_table_line(path):
    row = dataclasses.replace(VERDICT, path=path).to_dict()
    (record,) = records(results.to_csv(None) + results.to_csv(row))
    assert record["path"] == printable(path, keep="\n")
    assert record["error"] == ""
    line = results.to_table(row)
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert printable(path) in line
    (line + results.to_csv(row)).encode()  # surrogates would raise


def test_table_lines():
    assert results.TABLE_HEADER.split() == ["verdict", "score", "segments", "length", "track"]
    line = results.to_table(VERDICT.to_dict())
    assert line.split() == ["AI", "0.750", "2", "0:08.5", "song.wav", "(resampled,", "clipped)"]
    assert results.to_table(FAILURE.to_dict()).split(maxsplit=4) == [
        *("error", "-", "-", "-"),
        FAILURE.message + "\n",
    ]
    silent = dataclasses.replace(VERDICT, verdict="undecided", score=None, segments=())
    assert results.to_table(silent.to_dict()).split()[:3] == ["undecided", "-", "0"]
    assert json.loads(results.to_json(silent.to_dict()))["score"] is None
    assert records(results.to_csv(None) + results.to_csv(silent.to_dict()))[0]["score"] == ""


def test_a_row_with_a_decoder():
    row = dataclasses.replace(VERDICT, decoder=MATCH, decoder_reason=None).to_dict()
    sentence = row["decoder"].pop("sentence")
    assert row["decoder"] == {
        "name": "Suno",
        "z": 12.5,
        "p": 3e-9,
        "speed": 1.04,
        "band_hz": [5000.0, 16000.0],
        "windows": [{"start_s": 0.0, "end_s": 20.06, "z": 9.25, "p": 1e-6}],
        "rivals": ["MusicGen"],
    }
    assert json.loads(results.to_json(row)) == row
    assert sentence == (
        "its spectrum carries the lines of Suno's or MusicGen's decoder, sped up by 4.0 %; "
        "fewer than 1 in 1,000 real tracks does"
    )
    (record,) = records(results.to_csv(None) + results.to_csv(row))
    columns = ("decoder", "decoder_z", "decoder_p", "decoder_speed")
    assert [record[column] for column in columns] == ["Suno", "12.5", "3e-09", "1.04"]
    newer = ("operating_point", "margin", *columns, "notices")
    assert results.CSV_COLUMNS[-7 - len(NEWEST) :] == newer + NEWEST
    line = results.to_table(row)
    assert line.endswith("song.wav  (resampled, clipped, lines of Suno's or MusicGen's decoder)\n")


def test_what_is_said_of_a_decoder_accuses_nobody():
    plain = dataclasses.replace(MATCH, rivals=(), speed=1.0)
    said = (
        "its spectrum carries the lines of Suno's decoder; fewer than 1 in 1,000 real tracks does"
    )
    assert results.sentence(plain) == said
    assert "slowed down by 3.5 %" in results.sentence(dataclasses.replace(plain, speed=0.965))
    assert "\\x1b" in results.sentence(dataclasses.replace(plain, name="a\x1b"))


# --- The schema before this one, and words for people ---------------------------------------------

OLD_WORDS = {
    **{"ai": "ai", "partly-ai": "ai", "real": "real"},
    **dict.fromkeys(("unclear", "undecided"), "undecided"),
}


@pytest.mark.parametrize(("word", "old"), OLD_WORDS.items())
def test_a_row_of_schema_1_is_what_it_was(word, old):
    row = dataclasses.replace(FUSED, verdict=word).to_dict()
    plain = VERDICT.to_dict() | {"schema": "artifactnet-jax/score/1", "verdict": old, "score": 0.5}
    for key in ("band", "reason", "prior", "evidence", "spans", "ai_share"):
        del plain[key]
    assert list(results.as_schema_1(row).items()) == list(plain.items())  # in the order it had
    assert results.as_schema_1(plain) == plain
    line = results.to_json(plain).encode() + b"\n"
    assert results.from_json(line) == plain
    assert results.to_table(plain).split()[0] in ("AI", "no", "undecided")


def test_a_failure_of_schema_1_is_a_failure():
    old = results.as_schema_1(FAILURE.to_dict())
    assert old == FAILURE.to_dict() | {"schema": "artifactnet-jax/score/1"}


def test_csv_of_schema_1_has_the_columns_it_had():
    row = results.as_schema_1(FUSED.to_dict())
    (record,) = records(results.to_csv(None, 1) + results.to_csv(row, 1))
    assert tuple(record) == results.CSV_COLUMNS[: -len(NEWEST)]
    assert (record["verdict"], record["notices"]) == ("ai", "tag comment: made with Suno")


def test_csv_of_evidence_and_spans():
    row = dataclasses.replace(FUSED, spans=(*FUSED.spans, Span(100.0, 120.5, 0.9))).to_dict()
    (record,) = records(results.to_csv(None) + results.to_csv(row))
    assert record["verdict"] == "partly-ai"  # the plain word: programs read it
    assert [record[column] for column in NEWEST] == [
        *("0.5", "32-64; 100-120.5", "because", "0.5"),
        *("0.5", "0.25", "0.25"),
    ]


def test_people_read_words_of_their_own():
    assert results.WORDS["real"] == "no sign of AI"
    assert set(results.WORDS) == set(get_args(decision.VerdictWord))
    for word, text in results.WORDS.items():
        row = dataclasses.replace(FUSED, verdict=word).to_dict()
        line = results.to_table(row)
        assert line.startswith(f"{text:<13} ")
        assert ("AI from 0:32 to 1:04" in line) == (word == "partly-ai")
        assert "because" in line
        assert results.in_words(row)["verdict"] == text
    silent = dataclasses.replace(
        FUSED, verdict="undecided", reason="silent: x", warnings=("silent",)
    )
    assert results.to_table(silent.to_dict()).endswith("song.wav  (silent: x)\n")
    assert results.in_words(FAILURE.to_dict()) == FAILURE.to_dict()


def test_stretches_in_words():
    assert results.where([]) == ""
    spans = [{"start_s": 0.0, "end_s": 24.0}, {"start_s": 3600.0, "end_s": 3636.5}]
    assert results.where(spans) == "AI from 0:00 to 0:24, from 1:00:00 to 1:00:36"


def test_what_an_older_row_means_by_its_silence():
    expected = {"bank": {"sha256": "x"}, "band": [0.2, 0.5], "prior": 0.01, "margin": 0.0}
    known = results.filled({"threshold": 0.5}, expected)
    assert known == expected | {"threshold": 0.5, "prior": 0.5}  # 50:50, before one could say
    assert results.filled({}, {"prior": None})["prior"] is None
    assert results.filled({"prior": 0.2, "bank": None}, expected)["bank"] is None


def test_rows_that_are_older_than_decoders_are_read():
    row = VERDICT.to_dict()
    for key in ("decoder", "decoder_reason", "bank", "fine", "fine_reason", "notices"):
        del row[key]
    assert results.from_json(results.to_json(row).encode()) == row
    (record,) = records(results.to_csv(None) + results.to_csv(row))
    assert [record[column] for column in results.CSV_COLUMNS[-5 - len(NEWEST) :]] == [""] * 12
    assert results.to_table(row) == results.to_table(VERDICT.to_dict())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00.0"), (59.96, "1:00.0"), (61.04, "1:01.0"), (7205.5, "120:05.5")]
)
def test_lengths(seconds, text):
    row = dataclasses.replace(VERDICT, duration_s=seconds).to_dict()
    assert results.to_table(row).split()[3] == text


def test_printable():
    assert printable("a b é 音") == "a b é 音"
    assert printable("a\nb\x1b\udcff\u202e") == "a\\nb\\x1b\\udcff\\u202e"
    assert printable("a\nb\r", keep="\n") == "a\nb\\r"


@pytest.mark.parametrize(
    ("scores", "median"),
    [
        ([0.3], 0.3),
        ([0.9, 0.1], 0.5),
        ([0.9, 0.2, 0.4], 0.4),
        ([1.0, 0.25, 0.0, 0.5], 0.375),
        ([0.1, 0.1, 0.1, 0.9, 0.9], 0.1),
    ],
)
def test_median(scores, median):
    assert aggregate(scores, [1.0] * len(scores), "median", 1e-9) == median
    assert median == np.median(scores)


def test_rms_by_hand():
    # (0.5 * 1 + 0.25 * 3) / 4, but for the epsilon in the sum of weights
    assert aggregate([0.5, 0.25], [1.0, 3.0], "rms", 0.0) == 0.3125
    assert aggregate([0.5, 0.25], [1.0, 3.0], "rms", 1.0) == pytest.approx(0.25, rel=1e-15)
    assert aggregate([1.0], [1e-9], "rms", 1e-9) == pytest.approx(0.5, rel=1e-15)


def test_rms_is_clipped():
    # Rounded weights that add up to more than one.
    assert aggregate([1.0] * 4, [1.1, 1.1, 0.1, 0.2], "rms", 0.0) == 1.0


def test_rms_as_numpy_computes_it():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 60, 1000):
        p, w = rng.random(n, np.float32), rng.random(n, np.float32) ** 3
        wide = w.astype(np.float64)
        expected = np.clip((p.astype(np.float64) * (wide / (wide.sum() + 1e-9))).sum(), 0, 1)
        got = aggregate(p.tolist(), w.tolist(), "rms", 1e-9)
        assert got == pytest.approx(expected, rel=1e-14)
        assert aggregate([1.0] * n, w.tolist(), "rms", 1e-9) <= 1
        assert aggregate([1.0] * n, w.tolist(), "rms", 0.0) <= 1
        assert aggregate([0.0] * n, w.tolist(), "rms", 1e-9) == 0
