"""From a work unit to its documents: rows of bytes, then text, or the reason why a row is left out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from typing import IO, Any

import orjson

from data_tools.chat.conversation import Unusable
from data_tools.chat.formats import read_conversation
from data_tools.chat.options import ChatFormat
from data_tools.chat.template import ChatTemplate, Span
from data_tools.parquet import column_values, row_values
from data_tools.plan import ContentOptions, InputFile, WorkUnit
from data_tools.streams import BYTE_ORDER_MARK, Damaged, open_stream

MAX_ROW_BYTES = 64 << 20
MAX_ARRAY_BYTES = 1 << 30
NO_OBJECT = "not a JSON object"
TOO_LONG = f"longer than {MAX_ROW_BYTES >> 20} MiB"
EMPTY_FILE = "empty file"
DAMAGED_FILE = "damaged or cut file"
# The longer marks first: UTF-32's little-endian one begins with that of UTF-16.
_OTHER_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
_NOT_NUMBERS = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True)
class Document:
    """The text of one document.

    Attributes:
        row: its row in the unit, from 0; utf8: the text's bytes.
        scored: the characters that are learned, as ranges in order; None: all.
    """

    row: int
    text: str
    utf8: bytes
    scored: tuple[Span, ...] | None = None


@dataclass(frozen=True)
class Reject:
    """A row that is left out, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class WholeReject(Reject):
    """Nothing of the unit can be used, not even what was read before; `detail` says more than the reason."""

    detail: str


@dataclass(frozen=True)
class Blank:
    """A row without anything in it, which is no document."""

    row: int


Item = Document | Reject | Blank


def read_unit(unit: WorkUnit, file: InputFile, options: ContentOptions) -> Iterator[Item]:
    """The documents of a work unit in order, the rows left out among them; after a `WholeReject` comes nothing.

    Raises:
        DataError: the file can't be opened or read, or lacks the text column.
    """
    row = -1
    try:
        for item in _read_unit(unit, file, options):
            row = item.row
            yield item
    except Damaged as error:
        yield WholeReject(row + 1, DAMAGED_FILE, str(error.__cause__))
    else:
        if row < 0 and unit.start == 0:
            yield Reject(0, EMPTY_FILE)


def _read_unit(unit: WorkUnit, file: InputFile, options: ContentOptions) -> Iterator[Item]:
    if options.chat is not None or file.format == "json":
        make = _reader(options)
        for row, found in read_objects(unit, file):
            yield found if isinstance(found, Reject | Blank) else make(row, found)
        return
    if file.format == "parquet":
        for row, value in enumerate(column_values(file.path, options.text_field, unit.start, unit.stop)):
            yield Reject(row, f"no value in column {options.text_field!r}") if value is None else _text(row, value)
        return
    with open_stream(file.path, file.compression) as stream:
        if (encoding := _other_encoding(stream)) is not None:
            yield WholeReject(0, f"{encoding} text", "convert it to UTF-8")
        elif file.format == "jsonl":
            for row, line in read_lines(stream, unit.start, unit.stop):
                yield _json_document(row, line, options.text_field)
        elif options.split == "line":
            for row, line in read_lines(stream, unit.start, unit.stop):
                yield _text(row, line) if line is None or line.strip() else Blank(row)
        elif options.split == "paragraph":
            yield from _paragraphs(stream)
        elif whole := stream.read(MAX_ROW_BYTES + 1):
            yield _text(0, whole.removeprefix(BYTE_ORDER_MARK) if len(whole) <= MAX_ROW_BYTES else None)


def read_objects(unit: WorkUnit, file: InputFile) -> Iterator[tuple[int, dict[str, Any] | Reject | Blank]]:
    """The rows of a unit of JSON or parquet as objects, numbered from 0; errors as in `read_unit`, and `Damaged`."""
    if file.format == "parquet":
        yield from enumerate(row_values(file.path, unit.start, unit.stop))
        return
    with open_stream(file.path, file.compression) as stream:
        if (encoding := _other_encoding(stream)) is not None:
            yield 0, WholeReject(0, f"{encoding} text", "convert it to UTF-8")
        elif file.format == "json":
            yield from _array(stream)
        else:
            for row, line in read_lines(stream, unit.start, unit.stop):
                yield row, _json_object(row, line)


def _array(stream: IO[bytes]) -> Iterator[tuple[int, dict[str, Any] | Reject]]:
    whole = stream.read(MAX_ARRAY_BYTES + 1)
    if len(whole) > MAX_ARRAY_BYTES:
        reason = f"JSON array larger than {MAX_ARRAY_BYTES >> 30} GiB"
        yield 0, WholeReject(0, reason, "write one object a line (.jsonl)")
        return
    try:
        values = orjson.loads(whole.removeprefix(BYTE_ORDER_MARK))
    except orjson.JSONDecodeError as error:
        yield 0, WholeReject(0, "invalid JSON", str(error))
        return
    for row, value in enumerate(values):
        yield row, value if isinstance(value, dict) else Reject(row, NO_OBJECT)


def _other_encoding(stream: "BufferedReader[Any]") -> str | None:
    """What a byte order mark at the file's start says, if it is not UTF-8."""
    start = stream.peek(4)
    return next((name for mark, name in _OTHER_ENCODINGS.items() if start.startswith(mark)), None)


def read_lines(stream: IO[bytes], start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes | None]]:
    """The lines that begin in a range of bytes, numbered from 0, without their ends; None for one that is too long."""
    if start > 0:
        # From one byte before, so that a line that begins exactly at the start is not skipped.
        stream.seek(start - 1)
        _skip_line(stream)
    row = 0
    while stop is None or stream.tell() < stop:
        line = stream.readline(MAX_ROW_BYTES + 1)
        if not line:
            return
        too_long = len(line) > MAX_ROW_BYTES and not line.endswith(b"\n")
        if too_long:
            _skip_line(stream)
        if row == 0 and start == 0:
            line = line.removeprefix(BYTE_ORDER_MARK)
        yield row, None if too_long else line.rstrip(b"\r\n")
        row += 1


def _skip_line(stream: IO[bytes]) -> None:
    while (part := stream.readline(MAX_ROW_BYTES)) and not part.endswith(b"\n"):
        pass


def _paragraphs(stream: IO[bytes]) -> Iterator[Item]:
    """Paragraphs are separated by blank lines; the row is that of a paragraph's first line."""
    paragraph = _Paragraph()
    for row, line in read_lines(stream):
        if line is None or line.strip():
            paragraph.add(row, line)
        elif paragraph.lines:
            yield _text(paragraph.row, paragraph.text())
            paragraph = _Paragraph()
    if paragraph.lines:
        yield _text(paragraph.row, paragraph.text())


class _Paragraph:
    """Lines of a paragraph so far; of one that is too long, only that it is."""

    def __init__(self) -> None:
        self.row = 0
        self.lines = 0
        self._kept: list[bytes] | None = []
        self._size = 0

    def add(self, row: int, line: bytes | None) -> None:
        self.row = row if self.lines == 0 else self.row
        self.lines += 1
        self._size += 0 if line is None else len(line) + 1
        if line is None or self._size > MAX_ROW_BYTES + 1:
            self._kept = None
        elif self._kept is not None:
            self._kept.append(line)

    def text(self) -> bytes | None:
        return None if self._kept is None else b"\n".join(self._kept)


def _json_document(row: int, line: bytes | None, text_field: str) -> Item:
    value = _json_object(row, line)
    return value if isinstance(value, Reject | Blank) else _text_of(row, value, text_field)


def _json_object(row: int, line: bytes | None) -> dict[str, Any] | Reject | Blank:
    if line is None:
        return Reject(row, TOO_LONG)
    if not line.strip():
        return Blank(row)
    try:
        # Files that were joined have a byte order mark within.
        value = orjson.loads(line.removeprefix(BYTE_ORDER_MARK))
    except orjson.JSONDecodeError as error:
        return Reject(row, _json_objection(line, error))
    return value if isinstance(value, dict) else Reject(row, NO_OBJECT)


def _reader(options: ContentOptions) -> Callable[[int, dict[str, Any]], Item]:
    """What makes a document of a row and an object."""
    if options.chat is None:
        return lambda row, value: _text_of(row, value, options.text_field)
    form, template = options.chat.format, ChatTemplate(options.chat)
    return lambda row, value: _chat(row, value, form, template)


def _chat(row: int, value: dict[str, Any], form: ChatFormat, template: ChatTemplate) -> Item:
    try:
        rendered = template.render(read_conversation(value, form))
    except Unusable as error:
        return Reject(row, str(error))
    checked = _checked(row, rendered.text, rendered.text.encode())
    return replace(checked, scored=rendered.spans) if isinstance(checked, Document) else checked


def _text_of(row: int, value: dict[str, Any], text_field: str) -> Item:
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


def _json_objection(line: bytes, error: orjson.JSONDecodeError) -> str:
    if not _is_utf8(line):
        return "invalid UTF-8"
    if b"\0" in line:
        return "NUL character"
    if "surrogate" in error.msg:
        return "lone surrogate"
    if "depth limit" in error.msg:
        return "JSON nested too deeply"
    # The place is that of the word or of what follows its sign, in characters.
    at = line.decode()[max(0, error.pos - 1) : error.pos + 8]
    return "NaN or Infinity, which JSON has not" if at.lstrip(":[, \t").startswith(_NOT_NUMBERS) else "invalid JSON"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
