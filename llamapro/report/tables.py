"""What was measured before and after, or of a model and its base, as tables of one run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from llamapro.errors import Corrupted
from llamapro.evaluation.benchmarks.store import BENCHMARKS_NAME, BenchmarkResults
from llamapro.evaluation.results import Results, read_results
from llamapro.export.history import History
from llamapro.report.facts import ABSENT, Cell, Table, judged, number, with_width


@dataclass(frozen=True)
class Evaluation:
    """What a folder of `llamapro evaluate` holds: texts, benchmarks, both or neither."""

    texts: Results | None
    benchmarks: BenchmarkResults | None


def read_evaluation(folder: Path) -> Evaluation:
    """Read a folder of results; one that is missing is empty.

    Raises:
        Corrupted: a file of it can't be read.
    """
    path = folder / BENCHMARKS_NAME
    try:
        benchmarks = BenchmarkResults.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        benchmarks = None
    except (OSError, ValidationError) as error:
        raise Corrupted(f"{path} can't be read; delete it and evaluate again ({error})") from error
    return Evaluation(read_results(folder), benchmarks)


def tables_of(history: History, evaluation: Evaluation) -> Iterator[Table]:
    """The run's own validation, then what `llamapro evaluate` measured."""
    if history.before_after():
        yield _before_after(history)
    if evaluation.texts is not None:
        yield _texts(evaluation.texts)
    if evaluation.benchmarks is not None:
        yield _benchmarks(evaluation.benchmarks)


def _before_after(history: History) -> Table:
    rows = tuple(
        (
            Cell(score.name),
            Cell(f"{score.before.loss:.4f}"),
            Cell(f"{score.after.loss:.4f}"),
            Cell(f"{score.before.bits_per_byte:.4f}"),
            Cell(f"{score.after.bits_per_byte:.4f}"),
            Cell(number(score.change, "+.2%"), judged(score.change)),
        )
        for score in history.before_after()
    )
    columns = ("held-out text", "loss before", "after", "bits per byte before", "after", "change")
    last = history.validations[-1][0]
    note = f"Before: step 0, which computes what the base computes. After: step {last:,}. Loss in nats per token."
    return Table("Before and after", columns, rows, note)


def _texts(results: Results) -> Table:
    rows = []
    for name, score in results.model.sets.items():
        change = results.changes.get(name)
        base = results.base.sets.get(name) if results.base else None
        cells = (
            Cell(name),
            Cell(with_width(base.bits_per_byte, base.bits_per_byte_half_width) if base else ABSENT),
            Cell(with_width(score.bits_per_byte, score.bits_per_byte_half_width)),
            Cell(with_width(change.fraction, change.half_width, "+.2%"), judged(change.fraction, change.half_width))
            if change
            else Cell(ABSENT),
        )
        rows.append(cells)
    note = f"{_of(results.model.name, results.base.name if results.base else None)}: intervals {results.intervals}."
    columns = ("text, bits per byte", "base", "model", "change of the loss")
    return Table("Retention: held-out text", columns, tuple(rows), note)


def _benchmarks(results: BenchmarkResults) -> Table:
    rows = []
    for name, task in results.model.items():
        score, change, base = task.metrics[task.metric], results.changes.get(name), results.base.get(name)
        before = base.metrics.get(task.metric) if base else None
        difference = Cell(ABSENT)
        if change:
            verdict = judged(change.difference, change.half_width, higher_is_better=score.higher_is_better)
            difference = Cell(with_width(change.difference, change.half_width, "+.4f"), verdict)
        cells = (
            Cell(name),
            Cell(task.metric.removesuffix(",none")),
            Cell(f"{task.items:,}"),
            Cell(with_width(before.value, before.half_width) if before else ABSENT),
            Cell(with_width(score.value, score.half_width)),
            difference,
        )
        rows.append(cells)
    columns = ("benchmark", "metric", "items", "base", "model", "change")
    note = f"{_of(results.model_name, results.base_name)}: intervals {results.intervals}."
    if results.absent:
        note += f" Not measured: {', '.join(results.absent)}."
    return Table("Retention: benchmarks", columns, tuple(rows), note)


def _of(model: str, base: str | None) -> str:
    return f"llamapro evaluate of {model}" + (f" against {base}" if base else "")
