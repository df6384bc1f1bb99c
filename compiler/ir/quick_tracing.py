"""Shapes of the commonest operators without proofs: torch.export of a decoder takes two thirds of the time.

Where sizes are symbols, torch decides what a shape and its strides are by comparing expressions: some sixty of them for
each operator. What a decoder is made of needs none: the sizes of two operands are the same expressions, or a whole
number on one side; strides are products of sizes. Such calls are answered here, by the expressions themselves; all
others are torch's own (`shape_rules`). The graph and every shape and stride in it are the same (`tests/compiler/ir/test_quick_tracing`).
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._decomp import meta_table
from torch._subclasses import fake_impls
from torch.fx.experimental import proxy_tensor

from optc.compiler.ir import shape_rules
from optc.compiler.ir.late_code import late_code
from optc.compiler.ir.shape_rules import COMPOSITE

aten = torch.ops.aten
_BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor)
_UNARY = (aten.neg.default, aten.silu.default, aten.gelu.default, aten.rsqrt.default, aten.pow.Tensor_Scalar)
_DECOMPOSED: dict[Any, Callable[..., Any]] = {
    aten.mean.dim: shape_rules.mean,
    aten.native_layer_norm.default: shape_rules.layer_norm,
    aten.cat.default: shape_rules.cat,
}


@contextmanager
def quick_shapes() -> Iterator[None]:
    """While it is open, fake tensors with symbolic sizes take the rules of this module."""
    table = fake_impls.get_fast_op_impls()
    rules: dict[Any, Any] = {op: shape_rules.binary(table[op]) for op in _BINARY}
    rules |= {op: shape_rules.unary(op) for op in _UNARY}
    known = {*table, *meta_table}  # of a release that finds them in another way
    rules |= {op: shape_rules.decomposed(op, found) for op, found in _DECOMPOSED.items() if op not in known}
    rules[aten.split_with_sizes.default] = shape_rules.split_with_sizes
    if view := fake_impls.op_implementations_dict.get(aten.view.default):
        rules[aten.view.default] = shape_rules.view(view)
    whole = {aten.linear.default: shape_rules.linear, aten.rms_norm.default: shape_rules.rms_norm}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(table, rules))
        for op, rule in whole.items():
            stack.enter_context(mock.patch.dict(op.py_kernels, {COMPOSITE: rule}))
            op._dispatch_cache.clear()
            stack.callback(op._dispatch_cache.clear)
        yield


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
    keys = (COMPOSITE, DispatchKey.Autograd)
    with ExitStack() as stack:
        for op in ops:
            rule = shape_rules.recurrent(op)
            known = {key: rule for key in keys if key in op.py_kernels}
            stack.enter_context(mock.patch.dict(op.py_kernels, known))
            op._dispatch_cache.clear()
            stack.callback(op._dispatch_cache.clear)
        yield


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
