"""An open artifact that gives embeddings of texts: ragged batches, prompts, lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import ArtifactError, InputError, UsageError, unknown_name
from optc.compiler.ir.contract import Contract, EmbeddingFacts, Output
from optc.compiler.settings.fields import check_range, check_type
from optc.runtime.bounds import Count
from optc.runtime.generation.tokenizer import Tokenizer
from optc.runtime.sessions.tensor_model import Array, Call, TensorModel, check_lengths, padded

EMBEDDING = Output(name="embedding", role="embedding")
MOST_ROWS = 256
"""Rows of a batch, however short they are."""


class EmbeddingModel(TensorModel):
    """What `load` opens where the output of an artifact is an embedding."""

    def __init__(self, manifest: Manifest, call: Call, tokenizer: Tokenizer | None) -> None:
        super().__init__(manifest, call, tokenizer)
        self.facts = embedding_facts(manifest.contract)

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        truncate: bool = False,
        batch_tokens: int = 4096,
    ) -> Array:
        """Embeddings of texts: float32 [texts, size], or [size] of one text.

        Texts of like length share a batch, padded on the right; each gets what it gets alone.

        Args:
            prompt_name: of the prompts that the model was trained with, the one that is put before each text ("query");
                None takes the model's default, if it has one.
            truncate: cut texts that are longer than the context, as sentence-transformers does, in place of refusing them.
            batch_tokens: most tokens of a batch, with padding.

        Raises:
            UsageError: an unknown prompt, or an option of another type or out of range.
            InputError: no tokenizer, no text or an empty one; a text that is longer than the context.
        """
        if not isinstance(texts, str):
            check_type("texts", texts, tuple[str, ...], "a text, or a list of texts")
        check_type("truncate", truncate, bool, "True or False")
        check_range("batch_tokens", batch_tokens, Count)
        rows = self.tokens([texts] if isinstance(texts, str) else texts, prompt_name=prompt_name, truncate=truncate)
        found = self.embed_tokens(rows, batch_tokens=batch_tokens)
        return found[0] if isinstance(texts, str) else found

    def tokens(
        self, texts: Sequence[str], *, prompt_name: str | None = None, truncate: bool = False
    ) -> list[list[int]]:
        """Token ids of texts, with a prompt before each; see `embed`."""
        prompt = prompt_of(self.facts, prompt_name)
        prompted = [prompt + text for text in texts]
        limit = self.manifest.contract.model.context_length
        if not truncate or not limit or self.tokenizer is None:
            return super().tokens(prompted)
        return [self.tokenizer.encode_cut(text, limit) for text in prompted]

    def embed_tokens(self, rows: Sequence[Sequence[int]], *, batch_tokens: int = 4096) -> Array:
        """Embeddings float32 [rows, size] of rows of token ids, which get no prompt.

        Raises:
            InputError: no row, an empty one, one beyond the context, a token outside the vocabulary.
        """
        self.check_rows(rows)
        found: dict[int, Array] = {}
        for chosen in ragged_batches([len(row) for row in rows], batch_tokens):
            found |= zip(chosen, self.embed_batch([rows[index] for index in chosen]), strict=True)
        return np.stack([found[index] for index in range(len(rows))])

    def check_rows(self, rows: Sequence[Sequence[int]]) -> None:
        """Hold rows of token ids to what the model takes.

        Raises:
            InputError: as `embed_tokens`.
        """
        contract = self.manifest.contract
        if not rows or not all(rows):
            raise InputError("an empty text", remedy="give texts of at least one token")
        check_lengths(rows, contract)
        beyond = next((item for row in rows for item in row if not 0 <= item < contract.model.vocab_size), None)
        if beyond is not None:
            raise InputError(
                f"token id {beyond} is outside the vocabulary",
                why=f"the model has {contract.model.vocab_size} token ids",
                remedy="encode the text with the model's own tokenizer",
            )

    def embed_batch(self, rows: Sequence[Sequence[int]]) -> Array:
        """Embeddings of rows that were checked, by one call of the engine."""
        found: Array = np.asarray(self.run(padded(self.manifest.contract, rows))[self.outputs[0]], np.float32)
        if found.shape != (len(rows), self.facts.size):
            raise ArtifactError(
                "the engine gives other embeddings than the manifest says",
                why=f"{list(found.shape)}, not {[len(rows), self.facts.size]}",
                remedy="compile the model again",
            )
        return found


def embedding_facts(contract: Contract) -> EmbeddingFacts:
    """How texts become embeddings, of an artifact that says so.

    Raises:
        ArtifactError: what it says contradicts itself.
    """
    facts = contract.embedding
    assert facts is not None, "an artifact of embeddings"
    known = facts.default_prompt is None or facts.default_prompt in facts.prompts
    roles = {spec.role for spec in contract.inputs}
    if not known or contract.outputs[:1] != (EMBEDDING,) or not roles >= {"input_ids", "attention_mask"}:
        raise ArtifactError(
            "the manifest contradicts itself: its embeddings cannot be made",
            where="contract.embedding",
            remedy="compile the model again",
        )
    return facts


def prompt_of(facts: EmbeddingFacts, name: str | None) -> str:
    """The text of a prompt by its name; of None the default's, or nothing.

    Raises:
        UsageError: the model has no prompt of that name.
    """
    name = facts.default_prompt if name is None else name
    if name is None:
        return ""
    if name in facts.prompts:
        return facts.prompts[name]
    if not facts.prompts:
        raise UsageError(f"the model has no prompt '{name}'", why="it has none", remedy="leave the prompt out")
    raise unknown_name("prompt", name, facts.prompts)


def ragged_batches(lengths: Sequence[int], budget: int, most: int = MOST_ROWS) -> Iterator[list[int]]:
    """Indices of rows in batches of like lengths, each of which has at most `budget` tokens with its padding, or one row."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batch[0]] if batch else lengths[index]
        if batch and (len(batch) == most or (len(batch) + 1) * longest > budget):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
