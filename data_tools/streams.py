"""Plain, gzip and zstandard files as one kind of binary stream; a cut or damaged file is an error, never an end."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import zstandard

from data_tools.plan import Compression
from llamapro.errors import DataError

_CHUNK_BYTES = 1 << 18


@contextmanager
def open_stream(path: Path, compression: Compression) -> Iterator[IO[bytes]]:
    """Open a file for reading its uncompressed bytes.

    Raises:
        DataError: when the block reads a damaged or cut part of it.
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
        raise DataError(f"{path} is damaged or cut: {error}; replace it or leave it out") from error


class _ZstandardReader(io.RawIOBase):
    """Decompresses all frames of a file. The library's own reader takes the end of a cut file for its real end."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._compressed = b""
        self._ready = b""
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
        """Decompress one more chunk; false at the end of the file."""
        chunk = self._compressed or self._raw.read(_CHUNK_BYTES)
        self._compressed = b""
        if not chunk:
            if self._inside_frame:
                raise EOFError("it ends within a frame")
            return False
        self._ready = self._frame.decompress(chunk)
        self._inside_frame = not self._frame.eof
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        return True
