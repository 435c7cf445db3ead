"""The report of a benchmark: what is on the page, in its tables and in the files beside it.

How the page looks is not tested here; that nothing is missing, broken or fetched is.
"""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_curve

from artifactnet_jax.bench.accuracy_report import write_report
from artifactnet_jax.evaluation import choose_threshold, evaluate

NAMES = ["edge", 'a<b>&"|$x_1$ `c`', "module.name:" + "VeryLong" * 12]
ODD = "音 <i>|$^$_" + "x" * 70  # a source
VOID = ("meta", "wbr", "br")
Row = dict[str, Any]


def tracks(split: str = "test", sources: int = 8) -> list[Row]:
    """Ten tracks of each source, every other source AI; the last one's name is odd."""
    rows = []
    for s in range(sources):
        source = ODD if s == sources - 1 else f"source {s}"
        for k in range(10):
            row: Row = {
                "id": f"{s}/{k}",
                "label": s % 2,
                "source": source,
                "lineage": f"{s}/{k // 2}",
            }
            row |= {"generator": f"G{s % 4}" if s % 2 else "", "group": "AB"[s % 4 // 2]}
            rows.append(row | {"split": split})
    return rows


def results(rows: list[Row], names: list[str]) -> list[Row]:
    """Scores that are worse from detector to detector; each misses one track."""
    rng = np.random.default_rng(0)
    found = []
    for d, name in enumerate(names):
        for k, row in enumerate(rows):
            score = float(np.clip(rng.normal(0.3 + 0.4 * row["label"], 0.15 + 0.1 * d), 0, 1))
            entry: Row = {"id": row["id"], "detector": name, "score": score, "error": None}
            if k == d:
                entry |= {"score": None, "error": {"kind": "decode", "message": "is <HTML>"}}
            found.append(entry | {"segments": [], "seconds": 0.5 + d})
    return found


def detectors(names: list[str]) -> list[Row]:
    return [
        {"name": name, "params": None if d else 4_027_490, "gflops": None}
        for d, name in enumerate(names)
    ]


def report(out: Path, rows: list[Row], found: list[Row], names: list[str], **kwargs: Any) -> Any:
    given = {"threshold": 0.5, "stress": None, "sanity": None, "mechanism": None, "resamples": 30}
    write_report(out, rows, found, detectors=detectors(names), **(given | kwargs))
    return json.loads((out / "metrics.json").read_text())


STRESS = [
    {
        "detector": name,
        "changes": [
            {
                "stress": "mp3-128",
                "n": 8,
                "tpr": 0.75,
                "plain_tpr": 1.0,
                "fpr": 0.25,
                "moved": 0.125,
            }
            | {"plain_fpr": 0.0, "mean_ai": 0.7, "mean_real": 0.2, "flips": 2},
            {"stress": "$odd_1$ <name>", "n": 0, "tpr": None, "plain_tpr": None, "fpr": None}
            | {"plain_fpr": None, "mean_ai": None, "mean_real": None, "moved": None, "flips": 0},
        ],
        "codec_delta": {"all": {"n": 4, "mean": 0.2, "median": 0.1, "p90": 0.3, "max": 0.4}}
        | {"passed": False},
    }
    for name in NAMES
]
SANITY = [
    {"detector": name, "subset": s, "label": 1, "n": 10, "scored": k, "rate": rate, "limit": 0.9}
    | {"passed": rate == 1}
    for name in NAMES
    for s, k, rate in (("good", 10, 1.0), ("unheard", 0, None))
]
FIGURES = {"n": 10, "mean_mask": 0.25, "bandwidth_hz": 1996.4, "crest_db": 14.5}
MECHANISM = [
    {
        "detector": "edge",
        "teacher": "htdemucs",
        "sources": [
            {"source": "all ai", "label": 1, **FIGURES},
            {"source": ODD, "label": 1, **FIGURES},
        ],
        "ablations": [{"ablation": "without mel_H", "n": 10, "f1": 0.5, "delta_auroc": None}],
    }
]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of three detectors with everything in it."""
    out = tmp_path_factory.mktemp("full")
    rows = tracks()
    parts = {"stress": STRESS, "sanity": SANITY, "mechanism": MECHANISM}
    report(out, rows, results(rows, NAMES), NAMES, **parts)
    return out


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects ids, references and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "xlink:href", "src"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")


def table(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_what_a_detector_leaves_open(tmp_path: Path) -> None:
    """Of 80 judged tracks 20 are unclear and 4 undecided; a detector without words says nothing."""
    rows = tracks()
    words = ["unclear"] * 20 + ["undecided"] * 4 + ["partly-ai"] * 6 + ["real"] * 50
    found = results(rows, NAMES[:2])
    for entry, word in zip(found[: len(rows)], words, strict=True):
        entry["verdict"] = word
    figures = report(tmp_path, rows, found, NAMES[:2])["detectors"]
    assert [figures[name]["decided"] for name in NAMES[:2]] == [0.7, None]
    assert "70.0%" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_page_is_well_formed_and_fetches_nothing(full: Path) -> None:
    text = (full / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.references
    assert all(reference[0] == "#" and reference[1:] in page.ids for reference in page.references)
    assert not re.search(r"https?:|@import|<(script|link|img|image|iframe)\b", text)
    assert not page.tags & {"b", "i"}  # those of names
    assert "prefers-color-scheme: dark" in text


def test_names_are_shown_whole(full: Path) -> None:
    said = "".join(Page((full / "report.html").read_text(encoding="utf-8")).texts)
    for name in (*NAMES, ODD, "$odd_1$ <name>"):
        assert name in said


def test_every_figure_has_its_data(full: Path) -> None:
    text = (full / "report.html").read_text(encoding="utf-8")
    named = set(re.findall(r"Data: (figures/\w+\.csv)", text))
    assert named == {f"figures/{path.name}" for path in (full / "figures").iterdir()}
    expected = "roc precision_recall f1_threshold calibration score_distributions cost"
    expected += " ai_sources real_sources stress"
    assert {Path(name).stem for name in named} == set(expected.split())
    assert text.count("<figure") == len(named)
    markdown = (full / "report.md").read_text(encoding="utf-8")
    for name in named:
        assert f"({name})" in markdown
        assert {row["detector"] for row in table(full / name)} == set(NAMES)


def test_data_of_curves(full: Path) -> None:
    """Against scikit-learn, from the same scores."""
    rows, name = tracks(), NAMES[1]
    scores = {r["id"]: r["score"] for r in results(rows, NAMES) if r["detector"] == name}
    kept = [row for row in rows if scores[row["id"]] is not None]
    label = np.array([row["label"] for row in kept])
    score = np.array([scores[row["id"]] for row in kept])
    own = [row for row in table(full / "figures/roc.csv") if row["detector"] == name]
    fpr, tpr, _ = roc_curve(label, score)
    np.testing.assert_allclose([float(row["fpr"]) for row in own], fpr)
    np.testing.assert_allclose([float(row["tpr"]) for row in own], tpr)
    for row in table(full / "figures/f1_threshold.csv"):
        if row["detector"] == name and row["threshold"] in ("0.25", "0.5"):
            assert float(row["f1"]) == pytest.approx(
                f1_score(label, score >= float(row["threshold"]))
            )
    own = [row for row in table(full / "figures/calibration.csv") if row["detector"] == name]
    assert sum(int(row["tracks"]) for row in own) == len(kept)
    found = sum(float(row["share_of_ai"]) * int(row["tracks"]) for row in own)
    assert found == pytest.approx(label.sum())
    shares = [r for r in table(full / "figures/score_distributions.csv") if r["detector"] == name]
    assert sum(float(row["share"]) for row in shares) == pytest.approx(2)
    for row in table(full / "figures/ai_sources.csv"):
        if row["detector"] == name:
            own_scores = [scores[r["id"]] for r in rows if r["source"] == row["source"]]
            known = [s for s in own_scores if s is not None]
            assert float(row["recall"]) == pytest.approx(np.mean(np.array(known) >= 0.5))
            assert int(row["tracks"]) == len(known)


def test_metrics_are_those_of_evaluate(full: Path) -> None:
    rows = tracks()
    scores = {r["id"]: r["score"] for r in results(rows, NAMES) if r["detector"] == "edge"}
    found = json.loads((full / "metrics.json").read_text())
    assert found["schema"] == "artifactnet-jax/bench/1"
    own = found["detectors"]["edge"]
    expected = evaluate([{**row, "score": scores[row["id"]]} for row in rows], 0.5, resamples=30)
    assert own["judged"] == expected
    assert (own["params"], own["seconds_per_track"]) == (4_027_490, 0.5)
    assert [(pair["a"], pair["b"]) for pair in found["comparisons"]] == [
        (NAMES[0], NAMES[1]),
        (NAMES[0], NAMES[2]),
        (NAMES[1], NAMES[2]),
    ]
    assert [(row["detector"], row["n"], row["kind"]) for row in found["failures"]] == [
        (name, 1, "decode") for name in NAMES
    ]
    assert found["stress"] == STRESS


def section(markdown: str, title: str) -> str:
    return markdown.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_tables(full: Path) -> None:
    markdown = (full / "report.md").read_text(encoding="utf-8")
    for line in markdown.splitlines():  # a name's bar does not end a cell
        if line.startswith("| "):
            header_of = len(re.findall(r"(?<!\\)\|", line))
            assert header_of > 2
    ranked = re.findall(r"^\| (edge|a&lt|module)", section(markdown, "Results"), re.M)[:3]
    assert ranked == ["edge", "a&lt", "module"]  # best F1 first
    for title in ("Missing tracks left out", "Missing tracks counted as wrong"):
        assert f"### {title}" in markdown
    stress = section(markdown, "Stress")
    assert re.search(
        r"\| edge \| all \| 4 \| 0\.200 \| 0\.100 \| 0\.300 \| 0\.400 \| FAIL \|", stress
    )
    sanity = section(markdown, "Sanity").splitlines()
    lines = [line for line in sanity if line.startswith(("| All", "| good", "| unheard"))]
    assert lines[0].count("1/2 pass") == 3
    assert lines[1].startswith(
        "| unheard | AI | TPR ≥ 0.90 | -\u00a0FAIL (0/10)".replace("TPR ≥ ", "TPR\u00a0≥\u00a0")
    )
    assert lines[2].count("1.000\u00a0pass (10/10)") == 3
    mechanism = section(markdown, "Mechanism")
    assert "| Source | Label | N | Mean mask | Bandwidth, Hz | Crest, dB |" in mechanism
    assert "| all ai | AI | 10 | 0.25 | 1996 | 14.5 |" in mechanism
    assert r"| without mel\_H | 10 | 0.5 | - |" in mechanism
    assert "is &lt;HTML&gt;" in section(markdown, "Missing tracks")


def test_stress_data(full: Path) -> None:
    own = [row for row in table(full / "figures/stress.csv") if row["detector"] == "edge"]
    assert [(row["stress"], row["tpr"], row["fpr"]) for row in own] == [
        ("as it is", "1.0", "0.0"),
        ("mp3-128", "0.75", "0.25"),
        ("$odd_1$ <name>", "", ""),
    ]


def test_worst_sources_come_first(tmp_path: Path) -> None:
    rows = tracks(sources=20)
    found = results(rows, ["d"])
    for result in found:  # every AI track found, no real one called AI, but of two sources
        number, _, track = result["id"].partition("/")
        right = int(number) % 2
        wrong = (number == "6") or (number == "9" and track > "4")
        result |= {"score": float(right != wrong), "error": None}
    report(tmp_path, rows, found, ["d"])
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    lines = [
        line
        for line in section(markdown, "Where it fails").splitlines()
        if line.startswith("| source")
    ]
    assert lines[0].startswith("| source 6 | real | 10 | 1.000")
    assert lines[1].startswith("| source 9 | AI | 10 | 0.500")
    assert "0.000" in lines[2]
    assert "The other 5" in markdown


def test_the_same_input_gives_the_same_files(tmp_path: Path) -> None:
    rows = tracks(sources=4)
    found = results(rows, ["d"])
    for name in ("a", "b"):
        report(tmp_path / name, rows, found, ["d"], stress=STRESS[:1])
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_six_detectors_and_unknown_results(tmp_path: Path) -> None:
    """Results of other detectors and tracks are not counted; one without results misses all."""
    rows, names = tracks(sources=4), [f"d{k}" for k in range(6)]
    found = results(rows, names[:5])
    other = [{**found[1], "detector": "x"}, {**found[1], "id": "x"}]
    metrics = report(tmp_path, rows, found + other, names)
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    blocks = {name: own["judged"]["overall"] for name, own in metrics["detectors"].items()}
    assert [block["n"] for block in blocks.values()] == [39] * 5 + [0]
    wrong = blocks["d5"]["missing_as_wrong"]["confusion"]
    assert wrong == {"tp": 0, "fp": 20, "fn": 20, "tn": 0}
    failures = [row for row in metrics["failures"] if row["detector"] == "d5"]
    assert [(row["kind"], row["n"]) for row in failures] == [("missing", 40)]
    assert len(metrics["comparisons"]) == 15


def test_chosen_thresholds(tmp_path: Path) -> None:
    """Calibration tracks give them, and are not judged by them."""
    known, rows = tracks("calibration"), tracks("test")
    for row in known:
        row["id"] = "c" + row["id"]
    every = known + rows
    found = results(every, ["d", "blind"])
    for result in found:
        if result["detector"] == "blind" and result["id"].startswith("c"):
            result["score"] = None
    metrics = report(tmp_path, every, found, ["d", "blind"], threshold="fpr5")
    own, blind = metrics["detectors"]["d"], metrics["detectors"]["blind"]
    scores = {r["id"]: r["score"] for r in found if r["detector"] == "d"}
    chosen = choose_threshold([{**row, "score": scores[row["id"]]} for row in known])
    assert own["threshold"] == chosen != 0.5
    assert own["threshold_origin"] == "highest TPR at FPR <= 5% on 80 calibration tracks"
    assert own["judged"]["overall"]["attempted"] == 80
    assert own["by_split"]["calibration"]["attempted"] == 80
    assert own["at_0.5"]["attempted"] == 80
    assert blind["threshold"] == 0.5
    assert blind["threshold_origin"].startswith("fixed, as none could be chosen: the calibration")
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "At the threshold 0.5 instead" in markdown
    assert own["threshold_origin"].replace("<", "&lt;").replace(">", "&gt;") in markdown.replace(
        "&lt;=", "&lt;="
    )


@pytest.mark.parametrize(
    ("split", "threshold", "message"),
    [
        ("test", "fpr5", "no track is of it"),
        ("calibration", "fpr5", "none is left to judge"),
        ("calibration", "best", "unknown|none is left"),
    ],
)
def test_no_threshold(tmp_path: Path, split: str, threshold: str, message: str) -> None:
    """And what was written before stays."""
    (tmp_path / "report.md").write_text("before")
    rows = tracks(split, sources=2)
    with pytest.raises(ValueError, match=message):
        report(tmp_path, rows, results(rows, ["d"]), ["d"], threshold=threshold)
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "before"


def test_no_detector(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no detector"):
        report(tmp_path, tracks(), [], [])


@pytest.mark.parametrize(
    ("split", "development", "notice"),
    [
        ("test", False, None),
        ("", False, "No track is of a split named test."),
        ("train", False, "20 of the 20 judged tracks are development data"),
        ("test", True, "10 of the 20 judged tracks are development data"),
    ],
)
def test_notice_of_development_data(
    tmp_path: Path, split: str, development: bool, notice: str | None
) -> None:
    rows = tracks(split, sources=2)
    for row in rows[:10]:
        row["development"] = development
    found = report(tmp_path, rows, results(rows, ["d"]), ["d"])
    page = "".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).texts)
    if notice is None:
        assert found["notice"] is None
    else:
        assert found["notice"].startswith(notice)
        assert found["notice"] in page
        assert found["notice"] in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("scored", [True, False])
def test_one_class_only(tmp_path: Path, scored: bool) -> None:
    rows = [row for row in tracks() if row["label"] == 1]
    found = results(rows, ["d"]) if scored else []
    metrics = report(tmp_path, rows, found, ["d"])
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    figures = metrics["detectors"]["d"]["judged"]["overall"]["missing_left_out"]["metrics"]
    reason = "no real track" if scored else "no scored track"
    assert figures["auroc"] == {"value": None, "interval": None, "reason": reason}
    assert (figures["recall"]["value"] is not None) == scored
    assert not (tmp_path / "figures/roc.csv").exists()
    assert reason in (tmp_path / "report.md").read_text(encoding="utf-8")
