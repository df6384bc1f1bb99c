"""legalize-ort: which kernel takes what, and that a legalized decoder computes what it did before."""

from __future__ import annotations

import functools
import operator
from typing import Any

import pytest
import torch
from chosen import chosen
from families import FAMILIES
from stages import captured, largest, sequences, tiny_decoder
from torch import Tensor

from optc.compiler.analysis.dataflow import evaluate
from optc.compiler.capture import capture_model, capture_module
from optc.compiler.diagnostics import TargetError
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.formats.integer import quantize_groups
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.compiler.target.target import check_legal
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.static import StaticKVCache
from optc.passes.legalization.ort import LegalizeOrt
from optc.targets.onnx_cpu import TARGET

_aten, _optc = torch.ops.aten, torch.ops.optc
KERNEL, CACHED, ROTARY = (
    getattr(_optc, name).default for name in ("group_query_attention", "cached_attention", "rotary")
)
PACKED, SKIP_NORM = _optc.matmul_nbits.default, _optc.skip_rms_norm.default


def run(program: Program, *passes: Pass) -> PassResult:
    result = PassResult(program, 0, 0)
    for step in passes:
        result = step.run(result.program, PassContext())
    return result


@functools.cache
def canonical(name: str, **options: Any) -> Program:
    """A family up to the legalization; treat it as read-only."""
    return _prepared(captured(name), **options)


@functools.cache
def legalized(name: str, **options: Any) -> PassResult:
    return run(canonical(name, **options), LegalizeOrt())


def drift(before: Program, after: Program) -> float:
    """Largest difference over ragged prefill, a chunk and steps, as a share of the largest logit."""
    rows = sequences(19, 7, 12)
    old, new = run_stage(before, rows).logits, run_stage(after, rows).logits
    return largest(old, new) / max(float(row.abs().max()) for row in old)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi", "gpt2", "qwen2-window"])
def test_a_legalized_decoder_computes_the_same(name: str) -> None:
    result = legalized(name)
    check_legal(result.program, TARGET)
    assert len(result.program.calls(KERNEL)) == 2
    assert not result.program.calls(CACHED)
    assert drift(canonical(name), result.program) <= 1e-5


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True), (4, False), (8, True)])
def test_a_quantized_decoder_computes_the_same(bits: int, symmetric: bool) -> None:
    options: dict[str, Any] = {"quant": "rtn", "bits": bits, "group_size": 32, "symmetric": symmetric}
    before, after = canonical("llama", **options), legalized("llama", **options).program
    check_legal(after, TARGET)
    assert drift(before, after) <= 1e-5
    *calls, head = after.calls(PACKED)
    assert (head.kwargs["N"], head.kwargs["K"], head.kwargs["bits"]) == (128, 64, 8)
    (lookup,) = after.calls(torch.ops.optc.gather_nbits.default)
    assert dict(lookup.kwargs) == {"K": 64, "bits": 8, "block_size": 32}
    assert [(call.kwargs["N"], call.kwargs["K"]) for call in calls] == [
        (128, 64),
        (64, 64),
        (256, 64),
        (64, 128),
    ] * 2
    assert {call.args[3] is None for call in calls} == {symmetric}
    weight = after.contract.quantization[after.weight_of(calls[0].args[1])]
    assert (weight.method, weight.bits, weight.group_size, weight.symmetric) == ("rtn", bits, 32, symmetric)


RTN = WeightQuantization(method="rtn", bits=4, group_size=16, symmetric=False, source="w")


class _Linears(torch.nn.Module):
    """One quantized weight [48, 48] in two linears."""

    def __init__(self, bits: int, group: int, *, symmetric: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        codes, scale, zero = quantize_groups(torch.randn(48, 48, generator=generator), bits, group or 48, symmetric)
        self.register_buffer("w_codes", codes)
        self.register_buffer("w_scale", scale)
        self.register_buffer("w_zero", zero)
        self.knobs = {"bits": bits, "group_size": group}

    def forward(self, x: Tensor) -> Tensor:
        weight = _optc.dequantize(self.w_codes, self.w_scale, self.w_zero, **self.knobs)
        linear = torch.nn.functional.linear
        return linear(linear(x, weight).relu(), weight)


class _Tied(_Linears):
    """The same weight as the table of an embedding, and in one linear."""

    def forward(self, ids: Tensor) -> Tensor:
        weight = _optc.dequantize(self.w_codes, self.w_scale, self.w_zero, **self.knobs)
        return torch.nn.functional.linear(torch.nn.functional.embedding(ids, weight), weight)


def _model(name: str, **changes: Any) -> Any:
    """A tiny family in other sizes."""
    cls, config_cls, sizes = FAMILIES[name]
    torch.manual_seed(0)
    return cls(config_cls(**{**sizes, **changes})).eval().requires_grad_(False)


def _prepared(program: Program, **options: Any) -> Program:
    """Taken through the recipe of the target, up to the legalization."""
    steps = TARGET.recipe("decoder", chosen("onnx-cpu", **options, accuracy_level=0))
    assert isinstance(steps[-1].rewrite, LegalizeOrt)
    return run(program, *(step.rewrite for step in steps[:-1] if step.when is None)).program


# -- attention --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "phi", "qwen3"])
def test_query_key_and_value_arrive_packed_where_nothing_stands_between(name: str) -> None:
    """Norms of q and k (olmo2, qwen3) and a rotary embedding outside of the kernel (phi) do."""
    packed = name in ("llama", "gpt2")
    program = legalized(name).program
    for call in program.calls(KERNEL):
        heads = call.kwargs["num_heads"] + 2 * call.kwargs["kv_num_heads"]
        assert (call.args[1] is None, call.args[2] is None) == (packed, packed)
        assert call.args[0].meta["val"].shape[2] == 16 * (heads if packed else call.kwargs["num_heads"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "phi", "qwen3"])
def test_rotary_embeddings_go_into_the_kernel_where_it_can(name: str) -> None:
    """Of its heads of 16 phi rotates 8 features, and the kernel takes multiples of 16; gpt2 has none."""
    program = legalized(name).program
    assert len(program.calls(ROTARY)) == (4 if name == "phi" else 0)
    inside = name not in ("phi", "gpt2")
    for call in program.calls(KERNEL):
        assert [None if table is None else tuple(table.meta["val"].shape) for table in call.args[7:9]] == (
            [(256, 8), (256, 8)] if inside else [None, None]
        )


def test_layers_share_tables_and_lengths() -> None:
    program = legalized("llama").program
    first, second = program.calls(KERNEL)
    assert first.args[5:] == second.args[5:]
    assert [table.target for table in first.args[7:9]] == [_aten.cos.default, _aten.sin.default]
    frequencies = first.args[7].args[0].args[1]
    values = program.weight(str(program.weight_of(frequencies)))
    angle = torch.arange(256.0)[:, None] * values
    for table, expected in zip(first.args[7:9], (torch.cos(angle), torch.sin(angle)), strict=True):
        assert torch.equal(evaluate(table, {frequencies: values}), expected)


def test_frequencies_of_their_own_get_tables_of_their_own() -> None:
    """gemma3: local and global layers."""
    types = ["sliding_attention", "full_attention"]
    program = run(_prepared(capture_model(_model("gemma3", layer_types=types))), LegalizeOrt()).program
    names = [program.weight_of(call.args[8].args[0].args[1]) for call in program.calls(KERNEL)]
    assert names == [f"model.rotary_emb.{kind}_inv_freq" for kind in types]


@pytest.mark.parametrize(
    ("name", "windows", "softcap"),
    [("llama", [-1, -1], 0.0), ("qwen2-window", [-1, 8], 0.0), ("gemma2", [8, -1], 50.0)],
)
def test_windows_and_softcap(name: str, windows: list[int], softcap: float) -> None:
    """A window counts tokens with the query itself, there as here; -1 is none."""
    calls = legalized(name).program.calls(KERNEL)
    assert [call.kwargs["local_window_size"] for call in calls] == windows
    assert {call.kwargs["softcap"] for call in calls} == {softcap}
    assert len(sequences(19)[0]) > 2 * 8  # so that the drift above would show a window of 7 or 9


def test_a_window_one_token_wider_shows() -> None:
    program = legalized("qwen2-window").program.clone()
    program.calls(KERNEL)[1].update_kwarg("local_window_size", 9)
    assert drift(canonical("qwen2-window"), program.changed()) > 1e-3


@pytest.mark.parametrize(("name", "inside"), [("phi", True), ("gpt-neox", False)])
def test_partial_rotary_of_whole_sixteenths_goes_in(name: str, inside: bool) -> None:
    """phi with heads of 32 rotates 16 features of each; gpt-neox with heads of 32 rotates 8."""
    before = _prepared(capture_model(_model(name, hidden_size=128)))
    after = run(before, LegalizeOrt()).program
    assert [call.args[7] is not None for call in after.calls(KERNEL)] == [inside, inside]
    assert drift(before, after) <= 1e-5


def test_heads_of_an_odd_size_are_a_miss() -> None:
    """They keep the canonical operator, which is spelled out in standard ones."""
    result = run(capture_model(_model("llama", head_dim=12)), FuseRotary(), StaticKVCache(), LegalizeOrt())
    reason = "GroupQueryAttention takes head sizes that are multiples of 8, not 12"
    assert [miss.reason for miss in result.misses] == [reason, reason]
    assert len(result.program.calls(CACHED)) == 2
    check_legal(result.program, TARGET)


def test_rotary_stays_outside_heads_of_eight() -> None:
    before = run(capture_model(_model("llama", head_dim=8)), FuseRotary(), StaticKVCache()).program
    after = run(before, LegalizeOrt()).program
    assert len(after.calls(ROTARY)) == 4
    assert [call.args[7] for call in after.calls(KERNEL)] == [None, None]
    assert drift(before, after) <= 1e-5


def test_sinks_are_a_miss() -> None:
    result = run(tiny_decoder(sinks=True), StaticKVCache(), LegalizeOrt())
    assert [miss.reason for miss in result.misses] == [
        "GroupQueryAttention is given no sinks: attention is spelled out"
    ]
    check_legal(result.program, TARGET)


# -- linears and norms ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group", "reason"),
    [
        (4, 8, "MatMulNBits takes groups of 16, 32, 64, 128, 256, not of 8"),
        (3, 24, "MatMulNBits takes groups of 16, 32, 64, 128, 256, not of 24"),
    ],
)
def test_what_no_kernel_takes_is_a_miss(bits: int, group: int, reason: str) -> None:
    program = capture_module(_Linears(bits, group), [torch.randn(2, 48)], dynamic={"input_0": {0: "batch"}})
    result = run(program, LegalizeOrt())
    assert [miss.reason for miss in result.misses] == [reason, reason]
    with pytest.raises(TargetError, match=r"optc\.dequantize\.default has no lowering"):
        check_legal(result.program, TARGET)


@pytest.mark.parametrize(
    ("bits", "group", "kernel"),
    [(3, 16, (4, 16)), (3, 0, (4, 16)), (4, 0, (4, 16)), (8, 0, (8, 16)), (2, 48, (2, 16))],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_that_fit_a_larger_field_or_smaller_blocks(
    bits: int, group: int, kernel: tuple[int, int], symmetric: bool
) -> None:
    """3-bit codes go into 4 bits; a row of 48 is cut into blocks of 16, the largest power of two, of one scale."""
    module = _Linears(bits, group, symmetric=symmetric)
    program = capture_module(module, [torch.randn(2, 48)], dynamic={"input_0": {0: "batch"}})
    after = run(program, LegalizeOrt()).program
    assert {(call.kwargs["bits"], call.kwargs["block_size"]) for call in after.calls(PACKED)} == {kernel}
    x = torch.randn(5, 48)
    torch.testing.assert_close(after(x), module(x), rtol=1e-6, atol=1e-6)


def test_a_weight_read_twice_is_packed_once() -> None:
    module = _Linears(4, 16)
    program = capture_module(module, [torch.randn(2, 48)], dynamic={"input_0": {0: "batch"}})
    program = program.with_contract(quantization={"w_codes": RTN})
    after = run(program, LegalizeOrt()).program
    first, second = after.calls(PACKED)
    assert first.args[1:4] == second.args[1:4]
    assert dict(first.kwargs) == {"K": 48, "N": 48, "bits": 4, "block_size": 16, "accuracy_level": 0}
    assert sorted(name for name, _ in after.weights()) == ["w_packed", "w_scales", "w_zero_points"]
    assert after.weight("w_packed").shape == (48, 3, 8)
    x = torch.randn(5, 48)
    torch.testing.assert_close(after(x), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table_that_is_looked_up_and_multiplied_is_packed_once(bits: int, symmetric: bool) -> None:
    module = _Tied(bits, 16, symmetric=symmetric)
    program = capture_module(module, [torch.tensor([[1, 7]])], dynamic={"input_0": {1: "length"}})
    after = run(program, LegalizeOrt()).program
    check_legal(after, TARGET)
    (lookup,), (product,) = after.calls(torch.ops.optc.gather_nbits.default), after.calls(PACKED)
    assert lookup.args[1:4] == product.args[1:4]
    assert sorted(name for name, _ in after.weights()) == ["w_packed", "w_scales", "w_zero_points"][: 3 - symmetric]
    ids = torch.randint(0, 48, (1, 9))
    torch.testing.assert_close(after(ids), module(ids), rtol=1e-6, atol=1e-6)


def test_a_lookup_in_2_bits_is_a_miss() -> None:
    program = capture_module(_Tied(2, 16), [torch.tensor([[1, 7]])], dynamic={"input_0": {1: "length"}})
    result = run(program, LegalizeOrt())
    assert [miss.reason for miss in result.misses] == ["GatherBlockQuantized takes 4 and 8 bits, not 2"]


def test_sums_in_front_of_norms_are_fused() -> None:
    """Both outputs are read: the norm, and the sum by the next residual."""
    program = legalized("llama").program
    assert len(program.calls(SKIP_NORM)) == 4  # of 5: the first norm reads the embedding
    assert len(program.calls(_aten.rms_norm.default)) == 1
    taken = [
        user.args[1] for call in program.calls(SKIP_NORM) for user in call.users if user.target is operator.getitem
    ]
    assert sorted(taken) == [0, 0, 0, 0, 1, 1, 1]


def test_nothing_to_do_is_no_match() -> None:
    result = run(captured("gpt2"), LegalizeOrt())
    assert (result.matched, result.candidates, result.misses) == (0, 0, ())
