"""Models that continue texts: a session with a tokenizer."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.notebook import html_table
from optc.runtime.generation.generate import GenerationResult, StopReason, generate
from optc.runtime.generation.tokenizer import TextStream, Tokenizer
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.session import Session

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
