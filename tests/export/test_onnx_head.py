"""Quantized embeddings and heads in ONNX Runtime: the kernels, one copy of a tied weight, and the program's numbers."""

from __future__ import annotations

from pathlib import Path

import bounds
import onnx
import ort_driver
import pytest
from chosen import chosen
from conftest import EXAMPLE
from once import example_artifact
from rewrites import stirred
from stages import full_logits, sequences

from optc.compiler.artifact.folder import read_manifest
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.passes.quantization.head import QuantizeHead
from optc.passes.quantization.round_scales import RoundScales
from optc.passes.quantization.rtn import QuantizeRtn
from optc.targets.registry import find_target

LENGTHS = (21, 9, 14, 5)


def quantized(name: str, bits: int, symmetric: bool) -> Program:
    """A family as the recipe quantizes it, before a KV cache."""
    form = {"group_size": 32, "symmetric": symmetric}
    program = QuantizeRtn(bits=4, **form, signed=True).run(stirred(name, layers=1), PassContext()).program
    return QuantizeHead(bits=bits, **form, signed=True).run(program, PassContext()).program  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "bits", "symmetric"),
    [
        *(("llama", bits, symmetric) for bits in (4, 8) for symmetric in (True, False)),
        ("gemma2", 4, False),
        ("gemma2", 8, True),
        ("gpt2", 4, True),
        ("gpt2", 8, False),
    ],
)
def test_engine_and_program_agree(name: str, bits: int, symmetric: bool, tmp_path: Path) -> None:
    """Gemma 2 and GPT-2 are tied; of Llama embedding and head are two weights."""
    options = {"bits": 4, "group_size": 32, "symmetric": symmetric, "head_bits": bits, "accuracy_level": 0}
    compiled, result = ort_driver.compiled(stirred(name, layers=1), tmp_path, quant="rtn", **options)
    assert result.info["operators"]["GatherBlockQuantized"] == 1
    assert "MatMul" not in result.info["operators"]
    assert "FusedMatMul" not in result.info["operators"]
    packed = [tensor for tensor in result.tensor_bytes if tensor.endswith("_packed") and "layers" not in tensor]
    packed = [tensor for tensor in packed if ".h." not in tensor]
    assert len(packed) == (2 if name == "llama" else 1)
    assert {result.tensor_bytes[tensor] for tensor in packed} == {128 * 64 * bits // 8}
    rows = sequences(*LENGTHS)
    expected = [full_logits(_stored(quantized(name, bits, symmetric)), row) for row in rows]
    for way, logits in ort_driver.schedules(ort_driver.open_session(tmp_path), compiled.contract, rows).items():
        assert bounds.gap(logits, expected).largest <= 1e-4, way


def _stored(program: Program) -> Program:
    """With scales as they are stored."""
    return RoundScales(strict=False).run(program, PassContext()).program


def test_both_read_one_initializer(tmp_path: Path) -> None:
    ort_driver.compiled(stirred("gemma2", layers=1), tmp_path, quant="rtn")
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    made = {output: node for node in graph.node for output in node.output}
    (lookup,) = (node for node in graph.node if node.op_type == "GatherBlockQuantized")
    head = [node for node in graph.node if node.op_type == "MatMulNBits"][-1]
    assert made[lookup.input[0]].op_type == "Reshape"
    assert made[lookup.input[0]].input[0] == head.input[1] == "lm_head.weight_packed"
    assert lookup.input[2] == head.input[2]


def test_a_damaged_code_shows(tmp_path: Path) -> None:
    """The check of the opened file can see the table: one code of a token that occurs is moved."""
    compiled, _ = ort_driver.compiled(stirred("llama", layers=1), tmp_path, quant="rtn", accuracy_level=0)
    rows = sequences(*LENGTHS)
    before = ort_driver.schedules(ort_driver.open_session(tmp_path), compiled.contract, rows)["prefill"]
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    (table,) = (item for item in graph.initializer if item.name == "model.embed_tokens.weight_packed")
    place = {entry.key: entry.value for entry in table.external_data}
    data = bytearray((tmp_path / "model.onnx.data").read_bytes())
    data[int(place["offset"]) + rows[0][3] * 64] ^= 0x80
    (tmp_path / "model.onnx.data").write_bytes(data)
    after = ort_driver.schedules(ort_driver.open_session(tmp_path), compiled.contract, rows)["prefill"]
    assert bounds.gap(after, before).largest > 1e-3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"quant": "rtn"}, [(8, 128)]),
        ({"quant": "rtn", "group_size": 64}, [(8, 64)]),
        ({"head_bits": 4}, [(4, 32)]),
        ({"quant": "rtn", "group_size": 64, "head_bits": 4}, [(4, 32)]),
        ({"quant": "rtn", "group_size": 16, "head_bits": 4}, [(4, 16)]),
    ],
)
def test_what_is_asked_for(options: dict[str, object], expected: list[tuple[int, int]]) -> None:
    """Bits and the largest group: that of the linears, and at 4 bits 32 at most."""
    steps = ort_driver.TARGET.recipe("decoder", chosen("onnx-cpu", **options))
    heads = [step.rewrite for step in steps if isinstance(step.rewrite, QuantizeHead)]
    assert [(head.bits, head.group_size) for head in heads] == expected


def test_scales_of_either_sign_are_for_kernels_that_take_them() -> None:
    """ONNX Runtime's; in what others are given all scales are positive."""
    for target, expected in (("onnx-cpu", True), ("inductor-cpu", False)):
        steps = find_target(target).recipe("decoder", chosen(target, quant="rtn"))
        assert {step.rewrite.signed for step in steps if isinstance(step.rewrite, QuantizeRtn)} == {expected}
    graph = onnx.load(example_artifact("onnx-cpu", quant="rtn") / "model.onnx").graph
    scales = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer if "_scales" in item.name}
    assert len(scales) == 4 * 4 + 1
    assert {name for name, values in scales.items() if (values > 0).all()} == {"lm_head.weight_scales"}  # of 8 bits


def test_the_example_is_smaller_than_its_source() -> None:
    written = read_manifest(example_artifact("onnx-cpu", quant="rtn")).weight_bytes
    assert written < 0.45 * (EXAMPLE / "model.safetensors").stat().st_size
