"""--quant int8-static for onnx-cpu: what ONNX Runtime makes of the graph, beside the program, and what is refused."""

from __future__ import annotations

import collections
import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import ort_driver
import pytest
import torch
from command_line import optc, optc_json
from hf_folders import source
from static_networks import BATCHES, mobile, program_of, residual

import optc as package
from optc.compiler.calibration.examples import Examples
from optc.compiler.calibration.sequences import Calibration
from optc.compiler.diagnostics import TargetError, UsageError
from optc.compiler.rewriting.passes import PassContext
from optc.passes.fusion.fold_batchnorm import FoldBatchnorm
from optc.passes.legalization.ort import LegalizeOrt
from optc.passes.quantization.static import QuantizeStatic

Capture = pytest.CaptureFixture[str]
CONTEXT = PassContext(calibration=Calibration(Examples(tuple((batch,) for batch in BATCHES)), "images"))
QUANTIZED = ("QLinearConv", "QLinearAdd", "QLinearMul", "NhwcMaxPool", "QLinearGlobalAveragePool", "QGemm")


@functools.cache
def _legal(kind: str, reduce_range: bool = False) -> package.Program:
    program = program_of(kind)
    for rewrite in (FoldBatchnorm(), QuantizeStatic(reduce_range=reduce_range), LegalizeOrt()):
        program = rewrite.run(program, CONTEXT).program
    return program


def _fused(folder: Path) -> collections.Counter[str]:
    """The operators of a graph as ONNX Runtime runs it."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "fused.onnx"), 4
    ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "fused.onnx", load_external_data=False).graph
    return collections.Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize(
    ("kind", "expected", "left"),
    [
        (
            "residual",
            {"QLinearConv": 6, "QLinearAdd": 2, "NhwcMaxPool": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
            1,
        ),
        ("mobile", {"QLinearConv": 5, "QLinearAdd": 2, "QLinearMul": 2, "QLinearGlobalAveragePool": 2, "QGemm": 1}, 2),
    ],
)
@ort_driver.EXACT_PRODUCTS
def test_all_products_are_taken_in_integers(kind: str, expected: dict[str, int], left: int, tmp_path: Path) -> None:
    """Fused kernels, the program's numbers, and floating point only for the image and what has no kernel."""
    program = _legal(kind)
    result = ort_driver.exported(program, tmp_path)
    found = _fused(tmp_path)
    assert {name: count for name, count in found.items() if name in QUANTIZED} == expected
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Pad"} & set(found)
    assert found["QuantizeLinear"] == left  # the image; the gate of the squeeze
    assert result.needs["x86_flags_any"] == ["avx512_vnni", "avx_vnni"]
    session = ort_driver.open_session(tmp_path)
    for batch in (BATCHES[1], BATCHES[2][:1]):
        (got,) = ort_driver.run(session, batch)
        steps = (got - program(batch)).abs() / program(batch).abs().max()
        assert float(steps.max()) < 2e-2  # codes that rounding moves by one
        assert float(steps.median()) < 2e-3


def test_weights_of_7_bits_need_no_vnni(tmp_path: Path) -> None:
    program = _legal("residual", reduce_range=True)
    result = ort_driver.exported(program, tmp_path)
    assert "x86_flags_any" not in result.needs
    (got,) = ort_driver.run(ort_driver.open_session(tmp_path), BATCHES[1])
    torch.testing.assert_close(got, program(BATCHES[1]), rtol=0, atol=2e-2 * float(got.abs().max()))


@ort_driver.EXACT_PRODUCTS
def test_from_python(tmp_path: Path) -> None:
    """Calibrated by an iterable and by a file; the gate's probe is of these rows."""
    program, model = program_of("residual"), residual()
    np.savez(tmp_path / "images.npz", image=torch.cat(BATCHES).numpy())
    options = {"target": "onnx-cpu", "quant": "int8-static"}
    one = package.compile(program, output=tmp_path / "one", calibration=(batch for batch in BATCHES), **options)
    package.compile(program, output=tmp_path / "two", calibration=tmp_path / "images.npz", **options)
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    found, again, expected = package.load(tmp_path / "one")(x), package.load(tmp_path / "two")(x), model(x)
    assert torch.equal(found, again)
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert float((found.argmax(-1) == expected.argmax(-1)).double().mean()) > 0.9
    rows = {row.name: row for row in one.manifest.passes}
    assert (rows["fold-batchnorm"].matched, rows["quantize-static"].matched) == (6, 7)
    assert one.manifest.opened is not None
    assert one.manifest.opened.opened
    sizes = one.manifest.sizes
    assert sizes is not None
    assert sizes.total < 0.3 * sum(item.numel() * 4 for item in model.parameters())
    with pytest.raises(UsageError, match="a plain module is calibrated by examples"):
        package.compile(program, output=tmp_path / "none", **options)


def test_from_the_command_line(tmp_path: Path, capsys: Capture) -> None:
    exported = torch.export.export(mobile(), (BATCHES[0],))
    torch.export.save(exported, tmp_path / "net.pt2")
    np.savez(tmp_path / "images.npz", x=torch.cat(BATCHES).numpy())
    base = ("compile", tmp_path / "net.pt2", "--target", "onnx-cpu", "--quant", "int8-static")
    made = optc_json(capsys, *base, "--calibration", tmp_path / "images.npz", "-o", tmp_path / "out")
    assert {row["name"]: row["matched"] for row in made["passes"]}["quantize-static"] == 6
    assert made["quantization"]["method"] == "int8-static"
    assert optc("inspect", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "int8-static, 8 bits, groups of a row, symmetric, 6 weights" in told
    assert "KV cache" not in told
    assert optc(*base, "-o", tmp_path / "none") == 2
    assert "a plain module is calibrated by examples" in capsys.readouterr().err


def test_encoder(tmp_path: Path) -> None:
    """A folder of BERT: linears in integers, by tokens; embeddings as with other methods."""
    tokens = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0))
    made = package.compile(
        source("bert"), target="onnx-cpu", quant="int8-static", calibration=tokens, output=tmp_path / "out"
    )
    rows = {row.name: row for row in made.manifest.passes}
    names = list(rows)
    assert names.index("quantize-head") < names.index("quantize-static")  # whose codes another table would move
    found = _fused(tmp_path / "out")
    assert found["MatMulIntegerToFloat"] + found["QGemm"] == rows["quantize-static"].matched == 13


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"target": "onnx-cpu", "symmetric": False}, TargetError, "does not take asymmetric quantization"),
        ({"target": "onnx-cpu", "bits": 4}, UsageError, "does not support --bits 4"),
        ({"target": "inductor-cpu"}, TargetError, "does not take quantization 'int8-static'"),
    ],
)
def test_refused(options: dict[str, object], kind: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=words):
        package.compile(source("llama", 1), quant="int8-static", output=tmp_path / "out", **options)  # type: ignore[arg-type]
