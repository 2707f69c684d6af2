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
_FOLD_CHUNK = 1 << 20


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
    weights = (np.arange(bits.size, dtype=np.uint64) + np.uint64(start)) * np.uint64(2) + np.uint64(1)
    return int((bits.astype(np.uint64) * weights).sum(dtype=np.uint64))
