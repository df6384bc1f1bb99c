"""Which part of a model a weight belongs to, read off the captured graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from optc.compiler.analysis.linears import head_linear, linear_site, linear_sites
from optc.compiler.analysis.rows import same_elements
from optc.compiler.ir.program import Program

EMBEDDING = torch.ops.aten.embedding.default


@dataclass(frozen=True)
class WeightParts:
    """Source tensors by what reads them; one may be in several sets.

    Attributes:
        embedding: tables that the input's tokens are looked up in.
        head: of the linear that makes the logits. linears: of all others.
    """

    embedding: frozenset[str]
    head: frozenset[str]
    linears: frozenset[str]

    @property
    def tied(self) -> bool:
        """Whether the head reads the table of the tokens."""
        return bool(self.embedding & self.head)


def is_token_lookup(program: Program, node: Node) -> bool:
    """Whether a call looks the input's tokens up in a table: not positions, nor token types."""
    if node.target is not EMBEDDING:
        return False
    index, tokens = program.contract.input_index("input_ids"), node.args[1]
    return index is not None and isinstance(tokens, Node) and same_elements(tokens) is program.user_inputs()[index]


def logits_linear(program: Program) -> Node | None:
    """The linear that makes the logits, or None."""
    return head_linear(program) if any(spec.role == "logits" for spec in program.contract.outputs) else None


def weight_parts(program: Program) -> WeightParts:
    """The parts of a captured program, by the names of the source's tensors."""
    head, sources = logits_linear(program), program.contract.sources
    lookups = (node for node in program.graph.nodes if is_token_lookup(program, node))
    tables = (program.weight_of(node.args[0]) for node in lookups)
    site = None if head is None else linear_site(program, head)
    others = (item for item in linear_sites(program) if item.node is not head)

    def named(*weights: str | None) -> frozenset[str]:
        return frozenset(source for name in weights if name is not None for source in sources.get(name, (name,)))

    return WeightParts(
        embedding=named(*tables),
        head=named(None if site is None else _weight(program, site.placeholder)),
        linears=named(*(_weight(program, item.placeholder) for item in others)),
    )


def part_of(parts: WeightParts, sources: Mapping[str, tuple[str, ...]], name: str) -> str:
    """ "embedding", "head", "linears" or "rest": of a weight of any later stage, by its sources."""
    found = set(sources.get(name, (name,)))
    for part in ("embedding", "head", "linears"):
        if found & getattr(parts, part):
            return part
    return "rest"


def _weight(program: Program, placeholder: Node | None) -> str | None:
    return None if placeholder is None else program.weight_of(placeholder)
