"""Graphs run call by call give what a replay gives, and make each weight of codes once."""

from __future__ import annotations

import pytest
import torch
from stages import apply, captured, sequences

from optc.compiler.capture import capture_module
from optc.compiler.execution.stage_driver import _by_length, run_stage
from optc.compiler.ir.program import Program
from optc.compiler.ops.library import named
from optc.compiler.ops.packed.rounded_inputs import round_activations
from optc.compiler.rewriting.eager import runner, runs_eagerly
from optc.compiler.rewriting.made_weights import MadeWeights, made_by_rows
from optc.compiler.rewriting.retrace import Replay
from optc.passes.kv_cache.static import StaticKVCache
from optc.passes.legalization.ort import LegalizeOrt
from optc.passes.quantization.rtn import QuantizeRtn

DEQUANTIZE = torch.ops.optc.dequantize.default


class OwnReplay(Replay):
    """Another way of replaying is left as it is."""


@pytest.fixture(scope="module")
def stages() -> dict[str, Program]:
    """The stages of one model: as captured, with codes, with a cache, with packed products."""
    codes = apply(QuantizeRtn(group_size=32), captured("llama")).program
    cached = apply(StaticKVCache(), codes).program
    packed = apply(LegalizeOrt(), cached).program
    return {"plain": captured("llama"), "codes": codes, "cached": cached, "packed": packed}


@pytest.mark.parametrize("name", ["plain", "codes", "cached", "packed"])
def test_it_computes_what_a_replay_computes(stages: dict[str, Program], name: str) -> None:
    program, rows = stages[name], sequences(13, 5, 6)
    assert runs_eagerly(program)
    found, expected = (run_stage(program, rows, replay=kind) for kind in (Replay, OwnReplay))
    assert found.equals(expected)
    assert len(found.taps) == 2


def test_handlers_answer(stages: dict[str, Program]) -> None:
    """In place of the operator, and of what was made by it before."""
    program, inputs, made = stages["codes"], (torch.tensor([[5, 6, 7]]), torch.arange(3)[None]), MadeWeights()
    (plain,) = runner(program, {}, made=made)(*inputs)
    handlers = {DEQUANTIZE: lambda args, _: torch.zeros(args[0].shape)}
    (ours,), (theirs,) = (runner(program, handlers, kind, made)(*inputs) for kind in (Replay, OwnReplay))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, plain)


def test_a_program_that_writes_its_buffers_is_left_to_torch() -> None:
    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    assert runs_eagerly(capture_module(Counter(), (torch.ones(2),)))
    assert not runs_eagerly(_with_mutation(capture_module(Counter(), (torch.ones(2),))))


def _with_mutation(program: Program) -> Program:
    """As torch says that an output goes into an input."""
    from torch.export.graph_signature import OutputKind

    spec = program.exported.graph_signature.output_specs[0]
    spec.kind = OutputKind.USER_INPUT_MUTATION
    return program


def test_weights_are_made_once_for_all_calls_and_stages(
    stages: dict[str, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, count = MadeWeights(), [0]
    make = made_by_rows

    def counted(*args: object) -> torch.Tensor:
        count[0] += 1
        return make(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("optc.compiler.rewriting.eager.made_by_rows", counted)
    linears = 14  # 7 in each of two layers
    for name, expected in (("codes", linears), ("cached", linears), ("packed", 2 * linears), ("packed", 2 * linears)):
        run_stage(stages[name], sequences(13, 5, 6), made=made)
        made.forget_unused()
        assert count[0] == expected, name


def test_what_is_not_asked_for_is_forgotten_and_memory_has_an_end() -> None:
    codes, other = torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 8, dtype=torch.uint8)
    made, calls = MadeWeights(most=4 * 8 * 4), []

    def get(tensor: torch.Tensor) -> torch.Tensor:
        return made.get("op", (tensor, None), {"bits": 4}, lambda: calls.append(tensor) or tensor.float())  # type: ignore[func-returns-value]

    assert get(codes) is get(codes)
    get(other)
    get(other)  # there is room for one
    assert [item is other for item in calls] == [False, True, True]
    made.forget_unused()
    assert get(other) is get(other)  # in place of what the next stage has not asked for
    get(codes)
    get(codes)
    assert [item is other for item in calls[3:]] == [True, False, False]
    made.forget_unused()
    made.forget_unused()
    assert get(codes) is get(codes)
    assert len(calls) == 7


def test_equal_memory_is_what_counts() -> None:
    """Views of one tensor are the same codes, rows of it are others; so are other keyword arguments."""
    codes, made, calls = torch.zeros(4, 8, dtype=torch.uint8), MadeWeights(), []
    cases = ((codes, 4), (codes.view(4, 8), 4), (codes[:2], 4), (codes.view(8, 4), 4), (codes, 2))
    for part, bits in cases:
        made.get("op", (part,), {"bits": bits}, lambda part=part: calls.append(part) or part.float())  # type: ignore[misc]
    assert [tuple(item.shape) for item in calls] == [(4, 8), (2, 8), (8, 4), (4, 8)]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_are_made_in_blocks(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optc.compiler.ir.row_blocks.BLOCK", 64)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (7, 32), generator=generator, dtype=torch.uint8)
    scale, zero = torch.rand((7, 2), generator=generator), torch.full((7, 2), 1, dtype=torch.uint8)
    for parts in ((codes, scale, None), (codes, scale, zero)):
        knobs = {"bits": bits, "group_size": 16}
        assert torch.equal(made_by_rows(DEQUANTIZE, parts, knobs), DEQUANTIZE(*parts, **knobs))


def test_a_product_comes_apart_as_its_reference_has_it() -> None:
    spec = named("matmul_nbits")
    assert spec is not None
    assert spec.product is not None
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (6, 2, 8), generator=generator, dtype=torch.uint8)
    parts = (packed, torch.rand((6, 2), generator=generator), None)
    x, bias = torch.randn((3, 32), generator=generator), torch.randn(6, generator=generator)
    for level in (0, 4):
        knobs = {"K": 32, "N": 6, "bits": 4, "block_size": 16, "accuracy_level": level}
        weight = spec.product.weight(*parts, **knobs)
        assert weight.shape == (6, 32)
        found = torch.nn.functional.linear(spec.product.multiplied(x, **knobs), weight, bias)
        assert torch.equal(found, spec.op(x, *parts, bias, **knobs))
        rounded = x if level == 0 else round_activations(x, 16)
        assert float((found - (rounded @ weight.T + bias)).abs().max()) < 1e-4


def test_the_longest_row_is_run_apart_where_the_others_would_be_padding() -> None:
    ragged = [(0, 0, 96), (1, 0, 24), (2, 0, 48), (3, 0, 32)]
    assert _by_length(ragged) == [[(0, 0, 96)], [(1, 0, 24), (2, 0, 48), (3, 0, 32)]]
    for call in ([(0, 4, 8), (1, 0, 4), (2, 1, 5)], [(0, 0, 90), (1, 0, 46), (2, 0, 2)], [(0, 0, 9), (1, 0, 1)]):
        assert _by_length(call) == [call]
