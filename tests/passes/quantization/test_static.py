"""quantize-static: which tensors are in codes, their grids against other implementations, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from rewrites import count
from static_networks import BATCHES, program_of, residual
from torch import Tensor, nn

from optc.compiler.calibration.examples import Examples
from optc.compiler.calibration.sequences import Calibration
from optc.compiler.diagnostics import InputError, NoMatchError, UsageError
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext, PassResult
from optc.passes.fusion.fold_batchnorm import FoldBatchnorm
from optc.passes.quantization.arithmetic.observing import grid_of, observed_ranges
from optc.passes.quantization.static import QuantizeStatic

_aten, _optc = torch.ops.aten, torch.ops.optc
CODES, CONV = _optc.quantize_tensor.default, _aten.conv2d.default
CONTEXT = PassContext(calibration=Calibration(Examples(tuple((batch,) for batch in BATCHES)), "images"))


@functools.cache
def _folded(kind: str) -> Program:
    return FoldBatchnorm().run(program_of(kind), CONTEXT).program


@functools.cache
def _static(kind: str) -> PassResult:
    return QuantizeStatic().run(_folded(kind), CONTEXT)


def _error(program: Program, made: Program) -> float:
    expected = program(BATCHES[0])
    return float((made(BATCHES[0]) - expected).norm() / expected.norm())


def test_residual_network() -> None:
    result = _static("residual")
    made = result.program
    made.exported.validate()
    assert (result.matched, result.candidates, result.misses) == (7, 7, ())
    assert (
        "6 convolutions, 1 linears, 1 adaptive_avg_pool2d, 2 add, 1 flatten, 1 max_pool2d; 12 tensors"
        in result.notes[0]
    )
    assert count(made, CODES) == 12
    assert count(made, _aten.relu.default) == count(made, _aten.relu_.default) == 0  # ranges of codes from 0 on
    for node in made.calls(CONV, _aten.add.Tensor, _aten.max_pool2d.default):
        assert all(item.target is not CODES for item in node.all_input_nodes)
        assert [user.target for user in node.users] == [CODES]  # what is made in integers is rounded, and read as codes
    assert 0 < _error(_folded("residual"), made) < 0.02
    assert {entry.activations for entry in made.contract.quantization.values()} == {"uint8"}
    assert {row.shape for row in result.linears} >= {(16, 27), (10, 32)}
    assert all(row.method == "int8-static" and row.weight_error < 1e-4 and row.tokens == 24 for row in result.linears)


def test_mobile_network() -> None:
    """Pads go into convolutions, clipping at 6 into codes; hard-swish is a product of codes, and so is the squeeze."""
    made = _static("mobile").program
    assert count(made, _aten.hardtanh.default) == count(made, _aten.relu6.default) == 0
    assert count(made, _aten.hardswish.default) == 0
    (pad,) = made.calls(_aten.pad.default)
    assert pad.args[0].target is _optc.dequantize_tensor.default
    assert [user.target for user in pad.users] == [CONV]
    products = made.calls(_aten.mul.Tensor)
    assert len(products) == 2
    assert {item.target for node in products for item in node.all_input_nodes} == {_optc.dequantize_tensor.default}
    tops = [
        node.kwargs["scale"] * 255
        for node in made.calls(CODES)
        if node.args[0].target is CONV and node.kwargs["zero"] == 0
    ]
    assert tops
    assert max(tops) <= 6.0
    assert 0 < _error(_folded("mobile"), made) < 0.05


@pytest.mark.parametrize("kind", [nn.Hardswish, nn.SiLU])
def test_gated_activations_are_products(kind: type[nn.Module]) -> None:
    """Over all that x can be: the gate has 256 values, and is 0 and 1 where hard-swish's is."""
    conv = nn.Conv2d(1, 1, 1).eval().requires_grad_(False)
    conv.weight[:], conv.bias[:] = 1.0, 0.0
    last = nn.Conv2d(1, 1, 1, bias=False).eval().requires_grad_(False)
    last.weight[:] = 1.0
    x = torch.linspace(-6, 6, 1024).view(2, 1, 16, 32)
    program = program_of(nn.Sequential(conv, kind(), last), x)
    context = PassContext(calibration=Calibration(Examples(((x,),)), "a line"))
    made = QuantizeStatic(ranges="minmax").run(program, context).program
    assert (count(made, _aten.mul.Tensor), count(made, _aten.hardswish.default), count(made, _aten.silu.default)) == (
        1,
        0,
        0,
    )
    found, expected, step = made(x), kind()(x), 12 / 255
    assert float((found - expected).abs().max()) < 2.5 * step
    if kind is nn.Hardswish:
        assert not made(torch.full_like(x, -3.5)).any()


def test_grids_are_those_of_torch() -> None:
    observer = torch.ao.quantization.MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    for batch in BATCHES:
        observer(batch)
    scale, zero = observer.calculate_qparams()
    made = QuantizeStatic(ranges="minmax").run(_folded("residual"), CONTEXT).program
    first = next(node for node in made.calls(CODES) if node.args[0].op == "placeholder")
    assert (first.kwargs["scale"], first.kwargs["zero"]) == (pytest.approx(float(scale), rel=1e-6), int(zero))
    found = _optc.dequantize_tensor(CODES(BATCHES[0], **first.kwargs), **first.kwargs, dtype=torch.float32)
    expected = torch.fake_quantize_per_tensor_affine(BATCHES[0], float(scale), int(zero), 0, 255)
    assert float(((found - expected).abs() > 1e-6).double().mean()) < 1e-3  # a tie
    assert grid_of(0.0, 0.0, None).scale > 0


@functools.cache
def _heavy() -> tuple[Program, Any, Tensor]:
    """A program of one linear, its input, and values of which one in a million is far out."""
    values = torch.rand(1 << 18, 4) * 2 - 1
    values[7, 1] = 4.0
    program = program_of(nn.Linear(4, 4).eval().requires_grad_(False), values[:2])
    return program, program.user_inputs()[0], values


def test_ranges_of_least_error_and_of_a_percentile() -> None:
    torch.manual_seed(0)
    program, node, values = _heavy()

    def error(method: Any) -> float:
        ranges = observed_ranges(
            program, Examples(tuple((part,) for part in values.split(1 << 16))), [node], method, 99.0, lambda *_: None
        )
        grid = grid_of(*ranges[node], None)
        codes = CODES(values, scale=grid.scale, zero=grid.zero)
        return float(
            (_optc.dequantize_tensor(codes, scale=grid.scale, zero=grid.zero, dtype=torch.float32) - values)
            .square()
            .mean()
        )

    least = min(error_of(values, high) for high in torch.linspace(0.9, 4.0, 63).tolist())
    assert error("mse") < 1.05 * least < 0.6 * error("minmax")
    ranges = observed_ranges(program, Examples(((values,),)), [node], "percentile", 99.0, lambda *_: None)[node]
    expected = torch.quantile(values.flatten(), torch.tensor([0.01, 0.99]))
    width = float(values.max() - values.min()) / 2048
    assert ranges == pytest.approx(expected.tolist(), abs=2 * width)


def error_of(values: Tensor, high: float) -> float:
    """Of the grid from -1 to `high`, by torch."""
    scale = (high + 1.0) / 255
    rounded = torch.fake_quantize_per_tensor_affine(values, scale, round(1.0 / scale), 0, 255)
    return float((rounded - values).square().mean())


def test_weights_of_7_bits() -> None:
    for reduced, top in ((False, 127), (True, 63)):
        made = QuantizeStatic(reduce_range=reduced).run(_folded("residual"), CONTEXT).program
        codes = [tensor.int() - 128 for name, tensor in made.weights() if name.endswith("weight_folded_codes")]
        assert {int(item.abs().max()) for item in codes} == {top}


def test_biases_that_are_large_beside_their_weights() -> None:
    """A channel that is nearly zero keeps a bias that fits 32 bits."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).eval().requires_grad_(False)
    conv.weight[1], conv.bias[1] = 1e-20, 50.0
    x = torch.randn(4, 3, 8, 8)
    context = PassContext(calibration=Calibration(Examples(((x,),)), "images"))
    program = program_of(conv, x)
    made = QuantizeStatic(ranges="minmax").run(program, context).program
    assert max(int(tensor.abs().max()) for name, tensor in made.weights() if name == "bias_codes") <= 1 << 30
    torch.testing.assert_close(made(x)[:, 1], conv(x)[:, 1], rtol=5e-3, atol=0)


def test_ignored_and_refused() -> None:
    folded = _folded("residual")
    result = QuantizeStatic(ignore=("0.weight*",)).run(folded, CONTEXT)
    assert result.matched == 6
    assert "is ignored" in result.misses[0].reason
    with pytest.raises(NoMatchError, match="nothing-of-this"):
        QuantizeStatic(ignore=("nothing-of-this",)).run(folded, CONTEXT)
    assert QuantizeStatic(ignore=("*",)).run(folded, CONTEXT).matched == 0
    with pytest.raises(InputError, match="needs calibration tokens"):
        QuantizeStatic().run(folded, PassContext())
    with pytest.raises(UsageError, match="percentile has no effect with ranges=mse"):
        QuantizeStatic(percentile=99.0)
    with pytest.raises(UsageError, match=r"5\.0 is no percentile"):
        QuantizeStatic(percentile=5.0, ranges="percentile")
    again = QuantizeStatic().run(_static("residual").program, CONTEXT)
    assert again.matched == 0
    assert {miss.reason for miss in again.misses} >= {"its weight is already quantized"}
    broken = PassContext(calibration=Calibration(Examples(((torch.full_like(BATCHES[0], float("nan")),),)), "images"))
    with pytest.raises(InputError, match="NaN or infinite"):
        QuantizeStatic().run(folded, broken)


def test_transposed_convolutions_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2, 2)).eval().requires_grad_(False)
    result = QuantizeStatic().run(program_of(model, BATCHES[0]), CONTEXT)
    assert (result.matched, result.candidates) == (1, 2)
    assert result.misses[0].reason.startswith("it is transposed")
    assert count(result.program, _aten.conv_transpose2d.input) == 1


class _Writes(nn.Module):
    """A convolution behind a write into a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, :, 0] = 0
        return self.conv(y)


def test_writes_into_views_need_functionalize() -> None:
    program = program_of(_Writes().eval().requires_grad_(False), BATCHES[0])
    with pytest.raises(UsageError, match="writes into a tensor that others read"):
        QuantizeStatic().run(program, CONTEXT)


def test_residual_is_not_touched() -> None:
    """The pass edits a clone: what it was given computes what it did."""
    program = program_of("residual")
    torch.testing.assert_close(program(BATCHES[0]), residual()(BATCHES[0]), rtol=1e-4, atol=1e-5)
