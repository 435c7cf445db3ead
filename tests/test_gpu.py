"""Predicted figures of GPU programs: compiled text, the roofline, the cards, the verb.

Nothing here compiles for a GPU: `test_gpu_ahead` does.
"""

from __future__ import annotations

import importlib.util
import json

import pytest

from artifactnet_jax.backends import BackendError, cards
from artifactnet_jax.bench import gpu, hlo
from artifactnet_jax.commands.bench import CARDS

# As XLA writes it, cut down. By hand, with 4-byte floats:
#   framed    doubles an array of 8 x 16: 128 operations, reads it, writes one
#   fft.1     8 x 16 real values: 2.5 * 128 * log2(16) = 1280 operations; c64 is 8 bytes
#   conv      out 1 x 2 x 6 x 6 = 72, each 3 * 3 * 4 multiply-adds: 72 * 36 * 2 = 5184; what
#             cuDNN works with (u8) is no result
#   product   bfloat16 4 x 8 by 8 x 2: 2 * 8 * 8 = 128
#   loop      5 times a sum over 128 values, and a comparison before each and once more
#   turned    moves 128 values and computes none
#   taken     reads 16 of 128 values, doubles them
TEXT = """HloModule jit_forward, is_scheduled=true

%region_add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.9 = f32[] add(%a, %b)
}

%fused_add (p0: f32[8,16]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  ROOT %add.1 = f32[8,16]{1,0} add(%p0, %p0), metadata={op_name="jit(f)/front_end/add"}
}

%fused_dot (q0: bf16[4,8], q1: bf16[8,2]) -> bf16[4,2] {
  %q0 = bf16[4,8]{1,0} parameter(0)
  %q1 = bf16[8,2]{1,0} parameter(1)
  ROOT %dot.1 = bf16[4,2]{1,0} dot(%q0, %q1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_turn (r0: f32[8,16]) -> f32[16,8] {
  %r0 = f32[8,16]{1,0} parameter(0)
  ROOT %transpose.1 = f32[16,8]{1,0} transpose(%r0), dimensions={1,0}
}

%fused_sum (s0: f32[8,16]) -> f32[16] {
  %s0 = f32[8,16]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %sum.1 = f32[16]{0} reduce(%s0, %zero), dimensions={0}, to_apply=%region_add
}

%fused_less (t0: s32[]) -> pred[] {
  %t0 = s32[] parameter(0)
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%t0, %five), direction=LT
}

%fused_take (u0: f32[8,16]) -> f32[1,16] {
  %u0 = f32[8,16]{1,0} parameter(0)
  %slice.1 = f32[1,16]{1,0} slice(%u0), slice={[2:3], [0:16]}
  ROOT %add.2 = f32[1,16]{1,0} add(%slice.1, %slice.1)
}

%body (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %state = (s32[], f32[8,16]{1,0}) parameter(0)
  %data = f32[8,16]{1,0} get-tuple-element(%state), index=1
  %n = s32[] get-tuple-element(%state), index=0
  %summed = f32[16]{0} fusion(%data), kind=kInput, calls=%fused_sum
  ROOT %again = (s32[], f32[8,16]{1,0}) tuple(%n, %data)
}

%condition (state.1: (s32[], f32[8,16])) -> pred[] {
  %state.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %compared = pred[] fusion(%n.1), kind=kLoop, calls=%fused_less
}

ENTRY %main.1 (x: f32[8,16], k: f32[3,3,4,2], q: bf16[4,8], w: bf16[8,2]) -> f32[16,8] {
  %x = f32[8,16]{1,0} parameter(0), metadata={op_name="x"}
  %k = f32[3,3,4,2]{3,2,1,0} parameter(1)
  %q = bf16[4,8]{1,0} parameter(2)
  %w = bf16[8,2]{1,0} parameter(3)
  %framed = f32[8,16]{1,0} fusion(%x), kind=kLoop, calls=%fused_add
  %fft.1 = c64[8,9]{1,0} fft(%framed), fft_type=RFFT, fft_length={16}
  %image = f32[1,4,6,6]{3,2,1,0} bitcast(%framed)
  %conv = (f32[1,2,6,6]{3,2,1,0}, u8[4096]{0}) custom-call(%image, %k), CUDNN
  %product = bf16[4,2]{1,0} fusion(%q, %w), kind=kCustom, calls=%fused_dot, IN_TEXTURE
  %start = (s32[], f32[8,16]{1,0}) tuple(%q, %framed)
  %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body, FIVE_TIMES
  %taken = f32[1,16]{1,0} fusion(%framed), kind=kLoop, calls=%fused_take, IN_CNN
  ROOT %turned = f32[16,8]{1,0} fusion(%framed), kind=kInput, calls=%fused_turn
}
"""
LONG = {
    "CUDNN": "window={size=3x3 pad=1_1x1_1}, dim_labels=bf01_01io->bf01, "
    'operand_precision={highest,highest}, custom_call_target="__cudnn$convForward", '
    'metadata={op_name="jit(f)/unet/conv"}',
    "IN_TEXTURE": 'metadata={op_name="jit(f)/texture/jit(g)/dot_general"}',
    "IN_CNN": 'metadata={op_name="jit(f)/cnn/add"}',
    "FIVE_TIMES": 'metadata={op_name="jit(f)/hpss/while"}, '
    'backend_config={"known_trip_count":{"n":"5"}}',
}
for _short, _long in LONG.items():
    TEXT = TEXT.replace(_short, _long)
needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("flax") is None, reason="needs artifactnet-jax[cpu]"
)
BY_HAND = {  # name: kind, stage, operations, bytes, times
    "framed": ("elementwise", "front_end", 128, 512 + 512, 1),
    "fft.1": ("fft", "front_end", 1280, 512 + 576, 1),
    "conv": ("convolution", "unet", 5184, 4 * (144 + 72 + 72), 1),
    "product": ("product", "texture", 128, 2 * (32 + 16 + 8), 1),
    "compared": ("elementwise", "hpss", 1, 4 + 1, 6),
    "summed": ("reduction", "hpss", 128, 512 + 64, 5),
    "taken": ("elementwise", "cnn", 16, 64 + 64, 1),
    "turned": ("layout", "front_end", 0, 512 + 512, 1),
}


@pytest.fixture(scope="module")
def program() -> hlo.Program:
    return hlo.Program(TEXT)


def test_kernels_are_those_counted_by_hand(program):
    found = {k.name: (k.kind, k.stage, k.flops, k.bytes, k.times) for k in program.kernels}
    assert found == BY_HAND


def test_launches_by_kind_and_stage(program):
    kinds = {"convolution": 1, "product": 1, "fft": 1, "reduction": 5, "elementwise": 8}
    assert hlo.count(program.kernels, "kind") == {**kinds, "layout": 1}
    stages = {"front_end": 3, "unet": 1, "hpss": 11, "cnn": 1, "texture": 1}
    assert hlo.count(program.kernels, "stage") == stages


def test_the_roofline_takes_the_longer_of_both_and_the_launch(program):
    kernels = {kernel.name: kernel for kernel in program.kernels}
    rates = {"fp32": 1000.0, "bf16": 4000.0, "bandwidth": 100.0, "launch": 0.5}
    assert hlo.seconds(kernels["conv"], rates) == pytest.approx(1152 / 100 + 0.5)
    quick = {**rates, "bandwidth": 1e9}
    assert hlo.seconds(kernels["conv"], quick) == pytest.approx(5184 / 1000 + 0.5)
    # Tensor cores for bfloat16; half of the peak for what is no product.
    assert hlo.seconds(kernels["product"], quick) == pytest.approx(128 / 4000 + 0.5)
    assert hlo.seconds(kernels["fft.1"], quick) == pytest.approx(1280 / 500 + 0.5)
    loop = [kernels["summed"], kernels["compared"]]
    alone = 128 / 500 * 5 + 1 / 500 * 6 + 11 * 0.5
    assert hlo.total(loop, quick) == pytest.approx(alone)


def test_products_that_hardware_may_round_are_named(program):
    assert hlo.rounded(program.kernels, ["unet", "front_end", "hpss", "cnn"]) == []
    assert hlo.rounded(program.kernels, ["texture"]) == ["product"]  # bfloat16
    loose = hlo.Program(TEXT.replace("{highest,highest}", "{default,default}"))
    assert hlo.rounded(loose.kernels, ["unet"]) == ["conv"]


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Program("HloModule x")


def test_what_the_assembler_says():
    said = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_89'
ptxas info    : Function properties for one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 376 bytes cmem[0]
ptxas info    : Compiling entry function 'two' for 'sm_89'
    64 bytes stack frame, 60 bytes spill stores, 56 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
    assert gpu.read_registers(said) == {"kernels": 2, "most": 255, "spills": ["two"]}


def test_every_figure_of_every_card_has_a_source():
    found = cards.data()
    assert sorted(found["cards"]) == sorted(CARDS)
    for key, figures in found["cards"].items():
        own = {k: v for k, v in figures.items() if k != "name"}
        assert own.keys() == found["fields"].keys(), key
        assert all(source in found["sources"] for _, source in own.values()), key


@pytest.mark.parametrize("key", CARDS)
def test_a_cards_float32_peak_is_that_of_its_cores(key):
    card = cards.find_card(key)
    lanes = 64 if key == "a100" else 128
    peak = card.multiprocessors * lanes * 2 * card.clock * 1e9
    assert card.fp32 == pytest.approx(peak, rel=0.02)
    assert card.bf16 > card.fp32
    assert 0 < card.room < card.memory


def test_a_card_describes_itself_to_the_compiler():
    text = cards.find_card("orin-nano").target()
    assert "cuda_compute_capability { major: 8 minor: 7 }" in text
    assert "core_count: 8 " in text
    assert f"device_memory_size: {8 << 30} " in text
    assert text.count("{") == text.count("}")


def test_without_the_plugin_nothing_is_compiled(command, monkeypatch):
    monkeypatch.setattr(cards, "PLUGINS", ())
    done = command("bench", "gpu", "--card", "h100")
    assert done.code == 3
    assert done.out == ""
    assert done.err == (
        "artifactnet-jax: compiling for H100 SXM 80 GB needs jax's CUDA plugin: "
        "pip install 'artifactnet-jax[gpu_ahead]'\n"
    )


def test_a_compiler_that_would_end_the_process_is_not_started(monkeypatch):
    monkeypatch.setattr(cards, "PLUGINS", ("xla_cuda12",))
    monkeypatch.setattr(cards, "_has", lambda module: True)
    assert cards.plugin(cards.find_card("rtx5090")) == "xla_cuda12"
    with pytest.raises(BackendError, match="does not know sm_110"):
        cards.plugin(cards.find_card("thor"))


def test_a_card_that_nobody_knows_is_wrong_usage(command):
    done = command("bench", "gpu", "--card", "rtx9999")
    assert done.code == 2
    assert "'rtx9999' is none of rtx3090, " in done.err


def report() -> dict[str, object]:
    card = cards.find_card("rtx4090")
    row = {"card": card.key, "dtype": "float32", "batch": 4, "compile_s": 1.0}
    row |= gpu.figures(hlo.Program(TEXT), card, 4)
    row |= {"memory": {"temporary": 5_000_000, "fits": True}, "registers": None, "measured": None}
    return {
        "weights": {"name": "w", "preset": "edge"},
        "assumptions": list(gpu.ASSUMPTIONS),
        "sources": cards.data()["sources"],
        "cards": {"rtx4090": cards.data()["cards"]["rtx4090"]},
        "programs": [row],
    }


def test_figures_of_a_program_follow_from_its_kernels():
    row = report()["programs"][0]
    assert row["kernels"]["launches"] == 17
    assert row["convolutions"] == {"flops": 5184, "bytes": 1152}
    predicted = row["predicted"]
    assert predicted["launches_s"] == pytest.approx(17 * 3e-6)
    assert predicted["call_s"] == pytest.approx(sum(predicted["by_stage_s"].values()))
    assert predicted["track_s"] == pytest.approx(predicted["call_s"] / 4 * 60)
    assert row["rounded"]  # the bfloat16 product of the texture head
    json.dumps(row)


def test_the_table_says_predicted_and_what_is_assumed():
    lines = gpu.table(report()).splitlines()
    head = next(line for line in lines if line.startswith("| card"))
    assert "predicted ms" in head
    assert "measured ms" in head
    assert any(line.startswith("| rtx4090 | float32 | 4 | 17 |") for line in lines)
    assert all(f"- {text}" in lines for text in gpu.ASSUMPTIONS)
    assert any("bandwidth 1008000000000.0 (ada)" in line for line in lines)


@needs_jax
@pytest.mark.parametrize(
    ("memory", "expected"),
    [(24 << 30, [16]), (8 << 30, [16]), (2 << 30, [16, 8, 4]), (1, [16, 8, 4, 2, 1]), (None, [16])],
)
def test_a_board_with_little_memory_takes_fewer_segments(memory, expected):
    """A network of 100 MB a segment beside a small one, on devices of some size."""
    from artifactnet_jax.backends.xla import fitting

    tried = []

    def programs(n):
        tried.append(n)
        return [(len, 1000), (abs, n * 100_000_000)]

    found = fitting(programs, 16, memory)
    assert tried == expected
    assert found == (expected[-1], [(len, 1000), (abs, expected[-1] * 100_000_000)])


@needs_jax
def test_folded_networks_are_the_same_function_and_have_no_batch_norm():
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from artifactnet_jax.backends.xla import build_model, folded_model
    from artifactnet_jax.weights import Weights, random_tensors
    from tiny_model import TINY

    rng = np.random.default_rng(0)
    tensors = random_tensors(TINY)
    for name in tensors:  # norms that do something
        if name.endswith((".mean", ".var", ".scale")):
            tensors[name] = rng.uniform(0.5, 1.5, tensors[name].shape).astype(np.float32)
    weights = Weights("tiny", TINY, tensors, "", "", {})
    folded, plain = folded_model(weights), build_model(weights)
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(folded))}
    assert not any(path.endswith((".mean", ".var", ".scale")) for path in paths)
    magnitude = rng.uniform(0, 1, (1, 1025, 87)).astype(np.float32)
    masks = [nnx.jit(type(m).mask)(m, jnp.asarray(magnitude)) for m in (folded, plain)]
    np.testing.assert_allclose(*masks, atol=1e-5)
    half = folded_model(weights, "bfloat16")
    assert half.unet.variable("encoder.0.conv1.kernel")[...].dtype == jnp.bfloat16


@needs_jax
def test_what_is_here_is_measured(monkeypatch):
    from artifactnet_jax.weights import Weights, random_tensors
    from tiny_model import TINY

    weights = Weights("tiny", TINY, random_tensors(TINY), "", "", {})
    found = gpu.measured(weights, "float32", 2, rounds=3)
    assert found["rounds"] == 3
    assert found["call_s"] == pytest.approx(2 * found["segment_s"])
    assert found["track_s"] == pytest.approx(60 * found["segment_s"])


def test_weights_that_are_no_weights_are_wrong_usage(command, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "plugin", lambda card: "xla_cuda13")
    done = command("bench", "gpu", "--card", "h100", "--weights", tmp_path / "none.safetensors")
    assert done.code == 2
