"""A packed row's ids, labels, positions and bytes, against a plain loop."""

import numpy as np
import pytest

from llamapro.data.rows import IGNORED, RowPieces, assemble_row
from llamapro.data.shard import Shard, ShardFacts, write_shard
from tests.support.data import as_documents, random_documents, tokenization

PAD = 2


def open_shard(folder, documents, spans=None):
    content = as_documents(documents, text_bytes=7)
    if spans is not None:
        flat = [value for part in spans for pair in part for value in pair]
        counts = np.cumsum([0, *(len(part) for part in spans)])
        content = type(content)(**{**vars(content), "loss_offsets": counts, "loss_spans": np.array(flat, np.int64)})
    total = sum(map(len, documents))
    facts = ShardFacts(**tokenization().model_dump(), split="train", shard=0, documents=len(documents), tokens=total,
                       text_bytes=7 * total, plan="")  # fmt: skip
    write_shard(folder / "s.bin", facts, content)
    return Shard.open(folder / "s.bin")


def plain_row(documents, pieces, length, spans=None):
    ids, labels, positions = [], [], []
    for document, start, count in pieces:
        part = documents[document][start : start + count]
        for i, token in enumerate(part):
            ids.append(token)
            positions.append(i)
            target = start + i + 1
            scored = spans is None or any(low <= target < high for low, high in spans[document])
            labels.append(part[i + 1] if i + 1 < count and scored else IGNORED)
    rest = length - len(ids)
    return ids + [PAD] * rest, labels + [IGNORED] * rest, positions + list(range(rest))


def pieces_of(shard, pieces):
    return RowPieces(shard, *(np.array(column, dtype=np.int64) for column in zip(*pieces, strict=True)))


@pytest.mark.parametrize("seed", range(5))
def test_rows_equal_a_plain_loop(tmp_path, seed):
    documents = random_documents(12, 30, seed)
    shard = open_shard(tmp_path, documents)
    generator = np.random.default_rng(seed)
    pieces = []
    for document in generator.permutation(12)[:5].tolist():
        start = int(generator.integers(0, len(documents[document])))
        pieces.append((document, start, int(generator.integers(1, len(documents[document]) - start + 1))))
    row = assemble_row(pieces_of(shard, pieces), 200, PAD)
    ids, labels, positions = plain_row(documents, pieces, 200)
    assert (row.input_ids.tolist(), row.labels.tolist(), row.position_ids.tolist()) == (ids, labels, positions)
    assert row.input_ids.dtype == row.labels.dtype == row.position_ids.dtype == np.int64


def test_only_spans_are_scored(tmp_path):
    documents = [list(range(10, 20)), list(range(30, 36)), list(range(50, 58))]
    spans = [[(2, 4), (7, 10)], [], [(0, 8)]]
    shard = open_shard(tmp_path, documents, spans)
    assert shard.loss_spans(0) == [(2, 4), (7, 10)] and shard.loss_spans(1) == []
    for pieces in ([(0, 0, 10), (1, 0, 6), (2, 0, 8)], [(0, 3, 5), (2, 2, 4)]):
        row = assemble_row(pieces_of(shard, pieces), 30, PAD)
        assert row.labels.tolist() == plain_row(documents, pieces, 30, spans)[1]


def test_a_full_row_has_no_padding_and_a_single_token_no_target(tmp_path):
    shard = open_shard(tmp_path, [[5, 6, 7, 8], [9]])
    assert assemble_row(pieces_of(shard, [(0, 0, 4)]), 4, PAD).labels.tolist() == [6, 7, 8, IGNORED]
    assert assemble_row(pieces_of(shard, [(1, 0, 1)]), 4, PAD).labels.tolist() == [IGNORED] * 4


def test_bytes_of_cut_documents_add_up_to_the_whole_text(tmp_path):
    shard = open_shard(tmp_path, [list(range(10, 23))])
    parts = [(0, 0, 5), (0, 5, 5), (0, 10, 3)]
    found = [assemble_row(pieces_of(shard, [part]), 8, PAD).text_bytes for part in parts]
    assert sum(found) == 13 * 7 and found == [35, 35, 21]
