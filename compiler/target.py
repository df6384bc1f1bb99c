"""Target: what a destination can run, as data, and the check that a Program obeys it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.fx import Node

from optc.compiler.diagnostics import TargetError
from optc.compiler.program import Program
from optc.compiler.rewriting import Pass

Predicate = Callable[[Node], str | None]
"""None when the node can run, else the reason why not."""


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """What the user asked for. None means the target's default."""

    dtype: str = "fp32"
    quant: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    ignore: tuple[str, ...] = ()
    kv_cache: str | None = None
    max_seq_len: int | None = None
    accuracy_level: int | None = None

    def bits_or(self, default: int) -> int:
        """The bits that were asked for, else `default`."""
        return default if self.bits is None else self.bits


@dataclass(frozen=True, kw_only=True)
class QuantSupport:
    """Weight quantization that a target has a kernel for."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    symmetric: tuple[bool, ...] = (True, False)
    note: str = ""


@dataclass(frozen=True)
class Step:
    """A pass in a target's default recipe. An optional one may match nothing; a requested one may not."""

    rewrite: Pass
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What an exporter gets beside the legalized Program.

    `directory` is empty and temporary; `source` is the model folder (tokenizer and config files) or
    None for a module in memory.
    """

    directory: Path
    options: CompileOptions
    source: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an exporter wrote.

    Attributes:
        engine: "onnx" or "aotinductor"; picks the session that runs it.
        info: facts the session needs (file names, cache layout, capacity ...), JSON-able.
        needs: what the host must have, JSON-able (library versions, instruction sets).
        weight_bytes: bytes of weights on disk, counted from what was written.
        tensor_bytes: the same by tensor, under the program's names (of a quantized weight `w`: what is called
            `w_...`: its codes, scales and zero points).
    """

    engine: Literal["onnx", "aotinductor"]
    info: dict[str, Any]
    needs: dict[str, Any] = field(default_factory=dict)
    weight_bytes: int = 0
    tensor_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A destination.

    Attributes:
        legal: operator -> predicate (or None when every use of it is legal).
        recipe: the default passes for a kind of model ("decoder", "encoder", "module") and options.
        export: writes the legalized Program.
        takes: names of options that only some targets have (max_seq_len, accuracy_level).
        quant: quantization method -> what the target can run of it.
    """

    name: str
    summary: str
    device: Literal["cpu", "cuda"]
    dtypes: tuple[str, ...]
    kv_caches: tuple[str, ...]
    quant: Mapping[str, QuantSupport]
    legal: Mapping[Any, Predicate | None]
    recipe: Callable[[str, CompileOptions], list[Step]]
    export: Callable[[Program, ExportRequest], ExportResult]
    aliases: tuple[str, ...] = ()
    needs_extra: str = ""
    takes: tuple[str, ...] = ()


def check_legal(program: Program, target: Target) -> None:
    """Raise one TargetError that lists every node the target cannot run, with reasons."""
    problems = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target not in target.legal:
            problems.append(f"{node.name}: {node.target} has no lowering")
            continue
        predicate = target.legal[node.target]
        reason = predicate(node) if predicate else None
        if reason:
            problems.append(f"{node.name}: {node.target}: {reason}")
    if problems:
        raise TargetError(
            f"target '{target.name}' cannot run {len(problems)} node(s)",
            where="; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else ""),
            remedy="choose another target (optc targets), or rewrite the nodes in a pass",
        )


_SPECIAL_OPTIONS = ("max_seq_len", "accuracy_level")


def check_options(target: Target, options: CompileOptions) -> None:
    """Refuse what the target cannot do, before any weight is read.

    Raises:
        TargetError: dtype, cache kind, quantization method, bits or group size not supported.
    """

    def refuse(what: str, allowed: object) -> None:
        raise TargetError(f"target '{target.name}' does not take {what}", remedy=f"it takes: {allowed}")

    if options.dtype not in target.dtypes:
        refuse(f"dtype {options.dtype}", ", ".join(target.dtypes))
    if options.kv_cache is not None and options.kv_cache not in target.kv_caches:
        refuse(f"a {options.kv_cache} KV cache", ", ".join(target.kv_caches))
    for name in _SPECIAL_OPTIONS:
        if getattr(options, name) is not None and name not in target.takes:
            refuse(
                f"--{name.replace('_', '-')}", ", ".join(target.takes).replace("_", "-") or "no such options"
            )
    if options.quant is None:
        return
    if options.quant not in target.quant:
        refuse(f"quantization '{options.quant}'", ", ".join(target.quant) or "none")
    support = target.quant[options.quant]
    if options.bits is not None and options.bits not in support.bits:
        refuse(f"{options.bits}-bit weights", f"{', '.join(map(str, support.bits))} bits")
    if options.group_size is not None and options.group_size not in support.group_sizes:
        refuse(f"group size {options.group_size}", f"group sizes {', '.join(map(str, support.group_sizes))}")
    if options.symmetric not in support.symmetric:
        refuse("this zero-point mode", "symmetric" if True in support.symmetric else "asymmetric")


def device_of(target: Target) -> torch.device:
    """The torch device that the target's programs run on."""
    return torch.device(target.device)
