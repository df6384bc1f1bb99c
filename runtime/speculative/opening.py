"""The drafter of each method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from optc.compiler.artifact.folder import read_manifest, verify
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import InputError, TargetError, UsageError
from optc.compiler.files import sha256_of
from optc.compiler.ir.contract import Contract, DraftFacts
from optc.compiler.model_folder.eagle3 import is_eagle3
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.draft_graphs import draft_graphs
from optc.runtime.sessions.opening import open_session
from optc.runtime.sessions.paged import PagedModel, PagedSession
from optc.runtime.speculative.device_drafter import ROLE, DeviceDrafter, Eagle3OnDevice, MedusaOnDevice
from optc.runtime.speculative.draft_model import DraftModel
from optc.runtime.speculative.drafter import Drafter
from optc.runtime.speculative.eagle3 import Eagle3Drafter
from optc.runtime.speculative.lookahead import LookaheadDrafter
from optc.runtime.speculative.medusa import MedusaDrafter
from optc.runtime.speculative.ngram import NgramDrafter
from optc.runtime.speculative.same_tokens import check_same_tokens
from optc.runtime.speculative.settings import Speculation
from optc.runtime.speculative.suffix import SuffixDrafter

_NO_WEIGHTS: dict[str, Callable[[], Drafter]] = {
    "ngram": NgramDrafter,
    "suffix": SuffixDrafter,
    "lookahead": LookaheadDrafter,
}


@dataclass(frozen=True, kw_only=True)
class Verifying:
    """The model that a drafter drafts for.

    Attributes:
        folder: its artifact, whose files were verified and trusted; None where it has no tokenizer that could be compared.
        running: requests that run together.
        trust: of another artifact with the model that drafts too; see `check_trusted`.
    """

    model: PagedModel
    folder: Path | None
    running: int
    threads: int | None = None
    trust: bool = False


def open_drafter(options: Speculation, target: Verifying) -> Drafter | DeviceDrafter:
    """What drafts by the method of these options; on the device where it reads what the model gives there.

    Raises:
        UsageError: more draft tokens than heads; no model that drafts, where one is wanted.
        InputError, ArtifactError, TargetError: there are no heads; the model that drafts cannot be opened, has a cache that
            is not paged, or tokens that are not the target's.
    """
    if options.method == "medusa":
        return _open_heads(options, target)
    if options.method in _NO_WEIGHTS:
        return _NO_WEIGHTS[options.method]()
    found = _Drafting.of(options, target)
    return (_open_eagle3 if options.method == "eagle3" else _open_model)(found, options.draft_tokens, target)


def _open_heads(options: Speculation, target: Verifying) -> MedusaDrafter | MedusaOnDevice:
    draft_tokens, tree = options.draft_tokens, target.model.tree
    where, heads = None if target.folder is None else str(target.folder), target.model.heads
    if not heads:
        raise TargetError(
            "the artifact has no Medusa heads",
            where=where,
            remedy="compile it with --medusa FOLDER (optc train --recipe medusa trains them), or use another --speculative",
        )
    if draft_tokens > heads:
        raise UsageError(
            f"--draft-tokens {draft_tokens} is more than the {heads} Medusa heads of the artifact",
            where=where,
            remedy=f"give {heads} or less",
        )
    if options.shape == "tree" and tree is None:
        raise TargetError(
            "the artifact has no tree of guesses",
            where=where,
            why="it was compiled without one" if not target.model.on_device else "trees are verified on CPUs only",
            remedy="compile it with --target inductor-cpu --medusa FOLDER --speculative-tree 16, or leave --draft-shape out",
        )
    return MedusaOnDevice() if target.model.on_device else MedusaDrafter(1 if tree is None else tree.ranks)


@dataclass(frozen=True)
class _Drafting:
    """Where the model that drafts lies, its manifest, and whether that is in the artifact of the model that verifies."""

    folder: Path
    manifest: Manifest
    own: bool

    @classmethod
    def of(cls, options: Speculation, target: Verifying) -> Self:
        """The artifact that was named, or else what the target's own holds.

        Raises:
            UsageError: neither. InputError, ArtifactError: the one that was named cannot be used.
        """
        if options.draft is not None:
            return cls(options.draft, _verified(options.draft), own=False)
        manifest = None if target.folder is None else read_manifest(target.folder)
        if target.folder is None or manifest is None or "draft" not in manifest.programs:
            raise UsageError(
                f"--speculative {options.method} needs the model that drafts",
                where=None if target.folder is None else str(target.folder),
                why="the artifact holds none",
                remedy=f"give --draft ARTIFACT, or compile the model with --speculative {options.method} --draft FOLDER",
            )
        return cls(target.folder, manifest.alone("draft"), own=True)

    def trusting(self, target: Verifying) -> Verifying:
        """The target, with the trust that its own files have already."""
        return replace(target, trust=True) if self.own else target


def _open_model(found: _Drafting, draft_tokens: int, target: Verifying) -> DraftModel:
    if found.own and found.manifest.contract.draft is not None:
        raise UsageError(
            "the artifact drafts by --speculative eagle3, not draft",
            where=str(found.folder),
            why="the model that drafts reads hidden states of the other one",
            remedy="give --speculative eagle3",
        )
    if not found.own:  # else they were compared when it was compiled
        check_same_tokens(found.folder, target.folder)
    session = _open_paged(found, draft_tokens, target)
    return DraftModel(session.model, target.model.vocab_size, session.close)


def _open_eagle3(found: _Drafting, draft_tokens: int, target: Verifying) -> Eagle3Drafter | Eagle3OnDevice:
    """The draft model of an artifact, held to the base that verifies."""
    contract = found.manifest.contract
    facts = contract.draft
    if facts is None:
        raise InputError(
            "the artifact is no draft model that reads hidden states",
            where=str(found.folder),
            why="it was compiled from a model that drafts by itself",
            remedy="use --speculative draft, or train a draft model with optc train --recipe eagle3 and compile that",
        )
    if draft_tokens > facts.max_draft_tokens:
        raise UsageError(
            f"the draft model drafts {facts.max_draft_tokens} tokens in a row at most, not {draft_tokens}",
            where=str(found.folder),
            why="it was trained for so many",
            remedy=f"give --draft-tokens {facts.max_draft_tokens} or less",
        )
    check_states(facts, contract, target)
    session = _open_paged(found, draft_tokens, target, draft=True)
    if isinstance(session, CudaSession):
        return eagle3_on_device(session)
    return Eagle3Drafter(session.model, *_states_of(contract), session.close)


def eagle3_on_device(session: CudaSession) -> Eagle3OnDevice:
    """The drafter over a draft model's session, whose it is from then on; its pool has the base's blocks.

    Raises:
        TargetError: see `draft_graphs`.
    """
    model, program = session.model, session.program
    graphs = draft_graphs(program)
    return Eagle3OnDevice(graphs, list(model.pools), *_states_of(program.contract), session.close)


def _states_of(contract: Contract) -> tuple[tuple[int, int], torch.dtype]:
    """Widths of the inputs `base_states` and `own_states` of a draft model, and their type."""
    specs = {spec.role: spec for spec in contract.inputs if spec.role.endswith("_states")}
    widths = (int(specs["base_states"].dims[-1]), int(specs["own_states"].dims[-1]))
    return widths, getattr(torch, specs["base_states"].dtype)


def _verified(folder: Path) -> Manifest:
    """The manifest of the model that drafts."""
    if (folder / "config.json").is_file() and not (folder / "manifest.json").is_file():
        base = ", with --base and the folder of its base" if is_eagle3(folder) else ""
        raise InputError(
            "the model that drafts is not compiled",
            where=str(folder),
            why="it is a model folder",
            remedy=f"compile it with --target inductor-cpu --kv-cache paged{base}, and give --draft the artifact",
        )
    return verify(folder)


def _open_paged(found: _Drafting, draft_tokens: int, target: Verifying, *, draft: bool = False) -> PagedSession:
    """A cache as large as the target's, with room for the draft of each request that runs.

    Args:
        draft: it reads hidden states of the base.
    """
    folder, manifest, target = found.folder, found.manifest, found.trusting(target)
    cache, device = manifest.contract.kv_cache, target.model.device
    if cache.kind != "paged":
        raise TargetError(
            "the model that drafts must have a paged KV cache",
            where=str(folder),
            why=f"its cache is of kind '{cache.kind}', which cannot forget what was rejected in each row by itself",
            remedy="compile it with --target inductor-cpu --kv-cache paged",
        )
    shares = draft and target.model.on_device
    if shares and cache.block_size != target.model.block_size:
        raise TargetError(
            "the draft model's cache has other blocks than that of the model that verifies, which it shares",
            where=str(folder),
            why=f"they hold {cache.block_size} tokens, not {target.model.block_size}",
            remedy="compile both with the same version of optc, for the same target",
        )
    tokens = target.model.num_blocks * target.model.block_size
    blocks = -(-tokens // cache.block_size)
    blocks += 0 if shares else target.running * (2 + draft_tokens // cache.block_size)
    session = open_session(folder, manifest, threads=target.threads, num_blocks=blocks, trust=target.trust, draft=draft)
    assert isinstance(session, PagedSession)
    if session.model.device.type != device.type:
        session.close()
        raise TargetError(
            "the model that drafts runs on another device",
            where=str(folder),
            why=f"it runs on {session.model.device.type}, the model that verifies on {device.type}",
            remedy="compile both for the same target",
        )
    return session


def check_states(facts: DraftFacts, contract: Contract, target: Verifying) -> None:
    """Hold a draft model to the base that verifies: the states that it reads, its tokens, the weights it was trained on.

    Raises:
        TargetError: the base's artifact does not give these states.
        InputError: it was made for another base, or for another tokenizer.
    """
    flag = ",".join(map(str, facts.boundaries))
    remedy = f"compile the base again with --expose-hidden {flag}"
    if ROLE not in target.model.gives:
        raise TargetError(
            "the artifact does not give the hidden states that the draft model reads",
            where=None if target.folder is None else str(target.folder),
            why="it was compiled without them",
            remedy=remedy,
        )
    if target.folder is None:
        return
    base = read_manifest(target.folder)
    given = next(spec.layers for spec in base.contract.outputs if spec.role == ROLE)
    if given != facts.boundaries:
        raise TargetError(
            "the artifact gives other hidden states than the draft model reads",
            where=str(target.folder),
            why=f"it gives those of {list(given)}, not of {list(facts.boundaries)}",
            remedy=remedy,
        )
    path = target.folder / "tokenizer.json"
    tokenizer = sha256_of(path) if path.is_file() else ""
    sizes = (contract.model.vocab_size, contract.model.hidden_size)
    own = (base.contract.model.vocab_size, base.contract.model.hidden_size)
    if facts.tokenizer and facts.tokenizer != tokenizer:
        why = "its tokenizer.json is not that of the model that verifies"
    elif facts.base_weights and facts.base_weights != base.source.weights_sha256:
        why = "it was trained on other weights"
    elif sizes != own:
        why = f"its vocabulary and width are {sizes[0]} and {sizes[1]}, those of the model that verifies {own[0]} and {own[1]}"
    else:
        return
    raise InputError(
        "the draft model was made for another base",
        where=str(target.folder),
        why=why,
        remedy="give the artifact of the model that it was trained on, or train a draft model for this one",
    )
