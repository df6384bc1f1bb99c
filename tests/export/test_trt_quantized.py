"""Quantized decoders: model.onnx in ONNX Runtime against the quantized program, in both op sets."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import onnx
import ort_driver
import pytest
import torch
import trt_driver
from rewrites import stirred
from stages import sequences

from optc.compiler.ir.program import Program
from optc.exporters.trt.facts import network_facts

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
CASES = [
    ("fp32", "rtn", "fused"),
    ("fp16", "rtn", "fused"),
    ("fp16", "awq", "fused"),
    ("fp32", "gptq", "fused"),
    ("fp16", "int8", "fused"),
    pytest.param("fp32", "smoothquant", "fused", marks=ort_driver.EXACT_PRODUCTS),
    pytest.param("fp32", "smoothquant", "basic", marks=ort_driver.EXACT_PRODUCTS),
    pytest.param("fp16", "smoothquant", "basic", marks=ort_driver.EXACT_PRODUCTS),
    ("fp32", "fp8", "fused"),
]
CODES = {"rtn": "INT4", "awq": "INT4", "gptq": "INT4", "int8": "INT8", "smoothquant": "INT8", "fp8": "FP8"}


@functools.cache
def compiled(dtype: str, quant: str) -> tuple[Program, Program]:
    """In front of the KV cache, and the last stage."""
    return trt_driver.stages(stirred("llama", DTYPES[dtype]), trt_driver.options(dtype=dtype, quant=quant))


@pytest.mark.parametrize(("dtype", "quant", "ops"), CASES)
def test_engine_and_program_agree(dtype: str, quant: str, ops: str, tmp_path: Path) -> None:
    before, last = compiled(dtype, quant)
    trt_driver.export(last, tmp_path, trt_driver.options(trt_ops=ops, dtype=dtype, quant=quant))
    rounds = quant in ("smoothquant", "fp8")
    trt_driver.check(before, tmp_path, sequences(*trt_driver.LENGTHS), codes=rounds)
    facts = network_facts(last, ops)
    found = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node)
    assert found["DequantizeLinear"] == sum(facts["dequantize"].values())
    inputs = 8 if rounds else 0
    assert found["QuantizeLinear"] == facts["quantize"] == inputs + (14 if ops == "basic" else 0)
    assert facts["dequantize"] == {CODES[quant]: 14 + inputs}
