"""Attention over keys and values that were repeated for their query heads, read before they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult, apply_rules


@dataclass(frozen=True, kw_only=True)
class ShareHeads(Pass):
    """SDPA(q [B,H,S,D], repeated k and v, mask)  ->  SDPA(q [B,Hkv,H/Hkv*S,D], k, v, mask)

    For what `fuse-attention` left, as where a static cache has a mask of its own. Query heads that share keys
    become rows of one head, so that keys and values need not be copied for each of them (grouped-query
    attention, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).
    """

    name: ClassVar[str] = "share-heads"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rewrite in a clone of `program`."""
        from optc.passes.fusion.share_heads_rule import SharedHeadsRule

        return apply_rules(program, [SharedHeadsRule()])
