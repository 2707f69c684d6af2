"""What a benchmark's answers say: lm-eval's own numbers, with 95 % confidence intervals over the items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

from llamapro.evaluation.intervals import Estimate, ratio_of_sums

AGREEMENT = 1e-9


@dataclass(frozen=True)
class MetricScore:
    """One metric of one task.

    Attributes:
        value: as lm-eval aggregates it.
        above, below: `value` is Σ above / Σ below over the items; empty for an aggregate of another form.
    """

    value: float
    higher_is_better: bool
    above: tuple[float, ...] = ()
    below: tuple[float, ...] = ()

    def estimate(self) -> Estimate:
        """The value with its interval."""
        return ratio_of_sums(self.above, self.below) if self.above else Estimate(self.value, None)


@dataclass(frozen=True)
class TaskScore:
    """A task's metrics.

    Attributes:
        shots: solved examples before each question; None where several tasks differ.
        metrics: by name ("acc,none": metric and lm-eval's filter), in lm-eval's order.
    """

    items: int
    shots: int | None
    metrics: Mapping[str, MetricScore]


def task_score(evaluated: Mapping[str, Any], leaf: str) -> TaskScore:
    """The score of a task in what lm-eval's evaluator returned."""
    samples = evaluated["samples"][leaf]
    values: dict[str, list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    found = evaluated["results"][leaf]
    better = evaluated["higher_is_better"][leaf]
    metrics = {
        name: _metric(float(found[name]), bool(better.get(name.partition(",")[0], True)), rows)
        for name, rows in values.items()
    }
    return TaskScore(len({sample["doc_id"] for sample in samples}), evaluated["n-shot"][leaf], metrics)


def together(scores: Sequence[TaskScore]) -> TaskScore:
    """The score over all items of several tasks, each item counted once; the metrics that all of them have."""
    first, *others = scores
    if not others:
        return first
    shared = [name for name in first.metrics if all(name in score.metrics for score in others)]
    metrics = {name: _joined([score.metrics[name] for score in scores]) for name in shared}
    shots = {score.shots for score in scores}
    return TaskScore(
        sum(score.items for score in scores),
        shots.pop() if len(shots) == 1 else None,
        {name: one for name, one in metrics.items() if one},
    )


def difference(model: MetricScore, base: MetricScore) -> Estimate:
    """By how much the model's value is above the base's; paired item by item where both are means."""
    if not model.above or model.below != base.below:
        return Estimate(model.value - base.value, None)
    pairs = zip(model.above, base.above, strict=True)
    return ratio_of_sums([new - old for new, old in pairs], model.below)


def _metric(value: float, higher_is_better: bool, rows: Sequence[Any]) -> MetricScore:
    """With its items, if the aggregate is a mean, or bits per byte of (log-likelihood, bytes)."""
    if all(isinstance(row, int | float) for row in rows):
        above, below = [float(row) for row in rows], [1.0] * len(rows)
    elif all(isinstance(row, Sequence) and len(row) == 2 for row in rows):
        above, below = [-float(row[0]) / log(2) for row in rows], [float(row[1]) for row in rows]
    else:
        return MetricScore(value, higher_is_better)
    if abs(ratio_of_sums(above, below).value - value) > AGREEMENT * max(1.0, abs(value)):
        return MetricScore(value, higher_is_better)
    return MetricScore(value, higher_is_better, tuple(above), tuple(below))


def _joined(metrics: Sequence[MetricScore]) -> MetricScore | None:
    if not all(metric.above for metric in metrics):
        return None
    above = tuple(value for metric in metrics for value in metric.above)
    below = tuple(value for metric in metrics for value in metric.below)
    return MetricScore(ratio_of_sums(above, below).value, metrics[0].higher_is_better, above, below)
