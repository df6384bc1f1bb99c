"""The driver that runs any stage: same tokens in, same logits and attention outputs out."""

from __future__ import annotations

import pytest
import torch
from stages import captured, full_logits, largest, rewritten, sequences

from optc.compiler.capture import capture_module
from optc.compiler.execution.stage_driver import StageRun, _plan, run_module, run_stage
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import replace_call
from optc.compiler.rewriting.passes import Pass
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.kv_cache.static import StaticKVCache

PASSES = [StaticKVCache(), StaticKVCache(in_place=True), PageKVCache(block_size=4)]


def test_plan_ends_every_sequence_together() -> None:
    assert _plan([9, 1, 3, 8], chunk=4, steps=3) == [
        [(0, 0, 2), (1, 0, 1), (2, 0, 1), (3, 0, 1)],
        [(0, 2, 6), (3, 1, 5)],
        [(0, 6, 7), (3, 5, 6)],
        [(0, 7, 8), (2, 1, 2), (3, 6, 7)],
        [(0, 8, 9), (2, 2, 3), (3, 7, 8)],
    ]


def test_plan_of_single_tokens_is_one_call() -> None:
    assert _plan([1, 1], chunk=4, steps=3) == [[(0, 0, 1), (1, 0, 1)]]
    assert _plan([5], chunk=0, steps=1) == [[(0, 0, 4)], [(0, 4, 5)]]


def test_whole_sequences_run_as_one_padded_batch() -> None:
    program, rows = captured("llama"), sequences(11, 1, 5)
    run = run_stage(program, rows)
    assert [tuple(logits.shape) for logits in run.logits] == [(11, 128), (1, 128), (5, 128)]
    assert largest(run.logits, [full_logits(program, row) for row in rows]) < 1e-5


def test_encoders_run_with_their_padding_masked() -> None:
    program, rows = captured("bert"), sequences(11, 1, 5)
    run = run_stage(program, rows)
    expected = []
    for row in rows:
        ids = torch.tensor([row])
        out = program(ids, torch.ones_like(ids), torch.zeros_like(ids))
        expected.append((out[0] if isinstance(out, tuple) else out)[0])
    assert largest(run.logits, expected) < 1e-5
    assert [[tuple(tap.shape) for tap in layer] for layer in run.taps] == [[(11, 64), (1, 64), (5, 64)]] * 2


@pytest.mark.parametrize("rewrite", PASSES, ids=str)
def test_taps_of_a_cached_stage_are_those_of_the_whole(rewrite: Pass) -> None:
    program, rows = captured("llama"), sequences(19, 1, 8, 2)
    whole, stage = run_stage(program, rows), run_stage(rewritten(rewrite, "llama").program, rows)
    assert largest(stage.logits, whole.logits) < 1e-5
    assert len(whole.taps) == len(stage.taps) == 2
    for layer, expected in zip(stage.taps, whole.taps, strict=True):
        assert [tuple(tap.shape) for tap in layer] == [(19, 64), (1, 64), (8, 64), (2, 64)]
        assert largest(layer, expected) < 1e-5


def _with_window(program: Program, layer: int) -> Program:
    """A wrong stage: one layer's attention sees only the last 3 tokens."""
    wrong = program.clone()
    nodes = [node for node in wrong.graph.nodes if "window" in node.kwargs]
    replace_call(wrong, nodes[layer], nodes[layer].target, nodes[layer].args, {**nodes[layer].kwargs, "window": 3})
    return wrong.changed()


@pytest.mark.parametrize("rewrite", PASSES, ids=str)
def test_a_wrong_layer_shows_in_its_tap_and_not_before(rewrite: Pass) -> None:
    rows = sequences(19, 8)
    right = rewritten(rewrite, "llama").program
    good, bad = run_stage(right, rows), run_stage(_with_window(right, 1), rows)
    assert largest(bad.logits, good.logits) > 1e-2
    assert largest(bad.taps[0], good.taps[0]) == 0
    assert largest(bad.taps[1], good.taps[1]) > 1e-2
    assert largest([tap[:3] for tap in bad.taps[1]], [tap[:3] for tap in good.taps[1]]) < 1e-5


@pytest.mark.parametrize("rewrite", PASSES, ids=str)
def test_garbage_in_caches_does_not_show(rewrite: Pass) -> None:
    rows = sequences(12, 5)
    stage = rewritten(rewrite, "gpt2").program
    assert largest(run_stage(stage, rows, seed=0).logits, run_stage(stage, rows, seed=1).logits) < 1e-5


def test_chunk_and_steps_do_not_matter() -> None:
    rows = sequences(17, 6)
    stage = rewritten(StaticKVCache(), "gpt2").program
    runs = [run_stage(stage, rows, chunk=chunk, steps=steps).logits for chunk, steps in ((0, 0), (9, 1), (1, 16))]
    assert largest(runs[0], runs[1]) < 1e-5
    assert largest(runs[0], runs[2]) < 1e-5


def test_plain_modules_run_on_tensors() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    program = capture_module(module, [torch.ones(2, 3)])
    x = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])
    (out,) = run_module(program, [x])
    assert torch.allclose(out, module(x), atol=1e-6)


def test_empty_sequences_are_refused() -> None:
    with pytest.raises(AssertionError, match="no empty sequences"):
        run_stage(captured("llama"), [[1], []])


def test_equal_runs_have_the_same_numbers() -> None:
    def run(logit: float = 1.0, tap: float = 2.0, taps: int = 1) -> StageRun:
        return StageRun([torch.tensor([[0.0, logit]])], [[torch.tensor([[tap]])]] * taps)

    assert run().equals(run())
    assert not run().equals(run(logit=1.5))
    assert not run().equals(run(tap=2.5))
    assert not run().equals(run(taps=2))
    assert not run(logit=float("nan")).equals(run(logit=float("nan")))
