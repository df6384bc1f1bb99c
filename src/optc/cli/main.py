"""`optc`: the command group, name matching and the last line of error handling."""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from typing import Any

import click

from optc.cli.common import guarded
from optc.cli.garbage import leave_to_the_end
from optc.cli.signals import ended_by_signals
from optc.compiler.diagnostics import UsageError, unknown_name
from optc.compiler.version import version

# name -> (module, attribute, one-line help); modules are imported when used, so `optc --help` is quick.
COMMANDS = {
    "compile": ("optc.cli.compile", "compile_", "Compile a model folder into an artifact."),
    "quantize": (
        "optc.cli.quantize",
        "quantize",
        "Quantize a model folder to a checkpoint for vLLM, SGLang, transformers.",
    ),
    "train": ("optc.cli.train", "train", "Train or fine-tune a model folder; LoRA, QAT, distillation."),
    "plan": ("optc.cli.plan", "plan", "Say what a compile would do, before any weight is read."),
    "run": ("optc.cli.run", "run", "Generate text with an artifact."),
    "eval": ("optc.cli.evaluate", "evaluate", "Perplexity, KL and tasks of one artifact or several."),
    "compare": ("optc.cli.compare", "compare", "Artifacts of one model side by side; an HTML report."),
    "search": ("optc.cli.search", "search", "Try methods and bits: the best of size, quality and speed."),
    "bench": ("optc.cli.bench", "bench", "Time to first token, decode and prefill speed, memory."),
    "serve": ("optc.cli.serve", "serve", "Serve an artifact over HTTP, for clients of OpenAI's API."),
    "inspect": (
        "optc.cli.inspect",
        "inspect",
        "Manifest, contract and passes of an artifact; IR of a model.",
    ),
    "diff": ("optc.cli.diff", "diff", "The difference between two stages of a run."),
    "verify": ("optc.cli.verify", "verify", "Check an artifact's files against its manifest."),
    "sign": ("optc.cli.sign", "sign", "Sign an artifact, so that others can tell who made it."),
    "bundle": ("optc.cli.bundle", "bundle", "A folder with a C++ program, for hosts without Python."),
    "check": ("optc.cli.check", "check", "Say whether this machine can run an artifact."),
    "passes": ("optc.cli.passes", "passes", "List the passes and their options."),
    "targets": ("optc.cli.targets", "targets", "List the targets and what they take."),
}


_HUGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")
"""torch reads this before its first tensor: large ones get pages of 2 MB, which the system hands out five times faster."""


class _Group(click.Group):
    """Commands are loaded when named; hyphen and underscore are both accepted in options."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = COMMANDS.get(cmd_name.replace("_", "-"))
        if found is None:
            return None
        command = getattr(importlib.import_module(found[0]), found[1])
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name.replace("_", "-") not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, row[2]) for name, row in COMMANDS.items()])


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version(), prog_name="optc")
def cli() -> None:
    """Take a trained PyTorch model to the place where it runs fast.

    \b
    optc compile examples/fiction-3m --target onnx-cpu --quant rtn -o out/fiction
    optc run out/fiction --prompt "The old man looked at the sea, and"

    Exit codes: 0 done, 2 usage, 3 bad input, 4 the target cannot do this, 5 a numerics gate failed,
    6 a requested pass or pattern matched nothing, 7 damaged artifact, 8 out of memory or disk, 1 a bug of optc's.
    """


def normalize(args: list[str]) -> list[str]:
    """`--group_size` -> `--group-size`; values and what follows `--` are left alone."""
    out, literal = [], False
    for arg in args:
        literal = literal or arg == "--"
        if not literal and arg.startswith("--"):
            name, equals, value = arg.partition("=")
            arg = name.replace("_", "-") + equals + value
        out.append(arg)
    return out


def _usage_error(error: click.ClickException) -> UsageError:
    """What click says of the command line, as an error of optc's, for --json."""
    context = getattr(error, "ctx", None)
    path = "optc" if context is None else str(context.command_path)
    return UsageError(error.format_message().rstrip("."), where=path, remedy=f"{path} --help")


def script() -> None:
    """Entry point of the `optc` script: `main` in a process of its own.

    The process ends behind the last exit handler. Python would take down what was made, module by module and tensor by
    tensor, which after torch and transformers takes half a second; the system does it at once.
    """
    code: int | None = None

    def leave() -> None:
        if code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    leave_to_the_end()
    atexit.register(leave)  # the first of them runs last
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else None
        raise


def main(args: list[str] | None = None) -> None:
    """The command line; ends with SystemExit."""
    os.environ.setdefault(*_HUGE_PAGES)
    given = normalize(sys.argv[1:] if args is None else args)

    def body() -> None:
        try:
            cli.main(args=given, prog_name="optc", standalone_mode=False)
        except click.ClickException as error:
            if "--json" in given:
                raise _usage_error(error) from error
            error.show()
            sys.exit(2)
        except click.Abort:
            click.echo("interrupted", err=True)
            sys.exit(130)

    with ended_by_signals():
        code = guarded(body, as_json="--json" in given)
    sys.exit(code)
