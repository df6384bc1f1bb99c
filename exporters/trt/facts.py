"""engine.json: what a runner and a builder must know of a graph."""

from __future__ import annotations

import collections
from typing import Any

import torch

from optc.compiler.ir.contract import Contract
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.pipeline import compute_dtype
from optc.exporters.options.trt import TrtOptions
from optc.exporters.trt.builders import Choice
from optc.exporters.trt.table import OP_SETS

FORMAT = 1
_LOGITS_BYTES = 1 << 30  # of one prompt, all rows
_SHORTEST = 128
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_optc = torch.ops.optc


def engine_facts(program: Program, options: TrtOptions, choice: Choice) -> dict[str, Any]:
    """The object of engine.json before a plan is built."""
    contract = program.contract
    model, layers, capacity = contract.model, contract.layers, contract.kv_cache.capacity
    batch = options.max_batch
    return {
        "format": FORMAT,
        "ops": choice.ops,
        "opset": OP_SETS[choice.ops].opset,
        "runtime": None,
        "runtime_version": None,
        "plan": None,
        "plan_bytes": None,
        "plan_sha256": None,
        "compute_capabilities": None,
        "dtype": _DTYPES[compute_dtype(program)],
        "quant": _quantization(contract),
        "cache": {
            "update": "in_place" if choice.ops == "fused" else "ping_pong",
            "dtype": next(spec.dtype for spec in contract.inputs if spec.role == "key_cache"),
            "layers": len(layers),
            "kv_heads": layers[0].num_kv_heads,
            "head_dim": layers[0].head_dim,
            "capacity": capacity,
        },
        "vocab_size": model.vocab_size,
        "eos_token_ids": list(model.eos_token_ids),
        "bos_token_id": model.bos_token_id,
        "profiles": profiles(batch, capacity, model.vocab_size),
        "inputs": {spec.name: {"dtype": spec.dtype, "dims": list(spec.dims)} for spec in contract.inputs},
        "outputs": _outputs(contract),
        "network": network_facts(program, choice.ops),
    }


def profiles(batch: int, capacity: int, vocab_size: int) -> list[dict[str, Any]]:
    """Ranges (smallest, best, largest) of batch and tokens: one profile for prompts, one for single tokens.

    A prompt has at most as many tokens as the cache, and as fit 1 GiB of float32 logits, but 128 at least.
    """
    fit = max(_SHORTEST, 1 << (max(1, _LOGITS_BYTES // (4 * batch * max(1, vocab_size))).bit_length() - 1))
    longest = min(capacity, fit)
    best = min(longest, 128)
    return [
        {"name": "prefill", "batch": [1, 1, batch], "tokens": [1, best, longest]},
        {"name": "decode", "batch": [1, 1, batch], "tokens": [1, 1, 1]},
    ]


def network_facts(program: Program, ops: str) -> dict[str, Any]:
    """How many layers of each kind TensorRT's network must have, counted in the program."""
    count = collections.Counter(node.target for node in program.graph.nodes if node.op == "call_function")
    attention = program.calls(_optc.masked_attention.default)
    spelled = [node for node in attention if ops == "basic" or node.kwargs["softcap"]]
    scatters, fused = count[_optc.tensor_scatter.default], ops == "fused"
    aten = torch.ops.aten
    return {
        "attention": len(attention) - len(spelled),
        "softmax": len(spelled) + count[aten.softmax.int] + count[aten._softmax.default],
        "kv_updates": scatters if fused else 0,
        "scatter": 0 if fused else scatters,
        "rotary": count[_optc.rotary_cached.default] if fused else 0,
        "quantize": count[_optc.quantize.default] + (0 if fused else count[_optc.dequantize_linear.default]),
        "dequantize": _dequantized(program),
    }


def _dequantized(program: Program) -> dict[str, int]:
    """DequantizeLinear nodes by the type of their codes, in TensorRT's names."""
    found: collections.Counter[str] = collections.Counter()
    for node in program.calls(_optc.dequantize_linear.default):
        found["INT4" if node.kwargs["bits"] == 4 else "INT8"] += 1
    for node in program.calls(_optc.dequantize_activation.default):
        found["INT8" if node.args[0].meta["val"].dtype is torch.int8 else "FP8"] += 1
    found["FP8"] += len(program.calls(_optc.dequantize_float.default))
    return {kind: number for kind, number in found.items() if number}


def _quantization(contract: Contract) -> dict[str, Any]:
    rows = list(contract.quantization.values())
    if not rows:
        return {}
    return {
        "method": "+".join(dict.fromkeys(row.method for row in rows)),
        "bits": sorted({row.bits for row in rows}),
        "group_size": sorted({row.group_size for row in rows}),
        "activations": sorted({row.activations for row in rows if row.activations}),
        "linears": len(rows),
    }


def _outputs(contract: Contract) -> dict[str, Any]:
    cache = {spec.name.replace("past_key_values", "present"): spec for spec in contract.inputs}
    vocabulary = contract.model.vocab_size
    table: dict[str, Any] = {}
    for spec in contract.outputs:
        if spec.role == "logits":
            table[spec.name] = {"dtype": "float32", "dims": ["batch", "tokens", vocabulary]}
        else:
            same = cache[spec.name]
            table[spec.name] = {"dtype": same.dtype, "dims": list(same.dims)}
    return table
