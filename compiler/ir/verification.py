"""Structural verification of a Program: what every stage must satisfy, whoever made it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch._export.verifier import SpecViolationError
from torch.export import ExportedProgram
from torch.fx import Node

from optc.compiler.diagnostics import OptcError
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.weight_table import WeightTable
from optc.compiler.ops.library import find


class Verifiable(Protocol):
    """What is checked of a Program, which reads itself from disk and so is above this file."""

    exported: ExportedProgram
    contract: Contract
    weight_table: WeightTable

    def user_inputs(self) -> list[Node]:
        """Placeholders of the user inputs, in call order."""


class VerificationError(OptcError):
    """A pass left a Program that is not well formed: a bug of the pass."""

    kind = "verification"


def verify_program(program: Verifiable, after: str) -> None:
    """Check graph, signature, weights and contract against each other.

    Raises:
        VerificationError: names the pass (`after`) and what is wrong.
    """
    problems = list(_problems(program))
    if problems:
        raise VerificationError(
            f"the program is malformed after '{after}'",
            where="; ".join(problems[:6]),
            remedy="this is a bug of the pass; report it with --dump-ir",
        )


def _problems(program: Verifiable) -> list[str]:
    found = []
    try:
        program.exported.graph.lint()
        program.exported.validate()
    except (RuntimeError, AssertionError, SpecViolationError) as error:
        found.append(str(error).splitlines()[0])
    contract = program.contract
    inputs = program.user_inputs()
    if len(inputs) != len(contract.inputs):
        found.append(f"{len(inputs)} graph inputs, {len(contract.inputs)} in the contract")
    for node, spec in zip(inputs, contract.inputs, strict=False):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            if str(value.dtype).removeprefix("torch.") != spec.dtype:
                found.append(f"input {spec.name} is {value.dtype}, the contract says {spec.dtype}")
            if value.dim() != len(spec.dims):
                found.append(f"input {spec.name} has {value.dim()} axes, the contract says {len(spec.dims)}")
    outputs = program.exported.graph_signature.user_outputs
    if len(outputs) != len(contract.outputs):
        found.append(f"{len(outputs)} graph outputs, {len(contract.outputs)} in the contract")
    names = set(program.weight_table.names.values())
    found += [
        f"contract.quantization names '{name}', which is not a weight"
        for name in contract.quantization
        if name not in names
    ]
    for placeholder, name in program.weight_table.names.items():
        if name not in program.exported.state_dict and name not in program.exported.constants:
            found.append(f"placeholder {placeholder} reads '{name}', which has no tensor")
    return found + list(_written_weights(program))


def _written_weights(program: Verifiable) -> Iterator[str]:
    """Ops of the dialect that write in place what must stay: a weight is shared by clones and calls."""
    for node in program.exported.graph.nodes:
        spec = find(node.target)
        if spec is None:
            continue
        arguments = [argument.name for argument in spec.op._schema.arguments]
        for name in spec.mutates:
            weight = program.weight_table.names.get(str(node.args[arguments.index(name)]))  # a node prints its name
            if weight is not None:
                yield f"{node.name} writes its {name} into the weight '{weight}'"
