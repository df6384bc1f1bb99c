"""The shapes that are found without proofs are torch's own, and so is the graph that is traced with them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from families import make_model
from stages import apply, captured
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from transformers import masking_utils

from optc.compiler.capture import capture_model
from optc.compiler.compat import symbolic_dispatch
from optc.compiler.ir import export
from optc.compiler.ir.quick_tracing import quick_shapes
from optc.passes.kv_cache.static import StaticKVCache

aten = torch.ops.aten
MODE = FakeTensorMode(shape_env=ShapeEnv())
MODE.cache_enabled = False


def plain(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def described(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(described, value))
    if isinstance(value, torch.Tensor):
        layout = [[plain(item) for item in row] for row in (value.shape, value.stride(), (value.storage_offset(),))]
        return value.dtype, value.device, *layout
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    return str(value)


@pytest.mark.parametrize(
    ("family", "attention"), [("qwen3", "optc"), ("phi3", "eager"), ("gpt2", "sdpa"), ("gpt-neox", "optc")]
)
def test_a_capture_is_the_same(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> list[Any]:
        program = capture_model(make_model(family, layers=1), attention=attention, prove=False)
        return [
            (node.op, str(node.target), described(node.meta.get("val")), node.meta.get("stack_trace"))
            for node in program.graph.nodes
            if node.op != "output"
        ]

    quick = rows()
    monkeypatch.setattr(export, "quick_tracing", contextlib.nullcontext)
    assert quick == rows()
    assert any("modeling_" in (row[3] or "") for row in quick)


@pytest.mark.parametrize("attention", ["optc", "eager"])
def test_several_sequences_in_a_row_are_looked_for_where_masks_tell_them_apart(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, asked = masking_utils.find_packed_sequence_indices, []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: asked.append(1) or find(ids))
    program = capture_model(make_model("llama", layers=1), attention=attention, prove=False)
    assert bool(asked) == (attention == "eager")
    assert not program.calls(aten.cumsum.default) or attention == "eager"


def test_a_retraced_graph_keeps_no_history_of_its_nodes() -> None:
    """torch notes which nodes of which graphs a node was made of, and copies all of it with every graph."""
    program = apply(StaticKVCache(), captured("llama", 1)).program
    assert [node.name for node in program.graph.nodes if "from_node" in node.meta] == []
    assert any(node.meta.get("nn_module_stack") for node in program.graph.nodes)


def symbolic(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A fake tensor whose sizes are symbols, where they are not multiples of 4 or 1."""
    dynamic = [DimDynamic.STATIC if size == 1 or size % 4 == 0 else DimDynamic.DYNAMIC for size in shape]
    context = StatelessSymbolicContext(dynamic_sizes=dynamic, constraint_sizes=[None] * len(shape))
    return MODE.from_tensor(
        torch.zeros(shape, dtype=dtype), symbolic_context=context, source=ConstantSource(str(shape))
    )


X = symbolic((3, 5, 8))  # [batch, seq, 8]
Q = X.view(X.shape[0], X.shape[1], 2, 4).transpose(1, 2)
CASES: list[tuple[Any, Any]] = [
    (aten.linear.default, (X, torch.zeros(4, 8))),
    (aten.linear.default, (X, torch.zeros(4, 8), torch.zeros(4))),
    (aten.linear.default, (X.transpose(0, 1), torch.zeros(4, 8))),
    (aten.view.default, (X, [X.shape[0], X.shape[1], -1, 4])),
    (aten.view.default, (X, [X.shape[0], X.shape[1], 2, 2, 2])),
    (aten.view.default, (X, [-1, 8])),
    (aten.view.default, (X, [X.shape[1], X.shape[0], 2, 4])),
    (aten.view.default, (X.transpose(0, 1), [X.shape[1], X.shape[0], 2, 4])),
    (aten.view.default, (Q.transpose(1, 2), [X.shape[0], X.shape[1], 8])),
    (aten.mean.dim, (X, [-1], True)),
    (aten.mean.dim, (X, [2], True)),
    (aten.mean.dim, (X, [-1])),
    (aten.mean.dim, (X, [1], True)),
    (aten.mean.dim, (Q, [-1], True)),
    (aten.split_with_sizes.default, (X, [2, 6], -1)),
    (aten.split_with_sizes.default, (X.transpose(0, 1), [4, 4], 2)),
    (aten.split_with_sizes.default, (Q, [1, 1], 1)),
    (aten.split_with_sizes.default, (X[..., 2:], [2, 4], -1)),
    (aten.rms_norm.default, (X, [8], torch.zeros(8), 1e-6)),
    (aten.rms_norm.default, (X, [8], None, None)),
    (aten.rms_norm.default, (Q, [4], torch.zeros(4), 1e-6)),
    (aten.mul.Tensor, (X, X)),
    (aten.mul.Tensor, (X, 2.0)),
    (aten.mul.Tensor, (X, torch.zeros(8))),
    (aten.mul.Tensor, (torch.zeros(8), X)),
    (aten.mul.Tensor, (X, X[..., :1])),
    (aten.add.Tensor, (Q, Q)),
    (aten.add.Tensor, (Q, Q.contiguous())),
    (aten.add.Tensor, (Q.contiguous(), Q)),
    (aten.mul.Tensor, (Q, X[:, None, :, :4])),
    (aten.mul.Tensor, (X[:, None, :, :4], Q)),
    (aten.mul.Tensor, (X[:, None].contiguous(), X[:, None].transpose(2, 3).contiguous().transpose(2, 3))),
    (aten.mul.Tensor, (symbolic((3, 5), torch.long), 2)),
    (aten.mul.Tensor, (symbolic((3, 5), torch.long), 0.5)),
    (aten.add.Tensor, (X, symbolic((3, 5, 8), torch.bfloat16))),
    (aten.sub.Tensor, (X[:, :1], X)),
    (aten.neg.default, (Q,)),
    (aten.neg.default, (symbolic((3, 5), torch.long),)),
    (aten.silu.default, (X[:, :, ::2],)),
    (aten.pow.Tensor_Scalar, (X, 2)),
    (aten.rsqrt.default, (X[..., :1],)),
    (aten.gelu.default, (X.transpose(0, 2),)),
    (aten.mean.dim, (X, [-1], True)),
    (aten.mean.dim, (X, [2])),
    (aten.mean.dim, (X, [1], True)),
    (aten.mean.dim, (X, [-1, 1], True)),
    (aten.mean.dim, (X[..., :1], [-1], True)),
    (aten.mean.dim, (Q, [-1], True)),
    (aten.mean.dim, (X.transpose(0, 1), [-1], True)),
    (aten.mean.dim, (symbolic((3, 5, 8), torch.bfloat16), [-1], True)),
    (aten.mean.dim, (symbolic((8, 3, 5)), [-1], True)),
    (aten.native_layer_norm.default, (X, [8], torch.zeros(8), torch.zeros(8), 1e-5)),
    (aten.native_layer_norm.default, (X, [8], torch.zeros(8), None, 1e-5)),
    (aten.native_layer_norm.default, (X, [8], None, None, 1e-5)),
    (aten.native_layer_norm.default, (X.transpose(0, 1), [8], torch.zeros(8), torch.zeros(8), 1e-5)),
    (aten.native_layer_norm.default, (X, [X.shape[1], 8], None, None, 1e-5)),
    (aten.native_layer_norm.default, (symbolic((3, 5, 8), torch.bfloat16), [8], None, None, 1e-5)),
    (aten.cat.default, ([X, X], -1)),
    (aten.cat.default, ([X, X[..., :4]], 2)),
    (aten.cat.default, ([Q[..., 2:].neg(), Q[..., :2]], -1)),
    (aten.cat.default, ([Q[..., 2:], Q[..., :2]], -1)),
    (aten.cat.default, ([X, X],)),
    (aten.cat.default, ([X, X], 1)),
    (aten.cat.default, ([X[..., :1], X], -1)),
    (aten.cat.default, ([X.transpose(0, 1), X.transpose(0, 1)], -1)),
    (aten.cat.default, ([symbolic((3, 5, 8), torch.bfloat16), X], -1)),
    (aten.cat.default, ([X.permute(0, 2, 1)[:, None], X.permute(0, 2, 1)[:, None]], 2)),
    (aten.cat.default, ([symbolic((3, 5, 7, 4)).permute(0, 3, 1, 2)] * 2, 1)),
    (aten.cat.default, ([symbolic((3, 5, 4, 1)).permute(0, 3, 1, 2)] * 2, 3)),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_shape_is_torchs(case: int) -> None:
    op, args = CASES[case]
    args = tuple(MODE.from_tensor(item) if type(item) is torch.Tensor else item for item in args)
    with torch.no_grad(), MODE, symbolic_dispatch():
        expected = described(op(*args))
        with quick_shapes():
            assert described(op(*args)) == expected


def test_nothing_is_left_behind() -> None:
    before = dict(aten.linear.default.py_kernels)
    with pytest.raises(ZeroDivisionError), quick_shapes():
        raise ZeroDivisionError
    assert aten.linear.default.py_kernels == before
    x = torch.randn(2, 3, 8)
    weight = torch.randn(4, 8)
    with quick_shapes(), symbolic_dispatch():  # real tensors are computed
        assert torch.equal(aten.linear.default(x, weight), x @ weight.T)
