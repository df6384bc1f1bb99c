"""What ONNX Runtime's CPU provider makes of fp16: calls of a decoder in float16 beside the same in float32.

    python benchmarks/onnx_fp16.py

A packed product (MatMulNBits, 4 bits, groups of 32, accuracy level 4) of fiction-26m's shape, alone and with the gate of
SwiGLU behind it, for which the provider has no kernels in float16, with 1 and 512 rows; and attention of one token over
512 (GroupQueryAttention). One thread; `ratio` is the time in float16 over that in float32, round by round, with 95 %
bootstrap intervals: above 1 float16 is slower.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from common import interleave, ratio, record
from onnx import TensorProto, helper

COLUMNS, ROWS, GROUP = 512, 1408, 32
HEADS, KV_HEADS, HEAD_DIM, PAST = 8, 4, 64, 512
TYPES = {"float32": (TensorProto.FLOAT, np.float32), "float16": (TensorProto.FLOAT16, np.float16)}
MICROSOFT = "com.microsoft"
ROUNDS = 9


def product(name: str, *, gated: bool) -> bytes:
    """A graph of one packed product, and of x * sigmoid(x) behind it."""
    kind, made = TYPES[name]
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 256, ROWS * COLUMNS // 2, dtype=np.uint8)
    scales = (draw.random((ROWS, COLUMNS // GROUP)) * 0.01).astype(made)
    weights = [
        helper.make_tensor("w", TensorProto.UINT8, [ROWS, COLUMNS // GROUP, GROUP // 2], codes.tobytes(), raw=True),
        helper.make_tensor("s", kind, scales.shape, scales.tobytes(), raw=True),
    ]
    shape = {"K": COLUMNS, "N": ROWS, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
    nodes = [helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain=MICROSOFT, **shape)]
    if gated:
        nodes += [helper.make_node("Sigmoid", ["y"], ["gate"]), helper.make_node("Mul", ["y", "gate"], ["z"])]
    out = nodes[-1].output[0]
    return _model(nodes, [("x", kind, ["m", COLUMNS])], [(out, kind, ["m", ROWS])], weights)


def attention(name: str) -> bytes:
    """A graph of one GroupQueryAttention."""
    kind, _ = TYPES[name]
    wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    inputs = [("q", kind, [1, "s", wide]), ("k", kind, [1, "s", narrow]), ("v", kind, [1, "s", narrow])]
    inputs += [(side, kind, [1, KV_HEADS, "p", HEAD_DIM]) for side in ("pk", "pv")]
    inputs += [("lengths", TensorProto.INT32, [1]), ("total", TensorProto.INT32, [])]
    heads = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
    names = [item[0] for item in inputs]
    node = helper.make_node("GroupQueryAttention", names, ["o", "ok", "ov"], domain=MICROSOFT, **heads)
    grown = [(side, kind, [1, KV_HEADS, "t", HEAD_DIM]) for side in ("ok", "ov")]
    return _model([node], inputs, [("o", kind, [1, "s", wide]), *grown], [])


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any]) -> bytes:
    places = [[helper.make_tensor_value_info(*item) for item in side] for side in (inputs, outputs)]
    versions = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model: onnx.ModelProto = helper.make_model(
        helper.make_graph(nodes, "calls", *places, weights), opset_imports=versions, ir_version=10
    )
    return model.SerializeToString()


def timed(graph: bytes, feeds: dict[str, Any], calls: int) -> Callable[[], float]:
    """Microseconds of a call."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            session.run(None, feeds)
        return (time.perf_counter() - begin) / calls * 1e6

    return run


def normal(name: str, *shape: int) -> Any:
    """Normally distributed numbers of one of the types."""
    return np.random.default_rng(1).standard_normal(shape).astype(TYPES[name][1])


def attention_feeds(name: str) -> dict[str, Any]:
    """One token behind `PAST` others."""
    draw = functools.partial(normal, name)
    new = {"q": draw(1, 1, HEADS * HEAD_DIM), **{side: draw(1, 1, KV_HEADS * HEAD_DIM) for side in ("k", "v")}}
    held = {side: draw(1, KV_HEADS, PAST, HEAD_DIM) for side in ("pk", "pv")}
    return {**new, **held, "lengths": np.array([PAST], np.int32), "total": np.array(PAST + 1, np.int32)}


def main() -> None:
    """Measure every pair in turn, print and record."""
    pairs: dict[str, dict[str, Callable[[], float]]] = {}
    for gated in (False, True):
        for rows, calls in ((1, 400), (512, 8)):
            title = f"product{' and gate' if gated else ''}, {rows} rows"
            pairs[title] = {
                name: timed(product(name, gated=gated), {"x": normal(name, rows, COLUMNS)}, calls) for name in TYPES
            }
    pairs[f"attention over {PAST}"] = {name: timed(attention(name), attention_feeds(name), 60) for name in TYPES}
    found: dict[str, Any] = {}
    for title, contenders in pairs.items():
        figures = interleave(contenders, ROUNDS)
        found[title] = {
            "us": {name: float(np.median(rows)) for name, rows in figures.items()},
            "ratio": ratio(figures["float16"], figures["float32"]),
        }
    record("onnx_fp16", {"rounds": ROUNDS, "calls": found}, 1)


if __name__ == "__main__":
    main()
