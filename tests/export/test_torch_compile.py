"""`torch.compile(model, backend="optc")` against the model itself."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

import optc
from optc import torch_backend
from optc.api import run_passes
from optc.capturing import Captured
from optc.compiler.capture.dynamo import capture_graph
from optc.compiler.diagnostics import GateError, OptcError, TargetError, UsageError
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.request import from_python
from optc.resolving import resolve

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch_backend.CompiledGraph]:
    """What the backend compiled, in order."""
    found: list[torch_backend.CompiledGraph] = []
    own = torch_backend.CompiledGraph.__init__

    def init(self: torch_backend.CompiledGraph, *args: Any) -> None:
        own(self, *args)
        found.append(self)

    monkeypatch.setattr(torch_backend.CompiledGraph, "__init__", init)
    return found


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, count: int = 2) -> tuple[Tensor, int]:
        return self.down(torch.relu(self.up(x)))[:, :count], 3 * x.shape[0]


class _Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 32)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        heads = torch.softmax(q @ k.transpose(-1, -2) / 32**0.5, -1) @ v
        return self.out(heads.transpose(1, 2).flatten(2))


def same(compiled: Any, module: nn.Module, *call: Any, atol: float = 1e-5) -> None:
    with torch.inference_mode():
        (found, number), (expected, own) = compiled(*call), module(*call)
    assert number == own
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_equal_for_new_sizes_new_weights_and_another_module(graphs: list[torch_backend.CompiledGraph]) -> None:
    module, other = _Net().eval(), _Net().eval()
    compiled = torch.compile(module, backend="optc")
    for rows, count in ((4, 2), (5, 7), (9, 6), (3, 31)):
        same(compiled, module, torch.randn(rows, 32), count)
    assert len(graphs) == 2  # as the call has it, and with sizes that change
    with torch.no_grad():
        module.up.weight.mul_(2)
    same(compiled, module, torch.randn(6, 32), 5)
    same(torch.compile(other, backend="optc"), other, torch.randn(7, 32), 5)
    assert len(graphs) <= 3


def test_weights_of_8_bits(graphs: list[torch_backend.CompiledGraph]) -> None:
    module, x = _Net().eval(), torch.randn(4, 32)
    compiled = torch.compile(module, backend="optc", options={"quant": "int8", "ignore": ("down.*",)})
    same(compiled, module, x, 32, atol=0.05)
    (graph,) = graphs
    assert {row.name: row.matched for row in graph.passes}["quantize-rtn"] == 1
    assert [node.kwargs["N"] for node in graph.program.calls(torch.ops.optc.linear_nbits.default)] == [64]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, 32)[0], graph.program(x)[0], atol=2e-2, rtol=0)
        assert not torch.equal(compiled(x, 32)[0], module(x, 32)[0])


def test_graphs_between_breaks_are_compiled_alone(graphs: list[torch_backend.CompiledGraph]) -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    module, x = Breaks().eval(), torch.randn(2, 8)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(module, backend="optc")(x), module(x), atol=1e-6, rtol=0)
    assert [[name for name, _ in graph.program.weights()] for graph in graphs] == [
        ["first.weight", "first.bias"],
        ["second.weight", "second.bias"],
    ]


@dataclass(frozen=True, kw_only=True)
class _Damage(Pass):
    """x + y  ->  x + 1.01 y"""

    name: ClassVar[str] = "damage"

    def run(self, program: Program, context: PassContext) -> PassResult:
        edited = program.clone()
        (call,) = edited.calls(torch.ops.aten.add.Tensor)
        call.kwargs = {"alpha": 1.01}
        return PassResult(edited.changed(), 1, 1)


def raised(module: Any, *call: Any, **options: Any) -> OptcError:
    """What the backend says, which Dynamo wraps."""
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as found:
        torch.compile(module, backend="optc", options=options)(*call)
    assert isinstance(found.value.inner_exception, OptcError)
    assert "backend='optc'" in str(found.value)
    return found.value.inner_exception


def test_a_pass_that_damages_the_graph_is_named() -> None:
    error = raised(lambda x, y: x.relu() + y, torch.ones(3), torch.ones(3), passes=[_Damage()])
    assert isinstance(error, GateError)
    assert "pass 'damage' failed the numerics gate" in error.what


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"qant": "int8"}, UsageError, "unknown option of torch.compile 'qant'"),
        ({"dtype": "bf16"}, UsageError, 'the option "dtype" has no effect in torch.compile'),
        ({"quant": "int9"}, UsageError, "unknown quantization 'int9'"),
        ({"bits": 4}, UsageError, "--bits has no effect without --quant"),
        ({"quant": "gptq"}, UsageError, "quantization 'gptq' is calibrated"),
        ({"target": "onnx-cpu"}, TargetError, "does not run a graph in this process"),
    ],
)
def test_options_that_say_nothing_are_refused(options: dict[str, Any], kind: type[OptcError], words: str) -> None:
    with torch.no_grad():
        error = raised(nn.Linear(32, 32), torch.randn(2, 32), **options)
    assert isinstance(error, kind)
    assert words in error.what


def test_training_is_refused() -> None:
    error = raised(nn.Linear(4, 4), torch.randn(2, 4))
    assert isinstance(error, TargetError)
    assert "does not train" in error.what


def test_the_passes_for_a_gpu_keep_the_numbers() -> None:
    """Without a GPU: operators run by their references, and the last stage is one that Inductor takes there."""
    found: list[Any] = []

    def backend(graph: Any, examples: list[Any]) -> Any:
        captured = capture_graph(graph, examples)
        assert captured.program.proof is not None
        start = Captured(captured.program, None, [], captured.program.proof)
        found.append(run_passes(start, resolve(from_python("inductor-cuda")), None, {}, kind="graph"))
        with pytest.raises(TargetError, match="does not quantize graphs"):
            run_passes(start, resolve(from_python("inductor-cuda", quant="int8")), None, {}, kind="graph")
        return graph.forward

    with torch.no_grad():
        torch.compile(_Attends().eval(), backend=backend)(torch.randn(2, 6, 64))
    assert {row.name: row.matched for row in found[0].records}["fuse-attention"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_on_a_gpu(graphs: list[torch_backend.CompiledGraph]) -> None:
    module = _Attends().eval().to("cuda", torch.bfloat16)
    x = torch.randn(2, 6, 64, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        found, expected = torch.compile(module, backend="optc")(x), module(x)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
    assert {row.name: row.matched for row in graphs[0].passes}["fuse-attention"] == 1


def test_the_name_is_known_where_no_metadata_is_installed() -> None:
    script = (
        "import sys, optc\n"
        "assert 'torch' not in sys.modules\n"
        "import importlib.metadata as metadata\n"
        "metadata.entry_points = lambda **_: metadata.EntryPoints()\n"
        "import torch\n"
        "found = torch._dynamo.backends.registry.lookup_backend('optc')\n"
        "assert found is optc.torch_name.backend, found\n"
        "assert 'optc.torch_backend' not in sys.modules\n"
    )
    path = str(Path(optc.__file__).parents[1])
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": path}, timeout=300)


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["torch_dynamo_backends"]["optc"].partition(":")
    assert getattr(sys.modules[module], name) is optc.torch_name.backend


def test_the_examples_of_the_docs_run(graphs: list[torch_backend.CompiledGraph]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "torch-compile.md").read_text(), re.M | re.S)
    for block in blocks:
        exec(compile(block, "docs/torch-compile.md", "exec"), {})
    first, second = ({row.name: row.matched for row in graph.passes} for graph in graphs)
    assert first["quantize-rtn"] == 2
    assert second["fuse-attention"] == 1
