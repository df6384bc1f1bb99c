"""A `.pt2` that `torch.export.save` wrote, read without pickle and without running code.

    NAME/archive_format                              "pt2"
    NAME/models/MODEL.json                           the graph in torch's export schema
    NAME/data/weights/MODEL_weights_config.json      weight -> file of raw bytes, type, sizes, strides
    NAME/data/constants/MODEL_constants_config.json  the same for lifted constants and buffers that are not saved
    NAME/data/sample_inputs/MODEL.pt                 a pickle: not read

torch's own reader unpickles the sample inputs and tensors of other classes. Here the archive's members, sizes and the
graph are checked as those of a saved program are (`untrusted_graph`); what is not needed is not opened.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch
from torch import Tensor
from torch.export import ExportedProgram

from optc.compiler import compat
from optc.compiler.diagnostics import JSON_ERRORS, ArtifactError, InputError, os_errors
from optc.compiler.ir.saved.programs import MOST_GRAPH, MOST_VALUES, deserialize, require_devices
from optc.compiler.ir.saved.strict_decoding import RefusedError, decode
from optc.compiler.ir.saved.tensors import attach_tensors, expected_tensors
from optc.compiler.ir.saved.untrusted_graph import CHECKS, KEPT_METADATA, clean_trace, read_graph
from optc.compiler.json_text import check_values

SUFFIX = ".pt2"
MOST_MEMBERS = 100_000
"""A tensor has a file of its own."""
_BROKEN = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, struct.error)
"""What zipfile raises on bytes that are no archive, or no member of one: names in no encoding among them."""
MOST_DIRECTORY = 16 << 20
"""Bytes of the archive's list of members: as objects they take ten times as many, before they can be counted."""
_MOST_WORD = 100  # bytes of a member that holds a word
MOST_REPEATED = 1 << 28
"""Bytes that an expanded tensor, whose elements share memory, may stand for: passes write them out."""
_REMEDY = "export it again: torch.export.save(torch.export.export(module, inputs), FILE)"


def is_exported_file(path: Path) -> bool:
    """Whether a path is a file whose name says that it holds an exported program."""
    return path.suffix == SUFFIX and path.is_file()


def read_exported(path: Path) -> ExportedProgram:
    """The program of a file of `torch.export.save`; its inputs and outputs are flat.

    Raises:
        InputError: it is no such archive, is damaged, or holds what may not be read or run; names the member.
        TargetError: the program runs on CUDA and this machine has none.
    """
    with os_errors("reading an exported program", str(path)):
        file = _BoundedFile(path)
        try:
            archive = zipfile.ZipFile(file)
        except _BROKEN as error:
            file.close()
            _refuse(path, f"it is no archive: {error}", error)
        file.is_bounded = False
        try:
            with file, archive:
                return _read(_Members(archive, path), path)
        except ArtifactError as error:
            raise InputError(
                "the exported program is damaged, or holds what is not run",
                where=error.where,
                why=error.why,
                remedy=_REMEDY,
            ) from error


def _refuse(where: Path | str, why: str, cause: BaseException | None = None) -> NoReturn:
    raise InputError("the exported program cannot be read", where=str(where), why=why, remedy=_REMEDY) from cause


class _BoundedFile(io.FileIO):
    """A file of which no more is read at once than the list of members may have, while zipfile reads that."""

    is_bounded = True

    def read(self, size: int | None = -1) -> bytes:
        """As of any file.

        Raises:
            BadZipFile: more is asked for.
        """
        if self.is_bounded and size is not None and size > MOST_DIRECTORY:
            raise zipfile.BadZipFile(f"its list of members has {size} bytes, more than {MOST_DIRECTORY}")
        return super().read(size) or b""


class _Members:
    """The members of an archive under its one root folder, whose sizes are known before any is read."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive, self._path = archive, path
        found = archive.infolist()
        names = [member.filename for member in found]
        root = names[0].partition("/")[0] if names else ""
        if not root or len(set(names)) != len(names) or len(names) > MOST_MEMBERS:
            _refuse(path, f"the archive has {len(names)} members, some of them twice or too many")
        if any(not name.startswith(f"{root}/") for name in names):
            _refuse(path, "the archive has more than one folder")
        for member in found:
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                _refuse(self._at(member.filename), "it is compressed or encrypted, which torch.export.save does not do")
        if sum(member.file_size for member in found) > path.stat().st_size:
            _refuse(path, "its members are larger than the archive")
        self._found = {member.filename.removeprefix(f"{root}/"): member for member in found}

    def __iter__(self) -> Any:
        return iter(self._found)

    def read(self, name: str, most: int | None = None) -> bytes:
        """A member's bytes, whose checksum is right; no more than `most` of them."""
        member = self._found.get(name)
        if member is None:
            _refuse(self._path, f"the member {name[:200]!r} is missing")
        if most is not None and member.file_size > most:
            _refuse(self._at(name), f"it has {member.file_size} bytes, more than {most}")
        try:
            return self._archive.read(member)
        except _BROKEN as error:
            _refuse(self._at(name), f"the archive is damaged: {error}", error)

    def read_json(self, name: str) -> Any:
        """A member as JSON values."""
        try:
            data = self.read(name, MOST_GRAPH)
            check_values(data, MOST_VALUES)
            return msgspec.json.decode(data)
        except JSON_ERRORS as error:
            _refuse(self._at(name), str(error), error)

    def _at(self, name: str) -> str:
        return f"{self._path}: {name[:200]!r}"


def _read(members: _Members, path: Path) -> ExportedProgram:
    if "serialized_exported_program.json" in members:
        _refuse(path, "torch before 2.8 wrote it, with its weights as a pickle")
    if "archive_format" not in members or members.read("archive_format", _MOST_WORD) != b"pt2":
        _refuse(path, "it is no archive of torch.export.save")
    if "byteorder" in members and members.read("byteorder", _MOST_WORD) != b"little":
        _refuse(path, "its numbers are big-endian")
    names = [name for name in members if name.startswith("models/")]
    if any(name.startswith("data/aotinductor/") for name in members) or len(names) != 1:
        _refuse(path, f"it holds {len(names)} graphs, and may hold compiled code, not one graph alone")
    model = names[0].removeprefix("models/").removesuffix(".json")
    graph = read_graph(_flat(members.read_json(names[0]), path), f"{path}: {names[0]}")
    require_devices(graph, path)
    expected = {name for name, _ in _expected(graph, path)}
    weights = _tensors(members, "data/weights", f"{model}_weights_config.json", expected, path)
    constants = _tensors(members, "data/constants", f"{model}_constants_config.json", expected - weights.keys(), path)
    try:
        attach_tensors(graph, weights, constants, {})
    except ValueError as error:
        _refuse(path, str(error), error)
    return deserialize(graph, weights, constants, [], path)


def _expected(graph: Any, path: Path) -> list[tuple[str, Any]]:
    try:
        return list(expected_tensors(graph))
    except ValueError as error:
        _refuse(path, str(error), error)


# -- the graph -------------------------------------------------------------------------------


def _flat(data: Any, path: Path) -> Any:
    """What `read_graph` takes of a graph of torch's: without guards, notes and the calls of inner modules, and with flat
    inputs and outputs. Where the values have another form, they are left for it to refuse."""
    try:
        module = data["graph_module"]
        signature, entry = module["signature"], module["module_call_graph"][0]
        inputs = [spec["user_input"]["arg"] for spec in signature["input_specs"] if "user_input" in spec]
        outputs = sum("user_output" in spec for spec in signature["output_specs"])
        names = [arg["as_tensor"]["name"] for arg in inputs if "as_tensor" in arg]
        if len(names) != len(inputs):
            _refuse(path, "it takes something else than tensors")
        call: dict[str, Any] = {"inputs": [], "outputs": [], "forward_arg_names": names}
        call |= {"in_spec": _spec(_tuple(len(names)), _EMPTY), "out_spec": f"[1, {_tuple(outputs)}]"}
        module["module_call_graph"] = [{"fqn": entry["fqn"], "signature": call}]
        module["metadata"], module["treespec_namedtuple_fields"], data["guards_code"] = {}, {}, []
        for node in module["graph"]["nodes"]:
            kept = {key: text for key, text in node["metadata"].items() if key in KEPT_METADATA}
            node["metadata"] = {key: clean_trace(text) for key, text in kept.items()}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        _refuse(path, f"its graph has another form than torch's: {type(error).__name__}: {error}", error)
    return data


_LEAF = '{"type": null, "context": null, "children_spec": []}'
_EMPTY = '{"type": "builtins.dict", "context": "[]", "children_spec": []}'


def _tuple(count: int) -> str:
    leaves = ", ".join([_LEAF] * count)
    return f'{{"type": "builtins.tuple", "context": "null", "children_spec": [{leaves}]}}'


def _spec(args: str, kwargs: str) -> str:
    return f'[1, {{"type": "builtins.tuple", "context": "null", "children_spec": [{args}, {kwargs}]}}]'


# -- tensors ---------------------------------------------------------------------------------


def _tensors(members: _Members, folder: str, config: str, wanted: set[str], path: Path) -> dict[str, Tensor]:
    """The tensors of a folder that the graph reads."""
    name = f"{folder}/{config}"
    if name not in members:
        return {}
    table = members.read_json(name)
    entries = table.get("config") if isinstance(table, dict) else None
    if not isinstance(entries, dict):
        _refuse(path, f"{name} has another form than torch's")
    storages: dict[str, bytearray] = {}
    found: dict[str, Tensor] = {}
    for key in sorted(wanted & entries.keys()):
        try:
            payload = decode(compat.graph_schema.PayloadMeta, entries[key], _PAYLOAD)
        except RefusedError as error:
            _refuse(f"{path}: {name}: {key[:80]}", str(error), error)
        if payload.use_pickle or payload.tensor_meta is None:
            _refuse(f"{path}: {name}: {key[:80]}", "it is a pickle: an object, or a tensor of another class")
        place = f"{folder}/{payload.path_name}"
        if place not in storages:
            storages[place] = bytearray(members.read(place))
        found[key] = _tensor(storages[place], payload.tensor_meta, f"{path}: {key[:80]}")
    return found


_PAYLOAD: Mapping[str, Any] = {**CHECKS, "PayloadMeta": lambda item: None}


def _tensor(storage: bytearray, meta: Any, where: str) -> Tensor:
    """A tensor over the bytes of a member, inside of which all of its elements lie."""
    shape, strides = compat.static_shape(meta.sizes), compat.static_shape(meta.strides)
    offset = compat.static_shape([meta.storage_offset])
    if shape is None or strides is None or offset is None or min((*shape, *strides, *offset)) < 0:
        _refuse(where, "its sizes are no numbers")
    dtype = compat.torch_dtype(meta.dtype)
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    last = offset[0] + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    if (last + 1) * dtype.itemsize > len(storage):
        _refuse(where, f"{len(storage)} bytes do not hold {dtype} {list(shape)}")
    if math.prod(shape) * dtype.itemsize > max(len(storage), MOST_REPEATED):
        _refuse(where, f"{len(storage)} bytes stand for {math.prod(shape)} numbers, each many times")
    return torch.frombuffer(storage, dtype=dtype, count=last + 1).as_strided(shape, strides, offset[0])
