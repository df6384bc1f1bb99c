"""Keys and values rounded to 8 bits between the rotary embedding and attention, while training.

transformers looks its attention up by name; a wrapper is registered under a name of its own, which rounds what it is
given and calls the attention that the model had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optc.compiler.diagnostics import InputError
from optc.compiler.formats.layouts.key_values import KeyValueScheme
from optc.compiler.ops.dialect.quantization import FORMATS
from optc.training.fake_quantize import fake_quantize_static

MODULE = "kv_rounding"
"""The child that an attention module gets."""
_PREFIX = "optc-rounded-"


class KVRounding(nn.Module):
    """The scales of one attention's keys and values.

    Attributes:
        key_largest, value_largest: float32 [Hkv, 1, 1] or [1], the largest magnitude seen in training.
    """

    key_largest: Tensor
    value_largest: Tensor

    def __init__(self, scheme: KeyValueScheme, heads: int) -> None:
        super().__init__()
        self.scheme, self.format = scheme, scheme.format
        shape = (1,) if scheme.granularity == "layer" else (heads, 1, 1)
        self.register_buffer("key_largest", torch.zeros(shape))
        self.register_buffer("value_largest", torch.zeros(shape))

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value [B, Hkv, S, D], rounded; in training mode their ranges are noted first."""
        if self.training:
            with torch.no_grad():
                for largest, x in ((self.key_largest, key), (self.value_largest, value)):
                    axes = (0, 2, 3) if largest.dim() == 3 else (0, 1, 2, 3)
                    seen = x.detach().abs().amax(axes).float()
                    largest.copy_(torch.maximum(largest, seen.view(largest.shape)))
        key_scale, value_scale = self.scales()
        return (
            fake_quantize_static(key, key_scale, self.format),
            fake_quantize_static(value, value_scale, self.format),
        )

    def scales(self) -> tuple[Tensor, Tensor]:
        """Scales of keys and of values, of a shape that broadcasts to [B, Hkv, S, D]; 1 where nothing was seen."""
        top = FORMATS[self.format][1]
        key, value = (
            torch.where(largest > 0, largest / top, 1.0) for largest in (self.key_largest, self.value_largest)
        )
        return key, value


def round_keys_and_values(model: Any, scheme: KeyValueScheme) -> None:
    """Give every attention of a transformers model, in place, a `KVRounding`.

    Raises:
        InputError: the model's attention is not one that transformers looks up by name.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    base = model.config._attn_implementation
    if base not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        raise InputError(
            "keys and values cannot be rounded in this model",
            where=type(model).__name__,
            why=f"its attention '{base}' is not one that transformers looks up by name",
            remedy="load it with attn_implementation='sdpa', or set qat.kv_cache=none",
        )
    heads = _key_value_heads(model, base)
    for module, count in heads.items():
        made = KVRounding(scheme, count).to(next(model.parameters()).device)
        module.add_module(MODULE, made.train(module.training))
    name = _PREFIX + base
    AttentionInterface.register(name, _rounded(ALL_ATTENTION_FUNCTIONS[base]))
    masks = AttentionMaskInterface()
    if base in masks:
        AttentionMaskInterface.register(name, masks[base])
    model.config._attn_implementation = name


def kv_roundings(model: nn.Module) -> Iterator[tuple[str, KVRounding]]:
    """(name of the attention module, its rounding), in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, KVRounding):
            yield name.removesuffix(f".{MODULE}"), module


def _rounded(attention: Callable[..., Any]) -> Callable[..., Any]:
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        key, value = getattr(module, MODULE)(key, value)
        return attention(module, query, key, value, *args, **kwargs)

    return attend


def _key_value_heads(model: Any, base: str) -> dict[nn.Module, int]:
    """Attention modules in the order of their calls -> number of their key/value heads, by running four tokens."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: dict[nn.Module, int] = {}
    attention = ALL_ATTENTION_FUNCTIONS[base]

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        found[module] = int(key.shape[1])
        return attention(module, query, key, value, *args, **kwargs)

    name = f"{_PREFIX}probe"
    AttentionInterface.register(name, note)
    masks = AttentionMaskInterface()
    if base in masks:
        AttentionMaskInterface.register(name, masks[base])
    tokens = torch.zeros((1, 4), dtype=torch.long, device=next(model.parameters()).device)
    with _attention(model, name), torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    if not found:
        raise InputError(
            "keys and values cannot be rounded in this model",
            where=type(model).__name__,
            why="it calls no attention that transformers looks up by name",
            remedy="set qat.kv_cache=none",
        )
    return found


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    before, training = model.config._attn_implementation, model.training
    model.config._attn_implementation = name
    model.eval()
    try:
        yield
    finally:
        model.config._attn_implementation = before
        model.train(training)
