"""The request of a compile: what, how, where to, and how it is watched; one typed struct, however it is given.

The command line, a YAML recipe and keyword arguments of `optc.compile` give the same flat keys; `make_request` reads
them into the struct that has the field, with one kind of error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from optc.compiler.diagnostics import TargetError, UsageError
from optc.compiler.settings.device import DeviceName
from optc.compiler.settings.fields import Field, Given, check_struct, fields_of, read_fields, unknown_key
from optc.compiler.target.options import CacheRequest, ComputeType, DraftingRequest, QuantRequest, TargetOptions
from optc.targets.registry import find_target, target_options

if TYPE_CHECKING:
    from optc.compiler.target.target import Target


def _read_passes(value: Any) -> tuple[Any, ...]:
    """Passes by name ("a,b" or a list), {name: {option: value}}, or pass objects."""
    from optc.compiler.rewriting.passes import Pass

    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list | tuple) or not value:
        raise TypeError
    for item in value:
        plain = isinstance(item, Pass) or (isinstance(item, str) and item)
        if not plain and not (isinstance(item, Mapping) and len(item) == 1 and _is_options(*item.items())):
            raise TypeError
    return tuple(value)


def _is_options(item: tuple[Any, Any]) -> bool:
    name, options = item
    keys = {} if options is None else options
    return isinstance(name, str) and isinstance(keys, Mapping) and all(isinstance(key, str) for key in keys)


def _read_calibration(value: Any) -> Any:
    """A path, token ids as a tensor, or an iterable of example inputs."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        listed = value if isinstance(value, list | tuple) else ()
        if any(isinstance(item, str) or not isinstance(item, Iterable) for item in listed):
            raise TypeError
        return value
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise TypeError
    return Path(value)


PoolingName = Literal["mean", "cls", "lasttoken", "max", "weightedmean", "mean_sqrt_len_tokens", "none"]
"""`compiler.model_folder.sentence.POOLINGS`, which a shell need not import torch for; tests hold them together."""


class WhatRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is compiled, and by which passes."""

    dtype: (
        Annotated[
            ComputeType,
            Meta(
                description="Compute type.",
                extra={"default": "the target's first, or the model's own where the target writes a model folder"},
            ),
        ]
        | None
    ) = None
    passes: (
        Annotated[
            tuple[Any, ...],
            Meta(
                description="Comma-separated passes (names, or module:Class) to run instead of the target's recipe.",
                extra={
                    "read": _read_passes,
                    "joined": True,
                    "expected": "names of passes, as text with commas or a list (see optc passes)",
                },
            ),
        ]
        | None
    ) = None
    pass_option: Annotated[
        tuple[str, ...],
        Meta(
            description="Set an option of a pass (repeatable); see optc passes.",
            extra={"metavar": "NAME.OPTION=VALUE"},
        ),
    ] = ()
    insert_pass: Annotated[
        tuple[str, ...],
        Meta(
            description="Run a pass beside those of the recipe, before or after one of them (repeatable).",
            extra={"metavar": "before:NAME=PASS|after:NAME=PASS"},
        ),
    ] = ()
    device: Annotated[
        DeviceName,
        Meta(description="Where capture, passes, calibration and the gate run; auto: cuda where there is one."),
    ] = "cpu"
    trust_remote_code: Annotated[bool, Meta(description="Allow code that comes with the model to run.")] = False
    pooling: (
        Annotated[
            PoolingName,
            Meta(
                description="Make embeddings of the model's hidden states: of the first or the last token, or of all; "
                "none gives the hidden states.",
                extra={"default": "what the folder's modules.json says"},
            ),
        ]
        | None
    ) = None


class CalibrationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What calibrated quantization reads."""

    calibration: Annotated[
        Any,
        Meta(
            description="Text, .jsonl, .json, .parquet, or a dataset's folder; of a module .npz, .npy or a folder of them.",
            extra={
                "default": "built-in",
                "metavar": "PATH",
                "read": _read_calibration,
                "expected": "a path (or, in Python, token ids as int64 [samples, length]; of a module an iterable of inputs)",
            },
        ),
    ] = None
    calibration_samples: Annotated[int, Meta(ge=1, le=1 << 31, description="Calibration sequences.")] = 128
    calibration_seq_len: Annotated[int, Meta(ge=1, le=1 << 31, description="Tokens of each.")] = 512


_SUM = "the sum of the passes' budgets"


class GateRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the numerics gate feeds, and what all lossy passes together may cost; None is the sum of their budgets."""

    text: (
        Annotated[Path, Meta(description="Text for the numerics gate.", extra={"default": "a built-in page"})] | None
    ) = None
    max_kl: (
        Annotated[
            float,
            Meta(ge=0, description="Gate: largest KL to the capture, nats per token.", extra={"default": _SUM}),
        ]
        | None
    ) = None
    min_top1: (
        Annotated[
            float,
            Meta(
                ge=0,
                le=1,
                description="Gate: least top-1 agreement with the capture.",
                extra={"default": _SUM},
            ),
        ]
        | None
    ) = None
    max_perplexity_increase: (
        Annotated[
            float,
            Meta(ge=0, description="Gate: largest relative rise since the capture.", extra={"default": _SUM}),
        ]
        | None
    ) = None
    max_relative_error: (
        Annotated[
            float,
            Meta(
                ge=0,
                description="Gate: largest relative error to the capture, of outputs that are no distribution, or "
                "a flat one.",
                extra={"default": _SUM},
            ),
        ]
        | None
    ) = None
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1, description="Seed of the gate's random tokens.")] = 0
    allow_noop: Annotated[bool, Meta(description="Let a requested pass match nothing.")] = False


LIMITS = {"max_kl": "kl", "max_perplexity_increase": "perplexity", "max_relative_error": "relative", "min_top1": "top1"}
"""Fields of `GateRequest` that limit what a compile may lose -> what the pipeline's `Limits` call them."""


def given_limits(asked: GateRequest) -> dict[str, float | Literal["unlimited"]]:
    """The limits that a user gave, by flag; an infinite one is "unlimited"."""
    given = {name.replace("_", "-"): getattr(asked, name) for name in LIMITS}
    return {name: value if math.isfinite(value) else "unlimited" for name, value in given.items() if value is not None}


class RunRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the compile writes."""

    output: Annotated[Path, Meta(description="Folder of the artifact.", extra={"short": "-o"})] | None = None
    force: Annotated[bool, Meta(description="Replace an existing artifact.")] = False
    dump_ir: Annotated[Path, Meta(description="Write every stage's IR to this folder.")] | None = None
    work_dir: Annotated[Path, Meta(description="Keep finished stages here; a rerun continues.")] | None = None
    save_recipe: (
        Annotated[Path, Meta(description="Write what was asked for to this YAML file, which --recipe reads.")] | None
    ) = None


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a compile but the model: for which target, what, how, and where to."""

    target: Target
    what: WhatRequest = WhatRequest()
    quantization: QuantRequest = QuantRequest()
    cache: CacheRequest = CacheRequest()
    drafting: DraftingRequest = DraftingRequest()
    calibration: CalibrationRequest = CalibrationRequest()
    gate: GateRequest = GateRequest()
    run: RunRequest = RunRequest()
    options: TargetOptions | None = None  # the target's defaults


SECTIONS: dict[str, type[msgspec.Struct]] = {
    "what": WhatRequest,
    "quantization": QuantRequest,
    "cache": CacheRequest,
    "drafting": DraftingRequest,
    "calibration": CalibrationRequest,
    "gate": GateRequest,
    "run": RunRequest,
}


def target_fields() -> dict[str, list[tuple[str, Field]]]:
    """Name -> the names of the targets that have an option of this name, each with its own field."""
    found: dict[str, list[tuple[str, Field]]] = {}
    for target, options in target_options().items():
        for name, field in fields_of(options).items():
            found.setdefault(name, []).append((target, field))
    return found


def known_keys() -> Iterator[str]:
    """Every key of a request."""
    yield "target"
    for cls in SECTIONS.values():
        yield from fields_of(cls)
    yield from target_fields()


def make_request(target: str, given: Mapping[str, Given]) -> Request:
    """The request of flat keys (in snake case) for a target.

    Raises:
        UsageError: an unknown target or key, or a value of another type or out of its bounds.
        TargetError: an option of other targets; says which ones this one has.
    """
    found = find_target(target)
    own = fields_of(found.options)
    sections = {section: fields_of(cls) for section, cls in SECTIONS.items()}
    plain = {name for fields in sections.values() for name in fields}
    foreign = [name for name in given if name not in plain and name not in own]
    if foreign:
        others = target_fields()
        for name in foreign:
            if name not in others:
                keys = (item.replace("_", "-") for item in {*plain, *others, "target"})
                raise unknown_key(name, keys, given[name].where)
            others[name][0][1].read(given[name])
        raise not_taken(found, foreign[0])
    parts: dict[str, Any] = {section: cls(**read_fields(cls, given)) for section, cls in SECTIONS.items()}
    return Request(target=found, options=found.options(**read_fields(found.options, given)), **parts)


def not_taken(target: Target, name: str) -> TargetError:
    """The error for an option that the target does not have."""
    own = ", ".join(field.key for field in fields_of(target.options).values())
    return TargetError(
        f"target '{target.name}' does not take --{name.replace('_', '-')}",
        remedy=f"it takes: {own or 'no such options'}",
    )


def from_python(target: str, **values: Any) -> Request:
    """The request of keyword arguments, as `optc.compile` takes them; None leaves a field out."""
    given = {
        name: Given(value=value, where=f"optc.compile({name}=...)")
        for name, value in values.items()
        if value is not None
    }
    return make_request(target, given)


def check_request(request: Request) -> None:
    """Read every value of a request that was made by hand, as those of flags and recipes are read.

    Raises:
        UsageError: a value of another type or out of its bounds; names the field.
        TargetError: options of another target.
    """
    from optc.compiler.target.target import Target

    target = request.target
    if not isinstance(target, Target):
        raise UsageError(f"a request's target cannot be {target!r}", remedy="optc.targets.find_target('onnx-cpu')")
    if request.options is not None and type(request.options) is not target.options:
        raise TargetError(
            f"target '{target.name}' does not take {type(request.options).__name__}",
            remedy=f"it takes {target.options.__name__}",
        )
    for section in (*SECTIONS, "options"):
        part = getattr(request, section)
        if part is None:
            continue  # the target's defaults
        wanted = SECTIONS.get(section, target.options)
        if not isinstance(part, wanted):
            raise UsageError(f"'{section}' of a request cannot be {part!r}", remedy=f"give {wanted.__name__}(...)")
        check_struct(part)
