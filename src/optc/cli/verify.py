"""`optc verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from optc.cli.common import emit, json_option, say


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="Public key (PEM) that must have signed the artifact.")
@json_option
def verify(folder: Path, key: Path | None, as_json: bool) -> None:
    """Check every file of an artifact against its manifest: size, hash, nothing missing or added.

    Hashes find damage. Who made the artifact is told by a signature alone: --key.

    \b
    optc verify out/fiction-onnx
    optc verify out/fiction-onnx --key maker.pem.pub
    """
    from optc.compiler.artifact.folder import verify as verify_folder
    from optc.compiler.artifact.manifest import FILE_NAME, is_made_here
    from optc.compiler.artifact.trust import check_signature, read_public_key

    manifest = verify_folder(folder)
    if key is not None:
        check_signature(folder, (folder / FILE_NAME).read_bytes(), {key.name: read_public_key(key)})
    total = sum(entry.size for entry in manifest.files)
    result = {
        "artifact": str(folder),
        "ok": True,
        "files": len(manifest.files),
        "bytes": total,
        "target": manifest.target,
        "signed_by": None if key is None else str(key),
        "made_here": is_made_here(manifest),
        "native_code": list(manifest.native_code),
    }
    emit(result, as_json, _show)


def _show(result: dict[str, Any]) -> None:
    size = f"{result['files']} files, {result['bytes'] / 1e6:.1f} MB, {result['target']}"
    say(f"{result['artifact']}: intact ({size})")
    if result["signed_by"]:
        say(f"signed with the key {result['signed_by']}")
    if result["native_code"]:
        made = "made on this machine" if result["made_here"] else "not made on this machine"
        say(f"it holds native code ({', '.join(result['native_code'])}), {made}")
