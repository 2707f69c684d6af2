"""Section `checkpoint`: what a crash can cost, and what a resumed run may change."""

from typing import Annotated, Literal

from pydantic import Strict

from llamapro.config.base import Count, FilePath, Positive, Section


class CheckpointConfig(Section):
    """What a crash can cost, and what a resumed run may change."""

    every_steps: Count = 500
    """Optimizer steps between checkpoints. The last step always saves one."""

    every_minutes: Positive | None = 30.0
    """Also save when this many minutes have passed since the last checkpoint; null: by steps only."""

    keep: Count = 2
    """Newest checkpoints that are kept."""

    keep_every_steps: Count | None = None
    """Also keep every checkpoint whose step is a multiple of this; null: none."""

    resume: Literal["auto"] = "auto"
    """auto: a run folder with a valid checkpoint continues from the newest; one whose checkpoints are all damaged is
    refused rather than started afresh."""

    start_from: FilePath | None = None
    """Checkpoint or run folder whose weights a new run begins with; its optimizer, schedule and data begin afresh.
    Ignored once the run has a checkpoint of its own."""
    accept: Annotated[tuple[Literal["schedule", "optimizer"], ...], Strict(False)] = ()
    """Sections that a resumed run may change although they change what is learned."""
