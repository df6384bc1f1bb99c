"""What run, eval and bench share: options of the session, and figures kept in the artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
from msgspec import Meta

from optc.compiler.artifact.manifest import Manifest
from optc.runtime.sessions.session import Session

artifact_argument = click.argument("artifact", type=click.Path(path_type=Path))


class SessionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a session."""

    threads: (
        Annotated[
            int,
            Meta(ge=1, le=4096, description="Threads of the engine.", extra={"default": "one per physical core"}),
        ]
        | None
    ) = None
    kv_blocks: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=1 << 31,
                description="Blocks in the KV pool of a paged artifact.",
                extra={"default": "8 full contexts"},
            ),
        ]
        | None
    ) = None


Save = Annotated[bool, Meta(description="Also store the figures in the artifact's manifest and report.html.")]
"""The type of a field that keeps figures; see `save_figures`."""


def kv_pool(session: Session) -> dict[str, Any]:
    """How well a paged session used its pool, under `kv_pool`; nothing for other sessions."""
    use = getattr(session, "pool_use", None)
    return {} if use is None else {"kv_pool": asdict(use)}


def save_figures(folder: Path, **figures: dict[str, Any]) -> None:
    """Put `quality` or `speed` figures into the manifest and the report, in one atomic step."""
    from optc.compiler.artifact.folder import rewrite
    from optc.exporters.reports.report import write_report

    def edit(directory: Path, manifest: Manifest) -> Manifest:
        edited = msgspec.structs.replace(manifest, **figures)
        write_report(directory, edited)
        return edited

    rewrite(folder, edit)
