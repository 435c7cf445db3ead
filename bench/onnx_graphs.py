"""Time ONNX graphs of the same detector against each other in onnxruntime.

Run as `python -m artifactnet_jax.bench.onnx_graphs ORIGINAL.onnx LEAN.onnx`. Each graph takes
audio [1, samples]. They take turns within each round, so that a change of the machine's pace meets
all of them; ratios are medians over the rounds. Scores are printed beside the times, so that no
speed is won by error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np


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
    scores = []
    feeds = []
    for session in sessions:
        entry = session.get_inputs()[0]
        audio = 0.1 * np.random.default_rng(0).standard_normal((1, entry.shape[-1]))
        feeds.append({entry.name: audio.astype(np.float32)})
        scores.append(float(np.ravel(session.run(None, feeds[-1])[0])[0]))  # warm-up too
    times: list[list[float]] = [[] for _ in sessions]
    for k in range(args.rounds):
        print(f"round {k + 1} of {args.rounds}", file=sys.stderr)
        for taken, session, feed in zip(times, sessions, feeds, strict=True):
            start = time.perf_counter()
            session.run(None, feed)
            taken.append(1000 * (time.perf_counter() - start))
    print(f"{'ms median':>10} {'ms min':>10} {'speed':>6} {'score':>9}  graph")
    for path, taken, score in zip(args.graphs, times, scores, strict=True):
        ratio = statistics.median(a / b for a, b in zip(times[0], taken, strict=True))
        middle, least = statistics.median(taken), min(taken)
        print(f"{middle:10.1f} {least:10.1f} {ratio:6.2f} {score:9.6f}  {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
