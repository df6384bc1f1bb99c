"""`optc train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Annotated, Any

import click
import msgspec
from msgspec import Meta

from optc.cli.common import F, emit, json_option, say, stderr
from optc.cli.options import Settings, add_flags, flag, given_flags, struct_flags
from optc.compiler.diagnostics import UsageError, printable
from optc.compiler.settings.threads import wait_patiently
from optc.progress import progress
from optc.training.config import TrainConfig
from optc.training.recipe import FIELDS, load_config
from optc.training.world import World


class TrainOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is no key of a training configuration."""

    recipe: (
        Annotated[
            str,
            Meta(
                description="pretrain, finetune, lora, qlora, qat, distill, dpo, eagle3 or medusa; or a YAML file.",
                extra={"metavar": "NAME|PATH"},
            ),
        ]
        | None
    ) = None
    set: Settings = ()
    resume: Annotated[bool, Meta(description="Continue from the newest checkpoint of this output.")] = False


KEYS = {
    "model": "model",
    "text": "data.text",
    "validation": "validation.text",
    "max_steps": "max_steps",
    "epochs": "epochs",
    "batch_size": "batch_size",
    "lr": "optimizer.lr",
    "save_every": "saving.every",
    "bits": "qat.bits",
    "group_size": "qat.group_size",
    "device": "device",
    "seed": "seed",
    "output": "output",
}
"""Keys of the configuration that have a flag of their own, by the flag's name."""


def _key_flags(command: F) -> F:
    """A flag for each of KEYS, made of the key's field; the default is the recipe's."""
    fields = ((name, FIELDS[key]) for name, key in KEYS.items())
    named = (dataclasses.replace(field, name=name, key=name.replace("_", "-")) for name, field in fields)
    return add_flags(command, (flag(field, field.help) for field in named))


@click.command()
@click.argument("recipe_file", required=False, metavar="[RECIPE.yaml]")
@_key_flags
@struct_flags(TrainOptions)
@json_option
def train(recipe_file: str | None, as_json: bool, options: TrainOptions, **keys: Any) -> None:
    """Train a model folder to a model folder that optc compile takes.

    Log and checkpoints stand in OUTPUT.run until the run is done. docs/train.md lists every key of a recipe.

    \b
    optc train --recipe finetune --model examples/fiction-3m --text book.txt -o out/tuned
    optc train --recipe qat --model examples/fiction-3m --text book.txt --bits 4 --group-size 32 -o out/qat
    optc train --recipe finetune --model examples/fiction-3m --text book.txt --set validation.share=0.1 -o out/tuned
    optc train recipe.yaml --lr 3e-4 --resume
    torchrun --nproc-per-node 2 -m optc train recipe.yaml --set parallel.kind=ddp
    """
    config = make_config(recipe_file, options, keys)
    wait_patiently()
    first = World.from_environment().rank == 0
    with progress("training") if first else nullcontext() as update:
        from optc.training.loop import train as run_training

        told = {} if update is None else reports(update, config.output)
        result = run_training(config, resume=options.resume, **told)
    if result is not None:  # the first rank's
        emit(msgspec.to_builtins(result), as_json, _show)


def reports(update: Callable[..., None], output: str) -> dict[str, Callable[..., None]]:
    """What the first rank of a run tells, as lines of its progress.

    Args:
        update: of `optc.progress.progress`.
        output: the run's folder.
    """
    held_out = ""

    def on_start(step: int, steps: int) -> None:
        say(f"training: step {step} of {steps}; log and checkpoints in {output}.run", err=True)
        update(step, total=steps)

    def on_step(record: Any) -> None:
        nonlocal held_out
        if record.validation_loss is not None:
            held_out = f"  validation {record.validation_loss:.4f}"
        rate = f"{record.tokens_per_s:.0f} tokens/s"
        update(record.step, f"step {record.step}  loss {_number(record.loss)}{held_out}  {rate}")

    return {"on_start": on_start, "on_step": on_step, "on_note": lambda note: update(0, note)}


def make_config(recipe_file: str | None, options: TrainOptions, keys: Mapping[str, Any]) -> TrainConfig:
    """The configuration of the flags of `optc train`.

    Raises:
        UsageError: no recipe or two, an unknown key, or quantization flags for a recipe without it.
    """
    named = [item for item in (recipe_file, options.recipe) if item]
    if len(named) != 1:
        raise UsageError(
            "give one recipe" + (", not two" if named else ""),
            remedy="optc train --recipe finetune ..., or optc train recipe.yaml",
        )
    given = {KEYS[name]: item for name, item in given_flags(keys).items()}
    if {"epochs", "max_steps"} <= given.keys():
        raise UsageError("--epochs and --max-steps are two lengths of a run", remedy="give one of them")
    config = load_config(named[0], values=given, settings=options.set)
    for key in ("qat.bits", "qat.group_size"):
        if key in given and not config.qat.enabled:
            raise UsageError(
                f"--{key[4:].replace('_', '-')} has no effect without QAT",
                remedy="use --recipe qat, or --set qat.enabled=true",
            )
    return config


def _show(result: dict[str, Any]) -> None:
    last = result["last"]
    say(
        f"{result['output']}: {result['steps']} steps, loss {_number(result['first_loss'])} -> {_number(result['last_loss'])}, "
        f"{result['tokens']} tokens in {result['seconds']:.1f} s"
    )
    if (held_out := result["validation"]) is not None:
        say(
            f"  validation loss {_number(held_out['first'])} -> {_number(held_out['best'])} in step {held_out['best_step']}, "
            f"{_number(held_out['last'])} in the last; the folder holds step {held_out['written_step']}"
            + (", the run ended early" if held_out["stopped_early"] else "")
        )
    if last["reward_accuracy"] is not None:
        say(
            f"  rewards in the last step: chosen {last['chosen_reward']:+.4f}, rejected {last['rejected_reward']:+.4f}; "
            f"{100 * last['reward_accuracy']:.0f} % of pairs prefer the chosen answer"
        )
    if result["skipped"]:
        stderr().print(
            f"  {result['skipped']} of {result['steps']} steps made no update; log.jsonl says why", markup=False
        )
    for note in result["notes"]:
        stderr().print(printable(f"  {note}"), markup=False, soft_wrap=True)
    memory = last["memory"]
    if memory is not None:
        parts = ", ".join(
            f"{key} {memory[key] / 1e6:.1f} MB" for key in ("weights", "gradients", "optimizer", "activations")
        )
        stderr().print(f"  memory: {parts}; peak {memory['peak'] / 1e6:.0f} MB", markup=False)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
