"""`optc plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
from msgspec import Meta

from optc.cli.common import emit, json_option, say
from optc.cli.garbage import uncollected
from optc.cli.options import GroupedCommand, Settings, given_flags, struct_flags
from optc.cli.request_flags import merge_recipe, request_flags, request_of, require
from optc.compiler.artifact.sizes import Sizes
from optc.compiler.diagnostics import UsageError


class TrainingPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What predicts the memory of a training run in place of a compile."""

    train: (
        Annotated[
            str,
            Meta(
                description="Predict the memory of a training recipe (name or YAML file) in place of a compile.",
                extra={"metavar": "RECIPE"},
            ),
        ]
        | None
    ) = None
    world_size: Annotated[int, Meta(ge=1, le=1 << 20, description="With --train: processes.")] = 1
    set: Settings = ()


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@struct_flags(TrainingPlan)
@request_flags(("what", "quantization", "cache", "drafting"), leave_out=("base", "expose_hidden"))
@json_option
def plan(as_json: bool, options: TrainingPlan, **flags: Any) -> None:
    """Say what a compile or a training run would do, before any weight is read.

    \b
    optc plan examples/fiction-3m --target onnx-cpu --quant rtn
    optc plan --train recipe.yaml --world-size 4 --set parallel.kind=fsdp
    """
    if options.train is not None:
        _plan_training(as_json, options.train, options, flags)
        return
    if options.set or options.world_size != 1:
        raise UsageError("--set and --world-size belong to --train", remedy="optc plan --train RECIPE")
    merged = merge_recipe(flags)
    model = require(merged, "model", "optc plan MODEL --target onnx-cpu")
    target = require(merged, "target", "--target onnx-cpu (see optc targets)")
    with uncollected():
        from optc.planning import make_plan

        result = make_plan(Path(model), request_of(merged, target))
    emit(result, as_json, _show)


def _plan_training(as_json: bool, recipe: str, options: TrainingPlan, flags: dict[str, Any]) -> None:
    from optc.training.memory_plan import predict
    from optc.training.recipe import load_config

    model = flags.pop("model")
    idle = next(iter(given_flags(flags)), None)
    if idle is not None:
        raise UsageError(f"--{idle.replace('_', '-')} has no effect with --train", remedy="use --set KEY=VALUE")
    config = load_config(recipe, values=given_flags({"model": model}), settings=options.set)
    emit(msgspec.to_builtins(predict(config, options.world_size)), as_json, _show_memory)


def _show_memory(result: dict[str, Any]) -> None:
    ranks = result["ranks"]
    say("memory" + (f" on each of {ranks} ranks" if ranks > 1 else ""))
    for name in ("weights", "gradients", "optimizer", "activations"):
        say(f"  {name + ':':13} {result[name] / 1e6:10.1f} MB")
    say(
        f"  {'peak:':13} {result['peak'] / 1e6:10.1f} MB, in the {result['peak_at']} {'pass' if result['peak_at'] == 'backward' else 'step'}"
    )
    if result["note"]:
        say(f"  note: {result['note']}")


_NAMED = 8
"""Weights that are named, at most."""


def _group(size: int | tuple[int, ...] | None) -> str:
    if isinstance(size, tuple):
        return "of each linear the first that divides it of " + ", ".join(map(_group, size))
    return "the method's own" if size is None else str(size or "channel")


def _show(result: dict[str, Any]) -> None:
    say(f"{result['model']} for {result['target']}, {result['dtype']}, quantization {result['quant'] or 'none'}")
    say(f"  parameters: {result['parameters'] / 1e6:.1f} M, {result['linears']} linears")
    names = [row["name"] + (" (if it matches)" if row["optional"] else "") for row in result["passes"]]
    say(f"  passes: {', '.join(names) or 'none'}")
    if result["quant"]:
        say(f"  group size: {_group(result['group_size'])}")
    if result["left"]:
        names, more = result["left"][:_NAMED], len(result["left"]) - _NAMED
        say(
            f"  not quantized, as no group divides them: {', '.join(names)}" + (f" and {more} more" if more > 0 else "")
        )
    say(f"  weights: {Sizes.read(result['sizes'])}")
    if result["kv_cache_bytes_per_token"]:
        say(f"  KV cache: {result['kv_cache_bytes_per_token']} bytes per token")
    if result["medusa"]:
        heads = result["medusa"]
        say(
            f"heads: {heads['folder']}, {heads['heads']} of {heads['layers']} blocks, {heads['bytes'] / 1e6:.1f} MB, in rest"
        )
    if result["draft"]:
        draft = result["draft"]
        say(f"draft model: {draft['model']}, {draft['parameters'] / 1e6:.1f} M parameters")
        say(f"  weights: {Sizes.read(draft['sizes'])}")
        if draft.get("kv_cache_bytes_per_token"):
            say(f"  KV cache: {draft['kv_cache_bytes_per_token']} bytes per token")
    if result["note"]:
        say(f"  note: {result['note']}")
