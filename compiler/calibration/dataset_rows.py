"""Rows of Parquet files and of folders written by `datasets.save_to_disk` (extra `datasets`).

Both are compressed or refer to other files, so what strangers wrote could stand for far more than it is, or for what lies
elsewhere: sizes and names are looked at before anything is unpacked, and only texts and numbers are decoded.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from optc.compiler.diagnostics import InputError, UsageError, foreign_errors, os_errors
from optc.compiler.files import open_plain, read_plain
from optc.compiler.nesting import check_nesting

_COLUMNS = ("text", "tokens", "input_ids")
MASK, LABELS = "attention_mask", "labels"
"""Columns beside token ids that say which of them count."""
_ROWS, _BATCH_BYTES = 1024, 64 << 20
"""Rows that are read at a time, and what so many may take as their average is; one at least."""
_MOST_GROWTH, _SMALL = 200, 256 << 20
"""How many times its size a column may have when it is unpacked, beyond so many bytes: text has up to 10."""
_VALUES = 1 << 30
"""Bytes of a group's values that need no such proportion: equal ones, as masks are, take next to none in the file."""
_MOST_JSON = 16 << 20  # bytes of a file that describes a dataset
_DESCRIPTIONS = ("state.json", "dataset_info.json")
_PLAIN_FEATURES = ("Value", "List", "LargeList", "Sequence")
"""Types of `datasets` that hold what stands in the file."""


class _DataFile(msgspec.Struct):
    """A file of rows, whose name must lead nowhere else."""

    filename: Annotated[str, msgspec.Meta(pattern=r"\A[\w-][\w.-]{0,200}\Z")]


class _State(msgspec.Struct):
    """state.json, as far as it names files."""

    files: list[_DataFile] = msgspec.field(name="_data_files")


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
    except ImportError as error:
        raise UsageError(
            f"the {kind} data is a dataset, which needs the library datasets",
            why=str(error),
            remedy="pip install 'optc[datasets]'",
        ) from error
    damaged = foreign_errors(
        f"the {kind} data is damaged", where=str(path), remedy="download or write the dataset again"
    )
    with damaged, os_errors(f"reading the {kind} data", str(path)):
        if path.suffix.lower() == ".parquet":
            yield from _parquet_rows(path, kind, seed)
            return
        _check_folder(path, kind)
        found = datasets.load_from_disk(str(path))
        columns = _columns(found.column_names, path, kind)
        _check_types(found.features, columns, path, kind)
        table = found.data.table.select(columns)
        yield from _checked_rows(
            table.to_batches(max_chunksize=_ROWS)
            if seed is None
            else (table.slice(index, 1) for index in _ordered(table.num_rows, seed))
        )


def _parquet_rows(path: Path, kind: str, seed: int | None) -> Iterator[dict[str, Any]]:
    """Rows of a file, one at a time: a text that stands in many of them is in memory once."""
    import pyarrow
    import pyarrow.parquet

    with open_plain(path, f"reading the {kind} data") as plain:
        file = pyarrow.parquet.ParquetFile(plain)
        columns = _columns(file.schema_arrow.names, path, kind)
        size = _batch_rows(file.metadata, columns, path, kind)
        texts = [name for name in columns if pyarrow.types.is_string(file.schema_arrow.field(name).type)]
        file = pyarrow.parquet.ParquetFile(plain, metadata=file.metadata, read_dictionary=texts)
        for batch in file.iter_batches(
            batch_size=size, row_groups=_ordered(file.num_row_groups, seed), columns=columns
        ):
            for row in range(batch.num_rows):
                yield {name: batch.column(name)[row].as_py() for name in columns}


def _batch_rows(metadata: Any, columns: Sequence[str], path: Path, kind: str) -> int:
    """Rows to read at a time.

    Raises:
        InputError: a column would be unpacked to far more than it is.
    """
    largest = 1.0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for chunk in (group.column(index) for index in range(group.num_columns)):
            if chunk.path_in_schema.partition(".")[0] not in columns:
                continue
            packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
            values, most = 8 * chunk.num_values, _MOST_GROWTH * packed
            if unpacked > max(_SMALL, most) or values > max(_VALUES, most):
                raise InputError(
                    f"the {kind} data would be unpacked to far more than it is",
                    where=f"{path}: group {number}, {chunk.path_in_schema[:100]}",
                    why=f"{packed} bytes stand for {max(unpacked, values)}",
                    remedy="use another copy; if it is what you want, write it without compression, in smaller groups of rows",
                )
            largest = max(largest, max(unpacked, values) / max(1, group.num_rows))
    return int(max(1, min(_ROWS, _BATCH_BYTES / largest)))


def _check_types(features: Any, columns: Sequence[str], path: Path, kind: str) -> None:
    """Refuse columns of which `datasets` makes something else than texts and numbers: images it would open, or fetch."""
    for name in columns:
        if any(type(part).__name__ not in _PLAIN_FEATURES for part in _parts(features[name])):
            raise InputError(
                f"the column '{name}' of the {kind} data holds neither text nor token ids",
                where=str(path),
                why=f"its type is {str(features[name])[:100]}",
                remedy="write texts, or lists of integers",
            )


def _parts(feature: Any) -> Iterator[Any]:
    """A type, and those inside of it."""
    yield feature
    if hasattr(feature, "feature"):
        yield from _parts(feature.feature)


def _checked_rows(parts: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Rows of tables that are mapped from files: Arrow believes what a file says of where its texts and lists lie."""
    for part in parts:
        part.validate(full=True)
        yield from part.to_pylist()


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
    described = {name: read_plain(path / name, "reading a dataset", most=_MOST_JSON) for name in _DESCRIPTIONS}
    for text in described.values():
        check_nesting(msgspec.json.decode(text))
    for entry in msgspec.json.decode(described["state.json"], type=_State).files:
        with open_plain(path / entry.filename, "reading a dataset", follow=False):
            pass


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
