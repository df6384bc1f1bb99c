"""Shapes of the commonest operators without proofs: torch.export of a decoder takes two thirds of the time.

Where sizes are symbols, torch decides what a shape and its strides are by comparing expressions: some sixty of them for
each operator. What a decoder is made of needs none: the sizes of two operands are the same expressions, or a whole
number on one side; strides are products of sizes. Such calls are answered here, by the expressions themselves; all
others are torch's own. The graph and every shape and stride in it are the same (`tests/compiler/ir/test_quick_tracing`).
"""

from __future__ import annotations

import gc
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.fx.experimental import proxy_tensor

from optc.compiler.ir.late_code import late_code

aten = torch.ops.aten
_COMPOSITE = DispatchKey.CompositeImplicitAutograd
_BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor)
_UNARY = (aten.neg.default, aten.silu.default, aten.gelu.default, aten.rsqrt.default, aten.pow.Tensor_Scalar)


@contextmanager
def quick_shapes() -> Iterator[None]:
    """While it is open, fake tensors with symbolic sizes take the rules of this module."""
    table = fake_impls.get_fast_op_impls()
    rules: dict[Any, Any] = {op: _binary(table[op]) for op in _BINARY}
    rules |= {op: _unary(op) for op in _UNARY}
    if view := fake_impls.op_implementations_dict.get(aten.view.default):
        rules[aten.view.default] = _view(view)
    linear = aten.linear.default
    with mock.patch.dict(table, rules), mock.patch.dict(linear.py_kernels, {_COMPOSITE: _linear}):
        linear._dispatch_cache.clear()
        try:
            yield
        finally:
            linear._dispatch_cache.clear()


@contextmanager
def quick_tracing() -> Iterator[None]:
    """`quick_shapes` and `late_code`; besides, torch.export keeps the source lines of `forward`s alone, no `tensor_meta`
    beside the `val` of a node, which says the same, and no switch of gradients that are off already: it would cut the
    graph there, to put it together again. Tracing makes so many objects that Python's collector would take a sixth of
    the time to find next to nothing; it comes less often.

    The caller has switched gradients off.
    """
    before = gc.get_threshold()
    proxy = torch.fx.proxy
    forwards_only = hasattr(proxy.TracerBase, "_record_forward_stack_traces_only")  # else more frames are kept
    with (
        quick_shapes(),
        recurrent_shapes(),
        late_code(),
        mock.patch.object(proxy_tensor, "_extract_tensor_metadata", _no_metadata),
        mock.patch.object(proxy, "CapturedTraceback", _ForwardFrames if forwards_only else proxy.CapturedTraceback),
        mock.patch.multiple(torch.no_grad, __enter__=_enter, __exit__=_leave),
    ):
        gc.set_threshold(max(before[0], 100_000), *before[1:])
        try:
            yield
        finally:
            gc.set_threshold(*before)


def _no_metadata(_: Tensor) -> None:
    """Stands for what would say once more what a node's `val` says. A Mock would keep the fakes that it was called with."""


@contextmanager
def recurrent_shapes() -> Iterator[None]:
    """While it is open, lstm, gru and rnn of fake tensors give shapes without being unrolled, whatever their length."""
    ops = [aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input]
    keys = (_COMPOSITE, DispatchKey.Autograd)
    with ExitStack() as stack:
        for op in ops:
            rule = _recurrent(op)
            known = {key: rule for key in keys if key in op.py_kernels}
            stack.enter_context(mock.patch.dict(op.py_kernels, known))
            op._dispatch_cache.clear()
            stack.callback(op._dispatch_cache.clear)
        yield


# -- the rules --------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
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
        return aten.linear.default._op_dk(_COMPOSITE, x, weight, bias)
    return _new(x.fake_mode, x, (*x.shape[:-1], weight.shape[0]))


def _view(slow: Callable[..., Any]) -> Callable[..., Any]:
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


def _binary(slow: Callable[..., Any]) -> Callable[..., Any]:
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


def _unary(op: Any) -> Callable[..., Any]:
    """Of numbers in floating point, laid out without gaps: the same sizes and strides."""

    def rule(mode: FakeTensorMode, x: FakeTensor, *args: Any, **kwargs: Any) -> Any:
        plain = x.is_floating_point() and all(isinstance(item, int | float) for item in args)
        if plain and (_is_contiguous(x) or _is_permuted(x)):
            return _new(mode, x, x.shape, x.stride())
        with in_kernel_invocation_manager(mode):
            made = op(x, *args, **kwargs)
        return FakeTensor(mode, made, x.fake_device)

    return rule


def _recurrent(op: Any) -> Callable[..., Any]:
    """(x, state(s), weights, has_biases, layers, dropout, train, bidirectional, batch_first) -> output, state(s)."""
    slow = dict(op.py_kernels)

    def rule(x: Tensor, states: Any, weights: Any, biases: bool, *rest: Any) -> Any:
        layers, _, train, bidirectional, batch_first = rest
        sides = 2 if bidirectional else 1
        plain = len(weights) == (4 if biases else 2) * layers * sides and not train
        if not isinstance(x, FakeTensor) or x.fake_mode.in_kernel_invocation or not plain:
            return slow[_COMPOSITE](x, states, weights, biases, *rest)
        batch, length = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
        hidden = weights[1].shape[1]
        with x.fake_mode:
            out = x.new_empty((batch, length, sides * hidden) if batch_first else (length, batch, sides * hidden))
            ends = [x.new_empty((layers * sides, batch, hidden)) for _ in range(2 if op is aten.lstm.input else 1)]
        return (out, *ends)

    return rule


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


def _strides(sizes: Sequence[Any]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))


def _new(mode: FakeTensorMode, like: FakeTensor, size: Sequence[Any], stride: Sequence[Any] | None = None) -> Any:
    with in_kernel_invocation_manager(mode):
        if stride is None:
            made = torch.empty(size, dtype=like.dtype, device="meta")
        else:
            made = torch.empty_strided(size, stride, dtype=like.dtype, device="meta")
    return FakeTensor(mode, made, like.fake_device)


# -- what torch.export records ------------------------------------------------------------------


class _ForwardFrames:
    """In place of `CapturedTraceback`: of all frames those that torch.export keeps, which are `forward`s."""

    @classmethod
    def extract(cls, **_: Any) -> _ForwardFrames:
        return cls()

    def summary(self) -> traceback.StackSummary:
        frames = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward" or code.co_filename.endswith("torch/__init__.py"):
                row = traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name, lookup_line=False)
                frames.append(row)
            frame = frame.f_back
        return traceback.StackSummary.from_list(frames[::-1])


def _enter(self: torch.no_grad) -> None:
    self.prev = torch.is_grad_enabled()
    if self.prev:
        torch.set_grad_enabled(False)


def _leave(self: torch.no_grad, *_: Any) -> None:
    if self.prev:
        torch.set_grad_enabled(True)
