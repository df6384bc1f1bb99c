"""Tensors that transformers renames while it loads a model: older names, and those of other libraries."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


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
