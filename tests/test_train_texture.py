"""The verb `texture`: statistics once, the fit, calibration and thresholds, the weights written."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import scipy.signal
from sklearn.metrics import roc_auc_score

from artifactnet_jax import dsp_numpy
from artifactnet_jax.config import Texture
from artifactnet_jax.data.decoded import AudioCache
from artifactnet_jax.data.manifest import Row, read_manifest
from artifactnet_jax.detector import Detector
from artifactnet_jax.evaluation import operating_points
from artifactnet_jax.text import CommandError
from artifactnet_jax.texture import logit
from artifactnet_jax.train import texture, texture_head
from artifactnet_jax.weights import load_weights, random_tensors, save_weights
from audio_files import write
from tiny_model import TINY

HEAD = Texture(resolutions=((1024, 512),), edges=(300.0, 3000.0, 9000.0), lags=((0, 1), (1, 0)))
CONFIG = dataclasses.replace(TINY, texture=dataclasses.replace(HEAD, hidden=(8,)))
N = 24


def track(k: int, label: int) -> np.ndarray:
    """Noise; that of an "AI" track rings on, so that a frame goes with the one before."""
    rng = np.random.default_rng(k)
    x = rng.standard_normal(66_150)
    if label:
        ringing = rng.standard_normal(4_000) * np.exp(-np.arange(4_000) / 1_500)
        x = scipy.signal.fftconvolve(x, ringing)[: len(x)]
        x /= x.std()
    return (32768 * 0.05 * (1 + k % 3) * x[:, None]).clip(-32768, 32767).astype(np.int16)


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Twenty-four tracks of twelve groups; the network is said to have seen half of them."""
    folder = tmp_path_factory.mktemp("texture")
    lines = ["path,label,source,group,split"]
    for k in range(N):
        label, group = k % 2, k // 2 % 6
        write(folder, f"{k}.wav", track(k, label))
        split = "train" if group < 3 else "validation"
        lines.append(f"{k}.wav,{label},s{label}{group},g{label}{group},{split}")
    (folder / "music.csv").write_text("\n".join(lines) + "\n")
    save_weights(
        folder / "init.safetensors",
        CONFIG,
        random_tensors(CONFIG),
        name="init",
        licence="test licence",
        provenance={},
        dtype=np.float32,
    )
    return folder


@pytest.fixture
def fit(command, music, tmp_path):
    def call(name="out.safetensors", *more, data=None):
        given = ["--data", data or music / "music.csv", "--init", music / "init.safetensors"]
        few = ["--segments", "1", "--draws", "1", "--steps", "150", "--folds", "3"]
        out = tmp_path / name
        return command("texture", *given, *few, "-o", out, "--cache", music / "cache", *more), out

    return call


def test_it_learns_the_texture_and_says_so(fit, music):
    done, out = fit()
    assert done.code == 0, done.err
    report, weights = json.loads(done.out), load_weights(out)
    assert (report["rows"], report["skipped"]) == (N, [])
    assert report["left_out"]["auc"] > 0.9
    assert report["left_out"]["groups"] == 12
    assert dict(weights.config.verdict.operating_points) == report["operating_points"]
    assert weights.config.verdict.threshold == report["operating_points"]["fpr5"]
    assert weights.licence == "test licence"
    assert weights.provenance["history"][-1]["phase"] == "texture"
    assert {s["label"] for s in report["unseen"]["sources"].values()} == {"real", "ai"}
    detector = Detector(weights, "numpy", threshold="balanced")
    rows = read_manifest(music / "music.csv")
    scores = [detector.score(row.path).score for row in rows]
    assert roc_auc_score([row.label for row in rows], scores) > 0.95


def test_the_same_again_from_the_cache_is_the_same_file(fit, monkeypatch):
    first = load_weights(fit()[1])

    def never(*args):
        raise AssertionError("computed again")

    monkeypatch.setattr(texture_head, "texture_statistics", never)
    again = load_weights(fit("again.safetensors", "--name", "out")[1])
    assert (again.sha256, again.provenance) == (first.sha256, first.provenance)


def test_how_many_segments_short_tracks_get_is_written(fit):
    written = [
        load_weights(fit(f"{number}.safetensors", *more)[1]).config.verdict.least_segments
        for number, more in enumerate(((), ("--least-segments", "5")))
    ]
    assert written == [1, 5]


def test_limits_are_stored_with_the_weights(fit, tmp_path):
    sentences = tmp_path / "limits.txt"
    sentences.write_text("Loops are called AI too often.\n\n  Speech was not measured. \n")
    done, out = fit("limited.safetensors", "--limits", sentences)
    assert done.code == 0, done.err
    expected = ["Loops are called AI too often.", "Speech was not measured."]
    assert load_weights(out).provenance["limits"] == expected
    done, out = fit()
    assert "limits" not in load_weights(out).provenance


@pytest.mark.parametrize("content", [b"\n \n", b"\xff\xfe", None])
def test_limits_that_cannot_be_read_are_wrong_usage(fit, tmp_path, content):
    sentences = tmp_path / "limits.txt"
    if content is not None:
        sentences.write_bytes(content)
    done, out = fit("x.safetensors", "--limits", sentences)
    assert done.code == 2
    assert str(sentences) in done.err
    assert done.err.count("\n") == 1
    assert not out.exists()


def test_a_network_that_saw_everything_cannot_be_calibrated(fit, music, tmp_path):
    data = tmp_path / "all.csv"
    text = (music / "music.csv").read_text().replace("validation", "train")
    data.write_text(text.replace("\n", f"\n{music}/").removesuffix(f"{music}/"))
    done, out = fit(data=data)
    assert (done.code, out.exists()) == (2, False)
    assert "outside the part 'train'" in done.err
    assert done.err.count("\n") == 1


def row(label: int, source: str, group: str = "") -> Row:
    return Row(f"{source}{label}", label, "", source, "", group or source, "train")


def test_labels_count_alike_and_sources_by_the_root_of_their_size():
    rows = [*[row(0, "a")] * 4, row(0, "b"), *[row(1, "c")] * 9]
    weights = texture_head.row_weights(rows, 0.5)
    np.testing.assert_allclose(weights[:5], [*[2 / 3 / 4] * 4, 1 / 3])
    np.testing.assert_allclose(weights[5:], 1 / 9)


def test_calibration_is_that_of_a_logistic_model():
    rng = np.random.default_rng(0)
    rows = [row(k % 2, f"s{k % 2}") for k in range(4000)]
    truth = rng.normal(0, 1.5, 4000)
    label = (rng.random(4000) < 1 / (1 + np.exp(-(2 * truth - 0.5)))).astype(int)
    rows = [dataclasses.replace(r, label=int(v)) for r, v in zip(rows, label, strict=True)]
    own = [np.array([value]) for value in truth]
    noise = [np.array([value]) for value in -0.3 * truth + rng.standard_normal(4000)]
    found = texture.calibrate(rows, own, noise, 1.0)
    assert found.own == pytest.approx(2, abs=0.2)
    assert 0 <= found.network < 0.1
    halves = [[part / 2 for part in own], [part / 2 for part in own]]
    both = texture.calibrate(rows, *halves, 1.0)
    assert both.own + both.network == pytest.approx(2 * found.own, rel=0.05)


def test_statistics_are_taken_of_every_segment_plain_and_changed(music, tmp_path):
    rows = read_manifest(music / "music.csv")[:2]
    fit = texture_head.Fit(segments=3, every_s=0.5, draws=4, narrow=2)
    [one, other] = texture_head.collect(rows, AudioCache(music / "cache"), CONFIG, fit)
    for taken in (one, other):
        assert len(taken.plain) == 3
        assert len(taken.changed) == 3 * 2 + 2
        assert taken.plain.dtype == taken.changed.dtype == np.float32
        both = np.concatenate([taken.plain, taken.changed])
        assert np.isfinite(both).all()
        assert len(np.unique(both[:, 0])) == 11


def test_a_narrow_version_has_a_narrow_band(music):
    rows = read_manifest(music / "music.csv")[:4]
    source = texture_head._Statistics(rows, AudioCache(music / "cache"), CONFIG, texture_head.Fit())
    for k in range(len(rows)):
        hz, power = scipy.signal.welch(source._crop(k, 0, 50), 44_100, nperseg=1024)
        band = power[(hz > 18_000) & (hz < 20_000)].mean() / power[hz < 3_000].mean()
        assert band < 0.03


def test_further_tracks_are_fitted_to_but_not_judged(fit, music, tmp_path):
    alone, one = fit("one.safetensors")
    lines = (music / "music.csv").read_text().splitlines()
    made = [f"{music}/{line}" for line in lines[1:9:2]]  # four real ones of other groups, as if AI
    also = tmp_path / "also.csv"
    also.write_text("\n".join([lines[0], *made]).replace(".wav,0,", ".wav,1,") + "\n")
    done, two = fit("two.safetensors", "--also", also)
    before, after = json.loads(alone.out), json.loads(done.out)
    assert (before["also"], after["also"]) == (0, 4)
    assert after["rows"] == before["rows"] == N
    assert after["left_out"]["sources"].keys() == before["left_out"]["sources"].keys()
    assert load_weights(two).sha256 != load_weights(one).sha256


def test_what_shares_a_group_with_the_judged_part_stays_out_of_its_fit(monkeypatch):
    rows = [row(k % 2, f"s{k}", f"g{k}") for k in range(6)]
    helpers = [row(1, "rvq", f"g{k}") for k in range(6)]
    seen = []

    def head(texture, rows, statistics, fit):
        seen.append(rows)
        raise StopIteration

    monkeypatch.setattr(texture, "head", head)
    taken = [texture_head.Taken(np.zeros((1, 1)), np.zeros((1, 1)))] * 6
    with pytest.raises(StopIteration):
        texture.left_out(rows, taken, HEAD, texture_head.Fit(), 3, helpers, taken)
    [fitted] = seen
    own = {r.group for r in fitted if r.source != "rvq"}
    assert own == {r.group for r in fitted if r.source == "rvq"}
    assert 0 < len(own) < 6


def test_an_operating_point_that_no_threshold_reaches_is_an_error():
    points = operating_points(np.array([0, 0, 1]), np.array([1.0, 1.0, 0.5]), np.ones(3))
    assert list(points) == ["balanced"]
    with pytest.raises(CommandError, match=r"no threshold reaches fpr5.*--point balanced"):
        texture.reached(points, "fpr5")


def test_a_head_taught_by_several_knows_more_than_one_taught_by_one():
    """Labels by a known direction and noise: how near its logits come to it is what it learnt."""
    rng = np.random.default_rng(0)
    head = dataclasses.replace(CONFIG.texture, hidden=(8,))
    direction = rng.standard_normal(40)

    def taken(n: int) -> tuple[list[Row], list[texture_head.Taken]]:
        values = rng.standard_normal((n, 1, 40)).astype(np.float32)
        label = (values[:, 0] @ direction + 4 * rng.standard_normal(n) > 0).astype(int)
        rows = [row(k, f"s{i}") for i, k in enumerate(label.tolist())]
        return rows, [texture_head.Taken(v, v) for v in values]

    known, unknown = taken(200), np.concatenate([t.plain for t in taken(400)[1]])

    def learnt(members: int, seed: int) -> float:
        fit = texture_head.Fit(steps=600, batch=64, members=members, seed=seed)
        logits = logit(unknown, head, texture_head.head(head, *known, fit), dsp_numpy)
        return float(np.corrcoef(logits, unknown @ direction)[0, 1])

    assert min(learnt(8, seed) for seed in range(3)) > max(learnt(1, seed) for seed in range(3))


def test_kinds_of_real_music_count_alike_for_thresholds():
    rows = [dataclasses.replace(row(0, f"g{k}"), kind="game") for k in range(6)]
    rows += [dataclasses.replace(row(0, f"r{k}"), kind="real") for k in range(2)]
    rows += [dataclasses.replace(row(1, f"a{k}"), kind="ai") for k in range(2)]
    weight = np.array([*[1 / 8] * 8, 0.9, 0.1])
    alike = texture_head.kinds_alike(rows, weight)
    np.testing.assert_allclose(alike, [*[1 / 12] * 6, 1 / 4, 1 / 4, 0.9, 0.1])
    assert weight[0] == 1 / 8  # a copy


def test_thresholds_do_not_hide_the_hard_kind_behind_the_common_one():
    """0.6 calls 4 % of the real music AI, and half of the hard kind: "fpr5" is above it."""
    rows = [dataclasses.replace(row(0, f"g{k}"), kind="game") for k in range(48)]
    rows += [dataclasses.replace(row(0, f"r{k}"), kind="real") for k in range(4)]
    rows += [row(1, f"a{k}") for k in range(52)]
    label = np.array([r.label for r in rows])
    score = np.array([0.1] * 48 + [0.2, 0.2, 0.6, 0.6] + [0.7] * 52)
    assert operating_points(label, score, np.ones(len(rows)))["fpr5"] == 0.6
    weight = texture_head.row_weights(rows, 0.5)
    # Of 48 and 4 sources of one track each, the kinds weigh as the roots.
    np.testing.assert_allclose(weight[48:52].sum() / weight[:48].sum(), (4 / 48) ** 0.5)
    alike = texture_head.kinds_alike(rows, weight)
    assert operating_points(label, score, alike)["fpr5"] == 0.7
