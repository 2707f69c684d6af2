"""The intervals cover as often as they claim, and agree with textbook formulas where those apply."""

import math
import statistics

import numpy as np
import pytest

from llamapro.evaluation.intervals import ratio_of_sums


def test_with_equal_denominators_it_is_the_mean_and_its_textbook_interval() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    estimate = ratio_of_sums(values, [1.0] * 5)
    assert estimate.value == pytest.approx(statistics.mean(values))
    student = 2.7764451  # of the tables, four degrees of freedom
    assert estimate.half_width == pytest.approx(student * statistics.stdev(values) / math.sqrt(5))


def test_proportional_rows_have_no_uncertainty() -> None:
    estimate = ratio_of_sums([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (estimate.value, estimate.half_width) == (2.0, 0.0)


def test_order_of_rows_does_not_matter_to_the_last_bit() -> None:
    rows = np.random.default_rng(0).lognormal(size=(100, 2))
    shuffled = np.random.default_rng(1).permutation(rows)
    assert ratio_of_sums(*rows.T.tolist()) == ratio_of_sums(*shuffled.T.tolist())


def test_one_row_has_no_interval() -> None:
    estimate = ratio_of_sums([3.0], [2.0])
    assert (estimate.value, estimate.half_width) == (1.5, None)


@pytest.mark.parametrize("rows", [4, 8, 64])
def test_interval_covers_the_truth_nineteen_times_in_twenty(rows: int) -> None:
    """Simulated rows of unequal length whose mean loss per token is 3: coverage near 95 %, of few rows too."""
    random = np.random.default_rng(7)
    covered = 0
    for _ in range(1000):
        tokens = random.integers(50, 150, size=rows).astype(float)
        losses = tokens * (3.0 + random.normal(0.0, 0.5, size=rows))
        estimate = ratio_of_sums(losses.tolist(), tokens.tolist())
        assert estimate.half_width is not None
        covered += abs(estimate.value - 3.0) <= estimate.half_width
    assert 925 <= covered <= 970
