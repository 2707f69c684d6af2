"""From a work unit to its documents: rows of bytes, then text, or the reason why a row is left out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import orjson

from data_tools.parquet import column_values
from data_tools.plan import ContentOptions, InputFile, WorkUnit
from data_tools.streams import open_stream

MAX_ROW_BYTES = 64 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TOO_LONG = f"longer than {MAX_ROW_BYTES >> 20} MiB"


@dataclass(frozen=True)
class Document:
    """The text of one document; `row` is its row in the unit, from 0; `utf8` the text's bytes."""

    row: int
    text: str
    utf8: bytes


@dataclass(frozen=True)
class Reject:
    """A row that is left out, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class Blank:
    """A row without anything in it, which is no document."""

    row: int


Item = Document | Reject | Blank


def read_unit(unit: WorkUnit, file: InputFile, options: ContentOptions) -> Iterator[Item]:
    """The documents of a work unit in order, the rows left out among them.

    Raises:
        DataError: the file is damaged or cut.
    """
    if file.format == "parquet":
        assert unit.stop is not None
        for row, value in enumerate(column_values(file.path, options.text_field, unit.start, unit.stop)):
            yield Reject(row, f"no value in column {options.text_field!r}") if value is None else _text(row, value)
        return
    with open_stream(file.path, file.compression) as stream:
        if file.format == "jsonl":
            for row, line in _lines(stream, unit):
                yield _json_document(row, line, options.text_field)
        elif options.split == "line":
            for row, line in _lines(stream, unit):
                yield _text(row, line) if line is None or line.strip() else Blank(row)
        elif options.split == "paragraph":
            yield from _paragraphs(stream, unit)
        else:
            whole = stream.read(MAX_ROW_BYTES + 1)
            yield _text(0, whole.removeprefix(BYTE_ORDER_MARK) if len(whole) <= MAX_ROW_BYTES else None)


def _lines(stream: IO[bytes], unit: WorkUnit) -> Iterator[tuple[int, bytes | None]]:
    """The lines that begin in the unit's byte range, without their ends; None for one that is too long."""
    if unit.start > 0:
        # From one byte before, so that a line that begins exactly at the unit's start is not skipped.
        stream.seek(unit.start - 1)
        _skip_line(stream)
    row = 0
    while unit.stop is None or stream.tell() < unit.stop:
        line = stream.readline(MAX_ROW_BYTES + 1)
        if not line:
            return
        too_long = len(line) > MAX_ROW_BYTES and not line.endswith(b"\n")
        if too_long:
            _skip_line(stream)
        if row == 0 and unit.start == 0:
            line = line.removeprefix(BYTE_ORDER_MARK)
        yield row, None if too_long else line.rstrip(b"\r\n")
        row += 1


def _skip_line(stream: IO[bytes]) -> None:
    while (part := stream.readline(MAX_ROW_BYTES)) and not part.endswith(b"\n"):
        pass


def _paragraphs(stream: IO[bytes], unit: WorkUnit) -> Iterator[Item]:
    """Paragraphs are separated by blank lines; the row is that of a paragraph's first line."""
    lines: list[bytes | None] = []
    for row, line in _lines(stream, unit):
        if line is None or line.strip():
            lines.append(line)
        elif lines:
            yield _paragraph(row - len(lines), lines)
            lines = []
    if lines:
        yield _paragraph(row - len(lines) + 1, lines)


def _paragraph(row: int, lines: list[bytes | None]) -> Item:
    whole = [line for line in lines if line is not None]
    return _text(row, b"\n".join(whole) if len(whole) == len(lines) else None)


def _json_document(row: int, line: bytes | None, text_field: str) -> Item:
    if line is None:
        return Reject(row, TOO_LONG)
    if not line.strip():
        return Blank(row)
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return Reject(row, "invalid JSON" if _is_utf8(line) else "invalid UTF-8")
    if not isinstance(value, dict):
        return Reject(row, "not a JSON object")
    text = value.get(text_field)
    if text is None:
        return Reject(row, f"no field {text_field!r}")
    if not isinstance(text, str):
        return Reject(row, f"field {text_field!r} is not text")
    return _checked(row, text, text.encode())


def _text(row: int, utf8: bytes | None) -> Item:
    if utf8 is None or len(utf8) > MAX_ROW_BYTES:
        return Reject(row, TOO_LONG)
    try:
        return _checked(row, utf8.decode(), utf8)
    except UnicodeDecodeError:
        return Reject(row, "invalid UTF-8")


def _checked(row: int, text: str, utf8: bytes) -> Item:
    if not text or text.isspace():
        return Reject(row, "empty text")
    if "\0" in text:
        return Reject(row, "NUL character")
    return Document(row, text, utf8)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
