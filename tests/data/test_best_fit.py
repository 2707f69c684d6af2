"""The fast packing is exactly best-fit-decreasing."""

from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamapro.data.best_fit import best_fit_decreasing


def plain_best_fit_decreasing(lengths, capacity):
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(max_examples=150)
@given(st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
def test_bins_are_filled_as_by_the_plain_algorithm(case):
    capacity, lengths = case
    bins, count = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    filled = np.bincount(bins, weights=lengths, minlength=count) if lengths else np.zeros(0)
    assert sorted((capacity - filled).astype(int).tolist()) == plain_best_fit_decreasing(lengths, capacity)


def indexed_best_fit_decreasing(lengths, capacity):
    """The plain algorithm with the rooms kept in order, for larger inputs."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        place = bisect_left(rooms, length)
        room = rooms.pop(place) if place < len(rooms) else capacity
        insort(rooms, room - length)
    return rooms


@pytest.mark.parametrize(
    ("pieces", "seed"), [(3000, 0), *(pytest.param(100_000, seed, marks=pytest.mark.slow) for seed in range(5))]
)
def test_documents_are_packed_as_by_the_plain_algorithm(pieces, seed):
    lengths = np.clip(np.random.default_rng(seed).lognormal(6, 1 + seed / 5, pieces).astype(np.int64), 1, 4096)
    bins, count = best_fit_decreasing(lengths, 4096)
    filled = np.bincount(bins, weights=lengths, minlength=count).astype(int)
    expected = indexed_best_fit_decreasing(lengths.tolist(), 4096)
    assert (4096 - np.sort(filled)[::-1]).tolist() == expected
    if pieces < 5000:
        assert expected == plain_best_fit_decreasing(lengths.tolist(), 4096)


def test_realistic_lengths_leave_almost_nothing_unused():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 50_000).astype(np.int64), 1, 4096)
    bins, count = best_fit_decreasing(lengths, 4096)
    assert np.bincount(bins, weights=lengths).max() <= 4096
    assert lengths.sum() / (count * 4096) >= 0.999


@pytest.mark.parametrize("lengths", [[0], [11]])
def test_lengths_that_can_not_be_placed_are_a_bug(lengths):
    with pytest.raises(AssertionError):
        best_fit_decreasing(np.array(lengths), 10)
