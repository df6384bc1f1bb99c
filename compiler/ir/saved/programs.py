"""Programs on disk, without pickle: a graph in JSON, tensors in safetensors.

    graph.json              contract, aliases, and the graph in torch's export schema
    weights.safetensors     parameters and persistent buffers
    constants.safetensors   other buffers, lifted constants, and example inputs as `example/{i}`

Tensors that share memory (tied weights) are stored once; `aliases` maps the other names to the stored
one. Nothing in a file is believed: see `untrusted_graph`. Of node metadata, shapes, stack traces and
module paths are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch
from torch import Tensor
from torch.export import ExportedProgram

from optc.compiler import compat
from optc.compiler.diagnostics import JSON_ERRORS, ArtifactError, InputError, TargetError, os_errors
from optc.compiler.files import read_plain
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.saved.tensors import (
    attach_tensors,
    read_tensors,
    take_examples,
    tensors_to_save,
    write_tensors,
)
from optc.compiler.ir.saved.untrusted_graph import KEPT_METADATA, clean_trace, read_graph
from optc.compiler.json_text import check_values

FORMAT = "optc-program"
FORMAT_VERSION = 1
GRAPH_FILE = "graph.json"
WEIGHTS_FILE = "weights.safetensors"
CONSTANTS_FILE = "constants.safetensors"
MOST_GRAPH, MOST_VALUES = 256 << 20, 8_000_000
"""Bytes of a graph, and values in it: a layer has some 100 kB and 10 000 values, and all of them are objects at once."""
_CANNOT_SAVE = "the program cannot be saved"
_REWRITE = "rewrite these nodes with aten or optc operators over tensors"


class _Header(msgspec.Struct):
    """What every version of the format has."""

    format: str
    version: int
    torch: str


class _GraphFile(_Header, forbid_unknown_fields=True):
    contract: Contract
    aliases: dict[str, str]
    program: dict[str, Any]


# -- save -----------------------------------------------------------------------------------


def write_program(exported: ExportedProgram, contract: Contract, directory: Path, *, examples: bool = True) -> None:
    """Write the parts of a Program into a folder, which is made when absent; files of an older save are replaced.

    Tensors that no node reads are not written. `graph.json` is written last.

    Args:
        examples: False leaves the example inputs out, which nothing needs that only runs the program.

    Raises:
        InputError: the program holds what the format does not (operators of other libraries, inputs
            that are no tensors), or the folder cannot be written.
        ResourceError: the disk is full.
    """
    graph = _graph_values(exported)
    weights, constants, aliases = tensors_to_save(exported, examples=examples)
    header = {"format": FORMAT, "version": FORMAT_VERSION, "torch": torch.__version__}
    content = {
        **header,
        "contract": msgspec.to_builtins(contract),
        "aliases": aliases,
        "program": graph,
    }
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
    _check_readable(data)
    with os_errors("saving a program", str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory / WEIGHTS_FILE, weights)
        write_tensors(directory / CONSTANTS_FILE, constants)
        (directory / GRAPH_FILE).write_bytes(data)


def _graph_values(exported: ExportedProgram) -> dict[str, Any]:
    """torch's schema of the program, less what a Program does not need and a reader cannot check."""
    try:
        graph = compat.serialize_graph(exported)
    except compat.SERDE_ERRORS as error:
        raise InputError(_CANNOT_SAVE, where="graph", why=_root(error)[:500], remedy=_REWRITE) from error
    module = graph["graph_module"]
    module["metadata"], module["treespec_namedtuple_fields"] = {}, {}
    module["module_call_graph"] = module["module_call_graph"][:1]
    for node in module["graph"]["nodes"]:
        node["metadata"] = {key: clean_trace(value) for key, value in node["metadata"].items() if key in KEPT_METADATA}
    for meta in module["graph"]["tensor_values"].values():
        meta["storage_offset"] = {"as_int": 0}  # torch does not read it back; a saved program must not differ
    return graph


def _check_readable(data: bytes) -> None:
    """Refuse to write what `read_program` would refuse to read."""
    try:
        _check_size(data, Path(GRAPH_FILE))
        read_graph(msgspec.json.decode(data)["program"], GRAPH_FILE)
    except ArtifactError as error:
        raise InputError(_CANNOT_SAVE, where=error.where, why=error.why, remedy=_REWRITE) from error


def _check_size(data: bytes, path: Path) -> None:
    if len(data) > MOST_GRAPH:
        damaged(path, f"it has {len(data)} bytes, more than {MOST_GRAPH}")
    try:
        check_values(data, MOST_VALUES)
    except ValueError as error:
        damaged(path, str(error), error)


# -- load -----------------------------------------------------------------------------------


def read_program(directory: Path) -> tuple[ExportedProgram, Contract]:
    """Read what `write_program` wrote; not yet verified. Weights are mapped from the file, not copied.

    Raises:
        ArtifactError: a file is missing, damaged, of another version, or says what is not allowed;
            names the file and the place in it.
        TargetError: the program runs on CUDA and this machine has none.
    """
    path = directory / GRAPH_FILE
    file = _read_graph_file(path)
    graph = read_graph(file.program, str(path))
    require_devices(graph, path)
    tables: list[dict[str, Tensor]] = []
    for name in (WEIGHTS_FILE, CONSTANTS_FILE):
        try:
            tables.append(read_tensors(directory / name))
        except ValueError as error:
            damaged(directory / name, str(error), error)
    weights, constants = tables
    try:
        examples = take_examples(graph, constants)
        attach_tensors(graph, weights, constants, file.aliases)
    except ValueError as error:
        damaged(directory, str(error), error)
    return deserialize(graph, weights, constants, examples, path), file.contract


def deserialize(
    graph: Any, weights: dict[str, Tensor], constants: dict[str, Tensor], examples: list[Tensor], path: Path
) -> ExportedProgram:
    call = graph.graph_module.module_call_graph[0].signature
    try:
        inputs = compat.unflatten_inputs(call.in_spec, examples) if examples else None
        return compat.deserialize_graph(graph, weights, constants, inputs)
    except compat.SERDE_ERRORS as error:
        damaged(path, _root(error), error)


def _root(error: BaseException) -> str:
    """The first cause of an exception: torch wraps it in pages of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def require_devices(graph: Any, path: Path) -> None:
    metas = graph.graph_module.graph.tensor_values.values()
    if any(meta.device.type == "cuda" for meta in metas) and not torch.cuda.is_available():
        remedy = "load it on a machine with CUDA"
        raise TargetError("the saved program runs on cuda, which this machine lacks", where=str(path), remedy=remedy)


def damaged(path: Path, why: str, cause: Exception | None = None) -> NoReturn:
    """Raise the error for a file of a saved program that cannot be right."""
    remedy = "save the program again"
    raise ArtifactError("the saved program is damaged", where=str(path), why=why[:500], remedy=remedy) from cause


def _read_graph_file(path: Path) -> _GraphFile:
    try:
        data = read_plain(path, "reading a saved program", most=MOST_GRAPH)
    except InputError as error:
        damaged(path, error.why or error.what, error)
    _check_size(data, path)
    try:
        header = msgspec.json.decode(data, type=_Header)
        if (header.format, header.version) != (FORMAT, FORMAT_VERSION):
            found = f"'{header.format[:40]}' version {header.version} (torch {header.torch[:40]})"
            damaged(path, f"it is {found}; this optc reads '{FORMAT}' version {FORMAT_VERSION}")
        file = msgspec.json.decode(data, type=_GraphFile)
    except JSON_ERRORS as error:
        damaged(path, str(error), error)
    strange = [text for text in _strings(msgspec.to_builtins(file.contract)) if not text.isprintable()]
    if strange:
        damaged(path, f"the contract holds {strange[0][:80]!r}")
    return file


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
