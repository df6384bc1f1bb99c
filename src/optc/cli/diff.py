"""`optc diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from optc.cli.common import emit, json_option, say
from optc.compiler.diagnostics import InputError
from optc.compiler.files import read_plain

_MOST_BYTES = 256 << 20  # of a stage's text: a layer has some 10 kB


def find_stage(run: Path, stage: str) -> Path:
    """The text file of a stage: RUN is an artifact or a --dump-ir folder, `stage` a number or a name.

    Raises:
        InputError: no such run or stage; lists the stages there are.
    """
    folder = run / "ir" if (run / "ir").is_dir() else run
    files = sorted(path for path in folder.glob("[0-9][0-9]-*.txt") if path.is_file()) if folder.is_dir() else []
    if not files:
        raise InputError("no stages found", where=str(run), remedy="give an artifact or a --dump-ir folder")
    for path in files:
        number, _, name = path.stem.partition("-")
        if stage in (name, path.stem) or (stage.isdigit() and int(stage) == int(number)):
            return path
    raise InputError(f"no stage '{stage}'", where=str(run), remedy=f"stages: {', '.join(path.stem for path in files)}")


def read_stage(path: Path) -> str:
    """The text of a stage's file, which is no link.

    Raises:
        InputError: it is a link, no plain file, or not UTF-8.
    """
    data = read_plain(path, "reading the stage", most=_MOST_BYTES, follow=False)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            "the stage is not UTF-8", where=str(path), why=str(error), remedy="compile the model again"
        ) from error


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("first")
@click.argument("second")
@json_option
def diff(run: Path, first: str, second: str, as_json: bool) -> None:
    """Show what changed between two stages of RUN (an artifact or a --dump-ir folder).

    \b
    optc diff out/fiction-onnx 02 03
    optc diff out/fiction-onnx capture fuse-norm
    """
    from optc.compiler.artifact.folder import verify
    from optc.compiler.ir.text import diff_text

    if (run / "manifest.json").exists():
        verify(run)
    paths = [find_stage(run, stage) for stage in (first, second)]
    texts = [read_stage(path) for path in paths]
    text = diff_text(*texts, name_a=paths[0].stem, name_b=paths[1].stem)
    emit({"first": paths[0].stem, "second": paths[1].stem, "diff": text}, as_json, _show)


def _show(result: dict[str, Any]) -> None:
    colors = {"+": "green", "-": "red", "@": "cyan"}
    for line in result["diff"].splitlines():
        say(line, fg=colors.get(line[:1]))
