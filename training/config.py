"""TrainConfig: everything about a training run, with units and defaults. Recipes are YAML files of it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from optc.compiler.settings.device import DeviceName
from optc.training.settings import (
    CheckpointingConfig,
    CompileConfig,
    DpoConfig,
    Fp8Config,
    LoraConfig,
    ParallelConfig,
    QatConfig,
    ValidationConfig,
)


class OptimizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The optimizer: AdamW (Loshchilov and Hutter 2019), Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675) or
    SophiaH (Liu et al. 2023, https://arxiv.org/abs/2305.14342)."""

    name: Annotated[Literal["adamw", "lion", "sophia"], Meta(description="Lion and Sophia need the extra train.")] = (
        "adamw"
    )
    lr: Annotated[float, Meta(gt=0, description="Peak learning rate.")] = 3e-4
    weight_decay: Annotated[
        float, Meta(ge=0, description="Decoupled; on parameters with two axes or more: norms and biases never decay.")
    ] = 0.0
    betas: (
        Annotated[
            tuple[float, float],
            Meta(
                description="Decay of the first and the second moment.",
                extra={
                    "default": "the optimizer's own: (0.9, 0.95), (0.9, 0.99), (0.965, 0.99)",
                    "expected": "two numbers",
                },
            ),
        ]
        | None
    ) = None
    eps: Annotated[float, Meta(gt=0, description="Added to the denominator (adamw and sophia).")] = 1e-8
    hessian_every: Annotated[
        int, Meta(ge=1, description="Of sophia: steps between two estimates of the Hessian's diagonal.")
    ] = 10
    gamma: Annotated[
        float,
        Meta(gt=0, description="Of sophia: a weight whose gradient exceeds gamma times its curvature moves by lr."),
    ] = 0.01


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The learning rate over the steps, as a share of optimizer.lr."""

    kind: Annotated[
        Literal["constant", "linear", "cosine"], Meta(description="Course of the rate after the warmup.")
    ] = "cosine"
    warmup_steps: Annotated[int, Meta(ge=0, description="Optimizer steps in which the rate rises linearly from 0.")] = 0
    min_ratio: Annotated[
        float, Meta(ge=0, le=1, description="Share of the peak at the last step (linear and cosine).")
    ] = 0.1


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is read and how it is cut into batches."""

    text: Annotated[
        tuple[str, ...],
        Meta(
            description="Training text, .jsonl, .json of token ids, .parquet or a dataset's folder (repeatable).",
            extra={"metavar": "FILE"},
        ),
    ] = ()
    batching: Annotated[
        Literal["pack", "tokens"],
        Meta(
            description="Rows of several documents, or documents of similar length side by side; see Batches in "
            "docs/train.md."
        ),
    ] = "pack"
    append_eos: Annotated[bool, Meta(description="End each document with the model's end-of-text token.")] = True
    shuffle: Annotated[
        bool, Meta(description="A new order in every epoch, drawn with the seed; false keeps the files' order.")
    ] = True


class ScalerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The loss scale of fp16 (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740)."""

    initial: Annotated[float, Meta(gt=0, description="Of fp16: loss scale of the first step.")] = 65536.0
    growth_interval: Annotated[
        int,
        Meta(
            ge=1,
            description="Of fp16: steps without overflow after which it doubles; an overflow halves it and skips "
            "the step.",
        ),
    ] = 2000


class DistillConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Loss against a teacher (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

    loss = (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || student), per label token.
    """

    teacher: (
        Annotated[
            str,
            Meta(
                description="A model folder with the same vocabulary, or self: the model before training and "
                "quantization.",
                extra={"default": "none: the text alone"},
            ),
        ]
        | None
    ) = None
    weight: Annotated[float, Meta(ge=0, le=1, description="Share of the KL term in the loss.")] = 0.5
    temperature: Annotated[float, Meta(gt=0, description="Softens both distributions.")] = 1.0


class EagleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A draft model on a frozen base (EAGLE-3, Li et al. 2025, https://arxiv.org/abs/2503.01840)."""

    enabled: Annotated[
        bool,
        Meta(description="Train a draft model of one layer by the model's own logits; the model is left as it is."),
    ] = False
    draft_tokens: Annotated[
        int, Meta(ge=1, le=16, description="Tokens drafted in a row in training, from each position.")
    ] = 4
    decay: Annotated[
        float, Meta(gt=0, le=1, description="Weight of a drafted token over that of the one before it.")
    ] = 0.8
    draft_vocab_size: Annotated[
        int, Meta(ge=2, le=1 << 24, description="Tokens that can be drafted: the most frequent ones of the text.")
    ] = 32000
    boundaries: (
        Annotated[
            tuple[int, int, int],
            Meta(
                description="Hidden states that are read: 0 is the embedding, j what leaves layer j, counted from 1.",
                extra={
                    "default": "2, the middle, the last but 2; of a small model nearer to the ends",
                    "expected": "three numbers",
                },
            ),
        ]
        | None
    ) = None
    intermediate_size: (
        Annotated[int, Meta(ge=1, le=1 << 24, description="Of the layer's MLP.", extra={"default": "the model's"})]
        | None
    ) = None
    norm_before_residual: Annotated[
        bool, Meta(description="Whether the layer's residual is the normed state, or the state itself.")
    ] = True


class MedusaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Heads on a frozen base that guess several tokens ahead (Medusa-1, Cai et al. 2024, https://arxiv.org/abs/2401.10774)."""

    enabled: Annotated[
        bool, Meta(description="Train heads for the tokens behind the next one; the model is left as it is.")
    ] = False
    heads: Annotated[int, Meta(ge=1, le=16, description="Tokens guessed behind the next one, by a head each.")] = 4
    layers: Annotated[int, Meta(ge=1, le=8, description="Residual blocks of each head.")] = 1
    decay: Annotated[
        float, Meta(gt=0, le=1, description="Weight of a head in the loss over that of the one before it.")
    ] = 0.8
    own_linear: Annotated[
        bool, Meta(description="A linear over the vocabulary of its own for each head; false: all share the model's.")
    ] = False
    targets: Annotated[
        Literal["distribution", "text"],
        Meta(description="What heads are held to: the model's own distribution at each place, or the text's tokens."),
    ] = "distribution"


WrittenType = Literal["source", "fp32", "bf16", "fp16"]


class SavingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Checkpoints of the run, in the folder OUTPUT.run beside the output, and the type of the folder that it ends with."""

    dtype: Annotated[
        WrittenType,
        Meta(
            description="Type of the trained folder's weights; source: each as the folder to start from has it. A run itself "
            "keeps float32, in its checkpoints too."
        ),
    ] = "source"
    every: Annotated[int, Meta(ge=0, description="Optimizer steps between two checkpoints; 0 writes none.")] = 50
    minutes: Annotated[
        float,
        Meta(
            ge=0,
            description="A checkpoint is also written as soon as the newest is so old, or 20 times as old as writing it "
            "took; 0: by steps alone.",
        ),
    ] = 5.0
    keep: Annotated[
        int, Meta(ge=1, description="Newest checkpoints that stay, and with a validation set the best one.")
    ] = 2
    keep_run: Annotated[bool, Meta(description="Leave OUTPUT.run when the run has ended.")] = False


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training run."""

    model: Annotated[str, Meta(description="Model folder to start from.")] = ""
    from_scratch: Annotated[
        bool, Meta(description="Take the folder's config and tokenizer only; weights are drawn with the seed.")
    ] = False
    output: Annotated[
        str, Meta(description="Folder of the trained model.", extra={"short": "-o", "metavar": "PATH"})
    ] = ""
    max_steps: Annotated[int, Meta(ge=1, description="Optimizer steps.")] = 200
    epochs: (
        Annotated[
            float,
            Meta(
                gt=0,
                le=1e6,
                description="Passes over the text, in place of max_steps.",
                extra={"default": "max_steps"},
            ),
        ]
        | None
    ) = None
    batch_size: Annotated[
        int,
        Meta(ge=1, description="Rows of seq_len tokens per optimizer step, over all ranks and micro-batches together."),
    ] = 8
    seq_len: Annotated[int, Meta(ge=1, description="Tokens per row, at most.")] = 512
    gradient_accumulation: Annotated[
        int, Meta(ge=1, description="Micro-batches per optimizer step and rank; it must divide batch_size / ranks.")
    ] = 1
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], Meta(description="bf16 and fp16: autocast over fp32 weights.")
    ] = "fp32"
    clip_norm: Annotated[float, Meta(ge=0, description="Largest L2 norm of the gradient; 0 does not clip.")] = 1.0
    loss_chunk: Annotated[
        int,
        Meta(
            ge=0,
            description="Tokens whose logits are alive at a time; 0: whole logits, as compile.scope=model, preferences "
            "or a model that changes its logits after the head need them.",
        ),
    ] = 2048
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1, description="Seed of weights, data order and dropout.")] = 0
    device: Annotated[
        DeviceName, Meta(description="Where the training runs; with several ranks each takes its own GPU.")
    ] = "auto"
    on_nan: Annotated[
        Literal["stop", "skip"],
        Meta(
            description="At a loss that is not finite: stop ends the run, skip leaves the step out (at most 10 in a "
            "row)."
        ),
    ] = "stop"
    peak_tflops: (
        Annotated[
            float,
            Meta(
                gt=0,
                description="The device's peak in TFLOP/s (1e12) at this precision, for MFU.",
                extra={"default": "known for A100, H100, H200"},
            ),
        ]
        | None
    ) = None
    tensorboard: Annotated[
        bool, Meta(description="Write event files, in the end into the output's folder tensorboard (extra train).")
    ] = False
    data: DataConfig = DataConfig()
    validation: ValidationConfig = ValidationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    scaler: ScalerConfig = ScalerConfig()
    distill: DistillConfig = DistillConfig()
    dpo: DpoConfig = DpoConfig()
    eagle3: EagleConfig = EagleConfig()
    medusa: MedusaConfig = MedusaConfig()
    saving: SavingConfig = SavingConfig()
    lora: LoraConfig = LoraConfig()
    qat: QatConfig = QatConfig()
    fp8: Fp8Config = Fp8Config()
    checkpointing: CheckpointingConfig = CheckpointingConfig()
    compile: CompileConfig = CompileConfig()
    parallel: ParallelConfig = ParallelConfig()
