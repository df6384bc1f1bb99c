"""Running tasks of the Language Model Evaluation Harness (lm-eval) on an artifact, offline ones among them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from optc.compiler.diagnostics import InputError, TargetError, UsageError, described, foreign_errors
from optc.compiler.settings.fields import check_range
from optc.runtime.bounds import Count, CountOrZero
from optc.runtime.sessions.text_model import Model


def run_tasks(
    model: Model,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_request: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run tasks by name or path.

    A path is a YAML file of one task, or a folder of them; tasks that a YAML file makes of Python functions run
    that code. Names are the harness's own tasks, whose data sets it fetches.

    Args:
        num_fewshot: examples in the prompt; None takes what each task says.
        limit: use only so many examples of each task.

    Returns:
        task -> {metric: {"value", "stderr"}, ...} and "samples"; groups are rows of their own.

    Raises:
        TargetError: lm-eval is not installed.
        UsageError: unknown task, or a number out of range.
        InputError: a task file or its data cannot be read, or the artifact has no tokenizer.
    """
    if not tasks:
        raise UsageError("no task is named", remedy="give --tasks NAME or a YAML file or folder")
    for name, value, kind in (("limit", limit, Count), ("num-fewshot", num_fewshot, CountOrZero)):
        if value is not None:
            check_range(name, value, kind)
    try:
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager

        from optc.runtime.measuring.lm_eval_adapter import ArtifactLM, figures
    except ModuleNotFoundError as error:
        raise TargetError(
            "the evaluation harness is not installed", why=str(error), remedy='pip install "optc[eval]"'
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    _sandbox_templates()
    lm = ArtifactLM(model, seed=seed, on_request=on_request)
    paths = [Path(item) for item in tasks if _is_path(item)]
    names = [item for item in tasks if not _is_path(item)]
    folders = [path for path in paths if path.is_dir()]
    manager = TaskManager(include_path=folders or None, include_defaults=bool(names))
    for path in paths:
        names += _names_at(path, manager)
    loaded = _load(manager, names)
    for task in loaded["tasks"].values():
        if num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    # The harness prints as it goes, and would fork for its bootstrap, under a runtime that has threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with contextlib.redirect_stdout(sys.stderr), _template_errors(names):
        found = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=False, bootstrap_iters=1000)
    assert found is not None
    counts = {name: row["effective"] for name, row in found["n-samples"].items()}
    return {name: {**row, "samples": counts.get(name)} for name, row in figures(found["results"])}


@contextlib.contextmanager
def _template_errors(names: Sequence[str]) -> Iterator[None]:
    """Around an evaluation: what a template of a task may not do, or cannot."""
    import jinja2

    try:
        yield
    except jinja2.TemplateError as error:
        raise InputError(
            "a template of a task fails",
            where=", ".join(names),
            why=described(error),
            remedy="correct the task's YAML file",
        ) from error


def _sandbox_templates() -> None:
    """Templates of task files render without access to Python's objects and within bounds: the harness has a plain environment.

    Functions that a YAML file names with `!function` run all the same; they are files beside it.
    """
    from lm_eval import utils

    from optc.runtime.generation.template_sandbox import BoundedEnvironment

    plain = utils.env
    if isinstance(plain, BoundedEnvironment):
        return
    bounded = BoundedEnvironment(undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    for name in plain.filters.keys() - bounded.filters.keys():
        bounded.add_filter(name, plain.filters[name], repeats=True)  # regex_replace
    utils.env = bounded


def _is_path(item: str) -> bool:
    return Path(item).exists() or item.endswith((".yaml", ".yml")) or "/" in item


def _names_at(path: Path, manager: Any) -> list[str]:
    """What to ask the manager for: the file itself, or every task of a folder (those of groups among them).

    Raises:
        InputError: there is none.
    """
    place = path.resolve()
    if not place.exists():
        raise InputError("the task does not exist", where=str(path), remedy="give a YAML file or a folder")
    if place.is_file():
        return [str(place)]
    found = [
        name
        for name in manager.all_subtasks
        if (file := getattr(manager.task_index[name], "yaml_path", None)) is not None
        and place in Path(file).resolve().parents
    ]
    if not found:
        raise InputError("no task is defined there", where=str(path), remedy="a task is a YAML file with `task: NAME`")
    return found


def _load(manager: Any, names: list[str]) -> Any:
    known = set(manager.all_tasks)
    for name in names:
        if name not in known and not Path(name).is_file():
            raise UsageError(
                f"unknown task '{name}'",
                why=f"it is none of the {len(known)} tasks known",
                remedy="lm-eval ls tasks lists the harness's own; a path needs a slash or .yaml",
            )
    with foreign_errors(  # functions of a task fail in every way there is
        "a task cannot be loaded",
        where=", ".join(names),
        remedy="check the task's YAML file and that its data set is on this machine",
    ):
        return manager.load(list(dict.fromkeys(names)))
