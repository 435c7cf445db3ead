"""What `report` shows of decoders: the lines over the track's spectrum, and real music beside."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from artifactnet_jax import decoder_learning as learning
from artifactnet_jax import decoders, report_lines, report_page
from artifactnet_jax import fingerprint as fp
from made_decoder import coloured, combed


def spectrum(audio: np.ndarray) -> fp.Accumulator:
    out = fp.Accumulator()
    out.add(audio)
    return out


@pytest.fixture(scope="module")
def bank() -> decoders.Bank:
    """The embedded bank with a made-up decoder in the place of its first one."""
    known = decoders.load()
    made = [learning.Track("a", str(n), spectrum(combed(n, 173.0, seconds=6))) for n in range(4)]
    lines = known.lines.copy()
    lines[0] = learning.template(learning.accumulate(made)[0])
    name = dataclasses.replace(known.decoders[0], name="Made up")
    return dataclasses.replace(known, lines=lines, decoders=(name, *known.decoders[1:]))


@pytest.mark.parametrize("speed", [1.0, 1.04])
def test_the_lines_lie_where_the_tracks_do(bank, speed):
    seen = report_lines.view(spectrum(combed(70, 173.0, speed, seconds=14)), bank)
    assert seen["match"]["name"] == "Made up"
    assert seen["sentence"].startswith("its spectrum carries the lines of Made up's decoder")
    assert "nearest" not in seen
    track, lines = np.array(seen["track"]), np.array(seen["lines"])
    here = np.corrcoef(track, lines)[0, 1]
    assert here > 0.5
    # Anywhere else they do not: they are laid to the bin.
    for shift in (-7, -3, 3, 7):
        assert abs(np.corrcoef(track, np.roll(lines, shift))[0, 1]) < here / 3
    # The strongest line of each part is where the made-up decoder has one.
    rng = np.random.default_rng(1234)
    count = round(44_100 / 2 / 173) + 2
    rng.uniform(size=count)  # their heights
    places = speed * (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * 173
    for start, end in report_page.parts(seen):
        hz = seen["hz"]["first"] + (start + lines[start:end].argmax()) * seen["hz"]["step"]
        assert np.abs(places - hz).min() < 2 * fp.BIN_HZ


def test_real_music_stands_beside_with_the_threshold(bank):
    one = report_lines.view(spectrum(combed(70, 173.0, seconds=14)), bank)
    moved = report_lines.view(spectrum(combed(70, 173.0, 1.04, seconds=14)), bank)
    for seen in (one, moved):
        assert len(seen["real_z"]) == (bank.ends >= decoders.CLASSES[-1]).sum()
        assert np.median(seen["real_z"]) < seen["threshold_z"] < seen["match"]["z"]
    # Of all speeds the best is higher than that at one.
    assert np.median(moved["real_z"]) > np.median(one["real_z"]) + 1
    # At the threshold, p of the bank is that of a match: asked of the null itself.
    j = decoders.length_class(spectrum(coloured(1, 14)).frames)
    beyond = decoders.beyond(one["threshold_z"], bank.nulls["tail"][0, -1, j])
    p = float(beyond) / (1 - decoders.SPEED_SHARE) * len(bank.decoders)
    assert 0.5 * decoders.FOUND < p < decoders.FOUND


def test_what_is_no_finding_is_said_so(bank):
    seen = report_lines.view(spectrum(coloured(5, 14)), bank)
    assert (seen["sentence"], seen["match"]) == (None, None)
    assert seen["nearest"]["p"] >= decoders.FOUND
    assert len(seen["track"]) == len(seen["lines"])
    short = report_lines.view(spectrum(coloured(6, 2)), bank)
    assert "too short" in short["reason"]
    assert "lines" not in short
    none = report_lines.view(None, bank)
    assert none["reason"]
    assert "lines" not in none


def test_the_columns_of_a_row_keep_its_peaks():
    row = [0.0] * 5000
    row[1234] = 7.0
    found = report_page.columns(row)
    assert len(found) == report_page.COLUMNS
    assert found[int(1234 / 5000 * report_page.COLUMNS)] == 7
    assert found.sum() == 7
