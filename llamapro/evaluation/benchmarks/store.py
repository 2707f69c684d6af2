"""benchmarks.json, and each task's measurement beside it: a file named by what was measured."""

from pathlib import Path
from typing import Any

import orjson

from llamapro.evaluation.benchmarks.score import MetricScore, TaskScore
from llamapro.evaluation.results import MEASUREMENTS
from llamapro.evaluation.stored import Key, Stored, write_stored
from llamapro.evaluation.verdict import Verdict
from llamapro.files.atomic import write_atomic

BENCHMARKS_NAME = "benchmarks.json"
FORMAT_VERSION = 1
INTERVALS = "95 %, Student's t over items; differences are paired item by item"


class TaskKey(Key):
    """What fixes a task's measurement.

    Attributes:
        model_digest: of the model's tensors and configuration; `words_digest`: of its tokenizer and its templates.
        items_from: "hub", or the SHA-256 of the archive.
        shots: None: as the task says.
        limit: items at most; None: all.
        chat: whether prompts are put into the model's chat template.
        precision, device: computed in and on.
    """

    model_digest: str
    words_digest: str
    task: str
    items_from: str
    shots: int | None
    limit: int | None
    chat: bool
    precision: str
    device: str
    program: str


class MetricResult(Stored):
    """A metric's value with its 95 % half width; null where lm-eval's aggregate is neither a mean nor a ratio."""

    value: float
    half_width: float | None
    higher_is_better: bool


class TaskResult(Stored):
    """A model on a benchmark: `metric` stands for it, `tasks` is the number of single tasks it consists of."""

    tasks: int
    items: int
    shots: int | None
    metric: str
    metrics: dict[str, MetricResult]


class TaskChange(Stored):
    """By how much the model's metric is above the base's, with its 95 % half width, and what that shows."""

    metric: str
    difference: float
    half_width: float | None
    verdict: Verdict


class BenchmarkResults(Stored):
    """The whole of benchmarks.json.

    Attributes:
        settings: items_from, limit, chat, precision, device.
        versions: of the programs that measured.
        model, base: by benchmark; `base` is empty without one.
        changes: of the model against the base.
        absent: benchmarks of the suite that were not measured, because the archive has no items of them.
    """

    format_version: int = FORMAT_VERSION
    intervals: str = INTERVALS
    settings: dict[str, Any]
    versions: dict[str, str]
    model_name: str
    model: dict[str, TaskResult]
    base_name: str | None = None
    base: dict[str, TaskResult] = {}
    changes: dict[str, TaskChange] = {}
    absent: list[str] = []


def write_benchmarks(folder: Path, results: BenchmarkResults) -> Path:
    """Write benchmarks.json; returns its path."""
    path = folder / BENCHMARKS_NAME
    write_stored(path, results)
    return path


def store_task(folder: Path, key: TaskKey, score: TaskScore) -> None:
    """Keep a score under its key."""
    (folder / MEASUREMENTS).mkdir(parents=True, exist_ok=True)
    metrics = {name: [one.value, one.higher_is_better, one.above, one.below] for name, one in score.metrics.items()}
    content = {"key": key.model_dump(), "items": score.items, "shots": score.shots, "metrics": metrics}
    write_atomic(_place(folder, key), orjson.dumps(content))


def stored_task(folder: Path, key: TaskKey) -> TaskScore | None:
    """The score kept under a key; None where there is none, or none that can be read."""
    try:
        content = orjson.loads(_place(folder, key).read_bytes())
    except (OSError, ValueError):
        return None
    if content.get("key") != key.model_dump():
        return None
    metrics = {
        name: MetricScore(value, better, tuple(above), tuple(below))
        for name, (value, better, above, below) in content["metrics"].items()
    }
    return TaskScore(content["items"], content["shots"], metrics)


def _place(folder: Path, key: TaskKey) -> Path:
    return folder / MEASUREMENTS / f"{key.digest()}.json"
