"""softmax(q k^T * scale + mask) v  ->  attention(q, k, v, causal, window, key padding)"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from optc.compiler.analysis.attention_calls import SDPA, SOFTMAXES
from optc.compiler.capture.facts import attention_layers
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult, apply_rules
from optc.compiler.rewriting.weights import prune_contract


def spells_attention(program: Program) -> bool:
    """Whether a program holds what `FuseAttention` begins from; decoders are captured with their attention whole."""
    return any(node.target is SDPA or node.target in SOFTMAXES for node in program.graph.nodes)


@dataclass(frozen=True, kw_only=True)
class FuseAttention(Pass):
    """softmax(q k^T * scale + mask) v  ->  attention(q, k, v, causal, window, key padding)

    Finds `scaled_dot_product_attention`, and attention spelled out with matmul, bmm or einsum around a
    softmax, with scale, softcap, casts and masks. A mask is dropped only when it is proved to be
    causal, a window, key padding or a conjunction of these (`compiler.mask_proof`); keys and values
    that were repeated for grouped-query attention are read before the repetition. A bias that grows along
    the keys (ALiBi) becomes a feature of queries and keys (see passes/fusion/position_bias.py).
    """

    name: ClassVar[str] = "fuse-attention"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fuse in a clone of `program`, and record the layers' facts in its contract."""
        from optc.passes.fusion.attention_rule import AttentionRule

        result = apply_rules(program, [AttentionRule()])
        if not result.matched:
            return result
        edited = prune_contract(result.program)
        edited = edited.with_contract(layers=attention_layers(edited.exported))
        return dataclasses.replace(result, program=edited)
