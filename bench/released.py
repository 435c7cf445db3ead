"""Write weights as an ONNX graph in the form in which ArtifactNet was released: a peer to measure.

Run as `python -m artifactnet_jax.bench.released OUT.onnx [--weights W]`. The DFT is
two strided convolutions with a basis of cosines and one of sines, and a median sorts 31 stacked
copies of the spectrogram, as PyTorch's exporter writes both. Everything else is the same as in our
own graph, and so are the scores.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import numpy as np

from artifactnet_jax.config import Config, FrontEnd
from artifactnet_jax.convert import export, export_front_end
from artifactnet_jax.files import replace_file
from artifactnet_jax.models import open_model
from artifactnet_jax.weights import Model, Weights, random_tensors


def dft(g: Any, audio: str, fe: FrontEnd, window: np.ndarray, name: str) -> str:
    """Audio [B, N] -> magnitude [B, n_bins, n_frames] by two convolutions with dense bases."""
    pads = g.ints(0, fe.stft_pad, 0, fe.stft_pad)
    x = g.op("Unsqueeze", g.op("Pad", audio, pads, mode=fe.stft_edge), g.ints(1))
    n = fe.n_fft
    angle = 2 * np.pi / n * (np.outer(np.arange(fe.n_bins), np.arange(n)) % n)
    squares = []
    for part, basis in (("cos", np.cos(angle)), ("sin", np.sin(angle))):
        kernel = g.constant((basis * window)[:, None], name=f"{name}.{part}")
        wave = g.op("Conv", x, kernel, strides=[fe.hop])
        squares.append(g.op("Mul", wave, wave))
    return str(g.op("Sqrt", g.op("Add", *squares)))


def median(g: Any, x: str, n: int, size: int, edge: str) -> str:
    """Running median along axis 1 of [B, n, m], by sorting `size` stacked copies."""
    half = size // 2
    padded = g.op("Pad", x, g.ints(0, half, 0, 0, half, 0), mode=edge)
    copies = [g.op("Unsqueeze", g.cut(padded, 1, k, k + n), g.ints(3)) for k in range(size)]
    stacked = g.op("Concat", *copies, axis=3)
    values, _ = g.ops("TopK", stacked, g.ints(size), outputs=2, axis=3)
    return str(g.op("Squeeze", g.cut(values, 3, half, half + 1), g.ints(3)))


def released_form(weights: Model) -> bytes:
    """Weights of a preset without a texture head, as an ONNX file; ValueError for others."""
    if weights.config.texture is not None:
        raise ValueError("no released graph has a texture head: name other weights")
    with mock.patch.multiple(export_front_end, magnitude=dft, median=median):
        return bytes(export.build_onnx(weights).SerializeToString())


def main(argv: list[str] | None = None) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("out", metavar="OUT.onnx")
    parser.add_argument("--weights", metavar="W", help="default: random ones of the preset v94")
    args = parser.parse_args(argv)
    config = Config.v94()
    random = Weights("random", config, random_tensors(config), "", "", {})
    weights: Model = random if args.weights is None else open_model(args.weights)
    replace_file(args.out, released_form(weights))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
