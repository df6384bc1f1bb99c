"""Target: what a destination can run, as data, and the check that a Program obeys it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch.fx import Node

from optc.compiler.artifact.engines import Engine
from optc.compiler.artifact.manifest import OpenedRecord, ProgramEntry
from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass
from optc.compiler.target.options import CompileOptions, OwnT, Quantization, TargetOptions

Predicate = Callable[[Node], str | None]
"""None when the node can run, else the reason why not."""


@dataclass(frozen=True, kw_only=True)
class QuantSupport:
    """Weight quantization that a target has a kernel for."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    symmetric: tuple[bool, ...] = (True, False)
    note: str = ""


KV_CACHE = "a KV cache"
"""What targets of decoders need, as `Step.needs` has it."""


@dataclass(frozen=True)
class Step:
    """A pass in a target's default recipe. An optional one may match nothing; a requested one may not.

    `when` says which programs it is for (None: all); of others it is no step at all. `needs` says what the target does
    not run without: a program in which such a step matches nothing is none for the target.
    """

    rewrite: Pass
    optional: bool = False
    when: Callable[[Program], bool] | None = None
    needs: str = ""

    def applies(self, program: Program) -> bool:
        """Whether the step is for a program, as the steps before it left it."""
        return self.when is None or self.when(program)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What an exporter gets beside the legalized Program.

    `directory` is empty and temporary; `options` are the target's own; `source` is the model folder (tokenizer and
    config files) or None for a module in memory; `rerounding` is the relative error that another order of sums may make
    of a program that rounds activations (`compiler.pipeline.rerounding`), `allowed` the one that the user allows the whole
    compile, 0 where nothing was said: both widen the tolerance of an exporter that opens its file itself;
    `trust_remote_code` says that the model's class may be one of the folder's own; `runner` that a program that runs the
    file by itself is wanted beside it, where the target has one.
    """

    directory: Path
    options: TargetOptions = field(default_factory=TargetOptions)
    source: Path | None = None
    rerounding: float = 0.0
    allowed: float = 0.0
    trust_remote_code: bool = False
    runner: bool = True

    def of(self, cls: type[OwnT]) -> OwnT:
        """The target's own options, which are of type `cls`."""
        assert isinstance(self.options, cls), (self.options, cls)
        return self.options


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an exporter wrote.

    Attributes:
        engine: picks the session that runs it.
        info: facts the session needs (file names, cache layout, capacity ...), JSON-able; under "notes" what the exporter
            has to say to people of what it wrote.
        needs: what the host must have, JSON-able (library versions, instruction sets).
        weight_bytes: bytes of weights on disk, counted from what was written.
        tensor_bytes: the same by tensor, under the program's names (of a quantized weight `w`: what is called
            `w_...`: its codes, scales and zero points).
        opened: what the file computed, where the exporter opened it in its engine.
        encoder: of a model of two programs, that of the encoder; the rest is the decoder's, or of both.
        graphs: (info, program) of each file and what it is to compute, where there are several and the exporter opened
            none of them.
    """

    engine: Engine
    info: dict[str, Any]
    needs: dict[str, Any] = field(default_factory=dict)
    weight_bytes: int = 0
    tensor_bytes: Mapping[str, int] = field(default_factory=dict)
    opened: OpenedRecord | None = None
    encoder: ProgramEntry | None = None
    graphs: tuple[tuple[Mapping[str, Any], Program], ...] = ()


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """How a target writes quantized weights, as far as sizes go.

    Attributes:
        scale_bytes: of a scale; 0 for those of the compute type.
        zero_bits: of a zero point; 0 for those of a code.
        layout: (columns, bits, group size) -> (bits of a stored code, columns of a stored scale, 0 for all).
    """

    scale_bytes: int = 0
    zero_bits: int = 0
    layout: Callable[[int, int, int], tuple[int, int]] = lambda _columns, bits, group_size: (bits, group_size)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A destination.

    Attributes:
        legal: operator -> predicate (or None when every use of it is legal).
        recipe: the default passes for a kind of model ("decoder", "encoder", "module"), or for a "graph" of
            torch.compile, and options; says nothing of the machine.
        export: writes the legalized Program. export_encoder_decoder: writes the legalized encoder and decoder of a model
            of two programs; None where the target does not take one.
        exports_anywhere: `export` takes a program on any device; of another target it is moved to the CPU before.
        keeps_dtype: the compute type is the source's where the request names none and `dtypes` has it; else the first.
        options: the struct of the target's own options.
        check_machine: raises TargetError where this machine cannot build for the target; None where any can.
        quant: quantization method -> what the target can run of it.
        stored: how quantized weights are written, for predicted sizes.
        lacks: why it takes no more: for a method, or for "asymmetric", "bits", "group-size" or "dtype".
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
    export_encoder_decoder: Callable[[Program, Program, ExportRequest], ExportResult] | None = None
    aliases: tuple[str, ...] = ()
    exports_anywhere: bool = False
    keeps_dtype: bool = False
    options: type[TargetOptions] = TargetOptions
    stored: StoredWeights = StoredWeights()
    check_machine: Callable[[CompileOptions], None] | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.options.target in ("", self.name), "options of another target"


def check_legal(program: Program, target: Target) -> None:
    """Raise one TargetError that lists every node the target cannot run, with reasons."""
    check_lowered(program, target.legal, f"target '{target.name}'")


NO_LOWERING = "it has no lowering"


def obstacle(legal: Mapping[Any, Predicate | None], node: Node) -> str | None:
    """Why `legal` does not allow a call; None where it does."""
    if node.target not in legal:
        return NO_LOWERING
    predicate = legal[node.target]
    return predicate(node) if predicate else None


def check_lowered(program: Program, legal: Mapping[Any, Predicate | None], what: str) -> None:
    """Raise one TargetError that lists every node that `legal` does not allow, with reasons."""
    problems = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        reason = obstacle(legal, node)
        if reason == NO_LOWERING:
            problems.append(f"{node.name}: {node.target} has no lowering")
        elif reason:
            problems.append(f"{node.name}: {node.target}: {reason}")
    if problems:
        raise TargetError(
            f"{what} cannot run {len(problems)} node(s)",
            where="; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else ""),
            remedy="choose another target (optc targets), or rewrite the nodes in a pass",
        )


def check_options(target: Target, options: CompileOptions, others: Callable[[], Iterable[Target]] = lambda: ()) -> None:
    """Refuse what the target cannot do, before any weight is read.

    Args:
        others: targets to name where they can run a quantization that this one cannot.

    Raises:
        TargetError: dtype, cache kind, quantization method, bits or group size not supported; names the nearest
            that is.
    """

    def refuse(what: str, allowed: object, reason: str = "") -> None:
        raise TargetError(
            f"target '{target.name}' does not take {what}",
            why=target.lacks.get(reason),
            remedy=f"it takes: {allowed}",
        )

    if options.dtype not in target.dtypes:
        refuse(f"dtype {options.dtype}", ", ".join(target.dtypes), "dtype")
    if options.kv_cache is not None and options.kv_cache not in target.kv_caches:
        refuse(f"a {options.kv_cache} KV cache", ", ".join(target.kv_caches) or "none")
    chosen = options.quantization
    problem = None if chosen is None else _quantization_problem(target, chosen)
    if chosen is not None and problem is not None:
        what, allowed, reason = problem
        near = [*_nearest_here(target, chosen), *_same_elsewhere(target, options, others())]
        refuse(what, "; ".join([allowed, *near]), reason)


def check_context(asked: int | None, context_length: int) -> None:
    """Refuse a cache of more tokens than the model's context has (0: unknown).

    Raises:
        TargetError: --max-seq-len beyond the context.
    """
    if asked is not None and context_length and asked > context_length:
        raise TargetError(
            f"--max-seq-len {asked} is beyond the model's context of {context_length} tokens",
            remedy=f"use --max-seq-len {context_length} or less",
        )


def _quantization_problem(target: Target, asked: Quantization) -> tuple[str, str, str] | None:
    """(what the target does not take, what it does, key of `Target.lacks`), or None when it can run it."""
    if asked.method not in target.quant:
        return f"quantization '{asked.method}'", ", ".join(target.quant) or "none", asked.method
    support = target.quant[asked.method]
    if asked.bits is not None and asked.bits not in support.bits:
        return f"{asked.bits}-bit weights", f"{', '.join(map(str, support.bits))} bits", "bits"
    if isinstance(asked.group_size, int) and asked.group_size not in support.group_sizes:
        sizes = ", ".join(map(str, support.group_sizes))
        return f"group size {asked.group_size}", f"group sizes {sizes}", "group-size"
    if asked.symmetric not in support.symmetric:
        modes = ("symmetric", "asymmetric") if True in support.symmetric else ("asymmetric", "symmetric")
        return f"{modes[1]} quantization", modes[0], modes[1]
    return None


def _nearest_here(target: Target, asked: Quantization) -> list[str]:
    """The flags of the nearest quantization that the target takes; empty when it takes none."""
    found = [
        (_distance(asked, method, bits, size, symmetric), method, bits, size, symmetric)
        for method, support in target.quant.items()
        for bits in support.bits
        for size in (support.group_sizes if isinstance(asked.group_size, int) else (None,))
        for symmetric in support.symmetric
    ]
    if not found:
        return []
    _, method, bits, size, symmetric = min(found, key=lambda item: item[0])
    support = target.quant[method]
    flags = [f"--quant {method}"]
    flags += [f"--bits {bits}"] if len(support.bits) > 1 else []
    flags += [f"--group-size {size}"] if size is not None and len(support.group_sizes) > 1 else []
    flags += [] if symmetric == asked.symmetric else ["--symmetric" if symmetric else "--asymmetric"]
    return [f"nearest here: {' '.join(flags)}"]


def _distance(
    asked: Quantization, method: str, bits: int, group_size: int | None, symmetric: bool
) -> tuple[float, ...]:
    """How far a quantization is from the asked one: method first, then bits (fewer are worse), groups, zero points."""
    wanted = bits if asked.bits is None else asked.bits
    gap = 0.0
    if group_size is not None and isinstance(asked.group_size, int):
        gap = abs(math.log2((group_size or _ROW) / (asked.group_size or _ROW)))
    return (method != asked.method, abs(bits - wanted), bits < wanted, gap, symmetric != asked.symmetric)


_ROW = 4096
"""What a group of a whole row counts as when groups are compared."""


def _same_elsewhere(target: Target, options: CompileOptions, others: Iterable[Target]) -> list[str]:
    """The targets that run the asked quantization as it is, as one remedy; empty when there is none."""
    names = []
    asked = options.quantization
    assert asked is not None
    for other in others:
        plain = CompileOptions(
            dtype=options.dtype if options.dtype in other.dtypes else other.dtypes[0],
            quantization=asked,
            kv_cache=other.kv_caches[0] if other.kv_caches else None,
            own=other.options(),
        )
        if other.name != target.name and _quantization_problem(other, asked) is None and _runs(other, plain):
            names.append(other.name)
    return [f"the same request runs on --target {' or '.join(names)}"] if names else []


def _runs(target: Target, options: CompileOptions) -> bool:
    """Whether a target has a recipe for options, and this machine can build it."""
    try:
        target.recipe("decoder", options)
        if target.check_machine is not None:
            target.check_machine(options)
    except TargetError:
        return False
    return True
