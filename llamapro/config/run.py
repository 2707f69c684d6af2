"""Section `run`: where the run lives and when it ends."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from llamapro.config.base import FilePath, Positive, Section


class RunSection(Section):
    """Where the run lives and when it ends."""

    folder: FilePath = Path("runs/default")
    """Run folder: configuration, checkpoints, metrics, logs. Starting again with the same folder continues the run."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """Seed of the data order and of every random number; each step seeds every rank from (seed, step, rank)."""

    stop_after_minutes: Positive | None = None
    """Minutes after which the run saves and stops with exit code 75, e.g. before its time limit; null: never."""

    grace_seconds: Positive = 25.0
    """Seconds from a stop signal to a forced exit when no step boundary is reached."""
