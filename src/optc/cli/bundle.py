"""`optc bundle`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from optc.cli.common import emit, json_option


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the bundle.")
@click.option("--with-libraries", is_flag=True, help="Copy the engine's shared libraries of this machine into lib/.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@json_option
def bundle(artifact: Path, output: Path, with_libraries: bool, force: bool, as_json: bool) -> None:
    """Write ARTIFACT (onnx-cpu or inductor-cpu) as a folder for hosts without Python.

    It holds the engine, the tokenizer, the manifest, and a C++ program with CMake that continues token ids
    greedily; README.txt there says how to build and run it.

    \b
    optc bundle out/fiction-onnx -o out/bundle
    optc bundle out/fiction-onnx -o out/bundle --with-libraries
    """
    from optc.exporters.bundle import write_bundle

    found = write_bundle(artifact, output, with_libraries=with_libraries, force=force)
    facts = found.manifest.engine_info["bundle"]
    configure = ["cmake", "-S", str(output), "-B", "build"]
    configure += [f"-D{name}={value}" for name, value in found.variables.items()]
    result = {
        "bundle": str(output),
        "target": found.manifest.target,
        "files": len(found.manifest.files),
        "bytes": sum(entry.size for entry in found.manifest.files),
        "libraries": facts["libraries"],
        "variables": found.variables,
        "build": [shlex.join(configure), "cmake --build build"],
        "run": shlex.join(["build/decode", "--model", str(output), "--prompt-tokens", "5,17,33"]),
    }
    emit(result, as_json, _show)


def _show(result: dict[str, Any]) -> None:
    click.echo(
        f"{result['bundle']}: bundle of {result['target']}, {result['files']} files, {result['bytes'] / 1e6:.1f} MB"
    )
    click.echo("build and run here (elsewhere: README.txt):")
    for line in (*result["build"], result["run"]):
        click.echo(f"  {line}")
