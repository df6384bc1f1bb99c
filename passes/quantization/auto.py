"""linear(x, W)  ->  linear(x, dequantize(codes, scale, zero)), with bits per linear chosen by measured sensitivity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.formats.group_sizes import BITS, GroupSize, check_bits, check_sizes
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.passes.quantization.arithmetic.budgets import weight_budget
from optc.passes.quantization.arithmetic.differentiable import Differentiable
from optc.passes.quantization.arithmetic.grid import search
from optc.passes.quantization.arithmetic.groups import Group, input_groups, weight_label, weight_rows
from optc.passes.quantization.arithmetic.ranges import calibration_tokens
from optc.passes.quantization.arithmetic.selection import select_in_groups, weight_name
from optc.passes.quantization.gptq import QuantizeGptq


@dataclass(frozen=True)
class Choice:
    """Linears of one input, which get the same bits (so that they can be merged).

    Attributes:
        names: of the weights.
        size: number of weights.
        kl: bits -> KL(model || model with only these rounded), nats per token.
    """

    names: tuple[str, ...]
    size: int
    kl: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class QuantizeAuto(Pass):
    """linear(x, W)  ->  linear(x, optc.dequantize(codes, scale, zero, bits=, group_size=)), bits by sensitivity

    The linears of each input are rounded alone, with every number of bits, and the divergence of the model's next
    token is measured on a few calibration sequences. Starting from the fewest bits, bits are added where they lower
    the sum of divergences the most per bit of size, until the budget is used up or the quality is reached; GPTQ then
    rounds with the chosen bits. That divergences of single layers add up is a first-order approximation.

    Attributes:
        average_bits: budget: mean bits per weight, scales not counted.
        max_kl: quality: stop adding bits when the predicted divergence is below it; nats per token.
        choices: bits to choose from.
        group_size, symmetric, ignore, head: as quantize-gptq has them.
        samples: calibration sequences for the sensitivity, at most.
    """

    name: ClassVar[str] = "quantize-auto"
    lossy: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    average_bits: float = 4.0
    max_kl: float = 0.0
    choices: tuple[int, ...] = BITS
    group_size: GroupSize = None
    symmetric: bool = True
    ignore: tuple[str, ...] = ()
    head: bool = False
    samples: int = 4

    def __post_init__(self) -> None:
        check_sizes(self.group_size)
        for bits in self.choices:
            check_bits(bits)
        low, high = min(self.choices), max(self.choices)
        if not low <= self.average_bits <= high:
            raise UsageError(
                f"average_bits {self.average_bits} is out of range",
                remedy=f"use a value from {low} to {high}",
            )

    def budget(self, before: Program) -> Budget:
        """Of the bits that the average comes to; with `max_kl`, of the fewest bits that this divergence may come from."""
        bits = max(item for item in BITS if item <= self.average_bits)
        fewer = [item for item in BITS if item < bits and weight_budget(item).kl >= 3 * self.max_kl]
        return weight_budget(max(fewer, default=min(BITS)) if 3 * self.max_kl > weight_budget(bits).kl else bits)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize a clone of `program`; the notes hold the table of choices.

        Raises:
            InputError: no calibration tokens, a group size that does not divide a K, numbers that are not finite.
        """
        selection = select_in_groups(program, self.ignore, self.head, self.group_size)
        if not selection.chosen:
            return PassResult(program, 0, selection.candidates, selection.misses, selection.notes)
        tokens = calibration_tokens(self.name, context)[: self.samples]
        groups = input_groups(selection.chosen)
        measured = self._measure(program, context, tokens, groups, selection.sizes)
        bits = allocate(measured, sorted(self.choices), self.average_bits, self.max_kl)
        overrides = tuple(
            f"{_literal(name)}={count}" for choice, count in zip(measured, bits, strict=True) for name in choice.names
        )
        gptq = QuantizeGptq(
            bits=min(self.choices),
            group_size=self.group_size,
            symmetric=self.symmetric,
            ignore=self.ignore,
            head=self.head,
            overrides=overrides,
        )
        result = gptq.run(program, context)
        return dataclasses.replace(result, notes=(*result.notes, *_table(measured, bits)))

    def _measure(
        self,
        program: Program,
        context: PassContext,
        tokens: Tensor,
        groups: Sequence[Group],
        sizes: Mapping[str, int],
    ) -> list[Choice]:
        found = []
        with torch.no_grad():
            run = Differentiable(program)
            reference = [run(row[None]).float().log_softmax(-1) for row in tokens]
            for number, group in enumerate(groups):
                if context.progress:
                    context.progress(number, len(groups), "measuring sensitivity")
                kl = {}
                for bits in self.choices:
                    run.weights = self._rounded(program, group, bits, sizes)
                    kl[bits] = _divergence(run, tokens, reference)
                names = tuple(weight_label(program, site) for site in group.sites)
                if not all(math.isfinite(value) for value in kl.values()):
                    raise InputError(
                        "the model's outputs on the calibration text are NaN or infinite",
                        where=names[0],
                        remedy="use --dtype fp32 or bf16",
                    )
                size = sum(weight_rows(program, site).numel() for site in group.sites)
                found.append(Choice(names, size, kl))
        return found

    def _rounded(self, program: Program, group: Group, bits: int, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """The weights of a group on clipped grids, by name, in their own layout."""
        weights: dict[str, Tensor] = {}
        for site in group.sites:
            rows = weight_rows(program, site).float()
            grid = search(rows, bits, sizes[weight_label(program, site)], self.symmetric, steps=8, least=0.65)
            values = grid.values(grid.codes(rows))
            name = weight_name(program, site)
            old = weights.get(name, program.weight(name).detach())
            value = (values.t() if site.transposed else values).to(old.dtype)
            if site.index is not None:
                stacked = old.clone()
                stacked[site.index] = value
                value = stacked
            weights[name] = value
        return weights


def _divergence(run: Differentiable, tokens: Tensor, reference: Sequence[Tensor]) -> float:
    total = 0.0
    for row, known in zip(tokens, reference, strict=True):
        found = run(row[None]).float().log_softmax(-1)
        total += float((known.exp() * (known - found)).sum(-1).double().mean())
    return max(0.0, total / len(tokens))


def allocate(measured: Sequence[Choice], choices: Sequence[int], average: float, max_kl: float) -> list[int]:
    """Bits per choice: upgrades in the order of divergence saved per bit, while the budget lasts.

    Args:
        choices: in rising order.
        average: mean bits per weight that may be used.
        max_kl: no upgrade when the sum of divergences is at most this.
    """
    level = [0] * len(measured)
    budget = average * sum(item.size for item in measured)
    used = float(choices[0] * sum(item.size for item in measured))
    while sum(item.kl[choices[at]] for item, at in zip(measured, level, strict=True)) > max_kl:
        best: tuple[float, int, int] | None = None
        for number, item in enumerate(measured):
            for at in range(level[number] + 1, len(choices)):
                cost = (choices[at] - choices[level[number]]) * item.size
                saved = item.kl[choices[level[number]]] - item.kl[choices[at]]
                if used + cost <= budget + 1e-6 and saved > 0 and (best is None or saved / cost > best[0]):
                    best = (saved / cost, number, at)
        if best is None:
            break
        _, number, at = best
        used += (choices[at] - choices[level[number]]) * measured[number].size
        level[number] = at
    return [choices[at] for at in level]


def _literal(name: str) -> str:
    """A name as a pattern that fits itself alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _table(measured: Sequence[Choice], bits: Sequence[int]) -> list[str]:
    total = sum(item.size for item in measured)
    mean = sum(item.size * count for item, count in zip(measured, bits, strict=True)) / total
    predicted = sum(item.kl[count] for item, count in zip(measured, bits, strict=True))
    rows = [f"{mean:.3f} bits per weight on average, predicted KL {predicted:.4f}"]
    for item, count in zip(measured, bits, strict=True):
        known = ", ".join(f"{option}: {value:.1e}" for option, value in sorted(item.kl.items()))
        more = f" and {len(item.names) - 1} more" if len(item.names) > 1 else ""
        rows.append(f"{count} bits for {item.names[0]}{more} (KL alone at {known})")
    return rows
