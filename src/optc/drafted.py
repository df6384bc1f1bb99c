"""What compiling a model together with another one that drafts for it asks beside compiling one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import msgspec

from optc.capturing import Captured, Model, capture_for_compile
from optc.compiler.artifact.drift_table import pass_title
from optc.compiler.artifact.manifest import PassRecord
from optc.compiler.capture.eagle3 import check_base
from optc.compiler.diagnostics import InputError, TargetError, UsageError
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.eagle3 import Eagle3Folder, is_eagle3
from optc.compiler.pipeline.pipeline import PipelineResult
from optc.compiler.pipeline.rerounding import rerounding
from optc.compiler.target.options import CacheRequest, DraftingRequest, drafted_by
from optc.compiler.target.target import ExportRequest, ExportResult, Target
from optc.hub import local_model
from optc.resolving import Resolved, recipe_steps
from optc.runtime.speculative.same_tokens import check_same_tokens

FOLDER = "draft"
"""Of its files in the artifact."""


@dataclass(frozen=True)
class Compiled:
    """A model as it was captured, and what the passes made of it."""

    captured: Captured
    result: PipelineResult


@dataclass(frozen=True)
class DraftFolder:
    """The folder of a model that is to draft, and of the model that it reads hidden states of; None where it reads none."""

    path: Path
    base: Path | None = None

    @classmethod
    def of(cls, model: Model, resolved: Resolved) -> Self | None:
        """What was asked for, held to the model; None where nothing was.

        Raises:
            InputError: no model folder, other tokens, or tokens that cannot be compared; made for another base.
            UsageError: a draft model of another method.
        """
        asked = drafted_by(resolved.options.own)
        if asked is None:
            return None
        folder = Path(local_model(asked.folder))
        base = Path(model) if isinstance(model, str | Path) and Path(model).is_dir() else None
        if asked.method == "eagle3":
            if base is not None:
                check_base(Eagle3Folder.read(folder), base)
            return cls(folder, base)
        _check_model(folder)
        check_same_tokens(folder, base)
        return cls(folder)


def _check_model(folder: Path) -> None:
    """Refuse what is no folder of a model that generates by itself."""
    if not (folder / "config.json").is_file():
        raise InputError(
            "the model that drafts is no model folder",
            where=str(folder),
            why="there is no config.json",
            remedy="give --draft the folder of a model, which is compiled together with the other one",
        )
    if is_eagle3(folder):
        raise UsageError(
            "--speculative draft takes a model that generates by itself",
            where=str(folder),
            why="it is a draft model of EAGLE-3, which reads hidden states",
            remedy="use --speculative eagle3",
        )


def for_draft(resolved: Resolved) -> Resolved:
    """The same choices for the model that drafts: it gives nothing beside its logits, and nothing drafts for it."""
    own = msgspec.structs.replace(resolved.options.own, speculative=None, draft=None)
    options = msgspec.structs.replace(resolved.options, expose_hidden=(), medusa=None, medusa_weights="", own=own)
    run = resolved.request.run
    if run.dump_ir is not None:
        run = msgspec.structs.replace(run, dump_ir=run.dump_ir / FOLDER)
    cache = CacheRequest(kv_cache="paged")
    request = msgspec.structs.replace(resolved.request, run=run, cache=cache, drafting=DraftingRequest(), options=own)
    return replace(resolved, options=options, request=request)


def pass_count(resolved: Resolved) -> int:
    """Passes of a compile of a decoder, those of a model that drafts among them."""
    own = len(recipe_steps(resolved, "decoder"))
    if drafted_by(resolved.options.own) is None:
        return own
    return own + len(recipe_steps(for_draft(resolved), "decoder"))


def capture_draft(folder: DraftFolder, resolved: Resolved, work_folder: Path | None) -> Captured:
    """The model that drafts, captured and proved.

    Raises:
        OptcError: as `capture`; InputError: it is no decoder.
    """
    captured = capture_for_compile(
        folder.path,
        None,
        dtype=resolved.options.dtype,
        trust_remote_code=resolved.request.what.trust_remote_code,
        text=resolved.request.gate.text,
        work_folder=work_folder,
        device=resolved.device,
        base=folder.base,
    )
    if captured.program.contract.kind != "decoder" or captured.encoder is not None:
        raise InputError(
            "the model that drafts does not continue texts",
            where=str(folder.path),
            remedy="draft with a causal language model of the same tokenizer",
        )
    return captured


def check_pair(model: Program, draft: Program) -> None:
    """Refuse two programs that cannot draft for each other.

    Raises:
        TargetError: passes of the user's own left one of them without a paged KV cache.
        InputError: a draft model that reads hidden states of another size, or has another vocabulary.
    """
    for program, title in ((model, "model"), (draft, "draft model")):
        kind = program.contract.kv_cache.kind
        if kind != "paged":
            raise TargetError(
                f"drafts need a paged KV cache, and the {title} has a cache of kind '{kind}'",
                remedy="leave --passes out, or name page-kv-cache among them",
            )
    ours, theirs = model.contract.model, draft.contract.model
    sizes = [(facts.vocab_size, facts.hidden_size) for facts in (theirs, ours)]
    if draft.contract.draft is not None and sizes[0] != sizes[1]:
        raise InputError(
            "the draft model was made for another base",
            why=f"its vocabulary and width are {sizes[0][0]} and {sizes[0][1]}, the model's {sizes[1][0]} and {sizes[1][1]}",
            remedy="give the draft model that was trained for this model",
        )


def drafting_records(result: PipelineResult) -> tuple[PassRecord, ...]:
    """What the passes did to the model that drafts, whose weights may have the names of the other model's."""
    return tuple(
        msgspec.structs.replace(
            record,
            program="draft",
            linears=tuple(
                msgspec.structs.replace(item, name=pass_title(item.name, "draft")) for item in record.linears
            ),
        )
        for record in result.records
    )


def export_draft(target: Target, result: PipelineResult, request: ExportRequest) -> ExportResult:
    """Write the model that drafts into a folder of the artifact; paths in `info` are the artifact's.

    Raises:
        OptcError: as the target's exporter.
    """
    place = request.directory / FOLDER
    place.mkdir()
    own = replace(request, directory=place, source=None, rerounding=rerounding(result.records), runner=False)
    exported = target.export(result.program, own)
    paths = exported.engine.opened_files(exported.info)
    moved = {key: f"{FOLDER}/{path}" for key, path in paths.items()}
    return replace(exported, info={**exported.info, **moved})


def both_needs(model: Mapping[str, Any], draft: Mapping[str, Any]) -> dict[str, Any]:
    """What a host must have for both: the same versions, and all features of either."""
    lists = {name for name, value in (*model.items(), *draft.items()) if isinstance(value, list)}
    together = {name: sorted({*model.get(name, ()), *draft.get(name, ())}) for name in lists}
    return {**draft, **model, **together}
