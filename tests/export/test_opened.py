"""What was written is opened in its engine before it is published; damage stops the compile."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as hf
from artifacts import make_manifest
from command_line import optc as optc_command
from families import FAMILIES, make_model
from stages import tiny_decoder
from torch import nn

import optc
from optc import api, opening, writing
from optc.compiler.artifact.engines import Engine, find_engine
from optc.compiler.artifact.folder import read_manifest
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.capture import capture_module
from optc.compiler.diagnostics import GateError, TargetError
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.gate import TOLERANCE
from optc.compiler.target.target import ExportRequest
from optc.exporters.executorch import export as executorch
from optc.exporters.inductor import selfcheck
from optc.opening import open_written


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).eval()


def _compile(model: Any, path: Path, target: str = "onnx-cpu", **options: Any) -> api.CompileResult:
    inputs = (torch.randn(2, 32),) if isinstance(model, nn.Sequential) else None
    return optc.compile(model, target=target, output=path / "out", example_inputs=inputs, **options)


def _damaged(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """Let `damage` change what was written before it is opened."""

    def opening(directory: Path, *rest: Any) -> Any:
        damage(directory)
        return open_written(directory, *rest)

    monkeypatch.setattr(writing, "open_written", opening)


def _scaled(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / name
        (np.frombuffer(path.read_bytes(), dtype=np.float32) * np.float32(1.001)).tofile(path)

    return damage


def _cut(directory: Path) -> None:
    path = directory / "model.onnx"
    path.write_bytes(path.read_bytes()[:100])


def test_figures_are_recorded(tmp_path: Path) -> None:
    result = _compile(_net(), tmp_path)
    opened = result.manifest.opened
    assert opened is not None
    assert opened.opened
    assert opened.engine == "onnxruntime"
    assert opened.relative is not None
    assert opened.relative < 1e-6
    assert opened.limit == 1e-4
    assert result.manifest.limits == {}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["opened"]["opened"] is True
    assert result.to_dict()["opened"]["engine"] == "onnxruntime"
    assert "opened in onnxruntime" in (tmp_path / "out" / "report.html").read_text()


def test_an_engine_that_is_installed_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime-gpu is."""
    installed = metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError(name)
        return "1.99" if name == "onnxruntime-gpu" else installed(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    manifest = _compile(_net(), tmp_path).manifest
    assert manifest.opened is not None
    assert manifest.opened.version == "1.99"
    assert manifest.needs["onnxruntime"] == ">=1.99"


def test_the_users_limit_widens_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are rounded in the last stage as they are in the engine; what is left is the order of sums.

    Exporters that open their file themselves are told too."""
    asked: list[ExportRequest] = []

    def request(**fields: Any) -> ExportRequest:
        asked.append(ExportRequest(**fields))
        return asked[-1]

    monkeypatch.setattr(writing, "ExportRequest", request)
    opened = _compile(make_model("llama"), tmp_path, quant="rtn", group_size=32, max_relative_error=9).manifest.opened
    assert opened is not None
    assert opening._ROUNDED_TOLERANCE == 0.03
    assert opened.limit == 9 == asked[0].allowed
    assert opened.relative is not None
    assert opened.relative < 0.03  # 5e-7 where ONNX Runtime has a product of integers for the CPU
    assert opened.tokens == 11


def test_a_limit_that_was_taken_away_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the manifest, by --json, `optc inspect` and the report; a limit that was not given is not there."""
    result = _compile(_net(), tmp_path, max_relative_error=float("inf"), max_kl=1e9, min_top1=0)
    limits = {"max-kl": 1e9, "min-top1": 0.0, "max-relative-error": "unlimited"}
    assert result.to_dict()["limits"] == read_manifest(result.artifact).limits == limits
    assert result.manifest.opened is not None
    assert result.manifest.opened.limit is None
    assert optc_command("inspect", result.artifact) == 0
    text = "max-kl 1000000000.0, max-relative-error unlimited, min-top1 0.0"
    assert f"limits given: {text}\n" in capsys.readouterr().out
    assert f"Limits given: {text}." in (result.artifact / "report.html").read_text()


@dataclass(frozen=True)
class _Deep:
    """An artifact of a deep model that rounds activations, and the last stage that it was written of."""

    folder: Path
    program: Program
    manifest: Manifest
    asked: ExportRequest


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> _Deep:
    """8 random layers of large weights: in ONNX Runtime 0.042 from the last stage, where rounding activations costs 0.129."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        **(FAMILIES["llama"][2] | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8})
    )
    config._attn_implementation = "eager"
    model = hf.LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(12.0)
    stages: list[Program] = []
    asked: list[ExportRequest] = []

    def request(**fields: Any) -> ExportRequest:
        asked.append(ExportRequest(**fields))
        return asked[-1]

    def opening(directory: Path, manifest: Manifest, program: Program, *rest: Any) -> Any:
        stages.append(program)
        return open_written(directory, manifest, program, *rest)

    folder = tmp_path_factory.mktemp("deep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "open_written", opening)
        patch.setattr(writing, "ExportRequest", request)
        anything = {
            "max_kl": 99.0,
            "min_top1": 0.0,
            "max_perplexity_increase": 1e9,
        }  # random weights: no quality to lose
        program = optc.capture(model, prove=False)
        result = _compile(program, folder, quant="rtn", bits=8, group_size=32, **anything)
    return _Deep(folder / "out", stages[0], result.manifest, asked[0])


@pytest.mark.slow
def test_a_deep_model_may_differ_as_much_as_its_own_rounding_makes(deep: _Deep) -> None:
    opened = deep.manifest.opened
    rounded = [record for record in deep.manifest.passes if record.rounds_activations]
    assert [record.name for record in rounded] == ["round-activations"]
    assert rounded[0].drift is not None
    assert rounded[0].drift.relative_error is not None
    assert opened is not None
    assert opened.limit == 1.5 * rounded[0].drift.relative_error == deep.asked.rerounding
    assert opened.relative is not None
    assert opening._ROUNDED_TOLERANCE < opened.limit < 0.5
    assert opened.relative < 0.5 * opened.limit


@pytest.mark.parametrize("exporter", [selfcheck, executorch])
def test_packages_that_exporters_open_are_held_to_the_same(exporter: ModuleType, tmp_path: Path) -> None:
    plain = tiny_decoder()
    rounds = plain.clone()
    node = rounds.calls(torch.ops.aten.linear.default)[0]
    node.target, node.kwargs = torch.ops.optc.linear_nbits.default, {"activation_group": 64}

    def tolerance(program: Program, **allowed: float) -> float:
        found: float = exporter._tolerance(program, ExportRequest(directory=tmp_path, **allowed))  # type: ignore[arg-type]
        return found

    assert tolerance(rounds) == exporter.ROUNDED_TOLERANCE
    assert tolerance(rounds, rerounding=0.4) == tolerance(rounds, allowed=0.4) == tolerance(plain, allowed=0.4) == 0.4
    assert tolerance(plain, rerounding=0.4) == tolerance(plain, allowed=1e-9) == TOLERANCE[torch.float32]


@pytest.mark.parametrize("part", ["packed", "scales"])
def test_a_damaged_file_of_a_deep_model_is_caught(part: str, deep: _Deep, tmp_path: Path) -> None:
    folder = shutil.copytree(deep.folder, tmp_path / "damaged")
    graph = onnx.load(folder / "model.onnx")
    name = f"model.layers.0.self_attn.o_proj.weight_{part}"
    tensor = next(item for item in graph.graph.initializer if item.name == name)
    rows = np.roll(onnx.numpy_helper.to_array(tensor), 1, axis=0)
    tensor.CopyFrom(onnx.numpy_helper.from_array(rows, name))
    onnx.save(graph, folder / "model.onnx")
    with pytest.raises(GateError, match="computes different numbers from the last stage in onnxruntime"):
        open_written(folder, deep.manifest, deep.program, find_engine(deep.manifest.engine, ""), [])


def test_an_encoder_is_opened(tmp_path: Path) -> None:
    opened = _compile(make_model("bert"), tmp_path).manifest.opened
    assert opened is not None
    assert opened.relative is not None
    assert opened.relative < 1e-5


def test_damaged_weights_stop_the_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _damaged(monkeypatch, _scaled("model.onnx.data"))
    with pytest.raises(GateError, match="computes different numbers from the last stage in onnxruntime") as caught:
        _compile(_net(), tmp_path)
    assert caught.value.exit_code == 5
    assert not list(tmp_path.iterdir()), "nothing is published"


def test_a_file_that_cannot_be_opened_stops_the_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _damaged(monkeypatch, _cut)
    with pytest.raises(GateError, match="the written file cannot be opened by onnx"):
        _compile(_net(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "said"), [("", ("toy", "")), ("numpy", ("numpy", np.__version__)), ("no-such", ("no-such", ""))]
)
def test_an_engine_of_another_package_is_asked(
    package: str, said: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, factor = capture_module(_net(), (torch.randn(2, 32),)), torch.ones(())
    toy = ModuleType("toy_engine")
    toy.open_runner = lambda folder, manifest: lambda *inputs: [program(*inputs) * factor]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_engine", toy)
    engine = Engine(name="toy", session="toy_engine:none", runner="toy_engine:open_runner", package=package)
    record = open_written(tmp_path, make_manifest(), program, engine, [])
    assert (record.engine, record.version, record.why) == (*said, "")
    assert record.relative == 0.0
    factor.fill_(1.01)
    with pytest.raises(GateError, match="computes different numbers") as caught:
        open_written(tmp_path, make_manifest(), program, engine, [])
    assert caught.value.what.endswith(f" in {' '.join(said).strip()}")


def test_what_is_opened_instead_is_said(tmp_path: Path) -> None:
    """As of a plan its graph is: by the engine, or by a runner that opens one or the other."""
    program = capture_module(_net(), (torch.randn(2, 32),))
    result = optc.compile(program, target="onnx-cpu", output=tmp_path / "out")
    onnx_engine = find_engine("onnx", "")
    for engine, why in (
        (replace(onnx_engine, opens_instead="its graph"), "its graph"),
        (find_engine("onnx-cuda", ""), "the graph in ONNX Runtime's CPU provider, not in that of CUDA"),
    ):
        if engine.name == "onnx" or not torch.cuda.is_available():
            assert open_written(tmp_path / "out", result.manifest, program, engine, []).why == why


def test_an_engine_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optc.runtime.sessions.graph_runner", None)
    opened = _compile(_net(), tmp_path).manifest.opened
    assert opened is not None
    assert not opened.opened
    assert opened.why == "ONNX Runtime is not installed"


def test_a_processor_that_would_compute_other_numbers_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may run the file: it is published."""

    def refused(needs: object) -> None:
        raise TargetError("this processor cannot multiply exactly", why="it lacks a flag")

    monkeypatch.setattr(opening, "check_cpu", refused)
    opened = _compile(_net(), tmp_path).manifest.opened
    assert opened is not None
    assert not opened.opened
    assert opened.why == "this processor cannot multiply exactly: it lacks a flag"


def test_a_model_folder_is_read_back(example_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = _compile(example_model, tmp_path, "vllm", quant="rtn").manifest.opened
    assert opened is not None
    assert opened.engine == "transformers"
    assert opened.relative is not None
    assert opened.relative < 1e-2
    assert opened.kl is not None

    def damage(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = directory / "model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("weight_scale"))
        save_file({**tensors, name: tensors[name] * 1.5}, path, metadata={"format": "pt"})

    _damaged(monkeypatch, damage)
    with pytest.raises(GateError, match="computes different numbers from the last stage in transformers"):
        _compile(example_model, tmp_path / "second", "vllm", quant="rtn")
