"""What is measured in every step: loss, speed, gradient norm, loss scale, memory; kept as one JSON object per line."""

from __future__ import annotations

import io
import os
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from optc.compiler.analysis.module_linears import output_head
from optc.compiler.capture.facts import text_config
from optc.compiler.diagnostics import JSON_ERRORS, InputError, UsageError, os_errors
from optc.compiler.files import read_plain, sync_folder

# Dense peak in TFLOP/s (1e12) of tensor cores, from the makers' data sheets: bf16 and fp16, and TF32 for fp32.
_PEAKS = {"H100": (989.0, 494.0), "H200": (989.0, 494.0), "A100": (312.0, 156.0)}

_MOST_LOG = 256 << 20
"""Bytes of a log: more than half a million steps."""


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes on this rank.

    Attributes:
        weights: parameters and buffers, the teacher's too.
        gradients: of trainable parameters, after a backward pass.
        optimizer: its state, after a step.
        activations: what autograd keeps from the forward pass of one micro-batch; on a GPU the peak of the allocator
            less the other three, so scratch memory too.
        peak: the most the process held: resident memory on a CPU (Python and libraries too), allocated on a GPU.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


class StepRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One optimizer step, over all ranks.

    Attributes:
        step: from 1.
        epoch: passes over the text that are complete.
        loss: mean of what is minimized, nats per label token; None when it was not finite.
        cross_entropy, divergence: its parts (divergence: KL from the teacher); None of preferences.
        chosen_reward, rejected_reward: of preferences: beta times by how many nats an answer is more probable than by the
            reference, mean over pairs.
        reward_accuracy: share of pairs whose chosen answer has the higher reward.
        lr: learning rate.
        grad_norm: L2 norm before clipping; None when it was not finite.
        tokens: label tokens of the step.
        seconds: wall time of the step.
        tokens_per_s: tokens / seconds.
        mfu: share of the device's peak arithmetic, where that is known.
        scale: loss scale (fp16).
        skipped: why no update was made ("overflow", "not finite"), else None.
        resumed: the first step of a process that went on from a checkpoint.
        validation_loss: the same of the validation set, with the weights behind the step; in steps that measure it.
        validation_perplexity: exp of the cross-entropy in it.
        validation_accuracy: of preferences, its share of pairs as above.
        memory: the split, in the first step and the last one.
    """

    step: int
    epoch: int
    loss: float | None
    cross_entropy: float | None
    divergence: float | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    reward_accuracy: float | None = None
    lr: float
    grad_norm: float | None
    tokens: int
    seconds: float
    tokens_per_s: float
    mfu: float | None = None
    scale: float | None = None
    skipped: str | None = None
    resumed: bool = False
    validation_loss: float | None = None
    validation_perplexity: float | None = None
    validation_accuracy: float | None = None
    memory: Memory | None = None


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages on this rank, each counted once; of a sharded tensor its own shard."""
    sizes = {}
    for item in tensors:
        local = item.to_local() if hasattr(item, "to_local") else item
        sizes[local.untyped_storage()._cdata] = local.untyped_storage().nbytes()
    return sum(sizes.values())


def measure_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    teacher: nn.Module | None,
    gradients: int,
    activations: int,
    device: torch.device,
) -> Memory:
    """The memory of this rank, after a step."""
    models = [model] if teacher is None else [model, teacher]
    weights = tensor_bytes(item for each in models for item in (*each.parameters(), *each.buffers()))
    state = tensor_bytes(
        item for values in optimizer.state.values() for item in values.values() if isinstance(item, Tensor)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        activations = max(0, peak - weights - gradients - state)
    return Memory(weights=weights, gradients=gradients, optimizer=state, activations=activations, peak=peak)


def flops_per_token(model: Any, seq_len: int) -> int:
    """Floating-point operations per token of a training step (Chowdhery et al. 2022, PaLM, appendix B).

    6 per weight that multiplies (4 for a frozen one: no gradient of its own), and 12 * layers * hidden * seq_len for
    attention, counted in full although half of it is masked. What checkpointing computes again does not count.
    """
    embeddings = {id(item.weight) for item in model.modules() if isinstance(item, nn.Embedding)}
    head = output_head(model)
    tied = head is not None and id(head.weight) in embeddings
    count = 0
    for parameter in model.parameters():
        if parameter.dim() >= 2 and (id(parameter) not in embeddings or tied):
            count += (6 if parameter.requires_grad else 4) * parameter.numel()
    config = text_config(getattr(model, "config", None))
    layers, hidden = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
    return count + 12 * layers * hidden * seq_len


def peak_flops(device: torch.device, precision: str, given: float | None) -> float | None:
    """Peak FLOP/s of the device: as given in TFLOP/s, else of known devices, else None."""
    if given is not None:
        return given * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((row for key, row in _PEAKS.items() if key in name), None)
    return None if found is None else found[precision == "fp32"] * 1e12


class MetricsLog:
    """RUN/log.jsonl, and event files for tensorboard where wanted. A resumed run drops what came after its checkpoint.

    Raises:
        UsageError: tensorboard is wanted and not installed.
        InputError, ResourceError: the files cannot be written.
    """

    def __init__(self, run: Path, *, step: int, tensorboard: bool) -> None:
        self.path = run / "log.jsonl"
        self.records = [row for row in read_log(self.path) if row.step <= step] if self.path.exists() else []
        self._check_steps(step)
        with os_errors("writing the log", str(self.path)):
            lines = b"".join(msgspec.json.encode(row) + b"\n" for row in self.records)
            temporary = self.path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            sync_folder(run)
            self._file = self.path.open("ab")
        self._writer = _summary_writer(run / "tensorboard", step) if tensorboard else None

    def add(self, record: StepRecord) -> None:
        """Append a step."""
        self.records.append(record)
        with os_errors("writing the log", str(self.path)):
            self._file.write(msgspec.json.encode(record) + b"\n")
            self._file.flush()
        if self._writer is not None:
            for key in (
                "loss",
                "cross_entropy",
                "divergence",
                "chosen_reward",
                "rejected_reward",
                "reward_accuracy",
                "lr",
                "grad_norm",
                "tokens_per_s",
                "mfu",
                "scale",
                "validation_loss",
                "validation_perplexity",
                "validation_accuracy",
            ):
                value = getattr(record, key)
                if value is not None:
                    self._writer.add_scalar(key, value, record.step)

    def sync(self) -> None:
        """Make the steps so far as durable as the checkpoint that is written next."""
        with os_errors("writing the log", str(self.path)):
            os.fsync(self._file.fileno())

    def _check_steps(self, step: int) -> None:
        """Refuse a log that lacks steps of the checkpoint."""
        found = [row.step for row in self.records]
        if found != list(range(1, step + 1)):
            lost = next((i for i, number in enumerate([*found, 0], 1) if number != i), step)
            raise InputError(
                f"the log of the run lacks step {lost} of {step}",
                where=str(self.path),
                why="its checkpoint has that step; the log was changed or lost",
                remedy="remove the run's folder and start again, or put the log back",
            )

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_log(path: Path) -> list[StepRecord]:
    """The steps of a log. A last line that a kill cut short is left out.

    Raises:
        InputError: any other line is malformed.
    """
    records, lines = [], io.BytesIO(read_plain(path, "reading the log", most=_MOST_LOG))
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            records.append(msgspec.json.decode(line, type=StepRecord))
        except JSON_ERRORS as error:
            raise InputError(
                "the log is damaged",
                where=f"{path}:{number}",
                why=str(error),
                remedy="put the line right, or start the run again",
            ) from error
    return records


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "tensorboard is not installed",
            why=str(error),
            remedy="pip install 'optc[train]', or leave tensorboard out",
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)
