"""`python -m optc` from a source tree, where no metadata of the package is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from hf_folders import source

import optc
from optc.compiler import version as module

HIDDEN = """
import importlib.metadata as metadata
found = metadata.Distribution.from_name

def from_name(name):
    if name == "optc":
        raise metadata.PackageNotFoundError(name)
    return found(name)

metadata.Distribution.from_name = from_name
"""
SOURCES = Path(optc.__file__).parents[1]


def test_compiles_without_metadata(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    path = os.pathsep.join([str(tmp_path), str(SOURCES)])
    command = [
        sys.executable,
        "-m",
        "optc",
        "compile",
        str(source("llama", layers=1)),
        "--target",
        "vllm",
        "-o",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    project = tomllib.loads((Path(module.__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["optc_version"] == project["version"]


def test_a_folder_that_is_no_source_tree(tmp_path: Path) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "version", missing)
        patch.setattr(module, "__file__", str(tmp_path / "compiler" / "version.py"))
        module.version.cache_clear()
        try:
            assert module.version() == module.UNKNOWN
            (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "9"\n')
            module.version.cache_clear()
            assert module.version() == module.UNKNOWN
        finally:
            module.version.cache_clear()
