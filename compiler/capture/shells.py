"""Forwards over transformers models that take tensors and give one: what torch.export sees of a model."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from optc.compiler.capture.embedding import EmbeddingHead
from optc.compiler.diagnostics import CaptureError


class _Shell(torch.nn.Module):
    """A forward of our own over a model, without a level of its own in the parameter names."""

    _inner: Any

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_inner", model)
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = model.training


class DecoderShell(_Shell):
    """Token ids and positions counted from 0, [B, S], to logits; `offset` is what the model counts from."""

    _offset: int

    def __init__(self, model: torch.nn.Module, offset: int) -> None:
        super().__init__(model)
        object.__setattr__(self, "_offset", offset)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        more = {}
        if takes_positions(self._inner):
            more["position_ids"] = position_ids + self._offset if self._offset else position_ids
        out = self._inner(input_ids=input_ids, use_cache=False, return_dict=True, **more)
        return out.logits


class EncoderShell(_Shell):
    """Token ids and mask [B, S] to logits, or to hidden states where the model has none."""

    _answer: SimpleNamespace  # what the forward learns of the model: whether it calls its answer logits

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        object.__setattr__(self, "_answer", SimpleNamespace(is_logits=False))

    @property
    def answers_logits(self) -> bool:
        """Whether its forward, once called, found that the model gives logits."""
        return bool(self._answer.is_logits)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        more: dict[str, Any] = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if "use_cache" in inspect.signature(self._inner.forward).parameters:  # a decoder without its head
            more["use_cache"] = False
        out = self._inner(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **more)
        self._answer.is_logits = hasattr(out, "logits")
        if not self._answer.is_logits and "last_hidden_state" not in out and len(out) > 1:
            raise CaptureError(
                f"the model has several outputs: {', '.join(out)}",
                where=type(self._inner).__name__,
                why="an encoder is captured with one: logits, or hidden states",
                remedy="optc.capture(module, (tensor, ...)) with a module around the model takes any number of outputs",
            )
        return out.logits if self._answer.is_logits else out[0]


_HEAD = "embedding_head"


class EmbedderShell(EncoderShell):
    """An encoder with what makes embeddings behind it, whose weights are its own."""

    def __init__(self, model: torch.nn.Module, head: EmbeddingHead) -> None:
        super().__init__(model)
        self._modules = {**model._modules, _HEAD: head}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        hidden = super().forward(input_ids, attention_mask, token_type_ids)
        found: Tensor = self._modules[_HEAD](hidden, attention_mask)  # type: ignore[misc]
        return found


def takes_positions(model: torch.nn.Module) -> bool:
    """Whether a model can be told the positions of its tokens."""
    return "position_ids" in inspect.signature(model.forward).parameters
