"""LoRA adapters by peft, on a plain base or on one in 4-bit NF4 (QLoRA)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from optc.compiler.diagnostics import InputError, UsageError, os_errors, unknown_name
from optc.compiler.formats.group_sizes import check_group_size
from optc.training.linears import quantizable_linears, replace_modules
from optc.training.nf4_linear import Nf4Linear
from optc.training.settings import LoraConfig

ADAPTER = "default"
_MARK = "optc_lora"


def apply_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Freeze a model, in place, and give its linears adapters that start at zero; returns the model.

    Args:
        model: a transformers model with its weights in place.

    Raises:
        InputError: no linear to adapt, or a group size that does not divide a K; names the weight.
        UsageError: a target that no linear has, or peft is not installed.
    """
    if not config.enabled:
        return model
    peft = _peft()
    linears = quantizable_linears(model)
    targets = _targets(config.targets, linears)
    model.requires_grad_(False)
    if config.base == "nf4":
        columns = [linear.in_features for linear in linears.values()]
        check_group_size(config.group_size, columns, [f"{name}.weight" for name in linears])
        made = {
            id(linear): Nf4Linear(linear, f"{name}.weight", config.group_size, config.double_quant)
            for name, linear in linears.items()
        }
        replace_modules(model, made)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with _shapes_alone(model):
        peft.inject_adapter_in_model(settings, model, ADAPTER)
    setattr(model, _MARK, config)
    return model


def lora_config(model: nn.Module) -> LoraConfig | None:
    """The config that adapters were made with, or None for a model without."""
    found = getattr(model, _MARK, None)
    return found if isinstance(found, LoraConfig) else None


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, peft's layer) of every linear with an adapter."""
    layer = _peft().tuners.lora.LoraLayer
    for name, module in model.named_modules():
        if isinstance(module, layer):
            yield name, module


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model computes as its base does, in eval mode, until the block ends."""
    layers = [module for module in model.modules() if isinstance(module, _peft().tuners.tuners_utils.BaseTunerLayer)]
    assert layers, "the model has adapters"
    training = model.training
    model.eval()
    for layer in layers:
        layer._disable_adapters = True  # the flag alone: enable_adapters also changes what is trained
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        model.train(training)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model: W + (alpha / rank) B A in float32, NF4 bases made dense."""
    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))  # with tied tensors as one object
    for name, module in list(model.named_modules()):
        if isinstance(module, Nf4Linear):
            state = _without(state, name) | _dense(name, module)
    for name, layer in adapted_linears(model):
        base = layer.get_base_layer()
        state = _without(state, name)
        state[f"{name}.weight"] = base.weight.float() + layer.get_delta_weight(ADAPTER).float()
        if base.bias is not None:
            state[f"{name}.bias"] = base.bias
    return state


def write_adapters(model: nn.Module, base: Path, directory: Path) -> None:
    """Write peft's adapter folder: adapter_config.json and adapter_model.safetensors.

    Raises:
        InputError, ResourceError: the disk is full or not writable.
    """
    from safetensors.torch import save_file

    peft = _peft()
    configs: Any = model.peft_config
    settings = configs[ADAPTER]
    settings.base_model_name_or_path, settings.inference_mode = str(base), True
    state = peft.get_peft_model_state_dict(model, adapter_name=ADAPTER)
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with os_errors("writing the adapters", str(directory)):
        settings.save_pretrained(directory)
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError("adapters need peft", why=str(error), remedy="pip install 'optc[train]'") from error
    return peft


@contextmanager
def _shapes_alone(model: nn.Module) -> Iterator[None]:
    """Of a model of fake tensors peft moves no adapter to its weights' device, for torch cannot swap such parameters."""
    if not isinstance(next(model.parameters()), FakeTensor):
        yield
        return
    with mock.patch.object(nn.Module, "to", lambda module, *_, **__: module):
        yield


def _targets(wanted: Sequence[str], linears: dict[str, nn.Linear]) -> list[str]:
    """What peft is given: last parts of names where they are clear, else full names."""
    if not linears:
        raise InputError("the model has no linear to adapt", remedy="use a model with nn.Linear modules")
    parts = sorted({name.rpartition(".")[2] for name in linears})
    for item in wanted:
        if item not in parts:
            raise unknown_name("target of lora.targets", item, parts)
    chosen = [name for name in linears if not wanted or name.rpartition(".")[2] in wanted]
    return sorted({name.rpartition(".")[2] for name in chosen})


def _without(state: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{module}.")}


def _dense(name: str, module: Nf4Linear) -> dict[str, Tensor]:
    bias = {} if module.bias is None else {f"{name}.bias": module.bias}
    return {f"{name}.weight": module.weight, **bias}
