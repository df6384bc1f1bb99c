"""Operators on lazy weights that read nothing, or no more than they need.

Moves and casts give lazy weights; an embedding reads the rows that are looked up; products with large weights, and with
codes, read them in blocks of rows. Everything else reads its arguments whole (`LazyWeight.__torch_dispatch__`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from optc.compiler.ir.lazy_weights import HANDLERS, Deferred, LazyWeight, Recipe, deferred, materialized
from optc.compiler.ir.row_blocks import row_blocks
from optc.compiler.ir.stored_weights import Stored
from optc.compiler.ir.weight_buffers import WEIGHTS
from optc.compiler.ops.dialect import quantization as _quantization  # noqa: F401  (registers the operators)
from optc.compiler.ops.packed.onnxruntime import ROUNDS
from optc.compiler.ops.packed.rounded_inputs import round_activations

_PIECE = 64 << 20  # bytes of a weight that are read together where it is written or hashed
_PRODUCT_BYTES = 256 << 20  # a matrix product reads a larger weight in blocks of rows

_aten, _optc = torch.ops.aten, torch.ops.optc


def pieces(tensor: Tensor, nbytes: int = _PIECE) -> Iterator[Tensor]:
    """The tensor in memory, contiguous, in pieces of about `nbytes` along its first axis; in order, none is empty."""
    tensor = tensor.detach()
    if not (isinstance(tensor, LazyWeight) and _has_rows(tensor.recipe)):
        tensor = materialized(tensor)
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    step = max(1, nbytes * len(tensor) // max(1, tensor.nbytes))
    for start in range(0, len(tensor) if tensor.numel() else 0, step):
        yield materialized(tensor[start : start + step]).contiguous()


def _alias(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyWeight:
    return LazyWeight(args[0].recipe, args[0])


def _defer(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyWeight | None:
    """The call, to be made later, where each tensor that it reads is lazy."""
    leaves = pytree.tree_leaves((tuple(args), kwargs))
    if not all(isinstance(leaf, LazyWeight) for leaf in leaves if isinstance(leaf, Tensor)):
        return None
    return deferred(func, args, kwargs)


def _cast(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyWeight | None:
    """To another type on the same device; a second cast may not skip the rounding of the first."""
    options = {key: value for key, value in kwargs.items() if value not in (None, False)}
    device = options.pop("device", None)
    options.pop("memory_format", None)
    if set(options) - {"dtype"} or (device is not None and torch.device(device).type != "cpu"):
        return None
    (source,) = args
    dtype, recipe = options.get("dtype", source.dtype), source.recipe
    if dtype is source.dtype:
        return _alias(func, args, kwargs)
    if isinstance(recipe, Stored) and recipe.stored is recipe.dtype and not recipe.nibbles:
        return replace(recipe, dtype=dtype).lazy()
    return _defer(func, args, {"dtype": dtype})


def _view(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyWeight | None:
    """Another shape over the same elements of a file."""
    source, shape = args
    if not isinstance(source.recipe, Stored):
        return _defer(func, args, kwargs)
    return replace(source.recipe, shape=tuple(torch.empty(source.shape, device="meta").view(shape).shape)).lazy()


def _select(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyWeight | None:
    """One slice of the first axis: of a stack, or of a file."""
    source, axis, index = args
    recipe = source.recipe
    if axis == 0 and isinstance(recipe, Deferred) and recipe.func is _aten.stack.default:
        stacked, along = (*recipe.args, 0)[:2]
        if along == 0:
            return _alias(func, (stacked[index],), {})
    if axis == 0 and isinstance(recipe, Stored):
        place = index % source.shape[0]
        part = recipe.part(place, place + 1)
        return None if part is None else replace(part, shape=part.shape[1:]).lazy()
    return _defer(func, args, kwargs)


def _slice(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyWeight | None:
    defaults: list[Any] = [None, 0, None, None, 1]
    source, axis, start, end, step = [*args, *defaults[len(args) :]]
    recipe = source.recipe
    if axis == 0 and step == 1 and _has_rows(recipe):
        first, last, _ = slice(start, end).indices(source.shape[0])
        return _rows_of(source, first, max(first, last))
    return _defer(func, args, kwargs)


def _has_rows(recipe: Recipe) -> bool:
    """Whether rows of the first axis can be read alone: of a file, or of such ones behind each other."""
    if not isinstance(recipe, Deferred):
        return isinstance(recipe, Stored)
    joined = recipe.func is _aten.cat.default and (*recipe.args, 0)[1] == 0
    return joined and all(_has_rows(item.recipe) for item in recipe.args[0])


def _rows_of(source: Any, first: int, last: int) -> LazyWeight:
    """Rows `first` to `last` of a weight of which `_has_rows` is true."""
    recipe = source.recipe
    if isinstance(recipe, Stored):
        part = recipe.part(first, last)
        return part.lazy() if part is not None else deferred(_aten.slice.Tensor, (source, 0, first, last), {})
    parts: list[LazyWeight] = []
    begin = 0
    for item in recipe.args[0]:
        low, high = max(first, begin), min(last, begin + len(item))
        if low < high or (low == high == first == last and not parts):
            parts.append(_rows_of(item, low - begin, high - begin))
        begin += len(item)
    return parts[0] if len(parts) == 1 else deferred(_aten.cat.default, (parts, 0), {})


def _embedding(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The rows that are looked up, of a table in a file."""
    table, indices = args[:2]
    recipe = table.recipe if isinstance(table, LazyWeight) else None
    if not isinstance(recipe, Stored) or recipe.nibbles or isinstance(indices, LazyWeight):
        return None
    return recipe.rows(indices)


def _select_rows(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The same of a table of the rows that are looked up."""
    found = _embedding(func, args, kwargs)
    if found is None:
        return None
    places = torch.arange(args[1].numel(), device=found.device).view(args[1].shape)
    selected: Tensor = func(found.reshape(-1, found.shape[-1]), places, **kwargs)
    return selected


def _product(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """x [M, K] times a large weight [K, N] that is the transpose of rows in a file: in blocks of N."""
    x, weight = args
    recipe = weight.recipe if isinstance(weight, LazyWeight) else None
    turned = isinstance(recipe, Deferred) and recipe.func in (_aten.t.default, _aten.transpose.int)
    if isinstance(x, LazyWeight) or not turned or weight.nbytes <= _PRODUCT_BYTES:
        return None
    assert isinstance(recipe, Deferred)
    matrix = recipe.args[0]
    step = max(1, _PRODUCT_BYTES // (matrix.shape[1] * matrix.itemsize))
    blocks = (matrix[start : start + step] for start in range(0, len(matrix), step))
    return torch.cat([x @ materialized(block).t() for block in blocks], -1)


def _dequantize(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """dequantize(codes [N, K], scale [N, G], ...) in blocks of rows: what is between stays in the processor's cache."""
    codes, *others = args
    count, columns = codes.shape
    if any(isinstance(item, Tensor) and len(item) != count for item in others):
        return None
    scale, *others = (materialized(item) for item in others)
    out = WEIGHTS.empty((count, columns), scale.dtype)
    for begin, end in row_blocks(count, columns):
        parts = [item if item is None else item[begin:end] for item in (scale, *others)]
        out[begin:end] = func(materialized(codes[begin:end]), *parts, **kwargs)
    return out


def _packed_product(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """matmul_nbits(x, packed [N, ...], scales [N, ...], zero points, bias) in blocks of N."""
    x, packed, *others = args
    if isinstance(x, LazyWeight):
        return None
    others = [materialized(item) for item in others]
    if kwargs["accuracy_level"] == ROUNDS:  # once, not for every block
        x, kwargs = round_activations(x, kwargs["block_size"]).to(x.dtype), {**kwargs, "accuracy_level": 0}
    found = []
    for begin, end in row_blocks(kwargs["N"], kwargs["K"]):
        parts = [item if item is None else item[begin:end] for item in others]
        found.append(func(x, materialized(packed[begin:end]), *parts, **{**kwargs, "N": end - begin}))
    return torch.cat(found, -1)


_MOVES = (
    _aten.t.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.unsqueeze.default,
    _aten.cat.default,
    _aten.stack.default,
)
HANDLERS.update(
    {
        _aten.detach.default: _alias,
        _aten.alias.default: _alias,
        _aten._to_copy.default: _cast,
        _aten.view.default: _view,
        _aten._unsafe_view.default: _view,
        _aten.select.int: _select,
        _aten.slice.Tensor: _slice,
        _aten.embedding.default: _embedding,
        _optc.select_rows.default: _select_rows,
        _aten.mm.default: _product,
        _optc.dequantize.default: _dequantize,
        _optc.matmul_nbits.default: _packed_product,
    }
    | dict.fromkeys(_MOVES, _defer)
)
