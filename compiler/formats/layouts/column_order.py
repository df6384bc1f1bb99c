"""GPTQ's act-order: groups of columns that were quantized one after another, and lie all over the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.formats.layouts.config import ConfigReader
from optc.compiler.formats.layouts.tensors import TensorReader


def column_order(
    config: ConfigReader, reader: TensorReader, name: str, columns: int, size: int, *, unused: int | None = None
) -> Tensor | None:
    """The order of columns in which groups are neighbours, int64 [K]; None where they are in order already.

    Args:
        name: of the tensor [K] that holds the group of each column. size: columns of a group.
        unused: what the tensor holds everywhere where the layout means that it says nothing.

    Raises:
        InputError: the tensor has another shape, or a group has more columns or fewer.
    """
    groups = reader.read(name, torch.int32, torch.int64).long()
    if groups.shape != (columns,):
        raise reader.wrong_shape(name, f"found {list(groups.shape)}, expected {[columns]}")
    neighbours = torch.arange(columns, device=groups.device) // size
    if torch.equal(groups, neighbours) or (unused is not None and bool((groups == unused).all())):
        return None
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], neighbours):
        raise config.refusal(f"'{name}' spreads the groups over the columns, and not every group has {size} columns")
    return order
