"""Keys and values before they were repeated for the query heads of their group."""

from __future__ import annotations

import torch
from torch.fx import Node

from optc.compiler.analysis.aliases import Storage
from optc.compiler.analysis.attention_products import Operand
from optc.compiler.analysis.dataflow import COPIES, MOVES, Sizes, aten, evaluate, is_tensor
from optc.compiler.analysis.masks.elements import shape_of

_REARRANGEMENTS = (MOVES | COPIES | {aten.repeat.default}) - {
    aten.cat.default,
    aten.stack.default,
    aten.dropout.default,
}


def before_repeat(storage: Storage, operand: Operand, result: Node) -> Operand:
    """[B, Hkv, T, D] that `operand` [B, H, T, D] repeats, head by head, H / Hkv times; or `operand`.

    Args:
        storage: of the graph.
        result: what is computed of it: nothing may be written in between.
    """
    node, reader = operand.node, result
    while operand.plain and storage.overwritten(node, reader) is None:
        if node.target not in _REARRANGEMENTS or not is_tensor(node.args[0]):
            break
        reader, source = node, node.args[0]
        assert isinstance(source, Node)
        node = source
        if _repeats(node, operand.node) and storage.overwritten(node, result) is None:
            return Operand(node, operand.axes)
    return operand


def _repeats(source: Node, node: Node) -> bool:
    """Whether `node` [B, H, T, D], made from `source` [B, Hkv, T, D] by rearranging, repeats each head.

    The moves in between are run on distinct numbers at small sizes: what they do does not depend on
    the values, and the shapes are compared as they are.
    """
    few, many = shape_of(source), shape_of(node)
    if len(few) != 4 or len(many) != 4 or (few[0], *few[2:]) != (many[0], *many[2:]):
        return False
    if not few[1].is_Integer or not many[1].is_Integer:
        return False
    groups, rest = divmod(int(many[1]), int(few[1]))
    if rest or groups < 2:
        return False
    sizes = Sizes()
    shape = sizes.shape(source)
    probe = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return torch.equal(evaluate(node, {source: probe}, sizes), probe.repeat_interleave(groups, 1))
