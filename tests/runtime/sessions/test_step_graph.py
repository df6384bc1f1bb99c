"""Steps without the selection of rows: fewer calls, the same logits."""

from __future__ import annotations

import pytest
import torch
from cuda_sessions import compiled
from rewrites import stirred
from stages import apply

from optc.compiler.execution.block_manager import BlockManager
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.sessions.step_graph import without_selection
from optc.runtime.sessions.torch_linear import cache_inputs


@pytest.mark.parametrize("legalized", [True, False])
def test_the_same_logits_by_one_call_less(legalized: bool) -> None:
    program = compiled() if legalized else apply(PageKVCache(select_logits=True), stirred("llama")).program
    graph = without_selection(program)
    size = program.contract.kv_cache.block_size
    pools = [torch.zeros(4, size, 2, 16) for _ in cache_inputs(program.contract)]
    manager = BlockManager(4, size)
    for row in range(3):
        manager.start(row)
    inputs = (*manager.step([(row, [5 + row]) for row in range(3)]), torch.arange(3))
    with torch.inference_mode():
        (found,) = graph.forward(*inputs, *pools)
        expected = program.module().forward(*inputs, *pools)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    called, before = ([node.target for node in one.graph.nodes] for one in (graph, program.module()))
    select = torch.ops.optc.select_rows.default if legalized else torch.ops.aten.index_select.default
    assert called.count(select) == before.count(select) - 1


def test_a_program_that_selects_nothing_keeps_its_module() -> None:
    program = apply(PageKVCache(), stirred("llama")).program
    assert without_selection(program) is program.module()
