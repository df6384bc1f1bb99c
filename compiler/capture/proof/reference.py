"""The forward that a captured program is held to: the model's own, untouched by optc's registrations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optc.compiler.capture.attention import NAME, caps_scores
from optc.compiler.capture.implementations import implementations
from optc.compiler.capture.shells import answers

OWN_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError)
"""What a model's own forward raises when it cannot take the inputs."""


@dataclass(frozen=True)
class Batch:
    """Token ids [B, S] with a mask [B, S] of the real ones; the rest is padding."""

    name: str
    ids: Tensor
    mask: Tensor

    @property
    def is_left(self) -> bool:
        """Whether padding stands before the tokens."""
        return not bool(self.mask[:, 0].all())

    @property
    def positions(self) -> Tensor:
        """[B, S]: 0, 1, 2, ... over the real tokens of a row, as transformers' `generate` counts them; padding 0."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    def rows(self, output: Tensor) -> list[Tensor]:
        """An output [B, S, C] as the real tokens [n, C] of each row; one without a token axis as it is, [1, C]."""
        if output.dim() < 3 and output.shape[:2] != self.mask.shape:
            return list(output.reshape(output.shape[0], 1, -1))
        rows = output if output.dim() > 2 else output[..., None]
        return [row[mask.bool()] for row, mask in zip(rows, self.mask, strict=True)]


def make_batches(sequences: Sequence[Sequence[int]], pad: int, what: str, device: torch.device) -> list[Batch]:
    """Ragged sequences padded on the right and on the left; the second alone; one token alone."""
    size = max(map(len, sequences))

    def padded(left: bool) -> tuple[Tensor, Tensor]:
        ids = torch.full((len(sequences), size), pad, device=device)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(sequences):
            place = slice(size - len(tokens), size) if left else slice(0, len(tokens))
            ids[row, place] = torch.tensor(tokens, device=device)
            mask[row, place] = 1
        return ids, mask

    alone = torch.tensor([sequences[min(1, len(sequences) - 1)]], device=device)
    one = torch.tensor([sequences[0][:1]], device=device)
    return [
        Batch(f"ragged {what}, right padded", *padded(left=False)),
        Batch(f"ragged {what}, left padded", *padded(left=True)),
        Batch(f"{what}, batch 1", alone, torch.ones_like(alone)),
        Batch("one token", one, torch.ones_like(one)),
    ]


def short_batches(sequence: Sequence[int], length: int, pad: int, device: torch.device) -> list[Batch]:
    """The first tokens of a sequence alone, and beside a row of one token less."""
    row = list(sequence[:length])
    ids = torch.tensor([row, [*row[:-1], pad]], device=device)
    mask = torch.ones_like(ids)
    alone = Batch(f"{length} tokens, batch 1", ids[:1], mask[:1])
    if length < 2:
        return [alone]
    ragged = mask.clone()
    ragged[1, -1] = 0
    return [alone, Batch(f"{length} tokens, ragged", ids, ragged)]


def own_attention_of(model: Any) -> str:
    """The attention that transformers would choose for a model, or that its user chose: "sdpa", "eager", ...

    In place of an sdpa that would leave out a cap of the scores the eager one.
    """
    chosen = model.config._attn_implementation
    attention = chosen if chosen not in (NAME, None) else model.get_correct_attn_implementation(None)
    return "eager" if attention == "sdpa" and caps_scores(model.config) else str(attention)


@contextmanager
def own_implementations(model: Any) -> Iterator[str]:
    """Give a model the attention that is its own (`own_attention_of`) for a while.

    Yields:
        the attention implementation: "sdpa", "eager", ...
    """
    attention = own_attention_of(model)
    experts = getattr(model.config, "_experts_implementation", None)
    with implementations(model, attention, experts if experts not in (NAME, None) else "eager"):
        yield attention


def own_outputs(model: nn.Module, batch: Batch, *, decoder: bool, offset: int) -> list[Tensor]:
    """What the model itself returns, one tensor or several (see `answers`): called with token ids and mask, as its users do.

    Rows of a decoder that are padded on the left get positions too, since `generate` gives them.
    """
    takes = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask, "return_dict": True}
    if decoder and batch.is_left and "position_ids" in takes:
        arguments["position_ids"] = batch.positions + offset
    if "use_cache" in takes:
        arguments["use_cache"] = False
    with torch.no_grad():
        out = model(**arguments)
    return list(answers(out).values())
