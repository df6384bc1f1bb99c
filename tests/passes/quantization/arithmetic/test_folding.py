"""Scales fold into whatever makes the input of linears, on every family, and say why where they cannot."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from rewrites import difference, stirred
from torch import Tensor, nn

from optc.compiler.analysis.linears import linear_sites
from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.capture import capture_module
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.passes.fusion.norm import FuseNorm
from optc.passes.quantization.arithmetic.folding import Fold
from optc.passes.quantization.arithmetic.groups import input_groups
from optc.passes.quantization.arithmetic.scale_pass import foldable
from optc.passes.quantization.arithmetic.scaling import apply_scales, smooth_scales
from optc.passes.quantization.arithmetic.selection import select_linears
from optc.passes.quantization.scale_awq import ScaleAwq
from optc.passes.quantization.scale_smoothquant import ScaleSmoothQuant

# Inputs that a scale can be folded into, of all inputs of chosen linears (two layers).
FOLDED = {
    "phi": (4, 6),  # one norm feeds attention and MLP; GELU stands before fc2
    "gpt2": (6, 8),
    "gpt-neox": (6, 8),
    "olmo2": (4, 8),  # norms stand behind the layers: q/k/v and gate/up read the residual stream
    "mixtral": (14, 14),
    "bert": (3, 9),  # norms stand on the residual stream itself; o_proj can be scaled
}


def _program(name: str) -> Program:
    return FuseNorm().run(stirred(name), PassContext()).program


@pytest.mark.parametrize("name", FAMILIES)
def test_random_scales_change_nothing(name: str) -> None:
    program = _program(name)
    groups = input_groups(select_linears(program, (), False).chosen)
    edited, folded = program.clone(), 0
    generator = torch.Generator().manual_seed(2)
    for group in groups:
        linears, fold = foldable(program, group)
        if fold.reason:
            continue
        folded += 1
        apply_scales(edited, linears, fold, torch.rand(fold.free, generator=generator) * 3 + 0.25)
    expected = FOLDED.get(name, (8, 8))
    assert (folded, len(groups)) == expected
    assert difference(program, edited.changed()) < 1e-5
    changed = [key for key, value in edited.weights() if not torch.equal(value, program.weight(key))]
    assert len(changed) > folded


@pytest.mark.parametrize("name", ["phi", "gpt2", "gpt-neox", "olmo2", "bert"])
def test_each_linear_that_cannot_be_scaled_says_why(name: str) -> None:
    program = _program(name)
    context = PassContext(calibration=random_calibration(128, samples=2, length=16, seed=0))
    result = ScaleSmoothQuant().run(program, context)
    matched, groups = FOLDED[name]
    assert (result.matched, result.candidates) == (matched, groups)
    sites = {site.node.name: site for site in linear_sites(program)}
    assert {miss.node for miss in result.misses} <= set(sites)
    assert len(result.misses) >= groups - matched
    words = {
        "phi": "add",
        "gpt2": "add",
        "gpt-neox": "gelu",
        "olmo2": "embedding",
        "bert": "reads the input too",
    }
    assert any(words[name] in miss.reason for miss in result.misses)
    assert difference(program, result.program) < 1e-5


def test_query_heads_of_one_value_head_share_scales() -> None:
    program = stirred("llama")  # 4 query heads of 16 over 2 value heads
    groups = input_groups(select_linears(program, (), False).chosen)
    _, fold = foldable(program, groups[1])
    assert fold.free == 32
    labels = fold.labels.reshape(2, 2, 16)
    assert torch.equal(labels[:, 0], labels[:, 1])
    assert len(set(fold.labels.tolist())) == 32
    (division,) = fold.divisions
    assert division.axis == 0
    assert sorted(division.labels.tolist()) == list(range(32))


class _Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.gain, self.shift = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        table = {
            "relu": lambda: torch.relu(y),
            "affine": lambda: torch.tanh(y) * self.gain + self.shift,
            "tanh": lambda: torch.tanh(y),
            "halves": lambda: torch.cat([y[..., 4:], y[..., :4]], -1),
            "gated": lambda: torch.tanh(y) * self.first(x * 2),
            "residual": lambda: y + x,
            "read twice": lambda: y,
        }
        h = table[self.kind]()
        out = self.second(h)
        return out + y if self.kind == "read twice" else out


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("relu", ""),
        ("affine", ""),
        ("tanh", "tanh"),
        ("halves", "aten.cat"),
        ("gated", "is read elsewhere too"),
        ("residual", "adds activations"),
        ("read twice", "reads the input too"),
    ],
)
def test_small_graphs(kind: str, reason: str) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    program = capture_module(_Net(kind).eval(), (x,))
    groups = input_groups(list(linear_sites(program)))
    group = next(group for group in groups if group.sites[-1].node is list(linear_sites(program))[-1].node)
    linears, fold = foldable(program, group)
    if reason:
        assert reason in fold.reason
        return
    assert fold.reason == ""
    edited = program.clone()
    apply_scales(edited, linears, fold, torch.linspace(0.2, 3, fold.free))
    before, after = program(x), edited.changed()(x)
    assert torch.allclose(torch.as_tensor(before), torch.as_tensor(after), atol=1e-5)


def test_smoothquant_scales_are_the_papers() -> None:
    weights = [torch.tensor([[1.0, -4.0], [2.0, 1.0]]), torch.tensor([[-8.0, 0.5]])]
    largest = torch.tensor([2.0, 32.0])
    scales = smooth_scales(weights, largest, Fold(torch.arange(2)), 0.5)
    plain = torch.tensor([(2 / 8) ** 0.5, (32 / 4) ** 0.5])
    assert torch.allclose(scales, plain / plain.log().mean().exp())


def test_awq_scales_lower_the_rounding_error() -> None:
    program = _program("llama")
    context = PassContext(calibration=random_calibration(128, samples=4, length=32, seed=0))
    edited = program.clone()
    for name, weight in program.weights():  # a loud channel in every norm
        if weight.dim() == 1 and "norm" in name and "layers" in name:
            loud = weight.detach().clone()
            loud[5] *= 30
            edited.exported.state_dict[name] = nn.Parameter(loud, requires_grad=False)
    loud_program = edited.changed()
    result = ScaleAwq(group_size=32, bits=3).run(loud_program, context)
    assert result.matched == 8
    assert difference(loud_program, result.program) < 1e-5
    norm = next(name for name, _ in loud_program.weights() if "input_layernorm" in name)
    ratio = result.program.weight(norm) / loud_program.weight(norm)
    assert float(ratio[5] / ratio.median()) < 0.7  # the loud channel is divided the most
