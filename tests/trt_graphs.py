"""A tiny decoder in the form of a `basic` TensorRT graph, written by hand, with a NumPy twin that has no cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCAB, HEADS, WIDTH, CAPACITY = 23, 2, 4, 16
PROFILES = [
    {"name": "decode", "batch": [1, 1, 3], "tokens": [1, 1, 1]},
    {"name": "prefill", "batch": [1, 1, 3], "tokens": [2, 4, 6]},
]


def weights() -> dict[str, Any]:
    """Embedding, per-position table, and projections of one attention layer."""
    random = np.random.default_rng(0)
    size = HEADS * WIDTH
    shapes = {"embed": (VOCAB, size), "place": (CAPACITY, size), "head": (size, VOCAB)}
    shapes |= dict.fromkeys(("query", "key", "value"), (size, size))
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def reference(tokens: list[int]) -> Any:
    """Logits [S, V] of a whole row, in float64."""
    w = {name: value.astype(np.float64) for name, value in weights().items()}
    x = w["embed"][tokens] + w["place"][: len(tokens)]
    q, k, v = ((x @ w[name]).reshape(len(tokens), HEADS, WIDTH) for name in ("query", "key", "value"))
    scores = np.einsum("ihd,jhd->hij", q, k)
    scores[:, np.triu(np.ones((len(tokens), len(tokens)), bool), 1)] = -np.inf
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), v)
    return (x + mixed.reshape(len(tokens), -1)) @ w["head"]


def save_graph(path: Path) -> None:
    """Write the graph: int32 ids and positions, caches [B, heads, capacity, width], ScatterND updates."""
    nodes: list[onnx.NodeProto] = []
    constants = dict(weights())

    def add(kind: str, *inputs: Any, name: str = "", **attributes: Any) -> str:
        names = []
        for item in inputs:
            if not isinstance(item, str):
                constants[f"c{len(constants)}"] = item
                item = f"c{len(constants) - 1}"
            names.append(item)
        name = name or f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, names, [name], name=name, **attributes))
        return name

    def ints(*values: int) -> Any:
        return np.array(values, np.int64)

    tokens = add("Gather", add("Shape", "input_ids"), ints(1))
    steps = add("Range", np.array(0), add("Squeeze", tokens, ints(0)), np.array(1))
    place = add("Add", add("Unsqueeze", add("Cast", "positions", to=TensorProto.INT64), ints(1)), steps)
    x = add("Add", add("Gather", "embed", "input_ids"), add("Gather", "place", place))

    def heads(name: str) -> str:
        split = add("Reshape", add("MatMul", x, name), ints(0, 0, HEADS, WIDTH))
        return add("Transpose", split, perm=[0, 2, 1, 3])

    batch = add("Gather", add("Shape", "input_ids"), ints(0))
    shape = add("Concat", batch, ints(HEADS), tokens, axis=0)

    def count(upper: str) -> str:
        return add("Range", np.array(0), add("Squeeze", upper, ints(0)), np.array(1))

    def index(values: str, missing: tuple[int, ...]) -> str:
        wide = add("Expand", add("Unsqueeze", values, ints(*missing)), shape)
        return add("Unsqueeze", wide, ints(-1))

    rows = index(count(batch), (1, 2))
    places = index(place, (1,))
    head = index(count(add("Identity", ints(HEADS))), (0, 2))
    where = add("Concat", rows, head, places, axis=-1)
    key = add("ScatterND", "past_key_values.0.key", where, heads("key"), name="present.0.key")
    value = add("ScatterND", "past_key_values.0.value", where, heads("value"), name="present.0.value")
    scores = add("MatMul", heads("query"), add("Transpose", key, perm=[0, 1, 3, 2]))
    seen = add("LessOrEqual", np.arange(CAPACITY), add("Unsqueeze", place, ints(1, 3)))
    masked = add("Where", seen, scores, np.array(-1e4, np.float32))
    mixed = add("MatMul", add("Softmax", masked, axis=-1), value)
    flat = add("Reshape", add("Transpose", mixed, perm=[0, 2, 1, 3]), ints(0, 0, HEADS * WIDTH))
    add("MatMul", add("Add", x, flat), "head", name="logits")
    caches = [f"0.{name}" for name in ("key", "value")]
    dims = ["batch", HEADS, CAPACITY, WIDTH]

    def info(name: str, kind: int, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            info("input_ids", TensorProto.INT32, ["batch", "tokens"]),
            info("positions", TensorProto.INT32, ["batch"]),
            *(info(f"past_key_values.{name}", TensorProto.FLOAT, dims) for name in caches),
        ],
        [
            info("logits", TensorProto.FLOAT, ["batch", "tokens", VOCAB]),
            *(info(f"present.{name}", TensorProto.FLOAT, dims) for name in caches),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def description(**changes: Any) -> dict[str, Any]:
    """An engine.json without a plan for the tiny graph."""
    info: dict[str, Any] = {
        "format": 1,
        "ops": "basic",
        "opset": 17,
        "runtime": None,
        "runtime_version": None,
        "plan": None,
        "plan_sha256": None,
        "compute_capabilities": [],
        "dtype": "fp32",
        "quant": {},
        "vocab_size": VOCAB,
        "cache": {
            "update": "ping_pong",
            "dtype": "float32",
            "layers": 1,
            "kv_heads": HEADS,
            "head_dim": WIDTH,
            "capacity": CAPACITY,
        },
        "eos_token_ids": [1],
        "bos_token_id": 0,
        "profiles": PROFILES,
        "inputs": {},
        "outputs": {},
    }
    return info | changes


def save_folder(folder: Path, **changes: Any) -> Path:
    """A folder with the tiny graph and its engine.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_graph(folder / "model.onnx")
    (folder / "engine.json").write_text(json.dumps(description(**changes)))
    return folder
