"""From a Program back to the tensors of a checkpoint: which name each weight has there, and how it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from optc.compiler.analysis.module_linears import output_head
from optc.compiler.capture.loading import meta_model
from optc.compiler.capture.renames import ExpertRows, expert_rows, renamed_tensors
from optc.compiler.diagnostics import TargetError
from optc.compiler.formats.layouts.key_values import KeyValueScheme
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.checkpoint import CheckpointInfo, check_folder, match_names
from optc.compiler.model_folder.quantized import quantized_folder
from optc.exporters.hf.places import Places, Quantized


@dataclass(frozen=True)
class FolderPlan:
    """What a model folder will hold.

    Attributes:
        info: the source folder.
        plain: checkpoint name -> weight of the program.
        quantized: in graph order.
        copied: tensors of the source that the program does not read.
        linears: every `nn.Linear` of the model, by module name; one that is not quantized also by its name in the
            checkpoint, where that differs; what the checkpoint has as linears beside: experts one by one, routers.
        embeddings: every `nn.Embedding`.
        head: the module that makes the logits, "" where there is none.
        untied: a quantized head has codes of its own where the source model shares the embedding's tensor.
        key_values: how keys and values are rounded, None where they are not.
        scales: attention module -> weights of the program that its keys and its values are rounded by.
        experts: name in the checkpoint -> rows of a stacked weight of the program, of experts that `plain` names.
    """

    info: CheckpointInfo
    plain: dict[str, str]
    quantized: tuple[Quantized, ...]
    copied: tuple[str, ...]
    linears: tuple[str, ...]
    untied: bool
    embeddings: tuple[str, ...] = ()
    key_values: KeyValueScheme | None = None
    scales: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    head: str = ""
    experts: Mapping[str, ExpertRows] = field(default_factory=dict)

    def tensors(self, weight: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """`weight`, which knows those of the program by name, for the names that `plain` maps to."""

        def held(name: str) -> Tensor:
            rows = self.experts.get(name)
            return weight(name) if rows is None else rows.of(weight(rows.weight))

        return held


def collect(program: Program, source: Path | None, *, trust_remote_code: bool = False) -> FolderPlan:
    """Find the place of every weight of a program in the folder that it was captured from.

    Args:
        trust_remote_code: its class may be one of the folder's own.

    Raises:
        TargetError: there is no such folder, or a weight has no place of its own; names the weight.
    """
    if source is None:
        raise TargetError(
            "a module in memory has no model folder to write back",
            why="config and tensor names come from it",
            remedy="save the model first (model.save_pretrained), and compile the folder",
        )
    if program.contract.embedding is not None:
        raise TargetError(
            "a model folder holds the model alone, not what makes embeddings of it",
            where=str(source),
            remedy="write the model with --pooling none, and copy modules.json and the folders of its modules beside it; or "
            "choose --target onnx-cpu or inductor-cpu",
        )
    info = check_folder(source, trust_remote_code=trust_remote_code)
    folder = quantized_folder(info)
    dense = folder.dense if folder else info
    skeleton = meta_model(info)
    state = skeleton.state_dict(keep_vars=True)
    found = match_names(dense.tensors, state)
    renamed = renamed_tensors(skeleton, set(dense.tensors) - set(found.values()))
    experts = {name: rows for name, rows in expert_rows(skeleton, state).items() if name in dense.tensors}
    places = Places(program, skeleton, state, {**renamed, **found}, experts)
    quantized, parts = places.quantized()
    key_values, scales = places.key_values()
    parts |= {name for pair in scales.values() for name in pair}
    modules = {item.module for item in quantized}
    plain = places.plain(parts)
    written = {*plain, *(f"{module}.weight" for module in modules)}
    owners = places.tied
    held = {owners.get(name, name) for name in written}
    stored = {*places.found.values(), *experts}
    copied = [name for name in dense.tensors if name not in stored]
    copied += [source for name, source in places.found.items() if owners.get(name, name) not in held]
    linears = [name for name, module in skeleton.named_modules() if type(module) is torch.nn.Linear]
    old = [renamed[f"{name}.weight"] for name in linears if name not in modules and f"{name}.weight" in renamed]
    linears += [name.removesuffix(".weight") for name in (*old, *experts, *places.routers())]
    untied = any((places.shared(name) - {name}) & written for name in written)
    kept = {renamed.get(name, name): weight for name, weight in plain.items()}
    last = output_head(skeleton)
    head = next((name for name, module in skeleton.named_modules() if module is last), "")
    embeddings = [name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Embedding)]
    return FolderPlan(
        info,
        kept,
        quantized,
        tuple(dict.fromkeys(copied)),
        tuple(linears),
        untied,
        tuple(embeddings),
        key_values,
        scales,
        head,
        experts,
    )
