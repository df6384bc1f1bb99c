"""From an artifact's folder to an engine that serves it."""

from __future__ import annotations

from pathlib import Path

from optc.compiler.artifact.folder import verify
from optc.compiler.artifact.manifest import Manifest
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
    """The engine over a session, which is the engine's from then on; without `grammars`, those of requests are refused."""
    if not isinstance(session, PagedSession):
        return SessionEngine(session, options, grammars)
    model = session.model
    runner = DeviceRunner if model.on_device else HostRunner
    return PagedEngine(model, options, runner, grammars=grammars, on_close=session.close, device=session.device_name)
