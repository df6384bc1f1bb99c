"""What an ONNX file of an artifact may say, checked before an engine parses it.

ONNX Runtime, `onnx.load` and `onnx.checker` each take files that the others refuse: weights outside the
folder through links, offsets behind the end of a file, lengths that do not fit the shape, operators that
run subgraphs. optc writes one plain form (flat graph, allow-listed operators, weights in files beside
the model, aligned and not overlapping), so everything else is refused here. Only the protobuf message is
decoded; no tensor is read.
"""

from __future__ import annotations

import math
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optc.compiler.artifact.onnx_folding import folded_numbers, inferred
from optc.compiler.artifact.onnx_schemas import MICROSOFT, misfit
from optc.compiler.artifact.publishing import leftovers
from optc.compiler.diagnostics import ArtifactError, TargetError

DOMAINS = {"": range(17, 25), "com.microsoft": range(1, 2)}
"""Domain -> operator set versions. From 25 on, ONNX Runtime's CPU Attention has no kernel."""

_STANDARD = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BitwiseAnd BitwiseNot
    BitwiseOr BitwiseXor Cast Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh
    CumSum DepthToSpace DequantizeLinear Div Einsum Elu Equal Erf Exp Expand Flatten Floor Gather
    GRU GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual
    GridSample GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN LayerNormalization
    LSTM LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Mean Min Mish Mod Mul Neg NonZero Not OneHot
    Or PRelu Pad Pow QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSumExp
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize RotaryEmbedding
    RNN Round ScatterElements ScatterND Selu Shape Sigmoid Sign SimplifiedLayerNormalization Sin Sinh Size Slice
    Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh TensorScatter Tile TopK
    Transpose Trilu Unsqueeze Where Xor
    """
STANDARD_OPS = frozenset(_STANDARD.split())
"""Pure functions of tensors: nothing that runs a subgraph, reads a file or draws random numbers."""

_ITEM_SIZES = {1: 4, 2: 1, 3: 1, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2, 17: 1}
"""TensorProto.DataType -> bytes: float, uint8, int8, int16, int32, int64, bool, float16, double, bfloat16, fp8 E4M3."""
_HALF_BYTES = frozenset((21, 22))
"""TensorProto.DataType of two elements per byte: uint4, int4."""
_TYPED_FIELDS = {1: "float_data", 6: "int32_data", 7: "int64_data", 11: "double_data"} | dict.fromkeys(
    (2, 3, 5, 9, 10, 16, 17), "int32_data"
)
_PLAIN_ATTRIBUTES = {1, 2, 3, 4, 6, 7, 8}  # float, int, string, tensor, and lists of the numbers and strings
_DATA_FIELDS = (
    "raw_data",
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
)
_EXTERNAL = 1
_MAX_MODEL = 1 << 28
_MOST_FOLDED = 1 << 28
"""Numbers that follow from constants: tables of positions, of a context of a million tokens at most."""
_MAX_RANK, _MAX_SIZE = 16, 1 << 48
_REMEDY = "copy the artifact again from where it was made, or compile it again"


@dataclass(frozen=True)
class OnnxSummary:
    """What a checked model holds.

    Attributes:
        operators: "domain.Operator" (no prefix for the standard domain) -> count, most frequent first.
        inputs, outputs: names of the graph's inputs and outputs, in order.
        weight_bytes: bytes of all initializers, as stored.
        data_files: names of the files that hold them, beside the model.
    """

    operators: dict[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight_bytes: int
    data_files: tuple[str, ...]


@dataclass(frozen=True)
class _Span:
    """Where an initializer lies in its file."""

    start: int
    end: int
    name: str


class _RefusedError(Exception):
    """Raised with a reason; becomes an ArtifactError that names the file."""


def check_onnx(folder: Path, filename: str) -> OnnxSummary:
    """Check a model and the layout of its external data without reading any weight.

    Args:
        folder: the artifact; hashes are checked elsewhere (`artifact.verify`).
        filename: the model's bare file name in it.

    Raises:
        ArtifactError: names the file and what in it is not as optc writes it (7).
        TargetError: the onnx package, which decodes the message, is not installed (4).
    """
    try:
        return _check(folder, filename)
    except (_RefusedError, OSError) as error:
        raise ArtifactError(
            "the ONNX model is damaged or not trusted",
            where=str(folder / filename),
            why=str(error),
            remedy=_REMEDY,
        ) from error


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _RefusedError(reason)


def _check(folder: Path, filename: str) -> OnnxSummary:
    size = _plain_file(folder, filename)
    _require(0 < size <= _MAX_MODEL, f"the model file has {size} bytes")
    model = _decode((folder / filename).read_bytes())
    version = _check_header(model)
    graph = model.graph
    spans: dict[str, list[_Span]] = {}
    weight_bytes = 0
    for tensor in graph.initializer:
        weight_bytes += _check_tensor(tensor, f"initializer {tensor.name!r}", spans)
    for location, found in spans.items():
        _check_spans(folder, filename, location, found)
    operators: Counter[str] = Counter()
    for node in graph.node:
        _check_node(node, version)
        operators[f"{node.domain}.{node.op_type}".lstrip(".")] += 1
    _check_flow(graph)
    _check_folding(model)
    return OnnxSummary(
        operators=dict(operators.most_common()),
        inputs=tuple(item.name for item in graph.input),
        outputs=tuple(item.name for item in graph.output),
        weight_bytes=weight_bytes,
        data_files=tuple(sorted(spans)),
    )


def _decode(data: bytes) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as error:
        raise TargetError(
            "the onnx package is not installed", why=str(error), remedy='pip install "optc[onnx]"'
        ) from error
    try:
        return onnx.ModelProto.FromString(data)
    except (DecodeError, RecursionError) as error:
        raise _RefusedError(f"not an ONNX message: {error}") from error


def _check_header(model: Any) -> int:
    """The version of the standard operators."""
    versions: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        allowed = DOMAINS.get(domain)
        _require(allowed is not None, f"operator domain {entry.domain!r} is not allowed")
        _require(domain not in versions, f"operator domain {entry.domain!r} is imported twice")
        _require(entry.version in (allowed or ()), f"operator set {entry.domain!r} {entry.version}")
        versions[domain] = entry.version
    _require("" in versions, "it imports no standard operators")
    _require(not model.functions, "it defines functions")
    _require(not model.training_info, "it holds training graphs")
    _require(not model.graph.sparse_initializer, "it holds sparse tensors")
    return versions[""]


def _check_node(node: Any, version: int) -> None:
    what = f"node {node.name!r} ({node.op_type})"
    allowed = {"": STANDARD_OPS, "com.microsoft": MICROSOFT}.get(node.domain)
    _require(allowed is not None, f"{what}: domain {node.domain!r} is not allowed")
    _require(node.op_type in (allowed or ()), f"{what}: the operator is not allowed")
    _require(not node.overload, f"{what}: it names a function")
    for attribute in node.attribute:
        kind = f"{what}: attribute {attribute.name!r}"
        _require(attribute.type in _PLAIN_ATTRIBUTES, f"{kind} is not a number, string or tensor")
        _require(not attribute.ref_attr_name, f"{kind} refers to a function's")
        _require(not (attribute.HasField("g") or attribute.graphs), f"{kind} holds a graph")
        if attribute.HasField("t"):
            _require(attribute.t.data_location != _EXTERNAL, f"{kind} is kept outside the model")
            _check_tensor(attribute.t, kind, {})
    wrong = misfit(node, version)
    _require(wrong is None, f"{what}: {wrong}")


def _check_flow(graph: Any) -> None:
    """Every value is made once, before it is read."""
    known: set[str] = set()
    inputs, initializers = [[item.name for item in items] for items in (graph.input, graph.initializer)]
    for kind, names in (("input", inputs), ("initializer", initializers)):
        for name, count in Counter(names).items():
            _require(isinstance(name, str) and bool(name) and count == 1, f"{kind} {name!r} has no name of its own")
        known.update(names)  # an initializer of an input's name is what it is where nothing is fed
    for node in graph.node:
        for name in node.input:
            _require(not name or name in known, f"node {node.name!r} reads {name!r}, which is not computed yet")
        for name in filter(None, node.output):
            _require(name not in known, f"node {node.name!r} computes {name!r} again")
            known.add(name)
    for item in graph.output:
        _require(item.name in known, f"output {item.name!r} is never computed")


def _check_folding(model: Any) -> None:
    """Types and shapes fit, and what the engine computes while it opens the model takes bounded memory."""
    found = inferred(model)
    _require(not isinstance(found, str), f"types or shapes do not fit: {found}")
    count = folded_numbers(found)
    if isinstance(count, str):
        raise _RefusedError(count)
    _require(count <= _MOST_FOLDED, f"{count} numbers are computed from constants")


# -- tensors -----------------------------------------------------------------------------------


def _check_tensor(tensor: Any, what: str, spans: dict[str, list[_Span]]) -> int:
    """Check one tensor; its size in bytes. External ones are noted in `spans`."""
    half = tensor.data_type in _HALF_BYTES
    item = 1 if half else _ITEM_SIZES.get(tensor.data_type)
    if item is None:
        raise _RefusedError(f"{what} has the element type {tensor.data_type}")
    dims = list(tensor.dims)
    _require(len(dims) <= _MAX_RANK and all(0 <= dim < _MAX_SIZE for dim in dims), f"{what} has shape {dims}")
    count = math.prod(dims)
    size = (count + 1) // 2 if half else count * item
    _require(size < _MAX_SIZE, f"{what} has shape {dims}")
    _require(not tensor.HasField("segment"), f"{what} is split into segments")
    if tensor.data_location == _EXTERNAL:
        _require(_inline_fields(tensor) == [], f"{what} is kept both in the model and outside")
        location, start = _external(tensor, what, size, item)
        spans.setdefault(location, []).append(_Span(start, start + size, tensor.name))
        return size
    _require(not tensor.external_data, f"{what} names external data, but is kept in the model")
    filled = _inline_fields(tensor)
    expected = {"raw_data": size}
    if not half:
        expected[_TYPED_FIELDS[tensor.data_type]] = count
    fits = not count if not filled else len(filled) == 1 and expected.get(filled[0][0]) == filled[0][1]
    _require(fits, f"{what}: its data do not fit the shape {dims}")
    return size


def _inline_fields(tensor: Any) -> list[tuple[str, int]]:
    """The data fields that hold something, with their lengths."""
    lengths = [(name, len(getattr(tensor, name))) for name in _DATA_FIELDS]
    return [(name, length) for name, length in lengths if length]


def _external(tensor: Any, what: str, size: int, item: int) -> tuple[str, int]:
    """File name and offset of an external tensor of `size` bytes, of elements of `item` bytes."""
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        _require(entry.key in ("location", "offset", "length"), f"{what}: unknown key {entry.key!r}")
        _require(entry.key not in entries, f"{what}: {entry.key} is given twice")
        # Text that is not UTF-8 comes out of the decoder as bytes.
        _require(isinstance(entry.value, str), f"{what}: {entry.key} is not a string")
        entries[entry.key] = entry.value
    _require(len(entries) == 3, f"{what}: location, offset or length is missing")
    location = entries["location"]
    _require(is_bare_name(location), f"{what}: {location!r} is not a bare file name")
    numbers = {}
    for key in ("offset", "length"):
        text = entries[key]
        _require(text.isascii() and text.isdigit() and len(text) < 16, f"{what}: {key} {text!r}")
        numbers[key] = int(text)
    _require(numbers["length"] == size, f"{what}: {numbers['length']} bytes, but its shape takes {size}")
    _require(numbers["offset"] % item == 0, f"{what}: offset {numbers['offset']} is not aligned")
    return location, numbers["offset"]


def _check_spans(folder: Path, model: str, location: str, spans: Iterable[_Span]) -> None:
    _require(location != model, "weights lie in the model file itself")
    size = _plain_file(folder, location)
    behind = _Span(0, 0, "")
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        where = f"byte {span.end} of {location!r}, which has {size}"
        _require(span.end <= size, f"initializer {span.name!r} ends at {where}")
        if span.end > span.start:
            _require(span.start >= behind.end, f"initializers {behind.name!r} and {span.name!r} overlap")
            behind = span


# -- files -------------------------------------------------------------------------------------


def is_bare_name(name: str) -> bool:
    """Whether a name is that of a file in the folder itself, on any system: no separator, no `..`."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set('/\\:*?"<>|')


def _plain_file(folder: Path, name: str) -> int:
    """The size of a regular file without other names, directly in the folder."""
    _require(is_bare_name(name), f"{name!r} is not a bare file name")
    path = folder / name
    try:
        info = path.lstat()
    except FileNotFoundError as error:
        raise _RefusedError(f"the file {name!r} is missing") from error
    _require(stat.S_ISREG(info.st_mode), f"{name!r} is a link or something else that is not a regular file")
    # An artifact being rewritten shares its files with a temporary sibling of ours; nobody else may.
    others = [sibling / name for sibling in leftovers(folder.resolve())]
    known = sum(other.is_file() and other.samefile(path) for other in others)
    _require(info.st_nlink <= 1 + known, f"{name!r} has {info.st_nlink - 1 - known} more hard links")
    return info.st_size
