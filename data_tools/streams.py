"""Plain, gzip and zstandard files as one kind of binary stream; a cut or damaged file is an error, never an end."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from data_tools.plan import Compression
from llamapro.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 18
# At most: 4 compressed bytes can stand for 128 KiB, so that a larger piece could become gigabytes at once.
_PIECE_BYTES = 1 << 10
_REMEDY = "replace it or leave it out"


class Damaged(DataError):
    """A file that can't be read to its end; what was read from it before is not to be trusted either."""


@contextmanager
def open_stream(path: Path, compression: Compression) -> Iterator["io.BufferedReader[Any]"]:
    """Open a file for reading its uncompressed bytes.

    Raises:
        Damaged: when the block reads a damaged or cut part of it.
        DataError: it can't be opened or read.
    """
    try:
        with path.open("rb") as raw:
            if compression == "gz":
                with gzip.GzipFile(fileobj=raw) as unzipped, io.BufferedReader(unzipped, _CHUNK_BYTES) as stream:
                    yield stream
            elif compression == "zst":
                with io.BufferedReader(_ZstandardReader(raw), _CHUNK_BYTES) as stream:  # type: ignore[type-var]
                    yield stream
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise Damaged(f"{path} is damaged or cut: {error}; {_REMEDY}") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}; {_REMEDY}") from error


class _ZstandardReader(io.RawIOBase):
    """Decompresses all frames of a file. The library's own reader takes the end of a cut file for its real end."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._compressed = memoryview(b"")
        self._ready = memoryview(b"")
        self._inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while not self._ready and self._fill():
            pass
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def _fill(self) -> bool:
        """Decompress one more piece; false at the end of the file."""
        if not self._compressed:
            self._compressed = memoryview(self._raw.read(_CHUNK_BYTES))
        piece = self._compressed[:_PIECE_BYTES]
        if not piece:
            if self._inside_frame:
                raise EOFError("it ends within a frame")
            return False
        self._ready = memoryview(self._frame.decompress(piece))
        used = len(piece) - len(self._frame.unused_data)
        self._compressed = self._compressed[used:]
        self._inside_frame = not self._frame.eof
        if self._frame.eof:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        return True
