"""The service: a real server, a real client, both databases."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from audio_files import carrying, encode, noise

for package in ("fastapi", "uvicorn", "python_multipart", "sqlalchemy", "prometheus_client"):
    pytest.importorskip(package)
httpx = pytest.importorskip("httpx")

from artifactnet_jax.results import WORDS  # noqa: E402
from artifactnet_jax.serve.answers import Batch  # noqa: E402
from artifactnet_jax.serve.store import File, StateError, Store, new_id  # noqa: E402
from serving import Server, children, kill, make_token, postgres, postgres_folder, until  # noqa: E402

POISONED = Path(__file__).parent / "poisoned"
SECONDS = 1.0  # of a clip


def clip(seed: int, kind: str = "wav", seconds: float = SECONDS) -> bytes:
    return encode(noise(seconds, channels=1, seed=seed), kind)


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[Callable[[], str]]:
    """A function that gives the URL of a new database."""
    if postgres_folder() is None:
        pytest.skip("no PostgreSQL here")
    pytest.importorskip("psycopg")
    names = itertools.count()
    with postgres() as make:
        yield lambda: make(f"t{next(names)}")


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    return request.getfixturevalue("postgres_url")()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for a token, with small limits and a decoder with holes."""
    root = tmp_path_factory.mktemp("serve") / "root"
    token = make_token(root)
    limits = ("--max-file-mb", "1", "--max-files", "8", "--max-minutes", "1")
    limits += ("--decode-seconds", "5", "--decode-memory-mb", "256", "--rate", "100000")
    env = {"PYTHONPATH": str(POISONED), "POISON_WRITES": str(root.parent / "written")}
    with Server(root, *limits, token=token, env=env) as running:
        yield running


def scores(text: str) -> list[dict[str, Any]]:
    """Rows without what differs from run to run."""
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k not in ("timings", "file")} for row in rows]


def test_rows_are_those_of_score(server, command, tmp_path):
    files = {
        "a.wav": clip(1),
        "b.mp3": clip(2, "mp3", 5.0),  # several segments
        "c.flac": clip(3, "flac", 2.0)[:9000],  # cut off
        "d.ogg": encode(noise(1.5, 48_000), "ogg", 48_000),
        "e.m4a": clip(5, "m4a"),
        "silent.wav": encode(noise(1.0) * 0, "wav"),
        "text.wav": b"not audio",
        "nothing.wav": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in files]
    expected = command("score", "--backend", "numpy", "--format", "jsonl", *paths)
    batch = server.create()
    names = iter(files)
    for count in (3, 5):  # more than once
        some = {name: files[name] for name in itertools.islice(names, count)}
        reply = server.upload(batch, some)
        assert reply.status_code == 201, reply.text
    server.commit(batch)
    status = server.wait(batch)
    assert (status["files"], status["scored"], status["failed"]) == (8, 5, 3)
    text = server.results(batch, format="jsonl")
    want = {os.path.basename(row["path"]): row for row in scores(expected.out)}
    rows = scores(text)
    assert [row["path"] for row in rows] == list(files)  # in order of upload
    for row in rows:
        twin = json.dumps(want[row["path"]]).replace(f"{tmp_path}/", "")
        assert row == json.loads(twin)

    table = list(csv.DictReader(io.StringIO(server.results(batch, format="csv"))))
    assert [row["path"] for row in table] == list(files)
    assert [float(row["score"]) for row in table if row["score"]] == [
        row["score"] for row in rows if row.get("score") is not None
    ]
    assert [row["error_kind"] for row in table] == [
        row.get("error", {}).get("kind", "") for row in rows
    ]

    reply = server.client.post("/v1/score", files={"file": ("a.wav", files["a.wav"])})
    assert (reply.status_code, scores(reply.text)) == (200, rows[:1])
    reply = server.client.post("/v1/score", files={"file": ("text.wav", b"not audio")})
    assert (reply.status_code, reply.json()["error"]["kind"]) == (422, "unsupported")
    assert not os.listdir(server.root / "files")  # scored: nothing reads them again


def test_decoders_and_notices_reach_every_form(server):
    openpyxl, mutagen = map(pytest.importorskip, ("openpyxl", "mutagen"))
    music = io.BytesIO(encode(carrying("MusicGen", 6, channels=1), "flac"))
    file = mutagen.File(music)
    file["comment"] = ["made with suno"]
    music.seek(0)
    file.save(music)
    batch = server.batch({"a.flac": music.getvalue(), "b.wav": clip(1)})
    server.wait(batch)
    found, other = (json.loads(line) for line in server.results(batch).splitlines())
    assert found["decoder"]["name"] == "MusicGen"
    sentence = "its spectrum carries the lines of MusicGen's decoder; fewer than 1 in 1,000 real "
    assert found["decoder"]["sentence"] == f"{sentence}tracks does"
    assert found["notices"] == ["tag comment: made with suno"]
    assert (other["decoder"], other["notices"]) == (None, [])
    assert "too short" in other["decoder_reason"]
    assert found["bank"] == other["bank"] == server.client.get("/v1/info").json()["engine"]["bank"]
    table = list(csv.DictReader(io.StringIO(server.results(batch, format="csv"))))
    url = f"/v1/batch/{batch}/results"
    data = server.client.get(url, params={"format": "xlsx"}).content
    sheet = openpyxl.load_workbook(io.BytesIO(data)).active
    header, row, _ = sheet.iter_rows(values_only=True)
    columns = ("decoder", "decoder_z", "decoder_p", "decoder_speed", "notices")
    cells = [row[header.index(column)] for column in columns]
    wanted = [found["decoder"][key] for key in ("name", "z", "p", "speed")]
    # A workbook holds 16 digits of a number.
    assert cells == [wanted[0], *map(pytest.approx, wanted[1:]), "tag comment: made with suno"]
    assert [table[0][column] for column in columns] == [*map(str, wanted), cells[-1]]
    assert [table[1][column] for column in columns] == [""] * 5


def test_workbook_holds_the_same_rows_and_no_formulas(server):
    openpyxl = pytest.importorskip("openpyxl")
    batch = server.batch({"=1+1.wav": clip(1), "https://x.wav": b"nothing"})
    server.wait(batch)
    url = f"/v1/batch/{batch}/results"
    sheet = openpyxl.load_workbook(
        io.BytesIO(server.client.get(url, params={"format": "xlsx"}).content)
    ).active
    header, *rows = sheet.iter_rows(values_only=True)
    wanted = [json.loads(line) for line in server.results(batch).splitlines()]
    assert [row[header.index("path")] for row in rows] == ["=1+1.wav", "https://x.wav"]
    assert {cell.data_type for row in sheet.iter_rows() for cell in row} <= {"s", "n"}
    assert rows[0][header.index("score")] == wanted[0]["score"]
    assert rows[0][header.index("verdict")] == WORDS[wanted[0]["verdict"]]  # people read it
    assert rows[1][header.index("error_kind")] == "unsupported"


def test_names_of_clients_never_reach_the_file_system(server):
    names = [
        "../../../tmp/x.wav",
        "/etc/passwd",
        "a\nb\x00.wav",
        "x" * 3000,
        "ü\u202e.wav",
        "a",
        "a",
    ]
    batch = server.create()
    boundary = b"------------------------boundary"
    body = b"".join(
        b'--%b\r\nContent-Disposition: form-data; name=files; filename="%b"\r\n\r\n%b\r\n'
        % (boundary, name.replace("\n", "%0A").encode(), clip(1))
        for name in names
    )
    headers = {"content-type": f"multipart/form-data; boundary={boundary.decode()}"}
    url = f"/v1/batch/{batch}/files"
    reply = server.client.post(url, content=body + b"--%b--\r\n" % boundary, headers=headers)
    if reply.status_code == 400:  # the parser refuses a NUL in a header
        body = body.replace(b"\x00", b"")
        reply = server.client.post(url, content=body + b"--%b--\r\n" % boundary, headers=headers)
    assert reply.status_code == 201, reply.text
    found = {path.relative_to(server.root).as_posix() for path in server.root.rglob("*")}
    ids = {f"files/{file['id']}" for file in reply.json()["files"]}
    assert ids <= found
    assert found - ids <= {
        *("files", "incoming", "id", "server.lock", "worker.lock"),
        *("service.db", "service.db-wal", "service.db-shm"),
    }
    server.commit(batch)
    server.wait(batch)
    paths = [json.loads(line)["path"] for line in server.results(batch).splitlines()]
    assert paths[0] == names[0]
    assert paths[3] == "x" * 500
    assert paths[4] == r"ü\u202e.wav"
    assert all(path.isprintable() for path in paths)


def test_a_poisoned_file_is_one_row(server):
    poison = {f"{order}.wav": order.encode() for order in ("HANG!", "SPIN!", "CRASH", "GROW!")}
    poison |= {"LIAR!.wav": b"LIAR!", "WRITE.wav": b"WRITE", "good.wav": clip(1)}
    poison["long.flac"] = encode(noise(61.0, 8000, 1) * 0, "flac", 8000)
    batch = server.batch(poison)
    assert server.wait(batch)["scored"] == 1
    rows = {row["path"]: row for row in map(json.loads, server.results(batch).splitlines())}
    kinds = {name[:4]: row.get("error", {}).get("kind") for name, row in rows.items()}
    assert kinds == {
        **{"HANG": "timeout", "SPIN": "timeout", "CRAS": "crashed", "GROW": "memory"},
        **{"LIAR": "crashed", "WRIT": "internal", "good": None, "long": "too-long"},
    }
    for name, row in rows.items():
        assert "error" not in row or row["error"]["message"].startswith(f"{name}: ")
    assert (server.root.parent / "written").read_bytes() == b""  # it may open, but not write
    assert "Traceback" not in server.log


def test_states(server):
    batch = server.create()
    commit, url = f"/v1/batch/{batch}/commit", f"/v1/batch/{batch}"
    assert server.client.post(commit).json()["error"]["kind"] == "empty"
    assert server.client.get(f"{url}/results").status_code == 409
    assert server.results(batch, partial="true") == ""
    assert server.upload(batch, {"a.wav": clip(1)}).status_code == 201
    assert server.status(batch)["state"] == "open"
    server.commit(batch)
    server.commit(batch)  # nothing new
    refused = server.upload(batch, {"b.wav": clip(2)})
    assert (refused.status_code, refused.json()["error"]["kind"]) == (409, "committed")
    server.wait(batch)
    assert len(server.results(batch).splitlines()) == 1
    assert server.client.delete(url).status_code == 204
    assert server.client.delete(url).status_code == 404
    assert server.client.get(url).status_code == 404
    assert server.client.post(commit).status_code == 404
    other = server.create()
    server.upload(other, {"a.wav": clip(1)})
    assert server.client.delete(f"/v1/batch/{other}").status_code == 204
    assert not os.listdir(server.root / "files")


def test_a_request_under_its_key_counts_once(server):
    batch, key = server.create(), "attempt-1"
    files = {"a.wav": clip(1), "b.wav": clip(2)}
    replies: list[Any] = []
    send = [
        threading.Thread(
            target=lambda: replies.append(server.upload(batch, files, **{"idempotency-key": key}))
        )
        for _ in range(4)
    ]
    for thread in send:
        thread.start()
    for thread in send:
        thread.join()
    assert {reply.status_code for reply in replies} == {201}
    assert len({reply.text for reply in replies}) == 1
    assert server.status(batch)["files"] == 2
    assert len(os.listdir(server.root / "files")) == 2  # the copies are gone
    other = server.upload(batch, {"c.wav": clip(3)}, **{"idempotency-key": key})
    assert (other.status_code, other.json()["error"]["kind"]) == (409, "key-reused")
    created = [
        server.client.post("/v1/batch/create", headers={"idempotency-key": "same"}).json()["id"]
        for _ in range(2)
    ]
    assert created[0] == created[1]
    for each in (batch, created[0]):
        server.client.delete(f"/v1/batch/{each}")


def test_limits(server):
    batch = server.create()
    large = server.upload(batch, {"ok.wav": clip(1), "large.wav": bytes(2**20 + 1)})
    assert (large.status_code, large.json()["error"]["kind"]) == (413, "too-large")
    huge = server.upload(batch, {"huge.wav": bytes(40 * 2**20)})  # refused while it is being sent
    assert huge.status_code == 413
    many = server.upload(batch, {f"{i}.wav": b"x" for i in range(9)})
    assert (many.status_code, many.json()["error"]["kind"]) == (413, "too-many")
    assert server.status(batch)["files"] == 0  # all of a request or nothing
    url = f"/v1/batch/{batch}/files"
    for content, kind, status in (
        (b"{}", "application/json", 415),
        (b"--x\r\n", "multipart/form-data; boundary=x", 400),
        (b"x", "multipart/form-data; boundary=x", 400),
        (
            b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\nv\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
            422,
        ),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 422),
        (b"", "multipart/form-data; boundary=" + "x" * 5000, 400),
    ):
        reply = server.client.post(url, content=content, headers={"content-type": kind})
        assert (reply.status_code, set(reply.json()["error"])) == (status, {"kind", "message"})
    assert not os.listdir(server.root / "files")
    assert not os.listdir(server.root / "incoming")


def test_a_client_that_vanishes_leaves_nothing(server):
    batch = server.create()
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/batch/{batch}/files HTTP/1.1\r\nHost: {host}\r\nContent-Length: 900000\r\n"
        f"Authorization: {server.client.headers['authorization']}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\nContent-Disposition: "
        'form-data; name="files"; filename="a.wav"\r\n\r\n'
    )
    with socket.create_connection((host, int(port))) as gone:
        gone.sendall(head.encode() + clip(1))
        time.sleep(0.2)
    assert server.upload(batch, {"b.wav": clip(2)}).status_code == 201
    until(lambda: not os.listdir(server.root / "incoming"), "the rest to be removed")
    assert server.status(batch)["files"] == 1
    assert "Traceback" not in server.log
    server.client.delete(f"/v1/batch/{batch}")


def events(server: Server, batch: str, **headers: str) -> list[tuple[str, str, Any]]:
    """(event, id, data) until the stream ends."""
    found = []
    with server.client.stream("GET", f"/v1/batch/{batch}/events", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in stream.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "event" in fields:
                found.append((fields["event"], fields.get("id", ""), json.loads(fields["data"])))
                fields = {}
    return found


def test_events_tell_each_result_once(server):
    batch = server.create()
    server.upload(batch, {f"{i}.wav": clip(i) for i in range(3)})
    seen: list[Any] = []
    listener = threading.Thread(target=lambda: seen.extend(events(server, batch)))
    listener.start()
    server.commit(batch)
    listener.join(60)
    rows = [data for name, _, data in seen if name == "result"]
    assert sorted(row["path"] for row in rows) == ["0.wav", "1.wav", "2.wav"]
    assert (seen[-1][0], seen[-1][2]["scored"]) == ("done", 3)
    first = next(number for name, number, _ in seen if name == "result")
    again = events(server, batch, **{"last-event-id": first})
    assert [data for name, _, data in again if name == "result"] == rows[1:]

    other = server.create()
    seen.clear()
    listener = threading.Thread(target=lambda: seen.extend(events(server, other)))
    listener.start()
    server.client.delete(f"/v1/batch/{other}")
    listener.join(60)
    assert not seen or seen[-1][0] == "deleted"


def test_tokens(server, command):
    mine = server.create()
    header = server.client.headers["authorization"]
    assert server.root.joinpath("service.db").read_bytes().find(header[-43:].encode()) == -1
    new = ("token", "create", "--name", "other", "--days", "1", "--root", server.root)
    other = command(*new).out.strip()

    def get(url: str, token: str = "") -> int:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return httpx.get(server.url + url, headers=headers).status_code

    url = f"/v1/batch/{mine}"
    assert get(url, header.removeprefix("Bearer ")) == 200
    assert get(url, other) == 404  # another's
    assert get("/v1/info", other) == 200
    refused = ("", "x", "anj_x_y", other[:-1], f"{other}x", "anj_" + "0" * 16 + other[20:])
    assert [get(url, token) for token in refused] == [401] * len(refused)
    assert get("/healthz") == 200
    assert get("/metrics") == 401
    token_id = other.split("_")[1]
    listed = command("token", "list", "--root", server.root)
    rows = {row["id"]: row for row in map(json.loads, listed.out.splitlines())}
    assert rows[token_id]["name"] == "other"
    assert other.split("_", 2)[2] not in listed.out
    assert command("token", "revoke", token_id, "--root", server.root).code == 0
    assert get("/v1/info", other) == 401
    assert command("token", "revoke", "nobody", "--root", server.root).code == 2
    server.client.delete(url)


def test_beyond_loopback_only_with_a_token(command, tmp_path):
    refused = command("serve", "--host", "0.0.0.0", "--port", "0", "--root", tmp_path / "root")
    assert (refused.code, refused.out) == (2, "")
    assert "make a token first" in refused.err
    assert refused.err.count("\n") == 1


def test_metrics_and_headers(server):
    batch = server.batch({"a.wav": clip(1), "b.wav": b"no"})
    server.wait(batch)
    parser = pytest.importorskip("prometheus_client.parser")
    reply = server.client.get("/metrics")
    families = parser.text_string_to_metric_families(reply.text)
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples[("artifactnet_worker_up",)] == 1
    assert samples[("artifactnet_waiting_files",)] == 0
    assert samples[("artifactnet_results_total", "failed")] >= 1
    assert samples[("artifactnet_audio_seconds_total",)] >= SECONDS
    key = ("artifactnet_request_seconds_count", "/v1/batch/{batch}/commit", "200", "POST")
    assert any(set(key) == set(name) for name in samples)
    assert batch not in reply.text
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    info = server.client.get("/v1/info").json()
    assert info["limits"]["files"] == 8
    assert info["engine"]["backend"] == "numpy"


# Servers of their own


def test_without_tokens_only_this_machines_own_requests(tmp_path, command):
    with Server(tmp_path / "root", "--rate", "20") as server:
        port = server.url.rsplit(":", 1)[1]

        def create(**headers: str) -> int:
            return httpx.post(f"{server.url}/v1/batch/create", headers=headers).status_code

        assert create() == 201
        assert create(origin=server.url) == 201
        assert create(host=f"localhost:{port}", origin=f"http://localhost:{port}") == 201
        for headers in (
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"host": f"evil.example:{port}"},  # a name that was made to point here
            {"host": f"evil.example:{port}", "origin": f"http://evil.example:{port}"},
            {"sec-fetch-site": "cross-site"},
            {"host": "[bad"},
        ):
            assert create(**headers) == 403
        assert 429 in [create() for _ in range(25)]
        assert (
            command("token", "create", "--root", tmp_path / "root").code == 0
        )  # from now on everybody needs one
        assert create() in (401, 429)  # from now on everybody needs one


def test_exactly_once_whatever_is_killed(tmp_path, database, command):
    """kill -9 of decoders, worker and server, and a stop in the middle."""
    files = {f"{i}.wav": clip(i) for i in range(14)}
    server = Server(tmp_path / "root", "--database", database)
    worker = 0
    try:
        server.start()
        batches = [server.batch(dict(itertools.islice(files.items(), i, None, 2))) for i in (0, 1)]
        open_batch = server.create()
        server.upload(open_batch, {"later.wav": clip(99)})

        def scored() -> int:
            return sum(server.status(batch)["scored"] for batch in batches)

        every = ("decoders", "worker", "server", "stop")
        for victim in every if database.startswith("sqlite") else ("both",):
            before = scored()
            until(lambda before=before: scored() > before or before == 14, "a result")
            worker = server.worker
            if victim == "decoders":
                for pid in [c for child in children(worker) for c in children(child)]:
                    kill(pid)
            if victim in ("worker", "both"):
                kill(worker)
            if victim in ("server", "both"):
                server.kill()
                server.start()
            if victim == "stop":
                stop(server, open_batch)
                server.start()
        server.commit(open_batch)
        for batch in [*batches, open_batch]:
            server.wait(batch)
        rows = [row for batch in batches for row in scores(server.results(batch))]
        assert len(scores(server.results(open_batch))) == 1
    finally:
        server.client.close()
        for pid in [worker, *children(server.process.pid), server.process.pid]:
            kill(pid)
        server.process.wait()
    assert sorted(row["path"] for row in rows) == sorted(files)
    folder = tmp_path / "direct"
    folder.mkdir()
    for name, data in itertools.islice(files.items(), 4):
        (folder / name).write_bytes(data)
    direct = command("score", "--backend", "numpy", "--format", "jsonl", folder)
    got = {row["path"]: row["score"] for row in rows}
    for path, row in direct.rows.items():
        assert got[os.path.basename(path)] == row["score"]
    assert not os.listdir(tmp_path / "root" / "files")


def stop(server: Server, batch: str) -> None:
    """SIGTERM: event streams end, the worker ends by itself, exit code 0."""
    listener = threading.Thread(target=lambda: events(server, batch))
    listener.start()
    worker = server.worker
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    listener.join(30)
    assert not listener.is_alive()
    assert not os.path.exists(f"/proc/{worker}")
    assert "Traceback" not in server.log
    server.client.close()


def test_a_full_disk_is_one_clear_error(tmp_path):
    """A file system of 96 MiB, of which 64 are kept free."""
    root = tmp_path / "root"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(root)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        with Server(root, "--quota-gb", "1") as server:
            batch = server.create()
            for _ in range(5):
                reply = server.upload(batch, {"a.wav": bytes(10 * 2**20)})
                if reply.status_code != 201:
                    break
            assert (reply.status_code, reply.json()["error"]["kind"]) == (507, "disk-full")
            stored = server.status(batch)["files"]
            assert 1 <= stored <= 4
            assert server.upload(batch, {"b.wav": clip(1)}).status_code == 201  # smaller: fits
            server.commit(batch)
            status = server.wait(batch)
            assert (status["failed"], status["scored"]) == (stored, 1)
            assert server.upload(server.create(), {"a.wav": bytes(10 * 2**20)}).status_code == 201
            assert "Traceback" not in server.log
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


SCHEMATHESIS = """
[[operations]]
include-path = "/v1/batch/{batch}/events"
request-timeout = 1.0
[[operations]]
include-path = "/v1/score"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 422]
[[operations]]
include-path = "/v1/batch/{batch}/files"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 404, 409, 413]
"""


def test_answers_are_as_documented(server, tmp_path):
    """Schemathesis on every operation, good requests and bad; bytes that are no audio are 422."""
    pytest.importorskip("schemathesis")
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    program = Path(sys.executable).parent / "schemathesis"
    options = ("--max-examples", "2", "--seed", "1", "--phases", "coverage,fuzzing")
    options += ("--request-timeout", "5", "--no-shrink", "--no-color", "--workers", "2")
    header = f"Authorization: {server.client.headers['authorization']}"
    done = subprocess.run(
        [program, "run", f"{server.url}/openapi.json", "-H", header, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-1000:]
    assert "Tested: 11" in done.stdout
    assert "Traceback" not in server.log


# The store alone


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    store = Store(database)
    yield store
    store.close()


def add(store: Store, batch: str, *names: str) -> list[File]:
    files = [File(new_id(), name, 1, "0" * 64) for name in names]
    store.add("", batch, files, 100, None, "")
    return files


def test_small_batches_do_not_wait_for_large_ones(store):
    large, small = store.create(""), store.create("")
    add(store, large, *"abcd")
    add(store, small, *"xy")
    store.commit("", large)
    store.commit("", small)
    order = [file.name for file in store.waiting(10)]
    assert order in (list("axbycd"), list("axybcd"))  # committed within one second
    assert [file.name for file in store.waiting(2)] == order[:2]


def test_one_result_of_a_file_whoever_writes_it(database, store):
    """Eight writers, as if as many workers had scored the same files."""
    batch = store.create("")
    add(store, batch, *map(str, range(6)))
    store.commit("", batch)
    waiting = store.waiting(10)
    wrote: list[bool] = []

    def write(number: int) -> None:
        own = Store(database)
        for file in waiting:
            wrote.append(own.record(file, "ai", json.dumps({"writer": number})))
        own.close()

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert (len(wrote), sum(wrote)) == (48, 6)
    assert len(store.results_after(batch, 0, 100)) == 6
    assert store.status("", batch)["state"] == "done"
    assert store.waiting(10) == []
    assert store.on_disk() == set()


def test_deleting_while_results_come(database, store):
    """No deadlock, no result of what is gone, no error."""
    batches = [store.create("") for _ in range(6)]
    for batch in batches:
        add(store, batch, *"abcd")
        store.commit("", batch)
    waiting, errors = store.waiting(100), []

    def record() -> None:
        own = Store(database)
        try:
            for file in waiting:
                own.record(file, "real", "{}")
        except Exception as error:
            errors.append(error)
        own.close()

    writer = threading.Thread(target=record)
    writer.start()
    for batch in batches:
        assert len(store.delete("", batch)) == 4
    writer.join()
    assert not errors
    assert store.waiting(10) == []
    assert all(store.results_after(batch, 0, 10) == [] for batch in batches)


def test_counts_of_every_verdict(store):
    batch = store.create("")
    words = ("ai", "partly-ai", "partly-ai", "unclear", "real", "undecided", "failed")
    add(store, batch, *"abcdefg")
    store.commit("", batch)
    for file, word in zip(store.waiting(9), words, strict=True):
        store.record(file, word, "{}")
    status = store.status("", batch)
    counts = {"ai": 1, "partly-ai": 2, "unclear": 1, "real": 1, "undecided": 1}
    assert (status["verdicts"], status["scored"], status["failed"]) == (counts, 6, 1)
    assert Batch(**status).model_dump(by_alias=True)["verdicts"] == counts


def test_what_expires(store):
    done, running, left = (store.create("") for _ in range(3))
    gone = [file.id for batch in (done, left) for file in add(store, batch, "a")]
    kept = add(store, running, "a")[0].id
    for batch in (done, running):
        store.commit("", batch)
    store.record(next(file for file in store.waiting(9) if file.batch == done), "ai", "{}")
    assert store.expire(60.0) == []
    assert sorted(store.expire(-1.0)) == sorted(gone)
    assert store.on_disk() == {kept}
    with pytest.raises(StateError, match="no such batch"):
        store.status("", done)


def test_tokens_end(store):
    assert not store.has_tokens()
    valid, past = store.add_token("valid", 1), store.add_token("past", -1)
    assert store.owner(valid) == valid.split("_")[1]
    assert store.owner(past) is None
    store.revoke(valid.split("_")[1])
    assert store.owner(valid) is None
    assert store.has_tokens()  # revoking the last one opens nothing


def test_a_database_belongs_to_one_root(store):
    assert store.belongs_to("here")
    assert store.belongs_to("here")
    assert not store.belongs_to("there")
