"""What the commands do, from Python: `optc.quantize`, `evaluate`, `bench`, `inspect`, `train`.

Results are the objects that the commands print with --json; options are their flags, with underscores.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from optc.compiler.diagnostics import UsageError
from optc.compiler.settings.fields import Given, check_type, fields_of, read_fields, unknown_key

if TYPE_CHECKING:
    from optc.api import CompileResult
    from optc.capturing import Model
    from optc.training.result import TrainResult

Options = TypeVar("Options", bound=msgspec.Struct)


def quantize(model: Model, *, quant: str, output: str | Path, **options: Any) -> CompileResult:
    """Quantize a model to a folder that vLLM, SGLang and transformers load: `optc.compile` for target "vllm".

    Args:
        options: as `optc.compile` takes them.

    Raises:
        OptcError: as `optc.compile`.
    """
    from optc.api import compile

    return compile(model, target="vllm", quant=quant, output=output, **options)


def evaluate(*artifacts: str | Path, progress: bool = False, **options: Any) -> dict[str, Any]:
    """Figures of an artifact on a text, on inputs or on tasks, or of several side by side: what `optc eval --json` prints.

    Args:
        progress: show a bar (in a notebook too; without a terminal lines on stderr).
        options: text=, inputs=, tasks=[...], windows=, source=, no_reference=, save=, threads=, trust=, ...

    Raises:
        OptcError: as `optc eval`; ArtifactError for an artifact that was not made here, which `trust=True` allows.
    """
    from optc.cli.evaluate import EvalOptions, evaluation

    compare = {"compare": True} if len(artifacts) > 1 else {}
    asked = _options(EvalOptions, "optc.evaluate", {**compare, **options})
    with _reporting(progress, "evaluating"):
        return evaluation(tuple(_trusted(item, asked) for item in artifacts), asked)


def bench(artifact: str | Path, *, progress: bool = False, **options: Any) -> dict[str, Any]:
    """Speed and memory of an artifact: what `optc bench --json` prints.

    Args:
        progress: as for `optc.evaluate`.
        options: prompt_length=[...], new_tokens=, batch=, samples=, inputs=, threads=, save=, trust=, ...; those of
            --serve and of --speculative are the command's alone.

    Raises:
        OptcError: as `optc bench`; ArtifactError for an artifact that was not made here, which `trust=True` allows.
    """
    from optc.cli.bench import BenchOptions, benchmark_of

    asked = _options(BenchOptions, "optc.bench", options)
    if asked.serve or asked.speculative is not None:
        raise UsageError(
            "serve and speculative are options of the command", remedy="optc bench --serve, or --speculative"
        )
    with _reporting(progress, "measuring"):
        return benchmark_of(_trusted(artifact, asked), asked)


def inspect(folder: str | Path) -> dict[str, Any]:
    """The verified manifest of an artifact: what `optc inspect --json` prints.

    Raises:
        ArtifactError: damaged or incomplete (7). InputError: there is no such folder (3).
    """
    check_type("folder", folder, str | Path, "the folder of an artifact")
    from optc.compiler.artifact.folder import verify

    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(verify(Path(folder))))  # lists, no tuples
    return found


def train(
    recipe: str | Path,
    *,
    on_step: Callable[[Any], None] | None = None,
    progress: bool = False,
    resume: bool = False,
    **keys: Any,
) -> TrainResult:
    """Run a training recipe in this process: what `optc train` does.

    Args:
        recipe: name of a recipe of optc's ("finetune", "lora", "qat", ...) or a YAML file.
        on_step: gets the record of each step.
        progress: as for `optc.evaluate`.
        keys: flags of `optc train` (model=, output=, text=, max_steps=, bits=, ...), and `set=["optimizer.lr=3e-4"]`.

    Raises:
        OptcError: as `optc train`.
    """
    from optc.cli.train import KEYS, TrainOptions, make_config, reports
    from optc.training.loop import train as run

    settings = {"set": tuple(keys.pop("set"))} if "set" in keys else {}
    for name in keys:
        if name not in KEYS:
            raise unknown_key(name, KEYS, "optc.train")
    options = _options(TrainOptions, "optc.train", {"recipe": str(recipe), "resume": resume, **settings})
    texts = {
        name: tuple(map(str, value)) if isinstance(value, list | tuple) else str(value) for name, value in keys.items()
    }
    config = make_config(None, options, texts)
    with _reporting(progress, "training") as update:
        told = {} if update is None else reports(update, config.output)
        if on_step is not None:
            told["on_step"] = _both(told.get("on_step"), on_step)
        result = run(config, resume=resume, **told)
    assert result is not None, "the first rank of one"
    return result


def _reporting(progress: bool, title: str) -> AbstractContextManager[Callable[..., None] | None]:
    """A bar where one was asked for; nobody knows of how many steps.

    Raises:
        UsageError: neither True nor False.
    """
    check_type("progress", progress, bool, "True or False")
    from optc.progress import reporting

    return reporting(progress, title, lambda: None)


def _both(first: Callable[[Any], None] | None, second: Callable[[Any], None]) -> Callable[[Any], None]:
    """A function that calls one, where there is one, and then the other."""

    def call(record: Any) -> None:
        if first is not None:
            first(record)
        second(record)

    return call


def _options(cls: type[Options], where: str, values: dict[str, Any]) -> Options:
    """A command's own struct of keyword arguments; None leaves a field out.

    Raises:
        UsageError: an unknown option, or a value of another type or out of its bounds.
    """
    fields = fields_of(cls)
    given = {}
    for name, value in values.items():
        if name not in fields:
            raise unknown_key(name, fields, where)
        if value is not None:
            given[name] = Given(value=value, where=f"{where}({name}=...)")
    return cls(**read_fields(cls, given))


def _trusted(artifact: str | Path, options: Any) -> Path:
    """The folder of an artifact whose engine may run in this process: made here, signed, or trusted by the caller.

    Raises:
        ArtifactError: damaged, or nobody vouches for it.
    """
    check_type("artifact", artifact, str | Path, "the folder of an artifact")
    from optc.compiler.artifact.folder import check_trusted, verify

    folder = Path(artifact)
    check_trusted(folder, verify(folder), options.trust, isolated=False)
    return folder
