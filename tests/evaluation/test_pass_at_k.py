"""The estimate of pass@k against the enumeration of every draw, and against its expectation."""

from itertools import combinations

import pytest

from llamapro.evaluation.pass_at_k import pass_at_k

CASES = [(n, c, k) for n in range(1, 8) for c in range(n + 1) for k in range(1, n + 1)]


@pytest.mark.parametrize(("programs", "passed", "k"), CASES)
def test_it_is_the_share_of_draws_with_a_passing_program(programs: int, passed: int, k: int) -> None:
    draws = list(combinations(range(programs), k))
    share = sum(any(one < passed for one in draw) for draw in draws) / len(draws)
    assert pass_at_k(programs, passed, k) == pytest.approx(share, abs=1e-12)


def test_it_is_exact_for_many_programs() -> None:
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5, abs=1e-12)
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)


@pytest.mark.parametrize(("programs", "passed", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_impossible_counts_are_refused(programs: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError, match="programs"):
        pass_at_k(programs, passed, k)
