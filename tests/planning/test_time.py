"""Speed and hours, against the paper's own figures."""

import pytest

from llamapro.planning.time import gpu_hours, tokens_per_second


def test_the_papers_hours_follow_from_its_speed() -> None:
    assert gpu_hours(80e9, 7852) == pytest.approx(2830, rel=1e-3)


def test_the_speed_at_the_measured_matrix_rate() -> None:
    assert tokens_per_second(38.885e9, 790e12, efficiency=1.0) == pytest.approx(20_316, abs=1)
    assert tokens_per_second(38.281e9, 989e12, efficiency=0.304) == pytest.approx(7852, rel=2e-3)
