"""The targets that the registry finds, and what it says of those that it cannot use."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import optc.targets
from optc.compiler.diagnostics import TargetError, UsageError
from optc.compiler.target.options import CompileOptions
from optc.targets import registry
from optc.targets.registry import all_targets, find_target


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    registry.targets.cache_clear()
    yield
    registry.targets.cache_clear()


def test_every_file_with_a_target_is_one() -> None:
    """No list names them: the modules of the folder that have a TARGET."""
    files = Path(optc.targets.__path__[0]).glob("*.py")
    written = {path.stem.replace("_", "-") for path in files if "\nTARGET = " in path.read_text()}
    assert {target.name for target in all_targets()} == written
    assert find_target("onnx").name == find_target("edge").name == "onnx-cpu"
    assert find_target("inductor_cpu").name == "inductor-cpu"
    with pytest.raises(UsageError, match="did you mean 'onnx-cpu'"):
        find_target("onx-cpu")
    for name in ("methods", "registry", "every_operator", "", "..", "a.b"):
        with pytest.raises(UsageError, match="unknown target"):
            find_target(name)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, *arguments: Any) -> Any:
        if name == "optc.targets.onnx_cpu":
            raise ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir")
        return real(name, *arguments)

    monkeypatch.setattr(registry.importlib, "import_module", without)
    with pytest.raises(TargetError, match="needs the package 'onnx_ir', which is not installed"):
        find_target("onnx-cpu")
    assert "onnx-cpu" not in {target.name for target in all_targets()}, "the others are still there"


def test_recipes_say_nothing_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with nothing installed describes every target; whether it can build one is another question."""
    for target in all_targets():
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda name, package=None: None)
            cache = target.kv_caches[0] if target.kv_caches else None
            options = CompileOptions(dtype=target.dtypes[0], kv_cache=cache, own=target.options())
            assert isinstance(target.recipe("decoder", options), list)
