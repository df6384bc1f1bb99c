"""A captured encoder-decoder model is run and compared with the model's own forward."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optc.compiler.capture.implementations import implementations
from optc.compiler.capture.proof.models import Proof, Rows, token_sequences
from optc.compiler.capture.proof.reference import OWN_ERRORS, Batch, make_batches, own_attention_of
from optc.compiler.diagnostics import GateError
from optc.compiler.execution.cross_rows import calls_of, empty_caches
from optc.compiler.ir.cross_inputs import decoder_inputs
from optc.compiler.ir.program import Program
from optc.compiler.ir.proof import CaptureProof
from optc.compiler.rewriting.retrace import Replay

ANSWER = 12
"""Tokens of each answer that are compared: a first call, a call of several tokens on a cache, single tokens."""


def prove_encoder_decoder(
    encoder: Program, decoder: Program, model: Any, *, tokens: Sequence[int] = (), seed: int = 0
) -> CaptureProof:
    """Hold two programs, one reading the other, to the forward of the model that both were captured from.

    The model is given whole answers; the programs are given each source once, and its answer call by call, over a cache
    that grows. Sources are those of `prove_model`: ragged, padded on both sides, one alone, one token; or features of
    sounds.

    Raises:
        GateError: the programs compute something else, the model overflows in its type, or its own forward fails.
    """
    begin = time.perf_counter()
    proof = _PairProof(encoder, decoder, model, tokens, seed)
    with _own_attention(model) as attention:
        figures = proof.figures()
    return CaptureProof(
        proved=True,
        reference=f"{type(model).__name__} ({attention})",
        inputs=tuple(batch.name for batch in proof.batches),
        tokens=sum(batch.answers.numel() for batch in proof.batches),
        figures=figures,
        seconds=round(time.perf_counter() - begin, 3),
        notes=tuple(proof.notes),
    )


@contextmanager
def _own_attention(model: Any) -> Iterator[str]:
    attention = own_attention_of(model)
    with implementations(model, attention, "eager"):
        yield attention


@dataclass(frozen=True)
class _Sources(Batch):
    """Token ids [B, T] with their mask, or features in `ids` and no mask that counts; and answers [B, S]."""

    answers: Tensor
    is_audio: bool = False

    @property
    def is_left(self) -> bool:
        """Both sides get the mask, and nothing is taken apart."""
        return False

    def rows(self, output: Tensor) -> list[Tensor]:
        """The logits of each answer, [S, V]."""
        return list(output)

    @property
    def inputs(self) -> list[Tensor]:
        """What the encoder's program takes."""
        return [self.ids] if self.is_audio else [self.ids, self.mask]


class _PairProof(Proof):
    """The comparison of `Proof`, of two programs. `program` is the decoder's."""

    batches: list[Any]

    def __init__(self, encoder: Program, decoder: Program, model: Any, tokens: Sequence[int], seed: int) -> None:
        self.encoder, self.program, self.model, self.offset, self.decoder = encoder, decoder, model, 0, False
        self.dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
        self.notes, self.is_large, self.head = [], False, None
        device = next(iter(model.parameters())).device
        generator = torch.Generator().manual_seed(seed)
        facts, cross = decoder.contract.model, decoder.contract.cross
        assert cross is not None

        def answers(count: int) -> Tensor:
            length = min(ANSWER, facts.context_length or ANSWER)
            made = torch.randint(0, facts.vocab_size, (count, length), generator=generator)
            made[:, 0] = cross.start_token_id
            return made.to(device)

        if encoder.contract.kind == "module":
            _, bands, frames = encoder.contract.inputs[0].dims
            features = torch.randn((2, int(bands), int(frames)), generator=generator).to(device, self.dtype)
            self.batches = [
                _Sources(name, part, torch.ones(len(part), 1), answers(len(part)), is_audio=True)
                for name, part in (("random features", features), ("features, batch 1", features[:1]))
            ]
        else:
            pad = facts.pad_token_id if facts.pad_token_id is not None and facts.pad_token_id >= 0 else 0
            sequences, what = token_sequences(encoder, model, tokens, pad, seed)
            made = make_batches(sequences, pad, what, device)
            self.batches = [_Sources(item.name, item.ids, item.mask, answers(len(item.ids))) for item in made]

    def _forward(self, batch: Any) -> list[Tensor]:
        name = self.model.get_encoder().main_input_name
        more = {} if batch.is_audio else {"attention_mask": batch.mask}
        source = batch.ids
        if source.is_floating_point():
            source = source.to(next(self.model.parameters()).dtype)
        with torch.no_grad():
            out = self.model(
                **{name: source}, **more, decoder_input_ids=batch.answers, use_cache=False, return_dict=True
            )
        return [out.logits]

    def _ours(self, batch: Any, replay: type[Replay], dtype: torch.dtype) -> Rows:
        try:
            with torch.no_grad():
                return batch.rows(self._answer(batch, replay, dtype))
        except OWN_ERRORS as error:
            raise GateError(
                "the capture failed the numerics gate: the programs do not run",
                where=type(self.model).__name__,
                why=f"on {batch.name}: {(str(error).strip().splitlines() or [''])[0]}",
                remedy="please report it with the model's config.json",
            ) from error

    def _answer(self, batch: Any, replay: type[Replay], dtype: torch.dtype) -> Tensor:
        """Logits [B, S, V]: the source is encoded once, the answer fed call by call."""
        inputs = [item.to(dtype) if item.is_floating_point() else item for item in batch.inputs]
        _, *cross = replay(self.encoder, {}).outputs(*inputs)
        caches = [item.to(dtype) for item in empty_caches(self.program, len(batch.ids), batch.ids.device)]
        masks = [] if batch.is_audio else [batch.mask]
        parts = []
        for start, end in calls_of(batch.answers.shape[1]):
            ids = batch.answers[:, start:end].contiguous()
            logits, *caches = replay(self.program, {}).outputs(
                *decoder_inputs(self.program.contract.inputs, ids, masks, caches, cross)
            )
            parts.append(logits)
        return torch.cat(parts, 1)

    def _blamed(self, batch: Any, replay: type[Replay], dtype: torch.dtype) -> str | None:
        """A program of two has no order of modules to compare in: the encoder's states tell which of the two differs."""
        inputs = [item.to(dtype) if item.is_floating_point() else item for item in batch.inputs]
        encoder = self.model.get_encoder()
        more = {} if batch.is_audio else {"attention_mask": batch.mask}
        with torch.no_grad():
            wanted = encoder(**{encoder.main_input_name: inputs[0]}, **more, return_dict=True)[0]
            states = replay(self.encoder, {}).outputs(*inputs)[0]
        mask = None if batch.is_audio else batch.mask.bool()
        wanted, states = (item if mask is None else item[mask] for item in (wanted, states))
        gap = float((states - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
        side = "the encoder's states are the model's" if gap <= 1e-3 else "the encoder's states differ"
        return f"{side}: relative difference {gap:.2e}"
