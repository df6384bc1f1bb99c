"""Sessions over two programs: an encoder, run once per request, and a decoder that writes the answer.

A prompt is what the encoder reads: token ids, or features of a sound [mel bands, frames]. An answer begins with the
model's own start token. Rows hold as many tokens each; one that has ended is fed on with the others, and what it
computes then means nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import ArtifactError, InputError, TargetError, UsageError
from optc.compiler.ir.contract import CACHE_ROLES, CROSS_ROLES, Contract
from optc.runtime.sessions.session import Logits, Rows, Session
from optc.runtime.sessions.tensor_model import checked_inputs

Array = npt.NDArray[Any]


def _check_contracts(decoder: Contract, encoder: Contract) -> None:
    """Refuse contracts that are not those of a decoder and the encoder that it reads.

    Raises:
        ArtifactError: says what they lack.
    """
    taken, given = [spec.role for spec in decoder.inputs], [spec.role for spec in decoder.outputs]
    read = [spec.role for spec in encoder.inputs]
    own = sum(role in CACHE_ROLES for role in taken)
    names = [spec.name for spec in decoder.inputs]
    pairs = [taken.count(key) == taken.count(value) for key, value in (CACHE_ROLES, CROSS_ROLES)]
    facts, size = decoder.cross, decoder.model.vocab_size
    assert facts is not None
    first = (facts.start_token_id, *filter(None, [facts.forced_first_id]))
    fits = {
        "one input of token ids, one output of logits": taken.count("input_ids") == given.count("logits") == 1,
        "as many caches in as out": own == sum(role in CACHE_ROLES for role in given),
        "keys and values of cross-attention": any(role in CROSS_ROLES for role in taken),
        "as many keys as values": all(pairs),
        "one mask of the encoder's at most": taken.count("encoder_mask") <= 1,
        "a name of its own for every input": len(set(names)) == len(names),
        "inputs and outputs of no other kind": set(taken) <= {"input_ids", "encoder_mask", *CACHE_ROLES, *CROSS_ROLES},
        "an encoder of texts with their mask, or of features": (
            read == ["input_ids", "attention_mask"] if "encoder_mask" in taken else read == ["input"]
        ),
        "states of the encoder": bool(encoder.outputs),
        "a vocabulary": size > 0,
        "a first token of its vocabulary": all(token < size for token in first),
    }
    for what, holds in fits.items():
        if not holds:
            raise ArtifactError(
                "the manifest's contracts are not those of an encoder-decoder model",
                where="manifest.json",
                why=f"it lacks {what}",
                remedy="copy the artifact again from where it was made, or compile it again",
            )


class EncoderDecoderSession(Session):
    """The part that all engines share.

    Attributes:
        start_ids: what every answer begins with.
        encoder: the contract of the encoder.
    """

    def __init__(self, manifest: Manifest) -> None:
        contract = manifest.contract
        assert contract.cross is not None
        _check_contracts(contract, manifest.programs["encoder"].contract)
        super().__init__(vocab_size=contract.model.vocab_size, context_length=contract.model.context_length)
        self.encoder = manifest.programs["encoder"].contract
        self._cross = contract.cross
        self.start_ids: tuple[int, ...] = (self._cross.start_token_id,)
        self._held = 0
        """Tokens that the caches hold of every row."""
        self._prompts: list[int] = []
        """Which prompt each row answers."""

    @property
    def reads_text(self) -> bool:
        """Whether prompts are token ids; else they are features of sounds."""
        return self.encoder.input_index("input_ids") is not None

    def start_from(self, ids: Sequence[int]) -> None:
        """Let answers begin with these tokens.

        Raises:
            InputError: no token, or one outside the vocabulary.
        """
        self._check([ids], [0])
        self.start_ids = tuple(ids)

    def continued(self, prompts: Rows) -> Rows:
        """An answer continues its start, and not what the encoder reads."""
        return [self.start_ids] * len(prompts)

    def prefill(self, prompts: Rows) -> Logits:
        """Start over: encode these prompts; logits [B, V] of the first token of each answer.

        Raises:
            InputError: no prompt, an empty one, a token outside the vocabulary, one longer than the encoder's context,
                or features of other sizes.
        """
        self._open(prompts)
        return self._advance([self.start_ids] * len(prompts))

    def begin(self, prompts: Rows) -> Logits:
        """As `prefill`, and log probabilities [B, V] of the first token of each answer; see `branch`."""
        self._open(prompts)
        return self._log_probabilities(self._fed([self.start_ids] * len(prompts)))

    def branch(self, rows: Sequence[int], tokens: Sequence[int]) -> Logits:
        """Answers that go on with those that these rows hold, each by one token: a row may be named many times, or not at all.

        Returns:
            Log probabilities [len(rows), V]: of a softmax over all tokens, -inf for those that an answer never has, and 0 for
            one that the model does not choose itself.

        Raises:
            InputError: a token outside the vocabulary, or answers as long as the context.
        """
        self._check([[token] for token in tokens], [self._held] * len(tokens))
        prompts = [self._prompts[row] for row in rows]
        self._take(rows, read=prompts != self._prompts)
        self._prompts, self.lengths = prompts, [self.lengths[row] for row in rows]
        return self._log_probabilities(self._fed([[token] for token in tokens]))

    def score(self, tokens: Sequence[int]) -> Iterator[Logits]:
        """Raises TargetError: tokens are scored as an answer to something, which `score` is not told."""
        raise TargetError(
            "an encoder-decoder model does not score a text by itself",
            why="its decoder predicts an answer to what its encoder reads",
            remedy="compare answers: optc run ARTIFACT --prompt TEXT",
        )

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Append one token to every answer; logits [B, V].

        Raises:
            InputError: a token outside the vocabulary, or answers as long as the context.
        """
        self._check_batch(len(tokens))
        self._check([[token] for token in tokens], [self._held] * len(tokens))
        return self._advance([[token] for token in tokens])

    # -- for engines ------------------------------------------------------------------------

    @abstractmethod
    def _encode(self, inputs: Sequence[Array]) -> None:
        """Keep what the decoder reads of the encoder's inputs, in the order of its contract; empty its own caches."""

    @abstractmethod
    def _feed(self, ids: Array) -> Logits:
        """Run the decoder on ids [B, S]; logits [B, S, V] in float32."""

    @abstractmethod
    def _cut(self, length: int) -> None:
        """Keep the first tokens of every answer."""

    @abstractmethod
    def _take(self, rows: Sequence[int], *, read: bool) -> None:
        """Let the caches hold what these rows hold; with `read` what is read of the encoder too."""

    # -- Session ----------------------------------------------------------------------------

    def _start(self, batch: int) -> None:
        raise AssertionError("prefill encodes")

    def _score(self, tokens: Sequence[int]) -> Logits:
        raise AssertionError("score refuses")

    def _open(self, prompts: Rows) -> None:
        """Encode prompts, of which nothing is answered yet."""
        if not len(prompts):
            raise InputError("there is no prompt", remedy="give at least one prompt")
        self._check([self.start_ids], [0])
        self._encode(self._padded(prompts) if self.reads_text else self._stacked(prompts))
        self._held, self._prompts = 0, list(range(len(prompts)))

    def _advance(self, rows: Rows) -> Logits:
        logits = self._fed(rows)
        never, forced = self._ruled()
        logits[:, never if forced is None else [token for token in range(self.vocab_size) if token != forced]] = -np.inf
        return logits

    def _log_probabilities(self, logits: Logits) -> Logits:
        """In place."""
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        never, forced = self._ruled()
        logits[:, never if forced is None else slice(None)] = -np.inf
        if forced is not None:
            logits[:, forced] = 0
        return logits

    def _fed(self, rows: Rows) -> Logits:
        if len({len(row) for row in rows}) > 1:
            raise UsageError("answers are continued by as many tokens each", remedy="give rows of one length")
        before, count = self._held, len(rows[0])
        logits = self._feed(np.array([list(row) for row in rows], np.int64))[:, -1].copy()
        held = [before] * len(rows) if before == 0 else self.lengths
        self._held = before + count
        self.lengths = [length + count for length in held]
        return logits

    def _rewind(self, lengths: Sequence[int]) -> None:
        longest = max(lengths)  # a shorter row has ended
        if longest < self._held:
            self._cut(longest)
            self._held = longest

    def _ruled(self) -> tuple[list[int], int | None]:
        """Tokens that an answer does not have next, and the one that it has to have."""
        never, forced = list(self._cross.suppressed_ids), None
        if self._held == len(self.start_ids):
            never += self._cross.first_suppressed_ids
            forced = self._cross.forced_first_id if len(self.start_ids) == 1 else None
        return [token for token in never if token < self.vocab_size], forced

    def _padded(self, prompts: Rows) -> list[Array]:
        """ids and mask [B, longest], padded on the right."""
        limit = self.encoder.model.context_length
        for index, row in enumerate(prompts):
            self._check_tokens(index, row)
            if limit and len(row) > limit:
                raise InputError(
                    f"a prompt of {len(row)} tokens does not fit the encoder's context of {limit}",
                    where=f"prompt {index}",
                    remedy=f"shorten it by {len(row) - limit} token(s)",
                )
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(prompts):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        return [ids, mask]

    def _stacked(self, prompts: Any) -> list[Array]:
        (spec,) = self.encoder.inputs
        try:
            features = np.stack([np.asarray(item) for item in prompts])
        except ValueError as error:
            raise InputError(
                "the features of the prompts have different sizes",
                why=str(error),
                remedy=f"give {list(spec.dims[1:])} each",
            ) from error
        return checked_inputs(self.encoder, {spec.name: features})
