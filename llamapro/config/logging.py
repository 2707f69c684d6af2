"""Section `logging`: what is written down while training."""

from typing import Annotated, Literal

from pydantic import Strict

from llamapro.config.base import Count, Section


class LoggingConfig(Section):
    """What is written down while training; `metrics.jsonl` in the run folder always is."""

    every_steps: Count = 1
    """Optimizer steps between log lines."""

    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], Strict(False)] = ("tensorboard",)
    """Where metrics go besides `metrics.jsonl`."""
