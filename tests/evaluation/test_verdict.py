"""Verdicts follow the interval; a bound on drops is broken by drops that are shown, and by nothing else."""

import math

import pytest

from llamapro.evaluation.intervals import Estimate
from llamapro.evaluation.verdict import Drop, Judgement, verdict


@pytest.mark.parametrize(
    ("value", "half_width", "higher_is_better", "wanted"),
    [
        (0.03, 0.02, True, "better"),
        (0.03, 0.02, False, "worse"),
        (-0.03, 0.02, True, "worse"),
        (-0.03, 0.02, False, "better"),
        (0.03, 0.04, True, "no difference shown"),
        (-0.03, 0.03, False, "no difference shown"),
        (0.0, 0.0, True, "no difference shown"),
        (-0.5, None, True, "no difference shown"),
    ],
)
def test_verdict_is_what_the_interval_shows(
    value: float, half_width: float | None, higher_is_better: bool, wanted: str
) -> None:
    assert verdict(Estimate(value, half_width), higher_is_better=higher_is_better) == wanted


@pytest.mark.parametrize(
    ("change", "base", "higher_is_better", "fraction", "half_width"),
    [
        (Estimate(-0.05, 0.02), 0.5, True, 0.1, 0.04),
        (Estimate(0.05, 0.02), 0.5, True, -0.1, 0.04),
        (Estimate(0.2, None), 0.8, False, 0.25, None),
        (Estimate(0.1, 0.05), 0.0, True, 0.0, None),
        (Estimate(0.1, 0.05), 0.0, False, math.inf, None),
    ],
)
def test_drop_is_a_fraction_of_the_bases_value(
    change: Estimate, base: float, higher_is_better: bool, fraction: float, half_width: float | None
) -> None:
    drop = Drop.of("piqa", change, base, higher_is_better=higher_is_better)
    assert drop.fraction == pytest.approx(fraction)
    assert drop.half_width == pytest.approx(half_width)


@pytest.mark.parametrize(
    ("fraction", "half_width", "shown", "open_"),
    [
        (0.02, 0.005, True, False),
        (0.02, 0.03, False, True),
        (0.005, 0.001, False, False),
        (-0.5, 0.1, False, False),
        (0.02, None, True, False),
        (math.inf, None, True, False),
        (math.nan, math.nan, True, False),
    ],
)
def test_bound_is_broken_by_what_is_shown(fraction: float, half_width: float | None, shown: bool, open_: bool) -> None:
    drop = Drop("law", fraction, half_width)
    judgement = Judgement.of([drop, Drop("fine", 0.0, 0.0)], 0.01)
    assert judgement.shown == ((drop,) if shown else ())
    assert judgement.open == ((drop,) if open_ else ())


def test_drop_is_said_with_its_interval() -> None:
    assert str(Drop("law", 0.0213, 0.004)) == "law by +2.13% ± 0.40%"
    assert str(Drop("law", 0.0213, None)) == "law by +2.13%"
