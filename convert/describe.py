"""What a conversion found, as lines of a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax.filterbank import mel_filterbank
from artifactnet_jax.layers import INPUT, Layer, shapes
from artifactnet_jax.weights import Stored, parameter_counts

_ACTIVATIONS = (
    *("relu", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "mish", "hard_swish"),
    *("softplus", "softsign", "tanh"),
)


def describe(weights: Stored) -> list[tuple[str, str]]:
    """(what, as found) for every part of a converted model, in the order of the pipeline."""
    source, config = weights.provenance, weights.config
    contract = source["contract"]
    per_call = contract["segments"]
    rows = [
        ("source", f"{source['source']}, {source['producer'] or 'unknown producer'}"),
        ("", f"opset {source['opset']}, sha256 {source['source_sha256']}"),
        ("licence", weights.licence),
        ("route", source["route"]),
    ]
    if source["route"] == "graph":
        rows.append(("", f"not native: {source['reason']}"))
    called = "any number of segments" if per_call is None else f"{per_call} segment(s)"
    rate = f"taken to be at {config.front_end.sample_rate:,} Hz"
    rows.append(("input", f"{contract['input']}: {called} of {contract['samples']:,} samples"))
    rows.append(("", rate))
    gives = "one score for the song" if contract["song"] else "a score for each segment"
    rows.append(("output", f"{contract['output']}: {gives}"))
    if source.get("half"):
        rows.append(("precision", "the network is half precision: its tensors are float16"))
    if source["route"] == "graph":
        return rows
    rows += _front_end(config.front_end, weights.tensors)
    fe = config.front_end
    counts = parameter_counts(config)
    unet_shape = (1, fe.n_bins, fe.n_frames)
    rows += _unet(config.unet, unet_shape, counts["unet"])
    cnn_shape = (len(fe.channels), fe.n_mels, fe.n_frames)
    rows += _cnn(config.cnn, cnn_shape, counts["cnn"])
    if config.texture is not None:  # no graph has it, but weights that were tuned may
        rows.append(("texture head", f"{counts['texture']:,} parameters"))
    verdict = config.verdict
    rule = {"rms": "mean weighted by RMS", "median": "median", "mean": "mean"}[verdict.aggregate]
    rows.append(("aggregation", f"{rule}, segments {verdict.segments}"))
    difference = source["probe_difference"]
    more = "" if difference <= 1e-4 else " (more than 1e-4: run verify on music of yours)"
    rows.append(("parity", f"|dp| {difference:.1e} on a synthetic probe{more}"))
    quiet = source.get("quiet_difference")
    if quiet is not None and quiet > 1e-4:
        rows.append(
            ("", f"WARNING: |dp| {quiet:.1e} on quiet and sparse audio, to which the network")
        )
        rows.append(("", "is sensitive beyond float32: verify --exact says which side is nearer"))
    return rows


def _front_end(fe: cfg.FrontEnd, tensors: object) -> list[tuple[str, str]]:
    assert isinstance(tensors, dict)
    edge = f"{fe.stft_pad} samples of {fe.stft_edge}" if fe.stft_pad else "no samples"
    window = "periodic Hann window" if fe.window == "hann" else "a window of its own"
    rows = [
        *_level(fe),
        ("STFT", f"n_fft {fe.n_fft}, hop {fe.hop}, {window}, {edge} added at both ends"),
        ("", f"{fe.n_bins} bins x {fe.n_frames} frames"),
    ]
    more = []
    if fe.spectrum_power != 1:
        more.append(f"power {fe.spectrum_power:g}")
    if fe.spectrum_scale != 1:
        more.append(f"scaled by {fe.spectrum_scale:g}")
    if fe.spectrum_eps:
        more.append(f"{fe.spectrum_eps:g} added to re^2 + im^2")
    if more:
        rows.append(("", ", ".join(more)))
    rows.append(
        (
            "HPSS",
            f"medians of {fe.hpss_width} frames and {fe.percussive_width} bins, {fe.hpss_edge}",
        )
    )
    floor = f"{fe.hpss_eps:g} added" if fe.hpss_eps else "nothing added (0/0 counts as 0 here)"
    rows.append(("", f"soft masks of power {fe.hpss_power:g}, {floor}"))
    rows.append(("mel", f"{fe.n_mels} bands, {_nearest_scale(fe, tensors['front_end.mel'])}"))
    floor = f"max(., {fe.amin:g})" if fe.amin_rule == "max" else f". + {fe.amin:g}"
    rows.append(("", f"of magnitude^{fe.mel_power:g}; {fe.db_factor:g} log10 of {floor}"))
    joint = {
        "segment": "the three views of a segment",
        "view": "each view of a segment",
        "song": "all views of all segments of a song",
        "song_view": "each view over all segments of a song",
    }[fe.joint]
    clamp = "no clamp" if fe.top_db is None else f"{fe.top_db:g} dB below the maximum of {joint}"
    rows.append(("", clamp))
    rows.append(("channels", ", ".join(fe.channels)))
    return rows


def _level(fe: cfg.FrontEnd) -> list[tuple[str, str]]:
    """What is done to the level of the audio."""
    steps = ["its mean is taken off"] if fe.centred else []
    if fe.level != "none":
        level = {"peak": "peak", "rms": "RMS"}[fe.level]
        rule = {
            "add": f"divided by its {level} + {fe.level_eps:g}",
            "max": f"divided by its {level}, or {fe.level_eps:g} where that is more",
            "root": f"divided by the root of its {level} squared + {fe.level_eps:g}",
        }
        steps.append(rule[fe.level_rule])
    return [("level", f"of each segment: {', then '.join(steps)}")] if steps else []


def _nearest_scale(fe: cfg.FrontEnd, matrix: np.ndarray) -> str:
    """The known filterbank that a matrix equals, if it does."""
    for scale in ("slaney", "htk"):
        for norm in ("slaney", "none"):
            reference = mel_filterbank(dataclasses.replace(fe, mel_scale=scale, mel_norm=norm))
            if np.max(np.abs(matrix - reference)) < 1e-5 * np.max(np.abs(reference)):
                return f"{scale} scale, {'area' if norm == 'slaney' else 'no'} normalisation"
    return "a matrix of its own (kept as it is)"


def _unet(
    unet: cfg.UNet | cfg.Imported, shape: tuple[int, ...], count: int
) -> list[tuple[str, str]]:
    if isinstance(unet, cfg.UNet):
        rows = [
            ("UNet", f"the layout of preset {'v94' if unet.patch == (1, 1) else 'edge'}"),
            ("", f"widths {_listed(unet.widths)}, bottleneck {unet.bottleneck}"),
            ("", f"input {unet.input_scale}, mask at most {unet.mask_max:g}, {count:,} parameters"),
        ]
        return rows
    layers = unet.layers
    sizes = shapes(layers, shape)
    rows = [("UNet", f"{len(layers)} layers, {count:,} parameters")]
    rows.append(("", f"input: {_input(layers)}"))
    downs, ups, widths = [], [], []
    for x in layers:
        before, now = sizes[x.inputs[0]], sizes[x.name]
        if len(now) != 3 or len(before) != 3 or x.op in ("mean", "max", "sum", "slice", "pad"):
            continue
        if (
            now[1] < before[1]
            and x.op in ("conv", "max_pool", "avg_pool", "space_to_depth")
            and now[1] > 1
        ):
            downs.append(_kind(x))
            widths.append(before[0])
        elif now[1] > before[1] > 1 and x.op in ("conv_transpose", "resize", "depth_to_space"):
            ups.append(_kind(x))
    inner = [s for s in sizes.values() if len(s) == 3 and s[1] > 1]
    lowest = min(s[1] for s in inner)
    bottom = max(s[0] for s in inner if s[1] == lowest)
    rows.append(("", f"depth {len(downs)}, widths {_listed(widths)}, bottleneck {bottom}"))
    rows.append(("", f"down: {_listed(dict.fromkeys(downs))}; up: {_listed(dict.fromkeys(ups))}"))
    rows.append(("", f"blocks: {_blocks(layers, sizes)}; norm: {_norms(layers, sizes)}"))
    rows.append(("", f"activation: {_activations(layers)}; skips: {_skips(layers, sizes)}"))
    heads = [x for x in layers if x.op == "conv"]
    head = "x".join(map(str, dict(heads[-1].tensors)["kernel"][:2])) if heads else "none"
    rows.append(("", f"head {head}, mask at most {unet.mask_max:g}"))
    return rows


def _cnn(cnn: cfg.CNN | cfg.Imported, shape: tuple[int, ...], count: int) -> list[tuple[str, str]]:
    if isinstance(cnn, cfg.CNN):
        return [
            ("CNN", f"the layout of the presets, widths {_listed(cnn.widths)}"),
            ("", f"hidden {cnn.hidden}, {count:,} parameters"),
        ]
    widths = [dict(x.tensors)["kernel"][3] for x in cnn.layers if x.op == "conv"]
    pools = dict.fromkeys(_kind(x) for x in cnn.layers if x.op in ("max_pool", "avg_pool"))
    return [
        ("CNN", f"{len(cnn.layers)} layers, {count:,} parameters"),
        ("", f"widths {_listed(widths)}; pooling: {_listed(pools) or 'none'}"),
        (
            "",
            f"norm: {_norms(cnn.layers, shapes(cnn.layers, shape))}; "
            f"activation: {_activations(cnn.layers)}",
        ),
    ]


def _listed(items: object) -> str:
    return ", ".join(str(item) for item in items)  # type: ignore[attr-defined]


def _kind(x: Layer) -> str:
    attrs = x.attrs
    if x.op in ("conv", "conv_transpose"):
        rows, cols = dict(x.tensors)["kernel"][:2]
        stride = attrs["strides"][0]
        name = "convolution" if x.op == "conv" else "transposed convolution"
        return f"{rows}x{cols} stride-{stride} {name}"
    if x.op in ("max_pool", "avg_pool"):
        rows, cols = attrs["kernel"]
        return f"{rows}x{cols} {x.op[:3]}-pooling"
    if x.op == "resize":
        return f"{'bilinear' if attrs['mode'] == 'linear' else 'nearest'} resizing"
    return "pixel shuffle" if x.op == "depth_to_space" else "space to depth"


def _input(layers: Sequence[Layer]) -> str:
    steps = []
    for x in layers:
        if x.op in ("conv", "conv_transpose"):
            break
        if x.op == "pad":
            steps.append(f"{x.attrs['mode']} padding {x.attrs['padding']}")
        elif x.op in ("clip", "add", "sub", "mul", "div", "pow", "maximum") and len(x.inputs) == 1:
            number = x.attrs.get("low") if x.op == "clip" else x.attrs.get("value")
            steps.append(x.op if number is None else f"{x.op} {number:g}")
        else:
            steps.append(x.op)
    return ", ".join(steps) or "the magnitude itself"


def _norms(layers: Sequence[Layer], sizes: dict[str, tuple[int, ...]]) -> str:
    found = []
    for x in layers:
        if x.op == "batch_norm":
            found.append("batch")
        elif x.op == "group_norm":
            whole = sizes[x.inputs[0]][0] == x.attrs["groups"]
            found.append("instance" if whole else f"group ({x.attrs['groups']} groups)")
    return _listed(dict.fromkeys(found)) or "folded into the convolutions, or none"


def _activations(layers: Sequence[Layer]) -> str:
    by_name = {x.name: x for x in layers}
    found = []
    for x in layers:
        if x.op in _ACTIVATIONS:
            found.append(x.op)
        elif x.op == "erf":
            found.append("gelu")
        elif x.op == "mul" and len(x.inputs) == 2:
            for gate, value in (x.inputs, x.inputs[::-1]):
                one = by_name.get(gate)
                if one is not None and one.op == "sigmoid":
                    if one.inputs[0] == value:
                        found.append("silu")
                    elif all(by_name.get(n, x).op == "slice" for n in (one.inputs[0], value)):
                        found.append("glu")
    return _listed(dict.fromkeys(found)) or "none"


def _blocks(layers: Sequence[Layer], sizes: dict[str, tuple[int, ...]]) -> str:
    by_name = {x.name: x for x in layers}
    found = ["plain"]
    for x in layers:
        if x.op == "add" and len(x.inputs) == 2 and sizes[x.name][0] > 1:
            found[0] = "residual"
        if x.op == "mul" and len(x.inputs) == 2:
            for gate, value in (x.inputs, x.inputs[::-1]):
                one = by_name.get(gate)
                if one is None or one.op != "sigmoid" or one.inputs[0] == value:
                    continue
                shape = sizes[gate]
                if len(shape) == 3 and shape[1:] == (1, 1) and sizes[value][1:] != (1, 1):
                    found.append("squeeze-excite gates")
                elif shape[0] == 1 and sizes[value][0] > 1:
                    found.append("attention gates")
                elif by_name.get(one.inputs[0], x).op == "conv":
                    found.append("gated by a convolution")
        kernel = dict(x.tensors).get("kernel", ())
        if x.op == "conv" and x.attrs["groups"] > 1:
            found.append("depthwise" if kernel[2] == 1 else "grouped")
        if x.op == "conv" and x.attrs["dilations"] != (1, 1):
            found.append("dilated")
    return _listed(dict.fromkeys(found))


def _skips(layers: Sequence[Layer], sizes: dict[str, tuple[int, ...]]) -> str:
    """How the decoder takes up the encoder's features: by what follows an upsampling."""
    by_name = {x.name: x for x in layers}

    def lowest(name: str) -> int:
        """Fewest rows on the way to a value."""
        fewest, todo, seen = math.inf, [name], set()
        while todo:
            one = todo.pop()
            if one in seen:
                continue
            seen.add(one)
            shape = sizes[one]
            if len(shape) == 3 and shape[1] > 1:
                fewest = min(fewest, shape[1])
            if one != INPUT:
                todo += by_name[one].inputs
        return int(fewest)

    kinds = [
        "concatenated" if x.op == "concat" else "added"
        for x in layers
        if x.op in ("concat", "add")
        and len(x.inputs) == 2
        and lowest(x.inputs[0]) != lowest(x.inputs[1])
    ]
    return _listed(dict.fromkeys(kinds)) or "none"
