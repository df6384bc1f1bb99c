"""AOTInductor packages of encoders and plain modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from package_driver import build
from sentence_folders import Module, write_sentence_folder
from torch import Tensor, nn
from transformers import BertModel

import optc
from optc.compiler.artifact.folder import read_manifest
from optc.compiler.capture import capture_module
from optc.compiler.diagnostics import TargetError
from optc.exporters.inductor import export
from optc.runtime.carried.pt2_runner import Package, PackageError

pytestmark = pytest.mark.slow


def test_encoder_with_padding(tmp_path: Path) -> None:
    """A folder of sentence-transformers: hidden states of an encoder, pooled in several ways, in one package."""
    modes = ["cls", "max", "mean", "weightedmean", "lasttoken"]
    modules: list[Module] = [("Pooling", {"pooling_mode": modes}), ("Normalize", None)]
    program = optc.capture(write_sentence_folder(tmp_path / "model", modules))
    package, rows = build(program, tmp_path / "package").load(), [[5, 9, 4, 7, 8, 6, 10], [6, 5], [11]]
    ids = torch.tensor([[*row, *[0] * (7 - len(row))] for row in rows])
    mask = (torch.arange(7) < torch.tensor([[7], [2], [1]])).long()
    (found,) = package(ids, mask, torch.zeros_like(ids))
    model = BertModel.from_pretrained(tmp_path / "model")
    for row, vector in zip(rows, found, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([row])).last_hidden_state[0]
        ramp = torch.arange(1.0, len(row) + 1)
        weighted = (ramp[:, None] * states).sum(0) / ramp.sum()
        pooled = torch.cat([states[0], states.amax(0), states.mean(0), weighted, states[-1]])
        torch.testing.assert_close(vector, pooled / pooled.norm(), atol=1e-5, rtol=0)


class _Net(nn.Module):
    """A convolution, a transposed (not contiguous) weight, a constant tensor, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.mix = nn.Parameter(torch.randn(8, 24).t())
        self.register_buffer("shift", torch.randn(8, 1))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.conv(x)) + self.shift
        return torch.matmul(self.mix, hidden), hidden.mean(-1)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a `_Net`."""
    program = capture_module(
        _Net(), (torch.randn(3, 4, 10),), input_names=["x"], dynamic={"x": {0: "rows", 2: "length"}}
    )
    folder = tmp_path_factory.mktemp("module") / "net"
    optc.compile(program, target="inductor-cpu", output=folder)
    return folder


def test_plain_module(network: Path) -> None:
    net = _Net()
    assert not net.mix.is_contiguous()
    manifest = read_manifest(network)
    package = Package(network, manifest.engine_info, manifest.needs)
    for shape in ((3, 4, 10), (1, 4, 5), (7, 4, 64)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[2]))
        for found, expected in zip(package(x), net(x), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with pytest.raises(PackageError, match=r"input x is torch.float32 \[2, 5, 4\]; the package takes"):
        package(torch.zeros(2, 5, 4))


def test_a_module_runs_by_the_file_beside_it(network: Path, tmp_path: Path) -> None:
    """In a process without optc: `run.py`, and no `generate.py`."""
    assert not (network / "generate.py").exists()
    x = torch.randn(5, 4, 8)
    np.savez(tmp_path / "in.npz", x=x.numpy())
    files = ["--inputs", str(tmp_path / "in.npz"), "--outputs", str(tmp_path / "out.npz")]
    command = [sys.executable, "-I", network / "run.py", *files]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "output_0 float32[5, 24, 8]\noutput_1 float32[5, 8]\n"), run.stderr
    with np.load(tmp_path / "out.npz") as file:
        for place, expected in enumerate(_Net()(x)):
            torch.testing.assert_close(torch.from_numpy(file[f"output_{place}"]), expected, rtol=0, atol=1e-5)
    for found, expected in zip(optc.load(network)(x), _Net()(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    np.savez(tmp_path / "in.npz", y=x.numpy())
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (1, f"error: {tmp_path / 'in.npz'} has no array 'x'\n")


class _GraphError(RuntimeError):
    """As Inductor's own errors: around another."""

    def __init__(self, inner: Exception) -> None:
        super().__init__("while compiling")
        self.inner_exception = inner


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_graph_that_inductor_does_not_take_is_refused(
    wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = ValueError("Cannot view a tensor with shape [2, 3]\nwhile executing")

    def fail(*_: object) -> bytes:
        raise _GraphError(inner) if wrapped else inner

    monkeypatch.setattr(export.compat, "aoti_compile", fail)
    program = capture_module(nn.Linear(3, 3), (torch.ones(2, 3),))
    with pytest.raises(TargetError, match="AOTInductor cannot compile the program") as caught:
        export._compile(program, tmp_path / "model.pt2", export.instruction_set())
    assert caught.value.exit_code == 4
    assert caught.value.why == "ValueError: Cannot view a tensor with shape [2, 3]"
