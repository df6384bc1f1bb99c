"""quantize-llm-int8: outlier columns from calibration, kept exactly; without them plain W8A8."""

from __future__ import annotations

import functools

import msgspec
import pytest
import torch
from rewrites import count, difference, stirred
from torch import Tensor

from optc.compiler.calibration.sequences import Calibration, random_calibration
from optc.compiler.capture import capture_module
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.llm_int8 import QuantizeLlmInt8
from optc.passes.quantization.rtn import QuantizeRtn

_aten, _optc = torch.ops.aten, torch.ops.optc
CALIBRATION = random_calibration(128, samples=4, length=32, seed=0)


def calibrated(rewrite: Pass, program: Program, calibration: Calibration | None = CALIBRATION) -> PassResult:
    before = program.fingerprint()
    result = rewrite.run(program, PassContext(calibration=calibration))
    assert program.fingerprint() == before
    result.program.exported.validate()
    names = set(result.program.weight_names().values())
    assert set(result.program.contract.quantization) <= names
    assert set(result.program.contract.sources) <= names
    return result


@functools.cache
def with_outliers(name: str, factor: float = 40.0) -> Program:
    """A family whose norms make three channels large, as trained models do; treat it as read-only."""
    program = stirred(name).clone()
    for weight in program.exported.graph_signature.parameters:
        tensor = program.weight(weight).detach().clone()
        if tensor.ndim == 1 and ("norm" in weight or ".ln_" in weight) and weight.endswith(".weight"):
            tensor[[3, 17, 40]] = factor
            program.exported.state_dict[weight] = torch.nn.Parameter(tensor, requires_grad=False)
    return program.changed()


def w8a8(program: Program) -> Program:
    for rewrite in (QuantizeRtn(bits=8, group_size=0), QuantizeActivations()):
        program = rewrite.run(program, PassContext()).program
    return program


def test_without_outliers_it_is_plain_w8a8() -> None:
    program = stirred("llama")
    result = calibrated(QuantizeLlmInt8(threshold=1e6), program)
    assert (result.matched, result.candidates) == (14, 15)
    assert difference(w8a8(program), result.program) <= 1e-6
    assert count(result.program, _aten.index_select.default) == 0
    assert result.notes[-1] == "0 of 640 input columns are outliers and keep their precision"
    entries = result.program.contract.quantization.values()
    assert {(entry.method, entry.bits, entry.activations) for entry in entries} == {("llm-int8", 8, "int8")}


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "mixtral"])
def test_outliers_are_kept(name: str) -> None:
    """Better than W8A8 by far where columns stand out, and linears of one input share the parts of it."""
    program = with_outliers(name)
    result = calibrated(QuantizeLlmInt8(threshold=30.0), program)
    assert count(result.program, _aten.index_select.default) >= 4
    assert count(result.program, _aten.index_select.default) <= count(result.program, _optc.quantize_dynamic.default)
    if name != "mixtral":  # its routers choose other experts
        assert difference(program, result.program) <= 0.6 * difference(program, w8a8(program))


def test_the_sum_by_hand() -> None:
    """One linear of a decoder: rounding touches nothing in the outlier column, and its weights stay float."""
    result = calibrated(QuantizeLlmInt8(threshold=6.0), with_outliers("llama"))
    program = result.program
    call = next(node for node in program.graph.nodes if node.target is _aten.index_select.default)
    stem = "model.layers.0.self_attn.q_proj.weight"
    assert program.weight_of(call.args[2]) == f"{stem}_outlier_columns"
    columns = program.weight(f"{stem}_outlier_columns")
    original = with_outliers("llama").weight(stem)
    assert torch.equal(program.weight(f"{stem}_outliers"), original[:, columns])
    assert program.weight(f"{stem}_codes")[:, columns].unique().tolist() == [128]
    mask = program.weight(f"{stem}_inlier_mask")
    assert mask.sum() == 64 - len(columns)
    assert {3, 17, 40} <= set(columns.tolist())
    back = _optc.dequantize(
        program.weight(f"{stem}_codes"), program.weight(f"{stem}_scale"), None, bits=8, group_size=0
    )
    back[:, columns] = original[:, columns]
    assert float((back - original).abs().max()) <= float(program.weight(f"{stem}_scale").max()) / 2 * 1.001


def test_the_threshold_decides_the_columns() -> None:
    program = with_outliers("llama")
    inputs: list[Tensor] = []
    stem = "model.layers.0.self_attn.q_proj.weight"

    class Record(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
            if target is _aten.linear.default and not inputs:
                inputs.append(args[0])
            return super().call_function(target, args, kwargs)

    tokens = CALIBRATION.tokens
    Record(program.module()).run(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))
    largest = inputs[0].abs().amax((0, 1))
    for threshold in (2.0, 6.0):
        result = calibrated(QuantizeLlmInt8(threshold=threshold), program)
        expected = (largest > threshold).nonzero().flatten()
        assert torch.equal(result.program.weight(f"{stem}_outlier_columns"), expected)


class _Pair(torch.nn.Module):
    """One weight in two linears, each with an outlier column of its own: 2 and 5."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(128, 16)
        self.embed.weight.data[:, 2] = 50.0
        self.shared = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 128)
        self.shift = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(5), 16) * 90.0)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(self.embed(input_ids)) + self.shift))


def test_columns_that_are_rarely_large_need_not_be_kept() -> None:
    """Two of 128 tokens select rows of the embedding with an outlier; the share of tokens decides."""
    tokens = torch.arange(128)[None] % 64 + 3
    program = stirred("llama").clone()
    table = program.exported.state_dict
    rows = table["model.embed_tokens.weight"].detach().clone()
    rows[5, 11] = 1e4  # one token of 64; after the norm its column is far beyond the others
    table["model.embed_tokens.weight"] = torch.nn.Parameter(rows, requires_grad=False)
    stem = "model.layers.0.self_attn.q_proj.weight"
    for frequency, kept in ((0.0, True), (0.01, True), (0.02, False)):
        rewrite = QuantizeLlmInt8(threshold=6.0, frequency=frequency)
        result = rewrite.run(program, PassContext(calibration=Calibration(tokens)))
        names = set(result.program.weight_names().values())
        columns = (
            result.program.weight(f"{stem}_outlier_columns").tolist() if f"{stem}_outlier_columns" in names else []
        )
        assert (11 in columns) == kept


def test_a_weight_of_two_linears_has_the_outliers_of_both() -> None:
    ids = torch.zeros((2, 11), dtype=torch.long)
    program = capture_module(_Pair(), (ids,), input_names=("input_ids",), dynamic={"input_ids": {0: "b", 1: "s"}})
    spec = msgspec.structs.replace(program.contract.inputs[0], role="input_ids")
    program = program.with_contract(inputs=(spec,))
    result = calibrated(QuantizeLlmInt8(threshold=40.0, ignore=("head.*",)), program)
    columns = result.program.weight("shared.weight_outlier_columns").tolist()
    assert {2, 5} <= set(columns)
    assert result.matched == 2
    x = CALIBRATION.tokens
    torch.testing.assert_close(result.program(x), program(x), rtol=0.05, atol=1.0)


def test_errors() -> None:
    with pytest.raises(UsageError, match="is not positive"):
        QuantizeLlmInt8(threshold=0.0)
    with pytest.raises(UsageError, match="not a share of the tokens"):
        QuantizeLlmInt8(frequency=1.0)
    with pytest.raises(InputError, match="needs calibration tokens"):
        calibrated(QuantizeLlmInt8(), stirred("llama"), None)
    broken = stirred("llama").clone()
    name = "model.layers.1.post_attention_layernorm.weight"
    table = broken.exported.state_dict
    table[name] = torch.nn.Parameter(table[name].detach() * float("nan"), requires_grad=False)
    with pytest.raises(InputError) as caught:
        QuantizeLlmInt8().run(broken, PassContext(calibration=CALIBRATION))
    assert caught.value.where == "input of model.layers.1.mlp.gate_proj.weight"
