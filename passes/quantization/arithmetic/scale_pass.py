"""What the passes that move scales share: find the groups, choose scales, fold them, say why not."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optc.compiler.analysis.dataflow import value_readers
from optc.compiler.analysis.linears import Linear
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.passes.quantization.arithmetic.folding import Fold, trace
from optc.passes.quantization.arithmetic.groups import Group, input_groups, input_readers, weight_label
from optc.passes.quantization.arithmetic.ranges import calibration_feed
from optc.passes.quantization.arithmetic.scaling import apply_scales
from optc.passes.quantization.arithmetic.selection import Selection, select_linears
from optc.passes.quantization.arithmetic.stream import Stream


@dataclass(frozen=True, kw_only=True)
class ScalePass(Pass):
    """Base of passes that divide the input of linears by a scale per channel and multiply their weights by it.

    The outputs stay the same; only the numbers that will be rounded change.

    Attributes:
        ignore, head: as the quantization that follows has them: only linears that it rounds matter.
        samples: calibration sequences that are read, at most; 0 is all.
    """

    calibrated: ClassVar[bool] = True

    ignore: tuple[str, ...] = ()
    head: bool = False
    samples: int = 0

    @abstractmethod
    def choose(self, program: Program, stream: Stream, group: Group, fold: Fold, selection: Selection) -> Tensor:
        """Scales [fold.free] for the input of a group of the selection, which `stream` holds."""

    def select(self, program: Program) -> Selection:
        """The linears that the quantization which follows rounds."""
        return select_linears(program, self.ignore, self.head)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Scale in a clone of `program`; a group whose input cannot be divided is a miss with the reason.

        Raises:
            InputError: no calibration tokens, or activations that are not finite.
        """
        selection = self.select(program)
        if not selection.chosen:
            return PassResult(program, 0, len(selection.misses), selection.misses, selection.notes)
        tokens = calibration_feed(self.name, context)
        groups = input_groups(selection.chosen)
        stream = Stream(program, tokens[: self.samples or None])
        found: list[tuple[list[Linear], Fold, Tensor]] = []
        misses: list[Miss] = []
        with torch.no_grad():
            for number, group in enumerate(groups):
                if context.progress:
                    context.progress(number, len(groups), weight_label(program, group.sites[0]))
                linears, fold = foldable(program, group)
                if fold.reason:
                    misses += [Miss(site.node.name, fold.reason) for site in group.sites]
                    continue
                stream.advance(group.root)
                found.append((linears, fold, self.choose(program, stream, group, fold, selection)))
        return self._fold(program, found, misses, len(groups))

    def _fold(
        self,
        program: Program,
        found: list[tuple[list[Linear], Fold, Tensor]],
        misses: list[Miss],
        groups: int,
    ) -> PassResult:
        if not found:
            return PassResult(program, 0, groups, tuple(misses))
        edited = program.clone()
        for linears, fold, scales in found:
            apply_scales(edited, linears, fold, scales)
        moved = sum(bool((scales != 1).any()) for _, _, scales in found)
        note = f"{len(found)} of {groups} inputs can be scaled; {moved} gain from it"
        return PassResult(edited.changed(), len(found), groups, tuple(misses), (note,))


def foldable(program: Program, group: Group) -> tuple[list[Linear], Fold]:
    """All linears that read a group's input, and how that input can be divided (or the reason why not)."""
    linears, others = input_readers(program, group.root)
    # Each reader is a linear or leads to linears only: `input_readers` sees to it.
    fold = trace(program, group.root, value_readers(group.root))
    if fold.reason:
        return linears, fold
    if others:
        fold.reason = f"{others[0].name} ({others[0].target}) reads the input too"
        return linears, fold
    for site in linears:
        shared = read_elsewhere(program, site, linears)
        if shared:
            fold.reason = shared
    return linears, fold


def read_elsewhere(program: Program, site: Linear, linears: Sequence[Linear]) -> str:
    """Who else reads the weight of a linear than these linears, as a reason to leave it alone, or ''."""
    placeholder = site.placeholder
    assert placeholder is not None
    known = {item.node for item in linears}
    for user in value_readers(placeholder):
        calls = value_readers(user) if site.index is not None else [user]
        if site.index is not None and user is not site.weight:
            continue  # another expert
        for call in calls:
            if call not in known:
                return f"{program.weight_of(placeholder)} is read by {call.name} ({call.target}) too"
    return ""
