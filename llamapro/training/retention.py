"""The retention gate: held-out text that must not get worse, against the base, at each validation.

The base is the model itself with its new blocks bypassed. Its loss is measured once and kept in the checkpoints, so it
is that of the start also where the base's own weights learn later on.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from llamapro import console
from llamapro.config.guards import RetentionGuard
from llamapro.errors import CheckFailed, UserError
from llamapro.training.base_within import base_within
from llamapro.training.progress import Progress
from llamapro.training.session import Session

SETTING = "guards.retention.max_increase_fraction"
_WAYS_OUT = (
    "a new run keeps more with a lower schedule.learning_rate, a larger share of general text (data.sources) or "
    "objective.replay_kl; of new blocks, `llamapro export --max-general-increase` takes as much as the bound allows"
)


class BaseToMeasure(NamedTuple):
    """What the progress doesn't know yet.

    Attributes:
        set: the validation set to score; `key`: what fixes its loss.
        blocks: without which the model is its base.
    """

    set: str
    key: str
    blocks: tuple[int, ...]


def base_to_measure(session: Session, progress: Progress) -> BaseToMeasure | None:
    """What must be measured of the base; None without a guard, or when it is known already.

    Raises:
        UserError: the base's own weights have learned since the start, so its loss is not to be had any more.
    """
    guard = session.config.guards.retention
    if guard is None or (key := _key(session, guard)) in progress.base_losses:
        return None
    base = base_within(session.facts.record, session.facts.trainable)
    if progress.step > 0 and not base.lasting:
        raise UserError(
            f"guards.retention compares {guard.set} with the base as it was at step 0, but that was not measured on "
            f"this text, and by step {progress.step} weights of the base itself have learned; set the guard, "
            "validation.sequences and the set's text at the start of a run, or set it to null and use "
            "`llamapro evaluate --compare BASE` afterwards"
        )
    return BaseToMeasure(guard.set, key, base.blocks)


def increase_over_base(session: Session, losses: Mapping[str, float], known: Mapping[str, float]) -> dict[str, float]:
    """By which fraction the guarded set's loss is above the base's, for the log; empty without a guard.

    Args:
        losses: of the validation sets; `known`: of the base, as the progress remembers them.
    """
    guard = session.config.guards.retention
    if guard is None:
        return {}
    return {f"validation/{guard.set}/increase_over_base": losses[guard.set] / known[_key(session, guard)] - 1}


def judge_retention(session: Session, step: int, increase: Mapping[str, float]) -> None:
    """Warn or stop when the increase is beyond the bound; the same on every rank.

    Raises:
        CheckFailed: it is, and `guards.retention.action` is stop.
    """
    guard = session.config.guards.retention
    if guard is None:
        return
    (value,) = increase.values()
    bound = guard.max_increase_fraction
    if math.isfinite(value) and value <= bound:
        return
    session.metrics.event("retention", step=step, set=guard.set, increase=value, bound=bound, action=guard.action)
    found = f"step {step}: held-out {guard.set} is {value:+.2%} against the base, beyond {bound:+.2%} ({SETTING})"
    if guard.action == "stop":
        raise CheckFailed(f"{found}; the run stops, and stops here again unless the bound is raised. {_WAYS_OUT}")
    console.warning(f"{found}; {_WAYS_OUT}")


def _key(session: Session, guard: RetentionGuard) -> str:
    """What fixes the base's loss."""
    fingerprint = session.facts.validation_sets[guard.set].fingerprint
    return f"{fingerprint} {session.config.validation.sequences} x {session.facts.sequence_length}"
