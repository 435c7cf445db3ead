"""Stress suites: what scores do when a track has been encoded, filtered, resampled, laundered ...

Every change takes and gives mono float32 [n] at 44.1 kHz, is made on the fly, and is the same for
the same track every time. Codecs keep the length and are aligned; other changes may alter it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import av
import numpy as np

from artifactnet_jax.bench import remover
from artifactnet_jax.data.augment import RATE, Chain
from artifactnet_jax.data.manifest import LABELS
from artifactnet_jax.data.teachers import Teacher

Change = Callable[[np.ndarray, str], np.ndarray]  # audio and the track's id -> audio

SEGMENT = 4 * RATE  # samples; the least that a position keeps
PASSES = (1, 3)  # of a separator
ROOM_S = 0.4  # reverberation time of `rerecorded`


def _codec(codec: str, kbps: int) -> Chain:
    return Chain(codecs=((codec, kbps),))


def _resampled(rate: int) -> Chain:
    return Chain(cutoff=rate / 2.1, resampled=True)  # what is left of the band at this rate


CHAINS = {
    "codecs": {
        "wav": _codec("wav", 0),  # 16 bits
        "mp3-64": _codec("mp3", 64),
        "mp3-128": _codec("mp3", 128),
        "mp3-320": _codec("mp3", 320),
        "aac-128": _codec("aac", 128),
        "opus-64": _codec("opus", 64),
        "opus-128": _codec("opus", 128),
        "opus-192": _codec("opus", 192),
        "vorbis-128": _codec("vorbis", 128),
    },
    "bandwidth": {f"low-pass-{khz}k": Chain(cutoff=1000.0 * khz) for khz in (16, 11, 8, 5)},
    "resampling": {f"{khz}khz": _resampled(1000 * khz) for khz in (32, 24, 16)},
    "loudness": {"20db-quieter": Chain(gain_db=-20.0), "to-minus-9dbfs": Chain(level_db=-9.0)},
    "clipping": {"clipped-6db": Chain(clip_db=6.0), "soft-6db": Chain(clip_db=6.0, soft=True)},
    "speed": {
        f"{percent}%-{way}": Chain(speed=1 + sign * percent / 100)
        for percent in (1, 2, 3, 4, 8, 10)
        for way, sign in (("faster", 1), ("slower", -1))
    },
    "noise": {"noise-40db": Chain(noise_db=-40.0), "noise-20db": Chain(noise_db=-20.0)},
}


def _seed(track: str) -> int:
    """Seed of a track's noise: the same every time."""
    digest = hashlib.sha256(track.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:4], "little")


def _chain(chain: Chain) -> Change:
    def change(audio: np.ndarray, track: str) -> np.ndarray:
        seeded = dataclasses.replace(chain, noise_seed=_seed(track))
        changed: np.ndarray = seeded.apply(audio[:, None])[0]
        return changed

    return change


def stretched(audio: np.ndarray, tempo: float) -> np.ndarray:
    """Faster (tempo above 1) at the same pitch, by overlap-add of waveforms (FFmpeg's atempo)."""
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=RATE, format="flt", layout="mono")
    tempo_filter, sink = graph.add("atempo", f"{tempo:.6f}"), graph.add("abuffersink")
    source.link_to(tempo_filter)
    tempo_filter.link_to(sink)
    graph.configure()
    frame = av.AudioFrame.from_ndarray(audio.astype(np.float32)[None], "flt", "mono")
    frame.sample_rate, frame.pts = RATE, 0
    source.push(frame)
    source.push(None)
    blocks = []
    while True:
        try:
            pulled: Any = sink.pull()
            blocks.append(pulled.to_ndarray().reshape(-1))
        except (av.error.EOFError, av.error.BlockingIOError):
            break
    joined = np.concatenate(blocks or [np.zeros(0, np.float32)])
    clipped: np.ndarray = np.clip(joined, -1, 1)
    return clipped


def shifted(audio: np.ndarray, semitones: float) -> np.ndarray:
    """Higher by semitones at the same tempo: played faster by resampling, then stretched back."""
    factor = 2 ** (semitones / 12)
    return stretched(Chain(speed=factor).apply(audio[:, None])[0], 1 / factor)


def _placed(place: float) -> Change:
    """Half of the track (a segment at least): from its start (0) to its end (1)."""

    def change(audio: np.ndarray, track: str) -> np.ndarray:
        size = min(len(audio), max(SEGMENT, len(audio) // 2))
        start = round(place * (len(audio) - size))
        return audio[start : start + size]

    return change


def rerecorded(audio: np.ndarray, track: str) -> np.ndarray:
    """Played in a room and recorded there: diffuse reverberation, a loudspeaker's band, noise.

    The room's response is the direct sound and noise of the same energy that decays by 60 dB in
    `ROOM_S`; the band reaches from 100 Hz to 14 kHz, and white noise lies 45 dB below the music.
    The level is that of the track, less where the peak forbids it.
    """
    rng = np.random.default_rng(_seed(track))
    size = round(ROOM_S * RATE)
    room = rng.standard_normal(size) * 10 ** (-3 * np.arange(size) / size)
    room /= np.sqrt(np.sum(room**2))
    room[0] += 1.0
    n = 2 ** int(np.ceil(np.log2(len(audio) + size)))
    hz = np.fft.rfftfreq(n, 1 / RATE)
    band = 1 / np.sqrt((1 + (100 / np.maximum(hz, 1.0)) ** 8) * (1 + (hz / 14_000) ** 16))
    heard = np.fft.irfft(np.fft.rfft(audio, n) * np.fft.rfft(room, n) * band, n)[: len(audio)]
    rms = np.sqrt(np.mean(np.square(audio, dtype=np.float64)))
    heard *= rms / max(np.sqrt(np.mean(heard**2)), 1e-9)
    heard += rms * 10 ** (-45 / 20) * rng.standard_normal(len(audio))
    return (heard / max(1.0, float(np.abs(heard).max(initial=0.0)))).astype(np.float32)


def laundered(audio: np.ndarray, teacher: Teacher, passes: int) -> np.ndarray:
    """The sum of the stems that a separator finds, taken apart again `passes` times in all."""
    for _ in range(passes):
        residual = np.concatenate(list(teacher.residual(audio[:, None])))
        audio = np.clip(audio - residual, -1, 1)
    return audio


def _removed(step: remover.Step, strength: float) -> Change:
    return lambda audio, track: step(audio, np.random.default_rng(_seed(track)), strength)


SUITES: dict[str, dict[str, Change]] = {
    **{suite: {n: _chain(c) for n, c in chains.items()} for suite, chains in CHAINS.items()},
    "stretch": {
        "5%-shorter": lambda audio, track: stretched(audio, 1 / 0.95),
        "5%-longer": lambda audio, track: stretched(audio, 1 / 1.05),
    },
    "pitch": {
        "1-semitone-up": lambda audio, track: shifted(audio, 1.0),
        "1-semitone-down": lambda audio, track: shifted(audio, -1.0),
    },
    "rerecording": {"room": rerecorded},
    "remover": {name: _removed(*change) for name, change in remover.CHANGES.items()},
    "position": {"first-half": _placed(0), "middle-half": _placed(0.5), "last-half": _placed(1)},
}
LAUNDERING = tuple(f"laundered-{passes}" for passes in PASSES)


def changes(names: Sequence[str], teacher: Callable[[], Teacher]) -> dict[str, Change]:
    """The changes that names stand for: suites, single changes, or "all" but laundering.

    `teacher` opens the separator; it is called when laundering is asked for. ValueError: an unknown
    name.
    """
    single = {name: change for suite in SUITES.values() for name, change in suite.items()}
    chosen: dict[str, Change] = {}
    for name in names:
        if name == "all":
            chosen |= single
        elif name in SUITES:
            chosen |= SUITES[name]
        elif name in single:
            chosen[name] = single[name]
        elif name in ("laundering", *LAUNDERING):
            opened = teacher()
            for passes, label in zip(PASSES, LAUNDERING, strict=True):
                if name in ("laundering", label):
                    chosen[label] = _laundering(opened, passes)
        else:
            known = ", ".join(["all", *SUITES, "laundering"])
            raise ValueError(f"no stress suite or change {name!r}: use {known}, or one of them")
    return chosen


def _laundering(teacher: Teacher, passes: int) -> Change:
    return lambda audio, track: laundered(audio, teacher, passes)


# --- what they did ---------------------------------------------------------------------------


def summarise(
    tracks: Iterable[Mapping[str, Any]],
    plain: Mapping[str, float | None],
    stressed: Mapping[str, Mapping[str, float | None]],
    threshold: float,
) -> list[dict[str, Any]]:
    """A row for every change, over the tracks that one detector scored both plain and changed.

    tracks: id and label; plain: score by id; stressed: the same by change. A row has `stress`, `n`,
    `tpr`, `fpr`, mean scores of both classes, `moved` (mean |difference| to the plain score) and
    `flips` (tracks with another verdict), and the plain `tpr` and `fpr` of the same tracks. None
    where a class has no track.
    """
    label_of = {track["id"]: track["label"] for track in tracks}
    table = []
    for name, scores in stressed.items():
        pairs = [
            (label, before, after)
            for track, label in label_of.items()
            if (before := plain.get(track)) is not None and (after := scores.get(track)) is not None
        ]
        row: dict[str, Any] = {"stress": name, "n": len(pairs)}
        for label, rate in ((1, "tpr"), (0, "fpr")):
            own = [(before, after) for which, before, after in pairs if which == label]
            row[rate] = _mean([after >= threshold for _, after in own])
            row[f"plain_{rate}"] = _mean([before >= threshold for before, _ in own])
            row[f"mean_{LABELS[label]}"] = _mean([after for _, after in own])
        row["moved"] = _mean([abs(after - before) for _, before, after in pairs])
        row["flips"] = sum((b >= threshold) != (a >= threshold) for _, b, a in pairs)
        table.append(row)
    return table


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
