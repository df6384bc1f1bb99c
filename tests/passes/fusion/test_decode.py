"""fuse-decode: norms, activations, gates and residuals into linears; rotations and norms of heads into attention."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from families import DECODERS
from rewrites import count, rewritten, stirred
from stages import apply, largest, sequences
from torch import Tensor

from optc.compiler.analysis.decode_launches import decode_launches
from optc.compiler.analysis.norms import norm_call
from optc.compiler.capture import capture_module
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.gate import rounds_activations
from optc.compiler.pipeline.pipeline import Pipeline
from optc.compiler.rewriting.passes import Pass, PassResult
from optc.compiler.target.target import Step
from optc.passes.fusion.decode import FuseDecode
from optc.passes.fusion.norm import FuseNorm
from optc.passes.fusion.projections import MergeProjections
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.legalization.cuda import LegalizeCuda
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.fp8 import QuantizeFp8
from optc.passes.quantization.rtn import QuantizeRtn

FUSED = torch.ops.optc.fused_linear.default
ROTARY_ATTENTION = torch.ops.optc.rotary_paged_attention_.default
PAGED_ATTENTION = torch.ops.optc.paged_attention_.default
FUSED_NORM = torch.ops.optc.fused_norm.default
aten = torch.ops.aten

NO_ROTATION = "its queries are not the result of one rotary embedding"
PART = "an activation is of a part of its result, which it shares with other linears"

MATCHED = {"gpt2": 9, "opt": 9, "phi": 9, "mixtral": 15, "gemma2": 15, "gemma3": 15, "granite": 15, "olmo2": 19}
"""Two layers of four linears and an attention, and the head, but where there are more, no rotations, or norms and
factors apart."""
REASONS = {
    "gpt2": {NO_ROTATION},
    "opt": {NO_ROTATION},
    "phi": {PART},
    "mixtral": {
        "rms_norm_1 is not taken in: 5 linears read it: it is computed once for all",
        "rms_norm_3 is not taken in: 5 linears read it: it is computed once for all",
    },
}
LAYERS = {
    "gemma2": {"fused_norm": 2},
    "gemma3": {"fused_norm": 2},
    "granite": {"fused_norm": 2},
    "olmo2": {"fused_norm": 4},
    "phi": {"fused_linear": -1, "gelu": 1},
    "gpt2": {"rotary_paged_attention_": -1, "paged_attention_": 1},
    "opt": {"rotary_paged_attention_": -1, "paged_attention_": 1},
    "mixtral": {"fused_linear": -1, "fused_norm": 1, "choose_experts": 1, "fused_experts": 1},
}
"""What a decode step of one token computes for a layer, beyond what it does for a Llama's."""
STEPS = {"gemma2": 3, "granite": 1, "gpt2": 2, "opt": 3}
"""What it computes outside layers, beyond an embedding, the selection of rows and the head: a factor or cap on the logits,
embeddings of positions."""
HALF = ("llama", "gemma3", "gpt2", "olmo2", "gpt-neox")
"""Families that are run in bfloat16."""
GATED = ("gemma2", "granite", "olmo2", "gpt-neox")
"""Norms and factors behind linears, rotations in float32, sums that are regrouped."""


@functools.cache
def paged(name: str, dtype: torch.dtype = torch.float32, quantize: tuple[Pass, ...] = ()) -> Program:
    """A family as fuse-decode finds it; read-only."""
    program = stirred(name, dtype)
    for rewrite in (FuseNorm(), FuseRotary(), *quantize, PageKVCache(select_logits=True), MergeProjections()):
        program = apply(rewrite, program).program
    return program


def gap(before: Program, result: PassResult) -> float:
    """Largest difference of the logits over ragged prefill, a chunk and single steps, as a share of their largest."""
    rows = sequences(21, 9, 5)
    one, other = (run_stage(program, rows).logits for program in (before, result.program))
    return largest(one, other) / max(float(row.abs().max()) for row in one)


@pytest.mark.parametrize("name", DECODERS)
def test_every_family(name: str) -> None:
    program = paged(name)
    (selection,) = program.calls(aten.index_select.default)
    assert [norm_call(node) is not None for node in selection.users] == [True]
    result = rewritten(FuseDecode(), program)
    assert result.matched == MATCHED.get(name, 11)
    assert {miss.reason for miss in result.misses} == REASONS.get(name, set())
    assert not [node for node in result.program.graph.nodes if node.target in (aten.linear.default, aten.addmm.default)]
    assert gap(program, result) <= 1e-5


@pytest.mark.parametrize("name", DECODERS)
def test_calls_of_a_decode_step(name: str) -> None:
    """In bfloat16, where Gemma's norms are computed in float32, from and to it, where other tests take that too."""
    before = paged(name, torch.bfloat16) if name in {*HALF, *GATED} else paged(name)
    program = rewritten(FuseDecode(), before).program
    found = decode_launches(apply(LegalizeCuda(), program).program)
    expected = Counter({"fused_linear": 4, "rotary_paged_attention_": 1})
    expected.update(LAYERS.get(name, {}))
    assert {key.partition(".")[2]: value for key, value in found.counts().items()} == +expected
    assert len(found.step) == 2 * expected.total() + 3 + STEPS.get(name, 0)


def test_a_llama_layer_is_five_calls() -> None:
    program = rewritten(FuseDecode(), paged("llama")).program
    moves = {
        "view",
        "reshape",
        "select",
        "transpose",
        "unsqueeze",
        "contiguous",
        "split_with_sizes",
        "sym_size",
        "to",
    }
    calls = Counter(
        node.target.__name__.partition(".")[0]
        for node in program.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    )
    left = {name: number for name, number in calls.items() if name not in moves}
    assert left == {"embedding": 1, "fused_linear": 2 * 4 + 1, "rotary_paged_attention_": 2, "index_select": 1}
    head = program.calls(FUSED)[-1]
    assert (head.args[0].target, head.kwargs) == (aten.index_select.default, {"norm": "rms", "eps": 1e-6})


def test_what_the_calls_say() -> None:
    program = rewritten(FuseDecode(), paged("qwen3")).program
    first, second, third, fourth = program.calls(FUSED)[:4]
    assert first.kwargs == {"norm": "rms", "eps": 1e-6}
    assert (second.kwargs, second.args[7].name) == ({}, "to")
    assert third.kwargs == {"norm": "rms", "eps": 1e-6, "activation": "silu", "gated": True}
    assert fourth.kwargs == {}
    call = program.calls(ROTARY_ATTENTION)[0]
    assert [program.weight_of(item) for item in call.args[11:]] == [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.k_norm.weight",
    ]


def test_experts_are_one_call() -> None:
    program = rewritten(FuseDecode(), paged("mixtral")).program
    first, second = program.calls(torch.ops.optc.fused_experts.default)
    assert first.kwargs == {"activation": "silu", "gated": True}
    stack = "model.layers.{}.mlp.experts.{}_proj"
    assert [[program.weight_of(item) for item in node.args[1:3]] for node in (first, second)] == [
        [stack.format(layer, name) for name in ("gate_up", "down")] for layer in (0, 1)
    ]
    assert first.args[5] is not None
    assert not [node for node in program.calls(aten.select.int) if program.weight_of(node.args[0])]


class _Choice(torch.nn.Module):
    """Experts that are chosen in several ways."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        values, indices = torch.softmax(x.float(), -1).topk(2)
        if self.form == "normalized":
            values = values / values.sum(-1, keepdim=True)
        if self.form == "read beside":
            return values / values.sum(-1, keepdim=True) + values + indices
        if self.form == "before softmax":
            values, indices = x.topk(2)
        return values + indices


@pytest.mark.parametrize(
    ("form", "calls"),
    [
        ("plain", [{"slots": 2, "normalized": False}]),
        ("normalized", [{"slots": 2, "normalized": True}]),
        ("read beside", [{"slots": 2, "normalized": False}]),
        ("before softmax", []),
    ],
)
def test_choice_of_experts(form: str, calls: list[dict[str, object]]) -> None:
    x = torch.randn(5, 8)
    program = capture_module(_Choice(form), (x,))
    result = rewritten(FuseDecode(), program)
    assert [node.kwargs for node in result.program.calls(torch.ops.optc.choose_experts.default)] == calls
    assert count(result.program, aten.topk.default) == 1 - len(calls)
    assert float((result.program(x) - program(x)).abs().max()) <= 1e-6


def test_quantized_experts_stay_apart() -> None:
    program = paged("mixtral", quantize=(QuantizeRtn(bits=8),))
    result = rewritten(FuseDecode(), program)
    assert count(result.program, torch.ops.optc.fused_experts.default) == 0
    assert gap(program, result) <= 1e-6


def test_a_factor_of_queries_is_in_the_scale() -> None:
    """OPT multiplies its queries by head_dim ** -0.5."""
    program = rewritten(FuseDecode(), paged("opt")).program
    assert [node.kwargs["scale"] for node in program.calls(PAGED_ATTENTION)] == [0.25, 0.25]
    assert not program.calls(aten.mul.Tensor)


def test_an_activation_of_a_part_is_one_call() -> None:
    """Phi's MLP reads what its attention reads; its GELU is spelled out."""
    program = rewritten(FuseDecode(), paged("phi")).program
    assert [node.kwargs for node in program.calls(aten.gelu.default)] == [{"approximate": "tanh"}] * 2
    assert not program.calls(aten.tanh.default)


@pytest.mark.parametrize("name", HALF)
def test_bfloat16(name: str) -> None:
    program = paged(name, torch.bfloat16)
    result = rewritten(FuseDecode(), program)
    assert result.matched == MATCHED.get(name, 11)
    assert gap(program, result) <= 6e-2
    if name == "gemma3":  # norms of heads in float32, with folded weights
        calls = result.program.calls(ROTARY_ATTENTION)
        assert [item.meta["val"].dtype for call in calls for item in call.args[11:]] == [torch.float32] * 4


@pytest.mark.parametrize("name", GATED)
def test_the_gate_passes_in_bfloat16(name: str) -> None:
    steps = [Step(FuseDecode()), Step(LegalizeCuda(), optional=True)]
    fused, legal = Pipeline(steps).run(paged(name, torch.bfloat16)).records
    assert fused.drift is not None
    assert f"{5 if name == 'gpt-neox' else 9 if name == 'olmo2' else 7} in a layer" in legal.notes[0]


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_quantized_weights_stay_what_they_are(name: str) -> None:
    program = paged(name, quantize=(QuantizeRtn(bits=4, symmetric=False),))
    result = rewritten(FuseDecode(), program)
    dequantized = [node for node in result.program.calls(FUSED) if node.args[1].op == "call_function"]
    assert len(dequantized) == count(program, torch.ops.optc.dequantize.default) == 8
    assert gap(program, result) <= 1e-5


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_the_rounding_of_tokens_is_taken_in(name: str) -> None:
    """With the norm in front of it; the codes are the program's, so what is left are other orders of sums."""
    program = paged(name, quantize=(QuantizeFp8(), QuantizeActivations(format="fp8")))
    result = rewritten(FuseDecode(), program)
    rounded = [node.kwargs for node in result.program.calls(FUSED) if node.kwargs.get("inputs") == "fp8"]
    assert [bool(keywords.get("norm")) for keywords in rounded] == [True, False] * 4
    assert count(result.program, torch.ops.optc.quantize_dynamic.default) == 0
    assert gap(program, result) <= 0.05
    legal = rewritten(LegalizeCuda(), result.program).program
    assert [node.kwargs["format"] for node in legal.calls(FUSED) if node.kwargs.get("inputs")] == ["fp8"] * 8
    assert gap(result.program, PassResult(legal, 1, 1)) <= 0.05
    assert all(rounds_activations(item) for item in (result.program, legal))


def test_codes_of_integers_stay_in_front_of_linears() -> None:
    program = paged("qwen2", quantize=(QuantizeRtn(bits=8, group_size=0), QuantizeActivations()))
    result = rewritten(FuseDecode(), program)
    reason = "its activations are rounded to int8, not to fp8 by the scale of each token"
    assert [miss.reason for miss in result.misses].count(reason) == 8
    assert count(result.program, torch.ops.optc.quantize_dynamic.default) == 8


class _Mlp(torch.nn.Module):
    """Linears whose neighbours cannot be taken in."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.norm = form, torch.nn.RMSNorm(8, eps=1e-6)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        if self.form == "norm read twice":
            return self.down(normed) + normed
        if self.form == "second half":
            one, other = self.up(x).chunk(2, -1)
            return one * torch.nn.functional.silu(other)
        if self.form == "sigmoid":
            one, other = self.up(x).chunk(2, -1)
            return torch.sigmoid(one) * other
        assert self.form == "broadcast"
        return self.down(x) + normed[:1]


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("norm read twice", "rms_norm is not taken in: more than linears read it"),
        ("second half", "its second half is the gate, not its first"),
        ("sigmoid", "no known activation of its first half"),
        ("broadcast", "slice_1 is of another shape or type than what it is added to"),
    ],
)
def test_what_is_left_alone(form: str, reason: str) -> None:
    x = torch.randn(5, 8)
    program = capture_module(_Mlp(form).eval(), (x,))
    result = rewritten(FuseDecode(), program)
    assert [miss.reason for miss in result.misses] == [reason]
    assert float((result.program(x) - program(x)).abs().max()) <= 1e-6


class _Behind(torch.nn.Module):
    """Norms and factors between linears and residuals."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.norm = form, torch.nn.LayerNorm(8, eps=1e-3)
        self.norm.weight = torch.nn.Parameter(torch.rand(8) + 0.5)
        self.down, self.other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        if self.form == "factor":
            return x + 0.5 * y
        if self.form == "norm and factor":
            return self.norm(y)[None] * 0.25 + x[None]
        if self.form == "no residual":
            return torch.relu(self.norm(y))
        if self.form == "factor read twice":
            scaled = 0.5 * y
            return x + scaled - torch.relu(scaled)
        if self.form == "heads":
            return torch.relu(torch.nn.functional.layer_norm(y.view(-1, 2, 2, 2), (2,), None, None, 1e-3))
        assert self.form == "two linears"
        return (y + self.other(x)) + x


@pytest.mark.parametrize(
    ("form", "calls"),
    [
        ("factor", [{"norm": "", "eps": 0.0, "factor": 0.5}]),
        ("norm and factor", [{"norm": "layer", "eps": 1e-3, "factor": 0.25}]),
        ("no residual", [{"norm": "layer", "eps": 1e-3, "factor": 1.0}]),
        ("factor read twice", []),
        ("heads", []),
        ("two linears", []),
    ],
)
def test_norms_and_factors_behind_a_linear(form: str, calls: list[dict[str, object]]) -> None:
    x = torch.randn(5, 8)
    program = capture_module(_Behind(form).eval(), (x,))
    result = rewritten(FuseDecode(), program)
    assert [node.kwargs for node in result.program.calls(FUSED_NORM)] == calls
    assert float((result.program(x) - program(x)).abs().max()) <= 1e-5
    sums = count(result.program, aten.add.Tensor)
    assert sums == (1 if form == "factor read twice" else 0)


def test_two_sums_are_taken_into_two_linears() -> None:
    program = capture_module(_Behind("two linears").eval(), (torch.randn(5, 8),))
    first, second = rewritten(FuseDecode(), program).program.calls(FUSED)
    assert (first.args[7].name, second.args[7]) == ("x", first)
