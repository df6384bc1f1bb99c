"""`optc check`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from optc.cli.common import emit, json_option, say
from optc.compiler.diagnostics import ArtifactError, InputError, TargetError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def check(folder: Path, as_json: bool) -> None:
    """Say whether this machine can run an artifact: one line per need, with ok or the reason.

    Looks at instruction sets, C libraries, GPU, driver, memory and installed runtimes; loads nothing of the
    artifact. Exits with 4 when something is missing. The same program lies in TensorRT artifacts and bundles as
    check.py, for machines without optc.

    \b
    optc check out/fiction-trt
    """
    from optc.runtime.carried.check_device import report, text_of

    if not folder.is_dir():
        raise InputError(
            "the artifact is not a folder" if folder.exists() else "the artifact does not exist",
            where=str(folder),
            remedy="give the folder that `optc compile -o` wrote",
        )
    try:
        result = report(str(folder))
    except ValueError as error:
        raise ArtifactError(
            "the artifact cannot be checked",
            where=str(folder),
            why=str(error),
            remedy="copy the artifact again from where it was made, or compile it again",
        ) from error
    emit(result, as_json, lambda found: say(text_of(found)))
    if not result["ok"]:
        sys.exit(TargetError.exit_code)  # the lines said why
