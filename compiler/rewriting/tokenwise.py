"""What a KV cache demands: causal attention, and proof by trial that nothing else mixes tokens.

Feeding tokens in pieces must change nothing but what attention sees. With every attention replaced
by a token-wise stand-in, the logits of a token may depend on its id and its position alone, so
permuting the tokens, or dropping some, must commute with the model. A model that counts its own
positions, averages over the sequence or convolves along it does not commute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.attention_calls import SOFTMAXES
from optc.compiler.analysis.dataflow import aten, readers
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.eager import runner
from optc.compiler.rewriting.made_weights import MadeWeights
from optc.compiler.rewriting.passes import Miss
from optc.compiler.rewriting.retrace import axis_limit

_ATTENTION = torch.ops.optc.attention.default
_SCAN, _CONVOLUTION = torch.ops.optc.linear_attention.default, torch.ops.optc.causal_conv1d.default
_COMPARISONS = tuple(getattr(op, kind) for op in (aten.ne, aten.eq) for kind in ("Scalar", "Tensor"))
_TOKENS = 13
_KEPT = 5


def cache_misses(
    program: Program,
    *,
    sinks: bool,
    states: bool = False,
    recurrent: bool = False,
    made: MadeWeights | None = None,
) -> tuple[Miss, ...]:
    """Why the attention of a program cannot read a KV cache; empty when it can.

    Args:
        sinks: whether the cache's attention has sinks.
        states: whether the program may read hidden states beside tokens, as draft models do.
        recurrent: whether the cache holds states of recurrent layers too.
        made: keeps what is made of codes, as the program is run.
    """
    contract, calls = program.contract, program.calls(_ATTENTION)
    roles = [spec.role for spec in contract.inputs]
    if contract.kv_cache.kind != "none":
        return (Miss("program", f"it already has a {contract.kv_cache.kind} KV cache"),)
    if contract.kind != "decoder":
        return (Miss("program", f"its kind is {contract.kind}: only a decoder continues a sequence"),)
    if states and contract.draft is not None:
        roles = [role for role in roles if role not in ("base_states", "own_states")]
    if roles != ["input_ids", "position_ids"] or not contract.position_rule:
        return (Miss("program", "its inputs are not input_ids and position_ids, counted up within a row"),)
    layers = program.calls(_SCAN, _CONVOLUTION)
    if layers and not recurrent:
        why = "a recurrent layer: this cache holds keys and values, and no states"
        return tuple(Miss(node.name, why) for node in layers)
    if not calls and (not layers or any(node.target in SOFTMAXES for node in program.graph.nodes)):
        return _unfused(program)
    misses = tuple(Miss(node.name, reason) for node in calls if (reason := _attention_miss(node, sinks)))
    if misses:
        return misses
    error = mixing_error(program, made=made)
    tolerance = mixing_tolerance(program.calls(*_MIXERS)[0].meta["val"].dtype)
    if not error <= tolerance:
        why = f"the logits of a token depend on other tokens outside attention (by {error:.1e} of the largest"
        return (Miss("program", f"{why} logit, {tolerance:.1e} is rounding): they cannot be fed in pieces"),)
    return ()


def _unfused(program: Program) -> tuple[Miss, ...]:
    """Why there is no attention, with the softmaxes that were left."""
    taken = "fuse-attention takes scaled products, masks and biases of keys (ALiBi), and nothing else"
    left = [node for node in program.graph.nodes if node.target in SOFTMAXES]
    if not left:
        return (Miss("program", "it has no optc.attention (fuse-attention makes it)"),)
    return tuple(Miss(node.name, f"its attention is left as it was spelled: {taken}") for node in left)


def cache_dtype(program: Program) -> torch.dtype:
    """The dtype of a cache: that of the keys which the first attention reads."""
    key: Any = program.calls(_ATTENTION)[0].args[1]
    dtype: torch.dtype = key.meta["val"].dtype
    return dtype


def _attention_miss(node: Node, sinks: bool) -> str | None:
    q, k = (argument.meta["val"] for argument in node.args[:2])
    if not node.kwargs["causal"]:
        return "the attention is not causal: old tokens see new ones"
    if node.args[3] is not None:
        return "the attention has a padding mask beside the causal one"
    if node.args[4] is not None and not sinks:
        return "the attention has sinks, which this cache's attention lacks"
    if str(q.shape[2]) != str(k.shape[2]):
        return f"{k.shape[2]} keys for {q.shape[2]} queries: the keys come from other tokens"
    return None


def mixing_error(program: Program, *, seed: int = 0, made: MadeWeights | None = None) -> float:
    """How much the logits of one token depend on the others when attention is cut; 0 is not at all.

    The largest difference over a permutation and a subset of 13 random tokens at random positions, and over the end of
    the tokens at positions that count up, relative to the largest logit: a mask may be made of positions, and take those
    that do not count up for other sequences. `program` takes input_ids and position_ids [B,S].
    """
    generator, device = torch.Generator().manual_seed(seed), program_device(program)
    limit = _context(program)
    count = min(_TOKENS, limit)
    vocabulary = _vocabulary(program)
    ids = torch.randint(0, vocabulary, (1, count), generator=generator).to(device)
    padding = padding_token(program)
    ids = ids if padding is None else torch.where(ids == padding, (ids + 1) % vocabulary, ids)
    positions = torch.randint(0, limit, (1, count), generator=generator).to(device)
    states = [
        torch.randn((1, count, int(node.meta["val"].shape[2])), generator=generator).to(device, node.meta["val"].dtype)
        for node in program.user_inputs()[2:]
    ]

    run = runner(program, _MIXERS, made=made)

    def logits(chosen: Tensor, places: Tensor = positions) -> Tensor:
        out: Tensor = run(*(item[:, chosen] for item in (ids, places, *states)))[0]
        return out[0].double()

    every = torch.arange(count, device=device)
    counted = every[None] + (limit - count) // 2
    full, in_order = logits(every), logits(every, counted)
    order, end = torch.randperm(count, generator=generator).to(device), every[min(_KEPT, count - 1) :]
    trials = [(logits(chosen), full[chosen]) for chosen in (order, order[: min(_KEPT, count)])]
    trials.append((logits(end, counted), in_order[end]))
    error = max(float((found - wanted).abs().max()) for found, wanted in trials)
    return error / max(float(full.abs().max()), 1e-30)


def padding_token(program: Program) -> int | None:
    """The padding token of a program that compares its ids with something: it is no part of a text there (XLM counts the
    others to find the length)."""
    pad = program.contract.model.pad_token_id
    compares = any(user.target in _COMPARISONS for user in readers(program.user_inputs()[0]))
    return pad if compares and pad is not None and pad >= 0 else None


def mixing_tolerance(dtype: torch.dtype) -> float:
    """The error that rounding may cause: half the digits of the dtype.

    Matrix kernels sum in an order that depends on the number of rows (1e-7 in float32), mixing
    tokens moves logits by tenths.
    """
    return float(torch.finfo(dtype).eps ** 0.5)


def _context(program: Program) -> int:
    """Positions below this number are safe to feed."""
    known = (axis_limit(program.user_inputs()[0], program, 1), program.contract.model.context_length)
    return min((limit for limit in known if limit), default=_TOKENS)


def _vocabulary(program: Program) -> int:
    """Token ids below this number are safe to feed."""
    output = program.graph.output_node().args[0]
    width = int(output[0].meta["val"].shape[-1])
    return min(width, program.contract.model.vocab_size or width)


def _stand_in(args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
    """A token-wise function of q, k and v in attention's output shape [B,H,S,Dv]."""
    q, k, v = args[:3]
    heads, width = q.shape[1], v.shape[3]
    total: Tensor = v.new_zeros((*q.shape[:3], width))
    for part in (q, k, v):
        wide = part.repeat_interleave(heads // part.shape[1], 1)
        times = -(-width // wide.shape[3])
        total = total + wide.repeat(1, 1, 1, times)[..., :width]
    return total


def _scan_stand_in(args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
    """A token-wise function of the operands of linear attention, [B,S,H,V]: its first step."""
    query, key, value, decay, beta = args
    out: Tensor = value * (query * key).sum(-1, keepdim=True)
    out = out * (1 if beta is None else beta[..., None])
    return out + (decay[..., None] if decay.dim() == 3 else decay.sum(-1, keepdim=True))


def _convolution_stand_in(args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
    """Each token [B,C,S] by the whole weight [C,K], as if it stood there K times."""
    x, weight, bias = args
    out: Tensor = x * weight.sum(1)[:, None]
    return out if bias is None else out + bias[:, None]


_MIXERS = {_ATTENTION: _stand_in, _SCAN: _scan_stand_in, _CONVOLUTION: _convolution_stand_in}
"""What mixes tokens, and token-wise functions in its place."""
