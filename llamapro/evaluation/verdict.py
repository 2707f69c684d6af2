"""What a measured change shows: a verdict for each text and benchmark, and what a bound on drops makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llamapro.evaluation.intervals import Estimate

Verdict = Literal["better", "worse", "no difference shown"]


def verdict(change: Estimate, *, higher_is_better: bool) -> Verdict:
    """What a change shows at 95 %: nothing while its interval holds zero, or where there is none.

    Args:
        change: of the model against the base.
    """
    if change.half_width is None or abs(change.value) <= change.half_width:
        return "no difference shown"
    return "better" if (change.value > 0) == higher_is_better else "worse"


@dataclass(frozen=True)
class Drop:
    """By how much a model is worse than its base, as a fraction of the base's value; negative where it is better.

    Attributes:
        half_width: of the 95 % confidence interval; None: there is none.
    """

    name: str
    fraction: float
    half_width: float | None

    @classmethod
    def of(cls, name: str, change: Estimate, base: float, *, higher_is_better: bool) -> "Drop":
        """The drop behind a change; whatever is worse than a base of 0 is infinitely worse."""
        if base == 0:
            worse = change.value < 0 if higher_is_better else change.value > 0
            return cls(name, float("inf") if worse else 0.0, None)
        sign = -1.0 if higher_is_better else 1.0
        width = None if change.half_width is None else change.half_width / abs(base)
        return cls(name, sign * change.value / abs(base), width)

    @property
    def is_shown(self) -> bool:
        """Whether a drop is told from none at 95 %; without an interval the value itself decides."""
        return not self.fraction <= (self.half_width or 0.0)

    def __str__(self) -> str:
        width = "" if self.half_width is None else f" ± {self.half_width:.2%}"
        return f"{self.name} by {self.fraction:+.2%}{width}"


@dataclass(frozen=True)
class Judgement:
    """Drops beyond a bound: `shown` are told from none at 95 %, for the `open` ones there are too few items."""

    shown: tuple[Drop, ...]
    open: tuple[Drop, ...]

    @classmethod
    def of(cls, drops: Sequence[Drop], limit: float) -> "Judgement":
        """The drops of more than `limit`, a fraction; one that is no number is among them."""
        beyond = [drop for drop in drops if not drop.fraction <= limit]
        return cls(tuple(drop for drop in beyond if drop.is_shown), tuple(drop for drop in beyond if not drop.is_shown))
