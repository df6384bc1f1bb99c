"""Parquet files and datasets' folders give the documents of the same rows in a .jsonl file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optc.compiler.calibration.documents import draw_documents, read_documents
from optc.compiler.calibration.windows import Draw
from optc.compiler.diagnostics import InputError, UsageError
from optc.training.examples import Example, read_examples

datasets = pytest.importorskip("datasets", reason="needs the extra `datasets`")
ROWS = [
    {"input_ids": [5, 6, 7], "other": "a"},
    {"input_ids": [], "other": "b"},
    {"input_ids": [8], "other": "c"},
]


class Letters:
    """One token per letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def written(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """The rows as a Parquet file, a folder of datasets, and lines of JSON."""
    folder.mkdir(exist_ok=True)
    found = datasets.Dataset.from_list(rows)
    paths = [folder / "rows.parquet", folder / "rows", folder / "rows.jsonl"]
    found.to_parquet(paths[0])
    found.save_to_disk(paths[1])
    paths[2].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def test_token_ids(tmp_path: Path) -> None:
    for path in written(tmp_path, ROWS):
        assert read_documents(path, None) == [[5, 6, 7], [], [8]], path


def test_text_is_encoded(tmp_path: Path) -> None:
    rows = [{"title": str(number), "text": "x" * number} for number in range(3000)]  # more than one batch
    for path in written(tmp_path, rows):
        found = read_documents(path, Letters())
        assert [len(row) for row in found] == list(range(3000)), path
        assert found[2] == [120, 120]


def test_tokens_that_do_not_count_are_not_taken_for_text(tmp_path: Path) -> None:
    """Rows as trainers write them: labels are -100 on the prompt, the mask is 0 on padding."""
    prompt = [{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [-100, 6]}]
    for path in written(tmp_path / "prompt", prompt):
        assert read_documents(path, None) == [[5, 6]], path
        assert list(read_examples(path, None, None)) == [Example([5, 6], [False, True], ends=False)], path
    for path in written(tmp_path / "padded", [{"input_ids": [5, 0], "attention_mask": [1, 0]}]):
        with pytest.raises(InputError, match="'attention_mask' leaves out some tokens"):
            read_documents(path, None)
        assert list(read_examples(path, None, None)) == [Example([5])], path
    for path in written(tmp_path / "text", [{"text": "a", "labels": [3], "attention_mask": [0]}]):
        assert read_documents(path, Letters()) == [[97]], path


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a tokenizer") as error:
        read_documents(written(tmp_path, [{"text": "x"}])[0], None, kind="training")
    assert error.value.where == f"{tmp_path / 'rows.parquet'}, row 1"


def test_other_columns_are_named(tmp_path: Path) -> None:
    for path in written(tmp_path, [{"title": "x", "body": "y"}])[:2]:
        with pytest.raises(InputError, match="no column of text or token ids") as error:
            read_documents(path, None)
        assert error.value.why == "its columns are title, body"


def test_a_column_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither text nor lists of token ids"):
        read_documents(written(tmp_path, [{"text": 5}])[0], Letters())


def test_several_splits(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "all")
    with pytest.raises(InputError, match="several splits: test, train") as error:
        read_documents(tmp_path / "all", None)
    assert error.value.remedy == f"give one of them, such as {tmp_path / 'all' / 'test'}"
    assert len(read_documents(tmp_path / "all" / "train", None)) == 3


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder but not a dataset"):
        read_documents(tmp_path, None)


@pytest.mark.parametrize("keep", [0, 4, 200])
def test_damage(tmp_path: Path, keep: int) -> None:
    parquet, folder, _ = written(tmp_path, ROWS)
    parquet.write_bytes(parquet.read_bytes()[:keep])
    arrow = next(folder.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:keep])
    for path in (parquet, folder):
        with pytest.raises(InputError, match=r"is damaged|cannot be read") as error:
            read_documents(path, None)
        assert str(tmp_path) in str(error.value.where)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("state.json", "{"),
        ("state.json", "[]"),
        ("state.json", '{"_data_files": []}'),
        ("dataset_info.json", "5"),
        ("dataset_info.json", '{"features": "x"}'),
    ],
)
def test_a_damaged_description(tmp_path: Path, name: str, text: str) -> None:
    folder = written(tmp_path, ROWS)[1]
    (folder / name).write_text(text)
    with pytest.raises(InputError, match="is damaged"):
        read_documents(folder, None)


def test_the_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the library datasets") as error:
        read_documents(tmp_path / "rows.parquet", None)
    assert error.value.remedy == "pip install 'optc[datasets]'"


def test_calibration_reads_rows_until_there_is_enough(tmp_path: Path) -> None:
    """Rows of 10 tokens, of which 4 x 20 are wanted: 8 rows, from anywhere in a folder, by group in a Parquet file."""
    rows = [{"tokens": [number] * 10} for number in range(500)]
    parquet, folder, _ = written(tmp_path, rows)
    draw = Draw(tokens=20, windows=2, seed=0)
    assert [row[0] for row in draw_documents(parquet, None, draw)] == list(range(8))  # one group of rows
    found = [row[0] for row in draw_documents(folder, None, draw)]
    assert len(found) == len(set(found)) == 8
    assert found != sorted(found)
    assert found == [row[0] for row in draw_documents(folder, None, draw)]
    every = draw_documents(folder, None, Draw(tokens=10_000, windows=2, seed=0))
    assert sorted(row[0] for row in every) == list(range(500))
