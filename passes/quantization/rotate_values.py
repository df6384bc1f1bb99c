"""v, o  ->  R^T v, o R in each head: what attention averages is held in another basis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optc.compiler.analysis.dataflow import value_readers
from optc.compiler.analysis.linears import Linear, linear_sites
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import set_weight
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.passes.quantization.arithmetic.folding import Fold, trace
from optc.passes.quantization.arithmetic.groups import input_groups, input_readers, weight_label
from optc.passes.quantization.arithmetic.orthogonal import random_rotation, turned
from optc.passes.quantization.arithmetic.scale_pass import read_elsewhere


@dataclass(frozen=True, kw_only=True)
class RotateValues(Pass):
    """v, o  ->  R^T v, o R in each head: what attention averages is held in another basis.

    Attention is linear in its values, so that a rotation of a head's channels passes through it: rows of the linear that
    makes the values are turned, columns of the one that reads the averages back. The outputs stay the same, and outliers
    of single channels are spread over a head: R2 of SpinQuant (Liu et al. 2024, https://arxiv.org/abs/2405.16406), here
    random and not trained.

    Attributes:
        seed: of the random signs.
    """

    name: ClassVar[str] = "rotate-values"

    seed: int = 0

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Turn in a clone of `program`; linears that something else than moves divides from values are misses."""
        found: list[tuple[list[Linear], Fold]] = []
        misses: list[Miss] = []
        groups = input_groups([site for site in linear_sites(program) if site.placeholder is not None])
        for group in groups:
            linears, others = input_readers(program, group.root)
            fold = trace(program, group.root, value_readers(group.root), moves_only=True)
            if not fold.reason and not fold.widths:
                continue  # not behind attention
            reason = fold.reason or _obstacle(program, linears, bool(others), fold)
            if reason and fold.widths:
                misses += [Miss(site.node.name, reason) for site in group.sites]
            elif not reason:
                found.append((linears, fold))
        if not found:
            return PassResult(program, 0, len(misses), tuple(misses))
        edited = program.clone()
        with torch.no_grad():
            for linears, fold in found:
                _turn(edited, linears, fold, random_rotation(fold.widths[0], self.seed))
        return PassResult(edited.changed(), len(found), len(found) + len(misses), tuple(misses))


def _obstacle(program: Program, linears: list[Linear], others: bool, fold: Fold) -> str:
    """Why heads behind a linear cannot be turned, or ''."""
    width = fold.widths[0]
    if len(fold.widths) > 1:
        return "several attentions make its input"
    if others:
        return "something else than linears reads its input"
    heads = fold.labels.reshape(-1, width)
    if not torch.equal(heads, heads[:, :1] + torch.arange(width)) or bool((heads[:, 0] % width).any()):
        return "channels of its heads are not side by side"
    return next(filter(None, (read_elsewhere(program, site, linears) for site in linears)), "")


def _turn(program: Program, linears: list[Linear], fold: Fold, matrix: Tensor) -> None:
    done: set[str] = set()
    for site in linears:
        label = weight_label(program, site)
        if label not in done:
            done.add(label)
            _turn_channels(program, site.placeholder, site.index, -2 if site.transposed else -1, None, matrix)
    for item in fold.divisions:
        places = torch.argsort(item.labels, stable=True)[int((item.labels < 0).sum()) :]
        axis = item.axis - (1 if item.placeholder.meta["val"].dim() == 1 else 2)
        _turn_channels(program, item.placeholder, item.index, axis, places, matrix)


def _turn_channels(
    program: Program, placeholder: object, index: int | None, axis: int, places: Tensor | None, matrix: Tensor
) -> None:
    """Turn the channels `places` (None: all) along an axis (from the end) of a weight, a head's width at a time."""
    name = program.weight_of(placeholder)
    assert name is not None
    old = program.weight(name).detach()
    value = old if index is None else old[index]
    new = value.movedim(axis, -1).clone()
    chosen = torch.arange(new.shape[-1]) if places is None else places
    new[..., chosen] = turned(new[..., chosen].unflatten(-1, (-1, len(matrix))), -1, matrix).flatten(-2)
    new = new.movedim(-1, axis).contiguous()
    if index is not None:
        whole = old.clone()
        whole[index] = new
        new = whole
    set_weight(program, name, new)
