"""The sample stream is a function of the sample number. What machines and resume points make of it: test_acceptance."""

import numpy as np
import pytest

from llamapro.data.loader import StageUse, append_stage, pad_rows, rank_share
from llamapro.errors import Corrupted, DataError
from tests.support.data import flip_bit, random_documents, write_dataset
from tests.support.streams import open_stream

S = 32


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    return {
        "law": write_dataset(folder / "law", [random_documents(300, 60, 1), random_documents(100, 60, 2)]),
        "wiki": write_dataset(folder / "wiki", [random_documents(80, 60, 3)]),
        "code": write_dataset(folder / "code", [random_documents(40, 60, 4)]),
    }


def make_stream(datasets, *, weights=None, repeats=None, stages=(), seed=1):
    return open_stream(datasets, S, weights=weights, repeats=repeats, stages=stages, seed=seed)


def test_a_sample_alone_equals_its_row_in_a_batch(datasets):
    stream = make_stream(datasets, weights={"law": 3, "wiki": 1})
    batch = stream.batch(100, 8)
    for row in range(8):
        sample = stream.sample(100 + row)
        assert np.array_equal(sample.input_ids, batch.input_ids[row])
        assert np.array_equal(sample.labels, batch.labels[row])
        assert sample.source == batch.sources[row]
    assert batch.valid_tokens == int((batch.labels >= 0).sum())


def test_each_epoch_holds_every_row_once_in_another_order(datasets):
    stream = make_stream(datasets, weights={"law": 1})
    rows = stream.sources[0].plan.rows
    epochs = [[a.row for a in stream.addresses(epoch * rows, rows)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(rows))
    assert {a.epoch for a in stream.addresses(rows, rows)} == {1}


def test_seed_and_source_name_key_the_order(datasets):
    first, second = (make_stream(datasets, weights={"law": 1}, seed=seed) for seed in (1, 2))
    assert [a.row for a in first.addresses(0, 20)] != [a.row for a in second.addresses(0, 20)]


def test_a_weight_change_loses_and_repeats_nothing(datasets):
    stream = make_stream(datasets, weights={"law": 3, "wiki": 1})
    stages = append_stage(stream, 41, {"law": 1, "wiki": 1, "code": 2})
    changed = make_stream(datasets, weights={"law": 3, "wiki": 1, "code": 1e-3}, stages=stages)
    assert changed.addresses(0, 41) == stream.addresses(0, 41)
    seen = {}
    for address in changed.addresses(0, 400):
        seen.setdefault((address.source, address.epoch), []).append(address.row)
    for (source, epoch), rows in seen.items():
        assert len(rows) == len(set(rows))
        total = changed.sources[source].plan.rows
        later = [key for key in seen if key[0] == source and key[1] > epoch]
        assert len(rows) == total or not later
    counts = changed.taken(400)
    assert sum(counts.values()) == 400
    assert counts["code"] == pytest.approx((400 - 41) / 2, abs=2)


def test_taken_counts_what_batches_hold(datasets):
    stream = make_stream(datasets, weights={"law": 3, "wiki": 1})
    stages = append_stage(stream, 50, {"law": 1, "wiki": 3})
    stream = make_stream(datasets, weights={"law": 3, "wiki": 1}, stages=stages)
    for g in (0, 1, 49, 50, 51, 200):
        sources = [address.source for address in stream.addresses(0, g)]
        assert stream.taken(g) == {"law": sources.count(0), "wiki": sources.count(1)}


def test_appending_a_stage_drops_those_that_would_have_begun_later(datasets):
    stream = make_stream(datasets, weights={"law": 3, "wiki": 1})
    later = append_stage(stream, 90, {"law": 1, "wiki": 1})
    planned = make_stream(datasets, weights={"law": 3, "wiki": 1}, stages=later)
    assert [s.from_sequence for s in append_stage(planned, 60, {"law": 1, "wiki": 0})] == [0, 60]


def test_repeats_see_each_row_so_often_and_end(datasets):
    stream = make_stream(datasets, repeats={"law": 1.5, "wiki": 2.0})
    law, wiki = (source.plan.rows for source in stream.sources)
    assert stream.total_sequences == round(1.5 * law) + 2 * wiki
    addresses = stream.addresses(0, stream.total_sequences)
    by_row = np.bincount([a.row for a in addresses if a.source == 1], minlength=wiki)
    assert by_row.tolist() == [2] * wiki
    assert set(np.bincount([a.row for a in addresses if a.source == 0], minlength=law).tolist()) == {1, 2}
    with pytest.raises(DataError, match="beyond the end"):
        stream.sample(stream.total_sequences)


def test_rows_beyond_the_end_have_no_loss(datasets):
    stream = make_stream(datasets, repeats={"wiki": 1.0})
    total = stream.total_sequences
    batch = stream.batch(total - 2, 5)
    assert batch.rows == 5 and (batch.labels[2:] == -100).all() and (batch.labels[:2] >= 0).any()
    assert stream.batch(total + 10, 2).valid_tokens == 0


def test_padding_to_a_number_of_rows_adds_no_targets(datasets):
    stream = make_stream(datasets, weights={"wiki": 1})
    batch = stream.batch(5, 2, pad_to=4)
    assert batch.rows == 4 and batch.valid_tokens == stream.batch(5, 2).valid_tokens
    assert batch.position_ids[3].tolist() == list(range(S))
    assert stream.batch(5, 0, pad_to=3).valid_tokens == 0
    assert pad_rows(batch, 4) is batch


@pytest.mark.parametrize("world_size", range(1, 9))
def test_shares_of_ranks_are_contiguous_complete_and_nearly_equal(world_size):
    shares = [rank_share(100, 18, rank, world_size) for rank in range(world_size)]
    assert shares[0][0] == 100 and sum(count for _, count in shares) == 18
    assert all(a[0] + a[1] == b[0] for a, b in zip(shares, shares[1:], strict=False))
    assert max(count for _, count in shares) - min(count for _, count in shares) <= 1


def test_exhaustion_is_known_beforehand(datasets):
    stream = make_stream(datasets, weights={"law": 3, "wiki": 1})
    for index, name in enumerate(("law", "wiki")):
        g = stream.exhausted_after(name)
        rows = stream.sources[index].plan.rows
        assert stream.taken(g)[name] == rows and stream.taken(g - 1)[name] == rows - 1
    stopped = (StageUse(0, {"law": 1, "wiki": 1}, {}), StageUse(4, {"law": 1}, {"law": 2, "wiki": 2}))
    ends = make_stream(datasets, weights={"law": 1, "wiki": 1}, stages=stopped)
    assert ends.exhausted_after("wiki") is None
    repeats = make_stream(datasets, repeats={"law": 1.5, "wiki": 2.0})
    assert repeats.taken(repeats.exhausted_after("law"))["law"] == round(1.5 * repeats.sources[0].plan.rows)


@pytest.mark.parametrize(
    ("weights", "repeats", "message"),
    [
        ({"law": 1, "wiki": None}, None, "every source a weight, or every source a repeat"),
        (None, {"law": 0.0001}, "repeat 0.0001 of .* is no row at all"),
        ({"law": 1, "wiki": 1e-9}, None, "source wiki: weight 1e-09"),
    ],
)
def test_impossible_shares_are_refused(datasets, weights, repeats, message):
    with pytest.raises(DataError, match=message):
        make_stream(datasets, weights=weights, repeats=repeats)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((StageUse(3, {"law": 1}, {}),), "must begin at 0"),
        ((StageUse(0, {"law": 1}, {}), StageUse(0, {"law": 1}, {})), "follow each other"),
        ((StageUse(0, {"lwa": 1}, {}),), "no source is named lwa; there are law"),
    ],
)
def test_impossible_stages_are_refused(datasets, stages, message):
    with pytest.raises(DataError, match=message):
        make_stream(datasets, weights={"law": 1}, stages=stages)


def test_repeats_have_no_stages(datasets):
    with pytest.raises(DataError, match="repeat have none"):
        make_stream(datasets, repeats={"law": 1}, stages=(StageUse(0, {"law": 1}, {}),))


def test_a_flipped_bit_stops_the_stream_where_it_is_read(tmp_path):
    dataset = write_dataset(tmp_path / "d", [random_documents(50, 30, 1)])
    flip_bit(dataset.split("train").shards[0].path, 4096 + 11, bit=3)
    stream = make_stream({"d": dataset}, weights={"d": 1})
    with pytest.raises(Corrupted, match="train-00000.bin: block 0 of section 'tokens'"):
        stream.batch(0, 4)
