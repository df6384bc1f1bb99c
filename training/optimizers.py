"""Optimizers over named parameters: AdamW of torch, Lion and Sophia of pytorch_optimizer (extra `train`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from optc.compiler.diagnostics import InputError, UsageError
from optc.training.config import OptimizerConfig

_NEVER = 1 << 62  # Sophia's own estimates are off: they come from `estimate_hessian`


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: those that decay (two axes or more), and norms, biases and scales.

    Raises:
        InputError: nothing is trainable.
    """
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            still = parameter.dim() < 2 or getattr(parameter, "no_weight_decay", False)
            (plain if still else decayed).append(parameter)
    if not decayed and not plain:
        raise InputError("the model has no trainable parameter", remedy="enable lora, or train all weights")
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def optimizer_class(config: OptimizerConfig) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer's class and its options; each group's `lr` is the peak rate.

    Sophia's update is written as lr * clip(m / max(gamma * h, eps), 1) (Liu et al. 2023, algorithm 3); the library
    computes clip(m / max(h, eps), p), which is the same with p = gamma and a rate of lr / gamma.

    Raises:
        UsageError: the extra `train` is not installed.
    """
    if config.name == "adamw":
        options = {"lr": config.lr, "betas": config.betas or (0.9, 0.95), "eps": config.eps, "fused": True}
        return torch.optim.AdamW, options
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise UsageError(
            f"optimizer '{config.name}' needs pytorch_optimizer",
            why=str(error),
            remedy="pip install 'optc[train]'",
        ) from error
    if config.name == "lion":
        return pytorch_optimizer.Lion, {"lr": config.lr, "betas": config.betas or (0.9, 0.99)}
    options = {
        "lr": config.lr / config.gamma,
        "betas": config.betas or (0.965, 0.99),
        "p": config.gamma,
        "eps": config.eps,
        "update_period": _NEVER,
    }
    return pytorch_optimizer.SophiaH, options


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of one process over the model's trainable parameters.

    Raises:
        InputError, UsageError: nothing to train, or the extra is missing.
    """
    build, options = optimizer_class(config)
    groups = parameter_groups(model, config)
    if config.name == "sophia":  # decay by lr * weight_decay, although the library's rate is larger
        groups = [{**group, "weight_decay": group["weight_decay"] * config.gamma} for group in groups]
    return build(groups, **options)


def counter_device(optimizer: torch.optim.Optimizer, parameter: Tensor) -> torch.device:
    """Where the optimizer wants its counters of steps: a fused one beside the weight, others on the CPU."""
    return parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")


def place_state(optimizer: torch.optim.Optimizer, parameter: Tensor, value: Tensor) -> Tensor:
    """A tensor of a parameter's state on the device where the optimizer wants it; one without axes is a counter."""
    return value.to(parameter.device if value.dim() else counter_device(optimizer, parameter))


def plain_values(group: dict[str, Any]) -> dict[str, int | float | bool]:
    """The numbers and flags of an optimizer's group: what a checkpoint keeps of it."""
    return {key: value for key, value in group.items() if type(value) in (int, float, bool)}


def restore_groups(optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Give the groups of a fresh optimizer the numbers that a checkpoint kept of them (`plain_values`).

    Raises:
        ValueError: they are not those of this optimizer: another number of groups, a value of another kind, another flag,
            or something in place of what is no number.
    """
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(f"{len(groups)} groups of parameters, the optimizer has {len(optimizer.param_groups)}")
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        for key, own in plain_values(group).items():
            value = values.get(key)
            if isinstance(value, bool) != isinstance(own, bool) or not isinstance(value, int | float):
                raise ValueError(f"'{key}' of a group is {value!r}"[:200])
            if isinstance(own, bool) and value is not own:
                raise ValueError(f"'{key}' of a group is {value}, the optimizer's is {own}")
        other = [key for key in values if key in group and key not in plain_values(group)]
        if other or values != plain_values(values):
            raise ValueError(f"a group holds what is no number: {', '.join(other or values)[:200]}")
        group.update(values)


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's rate to a share of its peak, which the group keeps as `peak_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak_lr", group["lr"]) * share


def estimate_hessian(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Hutchinson's estimate of the Hessian's diagonal: z * (H z) for one Gaussian z, in the order of the groups.

    Args:
        loss: the mean loss of a batch; it is computed with attention that can be differentiated twice.
    """
    parameters: Sequence[Tensor] = [item for group in optimizer.param_groups for item in group["params"]]
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
    noise = [torch.randn(item.shape, generator=generator, device=item.device, dtype=item.dtype) for item in parameters]
    product = sum((gradient * z).sum() for gradient, z in zip(gradients, noise, strict=True) if gradient is not None)
    assert isinstance(product, Tensor)
    found = torch.autograd.grad(product, parameters, allow_unused=True)
    return [
        torch.zeros_like(z) if second is None else second.detach() * z for second, z in zip(found, noise, strict=True)
    ]
