"""legalize-inductor: the dialect in ATen, with the same numbers."""

from __future__ import annotations

import pytest
import torch
from families import make_model
from stages import apply, captured, largest, rewritten, sequences, tiny_decoder
from torch import Tensor

from optc.compiler.capture import capture_model
from optc.compiler.execution import run_stage
from optc.compiler.ops.library import reference
from optc.compiler.program import Program
from optc.compiler.target import check_legal
from optc.compiler.verification import verify_program
from optc.passes.legalize_inductor import LegalizeInductor, pack_int4
from optc.passes.page_kv_cache import PageKVCache
from optc.passes.quantize_rtn import QuantizeRtn
from optc.passes.static_kv_cache import StaticKVCache
from optc.targets.inductor_cpu import TARGET

aten = torch.ops.aten
STATIC, LEGALIZE = StaticKVCache(in_place=True), LegalizeInductor()
LENGTHS = (21, 9, 14, 1)


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


def test_sinks() -> None:
    before = apply(STATIC, tiny_decoder(sinks=True)).program
    after = apply(LEGALIZE, before).program
    assert _dialect(after) == []
    assert _same(before, after) <= 1e-6


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


def test_paged_attention_stays() -> None:
    before = rewritten(PageKVCache(), "llama").program
    result = apply(LEGALIZE, before)
    assert result.matched == 0
    assert _dialect(before) == ["optc.paged_attention_.default"] * 2
    check_legal(before, TARGET)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_codes_are_packed_in_bfloat16(symmetric: bool) -> None:
    program = capture_model(make_model("llama").to(torch.bfloat16))
    before = apply(QuantizeRtn(group_size=32, symmetric=symmetric), program).program
    result = apply(LEGALIZE, before)
    verify_program(result.program, LEGALIZE.name)
    products = result.program.calls(aten._weight_int4pack_mm_for_cpu.default)
    assert len(products) == 14
    assert (result.misses, result.notes) == ((), ())
    names = [f"model.layers.0.self_attn.{part}_proj.weight_codes_int4" for part in "qkvo"]
    assert list(result.program.contract.quantization)[:4] == names
    assert result.program.weight(names[0]).shape == (64, 32)
    rows = sequences(*LENGTHS)
    plain = LegalizeInductor(packed=False)
    spread = largest(run_stage(before, rows).logits, run_stage(apply(plain, before).program, rows).logits)
    found = run_stage(result.program, rows).logits
    expected = run_stage(before, rows).logits
    assert largest(expected, found) <= max(4 * spread, 2e-2 * max(float(row.abs().max()) for row in expected))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_other_codes_are_dequantized_in_the_graph(bits: int) -> None:
    before = apply(STATIC, apply(QuantizeRtn(bits=bits, group_size=32), captured("gpt2")).program).program
    result = apply(LEGALIZE, before)
    reason = (
        "torch's packed product is fast in bfloat16 only, the weight is torch.float32"
        if bits == 4
        else f"{bits}-bit codes have no packed product"
    )
    assert {miss.reason for miss in result.misses} == {reason}
    assert result.notes == ("8 weights are dequantized before each use",)
    assert _dialect(result.program) == []
    assert _same(before, result.program) <= 1e-5


def _exact(codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    return reference("dequantize")(codes, scale, zero, bits=4, group_size=group_size)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [16, 48, 64, 96])
@pytest.mark.parametrize("symmetric", [True, False])
def test_layout_of_the_packed_product(group_size: int, rows: int, symmetric: bool) -> None:
    """Every weight, read back through torch's kernel as the product with the identity."""
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, 256), generator=generator, dtype=torch.uint8)
    scale = torch.rand((rows, 256 // group_size), generator=generator) + 0.1
    zero = torch.randint(0, 16, scale.shape, generator=generator, dtype=torch.uint8)
    packed, scales = pack_int4(codes, scale, None if symmetric else zero)
    assert packed.shape == (rows, 128)
    assert scales.shape == (256 // group_size, rows, 2)
    found = aten._weight_int4pack_mm_for_cpu(torch.eye(256), packed, group_size, scales).t()
    expected = _exact(codes, scale, None if symmetric else zero, group_size)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
