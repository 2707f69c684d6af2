"""Section `guards`: what stops a run that goes wrong."""

from typing import Literal

from llamapro.config.base import Count, Name, Positive, Section


class RetentionGuard(Section):
    """What may be forgotten, measured at each validation against the base (the same model with its new blocks bypassed,
    measured once)."""

    set: Name
    """Validation set that stands for what must be kept."""

    max_increase_fraction: Positive = 0.02
    """Largest increase of its loss over the base's, as a share of the base's loss."""

    action: Literal["warn", "stop"] = "warn"
    """What happens beyond that: warn at each such validation, or save and stop with exit code 1."""


class GuardsConfig(Section):
    """What stops a run that goes wrong."""

    spike: Literal["skip", "rollback", "off"] = "skip"
    """What to do with a step whose loss or gradient norm is an outlier. skip: leave out its update. rollback: also undo
    the updates since the last checkpoint of checkpoint.every_steps; training goes on after the outlier, so the steps
    and sequences since that checkpoint count as skipped, and before the first one a spike is only skipped. off: train
    on it. Steps with a non-finite loss or gradient are always skipped."""

    spike_sigma: Positive = 6.0
    """Standard deviations above the recent mean that make an outlier."""

    spike_window_steps: Count = 128
    """Optimizer steps that count as recent; nothing is an outlier until half as many are known."""

    max_skipped_in_a_row: Count = 10
    """Skipped steps in a row, or rollbacks to the same checkpoint, after which the run stops with exit code 1."""

    retention: RetentionGuard | None = None
    """Bound on forgetting; null: none."""
