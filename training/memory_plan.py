"""Memory per rank of a training run, predicted before it starts.

One micro-batch goes forward and backward with fake tensors (shapes without data), by the very functions that the run
applies, and what lives at each moment is counted. No weight is read. What libraries, the allocator's rounding and
kernels' scratch memory take beside it is not known here.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optc.compiler.capture.loading import meta_model
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.model_folder.checkpoint import CheckpointInfo
from optc.compiler.model_folder.config_file import read_config
from optc.training.activation_checkpointing import apply_activation_checkpointing
from optc.training.blocks import transformer_blocks
from optc.training.chunked_head import chunked_head, loss_of
from optc.training.config import TrainConfig
from optc.training.data import Batch
from optc.training.distill import teacher_name
from optc.training.fp8_linears import apply_fp8
from optc.training.lora import apply_lora
from optc.training.metrics import tensor_bytes
from optc.training.models import attention_for
from optc.training.pairs import PairBatch
from optc.training.parallel import ParallelConfig
from optc.training.precision import autocast
from optc.training.qat import apply_qat
from optc.training.saved_tensors import LiveTensors
from optc.training.untrained import check_experts

_STATES = {"adamw": 2, "lion": 1, "sophia": 2}
"""Tensors of a weight's size that the optimizer keeps per weight: one or two moments, Sophia's Hessian."""


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted bytes on each rank.

    Attributes:
        weights, gradients, optimizer: what the rank holds of them; the teacher's weights among the first.
        activations: what else lives at the peak of the forward and backward pass of a micro-batch, with the weights
            that fsdp gathers. A first micro-batch has its gradients only when most activations are gone, so
            `peak` can be less than the sum.
        peak: the most at any moment of a step.
        peak_at: "backward" or "optimizer".
        ranks: processes.
        note: what makes the figure an upper bound; empty otherwise.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    peak_at: str
    ranks: int
    note: str = ""


class _DryRun(msgspec.Struct, frozen=True):
    """One whole model on one rank, in bytes.

    Attributes:
        weights: of all parameters and buffers; trained: of those that train, and so of their gradients.
        teacher: weights of the teacher, which every rank holds whole.
        largest: the largest trained parameter; block: the largest block; root: weights outside the blocks.
        live: peak of what a micro-batch makes while gradients of an earlier one are there already.
        live_first: the same with the gradients that it makes itself, where none were there.
    """

    weights: int
    teacher: int
    trained: int
    largest: int
    block: int
    root: int
    live: int
    live_first: int


def predict(config: TrainConfig, world_size: int = 1) -> MemoryPlan:
    """The memory of a run on `world_size` ranks.

    Raises:
        InputError: the model folder is missing or has no usable config.
        UsageError: heads on a frozen base, of which nothing is predicted.
    """
    if config.eagle3.enabled or config.medusa.enabled:
        raise UsageError(
            "the memory of heads on a frozen base is not predicted",
            where="eagle3.enabled" if config.eagle3.enabled else "medusa.enabled",
            remedy="run it with --max-steps 1; the log's first step has what it took",
        )
    cuda = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    rows = max(1, config.batch_size // (world_size * config.gradient_accumulation))
    found = _dry_run(msgspec.structs.replace(config, parallel=ParallelConfig()), rows)
    states = found.trained * _STATES[config.optimizer.name]
    kind, stage = config.parallel.kind, config.parallel.zero_stage
    split_state = kind in ("zero1", "fsdp", "deepspeed")
    split_gradients = kind == "fsdp" or (kind == "deepspeed" and stage >= 2)
    split_weights = kind == "fsdp" or (kind == "deepspeed" and stage == 3)
    weights = found.teacher + (found.weights // world_size if split_weights else found.weights)
    gradients = found.trained // world_size if split_gradients else found.trained
    optimizer = states // world_size if split_state else states
    activations = found.live
    if split_weights and world_size > 1:
        # The root's weights stay gathered with their gradients; of the blocks two (the next is fetched ahead), or all.
        blocks = 2 * found.block if config.parallel.reshard_after_forward else found.weights - found.root
        activations += 2 * found.root + blocks + found.block
    # AdamW is fused. The others work on all weights at once on CUDA, else on one at a time.
    together = found.trained // (world_size if split_weights else 1)
    scratch = 0 if config.optimizer.name == "adamw" else together if cuda else 2 * found.largest
    at_step = weights + gradients + optimizer + scratch
    in_backward = weights + gradients + optimizer + activations
    if config.gradient_accumulation == 1 and not split_gradients:
        in_backward = weights + optimizer + found.live_first  # gradients appear as activations go
    compiled = config.compile.scope != "none"
    return MemoryPlan(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        peak=max(at_step, in_backward),
        peak_at="optimizer" if at_step > in_backward else "backward",
        ranks=world_size,
        note="activations of eager mode: compile keeps fewer" if compiled else "",
    )


@lru_cache(maxsize=16)
def _dry_run(config: TrainConfig, rows: int) -> _DryRun:
    with FakeTensorMode():
        model = _fake_model(Path(config.model))
        check_experts(model, config)
        model = apply_qat(apply_lora(model, config.lora), config.qat)
        model, _ = apply_fp8(model, config.fp8, torch.device("cpu"))
        model = apply_activation_checkpointing(model, config.checkpointing)
        trained = [item for item in model.parameters() if item.requires_grad]
        weights = _bytes(model)
        blocks = [tensor_bytes(block.parameters()) for block in transformer_blocks(model)]
        teacher = _fake_teacher(config)
        with LiveTensors() as first:
            _backward(model, teacher, config, rows)
        with LiveTensors() as later:
            _backward(model, teacher, config, rows)
        return _DryRun(
            weights=weights,
            teacher=0 if teacher is None else _bytes(teacher),
            trained=tensor_bytes(trained),
            largest=max(item.nbytes for item in trained),
            block=max(blocks),
            root=weights - sum(blocks),
            live=later.peak,
            live_first=first.peak,
        )


def _bytes(model: nn.Module) -> int:
    return tensor_bytes([*model.parameters(), *model.buffers()])


def _fake_teacher(config: TrainConfig) -> Any | None:
    name = teacher_name(config)
    if name is None:
        return None
    return _fake_model(Path(config.model if name == "self" else name)).requires_grad_(False).eval()


def _fake_model(folder: Path) -> Any:
    if not folder.is_dir():
        raise InputError("the model folder does not exist", where=str(folder), remedy="give a folder with config.json")
    skeleton = meta_model(CheckpointInfo(folder, read_config(folder, trust_remote_code=None), {}, False))
    shape = skeleton.config
    shape._attn_implementation = attention_for(skeleton)
    shape.use_cache = False
    return type(skeleton)(shape).train()


def _backward(model: nn.Module, teacher: nn.Module | None, config: TrainConfig, rows: int) -> None:
    """One micro-batch; gradients stay."""
    rows *= 2 if config.dpo.enabled else 1  # two answers
    tokens = torch.zeros(rows, config.seq_len, dtype=torch.int64)
    # transformers would look into the positions for the bounds of documents: hand it the mask that it would make.
    mask = torch.ones(rows, 1, config.seq_len, config.seq_len, dtype=torch.bool)
    kind = PairBatch if config.dpo.enabled else Batch
    batch = kind(tokens, tokens, tokens, packed=True, padded=False)
    with autocast(config, tokens.device):
        loss = loss_of(
            partial(model, attention_mask=mask),
            batch,
            config,
            head=chunked_head(model, config, teacher),
            teacher=None if teacher is None else partial(teacher, attention_mask=mask),
        )
    loss.total.backward()
