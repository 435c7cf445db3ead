"""The head for decoders in no bank: what it reads, what it says, and how files hold it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import scipy.signal.windows
import scipy.special
import scipy.stats
from safetensors import safe_open
from safetensors.numpy import save_file

from artifactnet_jax import fine_head as fh
from artifactnet_jax import fingerprint as fp
from artifactnet_jax.config import CNN, Config, FrontEnd, UNet
from artifactnet_jax.detector import Detector
from artifactnet_jax.weights import (
    Engine,
    WeightsError,
    load_weights,
    random_tensors,
    save_weights,
)
from made_decoder import coloured

CONFIG = Config("tiny", FrontEnd(), UNet(widths=(2,), bottleneck=3), CNN(widths=(2, 3), hidden=2))


def a_head(seed: int = 0, hidden: int = 5) -> fh.FineHead:
    rng = np.random.default_rng(seed)
    real = (len(fh.BANDS), len(fh.LENGTHS), fh.FEATURES)
    tensors = {
        "mean": rng.normal(size=real),
        "spread": rng.uniform(0.5, 2, real),
        "hidden.kernel": rng.normal(size=(fh.FEATURES, hidden)) / 20,
        "hidden.bias": rng.normal(size=hidden),
        "out.kernel": rng.normal(size=(hidden, 1)),
        "out.bias": rng.normal(size=1),
    }
    rounded = {name: t.astype(np.float16).astype(np.float32) for name, t in tensors.items()}
    return fh.FineHead(rounded, {"recordings": 7})


def spectrum(audio: np.ndarray, **options: int) -> fp.Accumulator:
    out = fp.Accumulator(**options)
    out.add(audio)
    return out


def levels(audio: np.ndarray) -> np.ndarray:
    return sum(spectrum(audio).windows, fp.Mean()).levels()


def part(values: np.ndarray, start: int, size: int) -> np.ndarray:
    """Of features, so many from `start` on, of each of the four residuals."""
    return values.reshape(4, -1)[:, start : start + size]


# --- What it reads --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def residuals() -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.gamma(2, 1, (4, fp.LAST - fp.FIRST)).astype(np.float32)


HIGH = fh.BANDS[3]


@pytest.fixture(scope="module")
def inside(residuals: np.ndarray) -> np.ndarray:
    hz = np.arange(fp.FIRST, fp.LAST) * 44_100 / 16_384
    return residuals[:, (hz >= 5_000) & (hz < HIGH)].astype(np.float64)


@pytest.fixture(scope="module")
def values(residuals: np.ndarray) -> np.ndarray:
    return fh.features(residuals, HIGH)


def test_distribution_and_neighbours_are_scipys(inside, values):
    start = fh.COMB_VALUES + fh.FOURIER
    got = part(values, start, 9)
    unit = scipy.stats.zscore(inside, axis=1)
    for row, said in zip(unit, got, strict=True):
        expected = scipy.stats.mstats.mquantiles(row, fh.SHARES, alphap=1, betap=1)
        np.testing.assert_allclose(said[:7], expected, atol=1e-4)
        assert said[7] == pytest.approx(scipy.stats.skew(row), abs=1e-3)
        kurtosis = scipy.stats.kurtosis(row, fisher=False)
        assert said[8] == pytest.approx(np.log(kurtosis), abs=1e-3)
    lags = part(values, start + 9, len(fh.LAGS))
    for row, said in zip(unit, lags, strict=True):
        full = np.correlate(row, row, "full")[len(row) - 1 :] / np.arange(len(row), 0, -1)
        np.testing.assert_allclose(said, full[list(fh.LAGS)], atol=1e-4)
    spread = part(values, start + 9 + len(fh.LAGS), fh.PARTS)
    edges = [int(k * len(unit[0]) / fh.PARTS) for k in range(fh.PARTS + 1)]
    expected = [[np.std(row[a:b]) for a, b in itertools.pairwise(edges)] for row in unit]
    np.testing.assert_allclose(spread, np.log(expected), atol=3e-3)


def test_fourier_transform_is_scipys(inside, values):
    unit = scipy.stats.zscore(inside, axis=1)
    size = unit.shape[1]
    spectrum = scipy.fft.rfft(unit * scipy.signal.windows.hann(size + 2)[1:-1], 8_192)
    power = np.log(np.abs(spectrum) ** 2)
    delay = np.arange(power.shape[1]) / 8_192 / (44_100 / 16_384)
    above = power - scipy.ndimage.median_filter(power, (1, 101), mode="mirror")
    got = part(values, fh.COMB_VALUES, fh.FOURIER)
    edges = np.geomspace(*fh.DELAYS, fh.FOURIER + 1)
    for k in range(fh.FOURIER):
        cell = (delay >= edges[k]) & (delay < edges[k + 1])
        np.testing.assert_allclose(got[:, k], above[:, cell].max(axis=1), atol=2e-3)


def test_combs_are_sums_over_multiples(inside, values):
    hz = np.arange(fp.FIRST, fp.LAST) * 44_100 / 16_384
    hz = hz[(hz >= 5_000) & (hz < HIGH)]
    score = scipy.special.ndtri((scipy.stats.rankdata(inside, axis=1) - 0.5) / inside.shape[1])
    score = scipy.ndimage.convolve1d(score, [0.5, 1, 0.5], axis=1, mode="nearest")
    score /= score.std(axis=1, keepdims=True)
    spacing = 1_500 * np.exp(-1.5e-4 * np.arange(28_784))
    cell = np.floor(np.log(1_500 / spacing) / np.log(75) * fh.COMBS).astype(int)
    got = part(values, 0, fh.COMBS)
    for k in (2, 9, 17):  # coarse combs; the lines of fine ones are summed on the log axis
        best = np.full(4, -np.inf)
        for s in spacing[cell == k]:
            lines = np.arange(np.ceil(hz[0] / s), np.floor(hz[-1] / s) + 1) * s
            heights = [np.interp(lines, hz, row).sum() for row in score]
            best = np.maximum(best, np.array(heights) / np.sqrt(max(8, len(lines))))
        np.testing.assert_allclose(got[:, k], best, rtol=0.12)


def lined(audio: np.ndarray, spacing: float) -> np.ndarray:
    """Audio through a filter that lifts every multiple of `spacing` Hz by 6 dB."""
    hz = np.fft.rfftfreq(len(audio), 1 / 44_100)
    away = hz - np.rint(hz / spacing) * spacing
    lifted = np.fft.rfft(audio) * (1 + np.exp(-0.5 * (away / 2) ** 2))
    return np.fft.irfft(lifted, len(audio)).astype(np.float32)


@pytest.mark.parametrize("spacing", [86.13, 173.3, 511.7])
def test_a_comb_of_any_spacing_raises_its_cell(spacing):
    plain = part(fh.features(fp.residuals(levels(coloured(3))), 16_000), 0, fh.COMBS)
    audio = lined(coloured(3), spacing)
    combed = part(fh.features(fp.residuals(levels(audio)), 16_000), 0, fh.COMBS)
    cell = int(np.log(1_500 / spacing) / np.log(75) * fh.COMBS)
    near = slice(max(0, cell - 1), cell + 2)
    assert combed[0, near].max() > 3 * plain[0, near].max()
    assert combed[0, near].max() == combed[0].max()


def test_what_lies_above_the_band_says_nothing(residuals):
    other = residuals.copy()
    other[:, np.arange(fp.FIRST, fp.LAST) * 44_100 / 16_384 >= HIGH] = 9
    assert (fh.features(other, HIGH) == fh.features(residuals, HIGH)).all()


# --- What it says ---------------------------------------------------------------------------------


def test_the_network_is_sklearns():
    from sklearn.neural_network import MLPClassifier

    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, fh.FEATURES)).astype(np.float32)
    y = (x[:, :5].sum(axis=1) > 0).astype(int)
    fitted = MLPClassifier((6,), max_iter=400, random_state=0, solver="lbfgs").fit(x, y)
    network = {
        **{"hidden.kernel": fitted.coefs_[0], "hidden.bias": fitted.intercepts_[0]},
        **{"out.kernel": fitted.coefs_[1], "out.bias": fitted.intercepts_[1]},
    }
    head = fh.FineHead({**a_head(hidden=6).tensors, **network}, {})
    mean, spread = head.tensors["mean"][2, 1], head.tensors["spread"][2, 1]
    p = fitted.predict_proba(x)[:, 1]
    for row, wanted in zip(x, p, strict=True):
        logit = head.logit(row * spread + mean, 2, 1)
        assert scipy.special.expit(logit) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(("windows", "sizes"), [(5, [5]), (6, [3, 3]), (11, [3, 4, 4])])
def test_long_tracks_are_judged_in_equal_parts(windows, sizes):
    """At most 100 s each; the logit is their mean, weighted by frames that are not silent."""
    head, long = a_head(), fp.Accumulator()
    once = [sum(spectrum(coloured(seed, 6)).windows, fp.Mean()) for seed in range(windows)]
    long.windows, long.frames = once, 108 * windows
    once[-1] = once[-1] + once[0]
    logits, frames = [], []
    for part_windows in np.split(np.arange(windows), np.cumsum(sizes)[:-1]):
        total = fp.Mean()
        for n in part_windows:
            total = total + once[n]
        length = {True: 1, False: 2}[total.frames < 216]
        values = fh.features(fp.residuals(total.levels()), 16_000)
        logits.append(head.logit(values, 4, length))
        frames.append(total.frames)
    assert fh.judge(long, head) == (pytest.approx(np.average(logits, weights=frames)), None)


def low_passed(audio: np.ndarray, hz: float) -> np.ndarray:
    spectrum = np.fft.rfft(audio)
    spectrum[np.fft.rfftfreq(len(audio), 1 / 44_100) > hz] = 0
    return np.fft.irfft(spectrum, len(audio)).astype(np.float32)


def test_where_it_cannot_judge_it_says_why():
    head = a_head()
    assert fh.judge(spectrum(coloured(1, 3)), head) == (None, "too short: 4 s are needed")
    silent = fh.judge(spectrum(np.zeros(300_000, np.float32)), head)
    assert silent == (None, "silent above 3.5 kHz")
    logit, reason = fh.judge(spectrum(low_passed(coloured(1, 6), 6_000)), head)
    assert logit is None
    assert "7000 Hz are needed" in str(reason)
    assert fh.judge(spectrum(low_passed(coloured(1, 6), 7_600)), head)[0] is not None


# --- Files ----------------------------------------------------------------------------------------


def saved(path: Any, fine: fh.FineHead | None) -> Any:
    tensors = random_tensors(CONFIG, 3)
    options = {"name": "tiny", "licence": "CC0-1.0", "provenance": {}}
    save_weights(path, CONFIG, tensors, fine=fine, **options)
    return load_weights(path)


def same(a: fh.FineHead, b: fh.FineHead) -> bool:
    return (a.sha256, a.provenance) == (b.sha256, b.provenance) and all(
        a.tensors[name].tobytes() == b.tensors[name].tobytes() for name in a.tensors
    )


def test_a_weights_file_holds_it_beside_the_model(tmp_path):
    head = a_head()
    without, beside = saved(tmp_path / "a", None), saved(tmp_path / "b", head)
    assert without.fine is None
    assert same(beside.fine, head)
    assert beside.sha256 == without.sha256
    assert sorted(beside.tensors) == sorted(without.tensors)
    assert a_head(1).sha256 != head.sha256


def altered(path: Any, change: Any) -> None:
    with safe_open(path, framework="np") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, header)
    save_file(tensors, path, metadata=header)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, h: t.pop("fine.mean"), "fine: it has the tensors"),
        (lambda t, h: t.update({"fine.out.bias": t["fine.out.bias"] + 1}), "do not match the dig"),
        (lambda t, h: t.update({"fine.spread": 0 * t["fine.spread"]}), "not above 0"),
        (lambda t, h: t.update({"fine.mean": np.nan * t["fine.mean"]}), "non-finite"),
        (lambda t, h: t.update({"fine.mean": t["fine.mean"][:2]}), "has shape"),
        (lambda t, h: h.update(fine="{}"), "KeyError"),
        (lambda t, h: h.pop("fine"), "unexpected fine.hidden.bias"),
    ],
)
def test_a_damaged_head_is_refused(tmp_path, change, said):
    saved(tmp_path / "w", a_head())
    altered(tmp_path / "w", change)
    with pytest.raises(WeightsError, match="w: .*" + said):
        load_weights(tmp_path / "w")


def test_metadata_hold_it_as_text():
    head = a_head()
    assert same(fh.from_text(fh.to_text(head)), head)
    assert fh.noted({"other": "x"}) is None
    for text in ("", "{}", "[]", '{"tensors": {"mean": {"float16": "?", "shape": [1]}}}'):
        with pytest.raises(ValueError, match=r"."):
            fh.noted({fh.NOTE: text})


def test_an_exported_graph_carries_it(tmp_path):
    pytest.importorskip("onnx")
    from artifactnet_jax.convert.export import export
    from artifactnet_jax.convert.export_cache import read_exported
    from artifactnet_jax.convert.graph import read_graph

    weights = saved(tmp_path / "w", a_head())
    export(weights, tmp_path / "lean.onnx")
    engine = read_exported(tmp_path / "lean.onnx")
    assert isinstance(engine, Engine)
    assert same(engine.fine, weights.fine)
    assert same(fh.noted(read_graph(tmp_path / "lean.onnx").metadata), weights.fine)
    export(dataclasses.replace(weights, fine=None), tmp_path / "plain.onnx")
    assert read_exported(tmp_path / "plain.onnx").fine is None


# --- Rows -----------------------------------------------------------------------------------------


def test_rows_have_it(tmp_path):
    weights = saved(tmp_path / "w", a_head())
    audio = coloured(2, 9)
    row = Detector(weights, "numpy").score(audio, 44_100).to_dict()
    assert row["fine"] == {"logit": fh.judge(spectrum(audio), weights.fine)[0]}
    assert row["fine_reason"] is None
    json.dumps(row, allow_nan=False)
    silent = Detector(weights, "numpy").score(np.zeros(300_000), 44_100).to_dict()
    assert (silent["fine"], silent["fine_reason"]) == (None, "silent above 3.5 kHz")
    plain = Detector(dataclasses.replace(weights, fine=None), "numpy").score(audio, 44_100)
    assert plain.fine is None
    assert plain.fine_reason == "the weights have no head for the fine spectrum"
    assert plain.score == row["score"]


def test_the_embedded_weights_have_one():
    head = load_weights().fine
    assert head is not None
    assert sum(t.nbytes // 2 for t in head.tensors.values()) < 200_000
