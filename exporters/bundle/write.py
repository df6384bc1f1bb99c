"""A deployment folder from an artifact: engine, tokenizer, manifest, and a C++ program that decodes greedily.

The folder is an artifact of its own: `optc verify` checks it and `optc run` loads it. SHA256SUMS says the same to
hosts that have only coreutils.
"""

from __future__ import annotations

import shutil
import string
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from optc.compiler.artifact.engines import find_engine as find_artifact_engine
from optc.compiler.artifact.folder import check_trusted, finish, verify, write_folder
from optc.compiler.artifact.manifest import Manifest, is_made_here
from optc.compiler.diagnostics import ArtifactError, InputError, TargetError, os_errors
from optc.exporters.bundle.engines import BundleEngine, Runtime, find_engine

SUMS, LIBRARIES = "SHA256SUMS", "lib"
_SHARED = ("main.cpp", "host.cpp", "decode.h")
_LEFT_OUT = ("report.html",)


@dataclass(frozen=True)
class Bundle:
    """What was written.

    Attributes:
        variables: of CMake, with the values that build the program on this machine; empty when the engine is not
            installed here, or its libraries are in the folder and are all that is needed.
    """

    folder: Path
    manifest: Manifest
    variables: dict[str, str]


def write_bundle(
    artifact: Path, output: Path, *, with_libraries: bool = False, force: bool = False, trust: bool = False
) -> Bundle:
    """Write a deployment folder, whole or not at all.

    Args:
        with_libraries: put the engine's shared libraries of this machine into `lib/`.
        force: replace an older artifact or bundle.
        trust: bundle native code of an artifact that nobody vouches for; see `check_trusted`.

    Raises:
        ArtifactError: the artifact is damaged, or not trusted; its package would be unpacked elsewhere.
        TargetError: no program for its engine, or `with_libraries` and the engine is not installed here.
        InputError: the artifact is already a bundle, or the output exists or lies inside the artifact.
        ResourceError: the disk is full.
    """
    manifest = verify(artifact)
    engine = find_engine(manifest)
    check_trusted(artifact, manifest, trust)
    find_artifact_engine(manifest.engine, str(artifact)).check_opened(artifact, manifest)
    _check_places(artifact, output, manifest)
    runtime = engine.runtime()
    if with_libraries and runtime is None:
        raise TargetError("the engine's libraries are not installed here", remedy=f'pip install "optc[{engine.extra}]"')
    with write_folder(output, force=force) as directory:
        _copy_artifact(artifact, directory, manifest)
        libraries = _copy_libraries(directory, runtime) if with_libraries and runtime is not None else []
        program = _write_program(directory, manifest, engine)
        facts = {"engine": engine.name, "program": program, "libraries": libraries}
        edited = manifest.with_program(engine_info={**manifest.engine_info, "bundle": facts})
        made_here = is_made_here(manifest)
        draft = finish(directory, edited, made_here=made_here)
        _check_copies(manifest, draft, str(artifact))
        with os_errors("writing the checksums", str(directory / SUMS)):
            rows = [f"{entry.sha256}  {entry.path}\n" for entry in draft.files]
            (directory / SUMS).write_text("".join(rows))
        final = finish(directory, edited, made_here=made_here)
    return Bundle(output, final, runtime.variables if runtime is not None else {})


def _check_places(artifact: Path, output: Path, manifest: Manifest) -> None:
    if "bundle" in manifest.engine_info:
        raise InputError("the artifact is already a bundle", where=str(artifact), remedy="copy the folder as it is")
    inside = artifact.resolve()
    if inside in (output.resolve(), *output.resolve().parents):
        raise InputError(
            "the output lies inside the artifact",
            where=str(output),
            why="the artifact would no longer be whole",
            remedy="choose a folder beside it",
        )


def _copy_artifact(source: Path, directory: Path, manifest: Manifest) -> None:
    """The files that run; not the report and the stages' text, which are for people."""
    for entry in manifest.files:
        if entry.path in _LEFT_OUT or entry.path.startswith("ir/"):
            continue
        place = directory / entry.path
        with os_errors("copying the artifact", entry.path):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / entry.path, place, follow_symlinks=False)


def _copy_libraries(directory: Path, runtime: Runtime) -> list[str]:
    names = []
    with os_errors("copying the libraries", str(directory / LIBRARIES)):
        (directory / LIBRARIES).mkdir()
        for name, file in runtime.libraries.items():
            shutil.copyfile(file, directory / LIBRARIES / name)
            names.append(f"{LIBRARIES}/{name}")
    return names


def _write_program(directory: Path, manifest: Manifest, engine: BundleEngine) -> list[str]:
    """Sources, build file, README and the check of a device; the paths written."""
    base = resources.files("optc.exporters.bundle") / "program"
    texts = {f"program/{name}": (base / name).read_text() for name in _SHARED}
    for file in _files(base / engine.name):
        folder = "program/" if file.name.endswith((".cpp", ".h")) else ""
        texts[folder + file.name] = file.read_text()
    texts["program/model.h"] = engine.header(manifest, directory)
    texts["README.txt"] = string.Template(texts["README.txt"]).substitute(_facts(manifest))
    texts["check.py"] = (resources.files("optc.runtime.carried") / "check_device.py").read_text()
    with os_errors("writing the program", str(directory)):
        (directory / "program").mkdir()
        for name, text in texts.items():
            if (directory / name).exists():
                raise InputError(
                    f"the artifact has a file of its own named {name}",
                    where=str(directory),
                    remedy="remove the file from the model folder, and compile again",
                )
            (directory / name).write_text(text)
    return sorted(texts)


def _files(folder: Traversable) -> list[Traversable]:
    return sorted((item for item in folder.iterdir() if item.is_file()), key=lambda item: item.name)


def _facts(manifest: Manifest) -> dict[str, str]:
    model = manifest.contract.model
    needs = manifest.needs
    return {
        "model": model.architecture or model.model_type or "model",
        "target": manifest.target,
        "vocabulary": str(model.vocab_size),
        "torch": str(needs.get("torch", "")),
        "onnxruntime": str(needs.get("onnxruntime", "")),
    }


def _check_copies(before: Manifest, after: Manifest, where: str) -> None:
    """Every file that was copied has the bytes that the artifact's manifest says."""
    known = {entry.path: entry.sha256 for entry in before.files}
    for entry in after.files:
        if known.get(entry.path, entry.sha256) != entry.sha256:
            raise ArtifactError(
                f"'{entry.path}' changed while it was copied", where=where, remedy="write the bundle again"
            )
