"""Where a backend's time goes, and what the machine would allow."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from artifactnet_jax.audio import SegmentReader
from artifactnet_jax.backends import cpu_count
from artifactnet_jax.bench.candidates import Candidate, Track, calls
from artifactnet_jax.bench.rounds import medians
from artifactnet_jax.config import Config
from artifactnet_jax.decision import decide
from artifactnet_jax.decode import open_audio
from artifactnet_jax.decoders import load, match
from artifactnet_jax.layers import layer_traffic
from artifactnet_jax.passes import folded
from artifactnet_jax.presets import input_shapes
from artifactnet_jax.results import aggregate
from artifactnet_jax.weights import Model, Weights

ROUNDS = 5  # of every stage
GRAPH_STAGES = {  # scopes of the exported graph
    **{"stft": "stft", "unet": "unet", "hpss": "hpss", "mel": "hpss"},
    **{"channels": "cnn", "cnn": "cnn"},
}


def reading_stages(tracks: Sequence[Track], weights: Model) -> dict[str, float]:
    """Seconds per second of audio to decode; to mix down, resample, measure and cut; to match.

    One thread, medians. The second is what reading segments takes beyond decoding, the third what
    the fine spectrum and its match against the embedded bank of decoders take beyond that.
    """
    config, paths = weights.config, [track.path for track in tracks]

    def decode() -> None:
        for path in paths:
            with open_audio(path) as decoded:
                for _ in decoded.blocks:
                    pass

    def read() -> None:
        for path in paths:
            for _ in SegmentReader(path, config.front_end, config.verdict, "all"):
                pass

    bank = load()

    def listen() -> None:
        for path in paths:
            reader = SegmentReader(path, config.front_end, config.verdict, "all", fingerprint=True)
            for _ in reader:
                pass
            match(reader.spectrum, bank)

    taken = medians({"decode": decode, "read": read, "listen": listen}, ROUNDS)
    audio_s = sum(track.duration_s for track in tracks)
    rest = max(0.0, taken["read"] - taken["decode"])
    more = max(0.0, taken["listen"] - taken["read"])
    parts = {"decode": taken["decode"], "resample": rest, "decoders": more}
    return {name: seconds / audio_s for name, seconds in parts.items()}


def numpy_stages(weights: Weights, audio: np.ndarray) -> dict[str, Any]:
    """Seconds of the stages of one segment [N], on one core as backend `numpy` computes it."""
    from threadpoolctl import threadpool_limits

    from artifactnet_jax.numpy_network import NumpyNetwork

    network = NumpyNetwork(weights.config, weights.tensors)
    found = network.stages(audio)
    actions: dict[str, Callable[[], Any]] = {
        "stft": lambda: network.magnitude(audio),
        "unet": lambda: network.mask(found["magnitude"]),
        "hpss": lambda: network.mel_db(network.parts(found["residual"])),
        "texture": lambda: network.texture_logit(audio, found["magnitude"]),
        "cnn": lambda: network.logit_of_db(found["views"]),
    }
    if weights.config.texture is None:
        del actions["texture"]
    with threadpool_limits(1, user_api="blas"):
        return {"seconds": medians(actions, ROUNDS), "threads": 1}


def xla_stages(weights: Weights, audio: np.ndarray, segments: int, dtype: str) -> dict[str, Any]:
    """Seconds per segment of the Flax model's stages, each compiled by itself.

    In backend `xla` they are one program, which may fuse across their borders; on a CPU a texture
    head is NumPy's part there, on one thread here.
    """
    import jax

    from artifactnet_jax.backends.xla import build_model

    model = build_model(weights, dtype)
    batch = np.repeat(audio[None], segments, 0).astype(np.float32)

    def apart(function: Callable[..., Any], *arrays: Any) -> tuple[Callable[[], Any], Any]:
        compiled = jax.jit(function).lower(*arrays).compile()
        arrays = tuple(map(jax.device_put, arrays))
        return lambda: jax.block_until_ready(compiled(*arrays)), compiled(*arrays)

    actions: dict[str, Callable[[], Any]] = {}
    actions["transfer"] = lambda: np.asarray(jax.block_until_ready(jax.device_put(batch))[:, 0])
    actions["stft"], magnitude = apart(model.magnitude, batch)
    actions["unet"], mask = apart(model.mask, magnitude)
    actions["hpss"], mel_db = apart(
        lambda mask, x: model.mel_db(model.parts(mask * x)), mask, magnitude
    )
    if model.texture is not None:
        if jax.default_backend() == "cpu":
            actions["texture"] = _host_head(weights, batch)
        else:
            actions["texture"], _ = apart(model.texture_logit, batch, magnitude)
    actions["cnn"], _ = apart(model.logit_of_db, mel_db)
    return {
        "seconds": {name: taken / segments for name, taken in medians(actions, ROUNDS).items()},
        "threads": cpu_count(),
    }


def _host_head(weights: Weights, audio: np.ndarray) -> Callable[[], Any]:
    """The texture head as the CPU backends of other libraries have it, on one thread."""
    from artifactnet_jax.backends.head import HostHead

    head = HostHead(weights, ThreadPoolExecutor(1))
    return lambda: head(audio)


def onnxruntime_stages(weights: Weights, audio: np.ndarray) -> dict[str, Any]:
    """Seconds of the stages of one segment [N] in the exported graph, from onnxruntime's profiler.

    One thread, as in the backend. The nodes are named by stage; what onnxruntime adds between them
    is "other". A texture head is NumPy's part.
    """
    import onnxruntime

    from artifactnet_jax.convert.export import build_onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = os.path.join(folder, "profile")
        model = build_onnx(weights, form="network").SerializeToString()
        session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: audio[None].astype(np.float32)}
        for _ in range(ROUNDS + 1):
            session.run(None, feed)
        with open(session.end_profiling(), encoding="utf-8") as file:
            events = json.load(file)
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    runs = np.array_split(np.array(nodes, object), ROUNDS + 1)[1:]  # the first warms up
    each: list[dict[str, float]] = []
    for run in runs:
        taken: dict[str, float] = {}
        for event in run:
            scope = event["name"].split("/")[0].removeprefix("fused ")
            stage = GRAPH_STAGES.get(scope, "other")
            taken[stage] = taken.get(stage, 0.0) + event["dur"] / 1e6
        each.append(taken)
    seconds = {name: statistics.median(taken[name] for taken in each) for name in each[0]}
    if weights.config.texture is not None:
        actions = {"texture": _host_head(weights, audio[None].astype(np.float32))}
        seconds |= medians(actions, ROUNDS)
    return {"seconds": seconds, "threads": 1}


def stages(
    candidate: Candidate, weights: Model, audio: np.ndarray, tracks: Sequence[Track]
) -> dict[str, Any] | None:
    """Milliseconds per segment by stage; None for a candidate that shows none of them.

    {"ms", "threads" (cores that a stage of one segment had), "apart" (whether the stages are
    separate programs here and one program when the candidate runs), "call_ms" (the model's own
    call, one segment or batch, per segment)}.
    """
    backend, verdict = candidate.facts["backend"], weights.config.verdict
    if not isinstance(weights, Weights):
        return None
    if backend == "numpy":
        found = numpy_stages(weights, audio)
    elif backend == "xla":
        device: Any = getattr(candidate.call, "device", None)
        on_cpu = device is None or device.platform == "cpu"
        n = 1 if on_cpu else candidate.batch
        found = xla_stages(weights, audio, n, candidate.facts["dtype"])
    elif backend == "onnxruntime" and importlib.util.find_spec("onnx") is not None:
        found = onnxruntime_stages(weights, audio)
    else:
        return None
    n = round(statistics.mean(track.segments for track in tracks))
    scores = np.linspace(0.1, 0.9, n).tolist()
    began = time.perf_counter()
    for _ in range(100):
        decide(aggregate(scores, scores, verdict.aggregate, verdict.rms_eps), 0.5, 0.5)
    found["seconds"]["aggregate"] = (time.perf_counter() - began) / 100 / n
    whole = statistics.median(calls(candidate, audio, candidate.batch, ROUNDS))
    return {
        "ms": {name: 1000 * taken for name, taken in found["seconds"].items()},
        "threads": found["threads"],
        "apart": backend == "xla",
        "call_ms": 1000 * whole / candidate.batch,
    }


# --- Physical limits ------------------------------------------------------------------------------


def traffic(config: Config) -> dict[str, int]:
    """Bytes of a segment in float32 if every layer reads its inputs and tensors, and writes, once.

    {"unet", "cnn", "total"}: what programs move that keep nothing in a cache between layers.
    Fused ones move less, im2col more.
    """
    parts, sizes = folded(config)[0], input_shapes(config)
    found = {part: 4 * layer_traffic(layers, sizes[part]) for part, layers in parts.items()}
    return {**found, "total": sum(found.values())}


def roofline(
    work: Mapping[str, int],
    moved: Mapping[str, int],
    row: Mapping[str, Any],
    limits: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Achieved rates of a candidate against what the machine can do: the whole, and each network.

    The attainable rate is min(peak, intensity x bandwidth). `limits` by number of threads.
    """
    found = row.get("stages") or {}
    parts = [("total", row["ms_per_segment"], str(row["cores"]))]
    parts += [
        (key, found["ms"][key], str(found["threads"]))
        for key in ("unet", "cnn")
        if key in found.get("ms", ())
    ]
    done = []
    for part, ms, threads in parts:
        peak, intensity = limits[threads], work[part] / moved[part]
        attainable = min(peak["gflops"], intensity * peak["gbytes_per_s"])
        gflops = work[part] / ms / 1e6
        done.append(
            {
                "part": part,
                "threads": int(threads),
                "gflops": gflops,
                "gbytes_per_s": moved[part] / ms / 1e6,
                "flop_per_byte": intensity,
                "of_peak": gflops / peak["gflops"],
                "of_bandwidth": moved[part] / ms / 1e6 / peak["gbytes_per_s"],
                "of_attainable": gflops / attainable,
                "bound": "compute" if attainable == peak["gflops"] else "memory",
            }
        )
    return done
