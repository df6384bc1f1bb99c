"""Training with products of 8-bit floats: inputs and weights rounded to E4M3, gradients to E5M2, master weights as they are.

The formats and what takes which: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433. Each tensor has one scale,
of its own largest magnitude in each product (dynamic scaling), so nothing is remembered from step to step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from optc.compiler.analysis.name_patterns import check_patterns, fits
from optc.compiler.diagnostics import InputError, TargetError, UsageError
from optc.training.config import TrainConfig
from optc.training.conflicts import refuse_beside
from optc.training.linears import quantizable_linears, replace_modules
from optc.training.settings import Fp8Config

_FORWARD, _BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_STEP = 16
"""What the hardware's products want the sizes of matrices to be multiples of."""
_CAPABILITY = (8, 9)
"""The first generation of NVIDIA GPUs with such products (Ada)."""


class Fp8Linear(nn.Linear):
    """A linear whose three products (output, gradients by input and by weight) are products of 8-bit floats.

    The weight is the model's own parameter in its own type; it is rounded in every forward pass.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        missing = -len(rows) % _STEP  # rows are what the gradient by the weight is summed over
        padded = nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        out: Tensor = _Product.apply(padded, self.weight, dtype)
        out = out[: len(rows)].view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Product(torch.autograd.Function):
    """[T, K] x [N, K] -> [T, N] in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        codes, scale = rounded(x, _FORWARD)
        table, table_scale = rounded(weight, _FORWARD)
        ctx.save_for_backward(codes, scale, table, table_scale)
        ctx.types = x.dtype, weight.dtype
        return _scaled(codes, table.t(), scale, table_scale, dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, table, table_scale = ctx.saved_tensors
        slope, slope_scale = rounded(slopes[0], _BACKWARD)
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            by_x = _scaled(slope, _by_columns(table), slope_scale, table_scale, ctx.types[0])
        if ctx.needs_input_grad[1]:
            by_weight = _scaled(slope.t().contiguous(), _by_columns(codes), slope_scale, scale, ctx.types[1])
        return by_x, by_weight, None


def rounded(x: Tensor, form: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / scale in an 8-bit type, scale float32 []): the largest magnitude becomes the type's largest number.

    A tensor with NaN or infinity has NaN in its codes.
    """
    top = torch.finfo(form).max
    scale = x.detach().abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny * top) / top
    return (x.float() / scale).clamp(-top, top).to(form), scale


def _scaled(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """left [M, K] by rows, times right [K, N] by columns.

    Args:
        fast: sums may be kept in fewer bits, as forward passes bear and gradients do not.
    """
    # Processors without such products take minutes for what float32 does in milliseconds. (Fake tensors stand for a GPU's.)
    if left.device.type == "cpu" and not isinstance(left, FakeTensor):
        return (left.float() @ right.float() * (left_scale * right_scale)).to(dtype)
    return torch._scaled_mm(left, right, scale_a=left_scale, scale_b=right_scale, out_dtype=dtype, use_fast_accum=fast)


def _by_columns(matrix: Tensor) -> Tensor:
    """The same values, each column in one piece of memory."""
    return matrix.t().contiguous().t()


def check_fp8(config: TrainConfig) -> None:
    """Refuse what does not go with products of 8-bit floats, before a weight is read.

    Raises:
        UsageError: names the other key.
    """
    if not config.fp8.enabled:
        return
    if config.precision != "bf16":
        raise UsageError(
            f"precision={config.precision} does not go with fp8.enabled",
            why="outputs of the products are bf16 numbers",
            remedy="set precision=bf16",
        )
    others = (
        (config.lora.enabled, "lora.enabled", "the base is frozen, and adapters are too narrow"),
        (config.qat.enabled, "qat.enabled", "the linears round already"),
        (config.eagle3.enabled, "eagle3.enabled", "the base is frozen"),
        (config.medusa.enabled, "medusa.enabled", "the base is frozen"),
        (config.optimizer.name == "sophia", "optimizer.name=sophia", "it differentiates twice"),
    )
    refuse_beside("fp8.enabled", others)


def apply_fp8(model: nn.Module, config: Fp8Config, device: torch.device) -> tuple[nn.Module, tuple[str, ...]]:
    """Replace the linears of a model, in place, by ones that multiply in 8 bits; returns the model and a note.

    Left alone: the linear that makes the logits, routers of experts, what `ignore` names, and linears whose sizes are no
    multiples of 16, which the note counts.

    Raises:
        TargetError: the GPU has no products of 8-bit floats.
        InputError: no linear is left.
        NoMatchError: an ignore pattern fits nothing.
    """
    if not config.enabled:
        return model, ()
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise TargetError(
            "this GPU has no products of 8-bit floats",
            where=torch.cuda.get_device_name(device),
            remedy="train without fp8.enabled, or on compute capability 8.9 or later (L40, H100, H200)",
        )
    check_patterns("fp8.ignore", config.ignore, [name for name, _ in model.named_parameters(remove_duplicate=False)])
    linears = {
        name: linear
        for name, linear in quantizable_linears(model).items()
        if not any(fits(f"{name}.weight", pattern) for pattern in config.ignore)
    }
    fit = {
        name: item for name, item in linears.items() if not item.in_features % _STEP and not item.out_features % _STEP
    }
    if not fit:
        raise InputError(
            "the model has no linear that can be multiplied in 8 bits",
            where=type(model).__name__,
            why=f"sizes must be multiples of {_STEP}",
            remedy="train without fp8.enabled, or check fp8.ignore",
        )
    replace_modules(model, {id(linear): Fp8Linear(linear) for linear in fit.values()})
    note = f"{len(fit)} linears multiply in E4M3 and E5M2"
    other = len(linears) - len(fit)
    return model, (f"{note}; {other} stay as they are: their sizes are no multiples of {_STEP}" if other else note,)
