"""What a saved graph may say, checked before torch sees it.

torch's reader trusts its file: it evaluates shape expressions, imports modules that a tree spec names,
resolves operators by attribute path, and generates Python source from names that it does not check. A
graph from a file is therefore decoded here, strictly by type, into torch's schema classes, and every
class of that schema has a check; a class without one is refused.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from optc.compiler import compat
from optc.compiler.diagnostics import ArtifactError
from optc.compiler.ir.saved.shape_expressions import parse_shape_expression
from optc.compiler.ir.saved.strict_decoding import RefusedError, decode, require
from optc.compiler.ops import library

KEPT_METADATA = ("stack_trace", "nn_module_stack")
_OPERATOR = re.compile(r"torch\.ops\.(aten|optc)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
_WEIGHT_NAME = re.compile(r"[\w@:+-]+(\.[\w@:+-]+)*", re.ASCII)
_RANGED = re.compile(r"(s|u|zf|zuf)[0-9]{1,5}|s[0-9]{1,5}[\w +*/(),-]{0,200}", re.ASCII)
_FORBIDDEN_OPERATORS = {"from_file"}  # maps a file of the graph's choosing into memory
_DIALECTS = {"TRAINING", "ATEN"}
_DEVICES = {"cpu", "cuda"}
_MAX_SIZE = 2**48
_ATTRIBUTES = set(dir(torch.fx.GraphModule)) | set(vars(torch.nn.Module()))


def read_graph(data: Any, file: str) -> Any:
    """Decode JSON values into a `compat.graph_schema.ExportedProgram` that torch may be given.

    Args:
        data: what the JSON parser returned.
        file: named in errors.

    Raises:
        ArtifactError: a type, name, operator, shape expression or tree spec that is not allowed; names
            the place (node, value) in the file.
    """
    try:
        return decode(compat.graph_schema.ExportedProgram, data, CHECKS)
    except (RefusedError, RecursionError) as error:
        path = "".join(reversed(error.path)) if isinstance(error, RefusedError) else ""
        raise ArtifactError(
            "the saved graph is damaged or not trusted",
            where=f"{file}: program{path}",
            why=str(error),
            remedy="save the program again with this version of optc and torch",
        ) from error


def _name(value: str) -> None:
    fine = value.isascii() and value.isidentifier() and not keyword.iskeyword(value)
    require(fine, f"{value[:80]!r} cannot name a value: torch writes names into Python source")


def _named(item: Any) -> None:
    _name(item.name)


def check_weight_name(name: str) -> None:
    """Raise when a name is no dotted path of module attributes (torch writes it into Python source)."""
    reason = f"{name[:80]!r} cannot name a tensor"
    require(bool(_WEIGHT_NAME.fullmatch(name)), reason)
    require(_ATTRIBUTES.isdisjoint(name.split(".")), reason)


def _check_sym_argument(item: Any) -> None:
    if item.type == "as_name":
        _name(item.as_name)


def _check_argument(item: Any) -> None:
    kind = str(item.type)
    require(kind not in ("as_operator", "as_custom_obj", "as_graph"), f"{kind} is not allowed in a saved program")
    for text in [item.as_string] if kind == "as_string" else item.as_strings if kind == "as_strings" else []:
        require(
            text.isprintable() and not set(text) & {'"', "\\"},
            f"string argument {text[:60]!r} is not allowed",
        )


def _check_expression(item: Any) -> None:
    """Replace the text by the expression: torch takes a sympy object as it is and evaluates no text."""
    try:
        item.expr_str = parse_shape_expression(item.expr_str)
    except ValueError as error:
        raise RefusedError(str(error)) from error


def _check_size(item: Any) -> None:
    if item.type == "as_int":
        require(abs(item.as_int) < _MAX_SIZE, f"{item.as_int} is not a size")


def _check_tensor(item: Any) -> None:
    require(len(item.sizes) == len(item.strides), "sizes and strides differ in number")
    require(item.layout.name == "Strided" and item.dtype.name != "UNKNOWN", "not a dense tensor")
    require(all(size.type != "as_int" or size.as_int >= 0 for size in item.sizes), "a size is negative")


def _check_device(item: Any) -> None:
    known = item.type in _DEVICES and item.index in (None, *range(64))
    require(known, f"device {item.type[:40]}:{item.index} is not allowed")


@lru_cache(maxsize=1024)
def _operator_problem(target: str) -> str | None:
    if target in compat.SYMBOLIC_OPERATORS:
        return None
    match = _OPERATOR.fullmatch(target)
    if match is None or match[2] in _FORBIDDEN_OPERATORS:
        return f"operator {target[:120]!r} is not allowed: aten, optc and arithmetic on sizes are"
    if match[1] == "optc" and library.named(match[2]) is None:
        return f"operator {target[:120]!r} is not known to this version of optc"
    packet = getattr(getattr(torch.ops, match[1]), match[2], None)
    overload = getattr(packet, match[3], None)
    return None if isinstance(overload, torch._ops.OpOverload) else f"operator {target[:120]!r} is not known here"


@lru_cache(maxsize=4096)
def clean_trace(trace: str) -> str:
    """Replace what could end a comment or a raw string where inductor quotes a stack trace."""
    if not trace.replace("\n", "").replace("\t", "").isprintable():
        trace = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in trace)
    return trace.replace(')"', ') "')


def _check_node(item: Any) -> None:
    if item.name is not None:
        _name(item.name)
    problem = _operator_problem(item.target)
    require(problem is None, problem or "")
    extra = sorted(item.metadata.keys() - set(KEPT_METADATA))
    require(not extra, f"metadata {', '.join(extra)[:80]} is not allowed")
    for value in item.metadata.values():
        require(clean_trace(value) == value, "a stack trace holds characters that are not allowed")


def _check_graph(item: Any) -> None:
    for table in (item.tensor_values, item.sym_int_values, item.sym_bool_values, item.sym_float_values):
        for name in table:
            _name(name)
    require(not item.custom_obj_values, "custom objects are not allowed in a saved program")


def count_leaves(spec: str) -> int:
    """The number of leaves of a tree spec made of tuples, lists and dicts."""
    try:
        protocol, tree = json.loads(spec)
        require(protocol == 1, f"tree spec protocol {protocol!r} is not known")
        return _count_leaves(tree)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RefusedError(f"not a tree spec: {spec[:80]!r}") from error


def _count_leaves(tree: Any) -> int:
    kind, context, children = tree["type"], tree["context"], tree["children_spec"]
    if kind is None:
        require(context is None and children == [], "not a tree spec")
        return 1
    require(
        kind in ("builtins.tuple", "builtins.list", "builtins.dict"),
        f"type {str(kind)[:80]!r} in a tree spec",
    )
    if kind == "builtins.dict":
        keys = json.loads(context)
        # torch imports the module that an object in this place names, so it must be a list of names.
        require(isinstance(keys, list) and len(keys) == len(children), f"keys {context[:80]!r} in a tree spec")
        for key in keys:
            _name(key)
    else:
        require(context == "null", f"context {str(context)[:80]!r} in a tree spec")
    return sum(_count_leaves(child) for child in children)


def _check_call(item: Any) -> None:
    count_leaves(item.in_spec)
    count_leaves(item.out_spec)
    for name in item.forward_arg_names or []:
        _name(name)


def _check_module(item: Any) -> None:
    require(not item.metadata and not item.treespec_namedtuple_fields, "metadata of the module is not allowed")
    entries = item.module_call_graph
    require(len(entries) == 1 and entries[0].fqn == "" and entries[0].signature is not None, "one call signature")


def _check_range(item: Any) -> None:
    low, high = item.min_val, item.max_val
    require(low is None or high is None or low <= high, f"range {low}..{high} is empty")


def _check_program(item: Any) -> None:
    major = item.schema_version.major
    require(
        major == compat.SCHEMA_MAJOR,
        f"schema {major} of torch {item.torch_version[:40]}, not {compat.SCHEMA_MAJOR}",
    )
    require(set(item.verifiers) <= _DIALECTS, f"dialect {str(item.verifiers)[:80]} is not known")
    require(not item.guards_code, "guard source code is not allowed in a saved program")
    for name in item.range_constraints:
        # A derived size ("s5 + 1") is only looked up by its text, never parsed.
        require(bool(_RANGED.fullmatch(name)), f"{name[:80]!r} is not a size")


def _anything(item: Any) -> None:
    """The types of its fields are all there is to check."""


CHECKS: dict[str, Callable[[Any], None]] = {
    "ExportedProgram": _check_program,
    "GraphModule": _check_module,
    "Graph": _check_graph,
    "Node": _check_node,
    "Argument": _check_argument,
    "TensorMeta": _check_tensor,
    "Device": _check_device,
    "SymExpr": _check_expression,
    "SymInt": _check_size,
    "RangeConstraint": _check_range,
    "ModuleCallSignature": _check_call,
    "InputToParameterSpec": lambda item: check_weight_name(item.parameter_name),
    "InputToBufferSpec": lambda item: check_weight_name(item.buffer_name),
    "InputToTensorConstantSpec": lambda item: check_weight_name(item.tensor_constant_name),
    "BufferMutationSpec": lambda item: check_weight_name(item.buffer_name),
    "UserInputMutationSpec": lambda item: _name(item.user_input_name),
    **dict.fromkeys(("TensorArgument",), _named),
    **dict.fromkeys(("SymIntArgument", "SymFloatArgument", "SymBoolArgument"), _check_sym_argument),
    **dict.fromkeys(
        (
            "ComplexValue",
            "GraphSignature",
            "InputSpec",
            "ModuleCallEntry",
            "NamedArgument",
            "OptionalTensorArgument",
            "OutputSpec",
            "SchemaVersion",
            "SymBool",
            "SymExprHint",
            "SymFloat",
            "UserInputSpec",
            "UserOutputSpec",
        ),
        _anything,
    ),
}
