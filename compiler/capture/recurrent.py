"""transformers' functions of recurrent layers, answered with the dialect's ops for the time of a capture.

Mamba, Mamba 2, the gated delta rule and their relatives are computed by module-level functions under the names and with the
arguments of the kernels that stand in for them elsewhere (causal-conv1d, mamba-ssm, flash-linear-attention). In PyTorch they
loop over tokens or chunks, which is no graph for every length; the op that each stands for is. A function of such a name
with other arguments is left as it is, and what was captured is held to the model's own forward in either case.

Lightning attention (MiniMax) has no such function: a module with its attributes is computed anew here.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import optc.compiler.ops.dialect.recurrent  # noqa: F401  (registers the ops that answer)

_NORM_EPSILON = 1e-6
"""Of the norm over the keys and queries of the delta rule, in flash-linear-attention and transformers."""


def _conv(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """causal-conv1d: x [B,C,S], weight [C,K]."""
    out: Tensor = torch.ops.optc.causal_conv1d(hidden_states.to(weight.dtype), weight, bias)
    return _activated(out, activation).to(hidden_states.dtype)


def _activated(x: Tensor, name: str | None) -> Tensor:
    from transformers.activations import ACT2FN

    return x if name is None else ACT2FN[name](x)


def _state_space_dual(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Tensor:
    """mamba-ssm's mamba_chunk_scan_combined: x [B,S,H,V], dt [B,S,H], A [H], B and C [B,S,groups,K], D [H]."""
    assert initial_states is None, "a capture takes whole sequences"
    assert not return_final_states, "a capture takes whole sequences"
    step = _time_step(dt, dt_bias, dt_softplus).clamp(*dt_limit).float()
    x, heads = hidden_states.float(), hidden_states.shape[2]
    keys, queries = (item.float().repeat_interleave(heads // item.shape[2], 2) for item in (B, C))
    out: Tensor = torch.ops.optc.linear_attention(queries, keys, x * step[..., None], step * A.float(), None)
    return out if D is None else out + x * D[..., None]


def _time_step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    step = dt if bias is None else dt + bias.to(dt.dtype)
    return functional.softplus(step) if softplus else step


def _selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **_: Any,
) -> Tensor:
    """mamba-ssm's selective_scan_fn: x and dt [B,C,S], A [C,K], B and C [B,K,S]: a head of one value per channel."""
    assert not return_last_state, "a capture takes whole sequences"
    step = _time_step(dt.transpose(1, 2), delta_bias, delta_softplus).float()
    x = hidden_states.transpose(1, 2)
    shape = (*step.shape, A.shape[1])
    keys, queries = (item.float().transpose(1, 2)[:, :, None].expand(shape) for item in (B, C))
    values = (step * x.float())[..., None]
    out = torch.ops.optc.linear_attention(queries, keys, values, step[..., None] * A, None)[..., 0]
    out = out if D is None else out + x * D
    out = out.transpose(1, 2)
    return out if z is None else out * functional.silu(z)


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """flash-linear-attention's chunk_gated_delta_rule and chunk_kda: query and key [B,S,groups,K], value [B,S,H,V], g
    [B,S,H] or [B,S,H,K], beta [B,S,H]."""
    assert initial_state is None, "a capture takes whole sequences"
    assert not output_final_state, "a capture takes whole sequences"
    heads, width = value.shape[2], query.shape[-1]
    query, key = (item.repeat_interleave(heads // item.shape[2], 2).float() for item in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (item * torch.rsqrt((item * item).sum(-1, keepdim=True) + _NORM_EPSILON) for item in (query, key))
    out: Tensor = torch.ops.optc.linear_attention(query * width**-0.5, key, value.float(), g.float(), beta.float())
    return out.to(value.dtype), None


_LIGHTNING = ("qkv_proj", "act_fn", "slope_rate", "block_size", "norm", "output_gate", "out_proj", "head_dim")
"""Attributes of modules of lightning attention."""


def _lightning_attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Lightning attention (Qin et al., 2024) of hidden states [B,S,C]: a linear one whose heads forget at fixed rates."""
    assert past_key_values is None, "a capture takes whole sequences"
    states = module.act_fn(module.qkv_proj(hidden_states))
    if attention_mask is not None:
        states = states * attention_mask[..., None].to(states.dtype)
    heads = states.unflatten(2, (-1, 3 * module.head_dim)).float()
    decay = (-module.slope_rate.float().view(-1)).expand(heads.shape[:3])
    out = torch.ops.optc.linear_attention(*heads.split(module.head_dim, 3), decay, None)
    out = module.norm(out.flatten(2).to(hidden_states.dtype))
    return module.out_proj(torch.sigmoid(module.output_gate(hidden_states)) * out), None


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _conv,
    "mamba2_chunk_scan": _state_space_dual,
    "mamba_selective_scan": _selective_scan,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
}
"""By the names in transformers' modules; arguments as there."""


@contextmanager
def recurrent_functions(model: torch.nn.Module) -> Iterator[None]:
    """Let the modules of a model compute recurrent layers by the dialect's ops."""
    before = []
    lightning = [module for module in model.modules() if all(hasattr(module, name) for name in _LIGHTNING)]
    for module in lightning:
        module.forward = functools.partial(_lightning_attention, module)
    for name in {type(module).__module__ for module in model.modules()}:
        place = vars(sys.modules[name])
        for function, own in _FUNCTIONS.items():
            theirs = place.get(function)
            if callable(theirs) and _same_arguments(theirs, own):
                before.append((place, function, theirs))
                place[function] = _taking_known(theirs, own)
    try:
        yield
    finally:
        for place, function, theirs in before:
            place[function] = theirs
        for module in lightning:
            del module.forward


def _same_arguments(theirs: Callable[..., Any], own: Callable[..., Any]) -> bool:
    """Whether every argument of a function of transformers is known here, in the same order."""
    known, names = ([name for name, _ in _named(function)] for function in (own, theirs))
    return names == known[: len(names)]


def _named(function: Callable[..., Any]) -> list[tuple[str, inspect.Parameter]]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [(name, item) for name, item in inspect.signature(function).parameters.items() if item.kind not in kinds]


def _taking_known(theirs: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """`own` without what models hand down and transformers' function does not take either."""
    taken = {name for name, _ in _named(theirs)}

    def call(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **{name: value for name, value in kwargs.items() if name in taken})

    return call
