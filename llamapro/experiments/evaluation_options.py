"""Options of `llamapro evaluate` that experiments share."""

from collections.abc import Sequence
from pathlib import Path


def benchmark_options(tasks: Sequence[str], limit: int | None, task_data: Path | None) -> list[str]:
    """The options of `llamapro evaluate` for these benchmarks; none where there are none."""
    if not tasks:
        return []
    options = ["--tasks", *tasks]
    options += [] if limit is None else ["--limit", str(limit)]
    return options + ([] if task_data is None else ["--task-data", str(task_data)])
