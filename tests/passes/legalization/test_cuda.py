"""legalize-cuda: packed weights where the kernel takes them, ATen where not, nothing that copies from the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chosen import chosen
from rewrites import rewritten, stirred
from stages import apply, largest, sequences

from optc.compiler.capture import capture_module
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass
from optc.compiler.target.target import check_legal
from optc.passes.fusion.decode import FuseDecode
from optc.passes.fusion.norm import FuseNorm
from optc.passes.fusion.projections import MergeProjections
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.legalization.cuda import LegalizeCuda
from optc.passes.quantization.head import QuantizeHead
from optc.passes.quantization.rtn import QuantizeRtn
from optc.targets.inductor_cuda import TARGET

FUSED, LOOKUP = torch.ops.optc.fused_linear.default, torch.ops.optc.packed_embedding.default


def fused(name: str, quantize: Pass | None = None) -> Program:
    program = stirred(name)
    quantization = [] if quantize is None else [quantize]
    for rewrite in (FuseNorm(), FuseRotary(), *quantization, PageKVCache(), MergeProjections(), FuseDecode()):
        program = apply(rewrite, program).program
    return program


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "format"),
    [(4, 32, True, "int4"), (4, 64, False, "int4"), (8, 0, True, "int8"), (8, 32, False, "int8")],
)
def test_quantized_weights_are_packed(bits: int, group: int, symmetric: bool, format: str) -> None:
    program = fused("llama", QuantizeRtn(bits=bits, group_size=group, symmetric=symmetric))
    result = rewritten(LegalizeCuda(), program)
    packed = [node for node in result.program.calls(FUSED) if node.kwargs.get("format")]
    assert {(node.kwargs["format"], node.kwargs["group_size"]) for node in packed} == {(format, group)}
    assert (len(packed), result.matched) == (8, 9), "and the embedding"
    assert all((node.args[3] is None) == symmetric for node in packed)
    check_legal(result.program, TARGET)
    entries = result.program.contract.quantization
    assert len(entries) == 8
    assert all(name.endswith("weight_packed") for name in entries)
    rows = sequences(21, 9, 5)
    one, other = (run_stage(item, rows).logits for item in (program, result.program))
    assert largest(one, other) / max(float(row.abs().max()) for row in one) <= 2e-6


def test_what_has_no_packed_product_is_dequantized() -> None:
    program = fused("llama", QuantizeRtn(bits=3, group_size=32))
    result = rewritten(LegalizeCuda(), program)
    assert {miss.reason for miss in result.misses} == {"weights of 3 bits have no packed product (4 and 8 have)"}
    assert result.notes[0] == "8 weights are dequantized before each use"
    assert result.notes[1].startswith("a decode step of one token computes")
    check_legal(result.program, TARGET)


def test_numbers_are_not_copied_from_the_host() -> None:
    """Quantized experts are weighed with `where(chosen, weight, 0.0)`."""
    program = fused("mixtral", QuantizeRtn(bits=8))
    where, fill = torch.ops.aten.where.ScalarOther, torch.ops.aten.masked_fill.Scalar
    result = rewritten(LegalizeCuda(), program)
    assert len(program.calls(where)) == len(result.program.calls(fill)) == 8
    assert result.matched == 8 + len(program.calls(torch.ops.optc.dequantize.default)) + 1
    assert not result.program.calls(where)
    rows = sequences(21, 5)
    assert largest(run_stage(program, rows).logits, run_stage(result.program, rows).logits) == 0.0


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "form"),
    [(8, 0, True, ("int8", 0)), (4, 32, False, ("int4", 32)), (8, 32, True, ("int8", 32))],
)
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_the_head_and_lookups_are_packed(
    name: str, bits: Any, group: int, symmetric: bool, form: tuple[str, int]
) -> None:
    """Gemma's table is the head's weight too: one packed tensor, which both read."""
    program = fused(name, QuantizeHead(bits=bits, group_size=group, symmetric=symmetric))
    result = rewritten(LegalizeCuda(), program)
    assert (result.matched, result.misses) == (1 if name == "gemma" else 2, ())
    (lookup,) = result.program.calls(LOOKUP)
    (head,) = (node for node in result.program.calls(FUSED) if node.kwargs.get("format"))
    assert (lookup.kwargs["format"], lookup.kwargs["group_size"]) == form
    assert (head.kwargs["format"], head.kwargs["group_size"]) == form
    assert (lookup.args[:3] == head.args[1:4]) == (name == "gemma")
    packed = [weight for weight, _ in result.program.weights() if weight.endswith("_packed")]
    assert len(packed) == (1 if name == "gemma" else 2)
    check_legal(result.program, TARGET)
    rows = sequences(21, 9, 5)
    one, other = (run_stage(item, rows).logits for item in (program, result.program))
    assert largest(one, other) / max(float(row.abs().max()) for row in one) <= 2e-6


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, None),
        ({"quant": "rtn", "group_size": 32}, (8, 0)),
        ({"quant": "rtn", "group_size": 32, "head_bits": 4}, (4, 32)),
        ({"quant": "int8", "head_bits": 16}, None),
        ({"head_bits": 8}, (8, 0)),
    ],
)
def test_what_is_asked_for(options: dict[str, Any], form: tuple[int, int] | None) -> None:
    steps = TARGET.recipe("decoder", chosen("inductor-cuda", **options))
    found = [step.rewrite for step in steps if isinstance(step.rewrite, QuantizeHead)]
    assert [(step.bits, step.group_size) for step in found] == ([] if form is None else [form])


@pytest.mark.parametrize(
    ("name", "dtype", "factors"),
    [
        ("llama", torch.float32, []),
        ("gemma2", torch.bfloat16, [8.0]),
        ("granite", torch.float32, []),
        ("gpt2", torch.bfloat16, []),
    ],
)
def test_rows_are_selected_by_the_kernel(name: str, dtype: torch.dtype, factors: list[float]) -> None:
    """Of embeddings, with a factor behind, and in front of the head. The very same numbers."""
    program = apply(PageKVCache(select_logits=True), stirred(name, dtype)).program
    result = rewritten(LegalizeCuda(), program)
    calls = result.program.calls(torch.ops.optc.select_rows.default)
    assert len(calls) == (3 if name == "gpt2" else 2)
    assert [node.kwargs["factor"] for node in calls if node.kwargs] == factors
    assert not result.program.calls(torch.ops.aten.embedding.default, torch.ops.aten.index_select.default)
    rows = sequences(21, 5)
    assert largest(run_stage(program, rows).logits, run_stage(result.program, rows).logits) == 0.0


def test_a_number_of_another_type_is_left_behind_the_rows() -> None:
    """Rows in float32 times a number are no rows of the table's type."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(7, 8, dtype=torch.bfloat16)
            self.register_buffer("vector", torch.rand(8, dtype=torch.bfloat16))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.table(ids).float() * 0.3, self.table(ids + 1) * self.vector, self.table(ids) * 0.3])

    ids = torch.tensor([3, 0, 5])
    program = capture_module(Scaled(), (ids,))
    result = rewritten(LegalizeCuda(), program)
    calls = result.program.calls(torch.ops.optc.select_rows.default)
    assert [dict(node.kwargs) for node in calls] == [{}, {}, {"factor": 0.3}]
    assert torch.equal(result.program(ids), program(ids))
