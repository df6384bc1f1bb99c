"""Readable text of a Program at any stage.

A header says what the graph cannot (the contract); then comes one line per node:

    %linear: f32[batch, seq, 192] = aten.linear(%mul_4, @model.layers.0.self_attn.q_proj.weight f32[192, 192])    # model.layers.0.self_attn.q_proj · modeling_llama.py:250

Values carry the names of their nodes, not running numbers: a pass that replaces one node leaves the
other lines as they are. Weights are written `@name dtype[shape]` where they are read, sizes by the names
that the contract gives to dynamic axes. The text depends on nothing but the Program.
"""  # noqa: E501

from __future__ import annotations

import functools
import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.ir.contract import AttentionFacts, Contract
from optc.compiler.ir.diff import diff_text
from optc.compiler.ir.program import Program
from optc.compiler.ir.provenance import module_path

__all__ = ["diff_text", "format_program", "summarize"]

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_FRAME = re.compile(r'File "([^"\n]+)", line (\d+)')
_SLICE = re.compile(r"\.slice\([^()]*\)")
_LIBRARY_FOLDERS = (("torch",), ("optc", "compiler"), ("optc", "passes"))
_INT_MAX = 2**63 - 1


def format_program(program: Program) -> str:
    """The text of a Program; ends with a newline. Equal Programs give equal texts."""
    printer = _Printer(program)
    return "\n".join([*_header(program, printer), "", *printer.graph()]) + "\n"


def summarize(program: Program) -> dict[str, Any]:
    """Counts of a Program, JSON-able.

    Returns:
        `nodes` (calls), `ops` (operator -> calls, most frequent first), `weights` and `weight_bytes`
        (each tensor once), `dtypes` (dtype -> `weights`, `bytes`).
    """
    calls = Counter(_operator(node.target) for node in program.graph.nodes if node.op == "call_function")
    dtypes: dict[str, dict[str, int]] = {}
    for _, tensor in program.weights():
        entry = dtypes.setdefault(_dtype(tensor.dtype), {"weights": 0, "bytes": 0})
        entry["weights"] += 1
        entry["bytes"] += tensor.numel() * tensor.element_size()
    return {
        "nodes": sum(calls.values()),
        "ops": dict(sorted(calls.items(), key=lambda item: (-item[1], item[0]))),
        "weights": sum(entry["weights"] for entry in dtypes.values()),
        "weight_bytes": sum(entry["bytes"] for entry in dtypes.values()),
        "dtypes": dict(sorted(dtypes.items())),
    }


# -- header ---------------------------------------------------------------------------------


def _header(program: Program, printer: _Printer) -> Iterator[str]:
    contract = program.contract
    yield from _rows("program", [_title(contract)])
    values = zip(contract.inputs, program.user_inputs(), strict=True)
    yield from _rows("inputs", [f"%{node.name}: {printer.type_of(node)}{_alias(spec)}" for spec, node in values])
    yield from _rows("outputs", printer.outputs())
    yield from _rows("sizes", printer.sizes())
    if contract.position_rule:
        yield from _rows("positions", ["position[b, i] = base[b] + i"])
    yield from _rows("attention", _attention_rows(contract.layers))
    yield from _rows("kv cache", [_cache(contract)])
    yield from _rows("quantized", _quantization_rows(contract))
    yield from _rows("weights", _weight_rows(summarize(program)))
    yield from _rows("passes", contract.passes)


def _rows(title: str, values: Iterable[str]) -> Iterator[str]:
    for i, value in enumerate(values):
        yield f"{title if i == 0 else '':<10}  {value}"


def _title(contract: Contract) -> str:
    model = contract.model
    facts = {
        "vocabulary": model.vocab_size,
        "context": model.context_length,
        "hidden size": model.hidden_size,
    }
    parts = [contract.kind + (f" {model.architecture or model.model_type}".rstrip())]
    return ", ".join(parts + [f"{name} {value}" for name, value in facts.items() if value])


def _alias(spec: Any) -> str:
    """What the contract calls an input, where its placeholder and role do not say it already."""
    notes = [spec.name] if "." in spec.name else []
    notes += [spec.role] if spec.role not in ("input", spec.name) else []
    return f" ({', '.join(notes)})" if notes else ""


def _attention_rows(layers: Sequence[AttentionFacts]) -> Iterator[str]:
    start = 0
    for facts, same in groupby(layers):
        end = start + len(list(same)) - 1
        parts = [f"layers {start}-{end}" if end > start else f"layer {start}"]
        parts[0] += f": {facts.num_heads} heads"
        if facts.num_kv_heads != facts.num_heads:
            parts.append(f"{facts.num_kv_heads} KV heads")
        parts.append(f"head size {facts.head_dim}")
        if facts.value_dim != facts.head_dim:
            parts.append(f"value size {facts.value_dim}")
        parts.append(f"scale {facts.scale:.6g}")
        parts += ["causal"] if facts.causal else ["bidirectional"]
        parts += [f"window {facts.window}"] if facts.window else []
        parts += [f"chunks of {facts.chunk}"] if facts.chunk else []
        parts += [f"softcap {facts.softcap:g}"] if facts.softcap else []
        parts += ["sinks"] if facts.sinks else []
        yield ", ".join(parts)
        start = end + 1


def _cache(contract: Contract) -> str:
    cache = contract.kv_cache
    parts: list[str] = [cache.kind]
    parts += ["in place"] if cache.in_place else []
    parts += [f"blocks of {cache.block_size}"] if cache.block_size else []
    return ", ".join(parts)


def _quantization_rows(contract: Contract) -> list[str]:
    kinds = Counter(
        f"{q.method}, {q.bits} bits, {f'group {q.group_size}' if q.group_size else 'per channel'}, "
        + ("symmetric" if q.symmetric else "asymmetric")
        for q in contract.quantization.values()
    )
    return [f"{count} weights: {kind}" for kind, count in sorted(kinds.items())]


def _weight_rows(summary: Mapping[str, Any]) -> list[str]:
    parts = [f"{entry['weights']} {dtype}" for dtype, entry in summary["dtypes"].items()]
    return [f"{summary['weights']} tensors ({', '.join(parts)}), {summary['weight_bytes']} bytes"] if parts else []


# -- nodes ----------------------------------------------------------------------------------


class _Printer:
    """Prints the nodes of one Program: knows its weights and the names of its sizes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.weights = program.weight_names()
        from sympy import Symbol

        self._texts: dict[Any, str] = {}
        """Of the sizes that were printed: sympy takes long to spell one."""
        self.symbols: dict[Symbol, Symbol] = {}
        for node, spec in zip(program.user_inputs(), program.contract.inputs, strict=True):
            for size, dim in zip(getattr(node.meta.get("val"), "shape", ()), spec.dims, strict=False):
                expression = getattr(getattr(size, "node", None), "expr", None)
                if isinstance(expression, Symbol) and isinstance(dim, str):
                    named = Symbol(dim, **expression.assumptions0)
                    self.symbols.setdefault(expression, named)

    def sizes(self) -> list[str]:
        """The ranges of the dynamic axes."""
        found = self.program.exported.range_constraints
        rows = []
        for symbol, values in found.items():
            high = values.upper if values.upper.is_finite and values.upper < _INT_MAX else ""
            rows.append(f"{self._expression(symbol)} {values.lower}..{high}")
        return [", ".join(sorted(rows))] if rows else []

    def outputs(self) -> list[str]:
        """Name, type and role of the outputs."""
        (returned,) = (node for node in self.program.graph.nodes if node.op == "output")
        specs, rows = self.program.contract.outputs, []
        for spec, value in zip(specs, returned.args[0][-len(specs) :], strict=True):  # mutations come first
            kind = self.type_of(value) if isinstance(value, Node) else self._value(value)
            rows.append(f"{spec.name}: {kind}" + ("" if spec.role in ("output", spec.name) else f" ({spec.role})"))
        return rows

    def graph(self) -> Iterator[str]:
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                module = _printable(_SLICE.sub("", module_path(node)))
                comment = " · ".join(filter(None, (module, _source_line(node.meta.get("stack_trace") or ""))))
                yield self._call(node) + (f"    # {comment}" if comment else "")
            elif node.op == "output":
                yield f"return {', '.join(self._value(value) for value in node.args[0])}"
            else:
                assert node.op == "placeholder", node.op

    def type_of(self, node: Node) -> str:
        return self._type(node.meta.get("val"))

    def _call(self, node: Node) -> str:
        head = f"%{node.name}: {self.type_of(node)} = "
        if _operator(node.target) == "getitem":
            return f"{head}{self._value(node.args[0])}[{self._value(node.args[1])}]"
        arguments = [self._value(value) for value in node.args]
        arguments += [f"{name}={self._value(node.kwargs[name])}" for name in _in_order(node)]
        return f"{head}{_operator(node.target)}({', '.join(arguments)})"

    def _type(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{_dtype(value.dtype)}[{', '.join(self._size(size) for size in value.shape)}]"
        if isinstance(value, tuple | list):
            return f"({', '.join(self._type(item) for item in value)})"
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            kind = {torch.SymInt: "int", torch.SymFloat: "float", torch.SymBool: "bool"}[type(value)]
            return f"{kind}{{{self._size(value)}}}"
        return type(value).__name__ if value is not None else "()"

    def _size(self, size: Any) -> str:
        expression = getattr(getattr(size, "node", None), "expr", None)
        return str(size) if expression is None else self._expression(expression)

    def _expression(self, expression: Any) -> str:
        if expression not in self._texts:
            self._texts[expression] = str(expression.xreplace(self.symbols))
        return self._texts[expression]

    def _value(self, value: Any) -> str:
        if isinstance(value, Node):
            weight = self.weights.get(value.name) if value.op == "placeholder" else None
            return f"%{value.name}" if weight is None else f"@{weight} {self.type_of(value)}"
        if isinstance(value, tuple | list):
            return f"[{', '.join(self._value(item) for item in value)}]"
        if isinstance(value, torch.dtype):
            return _dtype(value)
        if isinstance(value, torch.device | torch.layout | torch.memory_format):
            return str(value).removeprefix("torch.")
        if isinstance(value, int) and value == _INT_MAX:
            return "INT_MAX"
        return repr(value)


def _dtype(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _in_order(node: Node) -> list[str]:
    """Names of the keyword arguments of a call as its schema has them, in whichever order it was made."""
    schema = getattr(node.target, "_schema", None)
    declared = {} if schema is None else {item.name: i for i, item in enumerate(schema.arguments)}
    return sorted(node.kwargs, key=lambda name: declared.get(name, -1))


def _operator(target: Any) -> str:
    """`aten.linear` for aten::linear.default; other overloads are named."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    if target is operator.getitem:
        return "getitem"
    return f"{target.__module__.lstrip('_')}.{target.__name__}"


@functools.lru_cache(maxsize=4096)
def _source_line(trace: str) -> str:
    """`file:line` of a stack trace's innermost frame in the model's own code, else in optc's."""
    frames = _FRAME.findall(trace)
    for skipped in (_LIBRARY_FOLDERS, _LIBRARY_FOLDERS[:1]):
        for file, line in reversed(frames):
            folders = PurePath(file.replace("\\", "/")).parts[:-1]
            if not any(_has_folders(folders, folder) for folder in skipped):
                return _printable(f"{PurePath(file.replace(chr(92), '/')).name}:{line}")
    return ""


def _has_folders(parts: Sequence[str], folders: Sequence[str]) -> bool:
    size = len(folders)
    return any(tuple(parts[i : i + size]) == tuple(folders) for i in range(len(parts) - size + 1))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
