"""Measure long tracks, segment by segment, for the scan for stretches: see fusion.py.

    python scripts/long_tracks.py MIRRORS LONG --weights W

Of real tracks of 2 to 10 minutes and AI tracks of 75 s and more, two and three of a group at most,
LONG gets a file each: statistics of the texture head, logits of the network of W, the start of up
to MOST segments, and the sums of the fine spectrum. W are the weights that `texture --init` had:
those that it wrote have their share of the network in them. What is there is left alone.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from default_data import listed, package_row, recordings, tracks
from threadpoolctl import threadpool_limits

from artifactnet_jax import dsp_numpy
from artifactnet_jax.audio import SegmentReader
from artifactnet_jax.config import Texture
from artifactnet_jax.dsp_numpy import stft_magnitude
from artifactnet_jax.forward import texture_statistics
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.recording import AudioError
from artifactnet_jax.weights import load_weights

MOST = 48  # segments of a track
REAL_S, AI_S = (170.0, 600.0), (75.0, 400.0)  # lengths of tracks that are taken
OF_GROUP = {"real": 2, "ai": 3}


def measure(row: dict[str, str], data: bytes, folder: Path, network: NumpyNetwork) -> None:
    """Write what is measured of one recording, if it is as long as is wanted."""
    path = folder / f"{row['id']}.npz"
    config = dataclasses.replace(network.config, texture=Texture())
    fe = config.front_end
    reader = SegmentReader(
        *(io.BytesIO(data), fe, config.verdict, "all"), name=row["id"], fingerprint=True
    )
    statistics, logits, starts = [], [], []
    try:
        for segment in reader:
            if len(starts) < MOST:
                audio = segment.samples.astype(np.float32)
                magnitude = stft_magnitude(audio, fe)
                values = texture_statistics(audio, magnitude, config, dsp_numpy)
                statistics.append(values.astype(np.float16))
                logits.append(network.logit(audio))
                starts.append(segment.start_s)
    except AudioError as error:
        print(f"{row['id']}: {error}")
        return
    assert reader.spectrum is not None
    windows = reader.spectrum.windows
    np.savez(
        path,
        S=np.stack(statistics),
        N=np.array(logits),
        T=np.array(starts),
        n=np.array([window.frames for window in windows]),
        log=np.stack([window.log for window in windows]),
        pw=np.stack([window.power for window in windows]),
        wf=reader.spectrum.window_frames,
        group=row["group"],
        label=row["label"],
    )


def wanted(mirrors: Path) -> set[str]:
    """Ids of the files that may be taken, by label and group; their length decides later."""
    found, count = set(), collections.Counter[tuple[str, str]]()

    def take(row: dict[str, str], seconds: float) -> None:
        low, high = REAL_S if row["label"] == "real" else AI_S
        key = row["label"], row["group"]
        if low <= seconds <= high and count[key] < OF_GROUP[row["label"]]:
            count[key] += 1
            found.add(row["id"])

    for row, data in recordings(mirrors, {r["id"] for r in listed().values()}):
        if row["label"] in OF_GROUP:
            try:
                take(row, soundfile.info(io.BytesIO(data)).duration)
            except soundfile.LibsndfileError:
                continue
    for kind in ("deb", "npm"):
        for folder in sorted((mirrors / kind).glob("*/")):
            for path in tracks(folder):
                row = package_row(f"{kind}-{folder.name}--{path.stem}")
                take(row, soundfile.info(path).duration)
    return found


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mirrors", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    weights = load_weights(args.weights)
    network = NumpyNetwork(dataclasses.replace(weights.config, texture=None), weights.tensors)
    known = {path.stem for path in args.folder.glob("*.npz")}
    ids = wanted(args.mirrors) - known
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(2) as pool:
        waiting = collections.deque(
            pool.submit(measure, row, data, args.folder, network)
            for row, data in recordings(args.mirrors, ids)
        )
        while waiting:
            waiting.popleft().result()


if __name__ == "__main__":
    main()
