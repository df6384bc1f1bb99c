"""Forwards over transformers models that take tensors and give one: what torch.export sees of a model."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from optc.compiler.capture.embedding import EmbeddingHead


class Shell(torch.nn.Module):
    """A forward of our own over a model, without a level of its own in the parameter names."""

    _inner: Any

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_inner", model)
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = model.training


class DecoderShell(Shell):
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


class AnsweringShell(Shell):
    """A forward that gives tensors under the model's own names for them."""

    _answer: SimpleNamespace  # what the forward learns of the model: the names of its answers

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        object.__setattr__(self, "_answer", SimpleNamespace(names=()))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the answers, once the forward was called."""
        names: tuple[str, ...] = self._answer.names
        return names

    def _named(self, found: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The tensors, whose names are kept."""
        self._answer.names = tuple(found)
        return tuple(found.values())


class EncoderShell(AnsweringShell):
    """Token ids and mask [B, S] to what a model answers; see `answers`."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        more: dict[str, Any] = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if "use_cache" in inspect.signature(self._inner.forward).parameters:  # a decoder without its head
            more["use_cache"] = False
        out = self._inner(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **more)
        found = self._named(answers(out))
        return found[0] if len(found) == 1 else found


def answers(out: Any) -> dict[str, Tensor]:
    """What is taken of the output of an encoder, under transformers' names: `logits` of a head with one answer; of a model
    whose first output they are the hidden states; of others every tensor (`start_logits`, `end_logits`)."""
    if getattr(out, "logits", None) is not None:
        return {"logits": out.logits}
    if next(iter(out)) == HIDDEN:
        return {HIDDEN: out[0]}
    return tensors_of(out)


def tensors_of(out: Any) -> dict[str, Tensor]:
    """What are tensors of a model's output, by name."""
    return {name: value for name, value in out.items() if isinstance(value, Tensor)}


HIDDEN, EMBEDDING = "last_hidden_state", "embedding"
"""What transformers and optimum call hidden states, and our name for what a head makes of them."""
_HEAD = "embedding_head"


class EmbedderShell(EncoderShell):
    """An encoder with what makes embeddings behind it, whose weights are its own."""

    def __init__(self, model: torch.nn.Module, head: EmbeddingHead) -> None:
        super().__init__(model)
        self._modules = {**model._modules, _HEAD: head}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        hidden = super().forward(input_ids, attention_mask, token_type_ids)
        self._answer.names = (EMBEDDING,)
        found: Tensor = self._modules[_HEAD](hidden, attention_mask)  # type: ignore[misc]
        return found


def takes_positions(model: torch.nn.Module) -> bool:
    """Whether a model can be told the positions of its tokens."""
    return "position_ids" in inspect.signature(model.forward).parameters
