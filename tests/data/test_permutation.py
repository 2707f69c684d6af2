"""The keyed permutation is one, needs no state, and mixes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamapro.data.permutation import permutation_key, permute, permute_in_turn


@settings(max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_every_index_is_hit_exactly_once(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@given(st.lists(st.integers(0, 10**12 - 1), min_size=1, max_size=50, unique=True))
@settings(max_examples=30)
def test_large_domains_stay_in_range_and_one_to_one(indices):
    images = permute(np.array(indices), 10**12, 5)
    assert len(set(images.tolist())) == len(indices)
    assert images.min() >= 0 and images.max() < 10**12


def test_an_index_maps_the_same_alone_and_in_company():
    together = permute(np.arange(1000), 1000, 42)
    assert [int(permute(np.array([i]), 1000, 42)[0]) for i in range(1000)] == together.tolist()


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1), st.data())
@settings(max_examples=40)
def test_asked_in_turn_it_is_the_same_permutation(size, key, data):
    asked = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=30)), dtype=np.int64)
    assert permute_in_turn(asked, size, key).tolist() == permute(asked, size, key).tolist()


def test_keys_differ_and_repeat():
    assert permutation_key(1, "law", 0) == permutation_key(1, "law", 0)
    assert (
        len({permutation_key(*parts) for parts in [(1, "law", 0), (1, "law", 1), (2, "law", 0), (1, "wiki", 0)]}) == 4
    )


@pytest.mark.parametrize("size", [10, 64, 100])
def test_each_place_is_equally_likely_over_keys(size):
    keys = 200 * size
    places = [int(permute(np.array([3]), size, permutation_key(key))[0]) for key in range(keys // 10)]
    counts = np.bincount(places, minlength=size)
    expected = len(places) / size
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < size - 1 + 5 * np.sqrt(2 * size)


def test_neighbours_do_not_stay_neighbours():
    images = permute(np.arange(10_000), 10_000, 9)
    assert (np.abs(np.diff(images)) == 1).mean() < 0.002
    assert abs(float(np.corrcoef(np.arange(10_000), images)[0, 1])) < 0.05
