"""The lean graph in int8: its convolutions quantised by onnxruntime, over a user's own music.

Static quantisation needs the range of every activation, so segments are run once through the float
graph. What pays is the processor's to say: with int8 dot products (AVX-512 VNNI and what came after
it) `v94` runs 2.4 times as fast as in float32 (docs/speed.md).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto


def quantise(model: ModelProto, segments: Iterable[np.ndarray]) -> ModelProto:
    """The lean graph with its convolutions in int8, for audio like these float32 [N] segments.

    Weights by channel, in 7 bits: products of 8 and 8 bits overflow the sums of processors without
    int8 dot products. Activations in 8 bits, each over the range that it had. See `kept_float`.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    given = model.graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # of a module without types
        def __init__(self) -> None:
            self._rest = iter(segments)

        def get_next(self) -> dict[str, np.ndarray] | None:
            segment = next(self._rest, None)
            return None if segment is None else {given: segment[None]}

    with tempfile.TemporaryDirectory(prefix="artifactnet-jax-") as folder:
        single, path = (os.path.join(folder, name) for name in ("fp32.onnx", "int8.onnx"))
        onnx.save(model, single)  # a model in memory it would change
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)  # advice to optimise first, which undoes nothing here
        try:
            quantize_static(
                single,
                path,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                nodes_to_exclude=kept_float(model),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(level)
        small = onnx.load(path)
    notes = {note.key: note.value for note in model.metadata_props}
    onnx.helper.set_model_props(small, {**notes, "precision": "int8"})
    small.doc_string = model.doc_string.replace("fp32", "int8")
    return small


def kept_float(model: ModelProto) -> list[str]:
    """Names of the convolutions that stay float32, which are also the cheapest.

    Those that read a magnitude or the channels, before which there was no convolution: 8 bits do
    not hold their range. And the last one before the mask, whose sigmoid magnifies errors.
    """
    raw, kept, last = {model.graph.input[0].name}, [], ""
    for node in model.graph.node:
        if node.op_type == "Conv":
            if raw & set(node.input):
                kept.append(node.name)
            elif node.name.startswith("unet/"):
                last = node.name
        elif raw & set(node.input):
            raw |= set(node.output)
    return [*kept, last] if last else kept
