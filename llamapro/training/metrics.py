"""What a run measures: one JSON object a line in metrics.jsonl, always; the same numbers to every tracker.

Names carry units. Rank 0 writes; other ranks hold a log without sinks, so the loop needs no rank test.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson

from llamapro.files.atomic import write_atomic


class Tracker(Protocol):
    """A place besides metrics.jsonl where numbers go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record these numbers at this step."""

    def close(self) -> None:
        """Write out what is buffered."""


class MetricsLog:
    """Appends to metrics.jsonl and to the trackers.

    Args:
        path: the run's metrics.jsonl, or None to record nothing (ranks above 0).
    """

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self._path = path
        self._trackers = tuple(trackers)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of one step."""
        self._append({"step": step, **values})
        for tracker in self._trackers:
            tracker.log(step, values)

    def event(self, name: str, **facts: Any) -> None:
        """Record something that happened: a start, a resume, a skipped step, a save, a stop."""
        self._append({"event": name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts})

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        # One write of one whole line with O_APPEND: a kill can leave a cut last line, never a mixed one.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, orjson.dumps(dict(line)) + b"\n")
        finally:
            os.close(descriptor)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a metrics.jsonl; a line cut by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for raw in path.read_bytes().splitlines():
        try:
            lines.append(orjson.loads(raw))
        except orjson.JSONDecodeError:
            continue
    return lines


def cut_back(path: Path, step: int) -> None:
    """Drop the numbers of steps after `step`, which a resumed run computes again; events stay."""
    kept = [line for line in read_metrics(path) if "event" in line or line["step"] <= step]
    if path.exists():
        write_atomic(path, b"".join(orjson.dumps(line) + b"\n" for line in kept))
