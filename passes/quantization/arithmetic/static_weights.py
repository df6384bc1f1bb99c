"""Weights of int8 with a scale per output channel for convolutions and linears, and their biases in steps of the sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.convolutions import CONVOLUTIONS, Convolution, unpadded
from optc.compiler.analysis.dataflow import aten, peel, value_of
from optc.compiler.analysis.linears import Linear
from optc.compiler.formats.integer import check_finite_weight
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.lazy_weights import materialized
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, insert_call
from optc.compiler.pipeline.quantization_summary import linear_record
from optc.compiler.rewriting.quantization_record import LinearRecord
from optc.compiler.rewriting.weights import record_weight
from optc.passes.quantization.arithmetic.groups import weight_label, weight_rows
from optc.passes.quantization.arithmetic.selection import dequantized, dequantized_before, read_instead

_optc = torch.ops.optc
METHOD = "int8-static"
_MIDDLE = 128
_MOST_BIAS = 2.0**30
"""Steps of a bias: sums of products beside it must fit 32 bits as well."""


class StaticWeights:
    """Gives the convolutions and linears of a program their codes.

    Args:
        top: the largest code of a weight. rows: of the calibration data.
    """

    def __init__(self, program: Program, top: int, rows: int) -> None:
        self.program, self.top, self.rows = program, top, rows
        self.records: list[LinearRecord] = []

    def quantize(self, sites: list[Convolution | Linear]) -> None:
        """Weights that several linears read get scales that fit all of them."""
        rows = [_as_rows(site) for site in sites]
        floors: dict[str, Tensor] = {}
        for site in rows:
            label, floor = weight_label(self.program, site), self._floor(site)
            floors[label] = torch.maximum(floors.get(label, floor), floor)
        for given, site in zip(sites, rows, strict=True):
            weight = dequantized_before(self.program, site) or self._dequantized(
                site, floors[weight_label(self.program, site)]
            )
            bias = self._bias(site, weight)
            if isinstance(given, Linear):
                node = read_instead(self.program, given, weight)
                if bias is not site.bias:
                    node.update_arg(2, bias)
                continue
            shape = [int(size) for size in value_of(given.weight).shape]
            shaped = insert_call(self.program, given.node, aten.view.default, (weight, shape))
            given.node.update_arg(1, shaped)
            if bias is not None:
                given.node.update_arg(2, bias)

    def _floor(self, site: Linear) -> Tensor:
        """The least scale of each row [N], with which its bias fits 32 bits."""
        rows = int(value_of(site.weight).shape[0 if not site.transposed else 1])
        bias = self._bias_value(site)
        return torch.zeros(rows) if bias is None else bias.abs() / (_input_scale(site) * _MOST_BIAS)

    def _dequantized(self, site: Linear, floor: Tensor) -> Node:
        """The call that makes the weight [N, K] of its codes."""
        label = weight_label(self.program, site)
        values = materialized(_rows(self.program, site)).float()
        check_finite_weight(*values.aminmax(), where=label)
        scale = torch.maximum(values.abs().amax(1) / self.top, floor.to(values))
        scale = torch.where(scale == 0, 1.0, scale.clamp(min=torch.finfo(torch.float32).smallest_normal))[:, None]
        codes = (values / scale).round().clamp(-self.top, self.top)
        entry = WeightQuantization(
            method=METHOD, bits=8, group_size=0, symmetric=True, source=label, activations="uint8"
        )
        self.records.append(
            linear_record(
                label,
                values,
                codes * scale,
                scale,
                method=METHOD,
                bits=8,
                group_size=0,
                symmetric=True,
                tokens=self.rows,
            )
        )
        return dequantized(self.program, site, (codes + _MIDDLE).to(torch.uint8), scale, None, entry)

    def _bias_value(self, site: Linear) -> Tensor | None:
        """The bias that is added to the sums of codes, in float64; None where there is none, or an engine adds it later."""
        if site.bias is None or (site.node.target not in CONVOLUTIONS and value_of(site.node).dim() != 2):
            return None
        name = self.program.weight_of(site.bias)
        return None if name is None else materialized(self.program.weight(name).detach()).double()

    def _bias(self, site: Linear, weight: Node) -> Node | None:
        """The bias of a site in steps of its products, or as it is where it stays outside them."""
        value = self._bias_value(site)
        if value is None:
            return site.bias
        assert site.bias is not None
        name, scale = self.program.weight_of(site.bias), self.program.weight_of(weight.args[1])
        assert name is not None
        assert scale is not None
        step = _input_scale(site)
        codes = (value / (self.program.weight(scale).float().reshape(-1) * step).double()).round()
        stem, number = f"{name}_codes", 0
        while (free := stem if not number else f"{stem}{number}") in self.program.exported.state_dict:
            number += 1
        record_weight(self.program, free, self.program.contract.sources.get(name, (name,)))
        held = add_weight(self.program, free, codes.to(torch.int32))
        knobs = {"input_scale": step}
        return insert_call(self.program, site.node, _optc.dequantize_bias.default, (held, weight.args[1]), knobs)


def _as_rows(site: Convolution | Linear) -> Linear:
    """A convolution as a linear over its windows: a weight [O, I / groups * window]."""
    if isinstance(site, Linear):
        return site
    x = site.node.args[0]
    return Linear(site.node, x, site.weight, site.bias, transposed=False, placeholder=site.weight)


def _rows(program: Program, site: Linear) -> Tensor:
    """The weight as [N, K]."""
    values = weight_rows(program, site)
    return values.flatten(1) if values.dim() > 2 else values


def _input_scale(site: Linear) -> float:
    """The scale of the codes that a site reads."""
    call: Any = peel(unpadded(peel(site.input)))
    assert call.target is _optc.dequantize_tensor.default
    return float(call.kwargs["scale"])
