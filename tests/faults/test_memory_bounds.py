"""Files that would take gigabytes, or minutes, are refused before they are parsed."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optc.capturing import gate_tokens
from optc.cli.common import guarded
from optc.compiler.artifact.folder import verify
from optc.compiler.diagnostics import ArtifactError, InputError
from optc.compiler.formats.safetensors_header import read_header
from optc.compiler.ir.saved.exported_archive import read_exported
from optc.compiler.model_folder.checkpoint import check_folder
from optc.compiler.model_folder.config_file import read_json
from optc.runtime.carried.pt2_runner import ArchiveError, check_archive
from optc.runtime.generation.tokenizer import load_tokenizer
from optc.training.metrics import read_log
from optc.training.saving import read_state

MOST_GROWTH = 256 << 20


def header(values: bytes) -> bytes:
    return (len(values) + 7).to_bytes(8, "little") + b'{"a": ' + values + b"}"


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def listing(path: Path) -> Path:
    """An archive whose list of members has 17 MiB."""
    sparse(path, 17 << 20)
    with path.open("ab") as file:
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 17 << 20, 0, 0))
    return path


CASES: dict[str, tuple[str, Callable[[], bytes] | int, Callable[[Path], Any], str]] = {
    "values of a header": (
        "a.safetensors",
        lambda: header(b"[" + b"[]," * 4_000_001 + b"1]"),
        read_header,
        "values; at most",
    ),
    "names of a header": ("a.safetensors", lambda: header(b'0,"":0' * 4_000_001), read_header, "values; at most"),
    "keys of a tokenizer": (
        "tokenizer.json",
        lambda: b"{" + b",".join(b'"%d":0' % number for number in range(101)) + b"}",
        lambda path: load_tokenizer(path.parent),
        "it has 101 keys",
    ),
    "values of a tokenizer": (
        "tokenizer.json",
        lambda: b'{"model": 0, "normalizer": [' + b"[]," * 5_700_000 + b"0]}",
        lambda path: load_tokenizer(path.parent),
        "bytes beside its model",
    ),
    "members of a program": ("a.pt2", 0, lambda path: read_exported(listing(path)), "list of members has"),
    "config": ("config.json", 33 << 20, read_json, "more than"),
    "manifest": ("manifest.json", 33 << 20, lambda path: verify(path.parent), "bytes"),
    "log": ("log.jsonl", 257 << 20, read_log, "more than"),
    "checkpoint": ("checkpoint.json", 17 << 20, lambda path: read_state(path.parent), "more than"),
    "of several processes": ("state.json", 17 << 20, lambda path: read_state(path.parent), "more than"),
    "of DeepSpeed": ("deepspeed.json", 17 << 20, lambda path: read_state(path.parent), "more than"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_early(case: str, tmp_path: Path) -> None:
    name, content, read, why = CASES[case]
    path = tmp_path / name
    if isinstance(content, int):
        sparse(path, content)
    else:
        path.write_bytes(content())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with pytest.raises((InputError, ArtifactError), match=why) as caught:
        read(path)
    assert name in str(caught.value.where)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_GROWTH


def test_members_of_a_package(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"no archive: its list of members has \d+ bytes, more than"):
        check_archive(listing(tmp_path / "model.pt2"))


def test_of_a_long_text_the_gate_reads_the_start(tmp_path: Path, example_model: Path) -> None:
    long, short, info = tmp_path / "long.txt", tmp_path / "short.txt", check_folder(example_model)
    start = "Once upon a time. \u00e9" * 2_000
    sparse(long, 1 << 30)
    with long.open("rb+") as file:
        file.write(start.encode())
    short.write_text(start, encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert gate_tokens(info, long) == gate_tokens(info, short)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_GROWTH


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), 8),
        (ImportError("libx.so: cannot allocate memory in static TLS block: Cannot allocate memory"), 8),
        (ImportError("/mnt/x.so: failed to map segment from shared object: Operation not permitted"), 1),
        (ImportError("No module named 'x'"), 1),
    ],
)
def test_a_library_that_finds_no_memory(error: ImportError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        raise error

    assert guarded(body, as_json=False) == code
    told = capsys.readouterr().err.replace(Path(__file__).name, "")
    assert ("memory" in told) == (code == 8)
