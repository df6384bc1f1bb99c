"""The stream from cut to cut gives what the whole program gives, and holds no more than crosses the cut."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from rewrites import stirred
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.linears import linear_sites
from optc.compiler.diagnostics import InputError
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.static import StaticKVCache
from optc.passes.quantization.arithmetic.differentiable import Differentiable
from optc.passes.quantization.arithmetic.groups import gram_matrix, input_groups, rows
from optc.passes.quantization.arithmetic.stream import Stream


def _tokens(count: int, length: int) -> Tensor:
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(0))


def _values(program: Program, tokens: Tensor, wanted: list[Node]) -> dict[Node, Tensor]:
    """Values of nodes by running the whole program at once."""

    class Recorder(torch.fx.Interpreter):
        found: ClassVar[dict[str, Tensor]] = {}

        def run_node(self, n: Node) -> object:
            self.found[n.name] = super().run_node(n)
            return self.found[n.name]

    recorder = Recorder(program.module())
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    ids = {"input_ids": tokens, "position_ids": positions, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        recorder.run(*(ids.get(spec.role, torch.zeros_like(tokens)) for spec in program.contract.inputs))
    return {node: recorder.found[node.name] for node in wanted}


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma2", "mixtral", "bert"])
def test_every_group_sees_its_inputs(name: str) -> None:
    program = stirred(name)
    groups = input_groups(list(linear_sites(program)))
    tokens = _tokens(5, 12)
    expected = _values(program, tokens, [group.root for group in groups])
    stream = Stream(program, tokens, batch_tokens=24)  # three batches, the last one shorter
    for group in groups:
        stream.advance(group.root)
        found = torch.cat(list(rows(stream, group.root)))
        whole = expected[group.root].reshape(found.shape)
        assert torch.allclose(found, whole, atol=1e-5, rtol=1e-5)
        gram, count = gram_matrix(stream, group)
        assert count == 60
        assert torch.allclose(gram, whole.t() @ whole / 60, atol=1e-5, rtol=1e-4)


def test_later_cuts_see_replaced_weights() -> None:
    program, tokens = stirred("llama"), _tokens(3, 10)
    groups = input_groups(list(linear_sites(program)))
    weights: dict[Node, Tensor] = {}
    stream = Stream(program, tokens, weights=weights, batch_tokens=10)
    edited = program.clone()
    for group in groups[:3]:
        stream.advance(group.root)
        for site in group.sites:
            name = program.weight_of(site.placeholder)
            assert name is not None
            assert site.placeholder is not None
            weights[site.placeholder] = program.weight(name) * 0.5
            edited.exported.state_dict[name] = torch.nn.Parameter(program.weight(name) * 0.5, requires_grad=False)
    stream.advance(groups[3].root)
    by_name = {node.name: node for node in edited.graph.nodes}
    root = by_name[groups[3].root.name]
    expected = _values(edited.changed(), tokens, [root])[root]
    assert torch.allclose(torch.cat(list(stream.values(groups[3].root))), expected, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_only_what_crosses_a_cut_is_held(fused: bool) -> None:
    """Unfused in bfloat16 there are cos and sin, too, and asserts on whatever is cast, which read nothing."""
    program = stirred("llama", torch.float32 if fused else torch.bfloat16)
    if fused:
        program = FuseRotary().run(program, PassContext()).program
    stream = Stream(program, _tokens(2, 8))
    groups = input_groups(list(linear_sites(program)))
    for group in groups[:8]:
        stream.advance(group.root)
        held = {node.name for node in program.graph.nodes if stream.holds(node)}
        tensors = [node for node in program.graph.nodes if node.name in held and node.op == "call_function"]
        wide = [node for node in tensors if isinstance(node.meta["val"], Tensor) and node.meta["val"].dim() == 3]
        # The residual stream and the input of the linears (the latter also before a cast that changes nothing).
        assert 1 <= len(wide) <= (3 if fused else 5), [node.name for node in wide]


def test_programs_with_a_cache_are_refused() -> None:
    program = StaticKVCache().run(stirred("llama"), PassContext()).program
    with pytest.raises(InputError, match="which this program does not take alone"):
        Stream(program, _tokens(1, 4))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral"])
def test_differentiable_equals_the_program_and_has_gradients(name: str) -> None:
    program, tokens = stirred(name), _tokens(2, 12)
    run = Differentiable(program)
    expected = program(tokens, torch.arange(12).expand(2, 12))
    expected = expected[0] if isinstance(expected, tuple | list) else expected
    with torch.no_grad():
        assert torch.allclose(run(tokens), expected, atol=2e-5)
    vector = next(name for name in program.exported.graph_signature.parameters if program.weight(name).dim() == 1)
    value = program.weight(vector).detach().clone().requires_grad_()
    run.weights = {vector: value}
    run(tokens).square().mean().backward()
    assert value.grad is not None
    with torch.no_grad():  # a difference quotient along one direction
        run.weights = {vector: value + 1e-3}
        above = run(tokens).double().square().mean()
        run.weights = {vector: value - 1e-3}
        slope = float((above - run(tokens).double().square().mean()) / 2e-3)
    assert float(value.grad.sum()) == pytest.approx(slope, rel=0.03, abs=1e-4)
