"""`optc train`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from optc.cli.common import emit, json_option, progress, stderr
from optc.compiler.diagnostics import UsageError


@click.command()
@click.argument("recipe_file", required=False, metavar="[RECIPE.yaml]")
@click.option("--recipe", help="pretrain, finetune, lora, qlora, qat or distill; or a YAML file.")
@click.option("--model", help="Model folder to start from.")
@click.option(
    "--text",
    multiple=True,
    metavar="FILE",
    help="Training text, .jsonl, .json of token ids, .parquet or a dataset's folder (repeatable).",
)
@click.option("--max-steps", type=int, help="Optimizer steps.")
@click.option("--bits", type=int, help="QAT: bits per weight.")
@click.option("--group-size", type=int, help="QAT: weights per scale.")
@click.option("--device", metavar="cpu|cuda|cuda:N|auto", help="Where the training runs.  [default: auto]")
@click.option("--seed", type=int, help="Seed of weights, data order and dropout.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set any key of the config (repeatable), e.g. optimizer.lr=3e-4.",
)
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint of this output.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the trained model.")
@json_option
def train(as_json: bool, **flags: Any) -> None:
    """Train a model folder to a model folder that optc compile takes.

    Log and checkpoints stand in OUTPUT.run until the run is done. docs/train.md lists every key of a recipe.

    \b
    optc train --recipe finetune --model examples/fiction-3m --text book.txt -o out/tuned
    optc train --recipe qat --model examples/fiction-3m --text book.txt --bits 4 --group-size 32 -o out/qat
    optc train recipe.yaml --set optimizer.lr=3e-4 --resume
    torchrun --nproc-per-node 2 -m optc train recipe.yaml --set parallel.kind=ddp
    """
    import msgspec

    from optc.training.loop import train as run_training
    from optc.training.metrics import StepRecord
    from optc.training.setup import World

    config = make_config(flags)
    first = World.from_environment().rank == 0
    with progress("training", total=config.max_steps) if first else nullcontext() as update:

        def on_step(record: StepRecord) -> None:
            assert update is not None  # called on the first rank only
            loss = "not finite" if record.loss is None else f"{record.loss:.4f}"
            update(record.step, f"step {record.step}  loss {loss}  {record.tokens_per_s:.0f} tokens/s")

        result = run_training(config, resume=flags["resume"], on_step=on_step)
    if result is not None:  # the first rank's
        emit(msgspec.to_builtins(result), as_json, _show)


def make_config(flags: dict[str, Any]) -> Any:
    """TrainConfig from the flags of `optc train`.

    Raises:
        UsageError: no recipe or two, an unknown key, or quantization flags for a recipe without it.
    """
    from optc.training.recipe import load_config

    named = [item for item in (flags["recipe_file"], flags["recipe"]) if item]
    if len(named) != 1:
        raise UsageError(
            "give one recipe" + (", not two" if named else ""),
            remedy="optc train --recipe finetune ..., or optc train recipe.yaml",
        )
    values = {
        "model": flags["model"],
        "data.text": list(flags["text"]) or None,
        "max_steps": flags["max_steps"],
        "qat.bits": flags["bits"],
        "qat.group_size": flags["group_size"],
        "seed": flags["seed"],
        "device": flags["device"],
        "output": None if flags["output"] is None else str(flags["output"]),
    }
    given = {key: value for key, value in values.items() if value is not None}
    config = load_config(named[0], values=given, settings=flags["settings"])
    for key in ("qat.bits", "qat.group_size"):
        if key in given and not config.qat.enabled:
            raise UsageError(
                f"--{key[4:].replace('_', '-')} has no effect without QAT",
                remedy="use --recipe qat, or --set qat.enabled=true",
            )
    return config


def _show(result: dict[str, Any]) -> None:
    last = result["last"]
    click.echo(
        f"{result['output']}: {result['steps']} steps, loss {_number(result['first_loss'])} -> {_number(result['last_loss'])}, "
        f"{result['tokens']} tokens in {result['seconds']:.1f} s"
    )
    memory = last["memory"]
    if memory is not None:
        parts = ", ".join(
            f"{key} {memory[key] / 1e6:.1f} MB" for key in ("weights", "gradients", "optimizer", "activations")
        )
        stderr().print(f"  memory: {parts}; peak {memory['peak'] / 1e6:.0f} MB", markup=False)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
