"""Where a model's own positions begin.

Most decoders count 0, 1, 2, ... RoBERTa and its relatives count on from the padding token's id: 2, 3, 4, ... (fairseq's
`make_positions`; Liu et al. 2019). Runtimes count from 0, so the captured program adds what is missing.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from optc.compiler.capture.attention import AttentionError, Mask
from optc.compiler.capture.proof.reference import OWN_ERRORS
from optc.compiler.diagnostics import CaptureError

_NAME = "optc-positions"
_LENGTH = 4


class _ReachedError(Exception):
    """The first attention was reached: positions have been made."""


def _stop(*_: Any, **__: Any) -> tuple[Tensor, None]:
    raise _ReachedError


def _any_mask(**_: Any) -> Mask:
    return Mask(causal=True)


def position_offset(model: Any) -> int:
    """What the model adds to 0, 1, 2, ... when it is given no positions; 0 when it takes none.

    Measured: the model is called up to its first attention without positions, and with 0, 1, 2, ...; the integer
    tensors that its modules receive are compared.

    Raises:
        CaptureError: its own positions are not 0, 1, 2, ... from some start on, or its forward fails.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return 0
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(_NAME, _stop)
    AttentionMaskInterface.register(_NAME, _any_mask)
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    pad = getattr(model.config, "pad_token_id", None)
    last = (
        int(model.get_input_embeddings().weight.shape[0]) - 1
    )  # some classes know a padding token of their own, 0 or 1
    ids = torch.full((1, _LENGTH), last if pad != last else 0, device=device)
    counted = torch.arange(_LENGTH, device=device)[None]
    before = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    try:
        own = _integers(model, {"input_ids": ids})
        given = _integers(model, {"input_ids": ids, "position_ids": counted})
    finally:
        model.config._attn_implementation = before
    shifts = {
        key: own[key] - counted
        for key, value in given.items()
        if key in own and value.shape == counted.shape == own[key].shape and torch.equal(value, counted)
    }
    firsts = {int(shift[0, 0]) for shift in shifts.values()}
    if len(firsts) > 1 or any(not bool((shift == shift[0, 0]).all()) for shift in shifts.values()):
        key = min(shifts)
        raise CaptureError(
            "the model counts positions in its own way",
            where=f"{type(model).__name__}: {key[0]}",
            why=f"without position_ids it makes {own[key].tolist()[0]} of four tokens",
            remedy="use a model whose positions go up by one",
        )
    return firsts.pop() if firsts else 0


def _integers(model: nn.Module, arguments: dict[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """(module path, argument) -> the integer tensors that modules receive before the first attention."""
    seen: dict[tuple[str, str], Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for name, value in (*((str(i), value) for i, value in enumerate(args)), *kwargs.items()):
                if isinstance(value, Tensor) and value.dtype == torch.int64:
                    seen.setdefault((path, name), value.detach().clone())

        return hook

    hooks = [
        module.register_forward_pre_hook(note(path), with_kwargs=True) for path, module in model.named_modules() if path
    ]
    try:
        with torch.no_grad():
            model(**arguments, return_dict=True)
    except (_ReachedError, AttentionError):  # the second: attention of the model's own reads its mask
        pass
    except OWN_ERRORS as error:
        raise CaptureError(
            "the model's own forward fails",
            where=type(model).__name__,
            why=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
            remedy="check that the model runs in transformers as it is",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen
