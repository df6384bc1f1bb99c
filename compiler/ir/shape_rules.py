"""Shapes and strides of operators' results from the expressions of their operands' sizes, without proofs.

Each rule answers the plain calls that decoders and encoders are made of, and hands all others to torch. What is answered
is what torch finds (`tests/compiler/ir/test_quick_tracing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._decomp import decomposition_table
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

aten = torch.ops.aten
COMPOSITE = DispatchKey.CompositeImplicitAutograd
Rule = Callable[..., Any]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., K] times [N, K]: [..., N], contiguous."""
    known = (
        isinstance(weight, FakeTensor)
        and x.dim() > 1
        and weight.dim() == 2
        and x.dtype == weight.dtype
        and x.device == weight.device
        and (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1]))
        and isinstance(x.shape[-1], int)
        and x.shape[-1] == weight.shape[1]
        and not torch.is_grad_enabled()
    )
    if not (isinstance(x, FakeTensor) and known) or x.fake_mode.in_kernel_invocation:
        return aten.linear.default._op_dk(COMPOSITE, x, weight, bias)
    return _new(x.fake_mode, x, (*x.shape[:-1], weight.shape[0]))


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Over the last axis, laid out without gaps: the same sizes, contiguous."""
    known = (
        isinstance(x, FakeTensor)
        and x.is_floating_point()
        and len(shape) == 1
        and (
            weight is None or (isinstance(weight, FakeTensor) and (weight.dtype, weight.device) == (x.dtype, x.device))
        )
        and not torch.is_grad_enabled()
    )
    if not (isinstance(x, FakeTensor) and known) or x.fake_mode.in_kernel_invocation or not _is_contiguous(x):
        return aten.rms_norm.default._op_dk(COMPOSITE, x, shape, weight, eps)
    return _new(x.fake_mode, x, x.shape)


def split_with_sizes(mode: FakeTensorMode, x: FakeTensor, sizes: Sequence[int], dim: int = 0) -> Any:
    """Pieces along an axis whose size and stride are whole numbers: views."""
    axis = dim % x.dim()
    whole = (*sizes, x.shape[axis], x.stride()[axis], x.storage_offset())
    if not all(isinstance(item, int) for item in whole) or sum(sizes) != x.shape[axis]:
        return _torchs(mode, aten.split_with_sizes.default, x, sizes, dim)
    pieces, offset = [], int(x.storage_offset())
    for size in sizes:
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        with in_kernel_invocation_manager(mode):
            made = aten.as_strided.default(x, shape, x.stride(), offset)
        pieces.append(FakeTensor(mode, made, x.fake_device))
        offset += size * int(x.stride()[axis])
    return pieces


def _torchs(mode: FakeTensorMode, op: Any, *args: Any) -> Any:
    """What torch says itself of a call."""
    table = fake_impls.get_fast_op_impls()
    rule = table.pop(op)
    try:
        with mode:
            return op(*args)
    finally:
        table[op] = rule


def view(slow: Callable[..., Any]) -> Callable[..., Any]:
    """The first sizes stay; behind them, dense whole numbers become others."""

    def rule(mode: FakeTensorMode, x: FakeTensor, shape: Sequence[Any]) -> Any:
        kept = 0
        while kept < min(x.dim(), len(shape)) and _same(x.shape[kept], shape[kept]):
            kept += 1
        sizes = _whole(x.shape[kept:], shape[kept:])
        if sizes is None or tuple(x.stride()[kept:]) != _strides(x.shape[kept:]):
            with mode:
                return slow(mode, aten.view.default, x, shape)
        size, stride = (*x.shape[:kept], *sizes), (*x.stride()[:kept], *_strides(sizes))
        with in_kernel_invocation_manager(mode):
            made = aten.as_strided.default(x, size, stride, x.storage_offset())
        return FakeTensor(mode, made, x.fake_device)

    return rule


def _whole(old: Sequence[Any], new: Sequence[Any]) -> tuple[int, ...] | None:
    """New sizes with -1 filled in; None where any size is a symbol, or there is none, or they do not fit."""
    if not old or not new or not all(isinstance(size, int) for size in (*old, *new)):
        return None
    total, known = math.prod(old), math.prod(size for size in new if size != -1)
    if list(new).count(-1) == 1 and known and total % known == 0:
        return tuple(total // known if size == -1 else size for size in new)
    return tuple(new) if total == known and -1 not in new else None


def binary(slow: Callable[..., Any]) -> Callable[..., Any]:
    """Sizes and strides of the larger operand, where its layout decides that of the result."""

    def rule(mode: FakeTensorMode, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 2 and not kwargs:
            for x, other in (args, args[::-1]):
                if _covers(x, other):
                    in_order = _is_contiguous(x) and (not isinstance(other, Tensor) or _is_contiguous(other))
                    if in_order or (x is args[0] and _is_permuted(x)):  # axes are ordered as the first operand's
                        return _new(mode, x, x.shape, x.stride())
        return slow(mode, *args, **kwargs)

    return rule


def _covers(x: Any, other: Any) -> bool:
    """Whether an element-wise result has the type of x and its sizes."""
    if not isinstance(x, FakeTensor) or not x.is_floating_point():
        return False
    if isinstance(other, int | float) and not isinstance(other, bool):
        return True
    if not isinstance(other, FakeTensor) or (other.dtype, other.device) != (x.dtype, x.device):
        return False
    sizes, behind = other.shape, x.dim() - other.dim()
    if behind < 0 or not sizes:
        return False
    pairs = zip(sizes, x.shape[behind:], strict=True)
    return all(_same(size, own) or (isinstance(size, int) and size == 1) for size, own in pairs)


def unary(op: Any) -> Callable[..., Any]:
    """Of numbers in floating point, laid out without gaps: the same sizes and strides."""

    def rule(mode: FakeTensorMode, x: FakeTensor, *args: Any, **kwargs: Any) -> Any:
        plain = x.is_floating_point() and all(isinstance(item, int | float) for item in args)
        if plain and (_is_contiguous(x) or _is_permuted(x)):
            return _new(mode, x, x.shape, x.stride())
        with in_kernel_invocation_manager(mode):
            made = op(x, *args, **kwargs)
        return FakeTensor(mode, made, x.fake_device)

    return rule


def recurrent(op: Any) -> Callable[..., Any]:
    """(x, state(s), weights, has_biases, layers, dropout, train, bidirectional, batch_first) -> output, state(s)."""
    slow = dict(op.py_kernels)

    def rule(x: Tensor, states: Any, weights: Any, biases: bool, *rest: Any) -> Any:
        layers, _, train, bidirectional, batch_first = rest
        sides = 2 if bidirectional else 1
        plain = len(weights) == (4 if biases else 2) * layers * sides and not train
        if not isinstance(x, FakeTensor) or x.fake_mode.in_kernel_invocation or not plain:
            return slow[COMPOSITE](x, states, weights, biases, *rest)
        batch, length = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
        hidden = weights[1].shape[1]
        with x.fake_mode:
            out = x.new_empty((batch, length, sides * hidden) if batch_first else (length, batch, sides * hidden))
            ends = [x.new_empty((layers * sides, batch, hidden)) for _ in range(2 if op is aten.lstm.input else 1)]
        return (out, *ends)

    return rule


def decomposed(op: Any, found: Callable[..., Any]) -> Rule:
    """A rule that gives None for what it does not know; torch finds that by its decomposition."""
    slow = decomposition_table[op]

    def rule(mode: FakeTensorMode, *args: Any, **kwargs: Any) -> Any:
        known = None if kwargs else found(mode, *args)
        if known is not None:
            return known
        with mode:
            return slow(*args, **kwargs)

    return rule


def mean(mode: FakeTensorMode, x: Any, dims: Sequence[int] | None = None, keepdim: bool = False) -> Any:
    """Over the last axis, of whole numbers, in order."""
    last = dims is not None and list(dims) in ([-1], [x.dim() - 1])
    if not (last and x.dim() > 1 and x.is_floating_point() and _is_counted(x.shape[-1]) and _is_contiguous(x)):
        return None
    return _new(mode, x, (*x.shape[:-1], 1) if keepdim else x.shape[:-1])


def layer_norm(mode: FakeTensorMode, x: Any, shape: Sequence[Any], weight: Any, bias: Any, _: float) -> Any:
    """Over the last axis: the result, and mean and reciprocal deviation of each row."""
    plain = x.dim() > 1 and len(shape) == 1 and _is_counted(x.shape[-1]) and _same(shape[0], x.shape[-1])
    plain = plain and x.dtype == torch.float32 and _is_contiguous(x)
    if not plain or any(item is not None and item.dtype != x.dtype for item in (weight, bias)):
        return None
    row = (*x.shape[:-1], 1)
    return _new(mode, x, x.shape), _new(mode, x, row), _new(mode, x, row)


def cat(mode: FakeTensorMode, parts: Sequence[Any], dim: int = 0) -> Any:
    """Along an axis of whole numbers, where nothing but that axis differs."""
    first, *others = parts
    rank = first.dim()
    axis = dim % rank if rank else 0
    if rank < 2 or any((item.dim(), item.dtype, item.device) != (rank, first.dtype, first.device) for item in others):
        return None
    if not all(_is_counted(item.shape[axis]) and _in_order(item) for item in parts):
        return None
    behind, before = first.shape[axis + 1 :], first.shape[:axis]
    for item in others:
        sides = ((item.shape[:axis], before), (item.shape[axis + 1 :], behind))
        if not all(_same(*pair) for side in sides for pair in zip(*side, strict=True)):
            return None
    return _new(mode, first, (*before, sum(item.shape[axis] for item in parts), *behind))


# -- expressions ------------------------------------------------------------------------------


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or the same expression; False says nothing."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return a.node is b.node or bool(_expression(a) == _expression(b))


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _is_contiguous(x: Tensor) -> bool:
    expected: Any = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if _expression(stride) != expected:
            return False
        expected = expected * _expression(size)
    return True


def _is_permuted(x: Tensor) -> bool:
    """Whether the strides are those of a contiguous tensor whose axes, none of them of size 1, change places."""
    sizes, strides = [_expression(item) for item in x.shape], [_expression(item) for item in x.stride()]
    if 1 in sizes:
        return False
    left, expected = list(range(len(sizes))), 1
    while left:
        axis = next((axis for axis in left if strides[axis] == expected), None)
        if axis is None:
            return False
        left.remove(axis)
        expected = expected * sizes[axis]
    return True


def _is_counted(size: Any) -> bool:
    """Whether a size is a whole number above 1, which is neither left out nor broadcast."""
    return isinstance(size, int) and size > 1


def _in_order(x: Tensor) -> bool:
    """Whether the last axis lies together and the second does not, so that torch takes it for no image (NHWC)."""
    stride = x.stride()
    return _is_counted(x.shape[-1]) and _same(stride[-1], 1) and (x.dim() < 4 or not _same(stride[1], 1))


def _strides(sizes: Sequence[Any]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))


def _new(mode: FakeTensorMode, like: FakeTensor, size: Sequence[Any], stride: Sequence[Any] | None = None) -> Any:
    with in_kernel_invocation_manager(mode):
        if stride is None:
            made = torch.empty(size, dtype=like.dtype, device="meta")
        else:
            made = torch.empty_strided(size, stride, dtype=like.dtype, device="meta")
    return FakeTensor(mode, made, like.fake_device)
