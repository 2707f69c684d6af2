"""The learning rate as a pure function of the optimizer step.

Warm-up rises linearly over the first `warmup_fraction` of the steps and is never zero (a zeroed matrix learns from its
first step); then the rate falls as `decay` says to `final_fraction` of the peak.
"""

import math

from llamapro.config.schedule import ScheduleConfig


def learning_rate(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """The learning rate of optimizer step `step`.

    Args:
        step: 0 for the first step of the run.
        total_steps: steps of the whole run.
    """
    warmup_steps = math.ceil(schedule.warmup_fraction * total_steps)
    if step < warmup_steps:
        return schedule.learning_rate * (step + 1) / warmup_steps
    start = decay_start(total_steps, schedule)
    progress = (step - start + 1) / max(1, total_steps - start)
    return schedule.learning_rate * _fraction(min(1.0, max(0.0, progress)), schedule)


def decay_start(total_steps: int, schedule: ScheduleConfig) -> int:
    """The step at which the rate begins to fall; `total_steps` where it never does."""
    if schedule.decay == "constant":
        return total_steps
    if schedule.decay == "wsd":
        return total_steps - math.ceil(schedule.decay_fraction * total_steps)
    return math.ceil(schedule.warmup_fraction * total_steps)


def _fraction(progress: float, schedule: ScheduleConfig) -> float:
    """Share of the peak rate, from 1 at progress 0 to `final_fraction` at progress 1."""
    span = 1.0 - schedule.final_fraction
    if schedule.decay == "constant":
        return 1.0
    if schedule.decay == "cosine":
        return schedule.final_fraction + span * 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - span * progress
