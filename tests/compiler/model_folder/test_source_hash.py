"""The hash of a model's weights that is taken beside the compile, and files that are read side by side."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from hf_folders import source, tensors
from safetensors.torch import save_file

from optc.compiler import files
from optc.compiler.diagnostics import InputError
from optc.compiler.files import side_by_side
from optc.compiler.ir.weight_buffers import BufferPool
from optc.compiler.model_folder import source_hash
from optc.compiler.model_folder.checkpoint import check_folder, check_values, weights_digest
from optc.compiler.model_folder.source_hash import SourceHash


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file counts as large, on a machine of several cores."""
    monkeypatch.setattr(files, "LARGE_BYTES", 0)
    monkeypatch.setattr(source_hash, "LARGE_BYTES", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose weights are in three files."""
    path = tmp_path / "model"
    shutil.copytree(source("llama"), path)
    found = list(tensors(path).items())
    (path / "model.safetensors").unlink()
    placed = {}
    for number in range(3):
        part = dict(found[number::3])
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file(part, path / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return path


def test_results_are_in_order_and_threads_are_for_large_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)

    def read(number: int) -> tuple[int, int]:
        time.sleep(0.02 * (3 - number))
        return number, threading.get_ident()

    for nbytes, several in ((files.LARGE_BYTES, True), (files.LARGE_BYTES - 1, False)):
        found = side_by_side(read, range(4), nbytes)
        assert [number for number, _ in found] == [0, 1, 2, 3]
        assert ({thread for _, thread in found} != {threading.get_ident()}) is several


def test_the_first_item_decides_the_error(large: None) -> None:
    def read(number: int) -> None:
        time.sleep(0.02 * (3 - number))
        if number:
            raise ValueError(str(number))

    with pytest.raises(ValueError, match="1"):
        side_by_side(read, range(4), 1)


@pytest.mark.usefixtures("large")
def test_the_hash_is_that_of_sha256sum(folder: Path) -> None:
    info = check_folder(folder)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    lines = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    with SourceHash(info) as weights:
        assert weights.result() == hashlib.sha256(lines.encode()).hexdigest()
    with SourceHash(None):
        pass


def test_a_small_model_is_hashed_where_it_is_asked_for(folder: Path) -> None:
    before = threading.active_count()
    with SourceHash(check_folder(folder)) as weights:
        assert threading.active_count() == before
        assert weights.result() == weights_digest(check_folder(folder))


@pytest.mark.usefixtures("large")
def test_a_file_that_changes_after_it_was_hashed(folder: Path) -> None:
    info = check_folder(folder)
    with SourceHash(info) as weights:
        weights.result()
        path = folder / info.files[1]
        data = path.read_bytes()
        time.sleep(0.01)
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"00002-of-00003\.safetensors was changed"):
            weights.result()


@pytest.mark.usefixtures("large")
def test_a_hash_that_nobody_asks_for_ends_with_the_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / check_folder(folder).files[0]
    with path.open("ab") as file:  # many minutes of zeros behind the tensors, without blocks on the disk
        file.truncate(1 << 40)
    info = check_folder(source("llama"))
    monkeypatch.setattr(type(info), "files", property(lambda _: (path.name,)))
    object.__setattr__(info, "path", folder)
    begin = time.monotonic()
    with SourceHash(info):
        pass
    assert time.monotonic() - begin < 60
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("optc-hash")]


@pytest.mark.usefixtures("large")
def test_values_are_looked_at_side_by_side(folder: Path) -> None:
    check_values(check_folder(folder))
    info = check_folder(folder)
    names = list(info.tensors)
    for name in (names[-1], names[2]):  # of two the one that comes first is named
        file = folder / info.tensors[name].file
        held = {key: value for key, value in tensors(folder).items() if info.tensors[key].file == file.name}
        held[name].view(-1)[0] = torch.nan
        save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="not finite") as caught:
        check_values(check_folder(folder))
    assert names[2] in caught.value.what


def test_threads_never_share_a_buffer() -> None:
    pool, size = BufferPool(), 1 << 20

    def use(number: int) -> bool:
        for _ in range(50):
            block = pool.empty((size,), torch.uint8)
            block[::4096] = number
            time.sleep(0.0001)
            if not bool((block[::4096] == number).all()):
                return False
            del block
        return True

    assert all(side_by_side(use, range(4), files.LARGE_BYTES))
