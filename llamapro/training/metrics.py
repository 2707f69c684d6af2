"""What a run measures: one JSON object a line in metrics.jsonl, always; the same numbers to every tracker.

Names carry units. Rank 0 writes; other ranks hold a log without sinks, so the loop needs no rank test. A disk that is
full ends no run: what can't be written is lost and said.
"""

import errno
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson

from llamapro import console
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
        self._trackers = list(trackers)
        self._lost_lines = 0

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of one step."""
        self._append({"step": step, **values})
        for tracker in list(self._trackers):
            try:
                tracker.log(step, values)
            except OSError as error:
                # Its own writer has ended with the error: it takes nothing any more until the next start.
                self._trackers.remove(tracker)
                console.warning(f"{type(tracker).__name__} gets no numbers from step {step} on: {error}")

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
        try:
            _append_whole(self._path, orjson.dumps(dict(line)) + b"\n")
        except OSError as error:
            self._lost_lines += 1
            if self._lost_lines == 1:
                console.warning(f"{self._path} loses lines until it can be written again: {error}")
            return
        if self._lost_lines:
            console.warning(f"{self._path} is written again; lost lines: {self._lost_lines}")
            self._lost_lines = 0


def _append_whole(path: Path, data: bytes) -> None:
    """Append all or nothing, by one write: a kill can leave a cut last line, never a mixed one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if os.write(descriptor, data) != len(data):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
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
