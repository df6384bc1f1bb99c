"""From a request to choices that are all made: checked against the target and this machine, no weight read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from optc.compiler.diagnostics import UsageError
from optc.compiler.formats.group_sizes import check_group_size, default_group_size
from optc.compiler.ir.devices import choose_device
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.eagle3 import read_eagle3_config
from optc.compiler.model_folder.medusa import heads_digest
from optc.compiler.rewriting.passes import Pass
from optc.compiler.settings.fields import fields_of
from optc.compiler.target.options import CompileOptions, Quantization, QuantRequest, TargetOptions, drafted_by
from optc.compiler.target.target import Step, Target, check_options
from optc.exporters.options.inductor import InductorOptions
from optc.hub import local_model
from optc.passes.quantization.arithmetic.groups import weight_label
from optc.passes.quantization.arithmetic.selection import select_linears
from optc.recipes import apply_pass_options, insert_passes, parse_passes
from optc.request import Request, check_request
from optc.targets.methods import METHODS, choose_quantization
from optc.targets.registry import all_targets


@dataclass(frozen=True)
class Resolved:
    """A request and what was chosen for it.

    Attributes:
        options: dtype, quantization, cache and the target's own options, as its recipe gets them.
        device: where the passes run.
    """

    request: Request
    options: CompileOptions
    device: torch.device

    @property
    def target(self) -> Target:
        return self.request.target


def resolve(request: Request, stored: str | None = None) -> Resolved:
    """Choose what the request leaves open, and refuse what cannot be done.

    Args:
        stored: fp32, bf16 or fp16: the type of the model's weights, see `Target.keeps_dtype`; None where it is not known.

    Raises:
        UsageError: unknown names, options that contradict each other or do nothing.
        TargetError: what the target cannot do, or this machine cannot build; a device that is not here.
    """
    check_request(request)
    target, asked = request.target, request.quantization
    _refuse_idle(request)
    own = request.options or target.options()
    own.check()
    kind = _cache_kind(request, own)
    options = CompileOptions(
        dtype=request.what.dtype or (stored if target.keeps_dtype and stored in target.dtypes else target.dtypes[0]),
        quantization=_runnable(choose_quantization(asked), target),
        kv_cache=kind,
        expose_hidden=_exposed(request, own),
        medusa=request.drafting.medusa,
        medusa_weights=_heads_digest(request, own, kind),
        own=own,
    )
    if options.expose_hidden and kind != "paged":
        raise UsageError(
            "--expose-hidden needs a paged KV cache",
            why=f"target '{target.name}' would have {kind or 'a'} cache",
            remedy="leave it out, or give --target inductor-cpu --kv-cache paged",
        )
    check_options(target, options, all_targets)
    if target.check_machine is not None:
        target.check_machine(options)
    return Resolved(request, options, choose_device(request.what.device))


def _runnable(chosen: Quantization | None, target: Target) -> Quantization | None:
    """With those of several group sizes that the target runs, where it runs the method."""
    if chosen is None or not isinstance(chosen.group_size, tuple) or chosen.method not in target.quant:
        return chosen
    sizes = tuple(size for size in chosen.group_size if size in target.quant[chosen.method].group_sizes)
    return msgspec.structs.replace(chosen, group_size=sizes)


def with_group_size(resolved: Resolved, columns: Sequence[int], names: Sequence[str]) -> Resolved:
    """With the group size that the request left to the model's shapes: the largest default that divides every linear.

    A size that was asked for is compared with the shapes.

    Args:
        columns, names: K and weight name of the linears that the method takes.

    Raises:
        InputError: the size, or each default one, does not divide all of them.
        TargetError: the target has no kernel for the size.
    """
    options = resolved.options
    chosen = options.quantization
    if chosen is None or not columns:
        return resolved
    sizes = resolved.target.quant[chosen.method].group_sizes
    if isinstance(chosen.group_size, int):
        check_group_size(chosen.group_size, columns, names, sizes=sizes, auto=True)
    if chosen.group_size is not None or METHODS[chosen.method].fixed:
        return resolved
    quantization = msgspec.structs.replace(
        chosen, group_size=default_group_size(columns, names, sizes=sizes, auto=True)
    )
    options = msgspec.structs.replace(options, quantization=quantization)
    check_options(resolved.target, options, all_targets)
    return replace(resolved, options=options)


def settled(resolved: Resolved, program: Program) -> Resolved:
    """With what the request left to the model, which is captured now: nothing is open from here on.

    Raises:
        UsageError, TargetError: see `with_group_size`.
    """
    chosen = resolved.options.quantization
    if chosen is None:
        return resolved
    sites = select_linears(program, chosen.ignore, head=False).chosen
    return with_group_size(resolved, [site.columns for site in sites], [weight_label(program, site) for site in sites])


def recipe_steps(resolved: Resolved, kind: str) -> list[Step]:
    """The passes of a compile for a kind of model: the requested ones, or the target's recipe, with options applied.

    Raises:
        UsageError: an unknown pass or option, or a value that does not fit.
        TargetError: the target does not take the kind.
    """
    what = resolved.request.what
    if what.passes is None:
        steps = resolved.target.recipe(kind, resolved.options)
    else:
        steps = []
        for item in what.passes:
            asked = resolved.request.quantization
            steps += [Step(item)] if isinstance(item, Pass) else parse_passes([item], asked)
    steps = insert_passes(steps, what.insert_pass, resolved.request.quantization)
    return apply_pass_options(steps, what.pass_option)


def _cache_kind(request: Request, own: TargetOptions) -> str | None:
    """The kind of KV cache: the one that was asked for, else the target's first, with a model that drafts the paged one.

    Raises:
        UsageError: a model that drafts without a paged cache.
    """
    asked, kinds = request.cache.kv_cache, request.target.kv_caches
    if drafted_by(own) is None:
        return asked or (kinds[0] if kinds else None)
    if asked not in (None, "paged"):
        raise UsageError(
            "--speculative needs a paged KV cache",
            why=f"--kv-cache {asked} was given",
            remedy="leave --kv-cache out",
        )
    return "paged"


def _exposed(request: Request, own: TargetOptions) -> tuple[int, ...]:
    """The layers whose inputs the program is to give: those that were asked for, or that the model which drafts reads.

    Raises:
        UsageError: both. InputError: the folder of the model that drafts cannot be read.
    """
    asked, drafted = request.drafting.expose_hidden, drafted_by(own)
    if drafted is None or drafted.method != "eagle3":
        return asked
    if asked:
        raise UsageError(
            "--expose-hidden has no effect with --speculative eagle3",
            why="the draft model's folder says which hidden states it reads",
            remedy="leave --expose-hidden out",
        )
    return read_eagle3_config(Path(local_model(drafted.folder))).boundaries


def _heads_digest(request: Request, own: TargetOptions, kv_cache: str | None) -> str:
    """sha256 of the heads that the program is to have; "" without any.

    Raises:
        UsageError: they would not come into the program, or there are none for a tree. InputError: the folder has none.
    """
    folder = request.drafting.medusa
    if folder is None:
        if isinstance(own, InductorOptions) and own.speculative_tree is not None:
            raise UsageError("--speculative-tree needs heads whose guesses it holds", remedy="add --medusa FOLDER")
        return ""
    if kv_cache != "paged":
        raise UsageError(
            "--medusa needs a paged KV cache",
            why=f"the cache would be {kv_cache}" if kv_cache else "the target's engine has a cache of its own",
            remedy="add --kv-cache paged, with --target inductor-cpu or inductor-cuda",
        )
    if request.what.passes is not None:
        raise UsageError(
            "--medusa has no effect with --passes",
            remedy="leave it out, and name add-medusa-heads among the passes, with the folder as its option",
        )
    return heads_digest(folder)


def _refuse_idle(request: Request) -> None:
    asked = request.quantization
    if asked.quant is None and not request.what.passes:
        for name in _given(asked):
            raise UsageError(f"--{name.replace('_', '-')} has no effect without --quant", remedy="add --quant rtn")


def _given(asked: QuantRequest) -> Iterator[str]:
    return (name for name, field in fields_of(QuantRequest).items() if getattr(asked, name) != field.default)
