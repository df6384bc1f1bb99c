"""Quantization-aware training: linears that round their weights, inputs, keys and values as the compiled program will.

Linears are found by walking the module tree, keys and values where the model calls its attention; no model is named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from optc.compiler.analysis.name_patterns import check_patterns, fits
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.formats.group_sizes import check_group_size
from optc.compiler.formats.layouts import QuantizedWeight, Scheme
from optc.compiler.formats.layouts.key_values import KeyValueScheme
from optc.exporters.hf.fused import FUSED
from optc.passes.quantization.arithmetic.grid import Grid, full_range, search
from optc.training.fake_quantize import fake_quantize_tokens, fake_quantize_weight, storable_scale
from optc.training.kv_rounding import round_keys_and_values
from optc.training.linears import quantizable_linears, replace_modules
from optc.training.lora import lora_config
from optc.training.settings import QatConfig


class FakeQuantizedLinear(nn.Linear):
    """A linear whose weight is rounded in every forward; the weight that the optimizer changes is the unrounded one.

    Attributes:
        scale_log: [N * G], the learned change of the scales, starting at 0; None with min-max scales. One axis, so
            that weight decay leaves it alone as it does norms and biases.
        scale_start, zero: float32 and uint8 [N, G].
    """

    scale_log: nn.Parameter | None
    scale_start: Tensor
    zero: Tensor

    def __init__(self, linear: nn.Linear, config: QatConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.config = linear.weight, linear.bias, config
        self.train(linear.training)
        if config.scales == "minmax":
            self.register_parameter("scale_log", None)
            return
        with torch.no_grad():
            find = search if config.start == "search" else full_range
            grid = find(self.weight.float(), config.bits, config.group_size, config.symmetric)
        self.register_buffer("scale_start", grid.scale)
        self.register_buffer("zero", grid.zero.to(torch.uint8))
        self.scale_log = nn.Parameter(torch.zeros_like(grid.scale).flatten())

    def grid(self) -> Grid:
        """The representable values at present; learned scales carry a gradient."""
        config = self.config
        if self.scale_log is None:
            return full_range(self.weight, config.bits, config.group_size, config.symmetric)
        change = torch.exp(config.scale_rate * self.scale_log.float()).view(self.scale_start.shape)
        scale = storable_scale(self.scale_start * change)
        size = config.group_size or self.in_features
        return Grid(scale, self.zero.float(), config.bits, size, config.symmetric)

    def forward(self, x: Tensor) -> Tensor:
        weight = fake_quantize_weight(self.weight, self.grid())
        if self.config.activations != "none":
            x = fake_quantize_tokens(x, self.config.activations)
        # Autocast casts the rounded weight, as a 16-bit artifact does; without it the types must agree.
        weight = weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """Codes, scales and zero points of the weight as it is now; `dense()` of it is what forward multiplies with."""
        config, grid = self.config, self.grid()
        scheme = Scheme(
            bits=config.bits,
            group_size=config.group_size,
            symmetric=config.symmetric,
            activations="int8" if config.activations == "int8" else "",
        )
        zero = None if config.symmetric else grid.zero.to(torch.uint8)
        return QuantizedWeight(scheme, grid.codes(self.weight.float()).to(torch.uint8), grid.scale, zero)

    def extra_repr(self) -> str:
        config = self.config
        return f"{super().extra_repr()}, bits={config.bits}, group_size={config.group_size}, scales={config.scales}"


def apply_qat(model: nn.Module, config: QatConfig) -> nn.Module:
    """Replace the linears of a model, in place, by ones that fake-quantize; returns the model.

    Left alone: the linear that makes the logits unless `head`, the routers of experts, what `ignore` names. With
    learned scales each replaced linear gets one parameter more; trained weights stay the model's own parameters.

    Args:
        model: a transformers model with its weights in place, float32 master weights.

    Raises:
        InputError: no linear is left to quantize, the group size does not divide a K (names the weight), two
            linears share a weight, or an attention cannot be reached for rounding keys and values.
        UsageError: QAT was applied already, the model has adapters, an ignore pattern fits nothing, or leaves out a part of
            what vLLM computes as one.
    """
    if not config.enabled:
        return model
    if next(quantized_linears(model), None) is not None:
        raise UsageError("the model is already prepared for quantization-aware training", remedy="load it again")
    if lora_config(model) is not None:
        raise UsageError(
            "adapters and quantization-aware training cannot be combined",
            why="QAT trains the weights that LoRA freezes",
            remedy="set lora.enabled=false or qat.enabled=false",
        )
    chosen = _choose(model, config)
    columns = [linear.in_features for linear in chosen.values()]
    check_group_size(config.group_size, columns, [f"{name}.weight" for name in chosen])
    made = {id(linear): FakeQuantizedLinear(linear, config) for linear in chosen.values()}
    replace_modules(model, made)
    if config.kv_cache != "none":
        round_keys_and_values(model, KeyValueScheme(config.kv_cache, config.kv_granularity))
    return model


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, FakeQuantizedLinear]]:
    """(name, module) of every linear that fake-quantizes, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizedLinear):
            yield name, module


def _check_fused(chosen: Collection[str], linears: Collection[str]) -> None:
    """Refuse a choice of which vLLM could not load the trained folder: it computes some linears as one.

    Raises:
        UsageError: one of them is left out, and another is not; names both.
    """
    for name in chosen:
        parent, _, last = name.rpartition(".")
        together = next((names for names in FUSED if last in names), ())
        for other in (f"{parent}.{part}" for part in together):
            if other in linears and other not in chosen:
                raise UsageError(
                    f"vLLM computes {', '.join(together)} as one linear, and qat.ignore leaves out a part of it",
                    where=name,
                    why=f"{other} would stay as it is",
                    remedy=f"qat.ignore=[{', '.join(map(repr, together))}], or none of them",
                )


def _choose(model: Any, config: QatConfig) -> dict[str, nn.Linear]:
    """Linears to replace, by name."""
    linears = quantizable_linears(model, head=config.head)
    check_patterns("qat.ignore", config.ignore, [name for name, _ in model.named_parameters(remove_duplicate=False)])
    chosen: dict[str, nn.Linear] = {}
    owner: dict[int, str] = {}
    for name, linear in linears.items():
        if any(fits(f"{name}.weight", pattern) for pattern in config.ignore):
            continue
        first = owner.setdefault(id(linear.weight), name)
        if first != name:
            raise InputError(
                "two linears share one weight, and a model folder keeps codes for one of them",
                where=f"{first}.weight, {name}.weight",
                remedy=f"leave them out: qat.ignore=['{name}.weight', ...]",
            )
        chosen[name] = linear
    _check_fused(chosen, linears)
    if not chosen:
        raise InputError(
            "the model has no linear to quantize",
            where=type(model).__name__,
            why="no nn.Linear besides those that stay as they are",
            remedy="check qat.ignore, or set qat.head=true",
        )
    return chosen
