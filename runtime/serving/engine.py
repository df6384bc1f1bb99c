"""From an artifact's folder to an engine that serves it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from optc.compiler.artifact.folder import verify
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import OptcError, TargetError
from optc.runtime.generation.tokenizer import eos_token_ids
from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.generating import generate_through
from optc.runtime.serving.grammar import Grammars
from optc.runtime.serving.interface import Engine
from optc.runtime.serving.model_runner import HostRunner, ModelRunner
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.round_runner import RoundRunner
from optc.runtime.serving.rows import Rows
from optc.runtime.serving.sampler import SamplerOf
from optc.runtime.serving.session_engine import SessionEngine
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.opening import open_session
from optc.runtime.sessions.paged import PagedModel, PagedSession
from optc.runtime.sessions.session import Session
from optc.runtime.sessions.text_model import Model
from optc.runtime.speculative.device_drafter import DeviceDrafter
from optc.runtime.speculative.drafter import Drafter, ReadingDrafter
from optc.runtime.speculative.opening import Verifying, open_drafter
from optc.runtime.speculative.settings import Speculation


def open_engine(folder: str | Path, manifest: Manifest | None = None, options: EngineOptions | None = None) -> Engine:
    """The engine for an artifact: continuous batching where its cache is paged, else one request at a time.

    Args:
        manifest: of a folder that was verified already; None verifies it.

    Raises:
        InputError, ArtifactError, TargetError, UsageError: as `load`.
    """
    folder, options = Path(folder), options or EngineOptions()
    found = verify(folder) if manifest is None else manifest
    if found.contract.cross is not None:
        raise TargetError(
            "optc serve does not serve encoder-decoder models",
            where=str(folder),
            why="its API continues texts; such a model answers them",
            remedy="call optc.load(folder).generate_batch(texts), or optc run",
        )
    session = open_session(folder, found, threads=options.threads, num_blocks=options.num_blocks, trust=options.trust)
    stop_ids = eos_token_ids(folder, found.contract.model.eos_token_ids)
    try:
        return engine_for(session, options, Grammars(folder, session.vocab_size, stop_ids), folder)
    except OptcError:
        session.close()
        raise


def engine_for(
    session: Session,
    options: EngineOptions,
    grammars: Grammars | None = None,
    folder: Path | None = None,
    drafter: Drafter | DeviceDrafter | None = None,
) -> Engine:
    """The engine over a session, which is the engine's from then on; without `grammars`, those of requests are refused.

    Args:
        folder: the session's artifact, whose tokenizer that of a model that drafts is compared with.
        drafter: where it is open already; None opens the one that `options.speculation` names.

    Raises:
        TargetError: speculation, where the cache is not paged.
        InputError, ArtifactError, TargetError: see `open_drafter`.
    """
    if not isinstance(session, PagedSession):
        if options.speculation is not None:
            raise _cannot_verify()
        return SessionEngine(session, options, grammars)
    copied = session.keep_dequantized() if options.dequantized_copies and isinstance(session, CudaSession) else 0
    model = session.model
    if options.speculation is not None and drafter is None:
        running, _ = options.batch(on_device=model.on_device)
        drafter = drafter_for(
            session, options.speculation, folder, running=running, threads=options.threads, trust=options.trust
        )
    return PagedEngine(
        model,
        options,
        _runner_of(model, options, drafter),
        grammars=grammars,
        drafter=drafter,
        on_close=session.close,
        device=session.device_name,
        copied_bytes=copied,
    )


def _runner_of(
    model: PagedModel, options: EngineOptions, drafter: Drafter | DeviceDrafter | None
) -> Callable[[PagedModel, Rows, SamplerOf], ModelRunner]:
    if isinstance(drafter, DeviceDrafter):
        assert options.speculation is not None
        most = options.speculation.draft_tokens or model.heads
        return functools.partial(RoundRunner, drafter=drafter, most=most)
    if model.on_device and not isinstance(drafter, ReadingDrafter):  # what captured steps give are tokens alone
        return functools.partial(DeviceRunner, drafts=options.speculation is not None)
    return HostRunner


def drafter_for(
    session: Session,
    speculation: Speculation,
    folder: Path | None,
    *,
    running: int,
    threads: int | None,
    trust: bool = False,
) -> Drafter | DeviceDrafter:
    """The drafter for a session of which so many requests run together; see `open_drafter`.

    Raises:
        TargetError: the session's cache is not paged.
    """
    if not isinstance(session, PagedSession):
        raise _cannot_verify()
    target = Verifying(model=session.model, folder=folder, running=running, threads=threads, trust=trust)
    return open_drafter(speculation, target)


def _cannot_verify() -> TargetError:
    return TargetError(
        "the artifact cannot verify drafts",
        why="its KV cache is not paged, and one step of it does not give the logits of several tokens",
        remedy="compile it with --target inductor-cpu --kv-cache paged, or leave --speculative out",
    )


def speculate(
    model: Model, folder: Path, speculation: Speculation, *, threads: int | None = None, trust: bool = False
) -> PagedEngine:
    """Let a model generate through an engine that drafts; it is to be closed before the model.

    Raises:
        TargetError, InputError, ArtifactError: see `engine_for`; the model is closed then.
    """
    try:
        options = EngineOptions(speculation=speculation, threads=threads, trust=trust)
        engine = engine_for(model.session, options, None, folder)
    except OptcError:
        model.close()
        raise
    assert isinstance(engine, PagedEngine)
    model.generator = functools.partial(generate_through, engine)
    return engine
