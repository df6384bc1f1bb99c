"""Biases that grow along the keys (ALiBi; Press et al., 2022): what a graph adds to scores, read as a slope per head.

A softmax does not see what is the same for all keys of a query, so that slope * k, slope * (k - q) and
slope * (k - T + 1) are one bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import SHAPE_ONLY, Sizes, aten, evaluate, inputs_of, is_tensor, leaves, value_of
from optc.compiler.analysis.masks.elements import UnprovenError, shape_of
from optc.compiler.ir.lazy_weights import materialized
from optc.compiler.ir.program import Program

_ROWS, _LENGTHS = 2, (7, 12)
"""Rows, and numbers of tokens, for which a bias is computed."""
_TOLERANCE = 1e-5
"""Largest difference from a straight line, as a share of the largest bias."""


def is_per_key(node: Node) -> bool:
    """Whether a tensor that is added to scores [..., S, T] says the same to every query."""
    shape = value_of(node).shape
    return len(shape) > 1 and shape[-2] == 1 and value_of(node).is_floating_point()


def slopes(program: Program, bias: Node, heads: int) -> Tensor:
    """What each head adds to a score per position of its key, float64 [H].

    Args:
        bias: [B or 1, H or 1, 1, T], with the first axis or the first two missing, or [B * H, 1, T], made of sizes and
            weights alone. It is computed at two lengths.

    Raises:
        UnprovenError: it depends on what the program is given, or is no straight line along the keys.
    """
    values = _known(program, bias)
    found = [_line(_at_length(program, bias, values, length, heads), bias) for length in _LENGTHS]
    if not torch.allclose(found[0], found[1], rtol=_TOLERANCE, atol=0.0):
        raise UnprovenError(f"{bias.name} adds a bias whose slope depends on the number of keys")
    return found[0].expand(heads)


def _known(program: Program, bias: Node) -> dict[Node, Any]:
    """The values of the weights behind a bias; tensors of which only the shape is read are left open."""
    values: dict[Node, Any] = {}
    stack, seen = [bias], set[Node]()
    while stack:
        node = stack.pop()
        if node in seen or not is_tensor(node) or node.target in SHAPE_ONLY:
            continue
        seen.add(node)
        name = program.weight_of(node)
        if name is not None:
            values[node] = materialized(program.weight(name))
        elif node.op == "placeholder":
            raise UnprovenError(f"{bias.name} adds to the scores what depends on {node.name}, an input")
        else:
            stack += inputs_of(node)
    return values


def _at_length(program: Program, bias: Node, values: dict[Node, Any], length: int, heads: int) -> Tensor:
    """The bias of two rows of `length` tokens, [2 or 1, H or 1, T]."""
    ids = program.user_inputs()[0]
    sizes, shape = Sizes(), shape_of(ids)
    sizes.numbers.update({size: count for size, count in zip(shape, (_ROWS, length), strict=True) if size.is_Symbol})
    shapes = {node: torch.zeros(sizes.shape(node)) for node in program.user_inputs()}
    made: Tensor = evaluate(bias, {**shapes, **values}, sizes).double().squeeze(-2)
    if made.dim() == 2 and made.shape[0] == _ROWS * heads:
        made = made.unflatten(0, (_ROWS, heads))
    return made.reshape(-1, made.shape[-2] if made.dim() > 1 else 1, made.shape[-1])


def _line(bias: Tensor, node: Node) -> Tensor:
    """The slope [H or 1] of biases [B or 1, H or 1, T]."""
    steps = (bias[0, :, -1] - bias[0, :, 0]) / (bias.shape[2] - 1)
    straight = bias[:1, :, :1] + steps[:, None] * torch.arange(bias.shape[2])
    if not float((bias - straight).abs().max()) <= _TOLERANCE * float(bias.abs().max()):
        raise UnprovenError(f"{node.name} adds a bias to the scores that does not grow along the keys")
    return steps


def keys_hold_positions(program: Program, call: Node) -> bool:
    """Whether the last features of an attention's keys are positions (see passes/fusion/position_bias.py).

    They count on with the text, so that no scale of codes that was measured on one text covers another.
    """
    index = program.contract.input_index("position_ids")
    keys = call.args[1]
    if index is None or not isinstance(keys, Node) or keys.target is not aten.cat.default:
        return False
    parts = keys.args[0]
    assert isinstance(parts, list | tuple)
    behind = leaves(parts[-1], lambda node: True)
    return [node for node in behind if program.weight_of(node) is None] == [program.user_inputs()[index]]
