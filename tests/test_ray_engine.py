"""Catalogues on a local cluster of processes: one for all tests, because it takes long to start."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest

from artifactnet_jax import ray_engine
from artifactnet_jax.catalogue import Folder, list_entries, utf8
from artifactnet_jax.text import CommandError
from artifactnet_jax.weights import load_weights
from audio_files import noise, write

pa = pytest.importorskip("pyarrow")
dataset = pytest.importorskip("pyarrow.dataset")
pq = pytest.importorskip("pyarrow.parquet")
ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

# Ray Data reads its own deprecated settings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`use_[a-z0-9_]+` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's sockets and processes at its end
]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Two workers' worth of this machine, whatever it has."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()
        gc.collect()  # which complains of processes that Ray leaves to it: now, not in later tests


@pytest.fixture
def catalogue(command, weights_path):
    """`score --engine ray` with one worker, which starts sooner than two."""

    def run(*args):
        return command(
            *("score", "--engine", "ray", "--weights", weights_path, "--backend", "numpy"),
            *("--workers", 1, *args),
        )

    return run


def rows_in(folder: Path) -> list[dict]:
    table = dataset.dataset(folder, partitioning="hive").to_table()
    return table.to_pylist()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_catalogue_from_its_first_run_to_its_third(tmp_path, tracks, score, catalogue):
    """Scores, failures, files in an object store, and what a run that goes on leaves alone."""
    music, out = tmp_path / "music", tmp_path / "out"
    shutil.copytree(tracks, music)
    (music / "broken.wav").write_bytes(b"RIFF, and no more")
    odd = write(music, "odd.wav", noise(4, seed=5))
    os.rename(odd, os.fsencode(music) + b"/\xff.wav")  # no UTF-8
    remote = tmp_path / "store"
    remote.mkdir()
    for seed in (7, 8):
        write(remote, f"{seed}.flac", noise(5, seed=seed))
    manifest = tmp_path / "manifest.parquet"
    listed = [f"file://{remote}/7.flac", "store/8.flac", "gone.wav"]
    digests = [sha256(remote / "7.flac"), "0" * 64, None]
    pq.write_table(pa.table({"path": listed, "sha256": digests}), manifest)

    first = catalogue(music, manifest, "-o", out)
    assert (first.code, first.out) == (1, "")
    found = {Path(row["path"]).name: row for row in rows_in(out)}
    assert found.keys() == {
        "a.wav",
        "b.wav",
        "c.flac",
        "broken.wav",
        "\\udcff.wav",
        "7.flac",
        "8.flac",
        "gone.wav",
    }
    assert len(rows_in(out)) == len(found)

    alone = score(music, remote / "7.flac").rows
    for path, row in alone.items():
        name = utf8(Path(path).name)
        other = found[name]
        if "error" in row:
            assert other["verdict"] == "error"
            assert other["error"]["kind"] == row["error"]["kind"]
            assert name in other["error"]["message"]
            continue
        assert other["sha256"] == row["file"]["sha256"]
        for key in row.keys() - {"path", "timings", "file"}:
            value = str(row[key]) if key == "plan" else row[key]
            assert other[key] == value, key
        assert other["sha256"] == sha256(Path(path))
        assert other["error"] is None
    assert found["8.flac"]["error"]["kind"] == "digest"
    assert found["gone.wav"]["error"]["kind"] == "not-found"
    assert "gone.wav" in first.err

    # A name that has changed, a failure that is mended, and one that is not.
    os.rename(music / "b.wav", music / "renamed.wav")
    write(music, "broken.wav", noise(4, seed=9))
    second = catalogue(music, manifest, "-o", out, "--resume")
    assert second.code == 1
    assert "resume: 5 had been scored" in second.err
    rows = rows_in(out)
    now = {Path(row["path"]).name: row for row in rows}
    assert len(rows) == len(now) == len(found) + 1
    assert now["renamed.wav"]["segments"] == found["b.wav"]["segments"]
    # The time that it took is the first run's: it was not scored again.
    assert now["renamed.wav"]["timings"] == found["b.wav"]["timings"]
    assert now["a.wav"] == found["a.wav"]
    assert now["broken.wav"]["verdict"] in ("ai", "real")
    assert now["8.flac"]["error"]["kind"] == "digest"


def test_rows_that_cannot_be_compared_do_not_share_a_folder(tmp_path):
    common = {"threshold": 0.5, "plan": "all"}
    Folder(str(tmp_path / "new" / "out")).begin(common, resume=False)
    again = Folder(f"file://{tmp_path}/new/out")
    with pytest.raises(CommandError, match="--resume goes on"):
        again.begin(common, resume=False)
    with pytest.raises(CommandError, match="rows with other plan: give the same"):
        again.begin({**common, "plan": 7}, resume=True)
    again.begin(common, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(CommandError, match="is not empty"):
        Folder(str(tmp_path / "mine")).begin(common, resume=True)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["a.wav"], "give -o DIR"),
        (["a.wav", "-o", "out", "--format", "csv"], "give -o DIR, and no --format"),
        (["-", "-o", "out"], "reads no standard input"),
        (["gone.parquet", "-o", "out"], "gone.parquet: cannot be read"),
        (["nothing://x", "-o", "out"], "nothing://x"),
        (["a.wav", "-o", "out", "--weights", "gone.safetensors"], "gone.safetensors"),
    ],
)
def test_usage(command, arguments, what):
    done = command("score", "--engine", "ray", *arguments)
    assert (done.code, done.out) == (2, "")
    assert what in done.err
    assert len(done.err.splitlines()) == 1


def descendants() -> dict[int, str]:
    """Command lines of this process's children and theirs, by process id."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
    found = {}
    for pid in parents:
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid() and pid != above:
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode().strip("\0 ")
    return found


def busy() -> list[int]:
    """Scoring actors at work: then Ray names their processes after the method."""
    names = descendants()
    return [pid for pid, name in names.items() if "MapBatches" in name and ".submit" in name]


def test_a_killed_worker_loses_nothing_and_a_long_track_holds_nobody_back(
    tmp_path, weights_path, detector, monkeypatch
):
    class Long(ray_engine._Scorer):
        """Does not end with the first block before it may. (Local: workers get its code.)"""

        def _rows(self, entries):
            entries, patience = list(entries), 120
            while any(path == first for path, _ in entries) and patience and not may_end.exists():
                time.sleep(0.5)
                patience -= 1
            return super()._rows(entries)

    for k in range(18):
        write(tmp_path, f"{k}.wav", noise(4 + k % 3 * 4, seed=k))
    entries = list_entries([str(tmp_path)])
    first, may_end = str(tmp_path / "0.wav"), tmp_path / "may end"
    assert next(iter(entries)) == first
    monkeypatch.setattr(ray_engine, "_Scorer", Long)
    pool = ray_engine.Pool(workers=2)
    got: list[dict] = []
    for row in ray_engine.score_many(entries, load_weights(weights_path), "numpy", pool=pool):
        got.append(row)
        if len(got) == 1:
            victim = busy()[0]
            os.kill(victim, signal.SIGKILL)
        if len(got) == len(entries) - 2:  # all but the first block
            may_end.touch()
    assert victim not in descendants()
    assert first in {row["path"] for row in got[-2:]}
    assert sorted(row["path"] for row in got) == list(entries)
    alone = {v.path: v for _, v in detector.score_many(list(entries))}
    for row in got:
        assert row["score"] == alone[row["path"]].score
        assert row["segments"] == [vars(s) for s in alone[row["path"]].segments]


def test_a_file_that_kills_every_worker_is_a_row(tmp_path, weights_path, monkeypatch):
    class Deadly(ray_engine._Scorer):
        """Dies of one file, as of a decoder's bug."""

        tries = 1

        def _rows(self, entries):
            entries = list(entries)
            if any(path.endswith("poison.wav") for path, _ in entries):
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._rows(entries)

    monkeypatch.setattr(ray_engine, "_Scorer", Deadly)
    monkeypatch.setattr(ray_engine, "BLOCKS", 1)  # so that the innocent share its block
    for k in range(3):
        write(tmp_path, f"{k}.wav", noise(4, seed=k))
    write(tmp_path, "poison.wav", noise(4, seed=9))
    entries = list_entries([str(tmp_path)])
    pool = ray_engine.Pool(workers=1)
    rows = list(ray_engine.score_many(entries, load_weights(weights_path), "numpy", pool=pool))
    assert sorted(row["path"] for row in rows) == list(entries)
    (bad,) = [row for row in rows if "error" in row]
    assert bad["path"].endswith("poison.wav")
    assert bad["error"]["kind"] == "lost"


def test_sizing_by_hand():
    """A million tracks of 60 segments at 0.3 s: 1.8e7 core-seconds, 5,000 core-hours."""
    size = ray_engine.sizing(1e6, segment_s=0.3, segments=60, price=0.05)
    assert size == {"core_hours": pytest.approx(5000), "cost": pytest.approx(250)}


def test_what_there_is_in_stores_folders_and_manifests(tmp_path, tracks):
    memory = pytest.importorskip("fsspec").filesystem("memory")  # which pyarrow does not know
    sound = (tracks / "a.wav").read_bytes()
    for name in ("/shop/a.wav", "/shop/deep/b c.flac", "/shop/deep/cover.jpg"):
        memory.pipe(name, sound)
    listed = list_entries(["memory://shop"], recursive=True)
    assert list(listed) == ["memory://shop/a.wav", "memory://shop/deep/b c.flac"]
    assert list(list_entries(["memory://shop"])) == ["memory://shop/a.wav"]
    with ray_engine._open("memory://shop/deep/b c.flac") as file:
        assert file.name == "memory://shop/deep/b c.flac"
        assert ray_engine._digest(file) == sha256(tracks / "a.wav")
        assert file.read() == sound

    odd = tmp_path / "odd %20 #1?.wav"
    odd.write_bytes(sound)
    assert list(list_entries([f"file://{tmp_path}"])) == [f"file://{odd}"]
    with ray_engine._open(f"file://{odd}") as file:
        assert file.read() == sound

    where = f"file://{tracks}"
    assert list(list_entries([where])) == [
        f"{where}/{name}" for name in ("a.wav", "b.wav", "c.flac")
    ]
    table = pa.table({"path": ["a.wav", f"{where}/b.wav", None], "sha256": ["AB", None, None]})
    pq.write_table(table, tracks.parent / "m.parquet")
    assert list_entries([str(tracks.parent / "m.parquet")]) == {
        str(tracks.parent / "a.wav"): "ab",
        f"{where}/b.wav": "",
    }
    (tmp_path / "list.txt").write_text(f"s3://far/away.mp3\n{tracks}/c.flac\n")
    assert list(list_entries([f"@{tmp_path}/list.txt"])) == [
        "s3://far/away.mp3",
        str(tracks / "c.flac"),
    ]
