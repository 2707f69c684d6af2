"""The guard skips what is not finite and what stands out, lets lasting changes through, and stops endless skipping."""

import math
import random

import orjson
import pytest

from llamapro.errors import CheckFailed
from llamapro.training.guards import SpikeGuard


def guard(spikes: bool = True, window_steps: int = 128, max_skipped_in_a_row: int = 10) -> SpikeGuard:
    return SpikeGuard(spikes=spikes, sigma=6.0, window_steps=window_steps, max_skipped_in_a_row=max_skipped_in_a_row)


def feed(target: SpikeGuard, steps: int, level: float = 2.0, seed: int = 0) -> list[str]:
    """Ordinary steps: loss `level` ± 0.02, norm 1 ± 0.1."""
    noise = random.Random(seed)
    return [target.objection(noise.gauss(level, 0.02), noise.gauss(1.0, 0.1)) for _ in range(steps)]


@pytest.mark.parametrize("spikes", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_steps_that_are_not_finite_are_always_skipped(spikes: bool, value: float) -> None:
    target = guard(spikes)
    assert target.objection(value, 1.0) == f"loss is {value}"
    assert target.objection(2.0, value) == f"gradient norm is {value}"
    assert target.objection(2.0, 1.0) == ""


def test_ordinary_noise_is_never_skipped() -> None:
    assert set(feed(guard(), 1000)) == {""}


def test_a_spike_is_skipped_and_the_reason_has_the_numbers() -> None:
    target = guard()
    feed(target, 128)
    assert target.objection(2.09, 1.0) == "", "4 sigma"
    assert target.objection(1.0, 1.0) == "", "downwards is welcome"
    target = guard()
    feed(target, 128)
    reason = target.objection(2.2, 1.0)
    assert reason.startswith("loss 2.2 is more than 6 standard deviations (0.0") and "last 128 steps" in reason
    assert target.objection(2.0, 1.0) == ""
    assert target.objection(2.0, 2.5).startswith("gradient norm 2.5 is more than 6")


def test_the_threshold_is_six_standard_deviations_above_the_mean() -> None:
    def objection_at(sigmas: float) -> str:
        target = guard(window_steps=10)
        for index in range(10):
            target.objection(3.0 + (-1) ** index, 1.0)
        return target.objection(3.0 + sigmas, 1.0)

    assert objection_at(5.99) == ""
    assert objection_at(6.01) != ""


def test_half_a_window_is_needed_before_anything_stands_out() -> None:
    for steps, skipped in ((63, False), (64, True)):
        target = guard()
        feed(target, steps)
        assert bool(target.objection(50.0, 1.0)) is skipped


def test_without_spikes_only_finiteness_counts() -> None:
    target = guard(spikes=False)
    feed(target, 128)
    assert target.objection(50.0, 50.0) == ""


def test_rounding_on_a_plateau_is_no_spike() -> None:
    target = guard()
    for _ in range(128):
        target.objection(2.0, 1.0)
    assert target.objection(2.0000002, 1.0000001) == ""
    assert target.objection(2.1, 1.0) != ""


def test_a_lasting_change_of_level_is_accepted_before_the_run_stops() -> None:
    target = guard()
    feed(target, 128)
    reasons = feed(target, 128, level=2.6)
    skipped = [index for index, reason in enumerate(reasons) if reason]
    assert 1 <= len(skipped) < 10 and skipped == list(range(len(skipped)))


def test_endless_skipping_stops_the_run_with_the_last_reason() -> None:
    target = guard(max_skipped_in_a_row=3)
    for _ in range(2):
        target.objection(math.nan, 1.0)
        target.check_limit()
    target.objection(2.0, 1.0)
    for _ in range(2):
        target.objection(math.nan, 1.0)
        target.check_limit()
    target.objection(2.0, math.inf)
    with pytest.raises(
        CheckFailed, match="3 steps in a row were skipped, the last time because: gradient norm is inf"
    ) as caught:
        target.check_limit()
    assert caught.value.exit_code == 1


def test_going_back_takes_the_history_back_and_is_counted_by_checkpoint() -> None:
    target = guard(max_skipped_in_a_row=2)
    feed(target, 100)
    saved = orjson.loads(orjson.dumps(target.state()))
    feed(target, 10, seed=1)
    target.objection(50.0, 1.0)
    target.roll_back(100, saved)
    assert target.state() == saved | {"rolled_back_to": 100, "rollbacks": 1}
    target.check_limit()
    target.roll_back(200, saved)
    target.check_limit()
    target.objection(50.0, 1.0)
    target.roll_back(200, saved)
    with pytest.raises(CheckFailed, match="2 times the run went back to the checkpoint of step 200, .*: loss 50"):
        target.check_limit()


def test_a_stopped_run_remembers_how_often_it_went_back() -> None:
    target, resumed = guard(max_skipped_in_a_row=2), guard(max_skipped_in_a_row=2)
    saved = target.state()
    target.roll_back(100, saved)
    resumed.restore(orjson.loads(orjson.dumps(target.state())))
    resumed.roll_back(100, saved)
    with pytest.raises(CheckFailed, match="2 times"):
        resumed.check_limit()


def test_the_history_survives_a_checkpoint_exactly() -> None:
    straight, resumed = guard(), guard()
    feed(straight, 100)
    straight.objection(math.nan, 1.0)
    resumed.restore(orjson.loads(orjson.dumps(straight.state())))
    assert resumed.state() == straight.state()
    assert feed(resumed, 50, seed=1) == feed(straight, 50, seed=1)
    assert [resumed.objection(2.12, 1.0), resumed.state()] == [straight.objection(2.12, 1.0), straight.state()]


def test_a_shorter_window_keeps_the_newest_part() -> None:
    target = guard()
    feed(target, 100)
    shorter = guard(window_steps=10)
    shorter.restore(target.state())
    assert shorter.state()["losses"] == target.state()["losses"][-10:]
