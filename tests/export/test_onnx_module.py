"""Plain modules, exported, in ONNX Runtime against eager PyTorch."""

from __future__ import annotations

from pathlib import Path

import ort_driver
import pytest
import torch
from torch import Tensor, nn

from optc.compiler.artifact.onnx_check import check_onnx
from optc.compiler.capture import capture_module


class _Cnn(nn.Module):
    """Convolutions with batch norm and pooling, then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1, groups=2),
            nn.BatchNorm2d(16),
            nn.SiLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(16, 10))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image)).log_softmax(-1)


class _Mlp(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(12, 32), nn.LayerNorm(32), nn.Linear(32, 4, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.norm(nn.functional.gelu(self.first(torch.cat([x, y], -1))))
        return self.second(hidden), hidden.argmax(-1)


def _trained_statistics(model: nn.Module) -> nn.Module:
    """Running statistics other than 0 and 1, as after training."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize("rows", [1, 5])
def test_a_cnn(rows: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _trained_statistics(_Cnn())
    program = capture_module(
        model, (torch.randn(2, 3, 32, 32),), input_names=("image",), dynamic={"image": {0: "batch"}}
    )
    _, result = ort_driver.compiled(program, tmp_path)
    image = torch.randn(rows, 3, 32, 32)
    found = ort_driver.run(ort_driver.open_session(tmp_path), image)[0]
    with torch.no_grad():
        assert float((found - model(image)).abs().max()) <= 1e-5
    assert result.info["inputs"] == ["image"]
    stored = sum(t.numel() * t.element_size() for _, t in program.weights())
    # Batches counted in training are no part of the numbers; names and small constants are.
    assert abs(check_onnx(tmp_path, "model.onnx").weight_bytes - stored) < 512


def test_an_mlp_with_several_inputs_and_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Mlp().eval()
    names = ("x", "y")
    pair = torch.randn(3, 8), torch.randn(3, 4)
    dynamic = {name: {0: "rows"} for name in names}
    program = capture_module(model, pair, input_names=names, dynamic=dynamic)
    ort_driver.compiled(program, tmp_path)
    session = ort_driver.open_session(tmp_path)
    assert [item.shape for item in session.get_inputs()] == [["rows", 8], ["rows", 4]]
    for rows in (1, 7):
        x, y = torch.randn(rows, 8), torch.randn(rows, 4)
        values, places = ort_driver.run(session, x, y)
        with torch.no_grad():
            expected, best = model(x, y)
        assert float((values - expected).abs().max()) <= 1e-5
        assert torch.equal(places, best)
