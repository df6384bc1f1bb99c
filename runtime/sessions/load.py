"""From an artifact's folder to a model. Every file is verified before any is parsed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import msgspec

from optc.compiler.artifact.engines import check_facts, find_engine
from optc.compiler.artifact.folder import check_trusted, read_manifest, verify
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import TargetError, UsageError
from optc.compiler.settings.fields import check_range, check_type
from optc.runtime.bounds import Threads
from optc.runtime.generation.tokenizer import eos_token_ids, load_tokenizer
from optc.runtime.sessions.embedding_model import EmbeddingModel
from optc.runtime.sessions.encoder_decoder import EncoderDecoderSession
from optc.runtime.sessions.encoder_decoder_model import EncoderDecoderModel
from optc.runtime.sessions.opening import open_session
from optc.runtime.sessions.session import SessionOptions
from optc.runtime.sessions.tensor_model import TensorModel
from optc.runtime.sessions.text_model import Model


def load(
    folder: str | Path,
    *,
    threads: int | None = None,
    num_blocks: int | None = None,
    eager: bool = False,
    device: str | None = None,
    graph_device: str = "cpu",
    trust: bool = False,
    isolated: bool = True,
) -> Model:
    """Verify an artifact and open it for generation.

    Args:
        threads: of the engine; None takes one per physical core that this process may use.
        num_blocks: size of the KV pool of a paged artifact; see `PagedSession`.
        eager: capture a model folder, which has no engine of optc's, and run its graph: slow, for measuring quality.
        device: cpu, cuda, cuda:N or auto, where the artifact must run; None is where its engine does.
        graph_device: where such a graph runs, if `device` says nothing.
        trust: run native code of an artifact that was not made on this machine and bears no signature of a trusted key.
        isolated: this process may die of such an artifact; without it, its engine asks for trust too.

    Raises:
        InputError: there is no such folder.
        ArtifactError: a file is missing, changed or not plain; an artifact that nobody vouches for.
        TargetError: not a decoder, or this host cannot run it.
    """
    for name, value in (("eager", eager), ("trust", trust)):
        check_type(name, value, bool, "True or False")
    folder = Path(folder)
    manifest = verify(folder)
    if not isolated:
        check_trusted(folder, manifest, trust, isolated=False)
    session = open_session(
        folder,
        manifest,
        threads=threads,
        num_blocks=num_blocks,
        eager=eager,
        device=device,
        graph_device=graph_device,
        trust=trust,
    )
    stop_ids = eos_token_ids(folder, manifest.contract.model.eos_token_ids)
    if isinstance(session, EncoderDecoderSession):
        encoder = functools.partial(_open_encoder, folder, manifest, SessionOptions(threads=threads))
        return EncoderDecoderModel(manifest, session, load_tokenizer(folder), stop_ids, encoder)
    return Model(manifest, session, load_tokenizer(folder), stop_ids)


def _open_encoder(folder: Path, manifest: Manifest, options: SessionOptions) -> TensorModel:
    """The encoder of a verified and trusted artifact, as a function of tensors to its states.

    A package gives more than these: keys and values that the decoder reads.
    """
    alone, engine = manifest.alone("encoder"), find_engine(manifest.engine, str(folder))
    call = engine.open_caller(folder, alone, options)
    states = alone.with_program(contract=msgspec.structs.replace(alone.contract, outputs=alone.contract.outputs[:1]))
    return TensorModel(states, lambda *inputs: call(*inputs)[:1], load_tokenizer(folder))


def load_any(
    folder: str | Path,
    *,
    threads: int | None = None,
    trust: bool = False,
    isolated: bool = True,
    **generating: Any,
) -> Model | TensorModel:
    """`load`, or the artifact of an encoder or a plain module as what it is: a function of tensors.

    Args:
        generating: the other options of `load`, which only artifacts that generate have.

    Raises:
        OptcError: as `load`; UsageError: an option of another type, or one that has no effect on the artifact.
    """
    for name, value in (("eager", generating.get("eager", False)), ("trust", trust)):
        check_type(name, value, bool, "True or False")
    manifest = read_manifest(Path(folder))
    if manifest.contract.kind == "decoder":
        return load(folder, threads=threads, trust=trust, isolated=isolated, **generating)
    given = [name for name, value in generating.items() if value]
    if given:
        name = {"num_blocks": "kv-blocks"}.get(given[0], given[0])
        raise UsageError(f"{name} has no effect on a model that does not generate", remedy="leave it out")
    return load_tensors(Path(folder), threads=threads, trust=trust, isolated=isolated)


def load_tensors(
    folder: Path, *, threads: int | None = None, trust: bool = False, isolated: bool = True
) -> TensorModel:
    """Verify the artifact of an encoder or a plain module and open it as a function of tensors; arguments as `load`.

    Raises:
        ArtifactError: as `load`. TargetError: optc cannot call artifacts of this engine, or this host cannot run it.
        UsageError: an option out of range.
    """
    check_type("trust", trust, bool, "True or False")
    if threads is not None:
        check_range("threads", threads, Threads)
    manifest = verify(folder)
    engine = find_engine(manifest.engine, str(folder))
    if engine.caller is None:
        raise TargetError(
            f"optc cannot call a model of kind '{manifest.contract.kind}' in {engine.name}",
            where=str(folder),
            remedy="run its engine file with the engine itself (optc inspect lists inputs and outputs), or compile it "
            "with --target onnx-cpu or inductor-cpu",
        )
    check_facts(engine, manifest.engine_info, manifest.needs, {entry.path for entry in manifest.files}, str(folder))
    check_trusted(folder, manifest, trust, isolated=isolated)
    call = engine.open_caller(folder, manifest, SessionOptions(threads=threads))
    facts = manifest.contract.embedding
    tokenizer = load_tokenizer(folder, lower_case=facts is not None and facts.lower_case)
    return (TensorModel if facts is None else EmbeddingModel)(manifest, call, tokenizer)
