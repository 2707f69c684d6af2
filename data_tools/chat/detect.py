"""What the inputs hold, found by looking at their first rows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from data_tools.chat.formats import format_of_row
from data_tools.chat.options import ChatFormat, InputFormat
from data_tools.plan import InputFile, WorkUnit
from data_tools.readers import read_objects
from data_tools.streams import Damaged
from llamapro.errors import DataError

_LOOKED_AT = 100
_SHOWN = 5


def resolve_format(asked: InputFormat, files: Sequence[InputFile], text_field: str) -> ChatFormat | None:
    """How rows become conversations; None where they are text.

    Raises:
        DataError: the inputs are of different kinds, or can't be of the kind that was asked for.
    """
    if asked == "text":
        return None
    if asked == "auto":
        return _common_format(files, text_field)
    if plain := [file.name for file in files if file.format == "text"]:
        raise DataError(
            f"--format {asked}: {_listed(plain)} can't hold conversations; give .jsonl, .json or .parquet files"
        )
    return asked


def _common_format(files: Sequence[InputFile], text_field: str) -> ChatFormat | None:
    found: dict[ChatFormat | None, list[str]] = {}
    for file in files:
        for form in islice(_formats(file, text_field), 1):
            found.setdefault(form, []).append(file.name)
    if len(found) > 1:
        kinds = "; ".join(f"{form or 'text'}: {_listed(names)}" for form, names in found.items())
        raise DataError(f"the inputs are of different kinds ({kinds}); build a dataset of each, or say which: --format")
    return next(iter(found), None)


def _formats(file: InputFile, text_field: str) -> Iterator[ChatFormat | None]:
    """What the first rows of a file are, those left out that can't be told."""
    if file.format == "text":
        yield None
        return
    unit = WorkUnit(index=0, file=0, start=0, stop=None, first_row=0, text_bytes=file.text_bytes)
    with suppress(Damaged):  # which is counted when the file is read
        for _, row in islice(read_objects(unit, file), _LOOKED_AT):
            if isinstance(row, Mapping):
                yield from _format(row, text_field)


def _format(row: Mapping[str, Any], text_field: str) -> Iterator[ChatFormat | None]:
    if text_field in row:
        yield None
    elif (form := format_of_row(row)) is not None:
        yield form


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
