"""From a manifest's rows to batches: stratified sampling, crops, loader.

Everything is a function of (arguments, index): batch number k of a run is the same batch whether
the run came there in one go or was resumed, and for any number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

import grain
import numpy as np

from artifactnet_jax.audio import to_mono
from artifactnet_jax.data.augment import MARGIN, RATE, Augment, Chain, to_int16
from artifactnet_jax.data.decoded import AudioCache, read_array, write_array
from artifactnet_jax.data.manifest import Row
from artifactnet_jax.recording import AudioError, to_float
from artifactnet_jax.text import SOME_FAILED, USAGE, CommandError, printable

SILENCE = 10 ** (-50 / 20)  # full scale, rms; a quieter crop is drawn again
TRIES = 8  # draws of a crop's start; the loudest of them is taken in the end
WATCH_KBPS = 128  # kbit/s of the lossy versions of fixed examples, as in the paper
ENDLESS = 2**62  # length of `Examples`
_REVISION = 1  # of draws on disk: raise it whenever the same file gives something else


class Crops:
    """Crops of rows, from the cache, through chains of changes."""

    def __init__(self, rows: Sequence[Row], cache: AudioCache, samples: int, store: str):
        self._rows, self._cache, self._samples, self._store = list(rows), cache, samples, store
        self._keys = [_key(cache, row) for row in self._rows]

    def audio(self, k: int) -> np.ndarray:
        """Row k, int16 [n, 1 or 2], as it was when the run began if the cache still has that."""
        audio = self._cache.entry(self._keys[k])
        if audio is not None:
            return audio
        try:
            return self._cache.get(self._rows[k].path)
        except AudioError as error:
            cure = "put it back and start again: the run goes on where it stopped"
            raise CommandError(f"{error}; {cure}", SOME_FAILED) from None

    def crop(
        self, k: int, rng: np.random.Generator, chain: Chain, near: int | None = None
    ) -> np.ndarray:
        """A random crop of row k through a chain, float32 [V, samples].

        What lies before and after goes through along with it, so that no edge of a codec or filter
        is in the crop. Zeros follow where the recording ends.
        """
        audio, length = self.audio(k), chain.source_samples(self._samples)
        start = _audible_start(audio, length, rng, near)
        first, stop = max(0, start - MARGIN), min(len(audio), start + length + MARGIN)
        changed = chain.apply(to_float(audio[first:stop]))
        skip = round((start - first) / chain.speed)
        crop = changed[:, skip : skip + self._samples]
        return np.pad(crop, ((0, 0), (0, self._samples - crop.shape[1])))

    def _pair(
        self, k: int, rng: np.random.Generator, chain: Chain, near: int | None = None
    ) -> dict[str, np.ndarray]:
        """One crop of row k and of its residual, at the level and gain of the chain."""
        audio, name = self.audio(k), self._rows[k].residual
        residual = read_array(name)
        if residual is None or len(residual) != len(audio):
            cause = f"{printable(name)}: the residual is gone or has changed"
            raise CommandError(f"{cause}: run artifactnet-jax residuals again", SOME_FAILED)
        start = _audible_start(audio, self._samples, rng, near)
        stop = start + self._samples
        mono = to_mono(to_float(audio[start:stop]))
        gain = chain.level(mono) * np.float32(10 ** (chain.gain_db / 20))
        pair = {"audio": mono, "residual": residual[start:stop].astype(np.float32)}
        short = self._samples - len(mono)
        return {name: np.pad(x * gain, (0, short))[None] for name, x in pair.items()}

    def generator(self, k: int, name: str) -> np.random.Generator:
        """Random numbers for one draw of row k: the same wherever the recording lies."""
        row = self._rows[k]
        seed = os.fsencode(f"{row.group}/{os.path.basename(row.path)}/{name}")
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(seed).digest()))

    def _stored(
        self, k: int, name: str, versions: int, make: Callable[[np.random.Generator], np.ndarray]
    ) -> np.ndarray:
        """A draw of row k by `make`, float32 [versions, samples] in 16 bits.

        It is read, or made and written.
        """
        path = self.path(k, name)
        stored = read_array(path)
        if stored is None or stored.shape != (versions, self._samples):
            stored = to_int16(make(self.generator(k, name)))
            write_array(path, stored)
        return to_float(stored)

    def path(self, k: int, name: str) -> str:
        """File that keeps a draw of row k."""
        key = hashlib.blake2b(f"{self._keys[k]}/{name}".encode(), digest_size=20).hexdigest()
        return os.path.join(self._store, key[:2], f"{key[2:]}.npy")

    def _item(self, k: int, **audio: np.ndarray) -> dict[str, np.ndarray]:
        label, row = np.array(self._rows[k].label, np.float32), np.array(k, np.int32)
        return {**audio, "label": label, "row": row}


class Examples(Crops):
    """Training examples, endless: examples[i] depends on the arguments and i only.

    Labels alternate, so that every even batch is half and half. Within a label a source counts by
    its number of rows to the power `source_power`, within a source a row by its `weight`. A crop of
    `samples` starts anywhere (near a mined row's worst segment with probability `near_p`), not in
    silence if that can be helped; a shorter recording is followed by zeros.

    augment: None changes nothing but the mix to mono. versions: the same crop with the same changes
    in each of these codecs, at a bit rate of its own; without, one version, in a random codec.
    draws: 0 draws anew every time; K > 0 gives every row K draws, fixed by seed, file and number,
    kept in `draw_cache` (default: in the cache's folder) as int16 once they are made.
    residual: the row's residual is cut alike; then the level is the only change.

    Items: audio float32 [V, samples] in [-1, 1], label float32 [], row int32 [] and, if wanted,
    residual float32 [V, samples]. CommandError: a recording is gone, or the disk is full.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        cache: AudioCache,
        *,
        samples: int,
        seed: int,
        augment: Augment | None,
        versions: tuple[str, ...] = (),
        draws: int = 0,
        draw_cache: str | None = None,
        residual: bool = False,
        source_power: float = 0.5,
        near_p: float = 0.5,
    ):
        if residual and (versions or draws):
            raise ValueError("residuals go with one version and fresh draws")
        changes = None if augment is None else dataclasses.asdict(augment)
        settings = json.dumps([_REVISION, samples, versions, changes, near_p])
        store = draw_cache or os.path.join(cache.folder, "draws")
        digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
        super().__init__(rows, cache, samples, os.path.join(store, digest))
        self._seed, self._augment, self._versions = seed % 2**64, augment, tuple(versions)
        self._draws, self._residual, self._near_p = draws, residual, near_p
        self._near = [_start_s(row) for row in self._rows]
        self._picks = _picks(self._rows, source_power)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, int(i)))
        rows, edges = self._picks[int(i) % len(self._picks)]
        k = int(rows[np.searchsorted(edges, rng.random() * edges[-1], side="right")])
        if self._residual:
            return self._item(k, **self._pair(k, rng, self.chain(i), self._place(k, rng)))
        if not self._draws:
            return self._item(k, audio=self.crop(k, rng, self.chain(i), self._place(k, rng)))

        def make(rng: np.random.Generator) -> np.ndarray:
            chain = self._chain(rng)
            return self.crop(k, rng, chain, self._place(k, rng))

        name = f"{self._seed}/{self._near[k]}/{rng.integers(self._draws)}"
        return self._item(k, audio=self._stored(k, name, max(1, len(self._versions)), make))

    def chain(self, i: int) -> Chain:
        """The changes of example i where draws are fresh. They depend on no row and no label."""
        return self._chain(np.random.default_rng((self._seed, int(i), 1)))

    def _chain(self, rng: np.random.Generator) -> Chain:
        if self._augment is not None:
            return self._augment.draw(rng, self._versions)
        if self._versions:
            return Chain(codecs=Augment().draw_codecs(rng, self._versions))
        return Chain()

    def _place(self, k: int, rng: np.random.Generator) -> int | None:
        """Where to look for a crop of row k; None anywhere."""
        return self._near[k] if rng.random() < self._near_p else None


class FixedExamples(Crops, Sequence[dict[str, np.ndarray]]):
    """Plain crops for watching, the same each time: `per_row` of every row, row by row.

    Items as of `Examples`; lossy `versions` have one bit rate, and are kept on disk once made.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        cache: AudioCache,
        *,
        samples: int,
        per_row: int,
        seed: int,
        versions: tuple[str, ...] = (),
        residual: bool = False,
    ):
        super().__init__(rows, cache, samples, os.path.join(cache.folder, "draws", "watch"))
        self._per_row, self._seed, self._residual = per_row, seed, residual
        self._plan = Chain(codecs=tuple((codec, WATCH_KBPS) for codec in versions))

    def __len__(self) -> int:
        return len(self._rows) * self._per_row

    def __getitem__(self, i: Any) -> Any:
        k, number = divmod(range(len(self))[i], self._per_row)
        name = f"{self._seed}/{number}"
        if self._residual:
            return self._item(k, **self._pair(k, self.generator(k, name), self._plan))
        if not self._plan.codecs:
            return self._item(k, audio=self.crop(k, self.generator(k, name), self._plan))

        def make(rng: np.random.Generator) -> np.ndarray:
            return self.crop(k, rng, self._plan)

        versions = self._plan.codecs
        name += f"/{_REVISION}/{self._samples}/{versions}"
        return self._item(k, audio=self._stored(k, name, len(versions), make))


def _key(cache: AudioCache, row: Row) -> str:
    try:
        return cache.key(row.path)
    except AudioError as error:
        raise CommandError(f"{printable(row.path)}: {error}", SOME_FAILED) from None


def _start_s(row: Row) -> int | None:
    """First sample of the segment that mining found, if the row tells."""
    text = dict(row.extra).get("segment_start_s", "")
    if not text:
        return None
    try:
        return round(float(text) * RATE)
    except (ValueError, OverflowError):
        cause = f"{printable(row.path)}: segment_start_s {text!r} is not a number of seconds"
        raise CommandError(f"{cause}: mend it, or leave the column out", USAGE) from None


def _picks(rows: Sequence[Row], source_power: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each label, 0 first: its rows, and the upper edges of their shares of the draws."""
    picks = []
    for label in sorted({row.label for row in rows}):
        members = np.array([k for k, row in enumerate(rows) if row.label == label])
        shares = np.array([rows[k].weight for k in members], np.float64)
        sources = np.array([rows[k].source for k in members])
        for source in np.unique(sources):
            inside = sources == source
            shares[inside] *= inside.sum() ** source_power / shares[inside].sum()
        picks.append((members, np.cumsum(shares)))
    return picks


def _audible_start(
    audio: np.ndarray, length: int, rng: np.random.Generator, near: int | None = None
) -> int:
    """Where a crop of int16 [n, c] begins: the first of TRIES that is not silent, or the loudest.

    With `near`, at most half a length from there.
    """
    last = len(audio) - length
    low, high = 0, max(0, last)
    if near is not None:
        low, high = (min(max(0, near + d), high) for d in (-length // 2, length // 2))
    best, loudest = 0, -1.0
    for _ in range(TRIES if last > 0 else 0):
        start = int(rng.integers(low, high + 1))
        mono = to_mono(to_float(audio[start : start + length]))
        rms = math.sqrt(float(np.dot(mono, mono)) / len(mono))
        if rms > loudest:
            best, loudest = start, rms
        if rms >= SILENCE:
            break
    return best


def batches(
    examples: Any, batch: int, *, start: int = 0, workers: int = 1
) -> Generator[dict[str, np.ndarray], None, None]:
    """Batch `start`, `start` + 1, ... of the examples, made ahead by `workers` threads.

    Batch k holds examples k * batch to (k + 1) * batch - 1, stacked: audio [B, V, samples], label
    [B], row [B]; the last one of a finite sequence may be smaller. The work is done by libraries
    that let other threads run meanwhile. Closing the generator ends its threads.
    """
    ahead = 2 * batch + workers
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead)
    source = grain.MapDataset.source(examples)[start * batch :]
    data = source.to_iter_dataset(options).batch(batch, drop_remainder=False)
    with contextlib.closing(iter(data)) as iterator:
        yield from iterator
