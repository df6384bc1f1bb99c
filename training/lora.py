"""LoRA adapters by peft, on a plain base or on one in 4-bit NF4 (QLoRA)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from optc.compiler.analysis.module_linears import is_conv1d, linear_shape, model_linears
from optc.compiler.analysis.name_patterns import check_patterns, fits
from optc.compiler.diagnostics import InputError, UsageError, os_errors, unknown_name
from optc.compiler.formats.group_sizes import check_group_size
from optc.training.linears import expert_weights, replace_modules
from optc.training.nf4_linear import Nf4Linear
from optc.training.settings import LoraConfig, named_numbers

ADAPTER = "default"
_MARK = "optc_lora"


def apply_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Freeze a model, in place, and give its linears adapters that start at zero; returns the model.

    Linears are nn.Linear and transformers' Conv1D (GPT-2). In NF4 a Conv1D becomes an `Nf4Linear` that is transposed.
    Parameters that hold the linears of all experts get adapters, a pair of factors per expert, where `targets` names them.

    Args:
        model: a transformers model with its weights in place.

    Raises:
        InputError: no linear to adapt, or a group size that does not divide a K; names the weight.
        NoMatchError: a pattern that no adapted linear fits.
        UsageError: a target or a module to train whole that the model does not have, or peft is not installed.
    """
    if not config.enabled:
        return model
    peft = _peft()
    linears = model_linears(model)
    stacks = list(expert_weights(model))
    targets = _targets(config.targets, linears, stacks)
    experts = [name for name in stacks if name.rpartition(".")[2] in config.targets]
    _check_experts(config, experts)
    adapted = [name for name in linears if name.rpartition(".")[2] in targets]
    transposed = any(is_conv1d(linears[name]) for name in adapted)
    _check_modules_to_save(config.modules_to_save, model, adapted)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        target_parameters=experts or None,
        use_dora=config.dora,
        use_rslora=config.rslora,
        rank_pattern=_pattern("lora.rank_pattern", config.rank_pattern, adapted, whole=True),
        alpha_pattern=_pattern("lora.alpha_pattern", config.alpha_pattern, adapted),
        modules_to_save=list(config.modules_to_save) or None,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    model.requires_grad_(False)
    if config.base == "nf4":
        _round_base(model, linears, config)
    with _shapes_alone(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to True")  # of a transposed layer in NF4
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # what is written is no longer tied
        peft.inject_adapter_in_model(settings, model, ADAPTER)
    settings.fan_in_fan_out = transposed  # peft clears it for those in NF4; what is written is for the model's own
    setattr(model, _MARK, config)
    return model


def _round_base(model: nn.Module, linears: Mapping[str, nn.Module], config: LoraConfig) -> None:
    columns = [linear_shape(linear)[1] for linear in linears.values()]
    check_group_size(config.group_size, columns, [f"{name}.weight" for name in linears])
    made: dict[int, nn.Module] = {
        id(linear): Nf4Linear(linear, f"{name}.weight", config.group_size, config.double_quant)
        for name, linear in linears.items()
    }
    replace_modules(model, made)


def lora_config(model: nn.Module) -> LoraConfig | None:
    """The config that adapters were made with, or None for a model without."""
    found = getattr(model, _MARK, None)
    return found if isinstance(found, LoraConfig) else None


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, peft's layer) of every linear with an adapter."""
    layers = _peft().tuners.lora.layer
    for name, module in model.named_modules():
        if isinstance(module, layers.LoraLayer) and not isinstance(module, layers.ParamWrapper):
            yield name, module


def adapted_experts(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, peft's wrapper of each parameter by its name) of every module that holds experts with adapters."""
    wrapper, seen = _peft().tuners.lora.layer.ParamWrapper, set[int]()
    for name, module in model.named_modules():
        found: dict[str, Any] = {}
        layer: Any = module
        while isinstance(layer, wrapper) and id(layer) not in seen:  # one lies in another
            seen.add(id(layer))
            found[layer.parameter_name] = layer
            layer = layer.base_layer
        if found:
            yield name, found


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model computes as its base does, in eval mode, until the block ends."""
    peft = _peft()
    kinds = (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.ModulesToSaveWrapper)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, kinds)]
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
    """The state dict of the plain model in float32: W + scale * B A, of DoRA with rows of the trained lengths, NF4 bases
    made dense, modules that were trained whole in their place."""
    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))  # with tied tensors as one object
    for name, module in list(model.named_modules()):
        if isinstance(module, Nf4Linear):
            state = _without(state, name) | _dense(name, module)
        elif isinstance(module, _peft().utils.ModulesToSaveWrapper):
            whole = module.modules_to_save[ADAPTER].state_dict(keep_vars=True)
            state = _without(state, name) | {f"{name}.{key}": item for key, item in whole.items()}
    for name, layer in adapted_linears(model):
        base = layer.get_base_layer()
        state = _without(state, name)
        state[f"{name}.weight"] = _merged_weight(layer, base)
        if base.bias is not None:
            state[f"{name}.bias"] = base.bias
    for name, wrappers in adapted_experts(model):
        base = next(iter(wrappers.values())).get_base_layer()
        held = base.state_dict(keep_vars=True)
        for parameter, layer in wrappers.items():
            held[parameter] = held[parameter].float() + layer.get_delta_weight(ADAPTER).float()
        state = _without(state, name) | {f"{name}.{key}": item for key, item in held.items()}
    return state


def _merged_weight(layer: Any, base: Any) -> Tensor:
    """float32, in the layout of the model's own linear: [N, K], or [K, N] of a Conv1D.

    Rows of DoRA are as long as trained, in the direction of W + scale * B A (Liu et al. 2024, equation 5).
    """
    weight: Tensor = base.weight.float() + layer.get_delta_weight(ADAPTER).float()
    if ADAPTER in layer.lora_magnitude_vector:
        inputs = 0 if is_conv1d(base) else 1
        length = layer.lora_magnitude_vector[ADAPTER].weight.float().unsqueeze(inputs)
        weight = weight * (length / weight.norm(dim=inputs, keepdim=True))
    return weight.T if isinstance(base, Nf4Linear) and base.transposed else weight


def write_adapters(model: nn.Module, base: Path, directory: Path) -> None:
    """Write peft's adapter folder: adapter_config.json and adapter_model.safetensors.

    Raises:
        InputError, ResourceError: the disk is full or not writable.
    """
    from safetensors.torch import save

    peft = _peft()
    configs: Any = model.peft_config
    settings = configs[ADAPTER]
    settings.base_model_name_or_path, settings.inference_mode = str(base), True
    state = peft.get_peft_model_state_dict(model, adapter_name=ADAPTER)
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with os_errors("writing the adapters", str(directory)):
        settings.save_pretrained(directory)
        (directory / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError("adapters need peft", why=str(error), remedy="pip install 'optc[train]'") from error
    return peft


@contextmanager
def _shapes_alone(model: nn.Module) -> Iterator[None]:
    """Of a model of fake tensors: peft moves no adapter to its weights' device, as torch cannot swap such parameters, and
    a module that is copied has tensors of its own, not a mode of its own."""
    if not isinstance(next(model.parameters()), FakeTensor):
        yield
        return
    with (
        mock.patch.object(nn.Module, "to", lambda module, *_, **__: module),
        mock.patch.object(FakeTensor, "__deepcopy__", lambda item, _: nn.Parameter(item.clone(), item.requires_grad)),
    ):
        yield


def _targets(wanted: Sequence[str], linears: Mapping[str, nn.Module], stacks: Sequence[str]) -> list[str]:
    """The linears that peft is given: last parts of names.

    Args:
        stacks: parameters of experts, whose last parts may be wanted as well.
    """
    if not linears:
        raise InputError("the model has no linear to adapt", remedy="use a model with nn.Linear modules")
    parts, others = (sorted({name.rpartition(".")[2] for name in names}) for names in (linears, stacks))
    for item in wanted:
        if item not in (*parts, *others):
            raise unknown_name("target of lora.targets", item, sorted({*parts, *others}))
    return [part for part in parts if not wanted or part in wanted]


def _check_experts(config: LoraConfig, experts: Sequence[str]) -> None:
    """Refuse what peft has not for stacked experts."""
    for wrong, key, why in (
        (config.dora, "lora.dora", "lengths of rows are trained of one linear at a time"),
        (config.dropout > 0, "lora.dropout", "their inputs reach the factors as one with the weights"),
    ):
        if wrong and experts:
            raise UsageError(
                f"{key} does not go with adapters on stacked experts",
                where=experts[0],
                why=why,
                remedy=f"leave {key} out, or the experts out of lora.targets",
            )


def _pattern(key: str, texts: tuple[str, ...], adapted: Sequence[str], *, whole: bool = False) -> dict[str, float]:
    """Numbers by what peft looks up: last parts of names as they are, else the names of all linears that fit."""
    given = named_numbers(key, texts, whole=whole)
    check_patterns(key, given, [f"{name}.weight" for name in adapted])
    found: dict[str, float] = {}
    for pattern, value in given.items():
        names = [pattern] if pattern.isidentifier() else [name for name in adapted if fits(f"{name}.weight", pattern)]
        found |= dict.fromkeys(names, value)
    return found


def _check_modules_to_save(wanted: Sequence[str], model: nn.Module, adapted: Sequence[str]) -> None:
    """Refuse modules to train whole that the model does not have, or that have adapters."""
    names = [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]
    for item in wanted:
        fitting = [name for name in names if name == item or name.endswith(f".{item}")]
        if not fitting:
            raise unknown_name(
                "module of lora.modules_to_save", item, sorted({name.rpartition(".")[2] for name in names})
            )
        if inside := next((one for one in adapted if any(f"{one}.".startswith(f"{name}.") for name in fitting)), None):
            raise UsageError(
                f"lora.modules_to_save trains '{inside}' whole, which has an adapter",
                remedy="leave it out there, or name other linears in lora.targets",
            )


def _without(state: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{module}.")}


def _dense(name: str, module: Nf4Linear) -> dict[str, Tensor]:
    bias = {} if module.bias is None else {f"{name}.bias": module.bias}
    return {f"{name}.weight": module.weight.T if module.transposed else module.weight, **bias}
