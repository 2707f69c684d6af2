"""Digests: SHA-256 where bytes must be proved, XXH3-128 where accidents must be caught fast, and the fold.

The fold is a 64-bit sum over elements, Σ bits(i)·(2i+1)·ODD mod 2⁶⁴. Being a sum, it can be computed over slices in any
order and on any number of ranks, and added up by one integer all-reduce. One flipped bit always changes it, because
2i+1 and ODD are odd.
"""

import hashlib
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

CHUNK_BYTES = 1 << 22
FOLD_ODD = 0x9E3779B97F4A7C15
FOLD_MASK = (1 << 64) - 1
_FOLD_CHUNK = 1 << 18
_FOLD_ROW = 1 << 10


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def xxh3_file(path: Path) -> str:
    """XXH3-128 of a file's bytes, as 32 hexadecimal digits."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def fold(data: bytes | memoryview, item_bytes: int, start: int = 0) -> int:
    """The fold of a contiguous slice of a tensor.

    Args:
        data: the slice's little-endian bytes.
        item_bytes: bytes per element (1, 2, 4 or 8); each element counts as one unsigned integer.
        start: index of the slice's first element in the flattened tensor.
    """
    bits = np.frombuffer(data, dtype=f"<u{item_bytes}")
    total = 0
    for low in range(0, bits.size, _FOLD_CHUNK):
        total += _fold_chunk(bits[low : low + _FOLD_CHUNK], start + low)
    return total * FOLD_ODD & FOLD_MASK


def _fold_chunk(bits: NDArray[np.unsignedinteger], start: int) -> int:
    """Σ bits(i)·(2i+1) mod 2⁶⁴ over one chunk, from row sums and column sums: no product per element."""
    whole = bits.size // _FOLD_ROW * _FOLD_ROW
    # 32-bit sums can't overflow for 1- and 2-byte elements; 64-bit sums wrap, which is the modulus.
    grid = bits[:whole].reshape(-1, _FOLD_ROW).astype(np.uint32 if bits.itemsize <= 2 else np.uint64)
    rows = grid.sum(axis=1, dtype=grid.dtype).astype(np.uint64)
    columns = grid.sum(axis=0, dtype=grid.dtype).astype(np.uint64)
    tail = bits[whole:].astype(np.uint64)
    weighted = _weighted_sum(rows, 0) * _FOLD_ROW + _weighted_sum(columns, 0) + _weighted_sum(tail, whole)
    plain = int(rows.sum(dtype=np.uint64)) + int(tail.sum(dtype=np.uint64))
    return 2 * weighted + (2 * start + 1) * plain


def _weighted_sum(values: NDArray[np.uint64], start: int) -> int:
    return int((values * np.arange(start, start + values.size, dtype=np.uint64)).sum(dtype=np.uint64))
