"""What `finetune` keeps of recordings, and the move of the last layers on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifactnet_jax import fine_head
from artifactnet_jax.audio import Segment
from artifactnet_jax.config import Fusion
from artifactnet_jax.data.decoded import AudioCache
from artifactnet_jax.decision import log_odds
from artifactnet_jax.detector import Detector
from artifactnet_jax.results import Failure
from artifactnet_jax.train import frozen, move
from artifactnet_jax.weights import Weights, load_weights, random_tensors
from audio_files import noise, write
from tiny_model import SMALL

FUSION = Fusion(
    bias=(0.1, -0.2, 0.3, 0.4), segments=(0.5, 0.6, 0.7, 0.8), fine=(0.4, 0.3, 0.2, 0.0)
)


def head(seed: int = 0) -> fine_head.FineHead:
    rng = np.random.default_rng(seed)
    classes = (len(fine_head.BANDS), len(fine_head.LENGTHS), fine_head.FEATURES)
    tensors = {
        "mean": rng.standard_normal(classes),
        "spread": rng.uniform(0.5, 2, classes),
        "hidden.kernel": rng.standard_normal((fine_head.FEATURES, 4)) / 20,
        "hidden.bias": rng.standard_normal(4),
        "out.kernel": rng.standard_normal((4, 1)),
        "out.bias": np.ones(1),
    }
    stored = fine_head.stored(tensors)
    return fine_head.FineHead({k: v.astype(np.float32) for k, v in stored.items()}, {})


@pytest.fixture(scope="module")
def whole() -> Weights:
    """Texture head, CNN, fine head and a fusion of them, at random."""
    config = dataclasses.replace(SMALL, fusion=FUSION)
    return Weights("w", config, random_tensors(SMALL), "0", "none", {}, fine=head())


@pytest.fixture(scope="module")
def music(tmp_path_factory) -> Path:
    """2, 6 and 20 s of noise, and silence."""
    folder = tmp_path_factory.mktemp("music")
    for seed, seconds in enumerate((2, 6, 20)):
        write(folder, f"{seconds}.wav", noise(seconds, channels=1, seed=seed))
    write(folder, "still.wav", np.zeros((44_100, 1), np.int16))
    return folder


def taken(weights: Weights, music: Path, cache: Path, names: Any = ("2", "6", "20")) -> list[Any]:
    store = frozen.Store(weights, AudioCache(cache))
    return frozen.collect([(str(music / f"{name}.wav"), 12) for name in names], store, 2)


def test_scores_are_those_of_the_detector(whole, music, tmp_path):
    """With fusion and fine head, and without; but for the bank."""
    plain = dataclasses.replace(whole, config=SMALL, fine=None)
    for weights in (whole, plain):
        detector = Detector(weights, "numpy", banks=())
        for name, one in zip(("2", "6", "20"), taken(weights, music, tmp_path), strict=True):
            verdict = detector.score(music / f"{name}.wav")
            assert frozen.score(one, weights) == pytest.approx(verdict.score, abs=1e-5)
            expected = [segment.score for segment in verdict.segments]
            assert frozen.segment_scores(one, weights) == pytest.approx(expected, abs=1e-5)
            assert one.starts.tolist() == [segment.start_s for segment in verdict.segments]


def test_what_moves_needs_no_reading_and_what_does_not_is_read(whole, music, tmp_path, monkeypatch):
    first = taken(whole, music, tmp_path)
    counts = {"statistics": 0, "network": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return call

    statistics = counted("statistics", frozen.texture_statistics)
    monkeypatch.setattr(frozen, "texture_statistics", statistics)
    monkeypatch.setattr(frozen, "run_network", counted("network", frozen.run_network))
    changed = {name: 2 * tensor for name, tensor in move.movable(whole).items()}
    verdict = dataclasses.replace(whole.config.verdict, threshold=0.7)
    config = dataclasses.replace(whole.config, verdict=verdict, fusion=Fusion())
    changed_weights = dataclasses.replace(move.with_tensors(whole, changed), config=config)
    again = taken(changed_weights, music, tmp_path)
    assert counts == {"statistics": 0, "network": 0}
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.statistics, b.statistics)
        np.testing.assert_array_equal(a.pooled, b.pooled)
        np.testing.assert_array_equal(a.parts[0].features, b.parts[0].features) if a.parts else None
    name = next(name for name in whole.tensors if name.startswith("unet.") and "kernel" in name)
    other = dataclasses.replace(whole, tensors={**whole.tensors, name: whole.tensors[name] * 2})
    third = taken(other, music, tmp_path)
    segments = sum(len(one.starts) for one in first)
    assert counts == {"statistics": 0, "network": segments}
    assert not np.array_equal(first[1].pooled, third[1].pooled)
    for path in (tmp_path / "frozen").rglob("*.np[yz]"):  # as a full disk might leave them
        path.write_bytes(path.read_bytes()[:50])
    taken(whole, music, tmp_path)
    assert counts == {"statistics": segments, "network": 2 * segments}


def test_silence_and_what_cannot_be_read(whole, music, tmp_path):
    still, none = taken(whole, music, tmp_path, ("still", "none"))
    assert (len(still.starts), frozen.score(still, whole)) == (0, None)
    assert isinstance(none, Failure)
    assert "none.wav: no such file" in none.message


@pytest.mark.parametrize(
    ("n", "count", "expected"),
    [
        (3, 12, [0, 1, 2]),
        (4, 2, [1, 3]),
        (15, 3, [2, 7, 12]),
        (130, 2, [32, 96]),  # 0, 4, 8 ... 128 are held: the 8th and the 24th of 33 are meant
    ],
)
def test_segments_are_evenly_chosen_by_hand(n, count, expected):
    segments = (Segment(float(k), np.zeros(1), 1.0, 1.0) for k in range(n))
    assert [segment.start_s for segment in frozen._some(segments, count)] == expected


# --- the move --------------------------------------------------------------------------------


def examples(tracks: list[Any], hard: int = 1, label: int = 0) -> list[move.Example]:
    return [
        move.Example(one, label if k < hard else k % 2, k < hard, 1.0)
        for k, one in enumerate(tracks)
    ]


def of_segments(one: Any, weights: Weights) -> list[float]:
    """Log-odds of tracks that have one of the segments each."""
    found = []
    for k in range(len(one.starts)):
        alone = {
            name: getattr(one, name)[k : k + 1]
            for name in ("starts", "rms", "statistics", "pooled")
        }
        found.append(float(log_odds(frozen.score(dataclasses.replace(one, **alone), weights))))
    return found


def test_what_is_trained_is_what_decides(whole, music, tmp_path):
    """The log-odds of the loss, against those of the decision: one track per segment."""
    wide = dataclasses.replace(whole.config, fusion=dataclasses.replace(FUSION, limit=100.0))
    weights = dataclasses.replace(whole, config=wide)
    tracks = taken(weights, music, tmp_path)
    assert [bool(one.parts) for one in tracks] == [False, True, True]
    data = move._arrays(weights, examples(tracks))
    found = move._log_odds(weights, move.movable(weights), data)
    expected = [value for one in tracks for value in of_segments(one, weights)]
    assert np.asarray(found) == pytest.approx(expected, abs=1e-4)


def test_hard_tracks_fall_what_is_kept_stays_and_no_last_bias_moves(whole, music, tmp_path):
    tracks = taken(whole, music, tmp_path)
    settings = move.Move(steps=60, keep=10.0, dropout=0.0)
    new = move.moved(whole, examples(tracks), settings)
    old_odds, new_odds = (
        np.array([log_odds(frozen.score(one, w)) for one in tracks]) for w in (whole, new)
    )
    change = new_odds - old_odds
    assert change[0] < -0.5
    assert np.abs(change[1:]).max() < 0.3
    assert new.fine is not None
    for name, tensor in whole.tensors.items():
        moves = name.startswith(("texture.hidden", "texture.out", "cnn.hidden", "cnn.out"))
        moves &= not name.endswith("out.bias")
        assert np.array_equal(tensor, new.tensors[name]) != moves, name
    assert new.fine.tensors["out.bias"] == head().tensors["out.bias"]
    again = move.moved(whole, examples(tracks), settings)
    assert (again.sha256, again.fine.sha256) == (new.sha256, new.fine.sha256)
    up = move.moved(whole, examples(tracks, label=1), settings)
    assert log_odds(frozen.score(tracks[0], up)) > old_odds[0] + 0.05


def test_the_default_weights_have_layers_that_move():
    names = set(move.movable(load_weights()))
    assert {"texture.out.kernel", "cnn.hidden.kernel"} < names
    assert not any(name.endswith("out.bias") for name in names)
