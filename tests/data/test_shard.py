"""Shards give back their documents; damage names the documents that it hits."""

import numpy as np
import pytest

from llamapro.data.container import BLOCK_BYTES
from llamapro.data.shard import Shard, ShardFacts, token_dtype, write_shard
from llamapro.errors import Corrupted
from tests.support.data import as_documents, flip_bit, random_documents, tokenization
from tests.support.shard_reader import read_shard


def write(path, documents, vocab_size=320):
    total = sum(map(len, documents))
    facts = ShardFacts(**tokenization(vocab_size).model_dump(), split="train", shard=4, documents=len(documents),
                       tokens=total, text_bytes=3 * total, plan="p")  # fmt: skip
    write_shard(path, facts, as_documents(documents))
    return path


@pytest.mark.parametrize("vocab_size", [320, 65_536, 65_537])
def test_documents_come_back_and_a_second_reader_agrees(tmp_path, vocab_size):
    documents = random_documents(50, 40, seed=1, first_id=vocab_size - 310)
    shard = Shard.open(write(tmp_path / "s.bin", documents, vocab_size))
    assert [shard.document(i).tolist() for i in range(50)] == documents
    other = read_shard(tmp_path / "s.bin")
    assert other.documents() == documents
    assert other.facts == shard.facts.model_dump()
    assert other.sections["text_bytes"] == [3 * len(part) for part in documents]


def test_ids_take_two_bytes_only_where_all_fit():
    assert (token_dtype(65_536), token_dtype(65_537)) == ("<u2", "<u4")


def test_several_ranges_are_read_one_after_another(tmp_path):
    shard = Shard.open(write(tmp_path / "s.bin", [[5, 6, 7], [8, 9]]))
    assert shard.read(np.array([3, 0]), np.array([2, 1])).tolist() == [8, 9, 5]
    assert shard.read(np.array([], dtype=np.int64), np.array([], dtype=np.int64)).tolist() == []


def test_a_flipped_bit_names_block_and_documents_and_spares_other_blocks(tmp_path):
    length = BLOCK_BYTES // 4
    documents = [[7] * length for _ in range(5)]
    path = write(tmp_path / "s.bin", documents)
    start = Shard.open(path).container.header.sections["tokens"].offset
    flip_bit(path, start + BLOCK_BYTES + 10)
    shard = Shard.open(path)
    assert shard.document(1).tolist() == documents[1]
    with pytest.raises(Corrupted, match=rf"{path}: block 1 .*documents 2 to 2"):
        shard.document(2)
    assert shard.documents_of_block(1) == (2, 3)


def test_facts_that_this_program_does_not_know_are_refused(tmp_path):
    from llamapro.data.container import write_container

    write_container(tmp_path / "s.bin", "shard", {"documents": 1}, {"tokens": np.zeros(1, "<u2")})
    with pytest.raises(Corrupted, match="unknown or missing facts"):
        Shard.open(tmp_path / "s.bin")
