"""The repeated transformer blocks of a model, read off its module tree: no table of names."""

from __future__ import annotations

from torch import nn

from optc.compiler.diagnostics import UsageError


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The children of the ModuleList or Sequential of same-class modules with the most parameters.

    Nested stacks (experts in a block) lose to the stack that holds them, because that one holds more.
    Class equality is by the type of the children, so a stack of mixed kinds of blocks counts when all
    share a base class other than nn.Module with parameters in each.

    Raises:
        UsageError: no list of at least two such modules.
    """
    best: list[nn.Module] = []
    most = 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        children = list(module)
        if len({type(child) for child in children}) > 1:
            continue
        size = sum(parameter.numel() for child in children for parameter in child.parameters())
        if size > most:
            best, most = children, size
    if not best:
        raise UsageError(
            "the model has no repeated blocks",
            where=type(model).__name__,
            why="no ModuleList of two or more modules of one class holds parameters",
            remedy="use a policy that needs no blocks: checkpointing none, compile scope model, parallel ddp",
        )
    return best
