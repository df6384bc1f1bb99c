"""Tensors of the source folder that the trained model has no place for: biases that its config switches off, factors of
adapters, heads for several tokens. They are not trained, and go into the trained folder as they are, which the run says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optc.compiler.capture.renames import renamed_tensors, stored_tensors
from optc.compiler.model_folder.checkpoint import check_folder, has_weights, match_names

_NAMED = 8


def stray_tensors(model: Any, folder: Path) -> tuple[str, ...]:
    """The names of those tensors, in the folder's order; none of a folder without weights.

    Args:
        model: the transformers model that was loaded from the folder, before adapters and fake quantization.

    Raises:
        InputError: the folder cannot be read.
    """
    if not has_weights(folder):
        return ()
    tensors = check_folder(folder).tensors
    state = model.state_dict(keep_vars=True)
    held = {name: tensor.detach() for name, tensor in state.items()}
    known = set(match_names(tensors, {*state, *stored_tensors(model, held)}).values())
    unmatched = set(tensors) - known
    known |= set(renamed_tensors(model, unmatched).values())
    return tuple(name for name in tensors if name not in known)


def strays_note(names: Sequence[str]) -> str:
    """What a run says of them."""
    shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return f"{len(names)} tensor(s) have no place in the model: not trained, and written as they are: {shown}"
