"""Held-out batches are the same everywhere and cover what they say."""

import numpy as np
import pytest

from llamapro.data.heldout import heldout_batches
from llamapro.errors import DataError
from tests.support.data import random_documents, write_dataset

S = 16


@pytest.fixture
def documents():
    return random_documents(40, 40, 5)


@pytest.fixture
def dataset(tmp_path, documents):
    return write_dataset(tmp_path / "d", [[[5, 6]]], documents)


def test_all_rows_cover_all_text_and_predict_every_token_that_follows_another(dataset, documents):
    batches = heldout_batches(dataset, S, 10_000, 8)
    assert sum(sum(sizes) for _, sizes in batches) == 3 * sum(map(len, documents))
    pieces = sum(-(-len(part) // S) for part in documents)
    assert sum(batch.valid_tokens for batch, _ in batches) == sum(map(len, documents)) - pieces


def test_batches_have_equal_shapes_and_rows_without_text_no_loss(dataset):
    batches = heldout_batches(dataset, S, 7, 3)
    assert [batch.input_ids.shape for batch, _ in batches] == [(3, S)] * 3
    last, sizes = batches[-1]
    assert sizes[0] > 0 and sizes[1:] == (0, 0)
    assert (last.labels[1:] == -100).all()


def test_fewer_rows_are_a_prefix_whatever_the_batch_size(dataset):
    many = np.concatenate([batch.input_ids for batch, _ in heldout_batches(dataset, S, 12, 4)])
    few = np.concatenate([batch.input_ids for batch, _ in heldout_batches(dataset, S, 5, 5)])
    assert np.array_equal(few, many[:5])


def test_nothing_held_out_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no heldout documents.*--heldout"):
        heldout_batches(write_dataset(tmp_path / "none", [[[5, 6]]]), S, 4, 2)
