"""From an artifact's folder to a model that generates. Every file is verified before any is parsed."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import msgspec

from optc.compiler.artifact.engines import Engine, check_facts, find_engine
from optc.compiler.artifact.folder import check_trusted, read_manifest, verify
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import InputError, TargetError, UsageError
from optc.compiler.notebook import html_table
from optc.compiler.settings.fields import check_range, check_type
from optc.runtime.bounds import Threads
from optc.runtime.generation.beams import BeamSettings, beam_search
from optc.runtime.generation.generate import GenerationResult, StopReason, generate
from optc.runtime.generation.tokenizer import TextStream, Tokenizer, eos_token_ids, load_tokenizer
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.embedding_model import EmbeddingModel
from optc.runtime.sessions.encoder_decoder import EncoderDecoderSession
from optc.runtime.sessions.session import Session, SessionOptions
from optc.runtime.sessions.tensor_model import TensorModel, as_array
from optc.runtime.sessions.whole import WholeSession

OnText = Callable[[int, str], None]
"""Called with (row, piece of text) as text is generated."""


@dataclass(frozen=True)
class Generation:
    """What one prompt gave.

    Attributes:
        prompt_tokens: ids of the prompt.
        tokens: generated ids, a final stop token included.
        text: their text without special tokens; None without a tokenizer.
        stop: why it ended: "stop-token", "length" or "context".
        ttft_ms: from the call to the first token (of the whole batch).
        tpot_ms: mean time per step after the first token; None when there was none.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str | None
    stop: StopReason
    ttft_ms: float
    tpot_ms: float | None


class GenerateOptions(TypedDict, total=False):
    """Options of `Model.generate`; see `Model.generate_batch`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    ignore_eos: bool
    on_text: OnText | None


class TextModel:
    """A session with a tokenizer, and the ids that end a text.

    Attributes:
        generator: continues rows of tokens, as `generate` does over the session.
    """

    def __init__(self, session: Session, tokenizer: Tokenizer | None, stop_ids: tuple[int, ...]) -> None:
        self.session, self.tokenizer, self.stop_ids = session, tokenizer, stop_ids
        self.generator: Callable[..., GenerationResult] = functools.partial(generate, session)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            InputError: the artifact has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(
                "the model has no tokenizer",
                why="its source model had none",
                remedy="give token ids: --prompt-tokens 5,17,33",
            )
        return self.tokenizer.encode(text)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Generation:
        """Continue one prompt, text or token ids; see `generate_batch`."""
        return self.generate_batch([prompt], **options)[0]

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        ignore_eos: bool = False,
        on_text: OnText | None = None,
    ) -> list[Generation]:
        """Continue prompts of any lengths together, each text or token ids.

        Args:
            temperature, top_k, top_p, min_p, penalties, seed: see `Sampling`; greedy by default.
            ignore_eos: continue after end-of-text tokens.
            on_text: gets the text as it comes, whole characters only.

        Raises:
            UsageError: an option out of range, or prompts that are neither texts nor token ids.
            InputError: an empty prompt, one too long, unknown token ids, or text without a tokenizer.
        """
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
        )
        rows = self._rows(prompts)
        streams = _Streams(self.tokenizer, len(rows), on_text)
        result = self.generator(
            rows,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=() if ignore_eos else self.stop_ids,
            on_token=streams.push if streams.wanted else None,
        )
        streams.finish()
        return self._generations(rows, result)

    def _generations(self, rows: Sequence[Any], result: GenerationResult) -> list[Generation]:
        return [
            Generation(
                prompt_tokens=row if isinstance(row, list) else [],
                tokens=tokens,
                text=None if self.tokenizer is None else self.tokenizer.decode(tokens),
                stop=stop,
                ttft_ms=result.ttft_ms,
                tpot_ms=result.tpot_ms,
            )
            for row, tokens, stop in zip(rows, result.tokens, result.stop, strict=True)
        ]

    def _rows(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise UsageError("a batch is a list of prompts, not one text", remedy="give [text], or call generate(text)")
        rows = []
        for row, item in enumerate(prompts):
            try:
                rows.append(self.encode(item) if isinstance(item, str) else [operator.index(token) for token in item])
            except TypeError as error:
                raise UsageError(
                    f"prompt {row} is neither text nor token ids", why=str(error), remedy="give a text or integers"
                ) from error
        return rows

    def close(self) -> None:
        """Close the session."""
        self.session.close()


class Model(TextModel):
    """An open artifact, with its manifest."""

    def __init__(
        self, manifest: Manifest, session: Session, tokenizer: Tokenizer | None, stop_ids: tuple[int, ...]
    ) -> None:
        super().__init__(session, tokenizer, stop_ids)
        self.manifest = manifest

    def __repr__(self) -> str:
        """A line: target, model, size and context."""
        facts, size = self.manifest.contract.model, self.manifest.weight_bytes / 1e6
        kind = facts.architecture or facts.model_type or self.manifest.contract.kind
        return f"Model({self.manifest.target}: {kind}, {size:.2f} MB, context {self.session.context_length})"

    def _repr_html_(self) -> str:
        manifest = self.manifest
        rows = [("engine", manifest.engine), ("type", manifest.dtype), ("KV cache", manifest.contract.kv_cache.kind)]
        rows += [
            ("source", manifest.source.path or "a module in memory"),
            ("passes", ", ".join(manifest.contract.passes)),
        ]
        return html_table(repr(self), ("", ""), rows)


class EncoderDecoderModel(Model):
    """An open artifact whose decoder answers what its encoder reads: texts, or features of sounds."""

    session: EncoderDecoderSession

    def __init__(
        self,
        manifest: Manifest,
        session: EncoderDecoderSession,
        tokenizer: Tokenizer | None,
        stop_ids: tuple[int, ...],
        open_encoder: Callable[[], TensorModel],
    ) -> None:
        super().__init__(manifest, session, tokenizer, stop_ids)
        self._open_encoder = open_encoder

    @functools.cached_property
    def encoder(self) -> TensorModel:
        """The encoder alone: called with texts or tensors, it gives its states first."""
        return self._open_encoder()

    @contextlib.contextmanager
    def answers_from(self, ids: Sequence[int]) -> Iterator[None]:
        """Let answers begin with these tokens for a while, the start token included: a language, a task.

        Raises:
            InputError: no token, or one outside the vocabulary.
        """
        before = self.session.start_ids
        self.session.start_from(ids)
        try:
            yield
        finally:
            self.session.start_ids = before

    def search(
        self,
        prompts: Sequence[Any],
        *,
        beams: int = 4,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """The likeliest answer to each prompt that beam search finds; see `BeamSettings`.

        Raises:
            UsageError: an option out of range. InputError: as `generate_batch`.
        """
        settings = BeamSettings(beams, length_penalty, early_stopping)
        rows = self._rows(prompts)
        stop_ids = () if ignore_eos else self.stop_ids
        result = beam_search(self.session, rows, settings, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        return self._generations(rows, result)

    def _rows(self, prompts: Sequence[Any]) -> list[Any]:
        if self.session.reads_text:
            return super()._rows(prompts)
        if any(isinstance(item, str) for item in prompts) or isinstance(prompts, str):
            (spec,) = self.session.encoder.inputs
            raise InputError(
                "the model reads sounds, not text",
                why=f"it takes {spec.name} {list(spec.dims[1:])} of each sound",
                remedy="give features: optc run ARTIFACT --inputs features.npz; in Python, arrays. transformers' feature "
                "extractor of the model makes them of audio",
            )
        return [as_array(item) for item in prompts]


class _Streams:
    """One text stream per row."""

    def __init__(self, tokenizer: Tokenizer | None, rows: int, on_text: OnText | None) -> None:
        self._on_text = on_text
        self.wanted = tokenizer is not None and on_text is not None
        self._streams = [TextStream(tokenizer) for _ in range(rows)] if tokenizer is not None else []

    def push(self, row: int, token: int) -> None:
        self._tell(row, self._streams[row].push(token))

    def finish(self) -> None:
        if self.wanted:
            for row, stream in enumerate(self._streams):
                self._tell(row, stream.finish())

    def _tell(self, row: int, piece: str) -> None:
        if piece and self._on_text is not None:
            self._on_text(row, piece)


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
    contract, engine = manifest.contract, find_engine(manifest.engine, str(folder))
    if engine.eager and not eager:
        raise TargetError(
            "optc has no session for this artifact: it is a model folder",
            where=str(folder),
            remedy="load it with transformers (AutoModelForCausalLM.from_pretrained), vLLM or SGLang",
        )
    if device is not None and not engine.eager:
        _check_device(engine, manifest, device, str(folder))
    whole = not engine.eager and contract.kv_cache.kind == "none"
    if contract.kind != "decoder" or (whole and engine.caller is None):
        what = "without a KV cache" if contract.kind == "decoder" else f"of kind '{contract.kind}'"
        raise TargetError(
            f"the artifact is a model {what}, which does not generate",
            where=str(folder),
            remedy="call it with tensors: optc.load(folder)(...), or optc run --inputs FILE.npz; optc inspect lists them",
        )
    if contract.draft is not None and not draft:
        raise TargetError(
            "the artifact is a draft model, which does not generate by itself",
            where=str(folder),
            why="it reads hidden states of the model that it drafts for",
            remedy="run that model with --speculative eagle3 --draft and this folder",
        )
    if threads is not None:
        check_range("threads", threads, Threads)
    if threads is not None and not engine.has_threads:
        raise UsageError("threads has no effect here: the plan runs on the GPU", remedy="leave it out")
    if num_blocks is not None and contract.kv_cache.kind != "paged":
        raise UsageError(
            "kv-blocks has no effect here: the KV cache of the artifact is not paged", remedy="leave it out"
        )
    for info in manifest.engine_infos:
        check_facts(engine, info, manifest.needs, {entry.path for entry in manifest.files}, str(folder))
    check_trusted(folder, manifest, trust)
    place = (device if engine.eager else None) or graph_device
    options = SessionOptions(threads=threads, num_blocks=num_blocks, device=place)
    if whole:
        return WholeSession(engine.open_caller(folder, manifest, options), contract)
    session: Session = engine.open_session(folder, manifest, options)
    return session
