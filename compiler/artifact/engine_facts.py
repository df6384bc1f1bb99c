"""What exporters say of the files of an engine (`engine_info` of a manifest), as sessions and bundles read it.

A manifest that was sealed again may say anything: these are the types and bounds it is held to before anything is opened.
Keys that nothing reads stay as they are, for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from optc.compiler.diagnostics import ArtifactError

FileName = Annotated[str, Meta(min_length=1, max_length=255)]
"""A file of the artifact, which must be listed (`engines.check_facts`)."""
_Count = Annotated[int, Meta(ge=0, le=1 << 40)]
_Size = Annotated[int, Meta(ge=1, le=1 << 31)]
_Name = Annotated[str, Meta(max_length=1000)]


class Facts(Struct, frozen=True, kw_only=True):
    """What every engine may have."""

    companions: tuple[_Name, ...] = ()


class Needs(Struct, frozen=True, kw_only=True):
    """What a host must have, as far as it is more than text for people: see `needs` of a manifest."""

    machine: _Name = ""
    torch: _Name = ""
    cpu_flags: tuple[_Name, ...] = ()
    x86_flags_any: tuple[_Name, ...] = ()


class PackageNeeds(Needs, frozen=True, kw_only=True):
    """The same for native code, which crashes where it lacks any of it."""

    machine: _Name
    torch: _Name
    cpu_flags: tuple[_Name, ...]


class OnnxFacts(Facts, frozen=True, kw_only=True):
    """A graph for ONNX Runtime, whose initializers lie beside it; `genai`: onnxruntime-genai can run it; `first`: of a
    decoder that reads an encoder, the graph of its first call."""

    model: FileName
    first: FileName | None = None
    data: FileName | None = None
    genai: bool = False


class PackageInput(Struct, frozen=True, kw_only=True):
    """An input of a package."""

    name: _Name
    role: _Name
    dtype: _Name
    dims: tuple[_Count | _Name, ...]


class PackageConstant(Struct, frozen=True, kw_only=True):
    """A weight that a package asks for."""

    dtype: _Name
    shape: tuple[_Count, ...]


class PackageFacts(Facts, frozen=True, kw_only=True):
    """An AOTInductor package; see `runtime/carried/pt2_runner.py`, which is given the plain values."""

    model: FileName
    weights: FileName
    library: FileName | None = None
    runner: FileName | None = None
    kind: Literal["decoder", "encoder", "module"] = "module"
    kv_cache: Literal["none", "linear", "paged"] = "none"
    block_size: _Count = 0
    vocab_size: _Count = 0
    context_length: _Count = 0
    eos_token_ids: tuple[_Count, ...] = ()
    inputs: tuple[PackageInput, ...]
    outputs: tuple[_Name, ...] = ()
    constants: dict[_Name, PackageConstant]


class ProgramFacts(Facts, frozen=True, kw_only=True):
    """A saved program."""

    graph: FileName
    weights: FileName
    constants: FileName


class PlanFacts(Facts, frozen=True, kw_only=True):
    """A graph for TensorRT with its plan, None where the plan is built on the device."""

    model: FileName
    data: FileName | None = None
    engine: FileName | None = None
    plan: FileName | None = None


class ExecutorchFacts(Facts, frozen=True, kw_only=True):
    """An ExecuTorch program: calls take at most `chunk` tokens."""

    model: FileName
    context_length: _Size
    chunk: _Size
    vocab_size: _Size
    eos_token_ids: tuple[_Count, ...] = ()


class FolderFacts(Facts, frozen=True, kw_only=True):
    """A model folder."""


FactsT = TypeVar("FactsT", bound=Struct)


def read_facts(kind: type[FactsT], info: Mapping[str, Any], where: str) -> FactsT:
    """`engine_info` or `needs` in its types.

    Raises:
        ArtifactError: a key is missing, of another type or out of bounds; names it.
    """
    try:
        return msgspec.convert(dict(info), kind)
    except msgspec.ValidationError as error:
        raise ArtifactError(
            "the manifest says of the engine or of its host what optc does not write",
            where=where,
            why=str(error),
            remedy="copy the artifact again from where it was made, or compile it again",
        ) from error
