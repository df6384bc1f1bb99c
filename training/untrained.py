"""What a run leaves as it is, and says so before its first step.

Tensors of the source folder that the model has no place for: biases that its config switches off, factors of adapters, heads
for several tokens; they go into the trained folder as they are. Experts that a model holds stacked, of what is for linears:
an NF4 base is refused there unless the config says what gets adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from optc.compiler.capture.renames import renamed_tensors, stored_tensors
from optc.compiler.diagnostics import UsageError
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


def check_experts(model: nn.Module, config: TrainConfig) -> None:
    """Refuse QLoRA that reaches a fraction of a model's weights only, where nobody said so.

    Args:
        model: without adapters and fake quantization.

    Raises:
        UsageError: an NF4 base of a model that holds experts stacked, without `lora.targets`.
    """
    if not config.lora.enabled or config.lora.base != "nf4" or config.lora.targets:
        return
    if left := expert_weights(model):
        whole = sum(parameter.numel() for parameter in model.parameters())
        raise UsageError(
            "lora.base=nf4 does not reach experts that a model holds stacked in one tensor",
            where=next(iter(left)),
            why=f"{sum(left.values()):,} of {whole:,} weights would be held dense, without adapters",
            remedy="name in lora.targets what gets adapters, which leaves the experts' base dense; or lora.base=dense",
        )


def left_experts(model: nn.Module, config: TrainConfig) -> tuple[str, ...]:
    """What is not done to experts that a model holds stacked: QAT, adapters and NF4 are for `nn.Linear`; sentences, or none."""
    whole = {name.replace(".base_layer", ""): count for name, count in expert_weights(model).items()}
    if config.qat.enabled:
        return _said("experts are trained and written unrounded", whole)
    if not config.lora.enabled:
        return ()
    done = {f"{name}.{parameter}" for name, held in adapted_experts(model) for parameter in held}
    adapted = {name: count for name, count in whole.items() if name in done}
    left = {name: count for name, count in whole.items() if name not in done}
    if config.lora.base != "nf4":
        return _said("experts are frozen, without adapters", left)
    return (
        *_said("experts are frozen, without adapters, and not in NF4", left),
        *_said("experts have adapters on a base that is not in NF4", adapted),
    )


def _said(what: str, found: Mapping[str, int]) -> tuple[str, ...]:
    if not found:
        return ()
    return (f"{what}: {sum(found.values()):,} weights in {len(found)} tensors, {next(iter(found))} the first",)
