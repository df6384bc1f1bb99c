"""What compiling two programs, one reading the other, asks beside compiling one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import torch
from torch import Tensor

from optc.compiler.analysis.weight_parts import WeightParts
from optc.compiler.diagnostics import TargetError
from optc.compiler.execution.cross_rows import empty_caches, padded_cross
from optc.compiler.execution.probe import Probe
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.cross_inputs import decoder_inputs
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.compiler.target.target import Step
from optc.resolving import Resolved
from optc.targets.registry import all_targets

RECIPE = "encoder"
"""The kind of recipe that both programs get: what a KV cache needs of a pass is there already."""

_ANSWER = 16
"""Tokens of an answer that the gate feeds: a first call, one of several tokens, three of one."""


def check_encoder_decoder(resolved: Resolved, steps: Sequence[Step]) -> None:
    """Refuse what is not done with encoder-decoder models, before any pass runs.

    Raises:
        TargetError: names it.
    """
    target, asked = resolved.target, resolved.request
    if target.export_encoder_decoder is None:
        others = ", ".join(item.name for item in all_targets() if item.export_encoder_decoder is not None)
        raise TargetError(
            f"target '{target.name}' does not take encoder-decoder models", remedy=f"choose --target {others}"
        )
    if asked.cache.kv_cache is not None:
        raise TargetError(
            f"an encoder-decoder model has no {asked.cache.kv_cache} KV cache",
            where=target.name,
            why="its cache is captured with it: one that grows, and keys and values of the encoder's states",
            remedy="leave --kv-cache out",
        )
    calibrated = [step.rewrite.name for step in steps if step.rewrite.calibrated]
    if calibrated:
        raise TargetError(
            f"{calibrated[0]} is calibrated, which optc does not do with encoder-decoder models",
            where=target.name,
            why="its decoder would have to be fed pairs of texts",
            remedy="use --quant rtn, or int8",
        )


def answer_probe(encoder: Program, decoder: Program, given: Probe) -> Probe:
    """What the gate feeds the decoder: keys and values of the given sources, and the answers that it chooses itself.

    Args:
        encoder, decoder: as captured. given: the sources.
    """
    cross = _cross_rows(encoder, given)
    device = program_device(decoder)
    facts, context = decoder.contract.cross, decoder.contract.model.context_length or _ANSWER
    assert facts is not None
    masks, read = padded_cross(decoder, cross, device)
    caches = empty_caches(decoder, len(cross), device)
    tokens = torch.full((len(cross), 1), facts.start_token_id, device=device)
    answers = [tokens]
    while len(answers) < min(_ANSWER, context):
        logits, *caches = decoder(*decoder_inputs(decoder.contract.inputs, tokens, masks, caches, read))
        tokens = logits[:, -1:].argmax(-1)
        answers.append(tokens)
    rows = tuple(tuple(row) for row in torch.cat(answers, 1).tolist())
    return replace(given, sequences=rows, is_text=False, tensors=(), cross=cross)


def _cross_rows(encoder: Program, given: Probe) -> tuple[tuple[Tensor, ...], ...]:
    """Keys and values [H, T, D] of each source, without its padding."""
    device = program_device(encoder)
    if given.tensors:
        _, *found = encoder(*(item.to(device) for item in given.tensors))
        return tuple(tuple(item[row] for item in found) for row in range(len(found[0])))
    longest = max(map(len, given.sequences))
    ids = torch.zeros((len(given.sequences), longest), dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(given.sequences):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens, device=device), 1
    _, *found = encoder(ids, mask)
    return tuple(tuple(item[row, :, : len(tokens)] for item in found) for row, tokens in enumerate(given.sequences))


def both_contracts(encoder: Contract, decoder: Contract) -> Contract:
    """The decoder's contract with the weights of both: those of the same name are the same tensor of the source."""
    return msgspec.structs.replace(
        decoder,
        quantization={**encoder.quantization, **decoder.quantization},
        sources={**encoder.sources, **decoder.sources},
    )


def both_parts(encoder: WeightParts, decoder: WeightParts) -> WeightParts:
    """The parts of a model whose weights two programs read."""
    return WeightParts(
        embedding=encoder.embedding | decoder.embedding,
        head=encoder.head | decoder.head,
        linears=encoder.linears | decoder.linears,
    )
