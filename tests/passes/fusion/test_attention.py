"""fuse-attention: what foreign graphs compute as attention becomes optc.attention, or is named and stays."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import make_model
from masks import Places, random_mask
from stages import apply, captured, full_logits, largest, sequences
from torch import Tensor, nn

from optc.compiler.capture import capture_model, capture_module
from optc.compiler.diagnostics import CaptureError, UsageError
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.contract import AttentionFacts
from optc.compiler.ir.program import Program
from optc.compiler.ir.verification import verify_program
from optc.compiler.rewriting.passes import PassResult
from optc.passes.fusion.attention import FuseAttention
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.static import StaticKVCache

ATTENTION = torch.ops.optc.attention.default
REPEATS = (
    torch.ops.aten.expand.default,
    torch.ops.aten.repeat.default,
    torch.ops.aten.repeat_interleave.self_int,
)
STOCK = [
    (family, attention)
    for family in ("llama", "qwen2", "mistral", "gpt2", "phi", "gemma2", "bert")
    for attention in ("sdpa", "eager")
    if (family, attention) not in (("gemma2", "sdpa"), ("qwen2", "eager"), ("phi", "eager"))
]


@functools.cache
def stock(family: str, attention: str) -> Program:
    """A family with transformers' own attention; treat it as read-only."""
    return capture_model(make_model(family), attention=attention)


@functools.cache
def fused(family: str, attention: str) -> PassResult:
    return apply(FuseAttention(), stock(family, attention))


def _inputs(family: str, batch: int, length: int) -> tuple[Tensor, ...]:
    """Token ids with positions that start anywhere, or, for BERT, with rows padded left and right."""
    generator = torch.Generator().manual_seed(batch + length)
    ids = torch.randint(3, 128, (batch, length), generator=generator)
    steps = torch.arange(length)[None]
    if family != "bert":
        return ids, steps + 9 * torch.arange(batch)[:, None]
    kept = (length - torch.arange(batch)[:, None]).clamp(min=1)
    mask = torch.where(torch.arange(batch)[:, None] % 2 == 0, steps < kept, steps >= length - kept)
    return ids, mask.long(), torch.zeros_like(ids)


@pytest.mark.parametrize(("family", "attention"), STOCK)
def test_stock_models_are_fused(family: str, attention: str) -> None:
    before, result = stock(family, attention), fused(family, attention)
    assert (result.matched, result.candidates, result.misses) == (2, 2, ())
    verify_program(result.program, "fuse-attention")
    assert len(result.program.calls(ATTENTION)) == 2
    assert not result.program.calls(*REPEATS)
    assert not result.program.calls(torch.ops.aten.softmax.int)
    for batch, length in ((1, 1), (2, 8), (3, 37)):
        inputs = _inputs(family, batch, length)
        assert largest([result.program(*inputs)], [before(*inputs)]) <= 1e-5


@pytest.mark.parametrize(("family", "attention"), STOCK)
def test_layers_are_those_of_the_registered_attention(family: str, attention: str) -> None:
    """Heads, scale, window and softcap, read off the graph, equal what transformers says."""
    assert fused(family, attention).program.contract.layers == captured(family).contract.layers


def test_the_given_program_stays() -> None:
    before = stock("llama", "sdpa")
    assert not before.calls(ATTENTION)
    assert before.contract.layers == ()
    assert fused("llama", "sdpa").program is not before


def test_later_passes_take_the_result() -> None:
    """Rotary fusion and a KV cache over a model captured with transformers' own attention."""
    program = apply(FuseRotary(), fused("mistral", "eager").program).program
    result = apply(StaticKVCache(), program)
    assert (result.matched, result.candidates) == (2, 2)
    rows = sequences(29, 1, 17)
    expected = [full_logits(stock("mistral", "eager"), row) for row in rows]
    assert largest(run_stage(result.program, rows).logits, expected) < 1e-5


def test_registered_attention_is_no_candidate() -> None:
    result = apply(FuseAttention(), captured("llama"))
    assert (result.matched, result.candidates, result.program) == (0, 0, captured("llama"))


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        capture_model(make_model("llama"), attention="spda")
    assert str(error.value) == (
        "unknown attention implementation 'spda'\n  remedy: did you mean 'sdpa'? known: eager, optc, sdpa"
    )


def test_attention_that_would_drop_the_softcap_is_refused() -> None:
    with pytest.raises(CaptureError) as error:
        capture_model(make_model("gemma2"), attention="sdpa")
    assert str(error.value) == (
        "the model does not support transformers' sdpa attention\n  where: Gemma2ForCausalLM\n"
        "  remedy: capture with attention='optc' or 'eager'"
    )


# -- modules ---------------------------------------------------------------------------------------


def _heads(x: Tensor, heads: int = 2) -> Tensor:
    """[B, S, H * D] -> [B, H, S, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class _Module(nn.Module):
    """Projections of x [B, S, 16] to heads of 8, 4 for queries and 2 for keys, and some weights."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.query, self.key, self.value = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.per_head = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None])
        self.register_buffer("root", torch.tensor(8.0).sqrt())
        self.register_buffer("triangle", torch.ones(1, 1, 16, 16).tril())

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        rest = () if extra is None else (extra,)
        q, k, v = _heads(self.query(x), 4), _heads(self.key(x)), _heads(self.value(x))
        return self.function(self, q, k, v, *rest)


def _capture(module: nn.Module, *inputs: Tensor, length: int | None = None) -> Program:
    axes = {0: "batch"} if length else {0: "batch", 1: "seq"}
    torch.manual_seed(0)
    return capture_module(module, inputs, dynamic={f"input_{i}": axes for i in range(len(inputs))})


def _flat(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple | list) else [out]


def _check(program: Program, matched: int, *inputs: Sequence[Tensor]) -> PassResult:
    """All candidates are fused and the numbers stay."""
    result = apply(FuseAttention(), program)
    assert (result.matched, result.misses) == (matched, ())
    verify_program(result.program, "fuse-attention")
    for given in inputs:
        assert largest(_flat(result.program(*given)), _flat(program(*given))) <= 1e-5
    return result


def _x(batch: int = 3, length: int = 9, width: int = 16) -> Tensor:
    return torch.randn((batch, length, width), generator=torch.Generator().manual_seed(length))


def _facts(program: Program) -> list[tuple[int, int, bool, int]]:
    return [(f.num_heads, f.num_kv_heads, f.causal, f.window) for f in program.contract.layers]


def test_sdpa_with_and_without_grouped_heads() -> None:
    def attend(m: _Module, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        one = k[:, :1]
        repeated = [part[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for part in (k, v)]
        return (
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            F.scaled_dot_product_attention(q, *repeated, is_causal=True, scale=0.3),
            F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
            F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat(1, 2, 1, 1)),
            F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)),
            F.scaled_dot_product_attention(q, one.expand(-1, 4, -1, -1), one.repeat_interleave(4, 1)),
            torch.softmax(q @ one.transpose(2, 3), -1) @ one,
        )

    result = _check(_capture(_Module(attend), _x()), 7, [_x()], [_x(1, 1)])
    heads = [(kv, causal) for _, kv, causal, _ in _facts(result.program)]
    # Repeating all heads in turn (k, v, k, v) is no grouping, and stays.
    assert heads == [(2, True), (2, True), (2, False), (4, False), (4, False), (1, False), (1, False)]
    assert [layer.scale for layer in result.program.contract.layers[:2]] == [8**-0.5, 0.3]


def test_a_view_that_relied_on_the_layout_of_sdpa() -> None:
    """torch's result lies in memory as [B, S, H, D], so that export leaves `contiguous` out before a view."""

    def attend(m: _Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return out.transpose(1, 2).contiguous().view(q.shape[0], q.shape[2], 32)

    program = _capture(_Module(attend), _x())
    (call,) = program.calls(torch.ops.aten.scaled_dot_product_attention.default)
    (transpose,) = call.users
    assert [user.target for user in transpose.users] == [torch.ops.aten.view.default]
    _check(program, 1, [_x()], [_x(1, 1)])


def test_keys_that_are_changed_after_their_repetition_stay_repeated() -> None:
    def attend(m: _Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        keys[:, 1] = 0.0
        return F.scaled_dot_product_attention(q, keys, values)

    result = _check(_capture(_Module(attend), _x()), 1, [_x()])
    assert _facts(result.program) == [(4, 4, False, 0)]


def test_attention_spelled_out() -> None:
    """A buffer for the causal mask, masked_fill, dropout in eval mode, and a view without `contiguous`."""

    def attend(m: _Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(q.shape[-1]))
        scores = scores.masked_fill(m.triangle[:, :, :9, :9] == 0, float("-inf"))
        weights = F.dropout(F.softmax(scores, dim=-1), 0.1, m.training)
        return (weights @ v).transpose(1, 2).contiguous().view(-1, 9, 32)

    result = _check(_capture(_Module(attend), _x(), length=9), 1, [_x()], [_x(1)])
    assert result.program.contract.layers == (
        AttentionFacts(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=8, scale=1 / math.sqrt(8), causal=True),
    )
    assert not result.program.calls(torch.ops.aten.dropout.default)
    assert "triangle" not in dict(result.program.weights())


def test_other_spellings() -> None:
    """einsum over [B, S, H, D], in-place scale and mask, a tensor that is one number, a softcap."""

    def attend(m: _Module, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        keep = torch.arange(q.shape[2])[None] <= torch.arange(q.shape[2])[:, None]
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        rows = [part.transpose(1, 2) for part in (q, k, v)]
        scores = torch.einsum("bqhd,bkhd->bhqk", rows[0], rows[1]).div_(3.0).masked_fill_(~keep, -1e9)
        first = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), rows[2]).flatten(2)
        second = torch.softmax(torch.where(keep, (q @ k.mT) / m.root, -1e9), -1) @ v
        capped = torch.tanh(q @ k.mT * 0.5 / 20.0) * 20.0 + torch.where(keep, 0.0, float("-inf"))
        return first, second, torch.softmax(capped, -1, dtype=torch.float32).to(v.dtype) @ v

    result = _check(_capture(_Module(attend), _x()), 3, [_x()], [_x(1, 1)])
    layers = result.program.contract.layers
    assert [layer.causal for layer in layers] == [True] * 3
    assert [round(layer.scale, 6) for layer in layers] == [0.333333, 0.353553, 0.5]
    assert [round(layer.softcap, 6) for layer in layers] == [0.0, 0.0, 20.0]


def test_one_head_without_an_axis() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            triangle = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            fused = F.scaled_dot_product_attention(x, x, x, triangle)
            return fused, torch.softmax(torch.bmm(x, x.transpose(1, 2)) / 4.0, -1).bmm(x)

    result = _check(_capture(Single(), _x()), 2, [_x()], [_x(1, 1)])
    assert _facts(result.program) == [(1, 1, True, 0), (1, 1, False, 0)]


def test_cross_attention() -> None:
    """More queries than keys and the other way round; torch's causal flag has no meaning of optc's there."""

    class Cross(nn.Module):
        def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            q, k = _heads(x), _heads(other)
            plain = F.scaled_dot_product_attention(q, k, k)
            return plain, F.scaled_dot_product_attention(q, k, k, is_causal=True)

    inputs = (_x(2, 9), _x(2, 5))
    program = capture_module(Cross(), inputs, dynamic={"input_0": {0: "b", 1: "s"}, "input_1": {0: "b", 1: "t"}})
    result = apply(FuseAttention(), program)
    (miss,) = result.misses
    assert (result.matched, miss.node) == (1, "scaled_dot_product_attention_1")
    assert miss.reason.startswith("is_causal aligns the first of s")
    for given in (inputs, inputs[::-1]):
        assert largest(list(result.program(*given)), list(program(*given))) <= 1e-5


class _Multihead(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.causal = nn.MultiheadAttention(16, 2, batch_first=True), causal

    def forward(self, x: Tensor, ignored: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if self.causal else None
        out, _ = self.attention(x, x, x, key_padding_mask=ignored, attn_mask=mask, need_weights=False)
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_torch_multihead_attention(causal: bool) -> None:
    """Its key padding is a mask merged with the heads; here it comes out as bool [B, S]."""
    ignored = torch.arange(9)[None] >= torch.tensor([9, 4, 6])[:, None]
    program = _capture(_Multihead(causal), _x(), ignored)
    result = _check(program, 1, [_x(), ignored], [_x(1, 1), ignored[:1, :1]])
    (call,) = result.program.calls(ATTENTION)
    padding = call.args[3].meta["val"]
    assert (padding.dtype, padding.dim()) == (torch.bool, 2)
    assert _facts(result.program) == [(2, 2, causal, 0)]


def test_padding_that_is_longer_than_the_keys() -> None:
    def attend(m: _Module, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, kept[:, None, None, :9])

    kept = torch.arange(12)[None] < torch.tensor([12, 4, 6])[:, None]
    result = _check(_capture(_Module(attend), _x(), kept, length=9), 1, [_x(), kept])
    (call,) = result.program.calls(ATTENTION)
    assert call.args[3].meta["val"].shape[1] == 9


# -- near misses -----------------------------------------------------------------------------------


def _misses(function: Any, *inputs: Tensor) -> list[str]:
    """The reasons why nothing in a module is fused."""
    program = _capture(_Module(function), *(inputs or (_x(length=9),)), length=9)
    result = apply(FuseAttention(), program)
    assert (result.matched, result.program) == (0, program)
    assert result.candidates == len(result.misses)
    return [miss.reason for miss in result.misses]


def test_masks_that_cannot_be_proved_are_named() -> None:
    def attend(m: _Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        distance = torch.arange(9)[None] - torch.arange(9)[:, None]
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
        attend = functools.partial(F.scaled_dot_product_attention, q, q, q)
        scores = q @ q.transpose(2, 3)
        return (
            attend(torch.rand(9, 9) > 0.5),
            attend(m.query.weight[:9, :9]),
            attend(bias[:, None]),
            torch.softmax(scores + slopes * distance, -1) @ q,
            torch.softmax(scores + q.sin() @ q.mT, -1) @ q,
        )

    assert _misses(attend, _x(), _x(width=9)) == [
        "rand (aten.rand.default) is not supported",
        "the weight query.weight is not a bound on k - q",
        "it depends on extra[b, q, k], an input",
        "the weight lifted_tensor_0 is not a bound on k - q",
        "add_1 adds matmul_2 to the scores, which is not a mask",
    ]


def test_masks_by_multiplication_need_another_that_masks_the_same() -> None:
    """GPT-1 multiplies scores by its mask and adds -10000 where that is 0; alone the product masks nothing."""

    def attend(m: _Module, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        scores, seen = q @ q.transpose(2, 3), m.triangle[..., :9, :9].float()
        window = torch.triu(seen, -3)
        return (
            torch.softmax(scores * seen, -1) @ q,
            torch.softmax(scores * window + -1e4 * (1 - seen), -1) @ q,
            torch.softmax(scores * (0.5 * seen + 0.5) + -1e4 * (1 - seen), -1) @ q,
        )

    misses = _misses(attend)
    assert [reason.split(" ", 1)[1] for reason in misses] == [
        "multiplies scores by 0 that are not masked",
        "multiplies scores by 0 that are not masked",
        "scales by add_1, which is neither one number nor a mask",
    ]


def test_scales_softmaxes_and_dropout_that_cannot_be_taken_are_named() -> None:
    def attend(m: _Module, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        scores = q @ q.transpose(2, 3)
        weights = torch.softmax(scores, -1)
        return (
            torch.softmax(scores * m.per_head, -1) @ q,
            torch.softmax(scores / q.mean(), -1) @ q,
            torch.softmax(scores, 2) @ q,
            F.dropout(torch.softmax(scores * 2.0, -1), 0.1, True) @ q,
            F.scaled_dot_product_attention(q, q, q, dropout_p=0.25),
            torch.softmax(torch.tanh(scores.masked_fill(m.triangle[..., :9, :9] == 0, -1e9)) * 20.0, -1) @ q,
            torch.softmax(scores.masked_fill(m.triangle[..., :9, :9] == 0, -8.0), -1) @ q,
            torch.softmax(scores.relu(), -1) @ q,
            weights,
            weights @ q,
        )

    assert _misses(attend) == [
        "its weights are also read by output",
        "mul scales by p_per_head, which is neither one number nor a mask",
        "div scales by mean, which is not one number",
        "it is taken over axis 2, not over the keys",
        "dropout (aten.dropout.default) changes its weights",
        "it applies dropout to its weights (p = 0.25)",
        "masked_fill masks scores before their softcap",
        "masked_fill_1 puts -8.0 in place of scores, which does not mask them",
        "relu (aten.relu.default) is not a scale, mask or softcap of scores",
    ]


def test_operands_that_do_not_fit_are_named() -> None:
    def attend(m: _Module, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        one, folded = q[:, :1], q.flatten(0, 1)
        grouped = q.unflatten(1, (2, 2))
        return (
            F.scaled_dot_product_attention(one, k, v),
            F.scaled_dot_product_attention(folded, folded, folded),
            torch.softmax(grouped @ k[:, :, None].transpose(-1, -2), -1) @ v[:, :, None],
        )

    program = _capture(_Module(attend), _x(), length=9)
    result = apply(FuseAttention(), program)
    reasons = [miss.reason for miss in result.misses]
    batch = program.user_inputs()[0].meta["val"].shape[0]
    few = f"({batch}, 2, 9, 8)"
    assert reasons == [
        f"its operands ({batch}, 1, 9, 8), {few} and {few} have shapes that do not match or are broadcast",
        f"the first axis of flatten, 4*{batch}, is not the batch axis of an input",
        "unflatten_3 has 5 axes, not [B, H, S, D]",
    ]


def test_a_mask_written_through_a_view_stays() -> None:
    def attend(m: _Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(9, 9, dtype=torch.bool).tril()
        mask[:, 0] = True
        mask[3] = False
        return F.scaled_dot_product_attention(q, q, q, mask)

    assert _misses(attend) == ["fill_ overwrites tril"]


def test_a_softmax_that_is_no_attention_is_no_candidate() -> None:
    def route(m: _Module, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.softmax(q.sum(-1), -1), torch.softmax(q, -1) @ k.new_ones(8, 3)

    assert _misses(route) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_random_masks_change_no_number(seed: int) -> None:
    """Whatever is fused under a random mask computes what it did, wherever a query sees any key."""
    source = random.Random(seed)
    makers = [random_mask(source, depth=1) for _ in range(16)]

    class Attentions(nn.Module):
        def forward(self, x: Tensor, pad: Tensor) -> tuple[Tensor, ...]:
            q, masks = _heads(x), [maker(Places.of(pad)) for maker in makers]
            attended = [F.scaled_dot_product_attention(q, q.sin(), q.cos(), mask) for mask in masks]
            return (*masks, *attended)

    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
        return _x(batch, length), _x(batch, length, 1)[..., 0] < 0.6

    program = _capture(Attentions(), *inputs(2, 7))
    result = apply(FuseAttention(), program)
    assert result.candidates == 16
    assert 3 <= result.matched <= 13
    for batch, length in ((1, 1), (2, 7), (3, 12)):
        given = inputs(batch, length)
        before, after = program(*given), result.program(*given)
        for mask, old, new in zip(before[:16], before[16:], after[16:], strict=True):
            sees = mask.expand(batch, 1, length, length).any(-1)[..., None]
            assert float(torch.where(sees, old - new, 0.0).abs().max()) <= 1e-5
