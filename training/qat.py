"""Quantization-aware training: linears that round their weights, inputs, keys and values as the compiled program will.

Linears are found by walking the module tree, keys and values where the model calls its attention; no model is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn

from optc.compiler.analysis.name_patterns import check_patterns, fits
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.formats.integer import check_bits, check_group_size
from optc.compiler.formats.layouts import QuantizedWeight, Scheme
from optc.compiler.formats.layouts.key_values import KeyValueScheme
from optc.passes.quantization.arithmetic.grid import Grid, full_range, search
from optc.training.fake_quantize import fake_quantize_tokens, fake_quantize_weight, storable_scale
from optc.training.kv_rounding import round_keys_and_values
from optc.training.linears import quantizable_linears, replace_modules
from optc.training.lora import lora_config


class QatConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is rounded while training, and how its scales are found."""

    enabled: Annotated[bool, Meta(description="Fake quantization of the weights.")] = False
    bits: Annotated[int, Meta(ge=2, le=8, description="QAT: bits per weight; 2, 3, 4 or 8.")] = 4
    group_size: Annotated[
        int, Meta(ge=0, le=1 << 20, description="QAT: weights per scale; 0 is one scale per row.")
    ] = 32
    symmetric: Annotated[bool, Meta(description="Without zero points.")] = True
    scales: Annotated[
        Literal["learned", "minmax"],
        Meta(
            description="learned trains the step sizes with the weights (LSQ; zero points stay); minmax follows the "
            "largest weights of each group in every step."
        ),
    ] = "learned"
    start: Annotated[
        Literal["search", "full"],
        Meta(
            description="Where learned scales begin: search shrinks each group's range to the least squared error, "
            "full takes the largest weight."
        ),
    ] = "search"
    scale_rate: Annotated[
        float,
        Meta(
            gt=0,
            description="Relative change of a learned scale per unit of learning rate: Adam changes scales by about "
            "scale_rate * lr of themselves in a step.",
        ),
    ] = 1.0
    activations: Annotated[
        Literal["none", "int8"],
        Meta(
            description="int8: inputs of quantized linears are rounded, one scale per token (W8A8; needs bits 8, "
            "group_size 0, symmetric)."
        ),
    ] = "none"
    kv_cache: Annotated[
        Literal["none", "int8"],
        Meta(description="int8: rounded keys and values, with scales from the largest magnitudes seen in training."),
    ] = "none"
    kv_granularity: Annotated[Literal["layer", "head"], Meta(description="One KV scale per layer or per head.")] = (
        "head"
    )
    ignore: Annotated[
        tuple[str, ...], Meta(description="Patterns of weight names that stay as they are, such as *.down_proj.*.")
    ] = ()
    head: Annotated[
        bool,
        Meta(
            description="Quantize the linear that makes the logits too; where it is tied, the embedding reads it "
            "unrounded."
        ),
    ] = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group_size(self.group_size, [])
        if not self.scale_rate > 0:
            raise UsageError(f"qat.scale_rate is {self.scale_rate}", remedy="choose a positive rate, such as 1")
        if self.activations != "none" and (self.bits, self.group_size, self.symmetric) != (8, 0, True):
            raise UsageError(
                "rounded activations need symmetric 8-bit weights with one scale per row",
                why="the product of codes is scaled once per token and row",
                remedy="set qat.bits=8 qat.group_size=0 qat.symmetric=true, or qat.activations=none",
            )


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
        UsageError: QAT was applied already, the model has adapters, or an ignore pattern fits nothing.
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
    if not chosen:
        raise InputError(
            "the model has no linear to quantize",
            where=type(model).__name__,
            why="no nn.Linear besides those that stay as they are",
            remedy="check qat.ignore, or set qat.head=true",
        )
    return chosen
