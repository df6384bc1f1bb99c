"""Embedding and head of inductor-cpu: looked up and multiplied in packed codes, a tied one stored once, of predicted size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chosen import chosen
from families import make_model
from stages import apply, captured, largest, sequences

from optc.compiler.analysis.weight_parts import weight_parts
from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.compiler.ops.packed.inductor_cpu import pack_rows, pack_tiles, packed_rows
from optc.compiler.pipeline.written_sizes import written_sizes
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.target import check_legal
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.kv_cache.static import StaticKVCache
from optc.passes.legalization.inductor import LegalizeInductor
from optc.passes.quantization.head import QuantizeHead
from optc.predicted_sizes import predicted_sizes
from optc.targets.inductor_cpu import TARGET

aten, optc = torch.ops.aten, torch.ops.optc
CONTEXT = PassContext(calibration=random_calibration(128, samples=2, length=16, seed=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (4, 32), (8, 16), (8, 6), (4, 6)])
def test_rows_of_packed_codes(bits: int, group: int, asymmetric: bool, dtype: torch.dtype) -> None:
    """The very numbers of the dequantized table; rows and groups that are no whole tiles and blocks."""
    count, columns = 37, 96
    codes = torch.randint(0, 2**bits, (count, columns), dtype=torch.uint8)
    scale = torch.rand(count, columns // group).half().to(dtype)
    zero = torch.randint(0, 2**bits, (count, columns // group), dtype=torch.uint8) if asymmetric else None
    packed = pack_tiles(codes, bits, group), pack_rows(scale), None if zero is None else pack_rows(zero)
    ids = torch.tensor([[0, 36, 15], [16, 17, 0]])
    knobs: dict[str, Any] = {"bits": bits, "segment": group, "group_size": group, "columns": columns, "dtype": dtype}
    table = optc.dequantize(codes, scale.float(), zero, bits=bits, group_size=group).to(dtype)
    assert torch.equal(packed_rows(*packed, ids, **knobs), table[ids])


@pytest.mark.parametrize("cache", [StaticKVCache(in_place=True), PageKVCache()])
@pytest.mark.parametrize(("name", "bits", "symmetric"), [("llama", 8, True), ("gemma", 4, False), ("gpt2", 8, False)])
def test_both_read_packed_codes(name: str, bits: int, symmetric: bool, cache: Any) -> None:
    """Untied, tied with a factor behind the lookup, tied with positions beside it."""
    rewrite = QuantizeHead(bits=bits, group_size=16, symmetric=symmetric)  # type: ignore[arg-type]
    before = apply(cache, apply(rewrite, captured(name, 1)).program).program
    after = apply(LegalizeInductor(), before).program
    (head,) = after.calls(optc.linear_nbits.default)
    packed = [weight for weight, _ in after.weights() if weight.endswith("_packed")]
    assert len(packed) == (1 if name in ("gemma", "gpt2") else 2)
    assert head.kwargs["bits"] == bits
    tables = [after.weight_of(node.args[0]) for node in after.calls(aten.embedding.default)]
    assert len(tables) == (1 if name == "gpt2" else 0)  # of positions
    dense = ("embed_tokens.weight", "wte.weight", "lm_head.weight")
    assert not [key for key, _ in after.weights() if key.endswith(dense)]
    check_legal(after, TARGET)
    rows = sequences(21, 9, 14, 1)
    one, other = (run_stage(item, rows).logits for item in (before, after))
    assert largest(one, other) / max(float(row.abs().max()) for row in one) <= 2e-6


def written(name: str, options: dict[str, Any]) -> Program:
    program = captured(name, 1)
    for step in TARGET.recipe("decoder", chosen("inductor-cpu", **options)):
        program = step.rewrite.run(program, CONTEXT).program
    return program


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"quant": "rtn", "group_size": 32, "head_bits": 4},
        {"quant": "rtn", "group_size": 32},
        {"quant": "rtn", "bits": 3, "group_size": 32},
        {"quant": "rtn", "group_size": 32, "head_bits": 32},
        {"quant": "gptq", "group_size": 16, "symmetric": False},
        {"quant": "int8"},
        {"head_bits": 8},
    ],
)
def test_a_plan_predicts_what_is_written(name: str, options: dict[str, Any]) -> None:
    """The sum within 2 %, and so each part of the sum. Tables are wide, that tiles of 16 rows weigh nothing."""
    program = written(name, options)
    tensors = {key: tensor.nbytes for key, tensor in program.weights()}
    total = sum(tensors.values())
    found = written_sizes(weight_parts(captured(name, 1)), program.contract, tensors, total, source=None)
    made = chosen("inductor-cpu", **options)
    planned = predicted_sizes(make_model(name, layers=1), TARGET, made, TARGET.recipe("decoder", made), None)
    assert abs(planned.total / total - 1) <= 0.02
    for (title, one), (_, other) in zip(planned.parts(), found.parts(), strict=True):
        assert abs(one - other) <= 0.02 * total, title


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, None),
        ({"quant": "rtn", "group_size": 64}, (8, 64)),
        ({"quant": "rtn", "group_size": 64, "head_bits": 4}, (4, 32)),
        ({"quant": "int8", "head_bits": 32}, None),
        ({"head_bits": 8}, (8, 128)),
    ],
)
def test_what_is_asked_for(options: dict[str, Any], form: tuple[int, int] | None) -> None:
    steps = TARGET.recipe("decoder", chosen("inductor-cpu", **options))
    found = [step.rewrite for step in steps if isinstance(step.rewrite, QuantizeHead)]
    assert [(step.bits, step.group_size) for step in found] == ([] if form is None else [form])
