"""Section `schedule`: how long, and how fast the weights move."""

from typing import Annotated, Literal

from pydantic import Field

from llamapro.config.base import Count, Fraction, Positive, Section


class ScheduleConfig(Section):
    """How long, and how fast the weights move."""

    steps: Count | Literal["auto"] = 4000
    """Optimizer steps of the run; auto: until every source's repeat is used up."""

    learning_rate: Positive = 2e-4
    """Peak learning rate."""

    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.06
    """Share of the steps in which the rate rises linearly to its peak."""

    decay: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the rate falls: cosine, linear, constant (not at all), or wsd (constant, then linear over the last
    decay_fraction of the steps)."""

    final_fraction: Fraction = 0.1
    """Share of the peak rate that is left at the last step."""

    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps over which wsd decays; used by decay: wsd only."""
