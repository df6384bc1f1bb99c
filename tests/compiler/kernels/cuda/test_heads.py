"""cos and sin of the rotary kernels against float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from interpreted import DEVICE

from optc.compiler.kernels.cuda.attention.heads import cos_sin


@triton.jit
def _evaluate(angles, cosines, sines, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    cos, sin = cos_sin(tl.load(angles + lane))
    tl.store(cosines + lane, cos)
    tl.store(sines + lane, sin)


@pytest.mark.parametrize(("largest", "allowed"), [(3.0, 1.2e-7), (1e4, 1.2e-7), (1.3e5, 2e-6)])
def test_cos_and_sin(largest: float, allowed: float) -> None:
    """Two ulps as far as contexts go today; the interpreter has no fused products, which the last bound allows for."""
    angles = (torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 2 - 1) * largest
    angles[:4] = torch.tensor([0.0, torch.pi / 4, -torch.pi / 2, largest])
    cosines, sines = torch.empty(4096, device=DEVICE), torch.empty(4096, device=DEVICE)
    _evaluate[(1,)](angles.to(DEVICE), cosines, sines, SIZE=4096)
    assert float((cosines.cpu().double() - angles.double().cos()).abs().max()) < allowed
    assert float((sines.cpu().double() - angles.double().sin()).abs().max()) < allowed
