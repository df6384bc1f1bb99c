"""What TensorRT's ONNX parser takes wrongly or refuses, and that nothing of it is in what optc writes.

Each trap is shown twice: what the parser does with a hand-made graph, so that a change of TensorRT's is noticed, and a
walk through the exporter's own graphs, which would fail if one had it.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import trt_driver
import trt_parsed as parsed
from onnx import TensorProto, numpy_helper
from rewrites import stirred
from trt_parsed import BOOL, HKV, INT64, QKV, D, H, T, half, model, nibbles, node

from optc.compiler.artifact.onnx_check import DOMAINS
from optc.exporters.trt import build_plan
from optc.exporters.trt.table import OP_SETS

rtx = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in build_plan.PACKAGES["rtx"]),
    reason="TensorRT for RTX is not installed: pip install 'optc[trt]'",
)
CACHE = [("k", parsed.HALF, ["b", HKV, T, D]), ("n", parsed.HALF, ["b", HKV, "s", D]), ("w", INT64, ["b"])]
MASK = ("m", BOOL, ["b", 1, "s", T])


# -- what the parser does -----------------------------------------------------------------------


@rtx
def test_a_mask_is_taken_as_it_is() -> None:
    found = parsed.Parsed(model([node("Attention", ["q", "k", "v", "m"], ["y"])], [*QKV, MASK]))
    assert found.check(attention=1)["attention"] == 1


@rtx
def test_causal_attention_with_lengths_is_another_mask() -> None:
    """Parsed without a word, as causal from the upper left, its lengths dropped: decoding would see one token."""
    attention = node("Attention", ["q", "k", "v", "", "", "", "n"], ["y"], is_causal=1)
    found = parsed.Parsed(model([attention], [*QKV, ("n", INT64, ["b"])]))
    assert found.errors == ""
    with pytest.raises(build_plan.BuildError) as caught:
        found.check(attention=1)
    assert caught.value.code == 7
    assert "causal kind UPPER_LEFT, not NONE" in caught.value.why
    assert "no mask attached" in caught.value.why


@rtx
def test_causal_attention_without_lengths_is_noticed() -> None:
    found = parsed.Parsed(model([node("Attention", ["q", "k", "v"], ["y"], is_causal=1)], QKV))
    with pytest.raises(build_plan.BuildError, match="not the program"):
        found.check(attention=1)


@rtx
def test_a_mask_of_numbers_is_noticed() -> None:
    mask = ("m", parsed.HALF, ["b", 1, "s", T])
    found = parsed.Parsed(model([node("Attention", ["q", "k", "v", "m"], ["y"])], [*QKV, mask]))
    with pytest.raises(build_plan.BuildError) as caught:
        found.check(attention=1)
    assert "a mask of HALF, not of bools" in caught.value.why


@rtx
@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"attention": 2}, "attention: 1, the program has 2"),
        ({"kv_updates": 1}, "kv_updates: 0, the program has 1"),
        ({"dequantize": {"INT4": 1}}, "dequantize: {}, the program has {'INT4': 1}"),
        ({"softmax": 1}, "softmax: 0, the program has 1"),
    ],
)
def test_another_count_stops_the_build(wanted: dict[str, Any], text: str) -> None:
    found = parsed.Parsed(model([node("Attention", ["q", "k", "v", "m"], ["y"])], [*QKV, MASK]))
    with pytest.raises(build_plan.BuildError) as caught:
        found.check(**wanted)
    assert text in caught.value.why


@rtx
def test_linear_caches_are_taken() -> None:
    scatter = node("TensorScatter", ["k", "n", "w"], ["y"], mode="linear", axis=-2)
    assert parsed.Parsed(model([scatter], CACHE)).check(kv_updates=1)["kv_updates"] == 1


def _weight(kind: int, zero: bool) -> onnx.ModelProto:
    """x [b,4,256] times blocks of 64 of a 4-bit weight."""
    names = ["w", "s"] + ["z"] * zero
    weights = [nibbles("w", kind, 256, 64), half("s", 4, 64)] + [nibbles("z", kind, 4, 64)] * zero
    nodes = [
        node("DequantizeLinear", names, ["wd"], axis=0, block_size=64),
        node("MatMul", ["x", "wd"], ["y"]),
    ]
    return model(nodes, [("x", parsed.HALF, ["b", 4, 256])], tuple(weights))


@rtx
def test_symmetric_int4_is_taken() -> None:
    found = parsed.Parsed(_weight(TensorProto.INT4, zero=False))
    assert found.check(dequantize={"INT4": 1})["dequantize"] == {"INT4": 1}


REFUSED = {
    "int4 with zero points": _weight(TensorProto.INT4, zero=True),
    "uint4": _weight(TensorProto.UINT4, zero=True),
    "circular cache": model([node("TensorScatter", ["k", "n", "w"], ["y"], mode="circular", axis=-2)], CACHE),
    "past and present in Attention": model(
        [node("Attention", ["q", "n", "n", "", "k", "v"], ["y", "pk", "pv"])], [*QKV, CACHE[1]]
    ),
    "softcap": model([node("Attention", ["q", "k", "v", "m"], ["y"], softcap=5.0)], [*QKV, MASK]),
    "MatMulNBits": model(
        [
            node(
                "MatMulNBits",
                ["x", "w", "s"],
                ["y"],
                domain="com.microsoft",
                K=64,
                N=32,
                bits=4,
                block_size=32,
            )
        ],
        [("x", parsed.HALF, ["b", 4, 64])],
        (numpy_helper.from_array(np.zeros((32, 2, 16), np.uint8), "w"), half("s", 64)),
        microsoft=True,
    ),
    "DynamicQuantizeLinear": model(
        [
            node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
            node("DynamicQuantizeLinear", ["f"], ["c", "s", "z"]),
            node("DequantizeLinear", ["c", "s", "z"], ["d"]),
            node("Cast", ["d"], ["y"], to=TensorProto.FLOAT16),
        ],
        [("x", parsed.HALF, ["b", 64])],
    ),
}


@rtx
@pytest.mark.parametrize("trap", REFUSED)
def test_what_the_parser_refuses(trap: str) -> None:
    assert parsed.Parsed(REFUSED[trap]).errors != ""


# -- what the exporter writes ---------------------------------------------------------------------

WRITTEN = [
    ("fused", None),
    ("fused", "rtn"),
    ("fused", "smoothquant"),
    ("basic", None),
    ("basic", "smoothquant"),
]


@functools.cache
def last_stage(quant: str | None) -> Any:
    return trt_driver.stages(stirred("mistral", torch.float16), trt_driver.options(dtype="fp16", quant=quant))[1]


@functools.cache
def written(ops: str, quant: str | None) -> onnx.ModelProto:
    """The graph of a tiny model with a window, in float16."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = trt_driver.options(dtype="fp16", quant=quant, trt_ops=ops)
        trt_driver.export(last_stage(quant), Path(folder), chosen)
        return onnx.load(Path(folder) / "model.onnx")


def _nodes(graph: onnx.ModelProto, kind: str) -> list[Any]:
    return [item for item in graph.graph.node if item.op_type == kind]


def _attributes(item: Any) -> dict[str, Any]:
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in item.attribute}


@pytest.mark.parametrize(("ops", "quant"), WRITTEN)
def test_no_trap_is_in_what_is_written(ops: str, quant: str | None) -> None:
    graph = written(ops, quant)
    assert [(item.domain, item.version) for item in graph.opset_import] == [("", 24 if ops == "fused" else 17)]
    assert {item.domain for item in graph.graph.node} == {""}
    masks = {item.output[0] for kind in ("And", "LessOrEqual") for item in _nodes(graph, kind)}
    attention = _nodes(graph, "Attention")
    assert len(attention) == (2 if ops == "fused" else 0)
    for item in attention:  # an explicit mask, no causal by itself, no lengths, no past, one output
        assert set(_attributes(item)) == {"scale"}
        assert (len(item.input), len(item.output)) == (4, 1)
        assert item.input[3] in masks
    for item in _nodes(graph, "TensorScatter"):
        assert _attributes(item) == {"axis": -2, "mode": b"linear"}
    constants = {item.name: item for item in graph.graph.initializer}
    kinds = {
        constants[item.input[0]].data_type for item in _nodes(graph, "DequantizeLinear") if item.input[0] in constants
    }
    assert kinds == (
        {TensorProto.INT4} if quant == "rtn" else {TensorProto.INT8} if quant and ops == "fused" else set()
    )
    for item in _nodes(graph, "DequantizeLinear"):
        zero = constants.get(item.input[2]) if len(item.input) > 2 else None
        assert zero is None or not onnx.numpy_helper.to_array(zero).any()
        assert zero is None or zero.data_type == TensorProto.INT8  # none with int4
    assert not _nodes(graph, "DynamicQuantizeLinear")


@pytest.mark.parametrize("ops", ["fused", "basic"])
def test_bindings_are_what_every_version_takes(ops: str) -> None:
    """No int64 or bool binding: TensorRT 8 has none. Caches in half precision."""
    graph = written(ops, None).graph
    kinds = {item.name: item.type.tensor_type.elem_type for item in graph.input}
    assert kinds.pop("input_ids") == kinds.pop("positions") == TensorProto.INT32
    assert set(kinds.values()) == {TensorProto.FLOAT16}
    assert graph.output[0].name == "logits"
    assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_opsets() -> None:
    """24 is the last whose Attention ONNX Runtime has a kernel for, 17 what TensorRT 8.6 parses."""
    assert 25 not in DOMAINS[""]
    assert {name: item.opset for name, item in OP_SETS.items()} == {"fused": 24, "basic": 17}


def test_groups_of_heads_are_no_copies() -> None:
    """Neither op set repeats keys and values for the query heads of a group."""
    kv = [item for item in _nodes(written("basic", None), "Expand") if "MatMul" in item.output[0]]
    assert kv == []
    assert H // HKV == 2
