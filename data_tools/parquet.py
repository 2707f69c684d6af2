"""Text columns of parquet files, read by row group in little memory, however often a text is repeated in one.

A file keeps repeated texts once, as a dictionary, so a small row group can stand for gigabytes. Small ones are read as
the dictionary and indices into it. Large ones are not: the reader would collect all their texts in one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.streams import Damaged
from llamapro.errors import DataError

# Dictionaries are about a megabyte in most files, so that a batch of repeated texts is not much more than this many.
_BATCH_ROWS = 128
_BATCH_BYTES = 16 << 20
_SMALL_GROUP_BYTES = 16 << 20
_REMEDY = "replace it or leave it out"


def text_bytes_of(path: Path, text_field: str) -> int:
    """Uncompressed bytes of the text column.

    Raises:
        Damaged: the file can't be read.
        DataError: it has no such text column.
    """
    return sum(size for _, size in _row_groups(path, text_field))


def row_group_ranges(path: Path, text_field: str | None, target_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Ranges of row groups with about `target_bytes` of text, or None: of all columns.

    Each is first group and last + 1, first row, bytes.
    """
    start, first_row, rows, size = 0, 0, 0, 0
    groups = _row_groups(path, text_field)
    for index, (group_rows, group_bytes) in enumerate(groups):
        rows, size = rows + group_rows, size + group_bytes
        if size >= target_bytes or index == len(groups) - 1:
            yield start, index + 1, first_row, size
            start, first_row, rows, size = index + 1, first_row + rows, 0, 0


def column_values(path: Path, text_field: str, start: int, stop: int | None) -> Iterator[bytes | None]:
    """The UTF-8 bytes of each row's text in row groups [start, stop); None where there is none.

    Raises:
        Damaged: the file is damaged or cut.
    """
    import pyarrow.parquet  # type: ignore[import-untyped]

    groups = _row_groups(path, text_field)[start:stop]
    with _damage_named(path):
        plain = pyarrow.parquet.ParquetFile(path)
        by_dictionary = pyarrow.parquet.ParquetFile(path, read_dictionary=[text_field])
        for number, (rows, size) in enumerate(groups, start):
            file = by_dictionary if size <= _SMALL_GROUP_BYTES else plain
            options = {"row_groups": [number], "columns": [text_field]}
            for batch in file.iter_batches(_batch_rows(rows, size), **options):
                yield from _texts(batch.column(0))


def _texts(column: Any) -> Iterator[bytes | None]:
    import pyarrow

    if not pyarrow.types.is_dictionary(column.type):
        yield from column.cast(pyarrow.large_binary()).to_pylist()
        return
    texts = column.dictionary.cast(pyarrow.large_binary())
    for index in column.indices.to_pylist():
        yield None if index is None else texts[index].as_py()


def row_values(path: Path, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
    """All columns of each row in row groups [start, stop).

    Raises:
        Damaged: the file is damaged or cut.
    """
    import pyarrow.parquet

    with _damage_named(path):
        file = pyarrow.parquet.ParquetFile(path)
        groups = list(range(file.metadata.num_row_groups))[start:stop]
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups):
            yield from batch.to_pylist()


def _batch_rows(rows: int, size: int) -> int:
    """So many rows at once that long texts don't fill the memory."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, size)))


def _row_groups(path: Path, text_field: str | None) -> list[tuple[int, int]]:
    """Rows, and bytes of the text column or of all, of each row group."""
    file = _open(path, text_field)
    with _damage_named(path):
        metadata = file.metadata
        if text_field is None:
            every = (metadata.row_group(index) for index in range(metadata.num_row_groups))
            return [(group.num_rows, group.total_byte_size) for group in every]
        column = [metadata.schema.column(index).path for index in range(metadata.num_columns)].index(text_field)
        groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
        return [(group.num_rows, group.column(column).total_uncompressed_size) for group in groups]


def _open(path: Path, text_field: str | None) -> Any:
    import pyarrow
    import pyarrow.parquet

    with _damage_named(path):
        file = pyarrow.parquet.ParquetFile(path)
        names, schema = file.schema_arrow.names, file.schema_arrow
    if text_field is None:
        return file
    if text_field not in names:
        raise DataError(f"{path} has no column {text_field!r}; it has {', '.join(names)}: pass one as --text-field")
    kind = schema.field(names.index(text_field)).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{path}: column {text_field!r} holds {kind}, not text; pass another as --text-field")
    return file


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} can't be read: {error.strerror}; {_REMEDY}") from error
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged or no parquet file: {error}; {_REMEDY}") from error
