"""What files say of themselves: in every container, beside the score, and never in its way."""

from __future__ import annotations

import csv
import io
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifactnet_jax import tags
from artifactnet_jax.decode import open_audio
from audio_files import noise, write

mutagen: Any = pytest.importorskip("mutagen")
from mutagen import id3, mp4  # noqa: E402

COMMENT = "made with suno; created=2026-02-03"
MANIFEST = bytes.fromhex("00000020 6a756d62 00000018 6a756d64") + tags._C2PA[0] + b"\3c2pa\0"
XMP = (
    b"<x:xmpmeta><Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/"
    b"trainedAlgorithmicMedia</Iptc4xmpExt:DigitalSourceType></x:xmpmeta>"
)


@pytest.fixture
def track(tmp_path) -> Callable[..., Path]:
    """A short file of a kind."""

    def make(suffix: str, seconds: float = 4.5) -> Path:
        rate = 48_000 if suffix == "opus" else 44_100
        path: Path = write(tmp_path, f"t.{suffix}", noise(seconds, rate, channels=1), rate)
        return path

    return make


def said(path: Path) -> tuple[str, ...]:
    with path.open("rb") as file:
        found = tags.notices(file)
        assert file.tell() == 0
    with open_audio(path) as decoded:
        assert decoded.notices == found
    return found


@pytest.mark.parametrize("suffix", ["mp3", "wav", "flac", "ogg", "opus", "aiff", "m4a", "wma"])
def test_a_comment_in_every_container(track, suffix):
    path = track(suffix)
    assert said(path) == ()
    file = mutagen.File(path)
    if file.tags is None:
        file.add_tags()
    if suffix in ("mp3", "wav", "aiff"):
        file.tags.add(id3.COMM(encoding=1, lang="eng", text=[COMMENT]))
        field = "COMM"
    else:
        field = {"m4a": "\xa9cmt", "wma": "Description"}.get(suffix, "comment")
        file.tags[field] = [COMMENT]
    file.save()
    assert said(path) == (f"tag {field}: {COMMENT}",)


@pytest.mark.parametrize(
    ("frame", "notice"),
    [
        (id3.WOAF(url="https://suno.com/song/1"), "tag WOAF: https://suno.com/song/1"),
        (id3.TSSE(encoding=3, text=["Udio 1.5"]), "tag TSSE: Udio 1.5"),
        (id3.TENC(encoding=3, text=["ElevenLabs Music"]), "tag TENC: ElevenLabs Music"),
        (id3.TXXX(encoding=1, desc="tool", text=["MusicGen"]), "tag TXXX: MusicGen"),
        (id3.TIT2(encoding=3, text=["Song (made with Suno)"]), "tag TIT2: Song (made with Suno)"),
        (id3.TCON(encoding=3, text=["AI-generated"]), "tag TCON: AI-generated"),
        (id3.COMM(encoding=3, lang="eng", text=["a\x1bsuno.ai\nb"]), "tag COMM: a\\x1bsuno.ai\\nb"),
        (id3.GEOB(encoding=0, mime="application/c2pa", data=b"x"), "C2PA manifest, not verified"),
        (id3.GEOB(encoding=0, mime="a/b", data=MANIFEST), "C2PA manifest, not verified"),
        # Names of people and works may be those of systems; pictures and other encoders are none.
        (id3.TIT2(encoding=3, text=["Suno Na"]), None),
        (id3.TPE1(encoding=3, text=["Udio"]), None),
        (id3.TSSE(encoding=3, text=["LAME 3.100"]), None),
        (id3.COMM(encoding=3, lang="eng", text=["Sunoco, made by hand"]), None),
        (id3.APIC(encoding=0, mime="image/png", data=b" suno " * 4000), None),
    ],
)
def test_frames(track, frame, notice):
    path = track("mp3")
    file = mutagen.File(path)
    file.add_tags()
    file.tags.add(frame)
    file.save()
    assert said(path) == (() if notice is None else (notice,))


def box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", 8 + len(data)) + kind + data


def test_provenance_in_boxes_and_chunks(track, tmp_path):
    m4a = track("m4a")
    marked = tmp_path / "marked.m4a"
    marked.write_bytes(m4a.read_bytes() + box(b"uuid", tags._C2PA[1] + b"\0\0\0\0manifest\0"))
    assert said(marked) == ("C2PA manifest, not verified",)
    free = mp4.MP4(m4a)
    free["----:com.apple.iTunes:SOURCE"] = [mp4.MP4FreeForm(b"https://www.udio.com/songs/1")]
    free["covr"] = [mp4.MP4Cover(b" suno " * 4000)]
    free.save()
    assert said(m4a) == ("tag ----: https://www.udio.com/songs/1",)
    wav = track("wav").read_bytes()
    for name, data, notice in (
        (b"C2PA", MANIFEST, "C2PA manifest, not verified"),
        (b"_PMX", XMP, "digital source type: trainedAlgorithmicMedia"),
    ):
        chunk = name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        marked = tmp_path / "marked.wav"
        marked.write_bytes(b"RIFF" + struct.pack("<I", len(wav) - 8 + len(chunk)) + wav[8:] + chunk)
        assert said(marked) == (notice,)


def test_bad_tags_fail_nobody(track, tmp_path):
    path = track("mp3")
    file = mutagen.File(path)
    file.add_tags()
    file.tags.add(id3.COMM(encoding=1, lang="eng", text=[COMMENT]))
    file.save()
    whole = path.read_bytes()
    for k in range(3, 120, 3):
        damaged = bytearray(whole)
        damaged[k] ^= 0xFF
        assert isinstance(tags.notices(io.BytesIO(damaged)), tuple)
    for data in (b"", b"ID3", whole[:50], b"\0" * 5000):
        assert tags.notices(io.BytesIO(data)) == ()


def test_a_great_many_tags_are_a_few_notices(track):
    path = track("flac")
    file = mutagen.File(path)
    file["comment"] = [f"suno {k} " + "x" * 1000 for k in range(100)]
    file.save()
    found = said(path)
    assert len(found) == tags.MOST
    assert all(len(text) < 200 for text in found)


def test_notices_stand_beside_the_result(score, tracks, track, weights_path):
    path = track("flac")
    before = score(path).rows[str(path)]
    file = mutagen.File(path)
    file["comment"] = [COMMENT]
    file.save()
    after = score(path).rows[str(path)]
    assert (before.pop("notices"), after.pop("notices")) == ([], [f"tag comment: {COMMENT}"])
    for row in (before, after):
        del row["timings"], row["file"]  # tags are part of the file
    assert before == after
    (line,) = csv.DictReader(score("--format", "csv", path).out.splitlines())
    assert line["notices"] == f"tag comment: {COMMENT}"
    assert score(tracks / "a.wav").rows[str(tracks / "a.wav")]["notices"] == []


def test_without_mutagen_there_are_none_and_doctor_says_so(score, command, track, monkeypatch):
    path = track("flac")
    file = mutagen.File(path)
    file["comment"] = [COMMENT]
    file.save()
    tags._kinds.cache_clear()
    for name in tags.MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    done = score(path)
    assert (done.code, done.err) == (0, "")
    assert done.rows[str(path)]["notices"] == []
    monkeypatch.setattr("artifactnet_jax.doctor._version", lambda package: None)
    monkeypatch.setattr("artifactnet_jax.doctor._devices", list)  # takes long
    assert "notices: pip install 'artifactnet-jax[tags]'" in command("doctor").out
    tags._kinds.cache_clear()
