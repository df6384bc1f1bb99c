"""manifest.json: what an artifact is, and the proof that it is intact.

The file seals itself: `self_sha256`, its last field, is the sha256 of the file's own bytes with that
field empty. One changed byte anywhere, white space included, is noticed.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from optc.compiler.artifact.engines import find_engine
from optc.compiler.artifact.sizes import Sizes
from optc.compiler.artifact.trust import is_machine_mark, machine_mark
from optc.compiler.diagnostics import JSON_ERRORS, ArtifactError
from optc.compiler.ir.contract import Contract, Count
from optc.compiler.ir.proof import CaptureProof
from optc.compiler.nesting import check_nesting
from optc.compiler.rewriting.quantization_record import LinearRecord

FORMAT_VERSION = 3
FILE_NAME = "manifest.json"

_Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_SEAL = re.compile(rb'"self_sha256": "([0-9a-f]{64})"\n}\n\Z')
_EMPTY_SEAL = b'"self_sha256": ""\n}\n'
_REMEDY = "copy the artifact again from where it was made, or compile it again"


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of the artifact: POSIX path inside the folder, size in bytes, sha256 in hex."""

    path: str
    size: Count
    sha256: _Sha256


class DriftRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the outputs on the gate's inputs are from a reference's.

    Attributes:
        max_abs_diff: largest absolute change.
        relative_error: |after - before| / |before|, of logits less their mean; of several outputs the worst. None where
            the reference is zero.
        cosine: mean over tokens; of several outputs the least.
        kl: mean KL(reference || stage), nats per token; None without a distribution.
        top1_agreement: share of equal argmax tokens.
        perplexity_increase: relative, on the gate's text; None without text.
    """

    max_abs_diff: float
    relative_error: float | None = None
    cosine: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    perplexity_increase: float | None = None


class AllowedRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the gate allowed a stage to have lost since the capture: `DriftRecord`'s fields of the same names.

    Attributes:
        relative_error, kl, perplexity_increase: at most; the sum of the budgets of the passes so far, or the user's limit.
        top1_agreement: at least, over all tokens; budgets judge decided tokens alone, so only a user's limit is here.

    None where there is no limit, or the user took it away.
    """

    relative_error: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    perplexity_increase: float | None = None


Role = Literal["model", "encoder", "draft", "heads"]
"""What a program of an artifact is for: the model itself; the encoder that it reads; a smaller model, or heads on it, that
guess its next tokens."""


class PassRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one pass did.

    Attributes:
        options: the pass's settings.
        matched, candidates: sites rewritten, and sites that could have been.
        seconds: wall time of the pass with its verification and gate.
        lossy: whether it may change the numbers (then its budget was checked, not a tolerance).
        program: the program of the artifact that it rewrote.
        rounds_activations: whether it is lossy and made the program round activations, or more of them.
        drift: from the stage before; None when the pass matched nothing. since_capture: what is lost in all.
        allowed: what `since_capture` was held to; None while every pass had to keep the numbers.
        layer_drift: per attention layer, relative L2 change of its output.
        nodes: graph nodes after the pass.
        notes, misses: what the pass says, and why near-misses were left alone.
        linears: per weight that a quantization pass rounded.
    """

    name: str
    options: dict[str, str | int | float | bool | list[Any] | None]
    matched: Count
    candidates: Count
    seconds: float
    lossy: bool
    drift: DriftRecord | None
    since_capture: DriftRecord | None
    allowed: AllowedRecord | None = None
    layer_drift: tuple[float, ...]
    nodes: Count
    notes: tuple[str, ...]
    misses: tuple[str, ...]
    linears: tuple[LinearRecord, ...] = ()
    rounds_activations: bool = False
    program: Role = "model"


class OpenedRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the written file computed in its engine, beside the last stage, before it was published.

    Attributes:
        opened: False where the engine could not be asked; `why` says why.
        engine, version: what opened it; empty when nothing did.
        tokens: fed; 0 for the inputs of a plain module.
        max_abs_diff: of the outputs. scale: largest magnitude of the last stage's outputs.
        relative: L2 norm of the difference over that of the last stage's outputs. limit: what it was held to;
            None where each output and cache was held to the largest difference of its type, or where the user took the
            limit away (`Manifest.limits`).
        kl, top1: of the distributions, where the outputs are one.
        seconds: to open, run and compare.
    """

    opened: bool
    why: str = ""
    engine: str = ""
    version: str = ""
    tokens: int = 0
    max_abs_diff: float | None = None
    scale: float | None = None
    relative: float | None = None
    limit: float | None = None
    kl: float | None = None
    top1: float | None = None
    seconds: float = 0.0


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model that was compiled; `path` and the hashes are empty for a module in memory."""

    path: str
    config_sha256: str
    weights_sha256: str
    parameters: Count
    dtype: str


class ProgramEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One program of an artifact.

    Attributes:
        contract: what its inputs and outputs mean.
        engine_info: facts of the exporter (file names, shapes, threads).
        source, capture, opened: of a program of another model than the manifest's; None where those of the manifest are
            this program's.
    """

    contract: Contract
    engine_info: dict[str, Any]
    source: Source | None = None
    capture: CaptureProof | None = None
    opened: OpenedRecord | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The identity of an artifact.

    Attributes:
        native_code: files that hold machine code, which the engine runs. For people: trust asks the engine itself.
        made_here: the mark of the machine that made the artifact (see `trust`).
        created: UTC, ISO 8601.
        command: what was asked for, as a command line, or as a call in Python where a model in memory was compiled.
        engine: name of an `optc.compiler.artifact.engines.Engine`.
        device: where it runs.
        programs: by role; there is always a "model".
        needs: what a host must have: instruction sets, library versions.
        dtype: compute type.
        capture: how the captured program was held to the model's own forward.
        opened: what the written file computed in its engine.
        limits: of the numerics gate, as the user gave them, by flag ("unlimited": JSON has no infinity); for the others
            the passes' own budgets hold.
        files: every file of the folder but this one, by path; filled by `artifact.finish`.
        weight_bytes: size of the weights as stored. sizes: the same by parts, beside the source's.
        quantization: summary (method, bits, group_size, symmetric, linears); empty without.
        seconds: wall time of capture, passes, export and total.
        quality, speed: figures of `optc eval` and `optc bench`, once measured.
    """

    format_version: int = FORMAT_VERSION
    optc_version: str
    created: str
    command: str = ""
    target: str
    engine: str
    device: Literal["cpu", "cuda"]
    programs: dict[Role, ProgramEntry]
    needs: dict[str, str | int | list[str]]
    dtype: str
    source: Source
    files: tuple[FileEntry, ...] = ()
    capture: CaptureProof | None = None
    opened: OpenedRecord | None = None
    limits: dict[str, float | Literal["unlimited"]] = {}
    passes: tuple[PassRecord, ...]
    weight_bytes: Count
    sizes: Sizes | None = None
    quantization: dict[str, Any]
    seconds: dict[str, float]
    quality: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    native_code: tuple[str, ...] = ()
    made_here: str = ""
    self_sha256: str = ""  # last: the seal is at the end of the file

    @property
    def contract(self) -> Contract:
        """Of the model."""
        return self.programs["model"].contract

    @property
    def engine_info(self) -> dict[str, Any]:
        """Of the model."""
        return self.programs["model"].engine_info

    @property
    def model_bytes(self) -> int:
        """Of the weights that a plain step reads: without those of another model that drafts."""
        return self.weight_bytes - (0 if self.sizes is None else self.sizes.draft)

    @property
    def engine_infos(self) -> tuple[dict[str, Any], ...]:
        """Of every program."""
        return tuple(entry.engine_info for entry in self.programs.values())

    def alone(self, role: Role) -> Manifest:
        """The manifest of an artifact that holds one of the programs and nothing else."""
        return msgspec.structs.replace(self, programs={"model": self.programs[role]})

    def with_program(self, role: Role = "model", **changes: Any) -> Manifest:
        """The manifest with some fields of one program replaced."""
        edited = msgspec.structs.replace(self.programs[role], **changes)
        return msgspec.structs.replace(self, programs={**self.programs, role: edited})


class QuantizationSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What `quantization` holds at least, of an artifact that is quantized; see `pipeline.quantization_summary`."""

    method: str
    bits: tuple[int, ...]
    group_size: tuple[int, ...]
    symmetric: bool
    linears: Count
    bits_per_parameter: float = 0.0
    ratio_to_ideal: float = 0.0


def marked(manifest: Manifest) -> Manifest:
    """The manifest with the mark of this machine."""
    return msgspec.structs.replace(manifest, made_here=machine_mark(_unmarked(manifest)))


def is_made_here(manifest: Manifest) -> bool:
    """Whether this machine made the artifact, and nothing of its manifest was changed since."""
    return is_machine_mark(manifest.made_here, _unmarked(manifest))


def _unmarked(manifest: Manifest) -> bytes:
    return _json(msgspec.structs.replace(manifest, made_here="", self_sha256=""))


class _Head(msgspec.Struct):
    format_version: int


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: indented JSON, sealed. Equal manifests give equal bytes."""
    drift = [value for row in manifest.passes for value in row.layer_drift]
    # JSON has no NaN: it would be written as null and the artifact could not be read back.
    assert all(map(math.isfinite, drift)), "a pass recorded a layer drift that is not finite"
    text = _json(msgspec.structs.replace(manifest, self_sha256=""))
    return _json(msgspec.structs.replace(manifest, self_sha256=hashlib.sha256(text).hexdigest()))


def decode(data: bytes, where: str) -> Manifest:
    """Read the bytes of a manifest.json.

    Raises:
        ArtifactError: not JSON, another format version, changed since it was written, a field of the
            wrong type, or file paths that leave the folder.
    """
    try:
        version = msgspec.json.decode(data, type=_Head).format_version
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"the manifest has format version {version}, this optc reads {FORMAT_VERSION}",
                where=where,
                remedy="use the optc that wrote the artifact, or compile it again",
            )
        _check_seal(data, where)
        manifest = msgspec.json.decode(data, type=Manifest)
        check_nesting(_free_parts(manifest))
        if manifest.quantization:
            msgspec.convert(manifest.quantization, QuantizationSummary)
    except JSON_ERRORS as error:
        raise _damaged(where, str(error)) from error
    _check_paths(manifest.files, where)
    if "model" not in manifest.programs:
        raise _damaged(where, "its programs lack the role 'model'")
    if (manifest.contract.cross is None) != ("encoder" not in manifest.programs):
        raise _damaged(where, "a decoder that reads an encoder and the encoder come together")
    draft = manifest.programs.get("draft")
    if draft is not None and (draft.contract.kind != "decoder" or draft.contract.cross is not None):
        raise _damaged(where, "the program that drafts is no decoder of its own")
    if any(not part.contract.holds_its_tree for part in manifest.programs.values()):
        raise _damaged(where, "the tree of guesses is not one of what the program drafts")
    find_engine(manifest.engine, where)
    return manifest


def _free_parts(manifest: Manifest) -> list[Any]:
    """What the types leave open."""
    options = [record.options for record in manifest.passes]
    return [*options, *manifest.engine_infos, manifest.quantization, manifest.quality, manifest.speed]


def _json(manifest: Manifest) -> bytes:
    compact = msgspec.json.encode(manifest, order="deterministic")
    return msgspec.json.format(compact, indent=2) + b"\n"


def _check_seal(data: bytes, where: str) -> None:
    seal = _SEAL.search(data)
    if seal is None:
        raise _damaged(where, "it does not end with self_sha256: cut off, or not written by optc")
    found = hashlib.sha256(data[: seal.start()] + _EMPTY_SEAL).hexdigest()
    if found != seal[1].decode():
        raise _damaged(where, f"it was changed after it was written: sha256 {found}, sealed {seal[1].decode()}")


def _check_paths(files: tuple[FileEntry, ...], where: str) -> None:
    """Only plain relative paths, each once: nothing outside the folder is ever opened."""
    seen: set[str] = set()
    for entry in files:
        parts = PurePosixPath(entry.path).parts
        plain = entry.path.isprintable() and "\\" not in entry.path and "/".join(parts) == entry.path
        if not plain or not parts or parts[0] == "/" or ".." in parts or entry.path == FILE_NAME:
            raise _damaged(where, f"{entry.path!r} is not a plain path inside the artifact")
        if entry.path in seen:
            raise _damaged(where, f"'{entry.path}' is listed twice")
        seen.add(entry.path)


def _damaged(where: str, why: str) -> ArtifactError:
    return ArtifactError("the manifest is damaged", where=where, why=why, remedy=_REMEDY)
