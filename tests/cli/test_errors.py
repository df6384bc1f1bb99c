"""What a command makes of errors that are nobody's: exhausted memory, on any device and however it is found out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from optc.cli.common import emit, guarded, say
from optc.compiler.diagnostics import InputError, ResourceError, TargetError
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


class PanicException(BaseException):
    """What a panic of a library in Rust is in Python."""


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), PanicException("index out of range")])
def test_what_is_unknown_is_exit_1_with_a_report(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def body() -> None:
        raise error

    assert guarded(body, as_json=False) == 1
    (report,) = tmp_path.iterdir()
    said = capsys.readouterr().err
    assert "optc met an error that it does not know" in said
    assert str(report) in said
    assert f"cause: {type(error).__name__}: {error}" in said
    assert "Traceback" not in said
    written = report.read_text()
    for part in (str(error), "Traceback", "torch: ", "python: ", "in body"):
        assert part in written


def test_no_place_for_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))

    def body() -> None:
        raise KeyError("x")

    assert guarded(body, as_json=False) == 1
    assert "no report could be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "exit_code", "word"),
    [
        (errno.ENOSPC, 8, "free space"),
        (errno.ENOMEM, 8, "memory"),
        (errno.EIO, 3, "the disk or its connection has failed"),
        (errno.EACCES, 3, "permissions"),
    ],
)
def test_what_the_system_refuses(code: int, exit_code: int, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        raise OSError(code, os.strerror(code), "place/of/it")

    assert guarded(body, as_json=False) == exit_code
    said = capsys.readouterr().err
    assert word in said
    assert "where: place/of/it" in said


def test_control_characters_stay_out_of_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b]0;title\x07b\r\x9b2J\u202ec\ud800\x00"
    shown = "a\\x1b]0;title\\x07b\\r\\x9b2J\\u202ec\\ud800\\x00"
    assert str(InputError(hostile, where=hostile, why=hostile)).split("\n")[1] == f"  where: {shown}"
    say(hostile)
    emit({"text": hostile}, True, print)
    said, plain = capsys.readouterr().out.split("\n", 1)
    assert said == shown
    assert plain.isprintable() or set(plain) <= set(map(chr, range(32, 127))) | {"\n"}
    assert json.loads(plain) == {"text": hostile}
    emit({"text": "schön\n"}, True, print)
    assert capsys.readouterr().out == '{\n  "text": "schön\\n"\n}\n'


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
