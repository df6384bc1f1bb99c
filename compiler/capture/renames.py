"""Tensors that transformers renames, merges or splits while it loads a model: older names, experts one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertRows:
    """Rows of one expert of a stacked weight [E, N, K] that a checkpoint keeps as a tensor of its own.

    Attributes:
        weight: name in the model. expert: its number. start, stop: the rows.
    """

    weight: str
    expert: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """The rows of the stacked weight, or of whatever else has its first two axes."""
        return tensor[self.expert, self.start : self.stop]


def expert_rows(model: Any, state: Mapping[str, Tensor]) -> dict[str, ExpertRows]:
    """Name in the checkpoint -> its rows of a stacked weight, of experts that transformers stacks while it loads a model.

    Found by its own conversion of numbered rows, in reverse: no table of layouts is kept here. Experts that the
    checkpoint stacks too, or transposes, are not among them.

    Args:
        model: a transformers model, perhaps of shapes alone; `state` its state.
    """
    from transformers.core_model_loading import revert_weight_conversion

    stacks = {name: tensor.shape for name, tensor in state.items() if tensor.dim() == 3}
    if not stacks:
        return {}
    marks = {name: _numbered(count, rows) for name, (count, rows, _) in stacks.items()}
    names, found = list(stacks), {}
    columns = {
        name: torch.stack([mark, torch.full_like(mark, number)], -1)
        for number, (name, mark) in enumerate(marks.items())
    }
    marked: dict[str, Tensor] = revert_weight_conversion(model, columns)
    for name, tensor in marked.items():
        if tensor.dim() != 2 or tensor.shape[1] != 2:
            continue
        stack = names[int(tensor[0, 1])]
        first, count = int(tensor[0, 0]), len(tensor)
        if torch.equal(tensor[:, 0], torch.arange(first, first + count)):
            rows = int(stacks[stack][1])
            found[name] = ExpertRows(stack, first // rows, first % rows, first % rows + count)
    return found


def _numbered(count: int, rows: int) -> Tensor:
    """The number of each row of each expert."""
    return torch.arange(count * rows).reshape(count, rows)


def stored_tensors(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by the names and in the form of the checkpoint that it was loaded from.

    Of a model that was made from a config: of the checkpoints of its kind.

    Args:
        state: name in the model -> tensor; of what was merged while loading, all or nothing.
    """
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def renamed_tensors(model: Any, unmatched: Collection[str]) -> dict[str, str]:
    """Name in the model -> name in the checkpoint, of tensors that are renamed and otherwise left as they are.

    Tensors that are merged, split or transposed while loading have no single name, and are left out.

    Args:
        model: a transformers model; its state dict has the names after renaming.
        unmatched: names in the checkpoint that the model does not have.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    if not unmatched:
        return {}
    known = set(model.state_dict())
    found = {}
    for name in unmatched:
        current = name
        for step in get_model_conversion_mapping(model) or ():
            current, matched = step.rename_source_key(current)
            if matched is not None and not isinstance(step, WeightRenaming):
                break
        else:
            if current in known:
                found[current] = name
    return found
