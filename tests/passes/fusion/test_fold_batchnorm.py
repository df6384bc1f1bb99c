"""fold-batchnorm: norms of running statistics go into the product in front of them."""

from __future__ import annotations

import torch
from rewrites import count
from torch import Tensor, nn

from optc.compiler.capture import capture_module
from optc.compiler.rewriting.passes import PassContext
from optc.passes.fusion.fold_batchnorm import FoldBatchnorm

NORM = torch.ops.aten.batch_norm.default


def _uneven(model: nn.Module) -> nn.Module:
    """Statistics and weights that a wrong fold would show."""
    torch.manual_seed(0)
    for item in model.modules():
        if isinstance(item, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (item.running_mean, item.weight, item.bias):
                if tensor is not None:
                    nn.init.normal_(tensor)
            nn.init.uniform_(item.running_var, 0.01, 4.0)
    return model.eval().requires_grad_(False)


def test_convolutions_and_linears() -> None:
    model = _uneven(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8, eps=0.1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding="same", groups=4), nn.BatchNorm2d(8, affine=False), nn.Flatten(),
            nn.Linear(128, 5), nn.BatchNorm1d(5),
        )
    )  # fmt: skip
    x = torch.randn(3, 3, 8, 8)
    program = capture_module(model, (x,), dynamic={"input_0": {0: "batch"}})
    result = FoldBatchnorm().run(program, PassContext())
    result.program.exported.validate()
    assert (result.matched, result.candidates, result.misses) == (3, 3, ())
    assert count(result.program, NORM) == 0
    torch.testing.assert_close(result.program(x), model(x), rtol=1e-5, atol=1e-5)
    names = dict(result.program.weights())
    fused = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(names["0.weight_folded"], fused.weight)
    torch.testing.assert_close(names["0.weight_folded_bias"], fused.bias)
    assert result.program.contract.sources["0.weight_folded"] == ("0.weight",)
    assert not any("running" in name for name in names)  # nothing reads them


class _Odd(nn.Module):
    """Norms that cannot be folded: in front, behind what others read, behind a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.conv, self.up = nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.norms[0](x))
        return self.norms[2](self.up(self.norms[1](y) + y))


def test_what_cannot_be_folded_is_said() -> None:
    program = capture_module(_uneven(_Odd()), (torch.randn(2, 4, 4, 4),))
    result = FoldBatchnorm().run(program, PassContext())
    assert result.program is program
    assert result.matched == 0
    assert [miss.reason for miss in result.misses] == [
        "its input is x, no convolution or linear",
        "conv2d is read by others too",
        "its input is aten.conv_transpose2d.input, no convolution or linear",
    ]
