"""The fold: a sum over slices in any order, changed by every single flipped bit."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from llamapro.files.digests import FOLD_MASK, FOLD_ODD, fold, sha256_file, xxh3_file


@pytest.mark.parametrize("item_bytes", [1, 2, 4, 8])
def test_fold_is_the_formula(item_bytes: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, 80, dtype=np.uint8)
    numbers = values.view(f"<u{item_bytes}").tolist()
    expected = sum(bits * (2 * index + 1) * FOLD_ODD for index, bits in enumerate(numbers, start=7)) % 2**64
    assert fold(values.tobytes(), item_bytes, start=7) == expected


@given(st.binary(min_size=2, max_size=80).filter(lambda raw: len(raw) % 2 == 0), st.data())
def test_fold_adds_up_over_slices(raw: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(raw) // 2)) * 2
    parts = fold(raw[cut:], 2, start=cut // 2) + fold(raw[:cut], 2)
    assert parts & FOLD_MASK == fold(raw, 2)


@given(st.binary(min_size=4, max_size=64).filter(lambda raw: len(raw) % 4 == 0), st.data())
def test_every_flipped_bit_changes_the_fold(raw: bytes, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    flipped = bytearray(raw)
    flipped[bit // 8] ^= 1 << bit % 8
    assert fold(bytes(flipped), 4) != fold(raw, 4)


def test_fold_is_the_same_across_its_own_chunks() -> None:
    raw = np.random.default_rng(1).bytes(2 * ((1 << 20) + 5))
    half = (1 << 19) * 2
    assert fold(raw, 2) == (fold(raw[:half], 2) + fold(raw[half:], 2, start=1 << 19)) & FOLD_MASK


def test_file_digests_are_those_of_the_libraries(tmp_path: Path) -> None:
    raw = np.random.default_rng(2).bytes((1 << 22) + 3)
    (tmp_path / "f").write_bytes(raw)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(raw).hexdigest()
    assert xxh3_file(tmp_path / "f") == xxhash.xxh3_128(raw).hexdigest()
