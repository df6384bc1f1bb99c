"""From a verified artifact to the session that its engine and KV cache want."""

from __future__ import annotations

from pathlib import Path

from optc.compiler.artifact.engines import Engine, check_facts, find_engine
from optc.compiler.artifact.folder import check_trusted
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import TargetError, UsageError
from optc.compiler.settings.fields import check_range
from optc.runtime.bounds import Threads
from optc.runtime.sessions.session import Session, SessionOptions
from optc.runtime.sessions.whole import WholeSession


def _check_device(engine: Engine, manifest: Manifest, asked: str, where: str) -> None:
    """Refuse a device that is not the engine's.

    Raises:
        UsageError, TargetError: as `choose_device`; or the engine runs elsewhere.
    """
    from optc.compiler.ir.devices import choose_device

    own = manifest.device if engine.device == "target" else engine.device
    found = choose_device(own if asked == "auto" else asked)
    if found.type != own or found.index not in (None, 0):
        raise TargetError(
            f"the artifact does not run on {asked}",
            where=where,
            why=f"its engine, {engine.name}, runs on " + ("the CPU" if own == "cpu" else "the first GPU"),
            remedy="leave --device out" + ("" if own == "cpu" else ", and choose the GPU by CUDA_VISIBLE_DEVICES"),
        )


def _check_generates(engine: Engine, manifest: Manifest, where: str, *, eager: bool, draft: bool) -> None:
    """Refuse an artifact that has no session; arguments as `open_session`.

    Raises:
        TargetError: it has none.
    """
    contract = manifest.contract
    if engine.eager and not eager:
        raise TargetError(
            "optc has no session for this artifact: it is a model folder",
            where=where,
            remedy="load it with transformers (AutoModelForCausalLM.from_pretrained), vLLM or SGLang",
        )
    if contract.kind != "decoder" or (_is_whole(engine, manifest) and engine.caller is None):
        what = "without a KV cache" if contract.kind == "decoder" else f"of kind '{contract.kind}'"
        raise TargetError(
            f"the artifact is a model {what}, which does not generate",
            where=where,
            remedy="call it with tensors: optc.load(folder)(...), or optc run --inputs FILE.npz; optc inspect lists them",
        )
    if contract.draft is not None and not draft:
        raise TargetError(
            "the artifact is a draft model, which does not generate by itself",
            where=where,
            why="it reads hidden states of the model that it drafts for",
            remedy="run that model with --speculative eagle3 --draft and this folder",
        )


def _is_whole(engine: Engine, manifest: Manifest) -> bool:
    """Whether it is called with whole texts, as it has no cache."""
    return not engine.eager and manifest.contract.kv_cache.kind == "none"


def _check_options(engine: Engine, manifest: Manifest, threads: int | None, num_blocks: int | None) -> None:
    """Refuse options that have no effect.

    Raises:
        UsageError: one is out of range, or has none.
    """
    if threads is not None:
        check_range("threads", threads, Threads)
    if threads is not None and not engine.has_threads:
        raise UsageError("threads has no effect here: the plan runs on the GPU", remedy="leave it out")
    if num_blocks is not None and manifest.contract.kv_cache.kind != "paged":
        raise UsageError(
            "kv-blocks has no effect here: the KV cache of the artifact is not paged", remedy="leave it out"
        )


def open_session(
    folder: Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    num_blocks: int | None = None,
    eager: bool = False,
    device: str | None = None,
    graph_device: str = "cpu",
    trust: bool = False,
    draft: bool = False,
) -> Session:
    """The session for a verified artifact, picked by its engine and KV cache; arguments as `load`.

    Args:
        draft: a draft model that reads hidden states of a base is what is wanted, and its caller gives it them.

    Raises:
        ArtifactError: native code that nobody vouches for, or facts that optc does not write.
        TargetError: not a decoder, the engine is not installed, or it cannot run the artifact.
        UsageError: an option out of range or without effect on this artifact.
    """
    engine = find_engine(manifest.engine, str(folder))
    if device is not None and not engine.eager:
        _check_device(engine, manifest, device, str(folder))
    _check_generates(engine, manifest, str(folder), eager=eager, draft=draft)
    _check_options(engine, manifest, threads, num_blocks)
    for info in manifest.engine_infos:
        check_facts(engine, info, manifest.needs, {entry.path for entry in manifest.files}, str(folder))
    check_trusted(folder, manifest, trust)
    place = (device if engine.eager else None) or graph_device
    options = SessionOptions(threads=threads, num_blocks=num_blocks, device=place)
    if _is_whole(engine, manifest):
        return WholeSession(engine.open_caller(folder, manifest, options), manifest.contract)
    session: Session = engine.open_session(folder, manifest, options)
    return session
