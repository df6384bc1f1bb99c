"""New weights made from old ones, and what the contract says about them."""

from __future__ import annotations

import msgspec
import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import constant, constant_roots, peel, value_of
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight


def as_weight(program: Program, node: Node, dtype: torch.dtype, suffix: str) -> Node:
    """A placeholder for a constant expression in `dtype`: the weight itself, or a new one, folded.

    A new weight is called after the first one that the expression reads, with `_suffix`; equal ones are
    shared.
    """
    node = peel(node)
    if program.weight_of(node) is not None and value_of(node).dtype == dtype:
        return node
    names, value = list(constant_roots(program, node).values()), constant(program, node)
    assert value is not None, f"{node.name} is not a constant"
    value = value.detach().to(dtype)
    stem, number = f"{names[0]}_{suffix}", 0
    while (name := stem if not number else f"{stem}{number}") in program.exported.state_dict:
        if torch.equal(program.weight(name), value):
            found: Node = next(item for item in program.graph.nodes if program.weight_of(item) == name)
            return found
        number += 1
    table = program.contract.sources
    record_weight(program, name, tuple(source for item in names for source in table.get(item, (item,))))
    return add_weight(program, name, value)


def record_weight(
    program: Program, name: str, sources: tuple[str, ...], quantization: WeightQuantization | None = None
) -> None:
    """Note in the contract (of a clone under edit) where a new weight came from."""
    contract = program.contract
    table = dict(contract.quantization)
    if quantization is not None:
        table[name] = quantization
    program.contract = msgspec.structs.replace(
        contract, sources={**contract.sources, name: sources}, quantization=table
    )


def prune_contract(program: Program) -> Program:
    """The program under a contract that speaks only of weights that the graph still reads."""
    names = set(program.weight_names().values())
    contract = program.contract
    return program.with_contract(
        sources={name: source for name, source in contract.sources.items() if name in names},
        quantization={name: entry for name, entry in contract.quantization.items() if name in names},
    )
