"""linear(x, W)  ->  W8A8 of all but the outlier columns, plus a product of these in full precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, peel, value_of
from optc.compiler.analysis.linears import Linear
from optc.compiler.calibration.examples import Examples
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.formats.integer import quantize_groups
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call, replace_call
from optc.compiler.rewriting.budget import Budget, total_budget
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.compiler.rewriting.rounded_inputs import rounded_input
from optc.passes.quantization.arithmetic.budgets import INT8_INPUTS, weight_budget
from optc.passes.quantization.arithmetic.groups import Group, input_groups, weight_label, weight_rows
from optc.passes.quantization.arithmetic.ranges import calibration_feed, largest_magnitudes
from optc.passes.quantization.arithmetic.selection import (
    dequantized_before,
    existing_part,
    place_codes,
    quantize_selected,
    select_linears,
    weight_part,
)
from optc.passes.quantization.arithmetic.stream import Stream

_optc = torch.ops.optc


@dataclass(frozen=True, kw_only=True)
class QuantizeLlmInt8(Pass):
    """linear(x, W)  ->  linear(int8(x without outliers), int8(W without outliers)) + linear(x[outliers], W[outliers])

    LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339): few columns of the inputs are many times
    larger than the others and would spoil the scale of their token. Here they are those that exceed `threshold` on
    the calibration text; they and the weights that meet them keep their precision. All else is W8A8: weights of
    int8 with a scale per output channel, inputs of int8 with a scale per token. Without outliers a linear is plain
    W8A8. Which linears: as quantize-rtn.

    Attributes:
        threshold: magnitude above which a value of the input is an outlier.
        frequency: a column is kept when more than this share of the calibration tokens has an outlier in it. 0: one
            token is enough, as in the paper's operator; the paper counts features from 0.06 on.
        ignore: patterns (`*.down_proj.*`) of weight names to leave alone.
        head: quantize the linear that makes the logits too.
    """

    name: ClassVar[str] = "quantize-llm-int8"
    lossy: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    threshold: float = 6.0
    frequency: float = 0.0
    ignore: tuple[str, ...] = ()
    head: bool = False

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise UsageError(f"threshold {self.threshold} is not positive", remedy="use 6.0, as the paper does")
        if not 0 <= self.frequency < 1:
            raise UsageError(f"frequency {self.frequency} is not a share of the tokens", remedy="use 0, or 0.06")

    def budget(self, before: Program) -> Budget:
        """Weights and inputs are rounded in one step."""
        return total_budget((weight_budget(8), INT8_INPUTS))

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize a clone of `program`.

        Raises:
            InputError: no calibration tokens, activations or weights that are not finite (the layer is named).
        """
        selection = select_linears(program, self.ignore, self.head)
        if not selection.chosen:
            return PassResult(program, 0, selection.candidates, selection.misses, selection.notes)
        tokens = calibration_feed(self.name, context)
        groups = input_groups(selection.chosen)
        outliers = self._outliers(program, tokens, groups, context)
        edit = _Edit(outliers)
        return quantize_selected(program, selection, edit.quantize, _summary(program, groups, outliers))

    def _outliers(
        self, program: Program, tokens: Tensor | Examples, groups: Sequence[Group], context: PassContext
    ) -> dict[str, Tensor]:
        """Outlier columns int64 [n] by the name of a linear's node; linears of one weight have the same."""
        stream = Stream(program, tokens)
        found: dict[str, Tensor] = {}
        by_weight: dict[str, Tensor] = {}
        with torch.no_grad():
            for number, group in enumerate(groups):
                label = weight_label(program, group.sites[0])
                if context.progress:
                    context.progress(number, len(groups), label)
                stream.advance(group.root)
                large = self._exceeds(stream, group.root, f"input of {label}")
                for site in group.sites:
                    name = weight_label(program, site)
                    by_weight[name] = large | by_weight.get(name, torch.zeros_like(large))
        for group in groups:
            for site in group.sites:
                found[site.node.name] = by_weight[weight_label(program, site)].nonzero().flatten()
        return found

    def _exceeds(self, stream: Stream, root: Node, where: str) -> Tensor:
        """Which columns of an input exceed the threshold often enough; bool [K]."""
        large = largest_magnitudes(stream, root, where) > self.threshold
        if not self.frequency:
            return large
        rows = [value.flatten(0, -2).abs() > self.threshold for value in stream.values(root)]
        share: Tensor = sum(part.sum(0) for part in rows) / sum(len(part) for part in rows)  # type: ignore[assignment]
        return share > self.frequency


def _summary(program: Program, groups: Sequence[Group], outliers: dict[str, Tensor]) -> list[str]:
    """How many columns were kept, and where most."""
    counts = [(len(outliers[group.sites[0].node.name]), group) for group in groups]
    kept, total = sum(count for count, _ in counts), sum(group.sites[0].columns for _, group in counts)
    most, where = max(counts, key=lambda item: item[0])
    note = f"{kept} of {total} input columns are outliers and keep their precision"
    if kept:
        label = weight_label(program, where.sites[0])
        note += f"; most at {label}: {most} of {where.sites[0].columns}"
    return [note]


class _Edit:
    """Rewrites linear after linear of one program; linears of one input and the same outliers share its parts."""

    def __init__(self, outliers: dict[str, Tensor]) -> None:
        self.outliers = outliers
        self._inputs: dict[tuple[Node, tuple[int, ...]], tuple[Node, Node | None]] = {}

    def quantize(self, program: Program, site: Linear) -> None:
        columns = self.outliers[site.node.name]
        rounded, kept = self._input(program, site, columns)
        weight = _rounded_weight(program, site, columns)
        arguments = (rounded, weight, site.bias)
        if kept is None:
            replace_call(program, site.node, aten.linear.default, arguments)
            return
        main = insert_call(program, site.node, aten.linear.default, arguments)
        part = insert_call(program, site.node, aten.linear.default, (kept, _kept_weight(program, site, columns)))
        replace_call(program, site.node, aten.add.Tensor, (main, part))

    def _input(self, program: Program, site: Linear, columns: Tensor) -> tuple[Node, Node | None]:
        """(the input without outliers, rounded; its outlier columns or None)."""
        root = peel(site.input)
        key = (root, tuple(columns.tolist()))
        if key not in self._inputs:
            kept, rest = None, root
            if len(columns):
                indices = _part(program, site, "outlier_columns", columns)
                kept = insert_call(program, site.node, aten.index_select.default, (root, -1, indices))
                mask = torch.ones(site.columns, dtype=value_of(root).dtype, device=columns.device)
                mask.index_fill_(0, columns, 0)
                factor = _part(program, site, "inlier_mask", mask)
                rest = insert_call(program, site.node, aten.mul.Tensor, (root, factor))
            self._inputs[key] = (rounded_input(program, site.node, rest, "int8"), kept)
        return self._inputs[key]


def _rounded_weight(program: Program, site: Linear, columns: Tensor) -> Node:
    weight = dequantized_before(program, site)
    if weight is not None:
        return weight
    source = weight_label(program, site)
    values = weight_rows(program, site).index_fill(1, columns, 0.0)
    try:
        codes, scale, _ = quantize_groups(values, 8, 0, True)
    except InputError as error:
        raise InputError(error.what, where=source, why=error.why, remedy=error.remedy) from error
    entry = WeightQuantization(
        method="llm-int8", bits=8, group_size=0, symmetric=True, source=source, activations="int8"
    )
    parts = [weight_part(program, site, "scale", scale), None]
    return place_codes(program, site, codes, parts, entry)


def _kept_weight(program: Program, site: Linear, columns: Tensor) -> Node:
    """The weights [N, n] that meet the outliers, made once per weight."""
    return _part(program, site, "outliers", weight_rows(program, site)[:, columns])


def _part(program: Program, site: Linear, suffix: str, tensor: Tensor) -> Node:
    """A tensor beside a weight, made once, however many linears read the weight."""
    return existing_part(program, site, suffix) or weight_part(program, site, suffix, tensor)
