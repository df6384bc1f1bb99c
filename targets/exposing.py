"""What a program gives beside its logits, behind the pass that pages the cache: hidden states, and guesses of heads."""

from __future__ import annotations

from optc.compiler.target.options import CompileOptions
from optc.compiler.target.target import Step
from optc.passes.drafting.choose_draft_tree import ChooseDraftTree
from optc.passes.drafting.expose_hidden import ExposeHidden
from optc.passes.drafting.medusa_heads import AddMedusaHeads

_RANKS = 8
"""Guesses of each head among which a tree is chosen; the paper looks at ten."""


def exposing_steps(options: CompileOptions, tree: int = 0) -> list[Step]:
    """The passes, where the request names layers or heads.

    Args:
        tree: guesses of the tree that heads draft; 0 is a chain.
    """
    steps = []
    if options.expose_hidden:
        steps.append(Step(ExposeHidden(final=False, layers=options.expose_hidden)))
    if options.medusa is not None:
        ranks = _RANKS if tree else 1
        steps.append(Step(AddMedusaHeads(folder=str(options.medusa), weights=options.medusa_weights, ranks=ranks)))
        steps += [Step(ChooseDraftTree(size=tree, ranks=ranks))] if tree else []
    return steps
