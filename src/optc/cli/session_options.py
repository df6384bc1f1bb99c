"""What run, eval and bench share: options of the session, and figures kept in the artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from optc.compiler.artifact.manifest import Manifest
from optc.runtime.sessions.session import Session

F = TypeVar("F", bound=Callable[..., Any])

artifact_argument = click.argument("artifact", type=click.Path(path_type=Path))


def session_options(command: F) -> F:
    """--threads and --kv-blocks."""
    command = click.option(
        "--kv-blocks", type=int, help="Blocks in the KV pool of a paged artifact (default: 8 full contexts)."
    )(command)
    return click.option("--threads", type=int, help="Threads of the engine (default: one per physical core).")(command)


def kv_pool(session: Session) -> dict[str, Any]:
    """How well a paged session used its pool, under `kv_pool`; nothing for other sessions."""
    use = getattr(session, "pool_use", None)
    return {} if use is None else {"kv_pool": asdict(use)}


def device_option(text: str) -> Callable[[F], F]:
    """--device, with what it is for."""
    return click.option("--device", metavar="cpu|cuda|cuda:N|auto", help=text)


save_option = click.option(
    "--save", is_flag=True, help="Also store the figures in the artifact's manifest and report.html."
)


def save_figures(folder: Path, **figures: dict[str, Any]) -> None:
    """Put `quality` or `speed` figures into the manifest and the report, in one atomic step."""
    from optc.compiler.artifact.folder import rewrite
    from optc.exporters.reports.report import write_report

    def edit(directory: Path, manifest: Manifest) -> Manifest:
        edited = msgspec.structs.replace(manifest, **figures)
        write_report(directory, edited)
        return edited

    rewrite(folder, edit)
