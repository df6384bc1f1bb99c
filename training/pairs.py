"""Batches of preferences: the chosen and the rejected answer of each pair, one below the other."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError
from optc.runtime.generation.chat_template import ChatTemplate
from optc.runtime.generation.tokenizer import Tokenizer
from optc.training.config import TrainConfig
from optc.training.corpus import document_of, text_files
from optc.training.data import Batch, Position
from optc.training.examples import IGNORED
from optc.training.preferences import read_pairs


class Answer(NamedTuple):
    """A prompt with an answer: token ids, int64 [T], and which of them are the answer's, bool [T]."""

    tokens: Tensor
    learned: Tensor


AnswerPair = tuple[Answer, Answer]
"""The chosen answer, and the rejected one."""


@dataclass(frozen=True)
class PairBatch(Batch):
    """A batch whose rows 2 i and 2 i + 1 are the chosen and the rejected answer of a pair."""

    @property
    def counted(self) -> Tensor:
        """bool [B / 2]: pairs with tokens to learn in both rows; fillers of ranks have none."""
        return (self.labels != IGNORED).any(1).view(-1, 2).all(1)

    @property
    def terms(self) -> int:
        return int(self.counted.sum())


def read_answers(
    paths: Sequence[str],
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    end_token: int | None,
    template: ChatTemplate | None = None,
    kind: str = "training",
) -> list[AnswerPair]:
    """The pairs of some files; answers that are text end with `end_token` where one is given.

    Raises:
        InputError, UsageError: see `read_pairs`; no file, or a token outside the vocabulary.
    """
    found: list[AnswerPair] = []
    for path in text_files(paths, kind):
        for number, pair in enumerate(read_pairs(path, tokenizer, template, kind), 1):
            where = f"{path}, pair {number}"
            rows = [document_of(example, where, vocab_size, end_token) for example in pair]
            one, two = (Answer(tokens, learned) for tokens, learned in rows if learned is not None)
            found.append((one, two))
    return found


class PairReader:
    """Batches of pairs for one rank, in an order that seed, epoch and position alone decide.

    An optimizer step takes `batch_size` pairs over all ranks. Answers that are longer than `seq_len` with their prompt
    are left out with their pair: cut, they would be other answers.

    Args:
        held_out: the pairs are a validation set, read in the files' order.

    Raises:
        InputError: no pair is short enough, or has tokens in both answers.
    """

    packs = False

    def __init__(
        self,
        pairs: Sequence[AnswerPair],
        config: TrainConfig,
        *,
        world_size: int = 1,
        rank: int = 0,
        held_out: bool = False,
    ) -> None:
        self.config, self.held_out = config, held_out
        self.world_size, self.rank = world_size, rank
        self.pairs = [pair for pair in pairs if all(_fits(answer, config.seq_len) for answer in pair)]
        self.left = len(pairs) - len(self.pairs)
        self.position = Position()
        self._epoch, self._order = -1, [0]
        if not self.pairs:
            files = (held_out and config.validation.text) or config.data.text
            raise InputError(
                f"none of the {len(pairs)} pairs has two answers of at most seq_len {config.seq_len} tokens with the prompt",
                where=", ".join(files) or None,
                remedy="give a larger seq_len, or shorter texts",
            )

    @property
    def first_tokens(self) -> Tensor:
        """int64 [T]: the prompt of the first pair."""
        answer = self.pairs[0][0]
        return answer.tokens[: max(1, int(answer.learned.int().argmax()))]

    @property
    def digest(self) -> str:
        """sha256 over the tokens of all pairs, and over which are learned."""
        found = hashlib.sha256()
        for pair in self.pairs:
            for tokens, learned in pair:
                found.update(len(tokens).to_bytes(8, "little") + tokens.numpy().tobytes() + learned.numpy().tobytes())
        return found.hexdigest()

    @property
    def note(self) -> str | None:
        """How many pairs are left out, if any."""
        if not self.left:
            return None
        return (
            f"{self.left} of {self.left + len(self.pairs)} pairs are left out: an answer is empty, or longer than seq_len "
            f"{self.config.seq_len} with its prompt"
        )

    def steps_of(self, epochs: float) -> int:
        """Optimizer steps from the position on until so many passes over the pairs are complete."""
        left = math.ceil(epochs * len(self.pairs)) - self.position.epoch * len(self.pairs) - self.position.unit
        return max(0, -(-left // self.config.batch_size))

    def next_step(self) -> list[PairBatch]:
        """This rank's micro-batches of the next optimizer step; moves the position."""
        size = self.config.batch_size // (self.world_size * self.config.gradient_accumulation)
        numbers = [self._next() for _ in range(self.config.batch_size)]
        micro = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        return [self._batch(part) for part in micro[self.rank :: self.world_size]]

    def whole_epoch(self) -> list[PairBatch]:
        """This rank's micro-batches of all pairs in order; each rank has as many, some of the last ones without a label."""
        size = max(1, self.config.batch_size // (self.world_size * self.config.gradient_accumulation))
        units = [range(at, min(at + size, len(self.pairs))) for at in range(0, len(self.pairs), size)]
        found = [self._batch(unit) for unit in units[self.rank :: self.world_size]]
        if len(found) * self.world_size < len(units):
            spare = self._batch(units[0])
            found.append(replace(spare, labels=torch.full_like(spare.labels, IGNORED), padded=True))
        return found

    def _next(self) -> int:
        epoch, unit = self.position.epoch, self.position.unit
        if unit >= len(self.pairs):
            epoch, unit = epoch + 1, 0
        if epoch != self._epoch:
            self._order, self._epoch = self._plan(epoch), epoch
        self.position = Position(epoch, unit + 1)
        return self._order[unit]

    def _plan(self, epoch: int) -> list[int]:
        if self.held_out or not self.config.data.shuffle:
            return list(range(len(self.pairs)))
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        found: list[int] = torch.randperm(len(self.pairs), generator=generator).tolist()
        return found

    def _batch(self, numbers: Sequence[int]) -> PairBatch:
        rows = [answer for number in numbers for answer in self.pairs[number]]
        shape = (len(rows), max(len(row.tokens) for row in rows) - 1)
        ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED, dtype=torch.int64)
        for number, (tokens, learned) in enumerate(rows):
            ids[number, : len(tokens) - 1] = tokens[:-1]
            labels[number, : len(tokens) - 1] = tokens[1:].masked_fill(~learned[1:], IGNORED)
        positions = torch.arange(shape[1]).expand(shape)
        return PairBatch(ids, positions, labels, packed=False, padded=bool((labels == IGNORED).any()))


def hold_out_pairs(
    pairs: Sequence[AnswerPair], share: float, *, seed: int
) -> tuple[list[AnswerPair], list[AnswerPair]]:
    """(what is trained on, what is held out), drawn with the seed; at least one pair each.

    Args:
        share: of all pairs, from 0 to 1.

    Raises:
        InputError: one pair cannot be shared.
    """
    if len(pairs) < 2:
        raise InputError(
            f"a share of {share:g} cannot be held out of {len(pairs)} pair(s)",
            remedy="give more pairs, or a validation set of its own by --validation",
        )
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[: max(1, round(share * len(pairs)))])
    return [pair for i, pair in enumerate(pairs) if i not in held], [pairs[i] for i in sorted(held)]


def _fits(answer: Answer, seq_len: int) -> bool:
    return len(answer.tokens) - 1 <= seq_len and bool(answer.learned[1:].any())
