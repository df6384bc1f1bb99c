"""Programs on other devices, and how exact a device's matrix products are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.ir.program import Program


def to_device(program: Program, device: torch.device) -> Program:
    """A program with the same graph on another device: weights are copied, calls that name a device name the new one.

    Passes then run there: calibration of a large model on a GPU, for one.
    """
    moved = program.clone()
    exported = moved.exported
    tables = (exported.state_dict, exported.constants)
    for table in tables:
        for name, value in list(table.items()):
            if isinstance(value, torch.nn.Parameter):
                table[name] = torch.nn.Parameter(value.detach().to(device), requires_grad=False)
            elif isinstance(value, Tensor):
                table[name] = value.to(device)
    for node in exported.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, lambda item: _moved(item, device))
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, lambda item: _moved(item, device))
        _move_meta(node, device)
    return moved.changed()


def _moved(item: object, device: torch.device) -> object:
    return device if isinstance(item, torch.device) else item


def _move_meta(node: Node, device: torch.device) -> None:
    value = node.meta.get("val")
    if value is not None:
        node.meta["val"] = torch.utils._pytree.tree_map_only(Tensor, lambda item: item.to(device), value)


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Let float32 matrix products on CUDA use TF32 (10 bits of mantissa, float32 sums).

    Products of numbers that came from bfloat16 or float16 are exact in it.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
