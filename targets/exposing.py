"""Hidden states beside the logits, behind the pass that pages the cache."""

from __future__ import annotations

from optc.compiler.target.options import CompileOptions
from optc.compiler.target.target import Step
from optc.passes.drafting.expose_hidden import ExposeHidden


def exposing_steps(options: CompileOptions) -> list[Step]:
    """The pass, where the request names layers."""
    layers = options.expose_hidden
    return [Step(ExposeHidden(final=False, layers=layers))] if layers else []
