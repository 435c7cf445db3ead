"""Weights as ONNX: a lean graph of our own, or the tuned values in the original graph.

The lean graph is NCHW, opset 18, without functions, strongly typed, with a dynamic batch axis, and
made of operators that onnxruntime and TensorRT (10 and later, TensorRT-RTX) parse. Batch norms of
presets are folded into their convolutions. `forward` has the same order of stages for arrays.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from artifactnet_jax import __version__, fine_head
from artifactnet_jax import config as cfg
from artifactnet_jax.convert import export_front_end as front_end
from artifactnet_jax.convert.export_network import network
from artifactnet_jax.convert.export_texture import texture_logit
from artifactnet_jax.convert.onnx_graph import OnnxGraph
from artifactnet_jax.files import replace_file
from artifactnet_jax.filterbank import hann, mel_filterbank
from artifactnet_jax.forward import STAGES
from artifactnet_jax.passes import folded
from artifactnet_jax.weights import Engine, ForeignGraph, Model, Weights

if TYPE_CHECKING:
    from onnx import ModelProto

Form = Literal["segment", "song", "network"]
Precision = Literal["fp32", "fp16"]

OPSET = 18
IR_VERSION = 8  # of that opset: read by every onnxruntime and TensorRT in question


def export(
    model: Model,
    path: str | os.PathLike[str],
    *,
    form: Form = "segment",
    precision: Precision = "fp32",
    template: str | os.PathLike[str] | None = None,
) -> None:
    """Write weights as an ONNX file, atomically: see `build_onnx`, or `fill_template`.

    Raises ValueError for what these raise, and for a form or precision beside a template; OSError
    where the file cannot be written.
    """
    if template is None:
        replace_file(path, build_onnx(model, form=form, precision=precision).SerializeToString())
        return
    if (form, precision) != ("segment", "fp32"):
        raise ValueError("a template keeps its own form and precision: leave both out")
    from artifactnet_jax.convert.template import fill_template

    fill_template(model, template, path)


def build_onnx(
    model: Model,
    *,
    form: Form = "segment",
    precision: Precision = "fp32",
    stages: bool = False,
) -> ModelProto:
    """The lean graph of any weights.

    "segment": `audio` float32 [batch, segment_samples] -> `p_ai` float32 [batch]. "song":
    `audio_chunks` float32 [chunks, segment_samples] of ONE song -> `p_ai` float64 [1], the
    aggregation of `config.verdict` taken in float64 (which TensorRT does not have), the top-dB
    maximum over all chunks where `front_end.joint` says so. "network": `audio` -> the CNN's `logit`
    float32 [batch], a texture head left out, for a caller that computes it by other means.

    "fp16" computes the convolutions and linear layers in float16, with float16 weights, except
    those that read a network's own input, whose range float16 does not hold; front end, texture
    head, norms, reductions, exponentials and the last sigmoid stay float32. `stages` adds the
    outputs `STAGES`, each with the batch axis first; "views" in dB before the clamp.

    Raises ValueError: an unknown form or precision; weights that are a foreign graph; layers that
    cannot be (naming the layer); a weight beyond float16's range.
    """
    weights = _exportable(model)
    if form not in ("segment", "song", "network"):
        raise ValueError(f"unknown form {form!r}: use 'segment', 'song' or 'network'")
    if precision not in ("fp32", "fp16"):
        raise ValueError(f"unknown precision {precision!r}: use 'fp32' or 'fp16'")
    from onnx import TensorProto, helper

    config, fe = weights.config, weights.config.front_end
    batch, source = ("chunks", "audio_chunks") if form == "song" else ("batch", "audio")

    def typed(name: str, kind: int, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    g = OnnxGraph()
    values = _stages(g, weights, source, form, precision == "fp16")
    logit = values["logit"]
    if form == "network":
        g.op("Identity", logit, name="logit")
        outputs = [typed("logit", TensorProto.FLOAT, batch)]
    elif form == "segment":
        g.op("Sigmoid", logit, name="p_ai")
        outputs = [typed("p_ai", TensorProto.FLOAT, batch)]
    else:
        with g.scope("song"):
            _aggregate(g, source, g.op("Sigmoid", logit), config.verdict)
        outputs = [typed("p_ai", TensorProto.DOUBLE, 1)]
    if stages:
        plane, maps = (fe.n_bins, fe.n_frames), (fe.n_mels, fe.n_frames)
        sizes = (*5 * (plane,), (3, *maps), (len(fe.channels), *maps), ())
        for stage, size in zip(STAGES, sizes, strict=True):
            g.op("Identity", values[stage], name=stage)
            outputs.append(typed(stage, TensorProto.FLOAT, batch, *size))

    audio = typed(source, TensorProto.FLOAT, batch, fe.segment_samples)
    proto = helper.make_model(
        helper.make_graph(g.nodes, "artifactnet", [audio], outputs, g.initialisers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="artifactnet-jax",
        producer_version=__version__,
        doc_string=f"P(AI) of a {form} of {fe.sample_rate} Hz mono music, {precision}",
    )
    notes = {
        "licence": weights.licence,
        "weights": weights.name,
        "weights_sha256": weights.sha256,
        "source_sha256": str(weights.provenance.get("source_sha256", "")),
        "config_sha256": config.digest(),
        "artifactnet_jax.config": json.dumps(config.to_dict(), sort_keys=True),
        "form": form,
        "precision": precision,
        **({} if weights.fine is None else {fine_head.NOTE: fine_head.to_text(weights.fine)}),
    }
    helper.set_model_props(proto, notes)
    return proto


def _stages(g: OnnxGraph, weights: Weights, audio: str, form: Form, half: bool) -> dict[str, str]:
    """The nodes from audio to logit; name of a stage -> its value."""
    config, fe = weights.config, weights.config.front_end
    parts, tensors = folded(config, weights.tensors)
    plane, map_shape = (fe.n_bins, fe.n_frames), (len(fe.channels), fe.n_mels, fe.n_frames)
    with g.scope("stft"):
        magnitude = front_end.magnitude(g, audio, fe, _window(weights), "stft")
    with g.scope("unet"):
        x = g.op("Unsqueeze", magnitude, g.ints(1))
        mask = network(g, parts["unet"], tensors, "unet", x, (1, *plane), half)
        mask = g.reshape(mask, -1, *plane)
    residual = g.op("Mul", mask, magnitude)
    with g.scope("hpss"):
        harmonic, percussive = front_end.hpss(g, residual, fe)
    with g.scope("mel"):
        views = front_end.views(g, (residual, harmonic, percussive), fe, _mel(weights))
    with g.scope("channels"):
        channels = front_end.channels(g, views, fe, over_song=form == "song")
    with g.scope("cnn"):
        logit = network(g, parts["cnn"], tensors, "cnn", channels, map_shape, half)
        logit = g.reshape(logit, -1)
    if config.texture is not None and form != "network":
        with g.scope("texture"):
            logit = g.op("Add", logit, texture_logit(g, audio, magnitude, config, tensors))
    found = (magnitude, mask, residual, harmonic, percussive, views, channels, logit)
    return dict(zip(STAGES, found, strict=True))


def _exportable(model: Model) -> Weights:
    if isinstance(model, ForeignGraph):
        raise ValueError(
            f"weights {model.name!r} are a graph whose networks were not recognised: name its "
            "ONNX file as template"
        )
    if isinstance(model, Engine):
        raise ValueError(f"{model.file} has no tensors to export: name the weights file")
    assert isinstance(model, Weights)
    return model


def _window(weights: Weights) -> np.ndarray:
    fe = weights.config.front_end
    given = weights.tensors["front_end.window"] if fe.window == "given" else hann(fe.n_fft)
    return np.asarray(given, np.float64)


def _mel(weights: Weights) -> np.ndarray:
    fe = weights.config.front_end
    return weights.tensors["front_end.mel"] if fe.mel_scale == "given" else mel_filterbank(fe)


def _aggregate(g: OnnxGraph, audio: str, scores: str, verdict: cfg.Decision) -> None:
    """Scores of a song's chunks -> the output `p_ai` float64 [1]."""
    from onnx import TensorProto

    p = g.op("Cast", scores, to=TensorProto.DOUBLE)
    first = g.ints(0)
    if verdict.aggregate == "rms":
        energy = g.op("ReduceMean", g.op("Mul", audio, audio), g.ints(1), keepdims=0)
        rms = g.op("Cast", g.op("Sqrt", energy), to=TensorProto.DOUBLE)
        total = g.op("ReduceSum", rms, first, keepdims=1)
        total = g.op("Add", total, g.constant([verdict.rms_eps], np.float64))
        p = g.op("ReduceSum", g.op("Mul", p, g.op("Div", rms, total)), first, keepdims=1)
    elif verdict.aggregate == "mean":
        p = g.op("ReduceMean", p, first, keepdims=1)
    else:
        n, two = g.op("Shape", p), g.ints(2)
        ordered, _ = g.ops("TopK", p, n, outputs=2, largest=0)
        lower = g.op("Gather", ordered, g.op("Div", g.op("Sub", n, g.ints(1)), two))
        upper = g.op("Gather", ordered, g.op("Div", n, two))
        p = g.op("Mul", g.op("Add", lower, upper), g.constant([0.5], np.float64))
    # Rounding may leave [0, 1].
    g.op("Clip", p, g.constant(0.0, np.float64), g.constant(1.0, np.float64), name="p_ai")
