"""The parts of a training configuration that one module each applies: recomputed activations, torch.compile, adapters,
ranks, QAT. Nothing here imports torch: help of commands reads it."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from optc.compiler.diagnostics import UsageError
from optc.compiler.formats.group_sizes import check_bits, check_group_size

Dtype = Literal["fp32", "bf16", "fp16"]


class CheckpointingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which activations are kept. Losses and gradients are the same under every policy."""

    policy: Annotated[
        Literal["none", "full", "every-n", "selective", "budget"],
        Meta(description="What is recomputed in the backward pass; see the table of policies in docs/train.md."),
    ] = "none"
    every_n: Annotated[int, Meta(ge=1, description="Of every-n: blocks 0, n, 2n, ... are recomputed.")] = 2
    keep: Annotated[
        tuple[str, ...],
        Meta(
            description="Of selective: attention, matmul (all matrix products), narrow-matmul (those no wider than "
            "their input), or ATen ops (aten.mm.default)."
        ),
    ] = ("attention", "narrow-matmul")
    budget: Annotated[
        float,
        Meta(
            gt=0,
            description="Of budget: above 1, bytes that the blocks may keep per micro-batch and rank; up to 1, the "
            "share of what policy none keeps.",
        ),
    ] = 0.5


class CompileConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is compiled. Needs a C++ compiler on the CPU and Triton on a GPU."""

    scope: Annotated[
        Literal["none", "blocks", "model"],
        Meta(
            description="torch.compile: of each transformer block (equal blocks share one compilation), or of the "
            "whole forward pass."
        ),
    ] = "none"
    mode: Annotated[Literal["default", "max-autotune-no-cudagraphs"], Meta(description="torch.compile's mode.")] = (
        "default"
    )
    dynamic: Annotated[bool, Meta(description="Compile once for all shapes of batches instead of once per shape.")] = (
        False
    )
    activation_budget: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Share of the activations that each compiled graph may keep; torch's solver chooses what is "
            "computed again, 1 recomputes only what is free.",
        ),
    ] = 1.0


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) and the form of the frozen base."""

    enabled: Annotated[bool, Meta(description="Low-rank adapters on a frozen base.")] = False
    rank: Annotated[int, Meta(ge=1, description="Columns of the two factors.")] = 16
    alpha: Annotated[float, Meta(gt=0, description="Their product is scaled by alpha / rank.")] = 32.0
    rslora: Annotated[
        bool, Meta(description="Scale by alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732).")
    ] = False
    dora: Annotated[
        bool,
        Meta(
            description="Train the length of each row of a weight beside it (DoRA, https://arxiv.org/abs/2402.09353)."
        ),
    ] = False
    rank_pattern: Annotated[
        tuple[str, ...],
        Meta(
            description="Other ranks for some linears, as NAME=RANK; NAME as in qat.ignore (v_proj=32, *.layers.0.*=4)."
        ),
    ] = ()
    alpha_pattern: Annotated[tuple[str, ...], Meta(description="Other alphas for some linears, as NAME=ALPHA.")] = ()
    modules_to_save: Annotated[
        tuple[str, ...],
        Meta(
            description="Modules without adapters that are trained whole: last parts of names, or whole ones (lm_head)."
        ),
    ] = ()
    dropout: Annotated[float, Meta(ge=0, lt=1, description="Probability, on the adapters' inputs.")] = 0.0
    targets: Annotated[
        tuple[str, ...],
        Meta(
            description="Last parts of module names (q_proj), or of parameters that hold experts (gate_up_proj); empty: "
            "every linear but the head."
        ),
    ] = ()
    base: Annotated[
        Literal["dense", "nf4"],
        Meta(description="nf4 holds every linear but the head in 4-bit NF4 (QLoRA, https://arxiv.org/abs/2305.14314)."),
    ] = "dense"
    group_size: Annotated[int, Meta(ge=0, le=1 << 20, description="Weights per NF4 scale; 0 is one scale per row.")] = (
        64
    )
    double_quant: Annotated[bool, Meta(description="Keep the NF4 scales in 8 bits themselves.")] = True
    export: Annotated[
        Literal["merge", "adapters"],
        Meta(
            description="merge writes one plain model folder; adapters writes peft's adapter folder, to be loaded "
            "on the base model."
        ),
    ] = "merge"

    def __post_init__(self) -> None:
        check_group_size(self.group_size, [])
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UsageError(
                f"lora.rank={self.rank}, lora.alpha={self.alpha}, lora.dropout={self.dropout}",
                remedy="rank is 1 or more, alpha positive, dropout at least 0 and below 1",
            )
        named_numbers("lora.rank_pattern", self.rank_pattern, whole=True)
        named_numbers("lora.alpha_pattern", self.alpha_pattern)


def named_numbers(key: str, texts: tuple[str, ...], *, whole: bool = False) -> dict[str, float]:
    """NAME=NUMBER texts as a mapping.

    Args:
        whole: numbers are integers.

    Raises:
        UsageError: another form, or a number that is not positive.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            value = int(number) if whole else float(number)
        except ValueError:
            value = 0
        if not name or not 0 < value < math.inf:
            raise UsageError(
                f"{key} cannot be '{text}'", remedy=f"write {'q_proj=8' if whole else 'q_proj=16.0'}, a positive number"
            )
        found[name] = value
    return found


class ValidationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text that is not trained on, whose loss tells when training is done."""

    text: Annotated[
        tuple[str, ...],
        Meta(
            description="Validation set, in the forms of data.text (repeatable): its loss is measured, not learned.",
            extra={"metavar": "FILE"},
        ),
    ] = ()
    share: Annotated[
        float, Meta(ge=0, le=0.5, description="Share of the tokens of data.text that is held out in place of a file.")
    ] = 0.0
    every: Annotated[
        int,
        Meta(
            ge=1,
            description="Optimizer steps between two measurements; there is one before the first step and one behind "
            "the last, too.",
        ),
    ] = 50
    patience: Annotated[
        int,
        Meta(ge=0, description="The run ends after so many measurements in a row without a new best; 0: at max_steps."),
    ] = 0
    keep_best: Annotated[
        bool,
        Meta(description="Write the weights of the least validation loss; false writes those of the last step."),
    ] = True

    def __post_init__(self) -> None:
        if self.text and self.share:
            raise UsageError("validation.text and validation.share are two validation sets", remedy="give one of them")
        if self.patience and not self.wanted:
            raise UsageError(
                "validation.patience has no effect without a validation set",
                remedy="give --validation FILE, or validation.share",
            )

    @property
    def wanted(self) -> bool:
        """Whether there is a validation set."""
        return bool(self.text) or self.share > 0


class DpoConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Direct preference optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290).

    loss = -log sigmoid(beta * ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))), per pair; q is the
    model as it was.
    """

    enabled: Annotated[
        bool, Meta(description="Train on pairs of a chosen and a rejected answer, against the model as it was.")
    ] = False
    beta: Annotated[
        float, Meta(gt=0, description="How much a change of log-probability counts: larger stays nearer to the model.")
    ] = 0.1
    label_smoothing: Annotated[
        float, Meta(ge=0, lt=0.5, description="Share of pairs that are taken to be labelled the wrong way round.")
    ] = 0.0


class ParallelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the ranks that torchrun started share the work. Each rank takes its own part of every batch."""

    kind: Annotated[
        Literal["none", "ddp", "fsdp", "zero1", "deepspeed"],
        Meta(description="How the ranks share the work; see Several processes in docs/train.md."),
    ] = "none"
    zero_stage: Annotated[
        Literal[1, 2, 3],
        Meta(description="Of deepspeed: 1 splits the optimizer state, 2 gradients too, 3 weights too."),
    ] = 2
    reshard_after_forward: Annotated[
        bool,
        Meta(
            description="Of fsdp: free the gathered weights of a block after its forward (as ZeRO-3); false keeps "
            "them until its backward (as ZeRO-2)."
        ),
    ] = True
    param_dtype: Annotated[
        Dtype, Meta(description="Of fsdp: type in which weights are gathered and blocks compute; the shards stay fp32.")
    ] = "fp32"
    reduce_dtype: Annotated[Dtype, Meta(description="Of fsdp: type in which gradients are summed over ranks.")] = "fp32"
    timeout_s: Annotated[
        int, Meta(ge=1, le=1 << 31, description="Seconds after which a collective that does not finish ends the run.")
    ] = 1800


class Fp8Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Products of linears in 8-bit floats; weights that the optimizer changes, norms and attention stay as they are."""

    enabled: Annotated[
        bool,
        Meta(description="Multiply inputs and weights in E4M3, gradients in E5M2, by dynamic scales; needs bf16."),
    ] = False
    ignore: Annotated[
        tuple[str, ...], Meta(description="Patterns of weight names that stay as they are, such as *.down_proj.*.")
    ] = ()


class QatConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is rounded while training, and how its scales are found."""

    enabled: Annotated[bool, Meta(description="Fake quantization of the weights.")] = False
    bits: Annotated[int, Meta(ge=2, le=8, description="QAT: bits per weight; 2, 3, 4 or 8.")] = 4
    group_size: Annotated[
        int, Meta(ge=0, le=1 << 20, description="QAT: weights per scale; 0 is one scale per row.")
    ] = 32
    symmetric: Annotated[bool, Meta(description="Without zero points.")] = True
    scales: Annotated[
        Literal["learned", "minmax"],
        Meta(
            description="learned trains the step sizes with the weights (LSQ; zero points stay); minmax follows the "
            "largest weights of each group in every step."
        ),
    ] = "learned"
    start: Annotated[
        Literal["search", "full"],
        Meta(
            description="Where learned scales begin: search shrinks each group's range to the least squared error, "
            "full takes the largest weight."
        ),
    ] = "search"
    scale_rate: Annotated[
        float,
        Meta(
            gt=0,
            description="Relative change of a learned scale per unit of learning rate: Adam changes scales by about "
            "scale_rate * lr of themselves in a step.",
        ),
    ] = 1.0
    activations: Annotated[
        Literal["none", "int8"],
        Meta(
            description="int8: inputs of quantized linears are rounded, one scale per token (W8A8; needs bits 8, "
            "group_size 0, symmetric)."
        ),
    ] = "none"
    kv_cache: Annotated[
        Literal["none", "int8"],
        Meta(description="int8: rounded keys and values, with scales from the largest magnitudes seen in training."),
    ] = "none"
    kv_granularity: Annotated[Literal["layer", "head"], Meta(description="One KV scale per layer or per head.")] = (
        "head"
    )
    ignore: Annotated[
        tuple[str, ...], Meta(description="Patterns of weight names that stay as they are, such as *.down_proj.*.")
    ] = ()
    head: Annotated[
        bool,
        Meta(
            description="Quantize the linear that makes the logits too; where it is tied, the embedding reads it "
            "unrounded."
        ),
    ] = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group_size(self.group_size, [])
        if not self.scale_rate > 0:
            raise UsageError(f"qat.scale_rate is {self.scale_rate}", remedy="choose a positive rate, such as 1")
        if self.activations != "none" and (self.bits, self.group_size, self.symmetric) != (8, 0, True):
            raise UsageError(
                "rounded activations need symmetric 8-bit weights with one scale per row",
                why="the product of codes is scaled once per token and row",
                remedy="set qat.bits=8 qat.group_size=0 qat.symmetric=true, or qat.activations=none",
            )
