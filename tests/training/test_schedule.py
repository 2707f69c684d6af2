"""The learning rate: warm-up, decay and their ends, against closed forms."""

import math

import pytest

from llamapro.config.schedule import ScheduleConfig
from llamapro.training.schedule import decay_start, learning_rate

PEAK = 2e-4


def schedule(**changes: object) -> ScheduleConfig:
    return ScheduleConfig.model_validate({"steps": 1000, "learning_rate": PEAK, **changes})


def rates(steps: int, config: ScheduleConfig) -> list[float]:
    return [learning_rate(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_never_zero(decay: str) -> None:
    found = rates(1000, schedule(decay=decay, warmup_fraction=0.06))
    assert found[:60] == pytest.approx([PEAK * (step + 1) / 60 for step in range(60)])


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd"])
def test_decay_ends_at_the_final_fraction_and_never_rises(decay: str) -> None:
    found = rates(1000, schedule(decay=decay, warmup_fraction=0.06, final_fraction=0.1))
    assert found[-1] == pytest.approx(0.1 * PEAK)
    assert all(later <= earlier for earlier, later in zip(found[60:], found[61:], strict=False))


def test_cosine_is_half_way_down_in_the_middle() -> None:
    found = rates(1001, schedule(decay="cosine", warmup_fraction=0.0, final_fraction=0.0))
    assert found[500] == pytest.approx(PEAK * 0.5 * (1 + math.cos(math.pi * 501 / 1001)))


def test_wsd_holds_the_peak_until_its_decay_begins() -> None:
    config = schedule(decay="wsd", warmup_fraction=0.0, decay_fraction=0.2)
    start = decay_start(1000, config)
    assert start == 800
    found = rates(1000, config)
    assert set(found[:800]) == {PEAK} and found[800] < PEAK


def test_one_step_without_warm_up_is_defined() -> None:
    assert learning_rate(0, 1, schedule(warmup_fraction=0.0, decay="constant")) == PEAK
