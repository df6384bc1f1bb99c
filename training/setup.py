"""Everything a run needs before its first step, made in a visible order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from optc.compiler.capture.facts import text_config
from optc.compiler.capture.loading import pretrained_config
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.devices import choose_device
from optc.compiler.model_folder.checkpoint import CheckpointInfo, check_folder, config_digest, weights_digest
from optc.compiler.model_folder.config_file import CONFIG, read_config
from optc.runtime.generation.chat_template import load_chat_template
from optc.runtime.generation.tokenizer import eos_token_ids, load_tokenizer
from optc.training.activation_checkpointing import apply_activation_checkpointing
from optc.training.checkpoint import ValidationState
from optc.training.chunked_head import check_head, chunked_head
from optc.training.compile import apply_compile
from optc.training.config import TrainConfig
from optc.training.corpus import read_corpus
from optc.training.data import Batch, Reader
from optc.training.deepspeed_zero import connect
from optc.training.distill import load_teacher
from optc.training.dpo import check_dpo
from optc.training.eagle3 import Eagle3Training, token_counts
from optc.training.fp8_linears import apply_fp8, check_fp8
from optc.training.frozen_base import FrozenBase, check_frozen_base
from optc.training.held_out import hold_out
from optc.training.lora import apply_lora
from optc.training.medusa import MedusaTraining
from optc.training.models import load_trainable
from optc.training.optimizers import make_optimizer
from optc.training.packing import unpacked
from optc.training.pairs import PairReader, hold_out_pairs, read_answers
from optc.training.parallel import apply_data_parallel, shard_optimizer
from optc.training.precision import make_scaler
from optc.training.qat import apply_qat
from optc.training.untrained import check_experts, left_experts, stray_tensors, strays_note
from optc.training.world import World

AnyReader = Reader | PairReader


@dataclass
class Run:
    """A run that is ready to step.

    Attributes:
        model: the transformers model (adapters, fake quantization and shards in place).
        module: what is called: the model, or its data-parallel wrapper.
        teacher: frozen, or None.
        held_out: this rank's batches of the validation set.
        validation: what was measured on it; None without one.
        beginning: int64 [T], the first tokens of that set, or without one of the text.
        head: the model's head where the loss is made in it, in chunks; None with whole logits.
        notes: what is done otherwise than asked for, and how much of the text is learned.
        strays: tensors of the source folder that the model has no place for.
        skipped: steps in a row without an update for a loss that is not finite.
    """

    config: TrainConfig
    world: World
    device: torch.device
    model: Any
    module: Any
    teacher: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    reader: AnyReader
    beginning: Tensor
    held_out: Sequence[Batch] = ()
    validation: ValidationState | None = None
    head: nn.Linear | None = None
    notes: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()
    step: int = 0
    skipped: int = 0


def check_config(config: TrainConfig, world: World) -> None:
    """What can be refused before a weight is read.

    Raises:
        UsageError: missing or contradicting values.
        InputError: ranks and accumulation that do not divide the batch.
    """
    if not config.model:
        raise UsageError("no model given", remedy="optc train --recipe finetune --model FOLDER --text FILE -o OUT")
    parts = world.size * config.gradient_accumulation
    if config.batch_size % parts:
        raise UsageError(
            f"batch_size {config.batch_size} does not divide into {world.size} rank(s) x "
            f"{config.gradient_accumulation} micro-batch(es)",
            why="batch_size counts the rows of an optimizer step over all ranks and micro-batches",
            remedy=f"use --set batch_size={-(-config.batch_size // parts) * parts}",
        )
    if world.size > 1 and config.parallel.kind == "none":
        raise UsageError(
            f"{world.size} processes, but parallel.kind is none",
            remedy="use --set parallel.kind=ddp (or fsdp, zero1)",
        )
    if config.optimizer.name == "sophia" and config.precision == "fp16":
        raise UsageError(
            "sophia does not work with a loss scale",
            why="its Hessian estimate is computed in fp32 without one",
            remedy="use precision fp32 or bf16",
        )
    if config.optimizer.name == "sophia" and config.parallel.kind not in ("none", "ddp"):
        raise UsageError(
            "sophia does not work on shards",
            why="its Hessian estimate differentiates whole weights twice",
            remedy="use adamw or lion, or parallel.kind=ddp",
        )
    check_dpo(config)
    kinds = [
        key for key, kind in (("eagle3.enabled", config.eagle3), ("medusa.enabled", config.medusa)) if kind.enabled
    ]
    if len(kinds) > 1:
        raise UsageError(f"{' does not go with '.join(kinds)}", remedy="train one after the other")
    for key in kinds:
        check_frozen_base(config, key)
    check_fp8(config)
    if config.parallel.kind == "deepspeed" and config.precision != "fp32":
        raise UsageError(
            f"deepspeed trains in fp32 here, not in {config.precision}",
            remedy="use parallel.kind=fsdp or ddp for mixed precision",
        )


def pick_device(config: TrainConfig, world: World) -> torch.device:
    """The device of this rank.

    Raises:
        UsageError: one GPU is named for several ranks.
        TargetError: cuda is asked for and there is none, or not as many.
    """
    if ":" in config.device and world.size > 1:
        raise UsageError(f"device {config.device} is one GPU, for {world.size} ranks", remedy="use device=cuda")
    device = choose_device(config.device)
    if device.type == "cpu":
        return device
    if ":" not in config.device:
        device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def prepare(config: TrainConfig, world: World) -> Run:
    """Read the text and the model, and apply what the config asks for.

    Raises:
        OptcError: see `check_config`, `read_corpus`, `load_trainable` and the functions called.
    """
    check_config(config, world)
    device = pick_device(config, world)
    torch.manual_seed(config.seed)
    folder = Path(config.model)
    if not folder.is_dir():
        raise InputError("the model folder does not exist", where=config.model, remedy="give a folder with config.json")
    reader, held_out = _readers(config, world, folder)
    base = load_trainable(config)
    strays = stray_tensors(base, folder) if _writes_all(config) else ()
    base = _prepared(base, config)
    model = on_frozen_base(base, config, reader)
    teacher = load_teacher(config, text_config(model.config).vocab_size)
    model = model.to(device)
    notes = (*((strays_note(strays),) if strays else ()), *left_experts(base, config))
    if isinstance(reader, Reader):
        reader, said = unpacked(base, reader)
        notes = (*notes, *said)
    if isinstance(held_out, Reader):
        held_out, _ = unpacked(base, held_out)
    if config.epochs is not None:
        config = msgspec.structs.replace(config, max_steps=reader.steps_of(config.epochs))
    if reader.note is not None:
        notes = (*notes, reader.note)
    head = None if isinstance(model, FrozenBase) else chunked_head(model, config, teacher)
    if head is not None:
        check_head(model, head, config)
    model, said = apply_fp8(model, config.fp8, device)
    notes = (*notes, *said)
    model = apply_activation_checkpointing(model, config.checkpointing)
    model = apply_compile(model, config.compile)
    module = apply_data_parallel(model, config.parallel)
    optimizer = shard_optimizer(make_optimizer(model, config.optimizer), config.parallel)
    if config.parallel.kind == "deepspeed":
        module, optimizer = connect(model, optimizer, config.parallel, clip_norm=config.clip_norm)
    return Run(
        config=config,
        world=world,
        device=device,
        model=model,
        module=module,
        teacher=None if teacher is None else teacher.to(device),
        optimizer=optimizer,
        scaler=make_scaler(config, device),
        reader=reader,
        held_out=() if held_out is None else held_out.whole_epoch(),
        validation=None if held_out is None else ValidationState(text=held_out.digest),
        beginning=(reader if held_out is None else held_out).first_tokens,
        head=head,
        notes=notes,
        strays=strays,
    )


def build_model(config: TrainConfig) -> Any:
    """The model with its adapters and fake quantization, on the CPU."""
    return _prepared(load_trainable(config), config)


def _writes_all(config: TrainConfig) -> bool:
    """Whether the trained folder holds the whole model of its source: not adapters or heads alone, nor fresh weights."""
    adapters = config.lora.enabled and config.lora.export == "adapters"
    return not (adapters or config.eagle3.enabled or config.medusa.enabled or config.from_scratch)


def _prepared(model: Any, config: TrainConfig) -> Any:
    check_experts(model, config)
    return apply_qat(apply_lora(model, config.lora), config.qat)


def on_frozen_base(base: Any, config: TrainConfig, reader: AnyReader) -> Any:
    """The heads that the config asks for on this base, or the base itself.

    Raises:
        UsageError: see `Eagle3Training` and `MedusaTraining`.
    """
    if config.eagle3.enabled:
        assert isinstance(reader, Reader)
        return Eagle3Training(base, config, token_counts(reader.documents, base.get_input_embeddings().num_embeddings))
    if config.medusa.enabled:
        return MedusaTraining(base, config)
    return base


def _readers(config: TrainConfig, world: World, folder: Path) -> tuple[AnyReader, AnyReader | None]:
    """Of the text, and of the validation set where there is one."""
    if config.dpo.enabled:
        return _pair_readers(config, world, folder)
    encoding = _encoding(config, folder)
    corpus, apart = read_corpus(config.data.text, **encoding), None
    if config.validation.text:
        apart = read_corpus(config.validation.text, **encoding, kind="validation")
    elif config.validation.share:
        corpus, apart = hold_out(corpus, config.validation.share, seq_len=config.seq_len, seed=config.seed)
    made = partial(Reader, config=config, world_size=world.size, rank=world.rank)
    return made(corpus.documents, learned=corpus.learned), (
        None if apart is None else made(apart.documents, learned=apart.learned, held_out=True)
    )


def _pair_readers(config: TrainConfig, world: World, folder: Path) -> tuple[PairReader, PairReader | None]:
    encoding = _encoding(config, folder)
    pairs, apart = read_answers(config.data.text, **encoding), None
    if config.validation.text:
        apart = read_answers(config.validation.text, **encoding, kind="validation")
    elif config.validation.share:
        pairs, apart = hold_out_pairs(pairs, config.validation.share, seed=config.seed)
    made = partial(PairReader, config=config, world_size=world.size, rank=world.rank)
    return made(pairs), None if apart is None else made(apart, held_out=True)


def _encoding(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """What text becomes tokens with, as the functions that read files are given it."""
    ends = eos_token_ids(folder) if config.data.append_eos else ()
    return {
        "tokenizer": load_tokenizer(folder),
        "vocab_size": _vocabulary(folder),
        "end_token": ends[0] if ends else None,
        "template": load_chat_template(folder),
    }


def _vocabulary(folder: Path) -> int:
    info = CheckpointInfo(
        folder, read_config(folder, trust_remote_code=None), {}, has_tokenizer=False
    )  # weights unread
    size = getattr(text_config(pretrained_config(info)), "vocab_size", None)
    if not size:
        raise InputError(
            "the model has no vocabulary",
            where=str(folder / CONFIG),
            why="it states no vocab_size",
            remedy="give a decoder with a language-model head, such as LlamaForCausalLM",
        )
    return int(size)


def model_identity(config: TrainConfig) -> str:
    """What the run started from: digest of config.json, and of the weights unless they were drawn."""
    folder = Path(config.model)
    if config.from_scratch:
        return config_digest(CheckpointInfo(folder, {}, {}, False))
    info = check_folder(folder)
    return f"{weights_digest(info)}:{config_digest(info)}"
