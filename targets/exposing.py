"""What a program gives beside its logits, behind the pass that pages the cache: hidden states, and guesses of heads."""

from __future__ import annotations

from optc.compiler.target.options import CompileOptions
from optc.compiler.target.target import Step
from optc.passes.drafting.expose_hidden import ExposeHidden
from optc.passes.drafting.medusa_heads import AddMedusaHeads


def exposing_steps(options: CompileOptions) -> list[Step]:
    """The passes, where the request names layers or heads."""
    steps = []
    if options.expose_hidden:
        steps.append(Step(ExposeHidden(final=False, layers=options.expose_hidden)))
    if options.medusa is not None:
        steps.append(Step(AddMedusaHeads(folder=str(options.medusa), weights=options.medusa_weights)))
    return steps
