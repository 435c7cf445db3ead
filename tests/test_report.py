"""The verb `report`: pages, what they show, and how they behave in a browser."""

from __future__ import annotations

import dataclasses
import html.parser
import importlib.util
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import scipy.special
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("av")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from artifactnet_jax import report as report_verb
from artifactnet_jax import report_page
from artifactnet_jax.audio import read_mono
from artifactnet_jax.config import Config, Decision
from artifactnet_jax.decision import Span
from artifactnet_jax.detector import Detector
from artifactnet_jax.dsp_numpy import effective_bandwidth
from artifactnet_jax.results import SegmentScore, Verdict
from artifactnet_jax.weights import Weights
from audio_files import encode, noise, write
from chromium import chromium, needs_chromium
from tiny_model import TINY, save_tiny

RATE = 44_100
EVIL = "<img src=x onerror=alert(1)>&\"' $title.wav"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """Three recordings, one with a name that means harm, and one file that is none."""
    folder = tmp_path_factory.mktemp("album")
    t = np.arange(9 * RATE) / RATE
    chirp = scipy.signal.chirp(t, 200, 9, 12_000)
    write(folder, "a chirp.wav", (8000 * chirp).astype(np.int16)[:, None])
    (folder / "broken.flac").write_bytes(b"no audio")
    (folder / EVIL).write_bytes(encode(noise(5), "wav"))
    write(folder, "silent.wav", np.zeros((3 * RATE, 1), np.int16))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, album, tiny) -> Path:
    """The folder that the command has written for them."""
    from artifactnet_jax.cli import main

    folder = tmp_path_factory.mktemp("made") / "deep" / "report"
    options = ["--weights", str(tiny), "--backend", "numpy", "-q"]
    assert main(["report", str(album), "-o", str(folder), *options]) == 1
    return folder


def data_of(made: Path, start: str) -> dict[str, Any]:
    (path,) = made.glob(f"{start}-*.json")
    return json.loads(path.read_text())


class Reader(html.parser.HTMLParser):
    """Elements of a page with their attributes, and the text of some."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        self.texts[self._inside] = self.texts.get(self._inside, "") + data


# --- What is written ------------------------------------------------------------------------------


def test_rows_are_those_of_the_detector_and_failures_are_rows(made, album, tiny):
    index = json.loads((made / "index.json").read_text())["tracks"]
    names = sorted(path.name for path in album.iterdir())
    assert [Path(row["path"]).name for row in index] == names
    detector = Detector(tiny, "numpy")
    for number, row in enumerate(index, 1):
        if row["path"].endswith("broken.flac"):
            assert row["error"]["kind"] == "unsupported"
            assert not list(made.glob(f"{number}-*"))
            continue
        expected = json.loads(json.dumps(detector.score(row["path"]).to_dict()))
        for each in (row, data_of(made, str(number))["result"]):
            assert {**each, "timings": 0} == {**expected, "timings": 0}
    text = Reader(made / "index.html").texts
    assert "not audio in a known format" in text["td"]
    assert len(list(made.iterdir())) == 3 * 2 + 2  # and nothing half written


def test_names_of_files_are_text_and_nothing_else(made, album):
    number = sorted(path.name for path in album.iterdir()).index(EVIL) + 1
    (path,) = made.glob(f"{number}-*.html")
    assert path.name == f"{number}-img-src-x-onerror-alert-1-title.html"
    for page in (path, made / "index.html"):
        seen = Reader(page)
        kinds = [tag for tag, _ in seen.elements]
        assert kinds.count("script") == (2 if page is path else 1)
        for tag, attributes in seen.elements:
            assert not any(name.startswith("on") for name in attributes)
            if tag == "img":
                assert str(attributes["src"]).startswith("data:image/png;base64,")
        assert EVIL in seen.texts["h1" if page is path else "a"]


def test_pages_hold_all_that_they_show(made):
    for page in made.glob("*.html"):
        assert page.stat().st_size < report_verb.PAGE_BYTES
        for tag, attributes in Reader(page).elements:
            for name in ("src", "href", "xlink:href", "data", "action", "poster"):
                value = attributes.get(name) or ""
                local = value.endswith(".html") and "/" not in value and ":" not in value
                assert not value or value.startswith(("data:", "#")) or local, (tag, value)
        assert "@import" not in page.read_text()
        assert "url(http" not in page.read_text()


def test_the_same_tracks_give_the_same_pages(made, album, tiny, command, tmp_path):
    options = ("--weights", tiny, "--backend", "numpy", "-q", "-o", tmp_path)
    done = command("report", album / "a chirp.wav", *options)
    assert (done.code, done.out) == (0, f"{tmp_path / 'index.html'}\n")
    ours = (tmp_path / "1-a-chirp.html").read_bytes()
    number = sorted(path.name for path in album.iterdir()).index("a chirp.wav") + 1
    assert ours == (made / f"{number}-a-chirp.html").read_bytes()


# --- What is shown --------------------------------------------------------------------------------


def test_figures_against_the_stages_of_the_backend_and_scipy(made, album, tiny):
    path = album / "a chirp.wav"
    data = data_of(made, str(sorted(p.name for p in album.iterdir()).index(path.name) + 1))
    audio = read_mono(path, RATE, "x")
    starts = [round(segment["start_s"] * RATE) for segment in data["result"]["segments"]]
    assert [round(one["start_s"] * RATE) for one in data["looked_at"]] == starts
    backend: Any = Detector(tiny, "numpy").backend
    stages = [backend.stages(audio[s : s + RATE]) for s in starts]
    energy = {k: sum(np.square(s[k]).sum(dtype=np.float64) for s in stages) for k in ("H", "P")}
    residual = sum(np.square(s["residual"]).sum(axis=1, dtype=np.float64) for s in stages)
    masks = np.stack([s["mask"] for s in stages]).astype(np.float64)
    facts = data["figures"]
    assert facts["H_energy_fraction"] == pytest.approx(energy["H"] / residual.sum(), rel=1e-4)
    assert facts["P_energy_fraction"] == pytest.approx(energy["P"] / residual.sum(), rel=1e-4)
    assert facts["mean_mask"] == pytest.approx(masks.mean(), rel=1e-4)
    assert facts["mask_spread"] == pytest.approx(masks.std(), rel=1e-2)
    assert facts["residual_bandwidth_hz"] == effective_bandwidth(residual, RATE)
    logits = [float(s["logit"]) for s in stages]
    assert facts["network_logit"] == pytest.approx(np.median(logits), abs=1e-4)
    assert facts["texture_logit"] is None  # these weights have no such head
    hz, power = scipy.signal.welch(audio.astype(np.float64), RATE, nperseg=2048)
    within = np.searchsorted(np.cumsum(power), 0.95 * power.sum())
    assert facts["input_bandwidth_hz"] == pytest.approx(hz[within], abs=100)


def test_the_picture_of_a_chirp_rises_where_the_chirp_does(made, album):
    import base64

    data = data_of(made, str(sorted(p.name for p in album.iterdir()).index("a chirp.wav") + 1))
    facts = data["spectrograms"]
    image = np.frombuffer(base64.b64decode(facts["uint8"]["input"]), np.uint8)
    image = image.reshape(facts["rows"], facts["columns"])
    t = (np.arange(facts["columns"]) + 0.5) * 9 / facts["columns"]
    expected = 200 + (12_000 - 200) * t / 9
    strongest = (image.argmax(axis=0) + 0.5) * facts["top_hz"] / facts["rows"]
    assert np.abs(strongest - expected).max() < 2 * facts["top_hz"] / facts["rows"] + 100


def test_what_was_not_looked_at_is_blank_or_said():
    """Segments of 1 s at 0 and 5 s of 8: each is drawn until the next one, or the end."""
    one = {"input": np.array([[1.0, 1.0], [0.0, 0.1]])}
    seen = [report_verb.Look(s, one, {}, None, None) for s in (0.0, 5.0)]
    image = report_verb.picture("input", seen, TINY.front_end, 8.0)
    assert image.shape == (2, report_verb.COLUMNS)
    assert (image[0] == report_verb.LEVELS - 1).all()
    # 10 dB down of 90, in 64 levels; and the floor.
    assert set(image[1].tolist()) == {0, int(64 * (1 - 10 / 90))}
    late = report_verb.picture("input", seen[1:], TINY.front_end, 8.0)
    blank = math.floor(report_verb.COLUMNS * 5 / 8)
    assert (late[:, :blank] == report_verb.LEVELS).all()
    assert (late[:, blank:] < report_verb.LEVELS).all()


def test_what_a_track_is_filled_up_with_is_not_drawn():
    """A track of 0.5 s in a segment of 1 s, the second half of which is zeros."""
    one = {"input": np.array([[1.0, 1.0, 0.0, 0.0]])}
    seen = [report_verb.Look(0.0, one, {}, None, None)]
    image = report_verb.picture("input", seen, TINY.front_end, 0.5)
    assert (image == report_verb.LEVELS - 1).all()


def weights_with(**changes: Any) -> Weights:
    config = Config("x", verdict=Decision(**changes.pop("verdict", {})))
    return Weights("x", config, {}, "0", "none", changes.pop("provenance", {}))


def verdict_of(score: float, n: int = 1, **changes: Any) -> Verdict:
    facts: dict[str, Any] = {
        "path": "x.wav",
        "verdict": "ai" if score >= 0.5 else "real",
        "score": score,
        "threshold": 0.5,
        "segments": tuple(SegmentScore(4.0 * k, score) for k in range(n)),
        "duration_s": 4.0 * n,
        "sample_rate": RATE,
        "channels": 1,
        "weights": {"name": "x", "sha256": "0", "preset": "edge"},
        "backend": "numpy",
        "dtype": "float32",
        "aggregate": "median",
        "plan": "all",
    }
    return Verdict(**facts | changes)


POINTS = {"operating_points": (("fpr1", 0.9), ("fpr5", 0.7), ("balanced", 0.4))}
MASK = {"mean_mask": 0.25, "mask_max": 0.5}


@pytest.mark.parametrize(
    ("score", "facts", "there", "not_there"),
    [
        (0.95, {}, ["reaches fpr1 (0.900)", "1 % were called AI"], ["fpr5", "flat", "texture"]),
        (0.75, {}, ["reaches fpr5 (0.700)", "5 %"], ["fpr1"]),
        (0.5, {}, ["reaches no operating point, not even fpr5 (0.700)"], ["balanced"]),
        (0.5, {**MASK, "mask_spread": 0.02}, ["0.250 in the mean", "nearly flat"], []),
        (0.5, {**MASK, "mask_spread": 0.2}, ["0.250 in the mean", "0.200"], ["flat"]),
        (
            0.5,
            {**MASK, "mask_spread": 0.2, "network_logit": 3.0, "texture_logit": -1.0},
            ["comes from the network", "-1.00", "+3.00"],
            [],
        ),
        (
            0.5,
            {**MASK, "mask_spread": 0.2, "network_logit": 0.5, "texture_logit": -1.0},
            ["comes from the texture head"],
            [],
        ),
    ],
)
def test_statements_follow_from_the_data(score, facts, there, not_there):
    said = " ".join(report_verb.statements(weights_with(verdict=POINTS), verdict_of(score), facts))
    assert "not calibrated" in said
    assert all(text in said for text in there)
    assert not any(text in said for text in not_there)


def test_confidence_is_said_of_calibrated_weights_only():
    calibrated = {"history": [{"phase": "texture", "calibration": {"own": 1.0}}]}
    tuned = {"history": [*calibrated["history"], {"phase": "head"}]}
    for provenance, expected in ((calibrated, "about 62 in 100"), (tuned, "not calibrated")):
        weights = weights_with(provenance=provenance)
        assert expected in report_verb.statements(weights, verdict_of(0.62), {})[1]


EVIDENCE = {"base": -0.126, "segments": 1.126, "fine": 0.334, "decoder": 0.0, "prior": 0.0}


def fused_verdict(**changes: Any) -> Verdict:
    """The verdict of a calibrated score: log-odds of 1.334."""
    facts = {"prior": 0.5, "evidence": EVIDENCE, "band": (0.2, 0.9), "ai_share": 0.0}
    return verdict_of(float(scipy.special.expit(1.334)), 20, **facts | changes)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"verdict": "ai"}, "This sounds like the output of an AI music generator."),
        (
            {"verdict": "partly-ai", "spans": (Span(32.0, 64.0, 0.9),), "ai_share": 0.4},
            "A part of this track is AI from 0:32 to 1:04, 40% of its length.",
        ),
        ({"verdict": "unclear", "reason": "why"}, "The detector does not know: why."),
        ({"verdict": "real"}, "No sign of AI was found. That is no certificate"),
        ({"verdict": "undecided", "reason": "too short"}, "too little to judge: too short."),
    ],
)
def test_the_sentence_that_matters_comes_first(changes, first):
    said = report_verb.statements(weights_with(), fused_verdict(**changes), {})
    assert first in said[0]
    assert "of 100 tracks with such a score, about 79 are AI" in said[1]
    assert "50 % AI" in said[1]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(-20, 20), max_size=6))
def test_what_is_shown_of_the_evidence_adds_up(values):
    shown = report_page.adding_up({str(k): value for k, value in enumerate(values)})
    assert [name for name, _ in shown] == [str(k) for k in range(len(values))]
    assert sum(value for _, value in shown) == pytest.approx(sum(values), abs=0.0051)
    for (_, value), exact in zip(shown, values, strict=True):
        assert value == pytest.approx(exact, abs=0.0101)
        assert round(value, 2) == value


def test_the_page_shows_spans_evidence_and_band(tmp_path, tiny):
    audio = write(tmp_path, "a.wav", noise(20, channels=1))
    detector = Detector(str(tiny), "numpy", banks=())
    spans = (Span(5.0, 15.0, 0.9),)
    verdict = dataclasses.replace(
        fused_verdict(verdict="partly-ai", spans=spans, ai_share=0.5),
        path=str(audio),
        segments=tuple(SegmentScore(float(k), 0.6) for k in range(20)),
        duration_s=20.0,
        threshold=0.9,
    )
    text, data = report_verb.make_page(detector, verdict)
    (tmp_path / "page.html").write_text(text)
    seen = Reader(tmp_path / "page.html")
    (span,) = [a for tag, a in seen.elements if a.get("class") == "span"]
    assert (span["x"], span["width"]) == ("250.00", "500.00")  # of 1000
    bars = {a["class"]: a for tag, a in seen.elements if tag == "path" and a.get("class")}
    assert bars["ai"]["d"]
    assert not bars["real"]["d"]  # against even odds, not against the threshold of the whole
    marks = [a for tag, a in seen.elements if tag == "rect" and a.get("class") == "unclear"]
    assert [(mark["x"], mark["width"]) for mark in marks] == [("200.0", "700.0")]
    cells = re.findall(r"<td>([+-][0-9.]+)</td>", text)
    assert cells == ["-0.13", "+1.13", "+0.33", "+0.00", "+0.00", "+1.33"]
    assert sum(map(float, cells[:-1])) == pytest.approx(float(cells[-1]))
    assert "Partly AI" in seen.texts["span"]
    assert "unclear from 0.200" in text
    assert data["segment_threshold"] == 0.5
    assert data["result"]["spans"] == [{"start_s": 5.0, "end_s": 15.0, "score": 0.9}]
    index = report_page.index_page([("1-a", verdict), ("2-b", verdict_of(0.1))])
    assert "1 partly AI, 1 no sign of AI" in index


def test_the_page_says_what_was_found_of_decoders(made, album):
    names = sorted(path.name for path in album.iterdir())
    number = names.index("a chirp.wav") + 1
    seen = data_of(made, str(number))["decoder_lines"]
    text = (made / f"{number}-a-chirp.html").read_text()
    assert seen["match"] is None
    assert f"No decoder was found ({seen['reason']})" in text
    assert "no finding" in text
    assert text.count("lines of ") >= 2  # in plots
    number = names.index("silent.wav") + 1
    seen = data_of(made, str(number))["decoder_lines"]
    (page,) = made.glob(f"{number}-*.html")
    assert f"No decoder was looked for: {seen['reason']}" in page.read_text()


def test_without_banks_there_is_nothing_of_decoders(tmp_path, tiny):
    audio = write(tmp_path, "a.wav", noise(4, channels=1))
    detector = Detector(str(tiny), "numpy", banks=())
    text, data = report_verb.make_page(detector, detector.score(audio))
    assert data["decoder_lines"] is None
    assert "decoder's lines" not in text


def test_a_silent_track_has_a_page_without_a_score(made, album):
    number = sorted(path.name for path in album.iterdir()).index("silent.wav") + 1
    data = data_of(made, str(number))
    assert data["statements"] == ["There is no score: every segment is silent."]
    assert data["spectrograms"]["uint8"] == {}
    (page,) = made.glob(f"{number}-*.html")
    assert "Undecided" in Reader(page).texts["span"]


@pytest.mark.parametrize(
    ("provenance", "expected"),
    [
        ({}, []),
        ({"limits": []}, []),
        ({"limits": "not a list"}, []),
        ({"limits": ["Never in <March>.", "Nor at sea."]}, ["Never in <March>.", "Nor at sea."]),
    ],
)
def test_limits_are_those_of_the_weights(provenance, expected):
    assert report_verb.limits(weights_with(provenance=provenance)) == expected


def test_the_page_shows_the_limits_or_that_there_are_none(tmp_path, tiny):
    from artifactnet_jax.weights import load_weights, write_weights

    audio = write(tmp_path, "x.wav", noise(1, channels=1))
    stated = load_weights(tiny)
    provenance = {**stated.provenance, "limits": ["Never in <March>."]}
    write_weights(dataclasses.replace(stated, provenance=provenance), tmp_path / "stated")
    for path, text in ((tiny, "These weights state no limits"), (tmp_path / "stated", "<March>")):
        detector = Detector(path, "numpy")
        html_text, data = report_verb.make_page(detector, detector.score(audio))
        (tmp_path / "page.html").write_text(html_text)
        seen = Reader(tmp_path / "page.html").texts
        assert text in seen["p"] + seen["li"]
        assert data["limits"] == list(provenance["limits"] if path != tiny else [])


def test_weights_that_run_as_a_graph_show_their_input_alone():
    audio = noise(1, channels=1)[:, 0].astype(np.float32) / 32768
    seen = report_verb.look(audio, 0.0, TINY.front_end, None)
    assert list(seen.power) == ["input"]
    _, _, spectrum = scipy.signal.stft(
        audio, RATE, nperseg=2048, noverlap=1536, boundary="even", padded=False
    )
    expected = np.square(np.abs(spectrum)) * 1024**2
    frames = slice(5, -5)
    total = seen.pictures["input"][:, frames].mean()
    assert total == pytest.approx(expected[:, frames].mean(), rel=0.03)
    said = report_verb.statements(weights_with(), verdict_of(0.5), {})
    assert "nothing between input and score" in " ".join(said)


# --- Sound and size -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "kbit", "rate"), [(200_000, 64, 44_100), (60_000, 32, 22_050), (24_000, 16, 16_000)]
)
def test_the_sound_is_the_tracks_and_fits(tmp_path, budget, kbit, rate):
    t = np.arange(12 * RATE) / RATE
    tone = np.where(t < 6, np.sin(2 * np.pi * 440 * t), np.sin(2 * np.pi * 880 * t))
    path = write(tmp_path, "x.wav", np.stack([8000 * tone] * 2, axis=1).astype(np.int16))
    data, facts = report_verb.encode_audio(path, 12.0, budget)
    assert len(data) <= budget
    assert (facts["kbit_s"], facts["sample_rate"]) == (kbit, rate)
    heard, at = soundfile.read(io.BytesIO(data))
    assert (heard.ndim, at) == (1, rate)
    assert len(heard) / at == pytest.approx(facts["seconds"], abs=0.1)
    assert facts["shortened"] == (kbit == 16)
    for start, hz in ((1, 440), (7, 880)):
        part = heard[start * at : (start + 2) * at]
        peak = np.abs(np.fft.rfft(part)).argmax() / 2
        assert peak == pytest.approx(hz, abs=1)
        assert np.sqrt(2) * part.std() == pytest.approx(8000 / 32768, rel=0.1)


def test_a_page_of_a_day_stays_small_and_says_what_it_left_out(tmp_path, tiny):
    path = write(tmp_path, "x.wav", noise(3, channels=1))
    detector = Detector(tiny, "numpy")
    verdict = verdict_of(0.75, 21_600, path=str(path))
    text, data = report_verb.make_page(detector, verdict)
    assert len(text.encode()) < report_verb.PAGE_BYTES
    assert data["audio"]["shortened"]
    assert data["audio"]["kbit_s"] == 16
    assert "of 24:00:00" in text
    assert "Of 1 of 21600 segments" in text  # of those chosen the file has but one
    assert f"{21_600 / 6 - report_page.LISTED:,.0f} more are in the JSON file" in text
    assert len(data["result"]["segments"]) == 21_600


# --- Errors ---------------------------------------------------------------------------------------


def test_what_cannot_be_is_said_in_one_line(command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for arguments in (("-", "-o", tmp_path / "x"), ("a.wav", "-o", tmp_path / "file" / "x")):
        done = command("report", *arguments)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    done = command("report", "a.wav", "-o", tmp_path / "x")
    assert done.code == 3
    assert 'pip install "artifactnet-jax[report]"' in done.err


# --- In a browser ---------------------------------------------------------------------------------


@needs_chromium
def test_pages_in_a_browser(made, album):
    number = sorted(path.name for path in album.iterdir()).index("a chirp.wav") + 1
    path = made / f"{number}-a-chirp.html"
    segments = data_of(made, str(number))["result"]["segments"]
    wrong: list[str] = []
    with chromium() as browser:
        page = browser.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        page.on(
            "request",
            lambda asked: asked.url.startswith(("file://", "data:")) or wrong.append(asked.url),
        )
        for each in sorted(made.glob("*.html")):
            for width, scheme in ((400, "light"), (1280, "light"), (400, "dark")):
                page.set_viewport_size({"width": width, "height": 900})
                page.emulate_media(color_scheme=scheme)
                page.goto(each.as_uri())
                root = "document.documentElement"
                fits = page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
                assert fits, (each.name, width)
                ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert (int(ground[4:].split(",")[0]) < 100) == (scheme == "dark")
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(path.as_uri())
        # The first audible frame of sound is there.
        assert page.evaluate(
            "new Promise((done) => { const a = document.querySelector('audio');"
            "if (a.readyState >= 2) done(a.duration); a.oncanplay = () => done(a.duration);"
            "a.onerror = () => done(-1); })"
        ) == pytest.approx(9, abs=0.1)
        time = "document.querySelector('audio').currentTime"
        paused = "document.querySelector('audio').paused"
        timeline = page.locator(".timeline")
        for index in (6, 2):
            start = segments[index]["start_s"]
            timeline.scroll_into_view_if_needed()
            box = timeline.bounding_box()
            at = {"x": box["width"] * (start + 0.6) / 9, "y": box["height"] / 2}
            timeline.click(position=at)
            assert start <= page.evaluate(time) < start + 0.6
            assert not page.evaluate(paused)
            shown = timeline.get_attribute("aria-valuetext")
            assert f"score {segments[index]['score']:.3f}" in shown
        assert page.evaluate("document.activeElement.className") == "plot timeline"
        page.keyboard.press("Space")
        assert page.evaluate(paused)
        page.keyboard.press("Home")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert page.evaluate(time) == pytest.approx(segments[3]["start_s"], abs=0.01)
        page.keyboard.press("Enter")
        assert not page.evaluate(paused)
        page.evaluate("document.querySelector('details').open = true")
        page.locator("td button").nth(5).click()
        assert 0 <= page.evaluate(time) - segments[5]["start_s"] < 0.5
        assert page.locator("tr.now").count() == 1
    assert wrong == []
