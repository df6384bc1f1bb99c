"""transformers' attention and mask interfaces, answered with one `optc.attention` per layer.

transformers lets a library register its own attention and its own mask maker. The mask maker gets
the mask as a Python closure; it is decoded here into what `optc.attention` can say (causal, window,
key padding), and anything else is refused: a mask that is dropped silently is a wrong model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import optc.compiler.ops.dialect.attention  # noqa: F401  (registers the op that answers)
from optc.compiler.capture.facts import text_config
from optc.compiler.diagnostics import CaptureError

NAME = "optc"

_MASK_ARGUMENTS = frozenset(
    (
        "batch_size",
        "q_length",
        "kv_length",
        "q_offset",
        "kv_offset",
        "allow_is_causal_skip",
        "allow_is_bidirectional_skip",
        "dtype",
        "config",
        "use_vmap",
        "device",
        "local_size",
    )
)
"""What transformers tells a mask maker beside the mask itself: sizes, and how the mask may be stored."""
_ATTENTION_ARGUMENTS = frozenset(
    (
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    )
)
"""What models hand down to attention functions that does not change what attention computes."""


@dataclass(frozen=True)
class Mask:
    """A decoded attention mask. `window` is that of `optc.attention`: below 0 for chunks."""

    causal: bool
    window: int = 0
    key_padding: Tensor | None = None

    def _used(self, *_: Any) -> Any:
        """A model that computes with its mask does not leave attention to transformers' interface."""
        raise own_attention(None)

    __add__ = __radd__ = __mul__ = __rmul__ = __getitem__ = _used

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise own_attention(None)


class AttentionError(CaptureError):
    """A model's attention is more than `optc.attention` can say; its eager spelling may still be captured."""


def caps_scores(config: Any) -> bool:
    """Whether a model's attention caps its scores: sdpa cannot, and transformers 5.17 leaves the cap out there."""
    return getattr(text_config(config), "attn_logit_softcapping", None) is not None


def own_attention(model: str | None) -> AttentionError:
    """The refusal of a model whose attention optc cannot stand in for."""
    return AttentionError(
        "the model picks its attention from a table of its own",
        where=model,
        why="it does not call transformers' attention interface, through which optc captures attention",
        remedy="capture with attention='eager'",
    )


def _refuse_unknown(given: dict[str, Any], known: frozenset[str], what: str, where: str | None) -> None:
    """Nothing that a library hands over is dropped: what is not known to be harmless must not be there."""
    names = [name for name, value in given.items() if name not in known and value is not None and value is not False]
    if names:
        raise AttentionError(
            f"the model gives its {what} an argument that optc does not know: {', '.join(sorted(names))}",
            where=where,
            why="attention computed without it would be another model's",
            remedy="capture with attention='eager'; relative position biases and sparse attention are spelled out there",
        )


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return dict(zip(names, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))


def _atoms(function: Callable[..., Any]) -> list[tuple[str, int]]:
    """The mask as a conjunction of atoms (kind, number); unknown closures are refused."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return [("causal", 0)]
    if function is masking_utils.bidirectional_mask_function:
        return []
    cells, kind = _closure(function), function.__qualname__.split(".", 1)[0]
    if kind == "and_masks":
        return [atom for part in cells["mask_functions"] for atom in _atoms(part)]
    if kind == "sliding_window_overlay":
        return [("window", int(cells["sliding_window"]))]
    if kind == "chunked_overlay":
        return [("chunk", int(cells["chunk_size"]))]
    if kind == "packed_sequence_mask_function":
        # Positions are base + i within a row (the contract's rule), so a row is one sequence.
        return []
    if kind == "remap_positions_for_packed_sequence":
        return _atoms(cells["mask_function"])
    if kind == "padding_mask_function":
        return []  # the padding itself arrives as `attention_mask`
    raise _inexpressible(kind)


def _inexpressible(kind: str) -> AttentionError:
    return AttentionError(
        f"the attention mask '{kind}' cannot be expressed",
        why="optc.attention knows causal, sliding-window, chunked and key-padding masks, and not all of them together",
        remedy="capture with attention='eager'",
    )


def make_mask(
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Mask:
    """The registered mask maker: a Mask instead of a tensor."""
    _refuse_unknown(others, _MASK_ARGUMENTS, "mask maker", None)
    atoms = _atoms(mask_function)
    windows = [number for kind, number in atoms if kind == "window"]
    chunks = {number for kind, number in atoms if kind == "chunk"}
    if chunks and (windows or len(chunks) > 1 or attention_mask is not None):  # chunks begin where padding ends
        raise _inexpressible("chunked_overlay")
    window = -chunks.pop() if chunks else min(windows, default=0)
    return Mask(any(kind == "causal" for kind, _ in atoms), window, attention_mask)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The registered attention: query [B,H,S,D], key and value [B,Hkv,T,D] -> [B,S,H,D]."""
    _refuse_unknown(others, _ATTENTION_ARGUMENTS, "attention", type(module).__name__)
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        mask = Mask(causal, int(sliding_window or 0))
    elif isinstance(attention_mask, Mask):
        mask = attention_mask
    else:
        raise AttentionError(
            "the model builds its attention mask outside transformers' mask interface",
            where=type(module).__name__,
            remedy="capture with attention='eager'",
        )
    if dropout and module.training:
        raise CaptureError("attention dropout is active", remedy="call model.eval() first")
    scale = float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5
    out = torch.ops.optc.attention(
        query,
        key,
        value,
        mask.key_padding,
        s_aux,
        scale=scale,
        causal=mask.causal,
        window=mask.window,
        softcap=float(softcap or 0.0),
    )
    return out.transpose(1, 2).contiguous(), None


def run_experts(module: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Mixture of experts without data-dependent shapes: every expert sees every token.

    hidden_states [N,C], top_k_index and top_k_weights [N,K] -> [N,C]. Exact; costs E/K times the work. The layouts are
    those that transformers' `use_experts_implementation` names: with or without gate, bias, transposition and a norm
    behind each expert; how gate and up projection lie beside each other is the module's own affair (`_apply_gate`).
    """
    out = torch.zeros_like(hidden_states)
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    activate: Any = module._apply_gate if getattr(module, "has_gate", True) else module.act_fn
    for expert in range(int(module.num_experts)):  # type: ignore[arg-type]
        weight = torch.where(top_k_index == expert, top_k_weights, 0.0).sum(-1, keepdim=True)
        inner = _expert_linear(
            module, "down_proj", expert, activate(_expert_linear(module, first, expert, hidden_states))
        )
        if getattr(module, "has_post_expert_norm", False):
            inner = module.post_expert_norm(inner)  # type: ignore[operator]
        out = out + inner * weight.to(hidden_states.dtype)
    return out


def _expert_linear(module: torch.nn.Module, name: str, expert: int, x: Tensor) -> Tensor:
    """[N,K] -> [N,M] by one expert's part of a weight [E,M,K], or [E,K,M] where it is transposed."""
    weight = getattr(module, name)[expert]
    weight = weight.t() if getattr(module, "is_transposed", False) else weight
    bias = getattr(module, f"{name}_bias")[expert] if getattr(module, "has_bias", False) else None
    return torch.nn.functional.linear(x, weight, bias)


def register() -> None:
    """Register attention, mask maker and experts with transformers; harmless when repeated."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
    ExpertsInterface.register(NAME, run_experts)


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Spare transformers the search for several sequences in a row, for masks that `make_mask` answers without it.

    Positions are base + i within a row; what is searched for would be traced, and then dropped.
    """
    from transformers import masking_utils

    with mock.patch.object(masking_utils, "find_packed_sequence_indices", _no_packing):
        yield


def _no_packing(_: Tensor) -> None:
    """What transformers finds where a row is one sequence. A Mock would keep the fakes that it was called with."""


@contextmanager
def indexed_masks() -> Iterator[None]:
    """Let transformers' eager masks be made of indices that are broadcast, where it would take `vmap` to be safe.

    torch.export writes a vmap down as calls of other graphs. Whether a mask's function can be called so is not asked: the
    captured program is held to the model's own forward, which has its masks by vmap.
    """
    from transformers.masking_utils import AttentionMaskInterface

    masks = AttentionMaskInterface()
    own = masks["eager"]
    AttentionMaskInterface.register("eager", lambda *args, **named: own(*args, **{**named, "use_vmap": False}))
    try:
        yield
    finally:
        AttentionMaskInterface.register("eager", own)
