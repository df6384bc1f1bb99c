"""legalize-inductor: the dialect in ATen, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bounds
import pytest
import torch
from families import make_model
from stages import apply, captured, largest, rewritten, sequences, tiny_decoder
from torch import Tensor
from torch.fx import Node

from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.capture import capture_model, capture_module
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.compiler.ir.verification import verify_program
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.target import check_legal
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.kv_cache.static import StaticKVCache
from optc.passes.legalization.inductor import LegalizeInductor
from optc.passes.legalization.inductor_linears import narrow
from optc.passes.quantization.rotate_inputs import RotateInputs
from optc.passes.quantization.rtn import QuantizeRtn
from optc.targets.inductor_cpu import TARGET

aten, optc = torch.ops.aten, torch.ops.optc
LINEAR = optc.linear_nbits.default
STATIC, LEGALIZE = StaticKVCache(in_place=True), LegalizeInductor()
LENGTHS = (21, 9, 14, 1)
CALIBRATED = PassContext(calibration=random_calibration(128, samples=2, length=16, seed=0))


def _dialect(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("optc.")]


def _same(before: Program, after: Program) -> float:
    rows = sequences(*LENGTHS)
    return largest(run_stage(before, rows).logits, run_stage(after, rows).logits)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "mixtral"])
def test_static_caches(name: str) -> None:
    """Grouped heads, windows, softcap; a ragged batch, a chunk, single steps, garbage in the caches."""
    before = rewritten(STATIC, name).program
    result = apply(LEGALIZE, before)
    verify_program(result.program, LEGALIZE.name)
    check_legal(result.program, TARGET)
    assert (result.matched, result.candidates) == (2, 2)
    assert _dialect(result.program) == []
    assert _same(before, result.program) <= 1e-5


def test_linears_of_paged_programs_read_their_weights_once() -> None:
    """All of them; quantized ones are packed."""
    before = rewritten(PageKVCache(), "llama").program
    after = apply(LEGALIZE, before).program
    count = len(before.calls(aten.linear.default))
    assert count == 15
    assert (len(after.calls(optc.linear_few.default)), len(after.calls(aten.linear.default))) == (count, 0)
    check_legal(after, TARGET)
    assert _same(before, after) <= 1e-5
    packed = apply(
        LEGALIZE, apply(PageKVCache(), rewritten(QuantizeRtn(group_size=32), "llama").program).program
    ).program
    assert (len(packed.calls(LINEAR)), len(packed.calls(optc.linear_few.default))) == (count - 1, 1)


def test_sinks() -> None:
    before = apply(STATIC, tiny_decoder(sinks=True)).program
    after = apply(LEGALIZE, before).program
    assert _dialect(after) == []
    assert _same(before, after) <= 1e-5


def test_encoder_with_padding() -> None:
    """A row without any key becomes the average of the values, as in the reference."""
    before = captured("bert")
    after = apply(LEGALIZE, before).program
    ids = torch.tensor(sequences(8, 8, 8))
    mask = (torch.arange(8) < torch.tensor([[8], [3], [0]])).long()
    inputs = (ids, mask, torch.zeros_like(ids))
    assert _dialect(after) == []
    torch.testing.assert_close(after(*inputs)[0], before(*inputs)[0], atol=1e-5, rtol=0)


def test_masks_are_made_once() -> None:
    """Both layers of Llama see the same positions: one comparison, one mask."""
    after = apply(LEGALIZE, rewritten(STATIC, "llama").program).program
    assert len(after.calls(aten.le.Tensor)) == len(after.calls(aten.lt.Scalar)) == 1
    assert len(after.calls(aten.masked_fill.Scalar)) == 1
    assert len(after.calls(aten.index_put_.default)) == 4


def test_turned_inputs() -> None:
    """The rotation is a matrix product of its own; its weight product is packed like any other."""
    program = RotateInputs(least_gain=0.0).run(captured("llama"), CALIBRATED).program
    before = apply(STATIC, apply(QuantizeRtn(bits=8, group_size=0), program).program).program
    after = apply(LEGALIZE, before).program
    check_legal(after, TARGET)
    assert _dialect(after) == ["optc.linear_nbits.default"] * 14
    assert len(after.calls(aten.matmul.default)) == 8
    assert _same(before, after) <= 1e-5


def test_paged_attention_stays() -> None:
    before = rewritten(PageKVCache(), "llama").program
    result = apply(LEGALIZE, before)
    assert result.matched == 15  # linears
    assert len(result.program.calls(optc.paged_attention_.default)) == 2
    check_legal(result.program, TARGET)
    check_legal(before, TARGET)


def _sums(program: Program) -> list[Node]:
    return program.calls(LINEAR)


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (3, True), (4, True), (8, False)])
def test_quantized_linears_become_packed_products(bits: int, symmetric: bool) -> None:
    """Of a model with biases; float32 within rounding of the dequantized weights."""
    quantize = QuantizeRtn(bits=bits, group_size=32, symmetric=symmetric)
    before = apply(STATIC, apply(quantize, captured("gpt2")).program).program
    result = apply(LEGALIZE, before)
    verify_program(result.program, LEGALIZE.name)
    check_legal(result.program, TARGET)
    assert len(_sums(result.program)) == 8
    assert (result.misses, result.notes) == ((), ())
    assert _dialect(result.program) == ["optc.linear_nbits.default"] * 8
    names = [f"transformer.h.0.{part}.weight_packed" for part in ("attn.c_attn", "attn.c_proj")]
    assert list(result.program.contract.quantization)[:2] == names
    packed = result.program.weight(names[0])
    assert packed.dtype is torch.uint8
    assert packed.numel() * 8 == 192 * 64 * bits
    assert not [name for name, _ in result.program.weights() if name.endswith("_codes")]
    assert _same(before, result.program) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_products_in_sixteen_bits(dtype: torch.dtype) -> None:
    """The program rounds its weights to 16 bits, the packed product does not: no further apart than that."""
    program = capture_model(make_model("llama").to(dtype))
    before = apply(QuantizeRtn(group_size=32), program).program
    result = apply(LEGALIZE, before)
    assert len(_sums(result.program)) == 14
    assert result.program.weight("model.layers.0.self_attn.q_proj.weight_scales").dtype.itemsize == 2
    rows = sequences(*LENGTHS)
    expected, rounding = bounds.of_half(before, rows)
    bounds.check(run_stage(result.program, rows).logits, expected, rounding)


def test_nothing_packed_when_told_so() -> None:
    before = apply(STATIC, apply(QuantizeRtn(group_size=32), captured("gpt2")).program).program
    result = apply(LegalizeInductor(packed=False), before)
    assert result.notes == ("8 weights are dequantized before each use",)
    assert _dialect(result.program) == []
    assert _same(before, result.program) <= 1e-5


class _Net(torch.nn.Module):
    """A quantized linear whose weight is made by `make`, of 20 x 48."""

    def __init__(self, make: Callable[[torch.nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.make = make
        self.register_buffer("codes", torch.randint(0, 16, (20, 48), generator=generator, dtype=torch.uint8))
        self.register_buffer("small", torch.randn((20, 48), generator=generator).to(torch.float8_e4m3fn))
        self.register_buffer("scale", torch.rand((20, 3), generator=generator))
        self.register_buffer("row_scale", torch.rand((20, 1), generator=generator))
        self.register_buffer("table", torch.linspace(-1, 1, 16))
        self.register_buffer("bias", torch.randn(20, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.make(self, x)


def _net(make: Callable[[Any, Tensor], Tensor]) -> tuple[Program, Tensor]:
    x = torch.randn((5, 48), generator=torch.Generator().manual_seed(3))
    return capture_module(_Net(make), (x,), dynamic={"input_0": {0: "rows"}}), x


def _codebook(net: Any, x: Tensor) -> Tensor:
    weight = optc.dequantize_codebook(net.codes, net.scale, net.table, bits=4, group_size=16)
    return torch.nn.functional.linear(x, weight, net.bias)


def _second_level(net: Any, x: Tensor) -> Tensor:
    """Scales that are made of scales, as in double quantization."""
    weight = optc.dequantize_codebook(net.codes, net.scale * net.row_scale, net.table, bits=4, group_size=16)
    return torch.nn.functional.linear(x, weight)


def _rounded(net: Any, x: Tensor) -> Tensor:
    codes, scale = optc.quantize_dynamic(x, format="int8")
    x = optc.dequantize_activation(codes, scale, dtype=torch.float32)
    weight = optc.dequantize(net.codes, net.row_scale, None, bits=8, group_size=0)
    return torch.nn.functional.linear(x, weight, net.bias)


def _float8(net: Any, x: Tensor) -> Tensor:
    codes, scale = optc.quantize_dynamic(x, format="fp8")
    x = optc.dequantize_activation(codes, scale, dtype=torch.float32)
    return torch.nn.functional.linear(x, optc.dequantize_float(net.small, net.row_scale), net.bias)


def _calibrated(net: Any, x: Tensor) -> Tensor:
    x = optc.dequantize_activation(
        optc.quantize(x, net.scale[0, 0], format="int8"), net.scale[0, 0], dtype=torch.float32
    )
    weight = optc.dequantize(net.codes, net.row_scale, None, bits=8, group_size=0)
    return torch.nn.functional.linear(x, weight)


def _six_bits(net: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, optc.dequantize(net.codes, net.scale, None, bits=6, group_size=16))


@pytest.mark.parametrize(("make", "level"), [(_codebook, -1), (_second_level, -1), (_rounded, 0), (_calibrated, -1)])
def test_other_forms_that_are_packed(make: Callable[[Any, Tensor], Tensor], level: int) -> None:
    """NF4, and int8 activations: rounding per token goes into the product, calibrated scales stay outside."""
    program, x = _net(make)
    result = apply(LEGALIZE, program)
    check_legal(result.program, TARGET)
    assert _dialect(result.program) == ["optc.linear_nbits.default"]
    (node,) = _sums(result.program)
    assert node.kwargs["activation_group"] == level
    expected = program(x)
    torch.testing.assert_close(result.program(x), expected, atol=3e-6 * max(1.0, float(expected.abs().max())), rtol=0)


@pytest.mark.parametrize(
    ("make", "misses"), [(_float8, []), (_six_bits, ["6-bit codes have no packed product (2, 3, 4, 8 have)"])]
)
def test_forms_without_a_packed_product(make: Callable[[Any, Tensor], Tensor], misses: list[str]) -> None:
    program, x = _net(make)
    result = apply(LEGALIZE, program)
    check_legal(result.program, TARGET)
    assert _dialect(result.program) == []
    assert [miss.reason for miss in result.misses] == misses
    assert result.notes == ("1 weights are dequantized before each use",)
    torch.testing.assert_close(result.program(x), program(x), atol=1e-5, rtol=0)


def test_scales_are_narrowed_only_where_nothing_is_lost() -> None:
    assert narrow(torch.tensor([0.5, 3.0])).dtype is torch.float16
    assert narrow(torch.tensor([0.5, 2.0**100])).dtype is torch.bfloat16
    assert narrow(torch.tensor([0.5, 1 / 3])).dtype is torch.float32
