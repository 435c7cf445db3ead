"""Manifests of benchmarks: every form, where audio is found, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("pyarrow")
import pyarrow
import pyarrow.parquet

from artifactnet_jax.audio import read_mono
from artifactnet_jax.bench.manifests import AudioReader, Track, public_cohort, read, select
from artifactnet_jax.data.manifest import ManifestError
from artifactnet_jax.recording import AudioError


def wav(seed: int) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, 8000 + 100 * seed)
    soundfile.write(out, noise, 44_100, format="WAV", subtype="PCM_16")
    return out.getvalue()


@pytest.fixture
def audio(tmp_path: Path) -> dict[str, bytes]:
    """Four files below tmp_path/audio, by name."""
    folder = tmp_path / "audio" / "deep"
    folder.mkdir(parents=True)
    files = {f"{name}.wav": wav(seed) for seed, name in enumerate("abcd")}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


def write_json(path: Path, data: object) -> str:
    path.write_text(json.dumps(data))
    return str(path)


def by_id(tracks: list[Track]) -> dict[str, Track]:
    return {track.id: track for track in tracks}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_csv_of_this_project(tmp_path, audio):
    lines = "path,label,kind,source,model,group,split,codec,cohort,development\n"
    lines += "audio/deep/a.wav,ai,ai,gen-run,Gen 1,song 1,test,mp3,,\n"
    lines += "audio/deep/b.wav,0,real,site,,song 1,test,mp3,ours,1\n"
    (tmp_path / "m.csv").write_text(lines)
    tracks, notes = read([str(tmp_path / "m.csv")])
    first, second = tracks
    assert (first.id, first.label, first.source) == ("audio/deep/a.wav", 1, "gen-run")
    assert (first.generator, first.lineage, first.split) == ("Gen 1", "song 1", "test")
    assert (first.group, second.group, second.label) == ("ai", "ours", 0)
    assert notes == [f"{tmp_path}/m.csv: columns not used: codec"]
    assert set(first.to_dict()) == {
        *("id", "label", "source", "generator", "group", "lineage", "split", "development")
    }
    assert [track.development for track in tracks] == [False, True]


def test_public_v1_binds_by_name_since_it_has_no_digests(tmp_path, audio):
    rows = [
        {"path": "/home/author/music/a.wav", "label": "ai", "source": "sonics_udio-120s"}
        | {"track_id": "0123456789abcdef_a", "bench_origin": "test", "generator": "Udio"},
        {"path": "/home/author/music/x.wav", "label": "real", "source": "fma_hardneg"}
        | {"track_id": "b", "bench_origin": "train", "generator": "real"},
        {"path": "/home/author/music/y.wav", "label": "real", "source": "mom_real"}
        | {"track_id": "gone", "bench_origin": "test", "generator": "real"},
    ]
    path = write_json(tmp_path / "v1.json", {"bench": rows, "metadata": {"version": "1.0.1"}})
    tracks = by_id(read([path], [str(tmp_path / "audio")])[0])
    assert tracks["0123456789abcdef_a"].audio == str(tmp_path / "audio/deep/a.wav")
    assert tracks["b"].audio == str(tmp_path / "audio/deep/b.wav")  # by its id
    assert tracks["gone"].audio == ""
    assert "y.wav" in tracks["gone"].problem
    assert [t.origin for t in tracks.values()] == ["test", "train", "test"]
    assert [t.group for t in tracks.values()] == ["SONICS", "hard negatives", "MoM real"]


def test_public_v1_1_and_legacy(tmp_path, audio):
    row = {"path": "audio/deep/a.wav", "label": "ai", "source": "aime_udio", "track_id": "a"}
    real = row | {"path": "audio/deep/b.wav", "label": "real", "track_id": "b"}
    path = write_json(tmp_path / "v11.json", {"tracks": [row, real], "metadata": {}})
    assert [track.id for track in read([path])[0]] == ["a", "b"]
    path = write_json(tmp_path / "old.json", {"train": [row], "test": [real]})
    assert [(t.id, t.split) for t in read([path])[0]] == [("a", "train"), ("b", "test")]


def test_public_v1_2_and_v2_bind_by_digest(tmp_path, audio):
    rows = [
        {"id": "0" * 24, "track_id": "same", "source": "suno_extra", "label": "ai"}
        | {"partition": "legacy", "dependence_cluster": "c1", "bytes": len(audio["a.wav"])}
        | {"sha256": sha(audio["a.wav"]), "generator": "Suno", "rights": {"any": "thing"}},
        {"id": "1" * 24, "track_id": "same", "source": "sonics_real", "label": "real"}
        | {"partition": "contemporary_native", "sha256": sha(audio["b.wav"]), "bytes": 3},
    ]
    path = write_json(tmp_path / "v12.json", {"schema": "artifactbench-1.2-rc2", "bench": rows})
    tracks = by_id(read([path], [str(tmp_path / "audio")])[0])
    first, second = tracks["0" * 24], tracks["1" * 24]
    assert first.audio == str(tmp_path / "audio/deep/a.wav")
    assert (first.group, first.lineage) == ("legacy", "c1")
    # No file of 3 bytes is there, so none was digested for it.
    assert sha(audio["b.wav"]) in second.problem

    rows = [
        {"track_id": "ab2-x", "label": "ai", "source": "aime_udio", "bench_origin": "test"}
        | {"protocol_split": "calibration", "audio_sha256": sha(audio["c.wav"]).upper()}
        | {"audio_bytes": len(audio["c.wav"]), "lineage_id": "ab2l-1", "retrieval": {"mode": "?"}},
        {"track_id": "ab2-y", "label": "real", "source": "fma_hardneg", "bench_origin": "test"}
        | {"protocol_split": "test", "runtime_path": "audio/deep/d.wav", "path": "nowhere.wav"},
    ]
    path = write_json(tmp_path / "v2.json", {"schema_version": 2, "tracks": rows})
    tracks = by_id(read([path], [str(tmp_path / "audio")])[0])
    assert tracks["ab2-x"].audio == str(tmp_path / "audio/deep/c.wav")
    assert (tracks["ab2-x"].split, tracks["ab2-x"].lineage) == ("calibration", "ab2l-1")
    assert tracks["ab2-y"].audio == str(tmp_path / "audio/deep/d.wav")  # before `path`


def shard(path: Path, column: str = "audio_bytes") -> list[bytes]:
    cells = [wav(seed) for seed in range(5)]
    values = cells if column == "audio_bytes" else [{"bytes": c, "path": None} for c in cells]
    table = pyarrow.table(
        {
            "track_id": [f"{path.stem}-{k}" for k in range(5)],
            column: values,
            "source": ["suno_extra"] * 5,
            "generator": ["Suno"] * 5,
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return cells


@pytest.mark.parametrize("column", ["audio_bytes", "audio"])
def test_shards_give_the_bytes_that_were_put_in(tmp_path, column):
    folder = tmp_path / "ai_tracks"
    folder.mkdir()
    cells = {name: shard(folder / f"{name}.parquet", column) for name in ("s0", "s1")}
    tracks, _ = read([str(folder)])
    assert [track.id for track in tracks] == [f"s{i}-{k}" for i in range(2) for k in range(5)]
    assert {track.label for track in tracks} == {1}  # no column says so: they have a generator
    reader = AudioReader()
    for i in (0, 1, 4, 2, 9, 7):  # on, and back again
        file = reader.open(tracks[i])
        assert file.read() == cells[f"s{i // 5}"][i % 5]
    heard = read_mono(reader.open(tracks[3]), 44_100, "it")
    np.testing.assert_array_equal(heard, soundfile.read(io.BytesIO(cells["s0"][3]))[0])


def test_a_shard_cut_off_is_named(tmp_path):
    shard(tmp_path / "s0.parquet")
    data = (tmp_path / "s0.parquet").read_bytes()
    (tmp_path / "s0.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(ManifestError, match=r"s0\.parquet: the shard .*copy it again"):
        read([str(tmp_path / "s0.parquet")])


def test_a_damaged_page_fails_its_tracks_only(tmp_path):
    shard(tmp_path / "s0.parquet")
    tracks, _ = read([str(tmp_path / "s0.parquet")])
    data = bytearray((tmp_path / "s0.parquet").read_bytes())
    pages = pyarrow.parquet.ParquetFile(tmp_path / "s0.parquet").metadata.row_group(1).column(1)
    start = pages.dictionary_page_offset or pages.data_page_offset
    data[start : start + 40] = b"\xff" * 40  # of the second row group: rows 2 and 3
    (tmp_path / "s0.parquet").write_bytes(data)
    reader = AudioReader()
    assert reader.open(tracks[0]).read()[:4] == b"RIFF"
    with pytest.raises(AudioError, match="damaged") as caught:
        reader.open(tracks[2])
    assert caught.value.kind == "shard"
    assert reader.open(tracks[1]).read()[:4] == b"RIFF"


def test_a_row_without_audio_fails_when_it_is_opened(tmp_path, audio):
    (tmp_path / "m.csv").write_text("path,label\naudio/deep/a.wav,1\nmissing.wav,0\n")
    tracks, _ = read([str(tmp_path / "m.csv")])
    with pytest.raises(AudioError, match=r"missing\.wav") as caught:
        AudioReader().open(tracks[1])
    assert caught.value.kind == "not-found"
    assert AudioReader().open(tracks[0]) == str(tmp_path / "audio/deep/a.wav")


def test_names_that_two_files_have_are_not_guessed(tmp_path, audio):
    (tmp_path / "audio" / "a.wav").write_bytes(b"another")
    (tmp_path / "m.csv").write_text("path,label\nx/a.wav,1\naudio/deep/b.wav,0\n")
    tracks, _ = read([str(tmp_path / "m.csv")], [str(tmp_path / "audio")])
    assert "2 files in --audio are called x/a.wav" in tracks[0].problem


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("m.csv", "path,label\n", "no rows"),
        ("m.csv", "", "empty"),
        ("m.json", "[]", "no rows"),
        ("m.json", '{"songs": []}', "no list of tracks"),
        ("m.json", "[1]", "no object"),
        ("m.json", "{", "not JSON"),
        ("m.csv", "path,label\na.wav,maybe\n", "line 2: label 'maybe'"),
        ("m.csv", "file,class\na.wav,1\n", "neither id, track_id nor path"),
        ("m.csv", "path,colour\na.wav,red\n", "no label"),
        ("m.json", '[{"path": "a", "label": 1}, {"path": "a", "label": 1}]', "ids are there twice"),
        ("m.csv", "path,label\nnone.wav,1\n", "none of the 1 tracks has its audio"),
        ("m.parquet", "no parquet", "parquet"),
    ],
)
def test_bad_manifests(tmp_path, name, text, what):
    (tmp_path / name).write_text(text)
    with pytest.raises(ManifestError, match=what):
        read([str(tmp_path / name)])


def test_no_such_manifest_or_folder(tmp_path):
    with pytest.raises(ManifestError, match="No such file"):
        read([str(tmp_path / "m.json")])
    (tmp_path / "m.csv").write_text("path,label\nnone.wav,1\n")
    with pytest.raises(ManifestError, match="no such folder"):
        read([str(tmp_path / "m.csv")], [str(tmp_path / "nowhere")])


def test_the_public_csv_of_real_tracks(tmp_path, audio):
    lines = "track_id,youtube_id,source,format,v1_1_status\n0123,c,mom_real,mp3,test_ok\n"
    lines += "4567,d,mom_real,mp3,purged_train_overlap\n"
    (tmp_path / "real_tracks_v1.1.csv").write_text(lines)
    tracks, _ = read([str(tmp_path / "real_tracks_v1.1.csv")], [str(tmp_path / "audio")])
    assert [(t.label, t.split) for t in tracks] == [(0, "test"), (0, "train")]
    assert [Path(str(t.audio)).name for t in tracks] == ["c.wav", "d.wav"]


def made(name: str, label: int, source: str, split: str, origin: str = "") -> Track:
    return Track(name, label, source, "", "", name, split, origin, f"{name}.wav")


def test_selection():
    tracks = [made(f"r{i}", 0, "real", "test") for i in range(6)]
    tracks += [made(f"a{i}", 1, "ai", "test", "test") for i in range(2)]
    tracks += [made("t", 1, "ai", "train"), made("c", 0, "real", "calibration")]
    ids = [track.id for track in select(tracks)]
    assert ids == ["r0", "r1", "r2", "r3", "r4", "r5", "a0", "a1", "c"]
    assert [t.id for t in select(tracks, ["train", "calibration"])] == ["t", "c"]
    # The public runner's rule, worked out here: the lowest digests of "42:id" of each source.
    ranked = sorted(range(6), key=lambda i: hashlib.sha256(f"42:r{i}".encode()).hexdigest())
    few = select(tracks[::-1], ["test"], each=2)
    assert {track.id for track in few} == {f"r{i}" for i in ranked[:2]} | {"a0", "a1"}
    with pytest.raises(ManifestError, match="no track is in the part 'dev'"):
        select(tracks, ["dev"])
    with pytest.raises(ManifestError, match="all 2 tracks to score are ai"):
        select(tracks, origin="test")
    without = [made("x", 0, "s", ""), made("y", 1, "s", ""), made("z", 1, "s", "train")]
    assert [track.id for track in select(without)] == ["x", "y"]


def test_public_cohorts_are_the_papers():
    known = {
        "sonics_chirp-v3": "SONICS",
        "sonics_real": "SONICS real",
        "mom_real_wav": "MoM real",
        "mom_extra_real": "MoM real",
        "aime_stable_audio_v1": "AIME",
        "udio_cdn_latest": "CDN",
        "youtube_hardneg": "hard negatives",
        "our own": "",
        "suno": "",
    }
    assert {source: public_cohort(source) for source in known} == known
