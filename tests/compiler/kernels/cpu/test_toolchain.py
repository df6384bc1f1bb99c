"""The C++ compiler, the cache of compiled libraries and what a host must have."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from stages import captured

from optc.compiler import compat
from optc.compiler.diagnostics import InputError, TargetError
from optc.compiler.kernels.cpu import library, toolchain
from optc.compiler.kernels.kernel import kernels_for
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.target import ExportRequest, check_legal
from optc.exporters.inductor import export_inductor
from optc.exporters.options.inductor import InductorOptions
from optc.passes.kv_cache.static import StaticKVCache
from optc.targets.inductor_cpu import TARGET

CPU = kernels_for("cpu")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Exit code 4, before anything is compiled or written."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(TargetError) as caught:
        export_inductor(captured("bert"), ExportRequest(directory=tmp_path, options=InductorOptions()))
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        "no C++ compiler was found\n"
        "  cause: AOTInductor compiles its kernels with one, and so does the op library\n"
        "  remedy: install g++ 12 or newer (Debian and Ubuntu: apt install g++), or name one in $CXX"
    )
    assert list(tmp_path.iterdir()) == []


def test_failing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its first error is told, and nothing stays in the cache."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cpp:1: error: no such thing" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(TargetError, match="the C\\+\\+ compiler failed on the op library") as caught:
        library.build_library(CPU)
    assert caught.value.why == "x.cpp:1: error: no such thing"
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler that writes the names of what it makes into this file, "with.o" for what finds parsed headers beside it; an
    empty cache."""
    compiler, log = tmp_path / "c++", tmp_path / "log"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\nwhile [ "$1" != -o ]; do shift; done\n'
        f'with=; [ "${{2%.o}}" != "$2" ] && [ -s "${{2%/*}}/torch_headers.h.gch" ] && with=with\n'
        f'echo "$with ${{2##*/}}" >> {log}\nsleep 0.1\necho object > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return log


def test_two_at_once_compile_each_source_once(compiled: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(library.build_library, (CPU, CPU))
    assert one == other
    objects = [name for name in compiled.read_text().split() if name.endswith(".o")]
    assert len(objects) == len(set(objects)) >= len(CPU)


def test_headers_are_parsed_once_for_several_ops(compiled: Path) -> None:
    library.build_library(CPU)
    lines = compiled.read_text().splitlines()
    assert [line for line in lines if line.endswith(".gch")] == [" torch_headers.h.gch"]
    found = {line.split()[1].rpartition("-")[0] for line in lines if line.startswith("with")}
    assert found == {kernel.sources.op for kernel in CPU}


def test_where_parsed_headers_have_no_room_each_op_parses_its_own(compiled: Path) -> None:
    compiler = compiled.with_name("c++")
    text = compiler.read_text()
    compiler.write_text(text.replace("with=;", 'case "$2" in *.gch) echo half > "$2"; exit 1;; esac\nwith=;'))
    library.build_library(CPU)
    assert "with" not in compiled.read_text()
    assert len(compiled.read_text().splitlines()) > len(CPU)


def test_a_single_op_parses_its_own(compiled: Path) -> None:
    library.build_library([kernel for kernel in CPU if kernel.op == "linear_nbits"])
    assert "gch" not in compiled.read_text()
    assert "with" not in compiled.read_text()


@pytest.mark.parametrize(
    ("place", "value", "again"),
    [
        ("torch.__path__", ["/elsewhere"], False),
        ("torch.version.git_version", "0", True),
        ("torch.__version__", "9", True),
    ],
)
def test_environments_share_what_they_compile(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, place: str, value: object, again: bool
) -> None:
    """The same torch in another folder has the same headers; another torch has others."""
    library.build_library(CPU)
    before = compiled.read_text()
    monkeypatch.setattr(place, value)
    library.build_library(CPU)
    assert (compiled.read_text() != before) == again


def test_unwritable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="failed while building the op library"):
        library.build_library(CPU)


@pytest.mark.parametrize(
    ("flags", "march", "some"),
    [
        (["-mavx512f", "-mavx512vnni", "-mfma"], "x86-64-v4", {"avx512f", "avx512_vnni", "avx2", "fma"}),
        (["-mavx2", "-mfma", "-mf16c"], "x86-64-v3", {"avx2", "fma", "f16c", "abm"}),
        ([], "x86-64-v2", {"sse4_2", "popcnt"}),
    ],
)
def test_instruction_sets(monkeypatch: pytest.MonkeyPatch, flags: list[str], march: str, some: set[str]) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(compat, "has_inductor_march", lambda: True)
    monkeypatch.setattr(compat, "vector_flags", lambda: flags)
    chosen = toolchain.instruction_set()
    assert chosen.march == march
    assert some <= set(chosen.flags)
    assert ("avx512f" in chosen.flags) == (march == "x86-64-v4")


def test_without_a_choice_the_host_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "has_inductor_march", lambda: False)
    chosen = toolchain.instruction_set()
    assert (chosen.march, set(chosen.flags)) == (None, toolchain.host_flags())


def test_this_host_can_run_what_it_compiles() -> None:
    assert set(toolchain.instruction_set().flags) <= toolchain.host_flags()


def test_illegal_operators_are_named() -> None:
    """The dialect before legalization, and operators of other libraries."""
    program = StaticKVCache(in_place=True).run(captured("llama"), PassContext()).program
    with pytest.raises(TargetError, match="'inductor-cpu' cannot run 2 node") as caught:
        check_legal(program, TARGET)
    assert "optc.cached_attention_.default has no lowering" in str(caught.value.where)
    assert torch.ops.aten.mm.default in TARGET.legal
    assert torch.ops.quantized.linear.default not in TARGET.legal
    assert torch.ops.optc.paged_attention_.default in TARGET.legal
