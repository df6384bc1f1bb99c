"""Quantized decoders in ONNX Runtime against their Program, run eagerly: the same numbers."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import bounds
import onnx
import onnxruntime as ort
import ort_driver
import pytest
from chosen import chosen
from rewrites import stirred
from stages import full_logits, sequences

from optc.compiler.analysis.linears import linear_sites
from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext
from optc.compiler.target.target import check_legal
from optc.passes.legalization.ort import LegalizeOrt
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.llm_int8 import QuantizeLlmInt8
from optc.passes.quantization.nf4 import QuantizeNf4
from optc.passes.quantization.rotate_inputs import RotateInputs
from optc.passes.quantization.rtn import QuantizeRtn
from optc.targets.onnx_cpu import TARGET

CALIBRATION = random_calibration(128, samples=4, length=32, seed=0)
LENGTHS = (21, 9, 14, 5)
SCHEMES: dict[str, tuple[Pass, ...]] = {
    "w8a8": (QuantizeRtn(bits=8, group_size=0), QuantizeActivations()),
    "w8a8 turned": (
        RotateInputs(least_gain=0.0),
        QuantizeRtn(bits=8, group_size=0),
        QuantizeActivations(),
    ),
    "int8": (QuantizeRtn(bits=8, group_size=0),),
    "llm-int8": (QuantizeLlmInt8(threshold=3.0),),
    "nf4": (QuantizeNf4(),),
    "nf4 double": (QuantizeNf4(double_quant=True),),
    "3-bit": (QuantizeRtn(bits=3, group_size=32, symmetric=False),),
    "3-bit symmetric": (QuantizeRtn(bits=3, group_size=32),),
}

QDQ: dict[str, tuple[Pass, ...]] = {
    "qdq int4": (QuantizeRtn(bits=4, group_size=32),),
    "qdq uint4": (QuantizeRtn(bits=4, group_size=32, symmetric=False),),
    "qdq int4 channel": (QuantizeRtn(bits=4, group_size=0),),
    "qdq uint4 channel": (QuantizeRtn(bits=4, group_size=0, symmetric=False),),
    "qdq int8": (QuantizeRtn(bits=8, group_size=64),),
    "qdq int8 channel": (QuantizeRtn(bits=8, group_size=0),),
    "qdq uint8 channel": (QuantizeRtn(bits=8, group_size=0, symmetric=False),),
    "qdq uint8": (QuantizeRtn(bits=8, group_size=64, symmetric=False),),
    "qdq 3-bit": (QuantizeRtn(bits=3, group_size=32),),
    "qdq 2-bit": (QuantizeRtn(bits=2, group_size=64, symmetric=False),),
}


@functools.cache
def quantized(name: str, scheme: str) -> Program:
    """A family after the passes of a scheme, before a KV cache; treat it as read-only."""
    program = stirred(name)
    for rewrite in {**SCHEMES, **QDQ}[scheme]:
        result = rewrite.run(program, PassContext(calibration=CALIBRATION))
        assert result.matched
        program = result.program
    return program


def exported(program: Program, folder: Path, **options: Any) -> Program:
    """Through the target's recipe, but for its legalization, which takes `options`; then to disk."""
    for step in TARGET.recipe("decoder", chosen("onnx-cpu", accuracy_level=0))[:-1]:
        if not step.applies(program):
            continue
        program = step.rewrite.run(program, PassContext()).program
    program = LegalizeOrt(**options).run(program, PassContext()).program
    check_legal(program, TARGET)
    folder.mkdir(exist_ok=True)
    ort_driver.exported(program, folder)
    return program


def check(program: Program, folder: Path, **options: Any) -> None:
    """Export, and assert that the engine gives the program's logits in every way of feeding tokens: within 1e-4 of
    their size, or, where activations are rounded to codes, within what that makes of other sums."""
    legalized = exported(program, folder, **options)
    session, rows = ort_driver.open_session(folder), sequences(*LENGTHS)
    rounding = None
    if any(site.activations for site in linear_sites(program)):
        expected, rounding = bounds.of_codes(program, rows)
    else:
        expected = [full_logits(program, row) for row in rows]
    for way, logits in ort_driver.schedules(session, legalized.contract, rows).items():
        if rounding:
            bounds.check(logits, expected, rounding, way)
        else:
            assert bounds.gap(logits, expected).largest <= 1e-4, way


KERNELS = {"w8a8": "MatMulIntegerToFloat", "int8": "MatMulNBits", "nf4": "MatMulBnb4"}
"""Of these schemes each linear runs on the kernel meant for it, and nothing is dequantized before a product."""


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        *((scheme, "llama") for scheme in ("int8", "nf4", "3-bit")),
        *((scheme, "gpt2") for scheme in ("nf4 double", "3-bit symmetric")),
        *(
            pytest.param(scheme, name, marks=ort_driver.EXACT_PRODUCTS)
            for scheme, name in (("w8a8", "llama"), ("w8a8 turned", "llama"), ("w8a8", "gpt2"), ("llm-int8", "gpt2"))
        ),
    ],
)
def test_engine_and_program_agree(name: str, scheme: str, tmp_path: Path) -> None:
    check(quantized(name, scheme), tmp_path)
    if name == "llama" and scheme in KERNELS:
        found = _operators(tmp_path)
        assert found[KERNELS[scheme]] >= 8
        assert found["MatMul"] == 1  # the head
        assert found["DequantizeLinear"] == 0
        assert found["QuantizeLinear"] == (8 if scheme == "w8a8" else 0)  # one for each input


def _operators(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize("unsigned", [False, True])
def test_signed_weights_need_a_processor_that_does_not_saturate(unsigned: bool, tmp_path: Path) -> None:
    program = LegalizeOrt(unsigned=unsigned).run(quantized("llama", "w8a8"), PassContext()).program
    needs = ort_driver.exported(program, tmp_path).needs
    assert needs.get("x86_flags_any") == (None if unsigned else ["avx512_vnni", "avx_vnni"])


def test_unsigned_weights_give_the_same(tmp_path: Path) -> None:
    check(quantized("llama", "w8a8"), tmp_path, unsigned=True)


def _scaled(program: Program, half: bool) -> Program:
    """The program with scales that float16 holds exactly, or that it does not."""
    changed = program.clone()
    table = changed.exported.state_dict
    for name in [name for name in table if name.endswith("_scale")]:
        rounded = table[name].half().float()
        table[name] = rounded if half else rounded * (1 + 2**-16)
    return changed.changed()


def test_scales_take_16_bits_where_that_is_exact(tmp_path: Path) -> None:
    sizes = []
    for half in (True, False):
        folder = tmp_path / str(half)
        program = _scaled(quantized("llama", "3-bit"), half)
        check(program, folder)
        sizes.append((folder / "model.onnx.data").stat().st_size)
    scales = sum(program.weight(name).numel() for name in program.exported.state_dict if name.endswith("_scale"))
    assert abs(sizes[1] - sizes[0] - 2 * scales) < 4096  # less the padding between tensors


@pytest.mark.parametrize(
    ("scheme", "name"),
    [("qdq int4", "gpt2"), *((scheme, ("llama", "gpt2")[index % 2]) for index, scheme in enumerate(QDQ))],
)
def test_standard_operators_where_asked(
    name: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DequantizeLinear and MatMul; ONNX Runtime's own fusion of them is kept from rounding activations."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    monkeypatch.setattr(ort_driver, "open_session", lambda folder: ort.InferenceSession(folder / "model.onnx", options))
    check(quantized(name, scheme), tmp_path, qdq=True)
    found = _operators(tmp_path)
    assert found["DequantizeLinear"] == 8
    assert found["MatMul"] == (9 if name == "llama" else 8)  # the head is tied in GPT-2, and another operator
    assert found["MatMulNBits"] == 0
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    kinds = {item.data_type for item in model.graph.initializer if item.name.endswith("_packed")}
    signed = "uint" not in scheme and "2-bit" not in scheme
    wide = "int8" in scheme
    assert kinds == {(3 if signed else 2) if wide else (22 if signed else 21)}
