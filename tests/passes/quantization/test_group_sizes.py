"""`--group-size auto`: each weight gets the first size that divides it, by rtn and by the calibrated passes."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optc.compiler.calibration.examples import Examples
from optc.compiler.calibration.sequences import Calibration
from optc.compiler.capture import capture_model, capture_module
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.formats.group_sizes import size_for
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext
from optc.compiler.target.options import QuantRequest
from optc.passes.quantization.auto import QuantizeAuto
from optc.passes.quantization.gptq import QuantizeGptq
from optc.passes.quantization.rtn import QuantizeRtn
from optc.passes.quantization.scale_awq import ScaleAwq
from optc.planning import make_plan
from optc.recipes import parse_passes
from optc.request import from_python
from optc.resolving import resolve, with_group_size

WIDTHS = (128, 48, 200, 64)
"""K of the linears "0", "1" and "2"; the last is N of the third."""


@functools.cache
def _program() -> Program:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(k, n) for k, n in itertools.pairwise(WIDTHS)]
    return capture_module(torch.nn.Sequential(*layers), (torch.randn(6, WIDTHS[0]),))


def _context() -> PassContext:
    x = torch.randn(6, WIDTHS[0], generator=torch.Generator().manual_seed(1))
    return PassContext(calibration=Calibration(Examples(((x,),)), "rows"))


def _sizes(program: Program) -> dict[str, int]:
    return {entry.source: entry.group_size for entry in program.contract.quantization.values()}


@pytest.mark.parametrize("method", [QuantizeRtn, QuantizeGptq])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((128, 64, 32, 16, 0), {"0.weight": 128, "1.weight": 16, "2.weight": 0}),
        ((64, 16), {"0.weight": 64, "1.weight": 16}),
        ((64, 0), {"0.weight": 64, "1.weight": 0, "2.weight": 0}),
    ],
)
def test_each_weight_gets_the_first_that_divides_it(
    method: type[QuantizeRtn], given: tuple[int, ...], expected: dict[str, int]
) -> None:
    result = method(group_size=given).run(_program(), _context())
    assert _sizes(result.program) == expected
    shapes = {"0.weight": (48, 128), "1.weight": (200, 48), "2.weight": (64, 200)}
    for codes, entry in result.program.contract.quantization.items():
        rows, columns = shapes[entry.source]
        scale = result.program.weight(codes.removesuffix("_codes") + "_scale")
        assert scale.shape == (rows, columns // (entry.group_size or columns))
    records = {record.name: record.group_size for record in result.linears}
    assert records in ({}, expected)  # rtn leaves the records to the summary of the written program


def test_what_differs_is_said_by_name() -> None:
    result = QuantizeRtn(group_size=(64, 16)).run(_program(), PassContext())
    assert result.notes == (
        "group size 64: 0.weight (K = 128)",
        "group size 16: 1.weight (K = 48)",
        "not quantized, as no group divides K: 2.weight (K = 200)",
    )
    assert (result.matched, result.candidates) == (2, 3)
    assert [miss.reason for miss in result.misses] == ["no group of 64, 16 divides the K = 200 of 2.weight"]
    whole = QuantizeRtn(group_size=(64, 16, 0)).run(_program(), PassContext())
    assert whole.notes[2] == "group size of a row: 2.weight (K = 200)"
    most = QuantizeRtn(group_size=(16, 0)).run(_program(), PassContext())
    assert most.notes == ("group size 16: 2 of 3 weights", "group size of a row: 2.weight (K = 200)")


def test_awq_scales_what_is_rounded() -> None:
    """Of weights that no size divides the inputs are left alone: they are no candidates."""
    result = ScaleAwq(group_size=(64,)).run(_program(), _context())
    assert result.candidates == 1


def test_bits_are_chosen_for_what_is_rounded() -> None:
    config = {"hidden_size": 64, "intermediate_size": 72, "vocab_size": 60, "num_hidden_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2, num_key_value_heads=2)).eval()
    tokens = torch.randint(0, 60, (1, 8), generator=torch.Generator().manual_seed(0))
    context = PassContext(calibration=Calibration(tokens, "tokens"))
    result = QuantizeAuto(group_size=(32,), choices=(4, 8)).run(capture_model(model), context)
    down = "model.layers.0.mlp.down_proj.weight"
    assert set(_sizes(result.program).values()) == {32}
    assert down not in _sizes(result.program)
    assert f"not quantized, as no group divides K: {down} (K = 72)" in result.notes


@pytest.mark.parametrize(
    ("target", "sizes"),
    [("onnx-cpu", (128, 64, 32, 16)), ("inductor-cpu", (128, 64, 32, 16, 0)), ("vllm", (128, 64, 32, 0))],
)
def test_the_target_says_which_sizes(target: str, sizes: tuple[int, ...]) -> None:
    resolved = resolve(from_python(target, quant="rtn", group_size="auto"))
    chosen = resolved.options.quantization
    assert chosen is not None
    assert chosen.group_size == sizes
    assert with_group_size(resolved, [200, 48], ["a", "b"]) is resolved


def test_advice_ends() -> None:
    """A size that does not divide, then one that the target lacks: what is proposed last works."""
    with pytest.raises(InputError) as caught:
        with_group_size(resolve(from_python("onnx-cpu", quant="rtn")), [200, 64], ["a.weight", "b.weight"])
    assert caught.value.remedy == (
        "--group-size auto, which takes a size for each weight, or leave this weight out: --ignore a.weight"
    )
    with pytest.raises(InputError) as caught:
        with_group_size(
            resolve(from_python("onnx-cpu", quant="rtn", group_size=32)), [48, 64], ["a.weight", "b.weight"]
        )
    assert caught.value.remedy == (
        "use 16, the nearest that divides every weight, or --group-size auto, which takes a size for each weight, "
        "or leave this weight out: --ignore a.weight"
    )


def test_plans_say_what_stays(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=200,
        vocab_size=60,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    plan = make_plan(tmp_path, from_python("onnx-cpu", quant="rtn", group_size="auto"))
    assert (plan["group_size"], plan["left"]) == ((128, 64, 32, 16), ["model.layers.0.mlp.down_proj.weight"])
    assert plan["sizes"]["linears"] == 64 * 200 * 4 + (4 * 64 * 64 + 2 * 64 * 200) // 2
    assert plan["sizes"]["scales"] == 2 * (4 * 64 + 2 * 200) + 2 * 2 * 60  # of the linears, and of embedding and head


def test_sizes_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="no group sizes"):
        QuantizeRtn(group_size=())
    with pytest.raises(InputError, match="negative"):
        QuantizeGptq(group_size=(64, -1))
    with pytest.raises(UsageError, match="does not support --group-size auto"):
        resolve(from_python("onnx-cpu", quant="int8", group_size="auto"))
    with pytest.raises(UsageError) as caught:
        parse_passes(["quantize-rtn"], QuantRequest(group_size="auto"))
    assert caught.value.remedy == "give the sizes to choose from: {quantize-rtn: {group_size: [128, 64, 32]}}"
    (step,) = parse_passes([{"quantize-rtn": {"group_size": [64, 0]}}], QuantRequest(group_size="auto"))
    made: Pass = step.rewrite
    assert isinstance(made, QuantizeRtn)
    assert made.group_size == (64, 0)


def test_a_row_divides_everything() -> None:
    assert [size_for(columns, (64, 16, 0)) for columns in (128, 48, 200)] == [64, 16, 0]
    assert size_for(200, (64, 16)) is None
