"""Which optimizer steps must be skipped: those that are not finite, and outliers of loss or gradient norm.

Plain numbers in, a reason out: every rank sees the same global loss and gradient norm and decides the same.
The spike rule is that of OLMo-core and levanter: more than `sigma` standard deviations above the mean of the last
`window_steps` steps, once half of the window is known.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean, pstdev
from typing import Any

from llamapro.errors import CheckFailed

MIN_RELATIVE_SPREAD = 1e-3
"""A curve flatter than this counts as this much spread, so that rounding on a plateau is no spike."""


class SpikeGuard:
    """Judges each step before its update is applied.

    Finite losses and norms enter the history whether or not their step was skipped: a lasting change of level (new
    data) widens the spread and is accepted after a few steps, a single spike is not.
    """

    def __init__(self, *, spikes: bool, sigma: float, window_steps: int, max_skipped_in_a_row: int) -> None:
        """Without `spikes` only non-finite steps are skipped."""
        self._spikes = spikes
        self._sigma = sigma
        self._window_steps = window_steps
        self._max_skipped_in_a_row = max_skipped_in_a_row
        self._losses: deque[float] = deque(maxlen=window_steps)
        self._gradient_norms: deque[float] = deque(maxlen=window_steps)
        self._skipped_in_a_row = 0
        self._rolled_back_to: int | None = None
        self._rollbacks = 0
        self._last_reason = ""

    def objection(self, loss: float, gradient_norm: float) -> str:
        """Why this step's update must be skipped; empty when it may be applied. To be asked exactly once per step.

        Args:
            loss: mean over the step's target tokens, nats per token.
            gradient_norm: global, before clipping.
        """
        reason = _not_finite("loss", loss) or _not_finite("gradient norm", gradient_norm)
        if not reason and self._spikes:
            reason = self._spike("loss", loss, self._losses)
            reason = reason or self._spike("gradient norm", gradient_norm, self._gradient_norms)
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self._losses.append(loss)
            self._gradient_norms.append(gradient_norm)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if reason else 0
        self._last_reason = reason
        return reason

    def roll_back(self, step: int, state: Mapping[str, Any]) -> None:
        """Take the history back to that of a checkpoint; how often this was done in a row is not forgotten.

        Args:
            step: of the checkpoint; state: `state()` as it was saved there.
        """
        rollbacks = self._rollbacks + 1 if step == self._rolled_back_to else 1
        self.restore(state)
        self._rolled_back_to, self._rollbacks = step, rollbacks

    def check_limit(self) -> None:
        """Stop a run that only skips, or only goes back.

        Raises:
            CheckFailed: `max_skipped_in_a_row` steps in a row were skipped, or as many times the run went back to one
                and the same checkpoint.
        """
        what = ""
        if self._skipped_in_a_row >= self._max_skipped_in_a_row:
            what = f"{self._skipped_in_a_row} steps in a row were skipped"
        elif self._rollbacks >= self._max_skipped_in_a_row:
            what = f"{self._rollbacks} times the run went back to the checkpoint of step {self._rolled_back_to}"
        if what:
            raise CheckFailed(
                f"{what}, the last time because: {self._last_reason}; the run stops (guards.max_skipped_in_a_row). "
                "Lower schedule.learning_rate, or look at the data of these steps: llamapro data which"
            )

    def state(self) -> dict[str, Any]:
        """The history, as JSON values."""
        return {
            "losses": list(self._losses),
            "gradient_norms": list(self._gradient_norms),
            "skipped_in_a_row": self._skipped_in_a_row,
            "rolled_back_to": self._rolled_back_to,
            "rollbacks": self._rollbacks,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the history of `state()`; a shorter window keeps its newest part."""
        self._losses = _recent(state["losses"], self._window_steps)
        self._gradient_norms = _recent(state["gradient_norms"], self._window_steps)
        self._skipped_in_a_row = int(state["skipped_in_a_row"])
        self._rolled_back_to, self._rollbacks = state.get("rolled_back_to"), state.get("rollbacks", 0)

    def _spike(self, quantity: str, value: float, history: deque[float]) -> str:
        if 2 * len(history) < self._window_steps or len(history) < 2:
            return ""
        mean = fmean(history)
        spread = max(pstdev(history, mean), MIN_RELATIVE_SPREAD * abs(mean))
        if value <= mean + self._sigma * spread:
            return ""
        return (
            f"{quantity} {value:.4g} is more than {self._sigma:g} standard deviations ({spread:.2g}) above its mean "
            f"{mean:.4g} of the last {len(history)} steps"
        )


def _not_finite(quantity: str, value: float) -> str:
    return "" if math.isfinite(value) else f"{quantity} is {value}"


def _recent(values: Iterable[float], window_steps: int) -> deque[float]:
    return deque((float(value) for value in values), maxlen=window_steps)
