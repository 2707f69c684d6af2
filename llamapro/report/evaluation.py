"""The page of an evaluation: what `llamapro evaluate` wrote into its folder, in one file that needs nothing else.

A folder may hold measurements of several models; the page is about one of them, named as the user named it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from llamapro.errors import Corrupted
from llamapro.evaluation.benchmarks.store import BENCHMARKS_NAME, BenchmarkResults
from llamapro.evaluation.results import Change, Contribution, Results, read_results
from llamapro.evaluation.stored import Stored
from llamapro.evaluation.strength import STRENGTHS_NAME, StrengthCurve
from llamapro.evaluation.verdict import Verdict
from llamapro.files.atomic import write_atomic
from llamapro.report.facts import ABSENT, Card, Cell, Facts, Table, number, with_width
from llamapro.report.page import render
from llamapro.report.plots import Plot

PAGE_NAME = "report.html"
Part = TypeVar("Part", bound=Stored)


@dataclass(frozen=True)
class Evaluated:
    """What a folder holds of a model; each part may be missing."""

    model: str
    texts: Results | None
    benchmarks: BenchmarkResults | None
    strengths: StrengthCurve | None

    @property
    def base(self) -> str | None:
        """What the model is compared with."""
        if self.texts is not None and self.texts.base is not None:
            return self.texts.base.name
        return self.benchmarks.base_name if self.benchmarks else None

    @property
    def verdicts(self) -> list[Verdict]:
        """Of every text and benchmark."""
        texts = [] if self.texts is None else list(self.texts.verdicts.values())
        return texts + ([] if self.benchmarks is None else [one.verdict for one in self.benchmarks.changes.values()])


def write_evaluation_page(folder: Path, model: str) -> Path:
    """Write FOLDER/report.html about a model; returns its path.

    Args:
        model: as it is named in the folder's files.

    Raises:
        Corrupted: a file of the folder can't be read.
    """
    path = folder / PAGE_NAME
    write_atomic(path, render(facts_of(read_evaluated(folder, model))))
    return path


def read_evaluated(folder: Path, model: str) -> Evaluated:
    """What a folder holds of a model.

    Raises:
        Corrupted: a file of it can't be read.
    """
    texts = read_results(folder)
    benchmarks = _read(folder / BENCHMARKS_NAME, BenchmarkResults)
    strengths = _read(folder / STRENGTHS_NAME, StrengthCurve)
    return Evaluated(
        model,
        texts if texts and texts.model.name == model else None,
        benchmarks if benchmarks and benchmarks.model_name == model else None,
        strengths if strengths and strengths.model == model else None,
    )


def facts_of(found: Evaluated) -> Facts:
    """The page as values."""
    return Facts(
        title=found.model,
        subtitle=f"against {found.base}" if found.base else "llamapro evaluate",
        cards=tuple(_cards(found)),
        tables=tuple(_tables(found)),
        plots=tuple(_plots(found)),
        environment=tuple(_environment(found)),
    )


def _cards(found: Evaluated) -> Iterator[Card]:
    counts = Counter(found.verdicts)
    if counts:
        for verdict in ("better", "worse", "no difference shown"):
            yield Card(verdict, str(counts[verdict]), "at 95 %")
    if found.texts is not None:
        tokens = sum(score.tokens for score in found.texts.model.sets.values())
        yield Card("texts", str(len(found.texts.model.sets)), f"{tokens:,} tokens")
    if found.benchmarks is not None:
        items = sum(task.items for task in found.benchmarks.model.values())
        yield Card("benchmarks", str(len(found.benchmarks.model)), f"{items:,} items")


def _tables(found: Evaluated) -> Iterator[Table]:
    if found.benchmarks is not None:
        yield _benchmarks(found.benchmarks)
    if found.texts is not None:
        yield _texts(found.texts)
        if found.texts.shifts:
            yield _shifts(found.texts)
        if found.texts.contributions:
            yield _contributions(found.texts)
    if found.strengths is not None:
        yield _strengths(found.strengths)


def _benchmarks(results: BenchmarkResults) -> Table:
    rows = []
    for name, task in results.model.items():
        score, base, change = task.metrics[task.metric], results.base.get(name), results.changes.get(name)
        before = base.metrics[task.metric] if base else None
        rows.append(
            (
                Cell(name),
                Cell(ABSENT if task.shots is None else str(task.shots)),
                Cell(task.metric.removesuffix(",none")),
                Cell(f"{task.items:,}"),
                Cell(with_width(before.value, before.half_width) if before else ABSENT),
                Cell(with_width(score.value, score.half_width)),
                Cell(with_width(change.difference, change.half_width, "+.4f") if change else ABSENT),
                _judged(change.verdict if change else None),
            )
        )
    note = f"Intervals {results.intervals}."
    if results.absent:
        note += f" Not measured, for want of items: {', '.join(results.absent)}."
    columns = ("benchmark", "examples", "metric", "items", "base", "model", "change", "verdict")
    return Table("Benchmarks", columns, tuple(rows), note)


def _texts(results: Results) -> Table:
    rows = []
    for name, score in results.model.sets.items():
        base, change = results.base.sets[name] if results.base else None, results.changes.get(name)
        rows.append(
            (
                Cell(name),
                Cell(f"{score.tokens:,}"),
                Cell(with_width(base.bits_per_byte, base.bits_per_byte_half_width) if base else ABSENT),
                Cell(with_width(score.bits_per_byte, score.bits_per_byte_half_width)),
                Cell(_percent(change) if change else ABSENT),
                _judged(results.verdicts.get(name)),
            )
        )
    note = f"Bits per byte, lower is better; the change is that of the loss. Intervals {results.intervals}."
    columns = ("held-out text", "tokens", "base", "model", "change", "verdict")
    return Table("Held-out texts", columns, tuple(rows), note)


def _shifts(results: Results) -> Table:
    rows = tuple(
        (
            Cell(name),
            *(Cell(f"{count / shift.positions:.2%}") for count in (shift.unshifted, shift.marginal, shift.shifted)),
            Cell(f"{shift.positions:,}"),
        )
        for name, shift in results.shifts.items()
    )
    note = (
        "The model's most likely next token is the base's too (unshifted), among the base's next two (marginal), or "
        f"neither (shifted). At most {results.detail_sequences} rows of each text."
    )
    return Table("Token shift", ("held-out text", "unshifted", "marginal", "shifted", "places"), rows, note)


def _contributions(results: Results) -> Table:
    names = list(results.model.sets)
    rows = tuple(
        (Cell(f"block {block}"), *(Cell(_increase(found.get(name))) for name in names))
        for block, found in results.contributions.items()
    )
    note = (
        "Increase of the loss when one added block alone is left out, nats per token. At most "
        f"{results.detail_sequences} rows of each text."
    )
    return Table("What each added block contributes", ("without", *names), rows, note)


def _strengths(curve: StrengthCurve) -> Table:
    names = list(curve.points[0].changes)
    heads = [f"{name} (general)" if name == curve.general else name for name in names]
    rows = tuple(
        (Cell(f"{point.strength:g}"), *(Cell(_percent(point.changes[name])) for name in names))
        for point in curve.points
    )
    blocks = ", ".join(map(str, curve.blocks))
    note = f"Change of the loss against strength 0, which is the base; blocks {blocks}. Intervals {curve.intervals}."
    return Table("Strength of the new blocks", ("strength", *heads), rows, note)


def _plots(found: Evaluated) -> Iterator[Plot]:
    if found.strengths is not None:
        points = found.strengths.points
        series = {
            name: [(100 * point.strength, 100 * point.changes[name].fraction) for point in points]
            for name in points[0].changes
        }
        title = "Gain and cost by strength of the new blocks"
        yield Plot("strengths", title, "change of the loss, %", series, markers=True, across="strength, %")
    if found.texts is not None and found.texts.contributions:
        contributions = found.texts.contributions
        series = {
            name: [(float(block), parts[name].increase) for block, parts in contributions.items() if name in parts]
            for name in found.texts.model.sets
        }
        title = "What each added block contributes"
        yield Plot("contributions", title, "loss without it, nats/token", series, markers=True, across="block")


def _environment(found: Evaluated) -> Iterator[tuple[str, str]]:
    parts = [part for part in (found.benchmarks, found.texts) if part is not None]
    for part in parts:
        kind = "benchmarks" if isinstance(part, BenchmarkResults) else "texts"
        yield f"{kind}: settings", _listed(part.settings)
        yield f"{kind}: versions", _listed(part.versions)
    if found.texts is not None:
        yield "digest of the model", found.texts.model.digest


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _judged(verdict: Verdict | None) -> Cell:
    if verdict is None:
        return Cell(ABSENT)
    return Cell(verdict, "" if verdict == "no difference shown" else verdict)


def _percent(change: Change) -> str:
    width = "" if change.half_width is None else f" ± {100 * change.half_width:.2f}"
    return f"{number(100 * change.fraction, '+.2f')}{width} %"


def _increase(found: Contribution | None) -> str:
    return ABSENT if found is None else with_width(found.increase, found.half_width, "+.4f")


def _read(path: Path, kind: type[Part]) -> Part | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise Corrupted(f"{path} can't be read; delete it and evaluate again ({error})") from error
