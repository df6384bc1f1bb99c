"""model.h: what the manifest says, as constants of the C++ program. So the program needs no parser."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from optc.compiler.artifact.engine_facts import Needs, PackageFacts, PackageInput, PackageNeeds, read_facts
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import ArtifactError
from optc.compiler.formats.safetensors_header import read_header, shown
from optc.compiler.ir.contract import CACHE_ROLES

_CODES = {
    "F32": "kFloat32",
    "F16": "kFloat16",
    "BF16": "kBFloat16",
    "F64": "kFloat64",
    "I64": "kInt64",
    "I32": "kInt32",
    "I16": "kInt16",
    "I8": "kInt8",
    "U8": "kUInt8",
    "BOOL": "kBool",
}
_TYPES = {
    "float32": "kFloat32",
    "float16": "kFloat16",
    "bfloat16": "kBFloat16",
    "float64": "kFloat64",
    "int64": "kInt64",
    "int32": "kInt32",
    "int16": "kInt16",
    "int8": "kInt8",
    "uint8": "kUInt8",
    "bool": "kBool",
}
"""safetensors' and the contract's names of types -> those of the program."""


def genai_header(manifest: Manifest) -> str:
    """The constants of a program over onnxruntime-genai."""
    needs = read_facts(Needs, manifest.needs, "manifest.json: needs")
    return _header(manifest, manifest.contract.model.context_length, "", (), needs.x86_flags_any)


def aotinductor_header(manifest: Manifest, folder: Path) -> str:
    """The constants of a program over AOTInductor: caches and the places of the weights as well.

    Args:
        folder: of the artifact, for the header of its weights.
    """
    info = read_facts(PackageFacts, manifest.engine_info, "manifest.json: engine_info")
    needs = read_facts(PackageNeeds, manifest.needs, "manifest.json: needs")
    files = {entry.path: entry.size for entry in manifest.files}
    lines = [
        f"constexpr const char* kWeightsFile = {quoted(info.weights)};",
        f"constexpr const char* kLibraryFile = {quoted(info.library or '')};",
        f"constexpr std::int64_t kEngineBytes = {files[info.model]}, kWeightsBytes = {files[info.weights]};",
        f"constexpr const char* kTorchVersion = {quoted(needs.torch)};",
        f"constexpr bool kPaged = {'true' if info.kv_cache == 'paged' else 'false'};",
        f"constexpr std::int64_t kBlockSize = {info.block_size};",
        "",
        "enum Type { kFloat32, kFloat16, kBFloat16, kFloat64, kInt64, kInt32, kInt16, kInt8, kUInt8, kBool };",
        "// A KV cache: [batch, heads, capacity, width], or [blocks, block size, heads, width] when paged.",
        "struct Cache {\n  Type type;\n  std::int64_t heads, width;\n};",
        *_array("Cache", "kCaches", [_cache(item) for item in info.inputs if item.role in CACHE_ROLES]),
        "// A tensor of the weights: its shape, and where its bytes begin in the file.",
        "struct Weight {\n  const char* name;\n  Type type;\n  std::int64_t offset;\n  int rank;\n"
        "  std::int64_t shape[8];\n};",
        *_array("Weight", "kWeights", _weights(folder / info.weights)),
    ]
    return _header(manifest, info.context_length, needs.machine, needs.cpu_flags, (), lines)


def quoted(text: str) -> str:
    """A C++ string literal of any text."""
    return '"' + "".join(map(_escaped, text.encode())) + '"'


def _escaped(byte: int) -> str:
    plain = 32 <= byte < 127 and chr(byte) not in '"\\?'
    return chr(byte) if plain else f"\\{byte:03o}"


def _header(
    manifest: Manifest, context: int, machine: str, every: Iterable[str], some: Iterable[str], lines: Iterable[str] = ()
) -> str:
    model = manifest.contract.model
    rows = [
        "// The model of this bundle, written by optc from manifest.json.",
        "#pragma once\n",
        "#include <array>",
        "#include <cstdint>\n",
        "namespace optc {\n",
        f"constexpr const char* kEngineFile = {quoted(manifest.engine_info['model'])};",
        f"constexpr std::int64_t kVocabSize = {model.vocab_size};",
        f"constexpr std::int64_t kContextLength = {context};  // 0: not known",
        *_array("std::int64_t", "kEndOfText", map(str, model.eos_token_ids)),
        f"constexpr const char* kMachine = {quoted(machine)};  // empty: any",
        *_array("const char*", "kEveryFlag", map(quoted, every)),
        *_array("const char*", "kAnyFlag", map(quoted, some)),
        *lines,
        "\n}  // namespace optc\n",
    ]
    return "\n".join(rows)


def _array(kind: str, name: str, items: Iterable[str]) -> list[str]:
    rows = list(items)
    long = sum(map(len, rows)) > 80
    body = "".join(f"\n    {row}," for row in rows) + "\n" if long else ", ".join(rows)
    return [
        f"constexpr std::array<{kind}, {len(rows)}> {name}{{{{{body}}}}};"
        if rows
        else f"constexpr std::array<{kind}, 0> {name}{{}};"
    ]


def _cache(item: PackageInput) -> str:
    numbers = [size for size in item.dims if isinstance(size, int)]
    if len(numbers) < 2 or item.dtype not in _TYPES:
        raise ArtifactError(
            "the manifest describes a KV cache as optc does not",
            where=f"manifest.json: engine_info, input {item.name}",
            why=f"{item.dtype} {list(item.dims)}",
            remedy="compile the model again",
        )
    heads, width = numbers[-2:]
    return f"{{{_TYPES[item.dtype]}, {heads}, {width}}}"


def _weights(path: Path) -> list[str]:
    rows = []
    for name, info in read_header(path).items():
        if len(info.shape) > 8 or info.dtype not in _CODES:
            raise ArtifactError(
                "the program cannot read the weights",
                where=f"{path}: tensor '{shown(name)}'",
                why=f"it is {info.dtype} with {len(info.shape)} axes",
                remedy="compile the model again",
            )
        shape = ", ".join(map(str, info.shape))
        rows.append(f"{{{quoted(name)}, {_CODES[info.dtype]}, {info.offset}, {len(info.shape)}, {{{shape}}}}}")
    return rows
