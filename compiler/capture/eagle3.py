"""Capture of a folder with a draft model of EAGLE-3: a decoder that reads, beside tokens, hidden states of its base."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from optc.compiler.capture.eagle3_model import Eagle3
from optc.compiler.capture.facts import attention_layers
from optc.compiler.capture.loading import meta_model
from optc.compiler.diagnostics import GateError, InputError, UsageError
from optc.compiler.formats.layouts.tensors import TensorReader
from optc.compiler.ir.contract import Contract, DraftFacts, Input, ModelFacts, Output
from optc.compiler.ir.export import run_export
from optc.compiler.ir.program import Program
from optc.compiler.ir.proof import CaptureFigures, CaptureProof
from optc.compiler.model_folder.checkpoint import (
    CheckpointInfo,
    check_folder,
    match_names,
)
from optc.compiler.model_folder.draft_origin import Origin
from optc.compiler.model_folder.dtypes import DTYPES
from optc.compiler.model_folder.eagle3 import EMBEDDING, Eagle3Config, Eagle3Folder

NOT_DRAFTED = -30000.0
"""Logit of tokens that cannot be drafted: finite, in 16 bits too, and of no weight in a softmax."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_MAX_BATCH, _LENGTHS = 1024, ((2, 9), (1, 1), (3, 16))


class DraftingBase(nn.Module):
    """A draft model whose logits are over the base's vocabulary: `NOT_DRAFTED` for what is not in its own."""

    targets: Tensor

    def __init__(self, model: Eagle3, targets: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("targets", targets)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, base_states: Tensor, own_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, S, V] and states [B, S, H]; see `Eagle3.forward`."""
        logits, state = self.model(input_ids, position_ids, base_states, own_states)
        whole = logits.new_full((*logits.shape[:2], self.model.config.vocab_size), NOT_DRAFTED)
        return whole.index_copy(2, self.targets, logits), state


def capture_eagle3(
    folder: Path, base: Path | None, *, dtype: str = "fp32", prove: bool = True
) -> tuple[Program, CheckpointInfo]:
    """Capture a draft model's folder as a decoder with logits over its base's vocabulary.

    Args:
        base: the model that it drafts for, whose embedding it shares; None where the folder has its own.

    Raises:
        InputError: an unusable folder; a base that it was not made for.
        UsageError: no base, and the folder has no embedding.
        CaptureError, GateError: it cannot be traced, or the program is not what the model computes.
    """
    info, found = check_folder(folder), Eagle3Folder.read(folder)
    if base is not None:
        check_base(found, base)
    embedding = found.tensors.get(EMBEDDING)
    if embedding is None:
        embedding = _embedding(base, found.config, folder)
    model = Eagle3(found.config).load(found.tensors, embedding).to(DTYPES[dtype])
    shell = DraftingBase(model.eval().requires_grad_(False), found.targets)
    program = _export(shell, found.config, found.origin)
    if prove:
        program.proof = _prove(program, shell)
    return program, info


def check_base(found: Eagle3Folder, base: Path) -> None:
    """Refuse a base that a draft model was not made for.

    Raises:
        InputError: other weights, another config or another tokenizer, where the draft model says which it was made for.
    """
    if found.origin is None:
        return
    ours, theirs = Origin.of(check_folder(base)), found.origin
    for what, expected, now in (
        ("config.json", theirs.config, ours.config),
        ("weights", theirs.weights, ours.weights),
        ("tokenizer.json", theirs.tokenizer, ours.tokenizer),
    ):
        if expected and expected != now:
            raise InputError(
                "the draft model was made for another base",
                where=str(base),
                why=f"its {what} has hash {now[:12] or 'of nothing'}, the draft model was trained on {expected[:12]}",
                remedy="take the model that it was trained on, or train a draft model for this one",
            )


def _embedding(base: Path | None, config: Eagle3Config, folder: Path) -> Tensor:
    """The embedding [V, H] of a base's folder; no other weight is read."""
    if base is None:
        raise UsageError(
            "a draft model without an embedding needs its base",
            where=str(folder),
            remedy="give --base FOLDER, the model that it drafts for",
        )
    info = check_folder(base)
    skeleton = meta_model(info)
    table = skeleton.get_input_embeddings().weight
    names = [name for name, item in skeleton.state_dict(keep_vars=True).items() if item is table]
    stored = next(iter(match_names(info.tensors, names).values()), None)
    if stored is None:
        raise InputError("the base has no embedding of its own", where=str(base), remedy="give --base its model folder")
    reader = TensorReader(info.path, info.tensors)
    expected = (config.vocab_size, config.hidden_size)
    if reader.shape(stored) != expected:
        raise InputError(
            "the draft model does not fit its base",
            where=str(base),
            why=f"its embedding is {list(reader.shape(stored))}, the draft model reads {list(expected)}",
            remedy="give --base the model that it was made for",
        )
    return reader.read(stored, *_FLOATS)


def _export(shell: DraftingBase, config: Eagle3Config, origin: Origin | None) -> Program:
    size, states = config.hidden_size, len(config.boundaries) * config.hidden_size
    dtype = shell.model.fc.weight.dtype
    dims = {0: Dim("batch", min=1, max=_MAX_BATCH), 1: Dim("seq", min=1, max=max(2, config.context_length))}
    args = _inputs(shell, 2, min(11, max(2, config.context_length)))
    exported = run_export(shell, args, tuple(dims for _ in args), where=type(shell.model).__name__)
    kind = str(dtype).removeprefix("torch.")
    tokens: Any = {"dtype": "int64", "dims": ("batch", "seq")}
    contract = Contract(
        kind="decoder",
        inputs=(
            Input(name="input_ids", role="input_ids", **tokens),
            Input(name="position_ids", role="position_ids", **tokens),
            Input(name="base_states", role="base_states", dtype=kind, dims=("batch", "seq", states)),
            Input(name="own_states", role="own_states", dtype=kind, dims=("batch", "seq", size)),
        ),
        outputs=(Output(name="logits", role="logits"), Output(name="hidden", role="hidden")),
        position_rule=True,
        layers=attention_layers(exported),
        model=ModelFacts(
            model_type="speculators",
            architecture="LlamaForCausalLMEagle3",
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            hidden_size=size,
        ),
        sources={name: (name.removeprefix("model."),) for name in exported.state_dict},
        draft=DraftFacts(
            boundaries=config.boundaries,
            max_draft_tokens=config.max_draft_tokens,
            base_config="" if origin is None else origin.config,
            base_weights="" if origin is None else origin.weights,
            tokenizer="" if origin is None else origin.tokenizer,
        ),
    )
    return Program(exported, contract)


def _inputs(shell: DraftingBase, batch: int, length: int) -> tuple[Tensor, ...]:
    """Random tokens, and states of which a half is the base's and the other the model's own."""
    config, generator = shell.model.config, torch.Generator().manual_seed(length)
    size, dtype = config.hidden_size, shell.model.fc.weight.dtype
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    positions = torch.arange(length)[None].expand(batch, -1).contiguous()
    states = torch.randn((batch, length, len(config.boundaries) * size), generator=generator)
    own = torch.randn((batch, length, size), generator=generator)
    drafted = (torch.arange(length) * 2 > length)[None, :, None]
    return ids, positions, states.masked_fill(drafted, 0).to(dtype), own.masked_fill(~drafted, 0).to(dtype)


def _prove(program: Program, shell: DraftingBase) -> CaptureProof:
    """Hold the program to the model's forward, logits and states, on batches of several sizes.

    Raises:
        GateError: they differ.
    """
    begin, tokens, worst, scale = time.perf_counter(), 0, 0.0, 0.0
    relative = 0.0
    dtype = shell.model.fc.weight.dtype
    for batch, length in _LENGTHS:
        inputs = _inputs(shell, batch, min(length, shell.model.config.context_length))
        tokens += inputs[0].numel()
        with torch.no_grad():
            expected, found = shell(*inputs), program(*inputs)
        for old, new in zip(expected, found, strict=True):
            drafted = old.double()[old != NOT_DRAFTED], new.double()[old != NOT_DRAFTED]
            worst = max(worst, float((drafted[0] - drafted[1]).abs().max()))
            scale = max(scale, float(drafted[0].abs().max()))
            relative = max(relative, float((drafted[0] - drafted[1]).norm() / drafted[0].norm().clamp(min=1e-30)))
    if not relative <= _TOLERANCE[dtype]:
        raise GateError(
            "the captured draft model computes something else than its own forward",
            why=f"relative difference {relative:.3g}, {_TOLERANCE[dtype]:.3g} is rounding",
            remedy="report this with the model's config.json",
        )
    figures = CaptureFigures(
        dtype=str(dtype).removeprefix("torch."), max_abs_diff=worst, scale=scale, relative=relative
    )
    return CaptureProof(
        proved=True,
        reference="Eagle3 (optc)",
        inputs=tuple(f"{batch} x {length} random tokens and states" for batch, length in _LENGTHS),
        tokens=tokens,
        figures=(figures,),
        seconds=round(time.perf_counter() - begin, 3),
    )
