"""Complex numbers as pairs: held to torch's own complex arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import optc
from optc.compiler.diagnostics import NoMatchError
from optc.passes.legalization.complex_pairs import ComplexPairs, has_complex


class _Rotary(torch.nn.Module):
    """As DeepSeek V2 and Llama 4 spell it, and what else is said of complex numbers."""

    def forward(self, x: Tensor, angle: Tensor) -> tuple[Tensor, ...]:
        turn = torch.polar(torch.ones_like(angle), angle) * 0.5
        x = x.reshape(x.shape[0], x.shape[1], -1, 2)
        number = torch.view_as_complex(x)
        turned = number * turn.unsqueeze(0).unsqueeze(-3).squeeze(0)
        other = torch.complex(angle, angle + 1)[None].permute(1, 0, 2).expand(-1, x.shape[0], -1)
        return (
            torch.view_as_real(turned.to(torch.complex64)).flatten(2),
            (turned - number * x[:, :1, :1, 0]).real,
            (turned + number.conj()).imag,
            other.abs()[:, 0],
            x.sum(-1),
            torch.view_as_real(turned).reshape(x.shape[0], -1),
        )


class _Fourier(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.fft.fftn(x, dim=(1, 2)).real, torch.fft.fft(x, dim=1).imag


def test_products_sums_and_views_of_complex_numbers() -> None:
    inputs = (torch.randn(5, 3, 8), torch.randn(3, 4))
    module = _Rotary()
    program = optc.capture(module, inputs, dynamic={"input_0": {0: "batch"}})
    assert has_complex(program)
    result = optc.Pipeline([ComplexPairs()]).run(program)
    assert not has_complex(result.program)
    again = (torch.randn(2, 3, 8), inputs[1])
    for found, wanted in zip(result.program(*again), module(*again), strict=True):
        torch.testing.assert_close(found, wanted)


def test_transforms_of_any_length() -> None:
    program = optc.capture(_Fourier(), (torch.randn(2, 11, 6),), dynamic={"input_0": {0: "batch", 1: "length"}})
    result = optc.Pipeline([ComplexPairs()]).run(program).program
    assert not has_complex(result)
    x = torch.randn(3, 101, 6)
    for found, wanted in zip(result(x), _Fourier()(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_has_no_pairs_is_left_whole() -> None:
    class Unusual(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(torch.polar(x, x) * 2).abs()

    program = optc.capture(Unusual(), (torch.rand(4, 4),))
    with pytest.raises(NoMatchError, match="complex-pairs") as raised:
        optc.Pipeline([ComplexPairs()]).run(program)
    assert "of complex numbers has no form of pairs" in raised.value.where
