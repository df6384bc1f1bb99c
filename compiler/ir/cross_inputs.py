"""The inputs of a decoder that reads an encoder: in what order, and how they begin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from optc.compiler.ir.contract import CACHE_ROLES, CROSS_ROLES, Contract, Input


def empty_cache(spec: Input, batch: int) -> Tensor:
    """One of them."""
    return torch.zeros(shape_of(spec, {"batch": batch, "past": 0}), dtype=getattr(torch, spec.dtype))


def decoder_inputs(
    specs: Sequence[Input], ids: Tensor, masks: Sequence[Tensor], own: Sequence[Tensor], cross: Sequence[Tensor]
) -> list[Tensor]:
    """One call's inputs in the order of the contract, which has a layer's own caches beside what it reads."""
    given: dict[str, Iterator[Tensor]] = {"input_ids": iter([ids]), "encoder_mask": iter(masks)}
    given |= dict.fromkeys(CACHE_ROLES, iter(own)) | dict.fromkeys(CROSS_ROLES, iter(cross))
    return [next(given[spec.role]) for spec in specs]


def cross_inputs(contract: Contract) -> list[Input]:
    """The inputs that hold keys and values of cross-attention."""
    return [spec for spec in contract.inputs if spec.role in CROSS_ROLES]


def shape_of(spec: Input, sizes: dict[str, int]) -> list[int]:
    return [size if isinstance(size, int) else sizes.get(size, 0) for size in spec.dims]
