"""The page of the service, in a real browser against a real server."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifactnet_jax.files import SUFFIXES
from artifactnet_jax.results import WORDS
from audio_files import noise, write

for package in ("fastapi", "uvicorn", "python_multipart", "sqlalchemy", "httpx"):
    pytest.importorskip(package)
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

from chromium import chromium, needs_chromium  # noqa: E402
from serving import Server, make_token  # noqa: E402

PAGE = Path(__file__).parent.parent / "artifactnet_jax" / "serve" / "page"
PATIENCE_MS = 60_000
HOSTILE = "<img src=x onerror=alert(1)>.wav"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, weights_path: Path) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("page") / "root"
    token = make_token(root)
    limits = ("--max-file-mb", "1", "--rate", "100000", "--jobs", "1")
    with Server(root, "--weights", str(weights_path), *limits, token=token) as running:
        running.token = token  # type: ignore[attr-defined]
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page in a session of its own, of which nothing may go wrong or elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE_MS)
    wrong: list[str] = []
    expected = "Failed to load resource"  # what the console says of an answer like 401
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}"))
    opened.on(
        "console",
        lambda said: said.type == "error" and expected not in said.text and wrong.append(said.text),
    )
    context.on(
        "request",
        lambda request: (
            request.url.startswith((f"{server.url}/", "data:image/svg+xml", f"blob:{server.url}/"))
            or wrong.append(request.url)
        ),
    )
    opened.goto(server.url)
    yield opened
    context.close()
    assert not wrong


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tracks, one whose name is HTML, and one that is no audio."""
    folder = tmp_path_factory.mktemp("album")
    write(folder, "long.flac", noise(13, channels=1, seed=1))
    write(folder, "loud.wav", 3 * noise(4, channels=1, seed=2))
    os.rename(write(folder, "x.wav", noise(5, channels=1, seed=3)), folder / HOSTILE)
    (folder / "broken.mp3").write_bytes(b"ID3 and nothing else")
    return folder


def enter(page: Any, token: str) -> None:
    page.get_by_label("Access token").fill(token)
    page.keyboard.press("Enter")


def choose(page: Any, *paths: Path) -> None:
    page.set_input_files("#files", [str(path) for path in paths])


def wait_for_results(page: Any) -> None:
    page.get_by_role("heading", name="Results").wait_for()


def download(page: Any, label: str) -> bytes:
    with page.expect_download() as begun:
        page.get_by_role("group", name="Download").get_by_role("button", name=label).click()
    return Path(begun.value.path()).read_bytes()


def rows_shown(page: Any) -> dict[str, list[str]]:
    """Texts of each track in the list, by its name."""
    found = {}
    for item in page.locator("#tracks > li").all():
        texts = item.inner_text().split("\n")
        found[texts[1].strip()] = [text.strip() for text in texts]
    return found


@needs_chromium
def test_from_files_to_downloads_with_the_keyboard(page, server, album, score, tmp_path):
    enter(page, "wrong")
    page.get_by_text("not valid here").wait_for()
    enter(page, server.token)
    page.get_by_text("Drop audio files or a folder here").wait_for()

    huge = tmp_path / "huge.wav"
    huge.write_bytes(bytes(2**20 + 1))  # over the service's limit
    choose(page, *sorted(album.iterdir()), huge)
    page.get_by_role("button", name="Score 5 tracks").focus()
    page.keyboard.press("Enter")
    wait_for_results(page)
    page.get_by_text("2 failed").wait_for(state="attached")

    alone = {Path(path).name: row for path, row in score(album).rows.items()}
    shown = rows_shown(page)
    assert shown.keys() == {*alone, "huge.wav"}
    for name, row in alone.items():
        if "error" in row:
            assert shown[name][0] == "Failed"
            assert row["error"]["message"].split(": ", 1)[1] in shown[name][2]
        else:
            assert shown[name][0].lower() == WORDS[row["verdict"]].lower()
            assert f"{row['score']:.3f}" in shown[name]
    assert shown["huge.wav"][0] == "Failed"
    assert "1" in shown["huge.wav"][2]

    page.locator("summary", has_text="long.flac").focus()
    page.keyboard.press("Enter")
    opened = page.locator("details[open]")
    segments = alone["long.flac"]["segments"]
    cells = opened.locator("tbody td:nth-child(2)").all_inner_texts()
    assert cells == [f"{segment['score']:.3f}" for segment in segments]
    threshold = alone["long.flac"]["threshold"]
    above = sum(segment["score"] >= threshold for segment in segments)
    picture = opened.get_by_role("img")
    assert f"{above} of {len(segments)} segments" in picture.get_attribute("aria-label")
    assert opened.locator("audio").get_attribute("src").startswith("blob:")

    rows = [json.loads(line) for line in download(page, "JSONL").splitlines()]
    assert {row["path"] for row in rows} == alone.keys()
    for row in rows:
        assert row.get("score") == alone[row["path"]].get("score")
        assert row.get("segments") == alone[row["path"]].get("segments")
    table = list(csv.DictReader(io.StringIO(download(page, "CSV").decode())))
    assert [row["path"] for row in table] == [row["path"] for row in rows]
    book = zipfile.ZipFile(io.BytesIO(download(page, "Excel")))
    assert "long.flac" in book.read("xl/sharedStrings.xml").decode()

    page.get_by_role("group", name="Show").get_by_role("button", name="Failed").click()
    left = page.locator("#tracks > li:visible .name").all_inner_texts()
    assert sorted(text.split("\n")[0] for text in left) == ["broken.mp3", "huge.wav"]
    assert page.locator("#tracks img").count() == 0


@needs_chromium
def test_a_batch_is_there_after_a_reload_until_it_is_deleted(page, server, album):
    enter(page, server.token)
    page.get_by_text("Drop audio files").wait_for()
    data = (album / "loud.wav").read_bytes()
    page.evaluate(
        """bytes => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "dropped.wav"));
          const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true });
          document.getElementById("drop").dispatchEvent(event);
        }""",
        list(data),
    )
    page.get_by_role("button", name="Score 1 track").click()
    wait_for_results(page)
    batch = page.evaluate("sessionStorage.getItem('batch')")
    assert server.status(batch)["state"] == "done"
    page.reload()
    wait_for_results(page)
    assert [*rows_shown(page)] == ["dropped.wav"]

    page.get_by_role("button", name="Delete").click()
    page.keyboard.press("Escape")
    assert server.status(batch)["state"] == "done"
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Choose files").wait_for()
    assert server.client.get(f"/v1/batch/{batch}").status_code == 404


@needs_chromium
def test_a_folder_is_searched_and_without_events_the_page_polls(page, server, album):
    page.route("**/events", lambda route: route.abort())
    enter(page, server.token)
    page.get_by_text("Drop audio files").wait_for()
    (album / "cover.jpg").write_bytes(b"no audio, and not asked for")
    page.set_input_files("#folder", str(album))
    page.get_by_role("button", name="Score 4 tracks").click()
    wait_for_results(page)
    names = {f"{album.name}/{name}" for name in ("long.flac", "loud.wav", "broken.mp3", HOSTILE)}
    assert rows_shown(page).keys() == names


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_at_every_width(page, server, album, scheme):
    """Judged by axe, which knows WCAG 2.2; and nothing is wider than the window."""

    def check() -> None:
        for width in (400, 768, 1600):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response
            assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == []

    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.get_by_label("Access token").wait_for()
    check()
    enter(page, server.token)
    page.get_by_text("Drop audio files").wait_for()
    choose(page, album / "long.flac", album / "broken.mp3", album / HOSTILE)
    check()
    page.get_by_role("button", name="Score 3 tracks").click()
    wait_for_results(page)
    page.locator("summary").first.click()
    check()
    page.get_by_role("button", name="Delete").click()
    check()


def test_the_page_asks_for_nothing_from_elsewhere_and_knows_our_suffixes():
    """Read as text, so that it holds where there is no browser."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
    assert texts.keys() == {"index.html", "app.js", "style.css"}
    for name, text in texts.items():
        addresses = set(re.findall(r"https?://[^\s'\"]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name  # a namespace
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son[a-z]+=|style=", texts["index.html"])
    assert not re.search(r"innerHTML|insertAdjacentHTML|\beval\(|document\.write", texts["app.js"])
    listed = texts["app.js"].split("SUFFIXES = (", 1)[1].split(")", 1)[0]
    assert set(re.findall(r"\.[a-z0-9]+", listed)) == SUFFIXES
