"""One place for engines: sessions, bundles and files are found through it, and other packages can add theirs."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

import pytest

from optc.compiler.artifact import engines as registry
from optc.compiler.artifact.engines import (
    AOTINDUCTOR,
    ENTRY_POINTS,
    Engine,
    check_facts,
    engines,
    find_engine,
)
from optc.compiler.diagnostics import ArtifactError
from optc.exporters.bundle.engines import BundleEngine


@pytest.mark.parametrize("engine", engines().values(), ids=lambda engine: engine.name)
def test_what_an_engine_names_exists(engine: Engine) -> None:
    """Its session opens artifacts; its bundle is one."""
    module, _, name = engine.session.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    bundle = engine.bundle_engine()
    assert (bundle is None) == (engine.name not in ("onnx", "aotinductor"))
    assert bundle is None or isinstance(bundle, BundleEngine)


def test_unknown_engine() -> None:
    with pytest.raises(ArtifactError) as caught:
        find_engine("tvm", "folder")
    assert caught.value.why == (
        "its engine is 'tvm'; known are aotinductor, cuda, executorch, huggingface, onnx, onnx-cuda, tensorrt"
    )


def test_engine_opens_listed_files_only() -> None:
    """`library` may be null; a name outside the list would be opened unchecked."""
    info = {"model": "model.pt2", "weights": "model.safetensors", "library": None, "runner": "generate.py"}
    listed = {"model.pt2", "model.safetensors", "generate.py"}
    assert AOTINDUCTOR.opened_files(info) == {
        "model": "model.pt2",
        "weights": "model.safetensors",
        "runner": "generate.py",
    }
    info |= {"inputs": [], "constants": {}}
    needs = {"machine": "x86_64", "torch": "2.13", "cpu_flags": ["avx2"]}
    check_facts(AOTINDUCTOR, info, needs, listed, "folder")
    with pytest.raises(ArtifactError, match="does not list") as caught:
        check_facts(AOTINDUCTOR, {**info, "library": "../evil.so"}, needs, listed, "folder")
    assert caught.value.why == "'library' is '../evil.so'"
    for broken in ({**info, "constants": 3}, {**info, "inputs": [{"name": 1}]}, {**info, "block_size": -1}):
        with pytest.raises(ArtifactError, match="what optc does not write"):
            check_facts(AOTINDUCTOR, broken, needs, listed, "folder")
    with pytest.raises(ArtifactError, match="what optc does not write"):
        check_facts(AOTINDUCTOR, info, {"machine": "x86_64", "torch": 2}, listed, "folder")


def test_engine_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Engine(name="toy", session="toy.session:open_artifact")

    class Point:
        name, group, value = "toy", ENTRY_POINTS, "toy.session:ENGINE"

        def load(self) -> Engine:
            return own

    def points(*, group: str) -> list[Any]:
        return [Point()] if group == ENTRY_POINTS else []

    monkeypatch.setattr(metadata, "entry_points", points)
    registry.engines.cache_clear()
    try:
        assert find_engine("toy", "folder") is own
    finally:
        registry.engines.cache_clear()
