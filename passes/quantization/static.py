"""conv(x, W, b)  ->  conv(dequantize_tensor(quantize_tensor(x)), dequantize(W), dequantize_bias(b)), quantized again"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.convolutions import CONVOLUTIONS, TRANSPOSED, Convolution, convolution_site
from optc.compiler.analysis.dataflow import aten, value_of
from optc.compiler.analysis.linears import Linear
from optc.compiler.analysis.name_patterns import fits
from optc.compiler.calibration.examples import Examples
from optc.compiler.diagnostics import UsageError
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead, insert_call
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.in_place import without_writing
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.compiler.rewriting.weights import prune_contract
from optc.passes.quantization.arithmetic.budgets import STATIC_INT8
from optc.passes.quantization.arithmetic.gated_activations import spell_gates
from optc.passes.quantization.arithmetic.integer_regions import Regions, integer_regions
from optc.passes.quantization.arithmetic.observing import Grid, RangeMethod, grid_of, observed_ranges
from optc.passes.quantization.arithmetic.ranges import calibration_feed
from optc.passes.quantization.arithmetic.selection import Selection, counterpart, select_linears
from optc.passes.quantization.arithmetic.static_weights import StaticWeights

_optc = torch.ops.optc
_PERCENTILE = 99.99
_NO_SITE = "it is transposed, has no batch axis, or its weight is computed"


@dataclass(frozen=True, kw_only=True)
class QuantizeStatic(Pass):
    """conv(x, W, b)  ->  conv(dequantize_tensor(quantize_tensor(x)), dequantize(W), dequantize_bias(b)), quantized again

    Convolutions and linears in integers (Jacob et al. 2018, https://arxiv.org/abs/1712.05877): weights of int8 with a
    scale per output channel, activations of uint8 with one scale and one zero point per tensor, both from calibration
    data. What a convolution gives is rounded too, and so are sums, products and pools between convolutions; a relu in
    front of such a rounding becomes its range, hard-swish and SiLU products of codes. Linears give floating point. Which
    linears: as quantize-rtn.

    Attributes:
        ranges: of activations. mse: those of the least squared error over the calibration data; minmax: all that was
            seen; percentile: all but the farthest values.
        percentile: share of the values that is kept at either end, in percent; 99.99 with ranges=percentile.
        reduce_range: weights of 7 bits, -63 to 63, whose products with 8-bit codes no x86 processor saturates; those of
            8 need VNNI there.
        ignore: patterns (`*.down_proj.*`) of weight names to leave alone.
        head: quantize the linear that makes the logits too.
    """

    name: ClassVar[str] = "quantize-static"
    lossy: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    ranges: RangeMethod = "mse"
    percentile: float | None = None
    reduce_range: bool = False
    ignore: tuple[str, ...] = ()
    head: bool = False

    def __post_init__(self) -> None:
        if self.percentile is not None and self.ranges != "percentile":
            raise UsageError(
                f"percentile has no effect with ranges={self.ranges}", remedy="leave it out, or give ranges=percentile"
            )
        if self.percentile is not None and not 50 < self.percentile <= 100:
            raise UsageError(f"{self.percentile} is no percentile of a range", remedy="give more than 50, at most 100")

    def budget(self, before: Program) -> Budget:
        return STATIC_INT8

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize a clone of `program`.

        Raises:
            InputError: no calibration data, activations or weights that are not finite (the layer is named).
            UsageError: a program that writes into tensors which others read.
            NoMatchError: a pattern of `ignore` matches no weight.
        """
        edited = _values_only(program)
        selection = select_linears(edited, self.ignore, self.head)
        convolutions, misses = self._convolutions(edited)
        linears, others = _in_float32(selection)
        candidates = selection.candidates + len(convolutions) + len(misses)
        misses += [*selection.misses, *others]
        if not convolutions and not linears:
            return PassResult(program, 0, candidates, tuple(misses), selection.notes)
        feed = calibration_feed(self.name, context)
        regions = integer_regions(edited, convolutions, linears)
        grids = self._grids(edited, regions, feed, context.progress or (lambda *_: None))
        _place(edited, regions, grids)
        spell_gates(edited, regions.inner)
        weights = StaticWeights(edited, 63 if self.reduce_range else 127, feed.numel())
        weights.quantize([*convolutions, *(counterpart(edited, site.node) for site in linears)])
        drop_dead(edited)
        notes = (
            *selection.notes,
            _summary(convolutions, linears, regions),
            f"ranges by {self.ranges} over {context.calibration}",
        )
        matched = len(convolutions) + len(linears)
        result = prune_contract(edited.changed())
        return PassResult(result, matched, candidates, tuple(misses), notes, tuple(weights.records))

    def _convolutions(self, program: Program) -> tuple[list[Convolution], list[Miss]]:
        """The convolutions that are quantized, and why others are not."""
        found: list[Convolution] = []
        misses: list[Miss] = []
        for node in program.graph.nodes:
            if node.target not in (*CONVOLUTIONS, *TRANSPOSED):
                continue
            site = convolution_site(program, node)
            reason = _NO_SITE if site is None else self._obstacle(program, site)
            if reason is not None:
                misses.append(Miss(node.name, reason))
            elif site is not None:
                found.append(site)
        return found, misses

    def _obstacle(self, program: Program, site: Convolution) -> str | None:
        name = program.weight_of(site.weight)
        assert name is not None
        pattern = next((item for item in self.ignore if fits(name, item)), None)
        if pattern is not None:
            return f"{name} is ignored ('{pattern}')"
        if len(site.weight.users) > 1:
            return f"{name} is read by others too"
        return None if value_of(site.input).dtype is torch.float32 else _not_float32(site.input)

    def _grids(
        self, program: Program, regions: Regions, feed: Tensor | Examples, progress: Callable[[int, int, str], None]
    ) -> dict[Node, Grid]:
        """The grid of every coded tensor."""
        own = [item for item in regions.coded if item.like is None]
        percentile = self.percentile or _PERCENTILE
        ranges = observed_ranges(program, feed, [item.node for item in own], self.ranges, percentile, progress)
        found = {item.node: grid_of(*ranges[item.node], item.bound) for item in own}
        for item in regions.coded:
            if item.like is not None:
                found[item.node] = found[item.like]
        return found


def _values_only(program: Program) -> Program:
    """A clone in which no call writes into a tensor.

    Raises:
        UsageError: one writes where others read.
    """
    edited = program.clone()
    calls = [node for node in edited.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    for node in (item for item in calls if item.target._schema.is_mutable and item.target is not aten.detach_.default):
        without_writing(edited, node)
    written = [
        node for node in edited.graph.nodes if getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    ]
    if written:
        raise UsageError(
            f"static quantization needs a program of values: {written[0].target} writes into a tensor that others read",
            where=written[0].name,
            remedy="run the pass functionalize in front of it",
        )
    return edited


def _in_float32(selection: Selection) -> tuple[list[Linear], list[Miss]]:
    chosen = [site for site in selection.chosen if value_of(site.input).dtype is torch.float32]
    others = [site for site in selection.chosen if site not in chosen]
    return chosen, [Miss(site.node.name, _not_float32(site.input)) for site in others]


def _not_float32(node: Node) -> str:
    return f"its input is {value_of(node).dtype}: static codes are made of float32"


def _summary(convolutions: list[Convolution], linears: list[Linear], regions: Regions) -> str:
    between: dict[str, int] = {}
    for node in regions.inner:
        between[str(node.target).split(".")[1]] = between.get(str(node.target).split(".")[1], 0) + 1
    told = "".join(f", {count} {name}" for name, count in sorted(between.items()))
    return f"in integers: {len(convolutions)} convolutions, {len(linears)} linears{told}; {len(regions.coded)} tensors in codes"


# -- activations ------------------------------------------------------------------------------


def _place(program: Program, regions: Regions, grids: Mapping[Node, Grid]) -> None:
    """Round every coded tensor, and let its readers read the codes."""
    first = next(node for node in program.graph.nodes if node.op == "call_function")
    outputs = program.exported.graph_signature.output_specs
    for item in regions.coded:
        grid = grids[item.node]
        before = first if item.source.op == "placeholder" else item.source.next
        knobs: dict[str, Any] = {"scale": grid.scale, "zero": grid.zero}
        codes = insert_call(program, before, _optc.quantize_tensor.default, (item.source,), knobs)
        knobs = {**knobs, "dtype": value_of(item.node).dtype}
        value = insert_call(program, before, _optc.dequantize_tensor.default, (codes,), knobs)
        _describe(codes, value, item.source)
        for call, argument in item.readers:
            call.replace_input_with(argument, value)
        if item.everywhere:
            item.node.replace_all_uses_with(value, delete_user_cb=lambda user, codes=codes: user is not codes)
            for spec in outputs:
                if spec.arg.name == item.node.name:
                    spec.arg.name = value.name


def _describe(codes: Node, value: Node, source: Node) -> None:
    """Source lines of what was rounded, where it has some."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        for node in (codes, value):
            node.meta.pop(key, None)
            if key in source.meta:
                node.meta[key] = source.meta[key]
