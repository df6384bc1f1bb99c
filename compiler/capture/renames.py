"""Tensors that transformers renames, merges or splits while it loads a model: older names, experts one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor


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
