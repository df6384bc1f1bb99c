"""Programs and checks for passes that keep the meaning of a graph."""

from __future__ import annotations

import functools
from typing import Any

import torch
from families import make_model
from stages import captured
from torch import Tensor

from optc.compiler.capture import capture_model
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult

SHAPES = ((3, 19), (1, 1))


def stir(model: Any) -> Any:
    """Move norm weights and biases away from 0 and 1, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.rand(parameter.shape, generator=generator) - 0.5
    return model


@functools.cache
def stirred(name: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> Program:
    """The stage-0 Program of a tiny family with uneven norm weights; treat it as read-only."""
    if dtype is not torch.float32:
        return capture_model(stir(make_model(name, layers=layers)).to(dtype))
    program = captured(name, layers).clone()
    generator = torch.Generator().manual_seed(1)
    for weight in program.exported.graph_signature.parameters:
        tensor = program.weight(weight)
        if tensor.ndim == 1:
            moved = tensor + torch.rand(tensor.shape, generator=generator) - 0.5
            program.exported.state_dict[weight] = torch.nn.Parameter(moved, requires_grad=False)
    return program


def arguments(program: Program, batch: int, length: int) -> tuple[Tensor, ...]:
    """Random inputs of a captured decoder or encoder; positions do not start at 0."""
    ids = torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(length))
    table = {
        "input_ids": ids,
        "position_ids": torch.arange(length) + 5 * torch.arange(1, batch + 1)[:, None],
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    return tuple(table[spec.role] for spec in program.contract.inputs)


@functools.lru_cache(maxsize=64)
def outputs(program: Program) -> tuple[Tensor, ...]:
    """What a program computes at shapes other than the one it was captured with."""
    return tuple(program(*arguments(program, batch, length)).double() for batch, length in SHAPES)


def difference(before: Program, after: Program) -> float:
    """Largest difference of the outputs over several shapes, as a share of their largest magnitude."""
    worst = 0.0
    for expected, computed in zip(outputs(before), outputs(after), strict=True):
        assert computed.shape == expected.shape
        worst = max(worst, float((computed - expected).abs().max() / expected.abs().max()))
    return worst


def rewritten(rewrite: Pass, program: Program) -> PassResult:
    """Run a pass; the program it was given must stay as it was, the result must be well formed."""
    before = program.fingerprint()
    result = rewrite.run(program, PassContext())
    assert program.fingerprint() == before
    result.program.exported.validate()
    names = set(result.program.weight_names().values())
    assert set(result.program.contract.quantization) <= names
    if result.matched:
        assert set(result.program.contract.sources) <= names
    return result


def count(program: Program, target: Any) -> int:
    """How many calls of an operator a program has."""
    return len(program.calls(target))
