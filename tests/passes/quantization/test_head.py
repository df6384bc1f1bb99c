"""quantize-head: which weights, in which form, with which numbers and reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from rewrites import count, difference, rewritten, stirred

from optc.compiler.capture import capture_model
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.passes.quantization.head import QuantizeHead
from optc.passes.quantization.rtn import QuantizeRtn

DEQUANTIZE = torch.ops.optc.dequantize.default
EMBEDDING = torch.ops.aten.embedding.default
TIED = {"gemma", "gemma2", "gemma3", "gpt2", "opt", "bert"}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    """Tables of positions and of token types stay; a tied weight has one set of codes."""
    program = stirred(name)
    result = rewritten(QuantizeHead(), program)
    assert (result.matched, result.candidates, result.misses) == (2, 2, ())
    weights = 1 if name in TIED else 2
    assert count(result.program, DEQUANTIZE) == weights == len(result.program.contract.quantization)
    assert len(result.linears) == weights
    assert all(0 < row.weight_error < 1e-4 for row in result.linears)
    # Mixtral's tokens near a tie go to other experts.
    assert 0 < difference(program, result.program) <= (0.5 if name == "mixtral" else 0.05)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_parts(bits: Any, symmetric: bool) -> None:
    program = stirred("gemma")
    result = rewritten(QuantizeHead(bits=bits, group_size=32, symmetric=symmetric), program)
    source = "lm_head.weight"
    contract = result.program.contract
    assert contract.quantization[f"{source}_codes"] == WeightQuantization(
        method="rtn", bits=bits, group_size=32, symmetric=symmetric, source=source
    )
    assert source not in result.program.exported.state_dict
    parts = [result.program.weight(f"{source}_{part}") for part in ("codes", "scale")]
    zero = None if symmetric else result.program.weight(f"{source}_zero")
    assert torch.equal(parts[1].half().float(), parts[1])
    values = torch.ops.optc.dequantize(*parts, zero, bits=bits, group_size=32)
    gap = (values - program.weight(source)).abs().reshape(128, 2, 32)
    if bits == 8:  # else ranges may be clipped
        assert float((gap / parts[1][..., None]).max()) <= (0.6 if symmetric else 1.1)
    assert float(gap.square().mean().sqrt() / program.weight(source).square().mean().sqrt()) < (
        0.01 if bits == 8 else 0.15
    )
    tables = {node.args[0].target for node in result.program.calls(EMBEDDING)}
    assert tables == {DEQUANTIZE}


def test_four_bits_search_the_range_of_least_error() -> None:
    program = stirred("llama")
    found = {row.name: row.weight_error for row in rewritten(QuantizeHead(bits=4), program).linears}
    plain = rewritten(QuantizeRtn(bits=4, group_size=64, head=True, ranges="full"), program)
    codes, scale = (plain.program.weight(f"lm_head.weight_{part}") for part in ("codes", "scale"))
    values = torch.ops.optc.dequantize(codes, scale, None, bits=4, group_size=64)
    weight = program.weight("lm_head.weight")
    error = float((values - weight).square().sum() / weight.square().sum())
    assert found["lm_head.weight"] < 0.9 * error


@pytest.mark.parametrize(("asked", "size"), [(128, 64), (64, 64), (32, 32), (0, 0), (256, 64)])
def test_group_sizes(asked: int, size: int) -> None:
    result = rewritten(QuantizeHead(group_size=asked), stirred("llama"))
    assert {entry.group_size for entry in result.program.contract.quantization.values()} == {size}


def test_columns_that_no_group_divides() -> None:
    cls, config, sizes = FAMILIES["gpt2"]
    model = cls(config(**{**sizes, "n_embd": 40, "n_head": 5})).eval().requires_grad_(False)
    result = rewritten(QuantizeHead(), capture_model(model))
    reasons = {miss.reason for miss in result.misses}
    assert (result.matched, result.candidates) == (0, 2)
    assert reasons == {"no group of 128, 64, 32, 16 divides the 40 columns of lm_head.weight"}


def test_ignored_by_pattern() -> None:
    result = rewritten(QuantizeHead(ignore=("lm_head.*",)), stirred("llama"))
    assert result.matched == 1
    assert [miss.reason for miss in result.misses] == ["lm_head.weight is ignored ('lm_head.*')"]
    assert list(result.program.contract.quantization) == ["model.embed_tokens.weight_codes"]


def test_a_head_that_has_codes_already() -> None:
    """A tied one got a copy of its own: the table does not take codes of other bits unasked."""
    for name, matched in (("llama", 1), ("gemma", 0)):
        program = rewritten(QuantizeRtn(bits=4, head=True), stirred(name)).program
        result = rewritten(QuantizeHead(), program)
        assert result.matched == matched
        assert "its weight is already quantized" in [miss.reason for miss in result.misses]
    assert "another reader of lm_head.weight has codes of its own" in [miss.reason for miss in result.misses]


def test_a_weight_that_is_not_finite() -> None:
    program = stirred("llama").clone()
    weight = program.weight("lm_head.weight").clone()
    weight[5, 3] = torch.nan
    program.exported.state_dict["lm_head.weight"] = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(InputError, match="the weight holds NaN or infinity") as caught:
        QuantizeHead().run(program, PassContext())
    assert caught.value.where == "lm_head.weight"


def test_a_negative_group_size() -> None:
    with pytest.raises((InputError, UsageError), match="group size -1 is negative"):
        QuantizeHead(group_size=-1)


def test_again_is_no_match() -> None:
    program: Program = rewritten(QuantizeHead(), stirred("llama")).program
    assert rewritten(QuantizeHead(), program).matched == 0
