"""Decoders and notices in every result: whatever the source, the plan, the order, the company."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr

from artifactnet_jax import decode, decoders, recording
from artifactnet_jax import fingerprint as fp
from artifactnet_jax.audio import SegmentReader
from artifactnet_jax.catalogue import Folder
from artifactnet_jax.config import Decision, FrontEnd
from artifactnet_jax.decision import WITNESSES, Span
from artifactnet_jax.detector import Detector
from artifactnet_jax.results import Verdict, as_schema_1, to_json
from artifactnet_jax.text import CommandError
from audio_files import carrying, encode, noise, write

RATE = fp.RATE
NAME = "MusicGen"


@pytest.fixture(scope="module")
def generated() -> np.ndarray:
    """Seven segments that carry MusicGen's lines."""
    return carrying(NAME, 25)


def said(result: Any) -> tuple[Any, ...]:
    """Everything that a row says of decoders."""
    assert isinstance(result, Verdict)
    return result.decoder, result.decoder_reason, result.bank


def same(a: fp.Accumulator | None, b: fp.Accumulator | None) -> bool:
    assert a is not None
    assert b is not None
    return (a.samples, a.frames, len(a.windows)) == (b.samples, b.frames, len(b.windows)) and all(
        (x.frames, x.log.tobytes(), x.power.tobytes())
        == (y.frames, y.log.tobytes(), y.power.tobytes())
        for x, y in zip(a.windows, b.windows, strict=True)
    )


# --- The spectrum beside the segments -------------------------------------------------------------


def spectrum_of(samples: np.ndarray) -> fp.Accumulator:
    out = fp.Accumulator()
    out.add(samples)
    return out


def read(source: Any, plan: Any = "all", **options: Any) -> SegmentReader:
    reader = SegmentReader(source, FrontEnd(), Decision(), plan, fingerprint=True, **options)
    for _ in reader:
        pass
    return reader


@pytest.mark.parametrize(
    ("plan", "counted", "suffix"),
    [("all", False, "wav"), ("first60", True, "mp3"), (3, True, "wav"), ("all", True, "mp3")],
)
def test_the_spectrum_is_that_of_all_that_is_read(tmp_path, monkeypatch, plan, counted, suffix):
    monkeypatch.setattr(recording, "_BLOCK_VALUES", 20_001)
    low = 24_000
    path = write(tmp_path, f"a.{suffix}", noise(61, low, channels=1), low)
    reader = read(path, plan, counted=counted)
    with decode.open_audio(path) as decoded:
        samples = np.concatenate(list(decoded.blocks)).mean(axis=1, dtype=np.float64)
    mono = np.clip(soxr.resample(samples.astype(np.float32), low, RATE, "HQ"), -1, 1)
    expected = mono[: 60 * RATE] if plan == "first60" else mono
    assert same(reader.spectrum, spectrum_of(expected))
    list(reader)  # another iteration begins anew
    assert same(reader.spectrum, spectrum_of(expected))


def test_no_spectrum_where_none_is_wanted_or_the_rate_is_another():
    source = noise(5), RATE
    assert read(source).spectrum is not None
    reader = SegmentReader(source, FrontEnd(), Decision())
    list(reader)
    assert reader.spectrum is None
    other = FrontEnd(sample_rate=16_000, segment_samples=64_000)
    reader = SegmentReader(source, other, Decision(), fingerprint=True)
    list(reader)
    assert reader.spectrum is None


# --- What a verdict says --------------------------------------------------------------------------


def test_a_decoder_is_named_and_changes_nothing_else(weights_path, generated):
    verdict = Detector(weights_path, "numpy").score(generated, RATE)
    assert verdict.decoder is not None
    assert verdict.decoder.name == NAME
    assert (verdict.decoder.speed, verdict.decoder.rivals) == (1.0, ())
    assert verdict.decoder.p < 1e-3
    assert [w.start_s for w in verdict.decoder.windows] == [0.0, pytest.approx(20.06, abs=0.01)]
    assert verdict.decoder_reason is None
    bank = decoders.load()
    assert verdict.bank == {"sha256": bank.digest, "decoders": len(bank.decoders)}
    without = Detector(weights_path, "numpy", banks=()).score(generated, RATE)
    assert said(without) == (None, "no bank was asked", None)
    assert (without.score, without.verdict) == (verdict.score, verdict.verdict)
    assert without.segments == verdict.segments


def test_what_cannot_be_matched_says_why(detector):
    for samples, reason in (
        (noise(2), "too short"),
        (noise(8), "like real music"),
        (np.zeros(8 * RATE, np.float32), "silent"),
    ):
        verdict = detector.score(samples, RATE)
        assert verdict.decoder is None
        assert reason in verdict.decoder_reason
        assert verdict.bank == detector.asked
    outcome = decoders.match(None, detector.bank)
    assert outcome.match is None
    assert "do not read audio at 44100 Hz" in outcome.reason


def test_all_sources_all_ways_the_same_bits(weights_path, generated, tmp_path):
    """Files, streams, arrays; batches, threads, order, blocks; segments left out."""
    path = write(tmp_path, "g.wav", generated)
    other = write(tmp_path, "o.wav", noise(9))
    built = Detector(weights_path, "numpy")
    expected = said(built.score(path))
    assert expected[0].name == NAME
    sources: list[Any] = [path, other, io.BytesIO(encode(generated, "flac")), (generated, RATE)]
    sources += [(generated / 32768, RATE)]
    for batch_size, jobs in ((1, 1), (2, 3), (5, 4)):
        built.backend.batch_size, built.jobs = batch_size, jobs
        found = dict(built.score_many(sources))
        assert [said(found[i]) == expected for i in range(5)] == [True, False, True, True, True]
    for options in ({"segments": 3}, {"until_decided": True}, {"segments": "first60"}):
        assert said(Detector(weights_path, "numpy", **options).score(path)) == expected


def test_blocks_of_any_size_the_same_match(detector, generated, tmp_path, monkeypatch):
    path = write(tmp_path, "g.wav", generated)
    expected = said(detector.score(path))
    for size in (1_000, 65_537):
        monkeypatch.setattr(recording, "_BLOCK_VALUES", size)
        assert said(detector.score(path)) == expected


# --- Banks of one's own ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A bank with one decoder."""
    path: Path = tmp_path_factory.mktemp("bank") / "own.npz"
    bank = decoders.load()
    decoders.save(bank.only([[d.name for d in bank.decoders].index("Suno")]), path)
    return path


def test_banks_are_joined(weights_path, own):
    embedded, mine = decoders.load(), decoders.load(own)
    built = Detector(weights_path, "numpy", banks=["embedded", own])
    assert built.bank.decoders == (*embedded.decoders, *mine.decoders)
    assert built.bank.digest not in (embedded.digest, mine.digest, "")
    alone = Detector(weights_path, "numpy", banks=[mine])
    assert alone.asked == {"sha256": mine.digest, "decoders": 1}
    assert Detector(weights_path, "numpy").bank is Detector(weights_path, "numpy").bank
    for none in ((), None):
        assert Detector(weights_path, "numpy", banks=none).bank is None


def test_score_asks_the_banks_that_it_is_told(score, own, tracks):
    track = tracks / "a.wav"
    embedded, mine = decoders.load(), decoders.load(own)
    for options, count in (((), 0), (("--bank", own), 1), (("--bank", own, "--bank", own), 1)):
        (row,) = score(*options, track).rows.values()
        assert row["bank"]["decoders"] == len(embedded.decoders) + count
    assert row["bank"]["sha256"] == decoders.join(embedded, mine).digest
    (row,) = score("--no-decoder", track).rows.values()
    assert (row["bank"], row["decoder"]) == (None, None)
    assert row["decoder_reason"] == "no bank was asked"


def test_a_bank_that_cannot_be_used_is_a_usage_error(command, weights_path, own, tracks, tmp_path):
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(own.read_bytes()[:-40])
    track = tracks / "a.wav"
    for verb in (["score"], ["live"], ["report", "-o", tmp_path / "out"]):
        for bank, words in ((damaged, "damaged.npz: "), (tmp_path / "none", "check the path")):
            done = command(*verb, "--weights", weights_path, "--bank", bank, track)
            assert (done.code, done.out) == (2, "")
            assert words in done.err
            assert done.err.count("\n") == 1
    done = command("score", "--no-decoder", "--bank", own, track)
    assert done.code == 2
    assert "not allowed with" in done.err


def test_a_run_goes_on_with_the_bank_that_it_began_with(score, own, tracks, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert score("-o", out, tracks / "a.wav").code == 0
    for options in (("--bank", own), ("--no-decoder",)):
        done = score("--resume", "-o", out, *options, tracks)
        assert done.code == 2
        assert "has rows with other bank: " in done.err
    row = json.loads(out.read_text())
    for key in ("decoder", "decoder_reason", "bank", "fine", "fine_reason", "notices"):
        del row[key]
    old = json.dumps(row) + "\n"  # of a version that knew no decoders
    for options in (("--bank", own), ("--no-decoder",), ()):
        out.write_text(old)
        assert score("--resume", "-o", out, *options, tracks).code == 0
        assert out.read_text().startswith(old)
        assert len(out.read_text().splitlines()) == 3


def test_people_read_whose_lines_they_are(score, generated, tmp_path):
    path = write(tmp_path, "g.wav", generated)
    table = score("--format", "table", path).out
    assert table.splitlines()[1].endswith("g.wav  (lines of MusicGen's decoder)")


def test_decoders_and_notices_come_back_from_parquet(tmp_path, detector):
    dataset = pytest.importorskip("pyarrow.dataset")
    match = decoders.Match(
        "Suno", 9.5, 1e-9, 1.04, (5e3, 16e3), (decoders.WindowMatch(0, 20.06, 9, 1e-6),), ("X",)
    )
    verdict = dataclasses.replace(
        detector.score(noise(4), 44_100),
        decoder=match,
        decoder_reason=None,
        notices=("tag x: suno",),
        **{"verdict": "partly-ai", "band": (0.2, 0.5), "reason": "x", "prior": 0.5},
        evidence=dict.fromkeys(WITNESSES, 0.25),
        **{"spans": (Span(4.0, 36.0, 0.9),), "ai_share": 0.5},
    )
    row = json.loads(to_json(verdict.to_dict()))
    decoders_keys = ("decoder", "decoder_reason", "bank", "notices")
    decision_keys = ("band", "reason", "prior", "evidence", "spans", "ai_share")
    old = {k: v for k, v in as_schema_1(row).items() if k not in decoders_keys}
    folder = Folder(str(tmp_path / "out"))
    folder.begin({"plan": "all"}, resume=False)
    for name, one in (("new", row), ("old", old)):
        folder.add({**one, "path": name, "sha256": "0" * 64})
    folder.flush()
    found = {
        one["path"]: one
        for one in dataset.dataset(tmp_path / "out", partitioning="hive").to_table().to_pylist()
    }
    for key in (*decoders_keys, *decision_keys):
        assert found["new"][key] == row[key]
        assert found["old"][key] is None
    assert [found[name]["verdict"] for name in ("new", "old")] == ["partly-ai", "ai"]
    # A folder of a version that knew no banks may be gone on with, by any bank.
    Folder(str(tmp_path / "out")).begin({"plan": "all", "bank": row["bank"]}, resume=True)
    with pytest.raises(CommandError, match="other bank"):
        Folder(str(tmp_path / "out")).begin({"plan": "all", "bank": None}, resume=True)
