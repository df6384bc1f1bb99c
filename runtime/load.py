"""From an artifact's folder to a model that generates. Every file is verified before any is parsed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from optc.compiler.artifact import open_verified
from optc.compiler.diagnostics import InputError, TargetError
from optc.compiler.manifest import Manifest
from optc.runtime.generate import StopReason, generate
from optc.runtime.sampling import Sampling
from optc.runtime.session import Session
from optc.runtime.tokenizer import TextStream, Tokenizer, load_tokenizer

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


class Model:
    """An open artifact: its session, tokenizer and manifest."""

    def __init__(self, manifest: Manifest, session: Session, tokenizer: Tokenizer | None) -> None:
        self.manifest, self.session, self.tokenizer = manifest, session, tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a text."""
        if self.tokenizer is not None:
            return self.tokenizer.eos_token_ids
        return self.manifest.contract.model.eos_token_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            InputError: the artifact has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(
                "the artifact has no tokenizer", why="its source model had no tokenizer.json",
                remedy="give token ids: --prompt-tokens 5,17,33",
            )  # fmt: skip
        return self.tokenizer.encode(text)

    @overload
    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation: ...

    @overload
    def generate(self, prompt: Sequence[str] | Sequence[Sequence[int]], **options: Any) -> list[Generation]: ...

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        ignore_eos: bool = False,
        on_text: OnText | None = None,
    ) -> Generation | list[Generation]:
        """Continue a prompt, or a batch of prompts of any lengths.

        Args:
            prompt: text or token ids, or a list of either; a list gives a list.
            temperature, top_k, top_p, seed: see `Sampling`; greedy by default.
            ignore_eos: go on after end-of-text tokens.
            on_text: gets the text as it comes, whole characters only.

        Raises:
            UsageError: an option out of range.
            InputError: an empty prompt, one too long, unknown token ids, or text without a tokenizer.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
        rows: Sequence[Any] = [prompt] if single else prompt
        prompts = [self.encode(row) if isinstance(row, str) else list(row) for row in rows]
        streams = _Streams(self.tokenizer, len(prompts), on_text)
        result = generate(
            self.session,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=() if ignore_eos else self.stop_ids,
            on_token=streams.push if streams.wanted else None,
        )
        streams.finish()
        found = [
            Generation(
                prompt_tokens=row,
                tokens=tokens,
                text=None if self.tokenizer is None else self.tokenizer.decode(tokens),
                stop=stop,
                ttft_ms=result.ttft_ms,
                tpot_ms=result.tpot_ms,
            )
            for row, tokens, stop in zip(prompts, result.tokens, result.stop, strict=True)
        ]
        return found[0] if single else found

    def close(self) -> None:
        """Close the session."""
        self.session.close()


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


def load(folder: str | Path, *, threads: int | None = None, num_blocks: int | None = None) -> Model:
    """Verify an artifact and open it for generation.

    Args:
        threads: of the engine; None takes one per physical core that this process may use.
        num_blocks: size of the KV pool of a paged artifact; see `PagedSession`.

    Raises:
        InputError: there is no such folder.
        ArtifactError: a file is missing, changed or not plain.
        TargetError: not a decoder, or this host cannot run it.
    """
    folder = Path(folder)
    manifest = open_verified(folder)
    session = open_session(folder, manifest, threads=threads, num_blocks=num_blocks)
    tokenizer = load_tokenizer(folder, manifest.contract.model.eos_token_ids)
    return Model(manifest, session, tokenizer)
