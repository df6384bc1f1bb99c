"""Modules with the operators of vision models and of recurrent ones, compiled and run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ort_driver
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from optc.compiler.capture import capture_module


class _Swin(nn.Module):
    """A shifted window: roll, a mask that is filled slice by slice, a bias that is looked up, dropout in place."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("places", torch.arange(16) % 9)

    def forward(self, image: Tensor) -> Tensor:
        batch, size, _, width = image.shape
        x = torch.roll(image, shifts=(-1, -1), dims=(1, 2))
        x = x.view(batch, size // 2, 2, size // 2, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, width)
        q, k, v = self.qkv(x).reshape(x.size(0), 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = (functional.normalize(q, dim=-1) * 4) @ functional.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores + self.table[self.places].view(4, 4, 2).permute(2, 0, 1)[None]
        mask = image.new_zeros((size, size))
        for number, part in enumerate((slice(0, -2), slice(-2, -1), slice(-1, None))):
            mask[part, part] = number
        mask = mask.view(size // 2, 2, size // 2, 2).permute(0, 2, 1, 3).reshape(-1, 4)
        mask = mask.unsqueeze(1) - mask.unsqueeze(2)
        mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        scores = (scores.view(batch, -1, 2, 4, 4) + mask[None, :, None]).view(-1, 2, 4, 4)
        x = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, width))
        return functional.dropout(x, 0.5, self.training, inplace=True).view(batch, -1, width).flip(1)


class _Mobile(nn.Module):
    """Activations in place, squeeze and excitation, a residual in place, windows of pooling that are cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(inplace=True)
        self.narrow, self.wide = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.head = nn.Sequential(nn.Linear(8 * 9, 10), nn.ReLU6(inplace=True), nn.Dropout(0.2, inplace=True))

    def forward(self, image: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(functional.relu(image, inplace=True))))
        gate = self.wide(functional.relu(self.narrow(functional.adaptive_avg_pool2d(x, 1)), inplace=True))
        x *= functional.hardsigmoid(gate, inplace=True)
        x = functional.max_pool2d(x, 3, 2, ceil_mode=True) + functional.avg_pool2d(x, 3, 2, ceil_mode=True)
        x += functional.silu(x, inplace=False)
        return self.head(functional.adaptive_avg_pool2d(x, 3).flatten(1))


class _Unet(nn.Module):
    """Shuffled channels and pixels, transposed convolutions, interpolation, padding, attention of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1)
        self.norm = nn.InstanceNorm2d(8, affine=True)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.channel_shuffle(functional.celu(self.norm(self.down(image))), 2)
        rows = x.flatten(2).transpose(1, 2)
        x = x + self.attend(rows, rows, rows)[0].transpose(1, 2).reshape(x.shape)
        x = functional.pad(self.up(x), (1, 0, 2, 1), mode="reflect")
        up = functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return functional.pixel_unshuffle(up, 2), functional.local_response_norm(x, 3)


class _Tagger(nn.Module):
    """Recurrent layers over sentences of any length; the last states are answers too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.first, self.second = nn.LSTM(6, 5, bidirectional=True, batch_first=True), nn.GRU(10, 4, batch_first=True)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        out, (_, cell) = self.first(self.embed(ids))
        out, last = self.second(out)
        return out, torch.cat([cell.transpose(0, 1).flatten(1), last[0]], -1)


def _image(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows))


def _ids(rows: int) -> Tensor:
    return torch.randint(0, 20, (rows, 3 + 2 * rows), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(
    ("kind", "make", "axes"),
    [
        (_Swin, _image(6, 6, 8), {0: "batch"}),
        (_Mobile, _image(3, 26, 26), {0: "batch"}),
        (_Unet, _image(3, 8, 8), {0: "batch"}),
        (_Tagger, _ids, {0: "batch", 1: "length"}),
    ],
)
def test_what_models_of_images_and_sequences_call(
    kind: type[nn.Module], make: Callable[[int], Tensor], axes: dict[int, str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = kind().eval().requires_grad_(False)
    program = capture_module(model, (make(2),), dynamic={"input_0": axes})
    ort_driver.gated(program, tmp_path)
    session = ort_driver.open_session(tmp_path)
    for rows in (1, 3):
        found, expected = ort_driver.run(session, make(rows)), model(make(rows))
        for got, want in zip(found, [expected] if isinstance(expected, Tensor) else expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
