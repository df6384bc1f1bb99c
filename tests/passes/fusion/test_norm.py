"""fuse-norm: decomposed RMSNorm becomes aten.rms_norm with the same numbers."""

from __future__ import annotations

import bounds
import pytest
import torch
from families import FAMILIES
from rewrites import count, difference, rewritten, stirred
from stages import sequences
from torch import Tensor

from optc.compiler.capture import capture_module
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.passes.fusion.norm import FuseNorm

RMS_NORM = torch.ops.aten.rms_norm.default
RSQRT = torch.ops.aten.rsqrt.default
PER_LAYER = {"qwen3": 4, "gemma2": 4, "gemma3": 6, "olmo2": 4}
WITHOUT = {"gpt2", "opt", "bert", "phi", "gpt-neox"}


def _expected(name: str) -> int:
    """Norms of a family of two layers: before attention and MLP, and one at the end."""
    return 0 if name in WITHOUT else 2 * PER_LAYER.get(name, 2) + 1


@pytest.mark.parametrize("name", FAMILIES)
def test_every_norm_of_every_family(name: str) -> None:
    program = stirred(name)
    result = rewritten(FuseNorm(), program)
    expected = _expected(name)
    assert (result.matched, result.candidates, result.misses) == (expected, expected, ())
    assert (count(result.program, RMS_NORM), count(result.program, RSQRT)) == (expected, 0)
    assert all(node.args[2] is not None for node in result.program.calls(RMS_NORM))
    assert difference(program, result.program) <= 1e-5


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.bfloat16), ("llama", torch.float16), ("gemma3", torch.bfloat16), ("olmo2", torch.bfloat16)],
)
def test_16_bit_types(name: str, dtype: torch.dtype) -> None:
    program = stirred(name, dtype)
    result = rewritten(FuseNorm(), program)
    assert result.matched == _expected(name)
    # Llama rounds before the weight too, aten.rms_norm only after; Gemma and OLMo2 round once as well.
    rows = sequences(19, 7)
    expected, rounding = bounds.of_half(program, rows)
    bounds.check(run_stage(result.program, rows).logits, expected, rounding)
    types = {node.args[0].meta["val"].dtype for node in result.program.calls(RMS_NORM)}
    assert types == {torch.float32 if name == "gemma3" else dtype}


def test_offset_weights_are_folded_and_traced_back() -> None:
    program = stirred("gemma")
    result = rewritten(FuseNorm(), program)
    name, source = "model.norm.weight_folded", "model.norm.weight"
    assert torch.equal(result.program.weight(name), 1.0 + program.weight(source))
    assert result.program.contract.sources[name] == (source,)
    assert source not in result.program.contract.sources
    assert source not in result.program.exported.state_dict


def test_plain_weights_are_not_copied() -> None:
    program = stirred("llama")
    result = rewritten(FuseNorm(), program)
    assert result.program.weight("model.norm.weight") is program.weight("model.norm.weight")


class _Norm(torch.nn.Module):
    """A norm by hand, of x [B, S, 8]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 2.0, 8))
        self.eps = torch.nn.Buffer(torch.tensor(1e-5))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        wide = x.float()
        eps = self.eps if self.kind == "eps" else 1e-5
        base = gate.float() if self.kind == "other" else wide
        squares = wide.abs() if self.kind == "absolute" else base * base
        mean = squares.mean(1 if self.kind == "axis" else -1, keepdim=True)
        if self.kind == "low":  # the root is rounded before it scales
            return x * torch.rsqrt(mean + eps).to(x.dtype) * self.weight.to(x.dtype)
        root = torch.pow(mean + eps, -0.5) if self.kind == "power" else torch.rsqrt(mean + eps)
        normed = (wide * root).to(x.dtype)
        if self.kind == "bare":
            return normed
        return normed * (gate if self.kind == "gated" else self.weight.to(x.dtype))


def _by_hand(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Program, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(2, 5, 8, generator=generator).to(dtype) for _ in range(2))
    return capture_module(_Norm(kind), (x, gate)), x, gate


@pytest.mark.parametrize("kind", ["plain", "power", "low", "bare", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spellings(kind: str, dtype: torch.dtype) -> None:
    program, x, gate = _by_hand(kind, dtype)
    result = rewritten(FuseNorm(), program)
    node = result.program.calls(RMS_NORM)[0]
    assert (result.matched, node.args[1], node.args[3]) == (1, [8], 1e-5)
    assert (node.args[2] is None) == (kind in ("bare", "gated"))
    assert result.program(x, gate).dtype is dtype
    units = 0.0 if kind == "bare" else 2.0
    tolerance = max(1e-6, units * torch.finfo(dtype).eps * float(program(x, gate).abs().max()))
    torch.testing.assert_close(result.program(x, gate), program(x, gate), rtol=0.0, atol=tolerance)


def test_large_values_do_not_overflow_in_fp16() -> None:
    program, _, gate = _by_hand("plain", torch.float16)
    result = rewritten(FuseNorm(), program)
    x = torch.full((2, 5, 8), 6e4, dtype=torch.float16)
    torch.testing.assert_close(result.program(x, gate)[0, 0], torch.linspace(0.5, 2.0, 8).half())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("axis", "the mean runs over axes [1], not over the last one, kept"),
        ("eps", "eps is not a number"),
        ("absolute", "the mean is not a mean of squares"),
        ("other", "to is scaled by the mean square of to_1"),
    ],
)
def test_near_misses_say_why(kind: str, reason: str) -> None:
    program, _, _ = _by_hand(kind)
    result = rewritten(FuseNorm(), program)
    assert result.program is program
    assert [miss.reason for miss in result.misses] == [reason]
    assert (result.matched, result.candidates) == (0, 1)
