"""Hashes of what was written, beside what is still done with it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from optc.compiler import files
from optc.compiler.artifact import early_hashes
from optc.compiler.artifact.early_hashes import EarlyHashes


@pytest.fixture(autouse=True)
def every_file_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGE_BYTES", 4)
    monkeypatch.setattr("os.cpu_count", lambda: 4)


def test_of_files_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read once and synced; a small one, one that was changed and one that came later have no hash."""
    (tmp_path / "ir").mkdir()
    for name, data in {"a": b"of a", "ir/b": b"of b", "c": b"of c", "small": b"of"}.items():
        (tmp_path / name).write_bytes(data)
    synced: list[str] = []
    monkeypatch.setattr(early_hashes, "sync_file", lambda path: synced.append(path.name))
    with EarlyHashes(tmp_path) as early:
        (tmp_path / "c").write_bytes(b"another")
        (tmp_path / "late").write_bytes(b"later")
        found = {name: early.of(name) for name in ("a", "ir/b", "c", "late", "small")}
    assert found == {
        "a": hashlib.sha256(b"of a").hexdigest(),
        "ir/b": hashlib.sha256(b"of b").hexdigest(),
        "c": None,
        "late": None,
        "small": None,
    }
    assert sorted(synced) == ["a", "b", "c"]


def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error of the block, unless that has one of its own."""
    (tmp_path / "a").write_bytes(b"of a")

    def refuse(path: Path) -> None:
        raise OSError(5, "no", str(path))

    monkeypatch.setattr(early_hashes, "sync_file", refuse)
    with pytest.raises(OSError, match="no"), EarlyHashes(tmp_path):
        pass
    with pytest.raises(KeyError), EarlyHashes(tmp_path):
        raise KeyError("own")
