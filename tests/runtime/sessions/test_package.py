"""What a user sees of a package that refuses to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from artifacts import make_manifest

from optc.compiler.diagnostics import InputError, OptcError, ResourceError, TargetError
from optc.compiler.ir.contract import KVCache, ModelFacts
from optc.runtime.carried.pt2_runner import PackageError
from optc.runtime.sessions import package as package_session
from optc.runtime.sessions.session import SessionOptions


class _Broken:
    """A package that loads and fails when it is called."""

    error: Exception = PackageError("input input_ids is int32")

    def __init__(self, folder: Path, info: Any, needs: Any) -> None:
        pass

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        raise self.error


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (PackageError("input x is int32"), InputError, "the package does not take these inputs"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 5"), ResourceError, "out of memory"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
)
def test_failures_of_a_running_package(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[Exception], message: str
) -> None:
    monkeypatch.setattr(package_session, "Package", _Broken)
    monkeypatch.setattr(_Broken, "error", raised)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    contract = msgspec.structs.replace(
        make_manifest().contract,
        kv_cache=KVCache(kind="linear", in_place=True),
        model=ModelFacts(vocab_size=9),
    )
    manifest = make_manifest(contract=contract, engine="aotinductor", engine_info={"context_length": 16})
    session = package_session.open_artifact(Path("somewhere"), manifest, SessionOptions())
    with pytest.raises(kind, match=message) as caught:
        session.prefill([[1, 2, 3]])
    assert isinstance(caught.value, OptcError) is (kind is not RuntimeError)


def test_failure_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def __init__(self, folder: Path, info: Any, needs: Any) -> None:
            raise PackageError("the processor lacks avx512")

    monkeypatch.setattr(package_session, "Package", Absent)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with pytest.raises(TargetError, match="the package cannot run on this host"):
        package_session.open_artifact(Path("somewhere"), make_manifest(), SessionOptions())
