"""`optc verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from optc.cli.common import emit, json_option, say


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def verify(folder: Path, as_json: bool) -> None:
    """Check every file of an artifact against its manifest: size, hash, nothing missing or added.

    \b
    optc verify out/fiction-onnx
    """
    from optc.compiler.artifact.folder import verify as verify_folder

    manifest = verify_folder(folder)
    total = sum(entry.size for entry in manifest.files)
    result = {
        "artifact": str(folder),
        "ok": True,
        "files": len(manifest.files),
        "bytes": total,
        "target": manifest.target,
    }
    emit(result, as_json, _show)


def _show(result: dict[str, Any]) -> None:
    say(f"{result['artifact']}: intact ({result['files']} files, {result['bytes'] / 1e6:.1f} MB, {result['target']})")
