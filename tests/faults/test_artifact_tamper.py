"""Whatever happens to an artifact's files is noticed, named, and exits 7."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from artifacts import FILES, make_artifact

from optc.compiler.artifact.folder import read_manifest, verify
from optc.compiler.diagnostics import ArtifactError, InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_artifact(tmp_path / "out")
    return tmp_path / "out"


def refused(folder: Path, what: str, why: str | None = None) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        verify(folder)
    error = caught.value
    assert error.exit_code == 7
    assert error.what == what
    assert str(folder) in str(error.where)
    assert error.remedy
    if why is not None:
        assert why in str(error.why)
    return error


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("place", [0, -1, None])
def test_one_flipped_bit_in_any_file(folder: Path, name: str, place: int | None) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    (folder / name).write_bytes(data)
    refused(folder, "the manifest is damaged" if name == "manifest.json" else f"'{name}' was changed")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_another_size(folder: Path, name: str, change: int) -> None:
    size = len(FILES[name])
    os.truncate(folder / name, size + change)
    refused(folder, f"'{name}' has the wrong size", f"{size + change} bytes, not {size}")


@pytest.mark.parametrize("name", FILES)
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, f"'{name}' is missing")


def test_extra_file(folder: Path) -> None:
    (folder / "ir" / "libevil.so").write_text("")
    error = refused(folder, "'ir/libevil.so' is not in the manifest")
    assert error.remedy == "remove the file, or compile again"


def test_extra_file_with_a_name_for_the_terminal(folder: Path) -> None:
    (folder / "\x1b[2Jx").write_text("")
    refused(folder, "'\\x1b[2Jx' is not in the manifest")


def _symlink(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "what", "why"),
    [
        (_symlink, "'model.onnx' is not a plain file", "a symbolic link"),
        (_pipe, "'model.onnx' is not a plain file", "a pipe, socket or device"),
        (_folder, "'model.onnx' is missing", None),
    ],
)
def test_not_a_plain_file(folder: Path, make: Callable[[Path], None], what: str, why: str | None) -> None:
    make(folder / "model.onnx")
    refused(folder, what, why)


def test_linked_folder_inside(folder: Path) -> None:
    shutil.move(folder / "ir", folder.parent / "elsewhere")
    (folder / "ir").symlink_to("../elsewhere")
    refused(folder, "'ir' is not a plain file", "a symbolic link")


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_hard_link(folder: Path, name: str) -> None:
    """Through its other name the file could be changed after the check."""
    os.link(folder / name, folder.parent / "other-name")
    refused(folder, f"'{name}' has other names", "1 more hard links point to it")


def test_hard_link_in_what_a_killed_rewrite_left(folder: Path) -> None:
    left = folder.parent / ".out.tmp-1-0123abcd"
    left.mkdir()
    os.link(folder / "model.onnx", left / "model.onnx")
    verify(folder)
    os.link(folder / "model.onnx", left / "other")
    refused(folder, "'model.onnx' has other names", "1 more hard links point to it")


@pytest.mark.parametrize("read", [verify, read_manifest])
def test_no_manifest(folder: Path, read: Callable[[Path], object]) -> None:
    manifest = folder / "manifest.json"
    _symlink(manifest)
    for _ in range(2):
        with pytest.raises(ArtifactError) as caught:
            read(folder)
        assert caught.value.what == "the folder has no manifest.json"
        assert caught.value.remedy == "give the folder that `optc compile -o` wrote, or compile again"
        manifest.unlink(missing_ok=True)


@pytest.mark.parametrize("read", [verify, read_manifest])
def test_no_artifact(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(InputError, match="the artifact does not exist") as caught:
        read(tmp_path / "nothing")
    assert caught.value.exit_code == 3
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="the artifact is not a folder"):
        read(tmp_path / "file")


def test_oversized_manifest_is_not_read(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 65 << 20)  # sparse: takes no disk
    refused(folder, "the manifest is damaged", f"{65 << 20} bytes")


def test_verify_checks_contents_where_the_size_is_right(folder: Path) -> None:
    assert verify(folder) == read_manifest(folder)
    (folder / "model.onnx").write_bytes(b"GRAPH" * 100)
    with pytest.raises(ArtifactError, match=r"'model\.onnx' was changed"):
        verify(folder)
