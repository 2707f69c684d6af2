"""Containers give back what was written, and no damage goes unnoticed."""

import numpy as np
import pytest
import xxhash

from llamapro.data.container import BLOCK_BYTES, PAGE_BYTES, Container, write_container
from llamapro.errors import Corrupted
from tests.support.data import flip_bit


@pytest.fixture
def path(tmp_path):
    wide = np.arange(BLOCK_BYTES // 2, dtype="<u4")
    write_container(tmp_path / "c.bin", "shard", {"n": 3}, {"small": np.array([1, 2, 3], "<u2"), "wide": wide})
    return tmp_path / "c.bin"


def test_round_trip(path):
    container = Container.open(path, "shard")
    assert container.header.facts == {"n": 3}
    assert container.array("small").tolist() == [1, 2, 3]
    assert np.array_equal(container.array("wide"), np.arange(BLOCK_BYTES // 2))
    assert not any(container.digest_differs(name) for name in container.header.sections)


def test_arrays_can_not_be_written(path):
    with pytest.raises(ValueError, match="read-only"):
        Container.open(path, "shard").array("small")[0] = 9


def test_empty_sections_are_possible(tmp_path):
    write_container(tmp_path / "e.bin", "pack", {}, {"none": np.zeros(0, "<u8")})
    assert Container.open(tmp_path / "e.bin", "pack").array("none").size == 0


def test_content_digest_is_that_of_the_header_page(path):
    assert Container.open(path, "shard").header.content_digest == xxhash.xxh3_128_hexdigest(
        path.read_bytes()[:PAGE_BYTES]
    )


@pytest.mark.parametrize("position", [0, 9, 17, 30, 70, 300, 3000, 4090])
def test_any_flipped_bit_of_the_header_is_refused(path, position):
    flip_bit(path, position)
    with pytest.raises(Corrupted, match=str(path)):
        Container.open(path, "shard")


@pytest.mark.parametrize("cut", [1, 5000, "all but 100 bytes", "all"])
def test_a_cut_file_is_refused_before_it_is_mapped(path, cut):
    size = path.stat().st_size
    keep = {"all": 0, "all but 100 bytes": 100}.get(cut) if isinstance(cut, str) else size - cut
    with path.open("r+b") as file:
        file.truncate(keep)
    with pytest.raises(Corrupted, match=str(path)):
        Container.open(path, "shard")


def test_a_grown_file_is_refused(path):
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(Corrupted, match="bytes and should have"):
        Container.open(path, "shard")


def test_another_kind_is_refused(path):
    with pytest.raises(Corrupted, match="is a shard file"):
        Container.open(path, "pack")


def test_a_damaged_block_is_named_when_it_is_read_and_only_then(path):
    wide_at = Container.open(path, "shard").header.sections["wide"].offset
    flip_bit(path, wide_at + BLOCK_BYTES + 4)
    container = Container.open(path, "shard")
    container.check("wide", 0, BLOCK_BYTES // 4)
    with pytest.raises(Corrupted, match=r"block 1 of section 'wide' \(elements 262,144 to 524,287\)"):
        container.check("wide", BLOCK_BYTES // 4, BLOCK_BYTES // 4 + 1)
    assert container.damaged_blocks("wide") == [1]


def test_a_damaged_table_of_checksums_is_found_every_time(path):
    flip_bit(path, Container.open(path, "shard").header.sections["block_checks"].offset)
    container = Container.open(path, "shard")
    for _ in range(2):
        with pytest.raises(Corrupted, match="table of checksums"):
            container.array("small")
