"""One optimizer step: micro-batches, token-weighted loss, clipping, loss scale, learning rate."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from optc.compiler.diagnostics import GateError
from optc.training.chunked_head import loss_of
from optc.training.data import Batch
from optc.training.deepspeed_zero import EngineOptimizer, backward
from optc.training.distill import Losses, LossSums, logits_of, loss_sums, mean_losses
from optc.training.metrics import StepRecord, flops_per_token, measure_memory, peak_flops, tensor_bytes
from optc.training.nonfinite import find_nonfinite
from optc.training.optimizers import estimate_hessian, set_learning_rate
from optc.training.parallel import clip_grad_norm, scale_loss, sum_over_ranks, synchronizing
from optc.training.precision import autocast
from optc.training.saved_tensors import SavedTensors
from optc.training.schedule import learning_rate_share
from optc.training.setup import Run

_MOST_SKIPPED = 10  # steps in a row without an update, before a run that may skip stops


def train_step(run: Run, *, last_good: str | None, with_memory: bool = False) -> StepRecord:
    """Do one step; gradients are those of (sum of the losses of all tokens) / (number of label tokens of the step), of
    preferences of the mean over pairs.

    The step's random numbers come from seed, step and rank alone, so a resumed run draws the same ones.

    Raises:
        GateError: a loss or gradient that is not finite, by policy; names step, layer and `last_good` checkpoint.
    """
    started = time.perf_counter()
    config, device = run.config, run.device
    epoch = run.reader.position.epoch
    batches = run.reader.next_step()
    tokens, terms = (
        int(sum_over_ranks(count, device))
        for count in (sum(batch.label_tokens for batch in batches), sum(batch.terms for batch in batches))
    )
    batches = [batch.to(device) for batch in batches]
    _seed((config.seed * 1_000_003 + run.step) * 4096 + run.world.rank)
    set_learning_rate(run.optimizer, learning_rate_share(config.schedule, run.step, config.max_steps))
    if with_memory and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses, activations = _backward(run, batches, terms, with_memory)
    gradients = tensor_bytes(item.grad for item in run.model.parameters() if item.grad is not None)
    skipped, norm = _update(run, batches, losses.loss)
    if skipped == "not finite":
        _not_finite(run, batches, last_good)
    memory = None
    if with_memory:
        memory = measure_memory(
            run.model,
            run.optimizer,
            teacher=run.teacher,
            gradients=gradients,
            activations=activations,
            device=device,
        )
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    seconds = time.perf_counter() - started
    peak = peak_flops(device, config.precision, config.peak_tflops)
    rate = tokens / seconds
    parts: dict[str, Any] = {
        name: None if value is None else _finite(value) for name, value in losses._asdict().items()
    }
    return StepRecord(
        step=run.step,
        epoch=epoch,
        **parts,
        lr=run.optimizer.param_groups[0]["lr"],
        grad_norm=_finite(norm),
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=rate,
        mfu=None if peak is None else rate * flops_per_token(run.model, config.seq_len) / run.world.size / peak,
        scale=run.scaler.get_scale() if run.scaler.is_enabled() else None,
        skipped=skipped,
        memory=memory,
    )


def _backward(run: Run, batches: Sequence[Batch], terms: int, with_memory: bool) -> tuple[Losses, int]:
    """Gradients of a step. Returns the losses of all ranks, and bytes of saved activations."""
    parts: list[LossSums] = []
    activations = 0
    for number, batch in enumerate(batches):
        saved = SavedTensors([*run.model.parameters(), *run.model.buffers()])
        last = number == len(batches) - 1
        with synchronizing(run.module, last=last):
            with saved if with_memory and number == 0 else contextlib.nullcontext():
                with autocast(run.config, run.device):
                    found = loss_of(run.module, batch, run.config, head=run.head, teacher=run.teacher)
                activations = max(activations, saved.bytes)
            loss = scale_loss(found.total, terms)
            if isinstance(run.optimizer, EngineOptimizer):
                backward(run.module, loss, last=last)
            else:
                run.scaler.scale(loss).backward()
        parts.append(replace(found, total=found.total.detach()))
    return mean_losses(parts, terms, run.device), activations


def _update(run: Run, batches: Sequence[Batch], loss: float) -> tuple[str | None, float]:
    """Clip and step. Returns why no update was made, and the norm of the gradient."""
    if isinstance(run.optimizer, EngineOptimizer):  # it clips and steps at once
        if math.isfinite(loss):
            run.optimizer.step()
            run.skipped = 0
        norm = run.optimizer.grad_norm or 0.0
        return (None if math.isfinite(loss) and math.isfinite(norm) else "not finite"), norm
    run.scaler.unscale_(run.optimizer)
    trained = [item for item in run.model.parameters() if item.requires_grad]
    norm = clip_grad_norm(trained, run.config.clip_norm or math.inf)
    if not math.isfinite(loss) or (not math.isfinite(norm) and not run.scaler.is_enabled()):
        return "not finite", norm
    before = run.scaler.get_scale()
    if run.config.optimizer.name == "sophia" and run.step % run.config.optimizer.hessian_every == 0:
        step: Any = run.optimizer.step
        step(hessian=_hessian(run, batches[0]))
    else:
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.skipped = 0
    return ("overflow" if run.scaler.get_scale() < before else None), norm


def _hessian(run: Run, batch: Batch) -> list[Tensor]:
    generator = torch.Generator(run.device).manual_seed(run.config.seed * 1_000_003 + run.step)

    def loss() -> Tensor:
        found = loss_sums(logits_of(run.model, batch), batch, run.config, run.teacher)
        return found.total / max(1, batch.label_tokens)

    found = estimate_hessian(run.optimizer, loss, generator)
    if run.world.size > 1:
        for item in found:
            dist.all_reduce(item)
            item /= run.world.size
    return found


def _not_finite(run: Run, batches: Sequence[Batch], last_good: str | None) -> None:
    """Skip the step, or stop, by the run's policy."""

    def forward() -> None:
        for batch in batches:
            with autocast(run.config, run.device):
                reference = run.teacher if run.config.dpo.enabled else None
                loss_of(run.model, batch, run.config, head=None, teacher=reference)

    run.skipped += 1
    if run.config.on_nan == "skip" and run.skipped <= _MOST_SKIPPED:
        if run.scaler.is_enabled():
            run.scaler.update(run.scaler.get_scale())  # it unscaled gradients and waits for a step
        return
    layer = find_nonfinite(run.model, forward)
    raise GateError(
        f"the loss or its gradient is not finite in step {run.step + 1}"
        + (f", the {run.skipped}th in a row" if run.config.on_nan == "skip" else ""),
        where=layer,
        why=f"last good checkpoint: {last_good or 'none yet'}",
        remedy="lower optimizer.lr, train in fp32 or bf16, or leave such steps out with --set on_nan=skip",
    )


def _seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % (1 << 32))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
