"""The verb `fingerprint`: decoders learnt, listed, matched and tested; and bad input."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from artifactnet_jax import decoders
from artifactnet_jax.decoder_learning import Rate
from artifactnet_jax.fingerprint_command import right, without
from made_decoder import RATE, coloured, combed


def write(path: Path, audio: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, audio, RATE, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def music(tmp_path_factory) -> Path:
    """Ten tracks of a made-up decoder on two pages, another one, two real ones; and bad files."""
    folder = tmp_path_factory.mktemp("music")
    for n in range(10):
        write(folder / f"page{n % 2}" / f"made {n}.wav", combed(n, 173.0, seconds=6))
    write(folder / "other" / "made.wav", combed(30, 173.0, 1.04, seconds=14))
    for n in range(2):
        write(folder / "other" / f"real {n}.wav", coloured(40 + n, 6))
    write(folder / "bad" / "short.wav", coloured(50, 2))
    write(folder / "bad" / "silent.wav", np.zeros(6 * RATE, np.float32))
    bins = np.fft.rfft(coloured(51, 6))
    bins[7_000 * 6 :] = 0
    write(folder / "bad" / "narrow.wav", np.fft.irfft(bins).astype(np.float32))
    (folder / "bad" / "broken.flac").write_bytes(b"no audio")
    return folder


@pytest.fixture(scope="module")
def bank(music, tmp_path_factory) -> Path:
    """A bank that the command has learnt from both pages."""
    from artifactnet_jax.cli import main

    path = tmp_path_factory.mktemp("bank") / "mine.npz"
    pages = [f"{music}/page0", f"{music}/page1"]
    assert main(["fingerprint", "learn", "Made up", *pages, "-o", str(path), "-q"]) == 0
    return path


def test_what_learn_says(command, music, tmp_path):
    bank = tmp_path / "b.npz"
    line = ["learn", "Made up", f"{music}/page0", f"{music}/page1", f"{music}/bad", "-o", bank]
    done = command("fingerprint", *line, "--json")
    assert done.code == 1  # four inputs failed
    facts = json.loads(done.out)
    assert (facts["tracks"], facts["failed"], facts["groups"], facts["parts"]) == (10, 4, 2, 2)
    assert facts["shared"]["hits"] == 10
    assert facts["already"] == {}
    assert facts["real"]["after"]["n"] == len(decoders.load().ends)
    assert facts["bank"]["digest"] == decoders.load(bank).digest
    said = [text for text in done.err.splitlines() if str(music) in text]
    for name, cause in {
        "short.wav": "too short: 4 s are needed: name another",
        "silent.wav": "silent above 3.5 kHz: name another",
        "narrow.wav": "its band ends at",
        "broken.flac": "not audio in a known format",
    }.items():
        assert sum(f"{name}: {cause}" in text for text in said) == 1
    # Another name is added; and the same name would be replaced.
    done = command("fingerprint", "learn", "Second", *line[2:4], "-o", bank, "-q")
    assert done.code == 0
    both = decoders.load(bank)
    assert [d.name for d in both.decoders] == ["Made up", "Second"]
    assert "known already  Made up finds 10 of 10" in done.out
    assert [d.name for d in without(both, "Made up").decoders] == ["Second"]
    assert without(both.only([0]), "Made up") is None


def test_what_cannot_be_learnt_writes_nothing(command, music, tmp_path):
    bank = tmp_path / "b.npz"
    done = command("fingerprint", "learn", "Few", f"{music}/page0", "-o", bank)
    assert (done.code, done.out) == (2, "")
    assert "Few: 5 tracks are named, 10 are needed: name more" in done.err
    names = [write(tmp_path / f"{n}.wav", coloured(60 + n, 5)) for n in range(10)]
    done = command("fingerprint", "learn", "None", *names, "-o", bank)
    assert (done.code, done.out) == (1, "")
    assert "share no decoder" in done.err.splitlines()[-1]
    done = command("fingerprint", "learn", "Bad", *names[:8], f"{music}/bad", "-o", bank, "-q")
    assert done.code == 1
    assert "Bad: 8 tracks can be judged, 10 are needed" in done.err
    assert not bank.exists()


def test_a_list_of_both_banks(command, bank):
    done = command("fingerprint", "list", "--bank", bank, "--json")
    assert done.code == 0
    listed = json.loads(done.out)
    embedded = decoders.load()
    names = [d.name for d in (*embedded.decoders, *decoders.load(bank).decoders)]
    assert [one["name"] for one in listed["decoders"]] == names
    assert listed["digest"] == decoders.join(embedded, decoders.load(bank)).digest
    assert "without" not in listed["decoders"][-1]
    text = command("fingerprint", "list", "--bank", bank).out
    assert text.count("\n") == len(names) + 2
    assert listed["digest"] in text.splitlines()[-1]


def test_a_match_and_its_stretches(command, music, bank):
    done = command(
        *("fingerprint", "match", f"{music}/other", f"{music}/bad", "--bank", bank),
        *("--format", "jsonl", "-q"),
    )
    assert done.code == 1
    rows = {Path(path).name: row for path, row in done.rows.items()}
    made = rows["made.wav"]
    assert made["decoder"]["name"] == "Made up"
    assert made["decoder"]["p"] < 1e-3
    assert made["decoder"]["speed"] == pytest.approx(1.04, abs=4e-4)
    assert made["decoder"]["band_hz"] == [5000, decoders.CLASSES[-1]]
    assert made["decoder"]["windows"][0]["start_s"] == 0
    assert (made["reason"], made["nearest"]) == (None, None)
    assert made["duration_s"] == pytest.approx(14, abs=0.01)
    for name in ("real 0.wav", "real 1.wav"):
        assert rows[name]["decoder"] is None
        assert rows[name]["reason"]
        assert rows[name]["nearest"]["p"] >= 1e-3
    assert "too short" in rows["short.wav"]["reason"]
    assert rows["short.wav"]["nearest"] is None
    assert rows["broken.flac"]["error"]["kind"] == "unsupported"


def test_a_table_of_matches(command, music, bank, tmp_path):
    out = tmp_path / "table.txt"
    line = ["fingerprint", "match", f"{music}/other", "--bank", bank, "--verbose"]
    done = command(*line)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[1].startswith("Made up ")
    assert lines[1].endswith("other/made.wav")
    assert lines[2].split()[:3] == ["0:00", "to", "0:20"]
    assert any(text.startswith("  nearest: ") for text in lines)
    assert command(*line, "-o", out).out == ""
    assert out.read_text() == done.out


def test_a_match_of_standard_input(command, music, monkeypatch):
    class Stdin:
        buffer = io.BytesIO((music / "other" / "real 0.wav").read_bytes())

    monkeypatch.setattr("sys.stdin", Stdin)
    done = command("fingerprint", "match", "-", "--format", "json")
    assert done.code == 0
    [row] = json.loads(done.out)
    assert (row["path"], row["decoder"]) == ("-", None)


def test_a_test_leaves_out_what_was_learnt(command, music, bank, tmp_path):
    manifest = tmp_path / "m.csv"
    rows = ["path,label,model,source,group"]
    rows += [f"{music}/page{n % 2}/made {n}.wav,ai,made up v2,x,new{n}" for n in range(4)]
    rows += [f"{music}/other/made.wav,ai,Another,x,other"]
    rows += [f"{music}/other/real {n}.wav,real,,shop,other" for n in range(2)]
    rows += [f"{music}/bad/broken.flac,real,,shop,bad"]
    manifest.write_text("\n".join(rows) + "\n")
    done = command("fingerprint", "test", bank, "--data", manifest, "--json", "-q")
    assert done.code == 1
    facts = json.loads(done.out)
    assert facts["failed"] == 1
    made, other = facts["generators"]["made up v2"], facts["generators"]["Another"]
    assert (made["found"]["hits"], made["named"]["hits"], made["named"]["n"]) == (4, 4, 4)
    assert (other["found"]["hits"], other["named"]["hits"]) == (1, 0)
    assert other["names"] == {"Made up": 1}
    low, high = Rate(2, 0).interval
    shop = facts["real"]["shop"]["found"]
    assert (shop["n"], shop["hits"]) == (2, 0)
    assert shop["interval"] == [pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4)]
    assert facts["all_real"]["n"] == 2
    # A bank that has no parts to leave out is not asked about its own groups.
    bare = decoders.load(bank)
    one = tmp_path / "bare.npz"
    decoders.save(decoders.dataclasses.replace(bare, left_out=None), one)
    manifest.write_text(rows[0] + f"\n{music}/page0/made 0.wav,ai,made up,x,page0\n")
    text = command("fingerprint", "test", one, "--data", manifest).out
    assert "0 of 1" in text
    assert "Made up: learnt from groups of 1 tracks, and not asked about those" in text
    assert "4 of 4" not in text


@pytest.mark.parametrize("action", ["list --bank", "match {music}/other --bank", "test"])
def test_a_bank_that_cannot_be_used_is_2(command, music, tmp_path, action):
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(b"PK\x03\x04")
    words = [word.format(music=music) for word in action.split()]
    for bank in (damaged, tmp_path / "none.npz"):
        more = ["--data", f"{tmp_path}/m.csv"] if action == "test" else []
        done = command("fingerprint", *words, bank, *more)
        assert (done.code, done.out) == (2, "")
        assert str(bank) in done.err
        assert done.err.count("\n") == 1


def test_a_decoder_is_right_for_its_generator_in_any_case():
    assert right("musicgen-large", "MusicGen", ())
    assert right("V5", "Suno", ("Suno v5", "v5"))
    assert not right("Suno v5", "MusicGen", ("AudioCraft",))
    assert not right("Muse", "MusicGen", ())
