"""From an artifact's folder to an engine that serves it."""

from __future__ import annotations

from pathlib import Path

from optc.compiler.artifact.folder import verify
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import TargetError
from optc.runtime.generation.tokenizer import eos_token_ids
from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.grammar import Grammars
from optc.runtime.serving.model_runner import HostRunner
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Engine
from optc.runtime.serving.session_engine import SessionEngine
from optc.runtime.sessions.load import open_session
from optc.runtime.sessions.paged import PagedSession
from optc.runtime.sessions.session import Session
from optc.runtime.speculative.opening import open_drafter


def open_engine(folder: str | Path, manifest: Manifest | None = None, options: EngineOptions | None = None) -> Engine:
    """The engine for an artifact: continuous batching where its cache is paged, else one request at a time.

    Args:
        manifest: of a folder that was verified already; None verifies it.

    Raises:
        InputError, ArtifactError, TargetError, UsageError: as `load`.
    """
    folder, options = Path(folder), options or EngineOptions()
    found = verify(folder) if manifest is None else manifest
    session = open_session(folder, found, threads=options.threads, num_blocks=options.num_blocks)
    stop_ids = eos_token_ids(folder, found.contract.model.eos_token_ids)
    return engine_for(session, options, Grammars(folder, session.vocab_size, stop_ids))


def engine_for(session: Session, options: EngineOptions, grammars: Grammars | None = None) -> Engine:
    """The engine over a session, which is the engine's from then on; without `grammars`, those of requests are refused.

    Raises:
        TargetError: speculation, where the cache is not paged.
    """
    if not isinstance(session, PagedSession):
        if options.speculation is not None:
            raise TargetError(
                "the artifact cannot verify drafts",
                why="its KV cache is not paged, and one step of it does not give the logits of several tokens",
                remedy="compile it with --target inductor-cpu --kv-cache paged, or leave --speculative out",
            )
        return SessionEngine(session, options, grammars)
    model = session.model
    # Steps that follow each other on the device know no token that the host could draft from.
    runner = DeviceRunner if model.on_device and options.speculation is None else HostRunner
    drafter = None if options.speculation is None else open_drafter(options.speculation)
    return PagedEngine(
        model,
        options,
        runner,
        grammars=grammars,
        drafter=drafter,
        on_close=session.close,
        device=session.device_name,
    )
