"""Weights that stay in a file until something computes with them.

A `LazyWeight` has the shape and the type of a tensor and none of its elements. An operator that gets one reads it
(with `pread` into a new buffer: pages of a mapped file would count as this process's memory), computes, and lets go.
What only moves or casts a weight gives another lazy one: merged projections, transposed and cast weights, single
experts of a stack take no memory either. So a program whose weights are lazy runs, is gated and quantized while a few
weights at a time are in memory, whatever their number.

Passes put new tensors into a `WorkFile`, and what they get back is lazy too.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from optc.compiler.diagnostics import InputError, os_errors
from optc.compiler.ops.dialect import quantization as _quantization  # noqa: F401  (registers the operators)
from optc.compiler.ops.packed.onnxruntime import pack_nbits, unpack_nbits

_SPILLED_BYTES = 1 << 16  # smaller tensors stay in memory
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_CHUNK = 16 << 20  # bytes read together; at most this much is held beside the result
_PRODUCT_BYTES = 256 << 20  # a matrix product reads a larger weight in blocks of rows

_BLOCK = 1 << 20  # numbers that are made of codes together

_aten, _optc = torch.ops.aten, torch.ops.optc


class _Recipe(Protocol):
    def read(self) -> Tensor:
        """The tensor, in memory of its own."""


class LazyWeight(Tensor):
    """A tensor whose elements are read when an operator needs them. It cannot be written in place.

    Attributes:
        recipe: how to make the tensor.
    """

    recipe: _Recipe

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, recipe: _Recipe, like: Tensor) -> LazyWeight:
        """A lazy tensor of the shape, strides and type of `like`, whose elements are not looked at."""
        made: LazyWeight = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )
        made.recipe = recipe
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        lazy = _LAZY.get(func)
        found = lazy(func, args, kwargs) if lazy is not None else None
        if found is not None:
            return found
        assert not _writes(func, args, kwargs), f"{func} would write a weight that lies in a file"
        read_args, read_kwargs = pytree.tree_map(materialized, (tuple(args), kwargs))
        return func(*read_args, **read_kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight({list(self.shape)}, {self.dtype})"

    def numpy(self, *, force: bool = False) -> Any:
        return materialized(self).numpy(force=force)

    def tolist(self) -> Any:
        return materialized(self).tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyWeight:
        return self  # nothing can write it


def materialized(value: Any) -> Any:
    """A lazy weight's tensor, in memory of its own; anything else as it is."""
    return value.recipe.read() if isinstance(value, LazyWeight) else value


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def pieces(tensor: Tensor, nbytes: int = 4 * _CHUNK) -> Iterator[Tensor]:
    """The tensor in memory, contiguous, in pieces of about `nbytes` along its first axis; in order, none is empty."""
    tensor = tensor.detach()
    if not (isinstance(tensor, LazyWeight) and _has_rows(tensor.recipe)):
        tensor = materialized(tensor)
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    step = max(1, nbytes * len(tensor) // max(1, tensor.nbytes))
    for start in range(0, len(tensor) if tensor.numel() else 0, step):
        yield materialized(tensor[start : start + step]).contiguous()


def computed(function: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> LazyWeight:
    """A contiguous weight that `function` makes each time it is needed."""
    return LazyWeight(_Computed(function), _meta(shape, dtype))


def in_file(
    path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype, files: dict[Path, OpenFile]
) -> LazyWeight:
    """A weight that lies contiguous in a file.

    Args:
        files: files that are open already; this one is added.
    """
    if path not in files:
        files[path] = OpenFile(os.open(path, os.O_RDONLY), str(path))
    return _Stored(files[path], offset, tuple(shape), dtype, dtype).lazy()


def return_freed_memory() -> None:
    """Let the C library give every freed buffer of a megabyte and more back to the system at once.

    glibc keeps freed buffers of up to 32 MB for later ones, between whatever else was allocated meanwhile: the weights
    of a model, read one after the other, would leave a heap several times the size of the largest of them.
    """
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if library is not None and hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


class OpenFile:
    """A file descriptor that is closed with its last user."""

    def __init__(self, handle: int, name: str) -> None:
        self.handle, self.name = handle, name
        weakref.finalize(self, os.close, handle)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from the file.

        Raises:
            InputError: it cannot be read, or is shorter than it was.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.handle, [buffer[done:]], offset + done)
            except OSError as error:
                raise InputError(
                    "the weights cannot be read", where=self.name, why=str(error), remedy="check the disk"
                ) from error
            if not count:
                raise InputError(
                    "the weights became shorter while they were read", where=self.name,
                    why=f"the file ends before byte {offset + len(buffer)}",
                    remedy="leave the model alone while it is compiled",
                )  # fmt: skip
            done += count


class WorkFile:
    """A file without a name, for tensors that passes make; its space is free again when the last of them is gone."""

    def __init__(self, folder: Path | None = None) -> None:
        """Args: folder: where the file is made; None takes the system's folder for temporary files.

        Raises:
            InputError, ResourceError: it cannot be made there.
        """
        place = folder or Path(tempfile.gettempdir())
        with os_errors("making a work file", str(place)), tempfile.TemporaryFile(dir=place) as file:
            self._file = OpenFile(os.dup(file.fileno()), f"{place} (work file)")
        self._end = 0

    def store(self, tensor: Tensor) -> Tensor:
        """The same tensor, lazy, its elements in the file; a small one, or one that is lazy already, as it is.

        Codes below 16 take half a byte each.

        Raises:
            ResourceError, InputError: the disk is full, or the file cannot be written.
        """
        if isinstance(tensor, LazyWeight) or tensor.nbytes < _SPILLED_BYTES or tensor.device.type != "cpu":
            return tensor
        flat = tensor.detach().contiguous().reshape(-1)
        nibbles = flat.dtype is torch.uint8 and flat.numel() % 2 == 0 and int(flat.max()) < 16
        offset = self._end
        for piece in flat.split(_CHUNK):
            stored = pack_nbits(piece, 4) if nibbles else piece
            self._append(raw_bytes(stored))
        kind = flat.dtype
        return _Stored(self._file, offset, tuple(tensor.shape), kind, kind, nibbles).lazy()

    def _append(self, data: memoryview) -> None:
        with os_errors("writing weights to a work file", self._file.name):
            while data:
                count = os.pwrite(self._file.handle, data, self._end)
                data, self._end = data[count:], self._end + count


# -- recipes ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Stored:
    """Elements that lie contiguous in a file as `stored`, cast to `dtype` when they are read.

    `nibbles`: uint8 numbers below 16, two per byte, the first in the low half.
    """

    file: OpenFile
    offset: int
    shape: tuple[int, ...]
    stored: torch.dtype
    dtype: torch.dtype
    nibbles: bool = False

    def lazy(self) -> LazyWeight:
        return LazyWeight(self, _meta(self.shape, self.dtype))

    def read(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        flat, begin = out.view(-1), 0
        for piece in flat.split(_CHUNK // self.stored.itemsize):
            self._fill(piece, begin)
            begin += len(piece)
        return out

    def rows(self, indices: Tensor) -> Tensor:
        """[..., C] for indices of rows of a matrix [R, C]; each row is read once."""
        chosen, places = torch.unique(indices.reshape(-1), return_inverse=True)
        width = self.shape[1]
        found = torch.empty((len(chosen), width), dtype=self.dtype)
        for place, row in enumerate(chosen.tolist()):
            self._fill(found[place], row * width)
        return found[places].reshape(*indices.shape, width)

    def part(self, start: int, end: int) -> _Stored | None:
        """Rows of the first axis, None where they do not begin at a byte."""
        inner = math.prod(self.shape[1:])
        if self.nibbles and (inner * start) % 2:
            return None
        skipped = inner * start // 2 if self.nibbles else inner * start * self.stored.itemsize
        return replace(self, offset=self.offset + skipped, shape=(end - start, *self.shape[1:]))

    def _fill(self, out: Tensor, begin: int) -> None:
        """Fill a flat piece of the result with the elements from number `begin` on."""
        if self.nibbles:
            packed = torch.empty((len(out) + 1) // 2, dtype=torch.uint8)
            self.file.read_into(raw_bytes(packed), self.offset + begin // 2)
            out.copy_(unpack_nbits(packed, 4, len(out)))
            return
        direct = self.stored is self.dtype
        data = out if direct else torch.empty(len(out), dtype=self.stored)
        self.file.read_into(raw_bytes(data), self.offset + begin * self.stored.itemsize)
        if not direct:
            out.copy_(data)


@dataclass(frozen=True, eq=False)
class _Computed:
    function: Callable[[], Tensor]

    def read(self) -> Tensor:
        return self.function()


@dataclass(frozen=True, eq=False)
class _Deferred:
    """A call whose lazy arguments are read when the result is."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def read(self) -> Tensor:
        args, kwargs = pytree.tree_map(materialized, (self.args, self.kwargs))
        found: Tensor = self.func(*args, **kwargs)
        return found


# -- operators that do not read ------------------------------------------------------------------


def _alias(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyWeight:
    return LazyWeight(args[0].recipe, args[0])


def _defer(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyWeight | None:
    """The call, to be made later, where each tensor that it reads is lazy."""
    leaves = pytree.tree_leaves((tuple(args), kwargs))
    if not all(isinstance(leaf, LazyWeight) for leaf in leaves if isinstance(leaf, Tensor)):
        return None
    return _deferred(func, args, kwargs)


def _deferred(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyWeight:
    meta_args, meta_kwargs = pytree.tree_map(_shape_of, (tuple(args), kwargs))
    return LazyWeight(_Deferred(func, tuple(args), kwargs), func(*meta_args, **meta_kwargs))


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
    if isinstance(recipe, _Stored) and recipe.stored is recipe.dtype and not recipe.nibbles:
        return replace(recipe, dtype=dtype).lazy()
    return _defer(func, args, {"dtype": dtype})


def _select(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyWeight | None:
    """One slice of the first axis: of a stack, or of a file."""
    source, axis, index = args
    recipe = source.recipe
    if axis == 0 and isinstance(recipe, _Deferred) and recipe.func is _aten.stack.default:
        stacked, along = (*recipe.args, 0)[:2]
        if along == 0:
            return _alias(func, (stacked[index],), {})
    if axis == 0 and isinstance(recipe, _Stored):
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


def _has_rows(recipe: _Recipe) -> bool:
    """Whether rows of the first axis can be read alone: of a file, or of such ones behind each other."""
    if not isinstance(recipe, _Deferred):
        return isinstance(recipe, _Stored)
    joined = recipe.func is _aten.cat.default and (*recipe.args, 0)[1] == 0
    return joined and all(_has_rows(item.recipe) for item in recipe.args[0])


def _rows_of(source: Any, first: int, last: int) -> LazyWeight:
    """Rows `first` to `last` of a weight of which `_has_rows` is true."""
    recipe = source.recipe
    if isinstance(recipe, _Stored):
        part = recipe.part(first, last)
        return (
            part.lazy() if part is not None else _deferred(_aten.slice.Tensor, (source, 0, first, last), {})
        )
    parts: list[LazyWeight] = []
    begin = 0
    for item in recipe.args[0]:
        low, high = max(first, begin), min(last, begin + len(item))
        if low < high or (low == high == first == last and not parts):
            parts.append(_rows_of(item, low - begin, high - begin))
        begin += len(item)
    return parts[0] if len(parts) == 1 else _deferred(_aten.cat.default, (parts, 0), {})


def _embedding(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The rows that are looked up, of a table in a file."""
    table, indices = args[:2]
    recipe = table.recipe if isinstance(table, LazyWeight) else None
    if not isinstance(recipe, _Stored) or recipe.nibbles or isinstance(indices, LazyWeight):
        return None
    return recipe.rows(indices)


def _product(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """x [M, K] times a large weight [K, N] that is the transpose of rows in a file: in blocks of N."""
    x, weight = args
    recipe = weight.recipe if isinstance(weight, LazyWeight) else None
    turned = isinstance(recipe, _Deferred) and recipe.func in (_aten.t.default, _aten.transpose.int)
    if isinstance(x, LazyWeight) or not turned or weight.nbytes <= _PRODUCT_BYTES:
        return None
    assert isinstance(recipe, _Deferred)
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
    out = scale.new_empty((count, columns))
    for begin, end in _blocks(count, columns):
        parts = [item if item is None else item[begin:end] for item in (scale, *others)]
        out[begin:end] = func(materialized(codes[begin:end]), *parts, **kwargs)
    return out


def _packed_product(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """matmul_nbits(x, packed [N, ...], scales [N, ...], zero points, bias) in blocks of N."""
    x, packed, *others = args
    if isinstance(x, LazyWeight):
        return None
    others = [materialized(item) for item in others]
    found = []
    for begin, end in _blocks(kwargs["N"], kwargs["K"]):
        parts = [item if item is None else item[begin:end] for item in others]
        found.append(func(x, materialized(packed[begin:end]), *parts, **{**kwargs, "N": end - begin}))
    return torch.cat(found, -1)


def _blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    step = max(1, _BLOCK // columns)
    return [(begin, min(rows, begin + step)) for begin in range(0, rows, step)]


_MOVES = (
    _aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.view.default, _aten._unsafe_view.default,
    _aten.unsqueeze.default, _aten.cat.default, _aten.stack.default,
)  # fmt: skip
_LAZY: dict[Any, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten._to_copy.default: _cast,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.embedding.default: _embedding,
    _aten.mm.default: _product,
    _optc.dequantize.default: _dequantize,
    _optc.matmul_nbits.default: _packed_product,
} | {move: _defer for move in _MOVES}  # noqa: C420 (mypy takes no other form)


def _writes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes one of its lazy arguments."""
    if not func._schema.is_mutable:
        return False
    schema = func._schema.arguments
    named = {**dict(zip((item.name for item in schema), args, strict=False)), **kwargs}
    written = (
        named.get(item.name) for item in schema if item.alias_info is not None and item.alias_info.is_write
    )
    return any(isinstance(item, LazyWeight) for item in written)


def _shape_of(value: Any) -> Any:
    if not isinstance(value, LazyWeight):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _meta(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
