"""Rows of Parquet files and of folders written by `datasets.save_to_disk` (extra `datasets`)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optc.compiler.diagnostics import InputError, UsageError, os_errors

_COLUMNS = ("text", "tokens", "input_ids")
MASK, LABELS = "attention_mask", "labels"
"""Columns beside token ids that say which of them count."""
_ROWS = 1024  # read at a time


def is_dataset(path: Path) -> bool:
    """Whether `read_rows` reads it: a folder, or a .parquet file."""
    return path.is_dir() or path.suffix.lower() == ".parquet"


def read_rows(path: Path, *, kind: str, seed: int | None = None) -> Iterator[dict[str, Any]]:
    """Each row's "text", "tokens" or "input_ids", the first of them that is a column, and what stands beside ids.

    Args:
        kind: what the data is for, as errors name it.
        seed: rows, of Parquet groups of them, come in a random order.

    Raises:
        UsageError: the extra `datasets` is not installed.
        InputError: no dataset, several splits, damaged, or none of the columns.
    """
    try:
        import datasets
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"the {kind} data is a dataset, which needs the library datasets",
            why=str(error),
            remedy="pip install 'optc[datasets]'",
        ) from error
    with os_errors(f"reading the {kind} data", str(path)):
        try:
            if path.suffix.lower() == ".parquet":
                file = pyarrow.parquet.ParquetFile(path)
                columns = _columns(file.schema_arrow.names, path, kind)
                groups = _ordered(file.num_row_groups, seed)
                for batch in file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=columns):
                    yield from batch.to_pylist()
                return
            _check_folder(path, kind)
            found = datasets.load_from_disk(str(path))
            columns = _columns(found.column_names, path, kind)
            rows = found.select_columns(columns).with_format(None)
            yield from rows if seed is None else (rows[index] for index in _ordered(len(rows), seed))
        except (pyarrow.ArrowException, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"the {kind} data is damaged",
                where=str(path),
                why=str(error),
                remedy="download or write the dataset again",
            ) from error


def _ordered(count: int, seed: int | None) -> Sequence[int]:
    numbers = range(count)
    return numbers if seed is None else random.Random(seed).sample(numbers, count)


def _check_folder(path: Path, kind: str) -> None:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(item.parent.name for item in path.glob("*/state.json"))
        raise InputError(
            f"the {kind} data has several splits: {', '.join(splits)}",
            where=str(path),
            remedy=f"give one of them, such as {path / splits[0]}" if splits else None,
        )
    if not (path / "state.json").is_file():
        raise InputError(
            f"the {kind} data is a folder but not a dataset",
            where=str(path),
            why="it has no state.json",
            remedy="give a folder written by datasets' save_to_disk, or files",
        )


def _columns(names: list[str], path: Path, kind: str) -> list[str]:
    found = next((name for name in _COLUMNS if name in names), None)
    if found is None:
        raise InputError(
            f"the {kind} data has no column of text or token ids",
            where=str(path),
            why=f"its columns are {', '.join(names)}",
            remedy="name a column text, tokens or input_ids",
        )
    return [found, *(name for name in (MASK, LABELS) if name in names and found != _COLUMNS[0])]
