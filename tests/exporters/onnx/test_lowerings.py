"""Every lowering against eager PyTorch, in ONNX Runtime: 3 rows and 1 row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import ort_driver
import pytest
import torch
from onnx_cases import CASES, REFUSED, SEVERAL_AXES, Case, name_of
from torch import Tensor

from optc.compiler.capture import capture_module
from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.program import Program
from optc.compiler.target.target import check_legal
from optc.exporters.onnx.table import LOWERINGS
from optc.targets.onnx_cpu import TARGET

ELSEWHERE = {
    "optc.group_query_attention.default": "tests/compiler/ops/packed/test_onnxruntime.py",
    "optc.group_query_attention_codes.default": "tests/export/test_onnx_kv_codes.py",
    "optc.matmul_nbits.default": "tests/compiler/ops/packed/test_onnxruntime.py",
    "optc.gather_nbits.default": "tests/export/test_onnx_head.py",
    "optc.quantize_tokens.default": "tests/compiler/ops/packed/test_onnxruntime_products.py",
    "optc.matmul_integer.default": "tests/compiler/ops/packed/test_onnxruntime_products.py",
    "optc.matmul_bnb4.default": "tests/compiler/ops/packed/test_onnxruntime_products.py",
    "optc.dequantize_linear.default": "tests/export/test_onnx_quantized.py",
    "optc.dequantize_channels.default": "tests/export/test_onnx_static.py",
    "optc.dequantize_bias.default": "tests/export/test_onnx_static.py",
}
PARAMETERS = [
    pytest.param(name, case, id=f"{name}-{n}") for name, cases in CASES.items() for n, case in enumerate(cases)
]


class _Calls(torch.nn.Module):
    """A function as a module with a fixed number of inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(
        self,
        a: Tensor,
        b: Tensor | None = None,
        c: Tensor | None = None,
        d: Tensor | None = None,
        e: Tensor | None = None,
        f: Tensor | None = None,
    ) -> Any:
        return self.function(*(x for x in (a, b, c, d, e, f) if x is not None))


def captured(case: Case) -> Program:
    function, *inputs = case
    names = [f"input_{n}" for n in range(len(inputs))]
    return capture_module(_Calls(function), inputs, dynamic={name: {0: "batch"} for name in names})


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def compare(function: Callable[..., Any], inputs: list[Tensor], session: Any) -> None:
    expected = flat(function(*inputs))
    found = ort_driver.run(session, *inputs)
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        if want.dtype.is_floating_point:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
        else:
            assert torch.equal(got, want)


@pytest.mark.parametrize(("name", "case"), PARAMETERS)
def test_lowering_agrees_with_eager(name: str, case: Case, tmp_path: Path) -> None:
    program = captured(case)
    assert name in {name_of(node.target) for node in program.graph.nodes if node.op == "call_function"}
    check_legal(program, TARGET)
    ort_driver.exported(program, tmp_path)
    onnx.checker.check_model(tmp_path / "model.onnx")
    session = ort_driver.open_session(tmp_path)
    function, *inputs = case
    compare(function, inputs, session)
    compare(function, [x[:1] for x in inputs], session)


@pytest.mark.parametrize("index", range(len(SEVERAL_AXES)))
def test_reshapes_with_several_dynamic_axes(index: int, tmp_path: Path) -> None:
    function, x = SEVERAL_AXES[index], torch.arange(60.0).reshape(3, 4, 5)
    axes = {"input_0": {0: "batch", 1: "seq", 2: "total"}}
    program = capture_module(_Calls(function), [x], dynamic=axes)
    ort_driver.exported(program, tmp_path)
    session = ort_driver.open_session(tmp_path)
    for inputs in (x, x[:1, :2], torch.ones(2, 1, 7)):
        compare(function, [inputs], session)


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_lowered_is_refused(text: str) -> None:
    with pytest.raises(TargetError) as error:
        check_legal(captured(REFUSED[text]), TARGET)
    assert error.value.where == text


class _Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(100, 16)
        self.head = torch.nn.Linear(16, 100, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).relu())


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    program = capture_module(_Tied(), [torch.tensor([[3, 99], [0, 1]])], dynamic={"input_0": {0: "batch"}})
    ort_driver.exported(program, tmp_path)
    assert (tmp_path / "model.onnx.data").stat().st_size == 100 * 16 * 4
    session = ort_driver.open_session(tmp_path)
    compare(program, [torch.tensor([[5, 6]])], session)


def test_every_lowering_has_a_case() -> None:
    assert {name_of(target) for target in LOWERINGS} - set(ELSEWHERE) == set(CASES)
