"""What a run leaves as it is, and says so before its first step.

Tensors of the source folder that the model has no place for: biases that its config switches off, factors of adapters, heads
for several tokens; they go into the trained folder as they are. Experts that a model holds stacked, of what is for linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from optc.compiler.capture.renames import renamed_tensors, stored_tensors
from optc.compiler.model_folder.checkpoint import check_folder, has_weights, match_names
from optc.training.config import TrainConfig
from optc.training.linears import expert_weights
from optc.training.lora import adapted_experts

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


def left_experts(model: nn.Module, config: TrainConfig) -> tuple[str, ...]:
    """What is not done to experts that a model holds stacked: QAT, adapters and NF4 are for `nn.Linear`; a sentence, or none."""
    done = (
        {f"{name}.{parameter}" for name, held in adapted_experts(model) for parameter in held}
        if config.lora.enabled
        else ()
    )
    found = {
        name: count for name, count in expert_weights(model).items() if name.replace(".base_layer", "") not in done
    }
    if config.qat.enabled:
        left = "experts are trained and written unrounded"
    elif config.lora.enabled:
        left = "experts are frozen, without adapters" + (", and not in NF4" if config.lora.base == "nf4" else "")
    else:
        return ()
    if not found:
        return ()
    return (f"{left}: {sum(found.values()):,} weights in {len(found)} tensors, {next(iter(found))} the first",)
