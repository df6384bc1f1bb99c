"""Small networks with what residual and mobile ones are made of, with uneven norms, and images to calibrate them on."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from optc.compiler.capture import capture_module
from optc.compiler.ir.program import Program

BATCHES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(3)).split(8)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.short = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if stride > 1 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.second(functional.relu(self.norm1(self.first(x)), inplace=True)))
        out += x if self.short is None else self.short(x)
        return functional.relu(out, inplace=True)


class Mobile(nn.Module):
    """Depthwise convolutions, clipping at 6, zeros on two sides, hard-swish, squeeze and excitation, no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, 2, bias=False), nn.BatchNorm2d(12)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.down, self.up = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.out, self.norm2 = nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.norm(self.stem(functional.pad(x, (0, 1, 0, 1)))))
        y = functional.hardswish(self.deep(x))
        y = y * functional.hardsigmoid(self.up(functional.relu(self.down(functional.adaptive_avg_pool2d(y, 1)))))
        y = x + self.norm2(self.out(y))
        logits: Tensor = self.head(functional.adaptive_avg_pool2d(y, 1).view(x.shape[0], -1))
        return logits


def _uneven(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for item in model.modules():
        if isinstance(item, nn.BatchNorm2d):
            nn.init.uniform_(item.running_var, 0.2, 2.0, generator=generator)
            nn.init.normal_(item.running_mean, 0.0, 0.2, generator=generator)
            nn.init.uniform_(item.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(item.bias, 0.0, 0.2, generator=generator)
    return model.eval().requires_grad_(False)


@functools.cache
def residual() -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks = [_Block(16, 16, 1), _Block(16, 32, 2)]
    return _uneven(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)))


@functools.cache
def mobile() -> nn.Module:
    torch.manual_seed(0)
    return _uneven(Mobile())


@functools.cache
def program_of(kind: str | nn.Module, x: Tensor | None = None) -> Program:
    """A network's capture, with a batch of any size; treat it as read-only."""
    model = kind if isinstance(kind, nn.Module) else {"residual": residual, "mobile": mobile}[kind]()
    example = BATCHES[0][:2] if x is None else x
    return capture_module(model, (example,), input_names=["image"], dynamic={"image": {0: "batch"}})
