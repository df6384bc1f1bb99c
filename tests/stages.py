"""Captured programs, shared between test files, and small decoders made by hand."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec
import torch
from families import make_model
from torch import Tensor

from optc.compiler.capture import capture_model, capture_module
from optc.compiler.ir.contract import ModelFacts
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult

VOCAB = 128


def captured(name: str, layers: int = 2) -> Program:
    """The stage-0 Program of a tiny family; treat it as read-only."""
    return _captured(name, layers)


@functools.cache
def _captured(name: str, layers: int) -> Program:
    return capture_model(make_model(name, layers=layers))


def apply(rewrite: Pass, program: Program) -> PassResult:
    return rewrite.run(program, PassContext())


@functools.cache
def rewritten(rewrite: Pass, name: str) -> PassResult:
    """The result of a pass on a captured family; treat it as read-only."""
    return apply(rewrite, captured(name))


def sequences(*lengths: int, seed: int = 3) -> list[list[int]]:
    """Random token sequences of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def full_logits(program: Program, tokens: Sequence[int]) -> Tensor:
    """Logits [len, V] of one sequence by one call of a stage-0 decoder, without any driver."""
    out = program(torch.tensor([list(tokens)]), torch.arange(len(tokens))[None])
    return (out[0] if isinstance(out, tuple | list) else out)[0]


def one_request(program: Program, tokens: int) -> list[Tensor]:
    """Inputs of a paged decoder: a prefill of one request into two blocks of 16, in falling order, and zeroed pools."""
    pools = [spec.dims for spec in program.contract.inputs if spec.role in ("key_cache", "value_cache")]
    ids = torch.randint(3, VOCAB, (tokens,), generator=torch.Generator().manual_seed(0))
    lengths, starts = torch.tensor([tokens], dtype=torch.int32), torch.tensor([0, tokens], dtype=torch.int32)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    place = torch.arange(tokens)
    zeros = [torch.zeros([2 if size == "num_blocks" else int(size) for size in dims]) for dims in pools]
    return [ids, place, (place + 16) % 32, table, lengths, starts, *zeros]


def largest(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Largest absolute difference between two lists of tensors of equal shapes."""
    assert [tuple(t.shape) for t in left] == [tuple(t.shape) for t in right]
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


class _TinyDecoder(torch.nn.Module):
    """Embedding, one attention of 2 heads of 8, head; `mix` says what else mixes tokens."""

    def __init__(self, mix: str, causal: bool, padding: bool, sinks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.causal, self.padding = mix, causal, padding
        self.embed = torch.nn.Embedding(VOCAB, 16)
        self.place = torch.nn.Embedding(64, 16)
        self.qkv = torch.nn.Linear(16, 48)
        self.conv = torch.nn.Conv1d(16, 16, 3)
        self.head = torch.nn.Linear(16, VOCAB)
        self.sinks = torch.nn.Parameter(torch.ones(2)) if sinks else None

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        own = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
        x = x + self.place(own if self.mix == "positions" else position_ids)
        if self.mix == "mean":
            x = x + x.mean(1, keepdim=True)
        if self.mix == "conv":  # causal, so that a full forward alone cannot tell
            x = x + self.conv(torch.nn.functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.mix == "values":
            v = v + torch.nn.functional.pad(v, (0, 0, 1, 0))[:, :, :-1]
        padding = (input_ids > 0).long() if self.padding else None
        out = torch.ops.optc.attention(
            q, k, v, padding, self.sinks, scale=8**-0.5, causal=self.causal, window=0, softcap=0.0
        )
        return self.head(x + out.transpose(1, 2).flatten(2))


def tiny_decoder(mix: str = "", *, causal: bool = True, padding: bool = False, sinks: bool = False) -> Program:
    """A decoder Program that claims to follow the position rule.

    Args:
        mix: "", "positions" (counts its own), "mean", "conv" or "values" (shifted before attention).
    """
    names = ("input_ids", "position_ids")
    ids = torch.zeros((2, 11), dtype=torch.long)
    program = capture_module(
        _TinyDecoder(mix, causal, padding, sinks),
        (ids, ids.clone()),  # one tensor twice would be one input twice
        input_names=names,
        dynamic={name: {0: "batch", 1: "seq"} for name in names},
    )
    inputs = [msgspec.structs.replace(spec, role=spec.name) for spec in program.contract.inputs]
    outputs = [msgspec.structs.replace(spec, name="logits", role="logits") for spec in program.contract.outputs]
    return program.with_contract(
        kind="decoder",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        position_rule=True,
        model=ModelFacts(vocab_size=VOCAB, context_length=64),
    )
