"""Documents to batches: rows packed with several documents, or batches of similar lengths; no token sees another document."""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import msgspec
import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError
from optc.training.config import TrainConfig
from optc.training.examples import IGNORED

_OPEN_ROWS = 64  # rows that packing may still fill
_SORTED_WINDOW = 64  # batches whose documents are sorted by length together


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        input_ids: int64 [B, S]; rows end in padding where documents are shorter.
        position_ids: int64 [B, S]; restarts at 0 with each document and goes on through the padding, which nothing
            before it sees. transformers masks attention between documents where positions restart.
        labels: int64 [B, S]; labels[b, i] is the token behind input_ids[b, i] (already shifted), -100 at padding and
            where it is not learned.
        packed: whether any row holds more than one document.
        padded: whether any label is -100.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    packed: bool
    padded: bool

    @property
    def label_tokens(self) -> int:
        """Labels that count in the loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def terms(self) -> int:
        """What the loss of a step is a mean over."""
        return self.label_tokens

    def to(self, device: torch.device) -> Self:
        """The batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            labels=self.labels.to(device),
        )


class Position(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the reading stands: the next unit (row, pair, or micro-batch of the token budget) of an epoch.

    Attributes:
        parts: micro-batches of a step, over all ranks, that micro-batches of the token budget were cut for; 0 where
            units are the same for any number of them.
        before: of this epoch, (parts, units) that were read in turn when a step had other parts. The units that are
            left are made of what these have not read.
    """

    epoch: int = 0
    unit: int = 0
    parts: int = 0
    before: tuple[tuple[int, int], ...] = ()


class Reader:
    """Batches of a corpus for one rank, in an order that seed, epoch and position alone decide.

    A document of n tokens gives n - 1 inputs; a longer one than seq_len is cut into pieces that do not overlap, each
    with positions of its own. An optimizer step takes `batch_size` rows over all ranks (pack), or as many micro-batches as ranks times
    accumulation, each of at most batch_size * seq_len / (ranks * accumulation) tokens with padding (tokens).

    Args:
        held_out: the documents are a validation set: read in the files' order, and of any length.
    """

    def __init__(
        self,
        documents: Sequence[Tensor],
        config: TrainConfig,
        *,
        learned: Sequence[Tensor | None] | None = None,
        world_size: int = 1,
        rank: int = 0,
        held_out: bool = False,
    ) -> None:
        if held_out:
            config = msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, shuffle=False))
        self.documents, self.config, self.held_out = documents, config, held_out
        self.learned = [None] * len(documents) if learned is None else learned
        self.world_size, self.rank = world_size, rank
        self.position = Position()
        length = config.seq_len
        self._pieces = [
            (number, start, min(length, len(tokens) - 1 - start))
            for number, tokens in enumerate(documents)
            for start in range(0, len(tokens) - 1, length)
            if self._labels_of(number, start, length)
        ]
        self._planned: tuple[int, tuple[tuple[int, int], ...]] | None = None
        self._units: list[list[list[int]]] = []
        total = sum(size for _, _, size in self._pieces)
        if total < (1 if held_out else length):
            files = (held_out and config.validation.text) or config.data.text
            raise InputError(
                f"the {'validation' if held_out else 'training'} text is too short: {total} tokens to learn"
                + ("" if held_out else f", and one row takes {length}"),
                where=", ".join(files) or None,
                remedy="give a longer text, or shorter rows with --set seq_len",
            )

    @property
    def first_tokens(self) -> Tensor:
        """int64 [T]: the first document."""
        return self.documents[0]

    @property
    def digest(self) -> str:
        """sha256 over the tokens of all documents, and over which are learned."""
        found = hashlib.sha256()
        for tokens, learned in zip(self.documents, self.learned, strict=True):
            found.update(len(tokens).to_bytes(8, "little") + tokens.numpy().tobytes())
            if learned is not None:
                found.update(learned.numpy().tobytes())
        return found.hexdigest()

    def _labels_of(self, document: int, start: int, length: int) -> bool:
        """Whether a piece has a token to learn: its first is never one."""
        learned = self.learned[document]
        return learned is None or bool(learned[start + 1 : start + 1 + length].any())

    @property
    def note(self) -> str | None:
        """How much is learned, where that is not all."""
        if all(item is None for item in self.learned):
            return None
        total = sum(map(len, self.documents))
        count = sum(
            len(tokens) if item is None else int(item.sum())
            for tokens, item in zip(self.documents, self.learned, strict=True)
        )
        return f"{count} of {total} tokens are learned, as the data's labels, completions and answers say"

    @property
    def packs(self) -> bool:
        """Whether a row may hold several pieces."""
        shortest = sorted(size for _, _, size in self._pieces)[:2]
        return self.config.data.batching == "pack" and len(shortest) == 2 and sum(shortest) <= self.config.seq_len

    def side_by_side(self) -> Reader:
        """The same documents at the beginning, one piece in each row."""
        data = msgspec.structs.replace(self.config.data, batching="tokens")
        config = msgspec.structs.replace(self.config, data=data)
        return Reader(
            self.documents,
            config,
            learned=self.learned,
            world_size=self.world_size,
            rank=self.rank,
            held_out=self.held_out,
        )

    @property
    def _parts(self) -> int:
        """Micro-batches of an optimizer step, over all ranks."""
        return self.world_size * self.config.gradient_accumulation

    def steps_of(self, epochs: float) -> int:
        """Optimizer steps from the position on until so many passes over the text are complete."""
        place, whole = self._place(), int(epochs)
        units = sum(len(self._plan(epoch)) for epoch in range(place.epoch, whole))
        units += math.ceil((epochs - whole) * len(self._plan(whole))) if epochs > whole >= place.epoch else 0
        spent = len(self._plan(place.epoch)) - len(self._plan(place.epoch, place.before)) + place.unit
        packs = self.config.data.batching == "pack"
        return max(0, -(-(units - spent) // (self.config.batch_size if packs else self._parts)))

    def whole_epoch(self) -> list[Batch]:
        """This rank's micro-batches of the first epoch; each rank has as many, some of the last ones without a label."""
        units = self._plan(0)
        if self.config.data.batching == "pack":
            size = max(1, self.config.batch_size // self._parts)
            units = [[row for unit in units[at : at + size] for row in unit] for at in range(0, len(units), size)]
        found = [self._batch(rows) for rows in units[self.rank :: self.world_size]]
        if len(found) * self.world_size < len(units):
            spare = self._batch(units[0])
            found.append(replace(spare, labels=torch.full_like(spare.labels, IGNORED), padded=True))
        return found

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step; moves the position."""
        config, parts = self.config, self._parts
        if config.data.batching == "pack":
            rows = [row for _ in range(config.batch_size) for row in self._next_unit()]
            size = config.batch_size // parts
            micro = [rows[start : start + size] for start in range(0, len(rows), size)]
        else:
            micro = [self._next_unit() for _ in range(parts)]
        return [self._batch(rows) for rows in micro[self.rank :: self.world_size]]

    def _next_unit(self) -> list[list[int]]:
        place = self._place()
        if (place.epoch, place.before) != self._planned:
            self._units, self._planned = self._plan(place.epoch, place.before), (place.epoch, place.before)
        if place.unit >= len(self._units):
            self.position = Position(place.epoch + 1, 0, place.parts)
            return self._next_unit()
        self.position = Position(place.epoch, place.unit + 1, place.parts, place.before)
        return self._units[place.unit]

    def _place(self) -> Position:
        """The position among units of this reader's parts."""
        place, parts = self.position, 0 if self.config.data.batching == "pack" else self._parts
        if place.parts in (0, parts):
            return Position(place.epoch, place.unit, parts, place.before)
        return Position(place.epoch, 0, parts, (*place.before, (place.parts, place.unit)))

    def _plan(self, epoch: int, before: tuple[tuple[int, int], ...] = ()) -> list[list[list[int]]]:
        """The units of an epoch that are left; a unit is a list of rows, a row a list of pieces."""
        order = list(range(len(self._pieces)))
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        if self.config.data.shuffle:
            order = torch.randperm(len(order), generator=generator).tolist()
        if self.config.data.batching == "pack":
            return [[row] for row in self._pack(order)]
        for parts, count in before:
            seen = {row[0] for unit in self._budget(order, generator, parts)[:count] for row in unit}
            order = [piece for piece in order if piece not in seen]
        return self._budget(order, generator, self._parts)

    def _pack(self, order: Sequence[int]) -> list[list[int]]:
        """First fit over the last rows that still have room."""
        rows: list[list[int]] = []
        room: list[int] = []
        first = 0
        for piece in order:
            size = self._pieces[piece][2]
            place = next((row for row in range(first, len(rows)) if room[row] >= size), None)
            if place is None:
                rows.append([])
                room.append(self.config.seq_len)
                place = len(rows) - 1
            rows[place].append(piece)
            room[place] -= size
            while first < len(rows) and (room[first] == 0 or len(rows) - first > _OPEN_ROWS):
                first += 1
        return rows

    def _budget(self, order: Sequence[int], generator: torch.Generator, parts: int) -> list[list[list[int]]]:
        config = self.config
        budget = config.batch_size // parts * config.seq_len
        units: list[list[list[int]]] = []
        window = _SORTED_WINDOW * max(1, budget // config.seq_len)
        for start in range(0, len(order), window):
            part = sorted(order[start : start + window], key=lambda piece: self._pieces[piece][2])
            while part:
                longest = [self._pieces[piece][2] for piece in part]
                count = _fitting(longest, budget)
                units.append([[piece] for piece in part[:count]])
                part = part[count:]
        if config.data.shuffle:
            units = [units[i] for i in torch.randperm(len(units), generator=generator).tolist()]
        return units

    def _batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        width = self.config.seq_len
        if self.config.data.batching == "tokens":
            width = max(self._pieces[piece][2] for row in rows for piece in row)
        shape = (len(rows), width)
        ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED, dtype=torch.int64)
        positions = torch.zeros(shape, dtype=torch.int64)
        for number, row in enumerate(rows):
            at = 0
            for piece in row:
                document, start, size = self._pieces[piece]
                tokens = self.documents[document][start : start + size + 1]
                place = slice(at, at + size)
                ids[number, place] = tokens[:-1]
                learned = self.learned[document]
                wanted = tokens[1:]
                if learned is not None:
                    wanted = wanted.masked_fill(~learned[start + 1 : start + size + 1], IGNORED)
                labels[number, place] = wanted
                positions[number, at:] = torch.arange(width - at)
                at += size
        packed, padded = any(len(row) > 1 for row in rows), bool((labels == IGNORED).any())
        return Batch(ids, positions, labels, packed=packed, padded=padded)


def _fitting(lengths: Sequence[int], budget: int) -> int:
    """How many of ascending lengths fit into a budget of tokens when all are padded to the longest taken; at least one."""
    return max(1, bisect.bisect_right(range(len(lengths)), budget, key=lambda i: (i + 1) * lengths[i]))
