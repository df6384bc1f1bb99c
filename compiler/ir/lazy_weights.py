"""Weights that are read when something computes with them.

A `LazyWeight` has the shape and the type of a tensor and none of its elements. An operator that gets one reads it,
computes, and lets go. What only moves or casts a weight gives another lazy one (`lazy_operators`): merged projections,
transposed and cast weights, single experts of a stack take no memory either. So a program whose weights are lazy runs, is
gated and quantized while a few weights at a time are in memory, whatever their number.

Where the elements are is a recipe's business; most lie in files (`stored_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Handler = Callable[[Any, Sequence[Any], dict[str, Any]], Any]
"""Answers a call of an operator with lazy arguments, or says None: (operator, args, kwargs)."""

HANDLERS: dict[Any, Handler] = {}
"""Operators that need not read all of their lazy arguments; `lazy_operators` fills it."""


class Recipe(Protocol):
    def read(self) -> Tensor:
        """The tensor, in memory of its own."""


class LazyWeight(Tensor):
    """A tensor whose elements are read when an operator needs them. It cannot be written in place.

    Attributes:
        recipe: how to make the tensor.
    """

    recipe: Recipe

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, recipe: Recipe, like: Tensor) -> LazyWeight:
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
        lazy = HANDLERS.get(func)
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


def computed(function: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> LazyWeight:
    """A contiguous weight that `function` makes each time it is needed."""
    return LazyWeight(_Computed(function), like_shape(shape, dtype))


@dataclass(frozen=True, eq=False)
class _Computed:
    function: Callable[[], Tensor]

    def read(self) -> Tensor:
        return self.function()


@dataclass(frozen=True, eq=False)
class Deferred:
    """A call whose lazy arguments are read when the result is."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def read(self) -> Tensor:
        args, kwargs = pytree.tree_map(materialized, (self.args, self.kwargs))
        found: Tensor = self.func(*args, **kwargs)
        return found


def deferred(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyWeight:
    """The result of a call that is made when it is read."""
    meta_args, meta_kwargs = pytree.tree_map(_shape_of, (tuple(args), kwargs))
    return LazyWeight(Deferred(func, tuple(args), kwargs), func(*meta_args, **meta_kwargs))


def _writes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes one of its lazy arguments."""
    if not func._schema.is_mutable:
        return False
    schema = func._schema.arguments
    named = {**dict(zip((item.name for item in schema), args, strict=False)), **kwargs}
    written = (named.get(item.name) for item in schema if item.alias_info is not None and item.alias_info.is_write)
    return any(isinstance(item, LazyWeight) for item in written)


def _shape_of(value: Any) -> Any:
    if not isinstance(value, LazyWeight):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def like_shape(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor without elements."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
