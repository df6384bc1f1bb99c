"""TrainConfig: everything about a training run, with units and defaults. Recipes are YAML files of it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from optc.compiler.ir.devices import DEVICE_PATTERN
from optc.training.activation_checkpointing import CheckpointingConfig
from optc.training.compile import CompileConfig
from optc.training.lora import LoraConfig
from optc.training.parallel import ParallelConfig
from optc.training.qat import QatConfig

Count = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class OptimizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The optimizer.

    Attributes:
        name: adamw (Loshchilov and Hutter 2019), lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675) or
            sophia (SophiaH, Liu et al. 2023, https://arxiv.org/abs/2305.14342); the last two by pytorch_optimizer.
        lr: peak learning rate.
        weight_decay: decoupled, on parameters with two axes or more; norms and biases decay never.
        betas: decay of the first and the second moment; None takes the optimizer's own, (0.9, 0.95), (0.9, 0.99)
            and (0.965, 0.99).
        eps: added to the denominator (adamw and sophia).
        hessian_every: sophia: steps between two estimates of the Hessian's diagonal.
        gamma: sophia: entries of the Hessian below |gradient| / gamma are not divided by; such a weight moves by lr.
    """

    name: Literal["adamw", "lion", "sophia"] = "adamw"
    lr: Positive = 3e-4
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    betas: tuple[float, float] | None = None
    eps: Positive = 1e-8
    hessian_every: Count = 10
    gamma: Positive = 0.01


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The learning rate over the steps, as a share of optimizer.lr.

    Attributes:
        kind: constant, linear or cosine, after the warmup.
        warmup_steps: optimizer steps in which the rate rises linearly from 0.
        min_ratio: share of the peak at the last step (linear and cosine).
    """

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NotNegative = 0
    min_ratio: Share = 0.1


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is read and how it is cut into batches.

    Attributes:
        text: files: UTF-8 text (one document each), or .jsonl, .json, .parquet or a folder of `datasets`, as `optc
            compile --calibration` takes them.
        batching: "pack" lays several documents into each row of seq_len tokens; "tokens" puts documents of similar
            length together, each in a row of its own, up to the same number of tokens per batch. In neither does a
            token attend to another document.
        append_eos: end each document with the model's end-of-text token.
        shuffle: draw a new order with the seed in every epoch; False keeps the files' order.
    """

    text: tuple[str, ...] = ()
    batching: Literal["pack", "tokens"] = "pack"
    append_eos: bool = True
    shuffle: bool = True


class ScalerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The loss scale of fp16 (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).

    Attributes:
        initial: scale of the first step.
        growth_interval: steps without overflow after which the scale doubles; an overflow halves it and skips the step.
    """

    initial: Positive = 65536.0
    growth_interval: Count = 2000


class DistillConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Loss against a teacher (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

    loss = (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || student), per label token.

    Attributes:
        teacher: a model folder with the same vocabulary; "self" is the model before training and before
            quantization; None trains on the text alone.
        weight: share of the KL term, 0 to 1.
        temperature: both distributions are softened by it.
    """

    teacher: str | None = None
    weight: Share = 0.5
    temperature: Positive = 1.0


class SavingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Checkpoints of the run, in the folder OUTPUT.run beside the output.

    Attributes:
        every: optimizer steps between two checkpoints; 0 writes none.
        keep: newest checkpoints that stay.
        keep_run: leave the folder of checkpoints when the run has ended.
    """

    every: NotNegative = 50
    keep: Count = 2
    keep_run: bool = False


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training run.

    Attributes:
        model: model folder to start from.
        from_scratch: take the folder's config and tokenizer only; weights are drawn with the seed.
        output: folder to write.
        max_steps: optimizer steps.
        batch_size: rows of seq_len tokens per optimizer step: over all ranks and micro-batches together.
        seq_len: tokens per row, at most.
        gradient_accumulation: micro-batches per optimizer step and rank; it must divide batch_size / ranks.
        precision: fp32; bf16 and fp16 by autocast over fp32 weights (fp16 with a loss scale).
        clip_norm: largest L2 norm of the gradient; 0 does not clip.
        loss_chunk: tokens whose logits are alive at a time; 0 makes the logits of a micro-batch whole. Where a teacher,
            fp16, compile.scope=model or the model itself needs whole logits, they are made whole.
        seed: of weights, data order and dropout.
        device: cpu, cuda, cuda:N, or auto: cuda where there is one. With several ranks each takes its own GPU.
        on_nan: a loss that is not finite: "stop" ends the run, "skip" leaves that step out (at most 10 in a row).
        peak_tflops: the device's peak in TFLOP/s (1e12) at this precision, for MFU; None: known devices only.
        tensorboard: write event files to OUTPUT.run/tensorboard (extra `train`); they move into the output.
    """

    model: str = ""
    from_scratch: bool = False
    output: str = ""
    max_steps: Count = 200
    batch_size: Count = 8
    seq_len: Count = 512
    gradient_accumulation: Count = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip_norm: Annotated[float, Meta(ge=0)] = 1.0
    loss_chunk: NotNegative = 2048
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    device: Annotated[str, Meta(pattern=DEVICE_PATTERN)] = "auto"
    on_nan: Literal["stop", "skip"] = "stop"
    peak_tflops: Positive | None = None
    tensorboard: bool = False
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    scaler: ScalerConfig = ScalerConfig()
    distill: DistillConfig = DistillConfig()
    saving: SavingConfig = SavingConfig()
    lora: LoraConfig = LoraConfig()
    qat: QatConfig = QatConfig()
    checkpointing: CheckpointingConfig = CheckpointingConfig()
    compile: CompileConfig = CompileConfig()
    parallel: ParallelConfig = ParallelConfig()
