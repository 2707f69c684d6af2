"""Which files a build reads, and how they are cut into work units."""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import xxhash

from data_tools.parquet import row_group_ranges, text_bytes_of
from data_tools.plan import UNIT_BYTES, Compression, ContentOptions, FileFormat, InputFile, WorkUnit
from data_tools.streams import BYTE_ORDER_MARK, Damaged, open_stream
from llamapro import console
from llamapro.errors import DataError

FORMATS: dict[str, FileFormat] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text", ".md": "text", ".parquet": "parquet",
}  # fmt: skip
_WHOLE_TEXTS = (("text", "file"), ("text", "paragraph"))
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
_PROBED_BYTES = 1 << 16
_PEEKED_BYTES = 1 << 10
_SHOWN = 5
# Text compresses to about a quarter; only progress and the number of shards depend on this estimate.
_COMPRESSION_RATIO = 4


def find_inputs(patterns: Sequence[str], text_field: str | None, option: str = "--input") -> tuple[InputFile, ...]:
    """The input files that paths, folders and globs stand for, sorted by name, each once.

    Args:
        text_field: the column that parquet files must have; None: any will do.
        option: where the patterns are from, for messages.

    Raises:
        DataError: something does not exist or can't be read, a named file has an unknown ending, or there is nothing
            to read.
    """
    try:
        paths = sorted({path.resolve() for pattern in patterns for path in _expand(pattern, option)})
        if not paths:
            raise DataError(f"{option} {' '.join(patterns)}: there is no file ending in {_known_endings()}")
        root = Path(os.path.commonpath([path.parent for path in paths]))
        files = tuple(_describe(path, root) for path in paths)
        return files if text_field is None else with_text_column(files, text_field)
    except OSError as error:
        raise DataError(f"{option}: {error.filename} can't be read: {error.strerror}") from error


def with_text_column(files: Sequence[InputFile], text_field: str) -> tuple[InputFile, ...]:
    """The files, parquet ones with the size of their text column.

    Raises:
        DataError: one has no such column.
    """
    return tuple(
        file.model_copy(update={"text_bytes": _text_bytes(file, text_field)}) if file.format == "parquet" else file
        for file in files
    )


def plan_units(files: Sequence[InputFile], options: ContentOptions) -> tuple[WorkUnit, ...]:
    """Cut the inputs into work units of about 64 MiB of text; what can't be cut is one unit."""
    units: list[WorkUnit] = []
    for number, file in enumerate(files):
        for start, stop, first_row, text_bytes in _ranges(file, options):
            units.append(
                WorkUnit(
                    index=len(units), file=number, start=start, stop=stop, first_row=first_row, text_bytes=text_bytes
                )
            )
    return tuple(units)


def format_of(path: Path) -> tuple[FileFormat, Compression] | None:
    """How a file is read, from its name; None where the name says nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression: Compression = ""
    if suffixes and suffixes[-1] in COMPRESSIONS:
        compression = COMPRESSIONS[suffixes.pop()]
    form = FORMATS.get(suffixes[-1]) if suffixes else None
    if form is None or (form == "parquet" and compression):
        return None
    return form, compression


def _expand(pattern: str, option: str) -> Iterator[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        yield from _in_folder(path, option)
    elif path.is_file():
        if format_of(path) is None:
            raise DataError(f"{option} {pattern}: can't tell what this is; its name must end in {_known_endings()}")
        yield path
    elif path.exists():
        raise DataError(f"{option} {pattern} is neither a file nor a folder")
    elif matches := sorted(glob.glob(str(path), recursive=True)):
        for match in map(Path, matches):
            if match.is_dir():
                yield from _in_folder(match, option)
            elif format_of(match) is not None:
                yield _file(match, option)
    else:
        raise DataError(f"{option} {pattern}: there is no such file or folder, and no file matches it")


def _in_folder(folder: Path, option: str) -> Iterator[Path]:
    """The files of a folder and those below it, links followed, hidden ones left out; says what else is left out."""
    others: list[str] = []
    for path in _walk(folder):
        if format_of(path) is not None:
            yield _file(path, option)
        else:
            others.append(path.relative_to(folder).as_posix())
    if others:
        shown = ", ".join(sorted(others)[:_SHOWN]) + (", …" if len(others) > _SHOWN else "")
        console.info(f"{option} {folder}: {len(others):,} files are of another kind and not read: {shown}")


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        # A link may lead to a folder that was walked already, or is being walked.
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            seen.add(real)
            yield from (Path(place, name) for name in files if not name.startswith("."))


def _file(path: Path, option: str) -> Path:
    if not path.is_file():
        raise DataError(f"{option} {path} is no file, or a link that leads to none; mend it or take it away")
    return path


def _known_endings() -> str:
    return f"{', '.join(FORMATS)} (text formats also with {' or '.join(COMPRESSIONS)})"


def _describe(path: Path, root: Path) -> InputFile:
    described = format_of(path)
    assert described is not None
    form, compression = described
    status = path.stat()
    text_bytes = status.st_size * (_COMPRESSION_RATIO if compression else 1)
    if path.name.removesuffix(f".{compression}").lower().endswith(".json") and _is_array(path, compression):
        form = "json"
    return InputFile(
        path=path,
        name=path.relative_to(root).as_posix(),
        size=status.st_size,
        digest=head_and_tail(path, status.st_size),
        modified_ns=status.st_mtime_ns,
        format=form,
        compression=compression,
        text_bytes=text_bytes,
    )


def _text_bytes(file: InputFile, text_field: str) -> int:
    # A damaged one is found, and counted, when it is read.
    with suppress(Damaged):
        return text_bytes_of(file.path, text_field)
    return file.text_bytes


def _is_array(path: Path, compression: Compression) -> bool:
    """Whether a JSON file is one array, not an object a line."""
    with suppress(Damaged), open_stream(path, compression) as stream:
        return stream.peek(_PEEKED_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")
    return False


def head_and_tail(path: Path, size: int) -> str:
    """XXH3-128 of a file's first and last 64 KiB: cheap, and enough to notice that it is another file."""
    with path.open("rb") as file:
        state = xxhash.xxh3_128(file.read(_PROBED_BYTES))
        file.seek(max(0, size - _PROBED_BYTES))
        state.update(file.read(_PROBED_BYTES))
    return state.hexdigest()


def _ranges(file: InputFile, options: ContentOptions) -> Iterator[tuple[int, int | None, int | None, int]]:
    if file.format == "parquet":
        yield from _parquet_ranges(file, options.text_field if options.chat is None else None)
    elif file.compression or not file.size or file.format == "json" or (file.format, options.split) in _WHOLE_TEXTS:
        yield 0, None, 0, file.text_bytes
    else:
        for start in range(0, file.size, UNIT_BYTES):
            stop = min(file.size, start + UNIT_BYTES)
            yield start, stop, 0 if start == 0 else None, stop - start


def _parquet_ranges(file: InputFile, text_field: str | None) -> list[tuple[int, int | None, int | None, int]]:
    whole = (0, None, 0, file.text_bytes)
    try:
        return list(row_group_ranges(file.path, text_field, UNIT_BYTES)) or [whole]
    except Damaged:
        return [whole]
