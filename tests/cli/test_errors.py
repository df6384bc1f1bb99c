"""What a command makes of errors that are nobody's: exhausted memory, on any device and however it is found out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest
import torch

from optc.cli.common import guarded
from optc.compiler.diagnostics import ResourceError, TargetError
from optc.runtime.sessions.cuda_graphs import graph_recorder

CUDA = "CUDA out of memory. Tried to allocate 2 GiB"


def behind(first: Exception) -> Exception:
    """An error that hides another one."""
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = first
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError(CUDA),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        behind(torch.OutOfMemoryError(CUDA)),
    ],
)
def test_exhausted_memory_is_a_resource_error(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        raise error

    assert guarded(body, as_json=True) == 8
    assert json.loads(capsys.readouterr().out)["error"] == "resource"


def test_other_errors_of_torch_stay_what_they_are() -> None:
    def body() -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        guarded(body, as_json=False)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (behind(torch.OutOfMemoryError(CUDA)), ResourceError, "no memory left in which the step"),
        (behind(ValueError("not while capturing")), TargetError, "ValueError: not while capturing"),
    ],
)
def test_a_capture_that_fails_says_why(
    error: Exception, kind: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def capture(*_: object, **__: object) -> Iterator[None]:
        yield
        raise error

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    with pytest.raises(kind, match=text):
        graph_recorder()("the step", lambda: None)
