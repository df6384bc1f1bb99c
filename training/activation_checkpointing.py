"""Activation checkpointing: what a backward pass keeps from the forward pass, and what it computes again.

Recomputing blocks: Chen et al. 2016, https://arxiv.org/abs/1604.06174. Selective by op: Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198, by torch.utils.checkpoint's policies. The blocks keep their names: only their
`forward` is wrapped, so checkpoints and FSDP see the model as it was. Dropout replays its random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from optc.compiler.diagnostics import UsageError, unknown_name
from optc.compiler.settings.fields import check_struct
from optc.training.blocks import transformer_blocks
from optc.training.saved_tensors import SavedTensors
from optc.training.settings import CheckpointingConfig

M = TypeVar("M", bound=nn.Module)
Forward = Callable[..., Any]


def apply_activation_checkpointing(model: M, config: CheckpointingConfig) -> M:
    """Make the model's transformer blocks recompute activations in the backward pass; returns the model.

    A KV cache is switched off: a recomputed block would append to it twice.

    Raises:
        UsageError: a model without repeated blocks, a value out of range, an unknown op; later, in the first
            forward pass, a budget below what recomputing every block keeps.
    """
    check_struct(config)
    if config.policy == "none":
        return model
    blocks = transformer_blocks(model)
    if hasattr(model, "config") and hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if config.policy == "budget":
        budget = _Budget(config.budget, len(blocks))
        for index, block in enumerate(blocks):
            block.forward = partial(budget.run, index, block.forward)
        return model
    options: dict[str, Any] = {}
    if config.policy == "selective":
        policy = op_policy(config.keep)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    step = config.every_n if config.policy == "every-n" else 1
    wrappers: dict[Forward, Forward] = {}
    for block in blocks[::step]:
        bound: Any = block.forward
        assert bound.__self__ is block, "a block's forward is a method"
        run = wrappers.setdefault(bound.__func__, _checkpointed(bound.__func__, options))
        block.forward = MethodType(run, block)
    return model


def _checkpointed(forward: Forward, options: dict[str, Any]) -> Forward:
    """One function for all blocks: with one each, torch.compile would compile each."""

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, self, *args, use_reentrant=False, **options, **kwargs)

    return run


_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm")
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def _ops(names: Iterable[str]) -> set[Any]:
    """The default overloads of the ATen ops that this torch has."""
    return {getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)}


def op_policy(keep: Iterable[str]) -> Callable[..., CheckpointPolicy]:
    """The policy function of torch.utils.checkpoint that keeps what `keep` names (see CheckpointingConfig).

    Raises:
        UsageError: a name that is neither a kind nor an ATen op.
    """
    products, kept, narrow = _ops(_PRODUCTS), set(), False
    for name in keep:
        if name == "narrow-matmul":
            narrow = True
        elif name in ("matmul", "attention"):
            kept |= products if name == "matmul" else _ops(_ATTENTION)
        else:
            kept.add(_find_op(name))

    def policy(_: Any, op: Any, *args: Any, **__: Any) -> CheckpointPolicy:
        if op in kept or (narrow and op in products and _is_narrow(args)):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _is_narrow(args: tuple[Any, ...]) -> bool:
    left, right = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() > 1][-2:]  # no bias, no scales
    return right.shape[-1] <= left.shape[-1]


def _find_op(name: str) -> Any:
    space, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if space == "aten" and hasattr(torch.ops.aten, packet):
        op = getattr(torch.ops.aten, packet)
        if (overload or "default") in op.overloads():
            return getattr(op, overload or "default")
    raise unknown_name("kind of op", name, ["attention", "matmul", "narrow-matmul", "aten.mm.default"])


class _Budget:
    """Decides, per shape of the batch, which blocks are recomputed.

    Block 0 is measured in its first forward pass, and stands for all: they are of one class and size.
    """

    def __init__(self, budget: float, blocks: int) -> None:
        self.budget, self.blocks = budget, blocks
        self.recomputed: dict[Any, frozenset[int]] = {}

    def run(self, index: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise UsageError(
                "checkpointing policy budget measures blocks as they run, which compiled blocks do not allow",
                remedy="use compile.activation_budget",
            )
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        key = tuple(tuple(arg.shape) for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        if key not in self.recomputed:
            assert index == 0, "block 0 runs first"
            with SavedTensors(_parameters_of(forward)) as saved:
                output = forward(*args, **kwargs)
            inputs = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor) and arg.requires_grad]
            self.recomputed[key] = self.choose(saved.bytes, sum(arg.nbytes for arg in inputs))
            if index not in self.recomputed[key]:
                return output
            del output
        if index in self.recomputed[key]:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    def choose(self, kept: int, least: int) -> frozenset[int]:
        """The blocks to recompute, spread evenly, when one keeps `kept` bytes, and `least` when recomputed."""
        limit = self.budget if self.budget > 1 else self.budget * kept * self.blocks
        for count in range(self.blocks + 1):
            if count * least + (self.blocks - count) * kept <= limit:
                return frozenset(step * self.blocks // count for step in range(count))
        raise UsageError(
            f"checkpointing.budget {self.budget:g} is too small",
            why=f"the inputs of {self.blocks} recomputed blocks alone take {self.blocks * least} bytes per micro-batch",
            remedy=f"allow {self.blocks * least} bytes or more, or use a smaller micro-batch or seq_len",
        )


def _parameters_of(forward: Forward) -> Iterable[Tensor]:
    owner = getattr(forward, "__self__", None)
    assert isinstance(owner, nn.Module)
    return owner.parameters()
