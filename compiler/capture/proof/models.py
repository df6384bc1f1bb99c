"""A captured transformers model is run and compared with the model's own forward."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optc.compiler.capture.embedding import EmbeddingHead
from optc.compiler.capture.proof.blame import first_difference, first_overflow
from optc.compiler.capture.proof.reference import (
    OWN_ERRORS,
    Batch,
    make_batches,
    own_implementations,
    own_outputs,
    short_batches,
)
from optc.compiler.capture.proof.widened import widened
from optc.compiler.diagnostics import GateError
from optc.compiler.execution.drift import Drift, measure
from optc.compiler.execution.stage_driver import StageRun
from optc.compiler.execution.widened import ROUNDINGS, WidenedReplay, is_narrow
from optc.compiler.ir.program import Program
from optc.compiler.ir.proof import CaptureFigures, CaptureProof
from optc.compiler.rewriting.eager import runner
from optc.compiler.rewriting.retrace import Replay

TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-9, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of outputs, as a share of their largest magnitude; in 16 bits the relative L2 difference."""

_APART = 10
"""Each of several answers is held to the tolerance times this, relative to its own size (L2)."""
_LONGEST = 48
SHORTEST = 8
"""Tokens of the longest sequence: of small models, and of the largest ones."""
_WORK = 1e9
"""Parameters times tokens of the longest sequence: the proof of a larger model reads shorter text."""


_LARGE = 1e9
"""Parameters beyond which weights are read as seldom as can be: they may lie in files."""


def prove_model(
    program: Program,
    model: Any,
    *,
    tokens: Sequence[int] = (),
    offset: int = 0,
    seed: int = 0,
    head: EmbeddingHead | None = None,
    lengths: Sequence[int] = (),
) -> CaptureProof:
    """Hold a captured decoder or encoder to its model's own attention, masks and positions.

    Both run on ragged sequences, padded on the right and on the left, on a batch of one and on one token; in the type
    of the weights, and in float32 where that is narrower. Padding is not compared.

    Args:
        tokens: encoded text; random tokens are taken where there is too little.
        offset: the position that the model gives a first token.
        head: what makes embeddings of hidden states; the reference gets each sequence's own, without padding.
        lengths: of up to `SHORTEST` tokens, at which both run too, alone and in a batch.

    Raises:
        GateError: the program computes something else (names the first module that differs), the model overflows in
            its type (names the first module), or its own forward fails.
    """
    begin = time.perf_counter()
    proof = Proof(program, model, tokens, offset, seed, head, lengths)
    with own_implementations(model) as attention:
        batches, figures = list(proof.batches), proof.figures()
    return CaptureProof(
        proved=True,
        reference=f"{type(model).__name__} ({attention})",
        inputs=tuple(batch.name for batch in batches),
        tokens=sum(int(batch.mask.sum()) for batch in batches),
        figures=figures,
        seconds=round(time.perf_counter() - begin, 3),
        notes=tuple(proof.notes),
    )


Rows = list[Tensor]
"""Real tokens [n, C] of each row of a batch, of each output."""


class Proof:
    """The inputs of one proof and what it noted."""

    def __init__(
        self,
        program: Program,
        model: Any,
        tokens: Sequence[int],
        offset: int,
        seed: int,
        head: EmbeddingHead | None,
        lengths: Sequence[int],
    ) -> None:
        self.program, self.model, self.offset, self.head = program, model, offset, head
        self.decoder = program.contract.kind == "decoder"
        weights = [weight for weight in model.parameters() if weight.is_floating_point()]
        self.dtype = weights[0].dtype if weights else torch.float32
        device = weights[0].device if weights else torch.device("cpu")
        self.notes: list[str] = []
        pad = program.contract.model.pad_token_id
        pad = pad if pad is not None and pad >= 0 else 0
        sequences, what = token_sequences(program, model, tokens, pad, seed)
        right, left, alone, one = make_batches(sequences, pad, what, device)
        self.is_large = sum(weight.numel() for weight in model.parameters()) > _LARGE
        self.batches = [right, left, one] if self.is_large else [right, left, alone, one]
        self.batches += [batch for length in lengths for batch in short_batches(sequences[0], length, pad, device)]
        widest, longest = (
            max((max(layer.window, layer.chunk) for layer in program.contract.layers), default=0),
            len(sequences[0]),
        )
        if widest >= longest:
            self.notes.append(f"windows or chunks of {widest} tokens are longer than the {longest} tokens compared")

    def figures(self) -> tuple[CaptureFigures, ...]:
        """Compare in each type, the widest first."""
        wide: list[Rows] | None = None
        found = []
        if is_narrow(self.dtype):
            with widened(self.model):
                wide = self._own_widened()
                if wide is not None:
                    found.append(self._compare(wide, WidenedReplay, torch.float32))
        if wide is not None and self.is_large:  # what is left to see is whether the type overflows
            self.batches = self.batches[:1]
        own = [self._own(batch, self.dtype) for batch in self.batches]
        return (*found, self._compare(own, Replay, self.dtype, wide))

    def _own_widened(self) -> list[Rows] | None:
        """The model's own rows in float32; None, with a note, where it mixes types in a way that cannot be widened."""
        try:
            return [self._own(batch, torch.float32) for batch in self.batches]
        except GateError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
            self.notes.append(f"not compared in float32: {error.why}")
            return None

    def _own(self, batch: Batch, dtype: torch.dtype) -> Rows:
        """The model's own rows of a batch.

        Raises:
            GateError: its forward fails, or gives NaN or infinity.
        """
        try:
            rows = [row for output in self._forward(batch) for row in batch.rows(output)]
            if self.head is not None:
                rows = [self.head.of_sequence(row)[None] for row in rows]
        except OWN_ERRORS as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise GateError(
                "the capture cannot be proved: the model's own forward fails",
                where=_name_of(self.model),
                why=f"on {batch.name} in {_name(dtype)}: {type(error).__name__}: {reason}",
                remedy="check that the model runs in transformers as it is; optc.capture(..., prove=False) takes it unproved",
            ) from error
        if not all(bool(torch.isfinite(row).all()) for row in rows):
            raise self._overflow(batch, dtype)
        return rows

    def _forward(self, batch: Batch) -> list[Tensor]:
        return own_outputs(self.model, batch, decoder=self.decoder, offset=self.offset)

    def _inputs(self, batch: Batch) -> list[Tensor]:
        made = {
            "input_ids": batch.ids,
            "position_ids": batch.positions,
            "attention_mask": batch.mask,
            "token_type_ids": torch.zeros_like(batch.ids),
        }
        return [made[spec.role] for spec in self.program.contract.inputs]

    def _ours(self, batch: Batch, replay: type[Replay], dtype: torch.dtype) -> Rows:
        try:
            with torch.no_grad():
                outputs: list[Tensor] = list(runner(self.program, {}, replay)(*self._inputs(batch)))
                if self.head is not None:
                    return list(outputs[0][:, None])
                answers = outputs[: self.program.contract.answers]
                return [row for output in answers for row in batch.rows(output)]
        except OWN_ERRORS as error:
            raise GateError(
                "the capture failed the numerics gate: the program does not run",
                where=_name_of(self.model),
                why=f"on {batch.name} in {_name(dtype)}: {str(error).strip().splitlines()[0]}",
                remedy=_REMEDY,
            ) from error

    def _compare(
        self, own: list[Rows], replay: type[Replay], dtype: torch.dtype, wide: list[Rows] | None = None
    ) -> CaptureFigures:
        """Hold the program to the model's own rows in one type.

        Args:
            wide: the model's own rows in float32, where `dtype` is narrower.
        """
        drifts, misses = [], []
        ours: Rows = []
        for number, (batch, rows) in enumerate(zip(self.batches, own, strict=True)):
            # A decoder's program takes no mask: of rows padded on the left it gets the tokens alone.
            if not (self.decoder and batch.is_left):
                ours = self._ours(batch, replay, dtype)
            elif not self._excess(self._drift(own[number - 1], rows), dtype) <= 0:
                self.notes.append(f"padding on the left changes what the model itself computes in {_name(dtype)}")
                continue
            drift = self._drift(rows, ours)
            spread = self._drift(wide[number], rows).relative if wide is not None else 0.0
            if not self._excess(drift, dtype, spread) <= 0:
                if batch.is_left and self._reads_padding(batch, rows, dtype):
                    self.notes.append("the model's answer is read at its first place, where padding on the left stands")
                    continue
                misses.append((batch, drift))
            drifts.append(drift)
        if misses:
            raise self._miss(misses, replay, dtype)
        return CaptureFigures(
            dtype=_name(dtype),
            max_abs_diff=max(drift.max_abs_diff for drift in drifts),
            scale=max(drift.scale for drift in drifts),
            relative=max(drift.relative for drift in drifts),
            kl=max((drift.kl for drift in drifts if drift.kl is not None), default=None),
            top1=min((drift.top1 for drift in drifts if drift.top1 is not None), default=None),
        )

    def _reads_padding(self, batch: Batch, rows: Rows, dtype: torch.dtype) -> bool:
        """Whether the model's answers to whole rows are made of padded places, whose states mean nothing: a place that sees no
        token in its window has the mean of all in one attention of transformers, and zeros in another. They are others with
        other ids there."""
        if any(len(row) != 1 for row in rows):
            return False
        filled = dataclasses.replace(batch, ids=torch.where(batch.mask.bool(), batch.ids, batch.ids[:, -1:]))
        return self._excess(self._drift(rows, self._own(filled, dtype)), dtype) > 0

    def _drift(self, own: Rows, ours: Rows) -> Drift:
        role = self.program.contract.compared_as
        return measure(StageRun(own, [], role=role), StageRun(ours, [], role=role))

    def _excess(self, drift: Drift, dtype: torch.dtype, spread: float = 0.0) -> float:
        """By how much a difference is beyond what the type explains; NaN counts as beyond.

        Args:
            spread: relative distance of the model itself from its float32.
        """
        if is_narrow(dtype):
            return drift.relative - max(TOLERANCE[dtype], ROUNDINGS * spread)
        tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
        excess = drift.max_abs_diff - tolerance * max(drift.scale, 1e-6)
        if self.program.contract.compared_as == "output":  # the scale is that of the largest answer
            excess = max(excess, drift.relative - _APART * tolerance)
        return excess

    def _miss(self, misses: Sequence[tuple[Batch, Drift]], replay: type[Replay], dtype: torch.dtype) -> GateError:
        aligned = [batch for batch, _ in misses if not (self.decoder and batch.is_left)]
        batch = min(aligned, key=lambda item: item.ids.numel())
        layer = self._blamed(batch, replay, dtype)
        drift = max((drift for _, drift in misses), key=lambda item: item.max_abs_diff)
        return GateError(
            f"the capture failed the numerics gate: the program is not what {_name_of(self.model)} computes",
            where=layer or _name_of(self.model),
            why=f"max abs difference {drift.max_abs_diff:.3g} on outputs of up to {drift.scale:.3g} ({_name(dtype)}), on "
            + "; ".join(batch.name for batch, _ in misses),
            remedy=_REMEDY,
        )

    def _blamed(self, batch: Batch, replay: type[Replay], dtype: torch.dtype) -> str | None:
        """Where the program begins to differ, in words; None where that is not known."""
        layer = first_difference(
            self.model,
            lambda: self._forward(batch),
            replay(self.program, {}),
            self._inputs(batch),
            batch.mask,
            10 * TOLERANCE.get(dtype, TOLERANCE[torch.float32]),
        )
        return f"the first module whose output differs: {layer}" if layer else None

    def _overflow(self, batch: Batch, dtype: torch.dtype) -> GateError:
        layer = first_overflow(self.model, lambda: self._forward(batch), batch.mask)
        return GateError(
            f"the capture failed the numerics gate: {_name_of(self.model)} is not finite in {_name(dtype)}",
            where=f"the first that is NaN or infinite: {layer}" if layer else _name_of(self.model),
            why=f"the model's own forward, on {batch.name}, gives NaN or infinity",
            remedy="choose --dtype bf16 or fp32" if dtype == torch.float16 else "check the weights of the model",
        )


_REMEDY = "the model computes something that optc does not capture; please report it with its config.json"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name_of(model: object) -> str:
    return type(model).__name__


def token_sequences(
    program: Program, model: Any, tokens: Sequence[int], pad: int, seed: int
) -> tuple[list[list[int]], str]:
    """Ragged sequences without the padding token, shorter for larger models, and what they are."""
    parameters = sum(weight.numel() for weight in model.parameters())
    longest = int(min(max(_WORK / max(parameters, 1), SHORTEST), _LONGEST))
    longest = max(1, min(longest, program.contract.model.context_length or longest))
    lengths = [longest, max(1, longest // 4), max(1, longest // 2), max(1, longest // 3)]
    text = [token for token in tokens if token != pad]
    what = "text"
    if len(text) < sum(lengths):
        generator = torch.Generator().manual_seed(seed)
        size = int(model.get_input_embeddings().weight.shape[0])
        drawn = torch.randint(0, max(size - 1, 1), (sum(lengths),), generator=generator)
        text, what = (
            [token + (token >= pad) if size > 1 else token for token in drawn.tolist()],
            "random tokens",
        )
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    return [text[start : start + length] for start, length in zip(starts, lengths, strict=True)], what
