"""The drafter of each method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optc.compiler.artifact.folder import verify
from optc.compiler.diagnostics import InputError, TargetError
from optc.runtime.generation.tokenizer import load_tokenizer
from optc.runtime.sessions.load import open_session
from optc.runtime.sessions.paged import PagedModel, PagedSession
from optc.runtime.speculative.draft_model import DraftModel
from optc.runtime.speculative.drafter import Drafter
from optc.runtime.speculative.lookahead import LookaheadDrafter
from optc.runtime.speculative.ngram import NgramDrafter
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
        folder: its artifact; None where it has no tokenizer that could be compared.
        running: requests that run together.
        trust: of the model that drafts too; see `check_trusted`.
    """

    model: PagedModel
    folder: Path | None
    running: int
    threads: int | None = None
    trust: bool = False


def open_drafter(options: Speculation, target: Verifying) -> Drafter:
    """What drafts by the method of these options.

    Raises:
        InputError, ArtifactError, TargetError: the model that drafts cannot be opened, has a cache that is not paged, or
            tokens that are not the target's.
    """
    if options.method in _NO_WEIGHTS:
        return _NO_WEIGHTS[options.method]()
    assert options.draft is not None
    return _open_model(options.draft, options.draft_tokens, target)


def _open_model(folder: Path, draft_tokens: int, target: Verifying) -> DraftModel:
    """A cache as large as the target's, with room for the draft of each request that runs."""
    if (folder / "config.json").is_file() and not (folder / "manifest.json").is_file():
        raise InputError(
            "the model that drafts is not compiled",
            where=str(folder),
            why="it is a model folder",
            remedy="compile it with --target inductor-cpu --kv-cache paged, and give --draft the artifact",
        )
    manifest = verify(folder)
    _check_tokens(folder, target)
    cache, device = manifest.contract.kv_cache, target.model.device
    if cache.kind != "paged":
        raise TargetError(
            "the model that drafts must have a paged KV cache",
            where=str(folder),
            why=f"its cache is of kind '{cache.kind}', which cannot forget what was rejected in each row by itself",
            remedy="compile it with --target inductor-cpu --kv-cache paged",
        )
    tokens = target.model.num_blocks * target.model.block_size
    blocks = -(-tokens // cache.block_size) + target.running * (2 + draft_tokens // cache.block_size)
    session = open_session(folder, manifest, threads=target.threads, num_blocks=blocks, trust=target.trust)
    assert isinstance(session, PagedSession)
    if session.model.device.type != device.type:
        session.close()
        raise TargetError(
            "the model that drafts runs on another device",
            where=str(folder),
            why=f"it runs on {session.model.device.type}, the model that verifies on {device.type}",
            remedy="compile both for the same target",
        )
    return DraftModel(session.model, target.model.vocab_size, session.close)


def _check_tokens(folder: Path, target: Verifying) -> None:
    """Refuse a draft model whose token ids mean other tokens.

    Raises:
        InputError: see above; it names the first id.
    """
    theirs = load_tokenizer(folder)
    ours = None if target.folder is None else load_tokenizer(target.folder)
    if theirs is None or ours is None:
        raise InputError(
            "the tokens of the model that drafts cannot be compared",
            where=str(folder if theirs is None else target.folder),
            why="there is no tokenizer.json",
            remedy="compile both models from folders with their tokenizers",
        )
    found = ours.first_difference(theirs)
    if found is not None:
        number, our, their = found
        raise InputError(
            "the model that drafts has another tokenizer",
            where=str(folder),
            why=f"token id {number} is {_shown(their)} there and {_shown(our)} in the model that verifies",
            remedy="draft with a model of the same family, or with --speculative ngram, suffix or lookahead",
        )


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token[:40])
