"""`optc bundle`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
from msgspec import Meta

from optc.cli.common import emit, json_option, say
from optc.cli.options import struct_flags
from optc.runtime.bounds import Trust


class BundleOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bundle goes, and what is in it."""

    output: Annotated[Path, Meta(description="Folder of the bundle.", extra={"short": "-o"})]
    with_libraries: Annotated[
        bool, Meta(description="Copy the engine's shared libraries of this machine into lib/.")
    ] = False
    force: Annotated[bool, Meta(description="Replace an existing bundle.")] = False
    trust: Trust = False


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@struct_flags(BundleOptions)
@json_option
def bundle(artifact: Path, options: BundleOptions, as_json: bool) -> None:
    """Write ARTIFACT (onnx-cpu or inductor-cpu) as a folder for hosts without Python.

    It holds the engine, the tokenizer, the manifest, and a C++ program with CMake that continues token ids
    greedily; README.txt there says how to build and run it.

    \b
    optc bundle out/fiction-onnx -o out/bundle
    optc bundle out/fiction-onnx -o out/bundle --with-libraries
    """
    from optc.exporters.bundle import write_bundle

    found = write_bundle(
        artifact,
        options.output,
        with_libraries=options.with_libraries,
        force=options.force,
        trust=options.trust,
    )
    facts = found.manifest.engine_info["bundle"]
    configure = ["cmake", "-S", str(options.output), "-B", "build"]
    configure += [f"-D{name}={value}" for name, value in found.variables.items()]
    result = {
        "bundle": str(options.output),
        "target": found.manifest.target,
        "files": len(found.manifest.files),
        "bytes": sum(entry.size for entry in found.manifest.files),
        "libraries": facts["libraries"],
        "variables": found.variables,
        "build": [shlex.join(configure), "cmake --build build"],
        "run": shlex.join(["build/decode", "--model", str(options.output), "--prompt-tokens", "5,17,33"]),
    }
    emit(result, as_json, _show)


def _show(result: dict[str, Any]) -> None:
    say(f"{result['bundle']}: bundle of {result['target']}, {result['files']} files, {result['bytes'] / 1e6:.1f} MB")
    say("build and run here (elsewhere: README.txt):")
    for line in (*result["build"], result["run"]):
        say(f"  {line}")
