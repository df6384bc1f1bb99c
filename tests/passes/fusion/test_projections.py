"""merge-projections: linears of one input become one, plain or quantized."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from rewrites import count, difference, rewritten, stirred
from torch import Tensor

from optc.compiler.capture import capture_module
from optc.compiler.ir.program import Program
from optc.passes.fusion.norm import FuseNorm
from optc.passes.fusion.projections import MergeProjections, join_names
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.fp8 import QuantizeFp8
from optc.passes.quantization.rtn import QuantizeRtn

LINEAR = torch.ops.aten.linear.default
DEQUANTIZE = torch.ops.optc.dequantize.default

# Merged linears of two layers: q/k/v and gate/up; in Phi's parallel block the MLP reads what q/k/v read.
MERGED = {"phi": 2, "opt": 2, "bert": 2, "mixtral": 2, "phi3": 0, "gpt2": 0, "gpt-neox": 0}
EXPERT = "its weight is one of several experts: merged, the results of all would live at once"


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_and_numbers_of_every_family(name: str) -> None:
    program = stirred(name)
    result = rewritten(MergeProjections(), program)
    expected = MERGED.get(name, 4)
    assert result.matched == expected
    assert count(result.program, torch.ops.aten.split_with_sizes.default) == expected
    assert {miss.reason for miss in result.misses} == ({EXPERT} if name == "mixtral" else set())
    assert difference(program, result.program) <= 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "mixtral", "phi", "bert"])
def test_quantized_weights_merge_by_their_codes(name: str, symmetric: bool) -> None:
    program = rewritten(QuantizeRtn(bits=4, symmetric=symmetric), stirred(name)).program
    result = rewritten(MergeProjections(), program)
    assert result.matched == MERGED.get(name, 4)
    merged = [entry for key, entry in result.program.contract.quantization.items() if "+" in key]
    assert len(merged) == result.matched
    assert {(entry.method, entry.bits, entry.symmetric) for entry in merged} == {("rtn", 4, symmetric)}
    assert count(program, DEQUANTIZE) - count(result.program, DEQUANTIZE) == count(program, LINEAR) - count(
        result.program, LINEAR
    )
    assert difference(program, result.program) <= 1e-5


def test_float_codes_merge_where_each_row_has_a_scale() -> None:
    """With the rounding of the input that they share; one scale for a whole weight is no scale of its rows."""
    program = rewritten(QuantizeActivations(format="fp8"), rewritten(QuantizeFp8(), stirred("qwen2")).program).program
    result = rewritten(MergeProjections(), program)
    assert result.matched == 4
    merged = [(key, entry) for key, entry in result.program.contract.quantization.items() if "+" in key]
    assert {(entry.format, entry.activations) for _, entry in merged} == {("fp8", "fp8")}
    assert {result.program.weight(key).dtype for key, _ in merged} == {torch.float8_e4m3fn}
    assert difference(program, result.program) <= 1e-5
    whole = rewritten(MergeProjections(), rewritten(QuantizeFp8(granularity="tensor"), stirred("qwen2")).program)
    assert whole.matched == 0
    assert {miss.reason for miss in whole.misses} == {"it has one scale for all of its rows"}


def test_it_commutes_with_quantization() -> None:
    fused = rewritten(FuseNorm(), rewritten(FuseRotary(), stirred("qwen2")).program).program
    quantize, merge = QuantizeRtn(bits=3, group_size=16, symmetric=False), MergeProjections()
    one = rewritten(merge, rewritten(quantize, fused).program).program
    other = rewritten(quantize, rewritten(merge, fused).program).program
    assert set(one.contract.quantization) == set(other.contract.quantization)
    for codes in one.contract.quantization:
        assert torch.equal(one.weight(codes), other.weight(codes))
    assert difference(one, other) <= 1e-6


def test_names_sources_and_tensors() -> None:
    program = stirred("qwen2")
    after = rewritten(MergeProjections(), program).program
    stem = "model.layers.0.self_attn."
    parts = [f"{stem}{part}_proj.weight" for part in "qkv"]
    name = f"{stem}q_proj+k_proj+v_proj.weight"
    assert torch.equal(after.weight(name), torch.cat([program.weight(part) for part in parts]))
    assert after.contract.sources[name] == tuple(parts)
    biases = [f"{stem}{part}_proj.bias" for part in "qkv"]
    assert after.contract.sources[f"{stem}q_proj+k_proj+v_proj.bias"] == tuple(biases)
    assert not set(parts + biases) & set(after.exported.state_dict)


def test_sources_of_merged_codes() -> None:
    program = rewritten(QuantizeRtn(bits=8), stirred("llama")).program
    after = rewritten(MergeProjections(), program).program
    stem = "model.layers.1.mlp."
    name = f"{stem}gate_proj+up_proj.weight_codes"
    assert after.contract.sources[name] == (f"{stem}gate_proj.weight", f"{stem}up_proj.weight")
    assert after.contract.quantization[name].source == f"{stem}gate_proj+up_proj.weight"
    assert after.weight(name).shape == (256, 64)
    assert after.weight(f"{stem}gate_proj+up_proj.weight_scale").shape == (256, 1)


class _Block(torch.nn.Module):
    """Three linears of one input, read through an inactive dropout by one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.a = torch.nn.Linear(8, 4, bias=kind != "plain")
        self.b = torch.nn.Linear(8, 6, bias=False)
        self.c = torch.nn.Linear(8, 2, bias=False)
        self.embed = torch.nn.Embedding(6, 8)
        if kind == "tied":
            self.b.weight = self.embed.weight

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b, c = self.a(x), self.b(torch.dropout(x, 0.5, False)), self.c(x)
        if self.kind == "tied":
            c = c + self.embed(torch.zeros(1, dtype=torch.long)).sum()
        return a.view(-1, 2, 2).view(-1), b, c


def _by_hand(kind: str) -> Program:
    return capture_module(_Block(kind), (torch.rand(3, 8),))


def test_missing_biases_are_zeros_and_views_are_copied() -> None:
    program = _by_hand("biased")
    after = rewritten(MergeProjections(), program).program
    assert [name for name, _ in after.weights()] == ["a+b+c.weight", "a+b+c.bias"]
    assert torch.equal(after.weight("a+b+c.bias"), torch.cat([program.weight("a.bias"), torch.zeros(8)]))
    x = torch.rand(3, 8)
    for left, right in zip(after(x), program(x), strict=True):
        torch.testing.assert_close(left, right, rtol=0.0, atol=1e-6)


def test_no_bias_at_all() -> None:
    after = rewritten(MergeProjections(), _by_hand("plain")).program
    assert [name for name, _ in after.weights() if "bias" in name] == []


def test_a_tied_weight_stays_out() -> None:
    program = _by_hand("tied")
    result = rewritten(MergeProjections(), program)
    assert (result.matched, result.candidates) == (1, 2)
    assert [miss.reason for miss in result.misses] == ["embed.weight is read elsewhere too"]
    assert "a+c.weight" in result.program.exported.state_dict


def test_quantized_and_plain_do_not_mix() -> None:
    program = rewritten(QuantizeRtn(bits=4, group_size=0, ignore=("*q_proj*", "*gate*")), stirred("llama")).program
    result = rewritten(MergeProjections(), program)
    assert result.matched == 2  # k and v of each layer
    assert {miss.reason for miss in result.misses} == {"the other linears of its input differ in type or quantization"}
    assert len(result.misses) == 2 + 2 * 2  # q; gate and up
    assert difference(program, result.program) <= 1e-5


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["a.q.weight", "a.k.weight"], "a.q+k.weight"),
        (["a.x.q.weight", "a.y.weight"], "a.x.q+y.weight"),
        (["q.weight", "k.weight", "v.weight"], "q+k+v.weight"),
        (["left", "right"], "left+right"),
        (["a.b", "a.b.c"], "a.b+b.c"),
    ],
)
def test_join_names(names: list[str], joined: str) -> None:
    assert join_names(names) == joined
