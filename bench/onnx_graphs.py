"""Time ONNX graphs of the same detector against each other in onnxruntime.

Run as `python -m artifactnet_jax.bench.onnx_graphs ORIGINAL.onnx LEAN.onnx`. Each graph takes
audio [1, samples]. They take turns within each round, so that a change of the machine's pace meets
all of them; ratios are medians over the rounds. Scores are printed beside the times, so that no
speed is won by error.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys

import numpy as np

from artifactnet_jax.bench.rounds import interleaved, ratios, wall_clock


def main(argv: list[str] | None = None) -> int:
    """Print a table: milliseconds per segment, ratio of the first graph's time, score."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("graphs", nargs="+", metavar="GRAPH.onnx")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime; 0: its choice")
    args = parser.parse_args(argv)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    providers = ["CPUExecutionProvider"]
    sessions = [onnxruntime.InferenceSession(path, options, providers) for path in args.graphs]
    scores: list[float] = []
    actions = {}
    for path, session in zip(args.graphs, sessions, strict=True):
        entry = session.get_inputs()[0]
        audio = 0.1 * np.random.default_rng(0).standard_normal((1, entry.shape[-1]))
        actions[path] = functools.partial(session.run, None, {entry.name: audio.astype(np.float32)})
        scores.append(float(np.ravel(actions[path]()[0])[0]))  # warm-up too
    runs = interleaved(actions, args.rounds, wall_clock, lambda text: print(text, file=sys.stderr))
    times = {path: [1000 * taken.wall_s for taken, _ in own] for path, own in runs.items()}
    print(f"{'ms median':>10} {'ms min':>10} {'speed':>6} {'score':>9}  graph")
    for (path, taken), score in zip(times.items(), scores, strict=True):
        speed = ratios(times[args.graphs[0]], taken)["median"]
        middle, least = statistics.median(taken), min(taken)
        print(f"{middle:10.1f} {least:10.1f} {speed:6.2f} {score:9.6f}  {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
