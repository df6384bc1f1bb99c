"""embed -> norm -> linear -> add  ->  the same with every vector x of the residual stream held as x R, R orthogonal"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.ir.program import Program
from optc.compiler.ir.provenance import module_path
from optc.compiler.ir.surgery import add_weight, drop_dead, set_weight
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.compiler.rewriting.weights import record_weight
from optc.passes.quantization.arithmetic.orthogonal import random_rotation, turned
from optc.passes.quantization.arithmetic.residual import BlockedError, Residual, Turn, find_residual, scale_value


@dataclass(frozen=True, kw_only=True)
class RotateResidual(Pass):
    """embed -> norm -> linear -> add  ->  the same with every vector x of the residual stream held as x R, R orthogonal

    The outputs stay the same, and so does the graph: weights of norms move into the linears behind them, embedding, head
    and linears are turned. Outliers of single channels are spread over all of them, so that weights and activations are
    easier to round: R1 of SpinQuant (Liu et al. 2024, https://arxiv.org/abs/2405.16406), and as there and in QuaRot
    (Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456) a random Hadamard matrix. An embedding that is the head too
    becomes two weights, since the last norm's weight goes into the head alone.

    Attributes:
        seed: of the random signs.
    """

    name: ClassVar[str] = "rotate-residual"

    seed: int = 0

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Turn a clone of `program`; a model whose stream cannot be turned is a miss with the reason."""
        try:
            residual = find_residual(program)
        except BlockedError as blocked:
            return PassResult(program, 0, 1, (Miss(blocked.node.name, str(blocked)),))
        edited = program.clone()
        drop_dead(edited)  # the name of a tied weight that no call reads is free then
        nodes = {node.name: node for node in edited.graph.nodes}
        matrix = random_rotation(residual.channels, self.seed)
        split: list[str] = []
        with torch.no_grad():
            values = _scales(program, residual)
            for weight, calls in residual.turns.items():
                split += _turn_weight(edited, nodes, weight, calls, matrix, values)
            for root, neutral in residual.scales.items():
                name = _name(edited, root)
                set_weight(edited, name, torch.full_like(edited.weight(name).detach(), neutral))
        notes = [
            f"a residual stream of {residual.channels} channels; {len(residual.scales)} weights of norms are 1 now"
        ]
        notes += [f"{name} has values of its own now: it was tied" for name in split]
        count = len(residual.turns)
        return PassResult(edited.changed(), count, count, (), tuple(notes))


def _scales(program: Program, residual: Residual) -> dict[Node | None, Tensor | None]:
    """The weights of the norms as they are before anything is turned."""
    found = {turn.scale for calls in residual.turns.values() for turns in calls.values() for turn in turns}
    return {item: None if item is None else scale_value(program, item) for item in found}


def _turn_weight(
    program: Program,
    nodes: dict[str, Node],
    weight: Node,
    calls: dict[Node, tuple[Turn, ...]],
    matrix: Tensor,
    scales: dict[Node | None, Tensor | None],
) -> list[str]:
    """Turn a weight as its readers want it; those that want it otherwise get one of their own, whose name is returned."""
    name = _name(program, weight)
    old = program.weight(name).detach()
    made: dict[tuple[Turn, ...], Node | None] = {}
    new_names = []
    # The call of the module that the weight is named after keeps it.
    for call in sorted(calls, key=lambda item: f"{module_path(item)}.weight" != name):
        wanted = calls[call]
        if wanted not in made:
            value = old
            for turn in wanted:
                value = turned(value, turn.axis, matrix, scales[turn.scale])
            if not made:
                set_weight(program, name, value)
                made[wanted] = None
            else:
                new = _free_name(program, f"{module_path(call)}.weight" if module_path(call) else f"{name}_turned")
                record_weight(program, new, program.contract.sources.get(name, (name,)))
                made[wanted] = add_weight(program, new, value)
                new_names.append(new)
        own = made[wanted]
        if own is not None:
            nodes[call.name].replace_input_with(nodes[weight.name], own)
    return new_names


def _free_name(program: Program, name: str) -> str:
    while name in program.exported.state_dict:
        name += "_turned"
    return name


def _name(program: Program, placeholder: Node) -> str:
    name = program.weight_of(placeholder)
    assert name is not None
    return name
