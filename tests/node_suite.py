"""The official ONNX node suite, which comes with the `onnx` package, against the operators.

    python tests/node_suite.py            # all of it, about two minutes of one core: `make suites`
    python tests/node_suite.py --half     # the same cases with float16 in the place of float32

Every case of opsets that are read and of the standard domain is run: floating-point inputs as data,
others as constants. What is refused must say so in one line of this project's own. `REFUSED` and
`APART` list what is expected, each with its reason. Another outcome, a pass where a failure is
listed included, is a failure (exit code 1).
"""

from __future__ import annotations

import os

os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import argparse
import fnmatch
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from artifactnet_jax.convert.graph import OPSETS, ConvertError, read_graph
from artifactnet_jax.convert.operators import evaluate

F32 = np.float32
# Reason -> patterns of cases that must be refused.
REFUSED: dict[str, str] = {
    "operators that no detector of audio has": "test_affine_grid_* test_attention_* "
    "test_basic_deform_conv_* test_bernoulli* test_bernoulli*_expanded "
    "test_bitcast_* test_center_crop_pad_* test_col2im* "
    "test_convinteger_* test_basic_convinteger test_cumprod_* test_deform_conv_* test_det_* "
    "test_gridsample* test_hardmax_* test_image_decoder_* test_matmulinteger test_maxunpool_* "
    "test_nllloss_* test_nonmaxsuppression_* test_roialign_* test_rotary_embedding* "
    "test_scatter_with_axis test_scatter_without_axis test_sce_* "
    "test_sce_*_expanded test_tensorscatter* "
    "test_tfidfvectorizer_*",
    "texts and images": "test_equal_string* test_regex_* test_string_* test_strnormalizer_*",
    "quantised graphs": "test_qlinear* test_quantizelinear* test_dequantizelinear* "
    "test_dynamicquantizelinear* test_dynamicquantizelinear*_expanded",
    "training": "test_batchnorm_*_training_mode test_training_dropout* test_adagrad* test_adam* "
    "test_momentum* test_nesterov_*",
    "4-bit, 2-bit and 8-bit floating-point types, which JAX rounds otherwise": " ".join(
        f"test_castlike_*_to_{kind} test_castlike_*_to_{kind}_expanded"
        for kind in ("FLOAT8*", "FLOAT4*", "INT4", "UINT4", "INT2", "UINT2")
    ),
    "bfloat16 rounded as each runtime likes": "test_attention_*bf16_expanded",
    "MaxPool's indices": "test_maxpool_with_argmax_*",
    "antialiased Resize": "test_resize_*_antialias",
    "inverse one-sided DFT": "test_dft_irfft*",
    "peepholes of an LSTM": "test_lstm_with_peepholes",
    "sequences and optionals as inputs": "test_identity_opt test_identity_sequence "
    "test_if_opt test_loop13_seq test_loop16_seq_none test_sequence_* test_sequence_map_*_expanded "
    "test_optional_* test_concat_from_sequence*",
    "a graph without an input": "test_constant",
    "Scan of opset 8": "test_scan_sum",
}
# Reason -> patterns of cases whose values are apart.
APART: dict[str, str] = {
    "a last sample at a fractional size; onnxruntime and PyTorch take the whole size": (
        "test_resize_downsample_scales_linear_align_corners "
        "test_resize_downsample_scales_cubic_align_corners"
    ),
    "halves rounded once, where the suite rounds them at each step": (
        "test_attention_4d_causal_fp16_expanded"
    ),
}
HALF = {
    "a product above 65,504, the largest half": "test_reduce_prod_default_axes_keepdims_example",
    "an angle next to a pole": "test_tan",
    "inputs of 10,000 + k, which halves round": (
        "test_softmax_large_number test_logsoftmax_large_number"
    ),
}


def cases() -> Iterator[Any]:
    """The cases of the suite that are of the standard domain and an opset that is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cases' own arithmetic
        from onnx.backend.test.loader import load_model_tests

        found = load_model_tests(kind="node")
    for case in found:
        opsets = {entry.domain: entry.version for entry in case.model.opset_import}
        if set(opsets) == {""} and opsets[""] in OPSETS:
            yield case


def halved(case: Any) -> bool:
    """Put float16 in the place of float32; whether the standard allows that here."""
    values = [*case.model.graph.input, *case.model.graph.output]
    tensors = [v.type.tensor_type for v in values if v.type.WhichOneof("value") == "tensor_type"]
    floats = [tensor for tensor in tensors if tensor.elem_type == onnx.TensorProto.FLOAT]
    if not floats or len(case.model.graph.node) != 1:
        return False
    for tensor in floats:
        tensor.elem_type = onnx.TensorProto.FLOAT16
    try:
        onnx.checker.check_model(case.model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def outcome(case: Any, folder: Path, half: bool) -> str:
    """ "passes", "refused: ..." or "apart: ..."."""
    path = folder / "case.onnx"
    onnx.save(case.model, path)
    try:
        for given, expected in case.data_sets:
            compare(read_graph(path), case, given, expected, half)
    except ConvertError as error:
        return f"refused: {str(error).removeprefix(f'{path}: ')}"
    except AssertionError as error:
        return f"apart: {' '.join(str(error).split())[:200]}"
    return "passes"


def compare(graph: Any, case: Any, given: Any, expected: Any, half: bool) -> None:
    """AssertionError where outputs are not those of the suite, or of another type or shape."""
    names = [value.name for value in case.model.graph.input]
    feeds = {n: array(x) for n, x in zip(names, given, strict=False) if x is not None}
    if any(x is None for x in feeds.values()):
        raise ConvertError("an input that is no tensor")
    if half:
        with np.errstate(over="ignore"):
            feeds = {n: x.astype(np.float16) if x.dtype == F32 else x for n, x in feeds.items()}
    if any(x.dtype.kind in "OUSc" for x in feeds.values()):
        raise ConvertError("an input of text or complex numbers")
    data = {name: x for name, x in feeds.items() if x.dtype.kind == "f"}
    static = {name: x for name, x in feeds.items() if name not in data}
    try:
        found = evaluated(graph, data, static)
    except ConvertError as error:
        if "depend" not in str(error):
            raise
        found = evaluated(graph, {}, feeds)
    rtol, atol = (1e-2, 1e-2) if half else (case.rtol, max(case.atol, 2e-6))
    pairs: list[tuple[Any, Any]] = []
    for value, want in zip(found, expected, strict=True):
        several = isinstance(value, list)
        pairs += zip(value, want, strict=True) if several else [(value, want)]
    for value, given_as in pairs:
        got, want = np.asarray(value), array(given_as)
        narrow = half and want.dtype == np.float32
        assert got.dtype == (np.float16 if narrow else want.dtype)
        assert got.shape == want.shape
        if got.dtype.kind not in "f":
            got, want = (x.astype(float) if x.dtype.kind == "V" else x for x in (got, want))
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def evaluated(graph: Any, data: Any, static: Any) -> list[Any]:
    """The outputs of a graph, in order."""
    graph.constants = {**graph.constants, **static}
    found = evaluate(graph, data)
    return [found[value.name] for value in graph.outputs]


def array(value: Any) -> Any:
    """A case's tensor; None: it is none."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return None if isinstance(value, (list, onnx.SequenceProto)) else np.asarray(value)


def expected_outcome(name: str, half: bool) -> str:
    """ "passes", "refused" or "apart", by the tables."""
    apart = {**APART, **(HALF if half else {})}
    for kind, table in (("apart", apart), ("refused", REFUSED)):
        patterns = " ".join(table.values()).split()
        # A function's body is a graph of plain operators.
        for pattern in patterns:
            body = name.endswith("_expanded") and not pattern.endswith("_expanded")
            if fnmatch.fnmatch(name, pattern) and not (body and kind == "refused"):
                return kind
    return "passes"


def run(half: bool = False, only: str = "*") -> tuple[Counter[str], list[str]]:
    """How many cases had which outcome, and those whose outcome is not the one listed."""
    counts: Counter[str] = Counter()
    surprises = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if not fnmatch.fnmatch(case.name, only) or (half and not halved(case)):
                continue
            got = outcome(case, Path(folder), half)
            kind = got.partition(":")[0]
            counts[kind] += 1
            if kind != expected_outcome(case.name, half):
                surprises.append(f"{case.name}: {got}")
    return counts, surprises


def main() -> int:
    """Exit code 1 where an outcome is not the one listed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--half", action="store_true", help="float16 in the place of float32")
    parser.add_argument("--only", default="*", help="pattern of the cases' names")
    args = parser.parse_args()
    counts, surprises = run(args.half, args.only)
    print(", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
    print("".join(f"not as listed: {line}\n" for line in surprises), end="")
    return bool(surprises)


if __name__ == "__main__":
    sys.exit(main())
