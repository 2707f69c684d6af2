"""Everything the report of one run shows, gathered from the files of its folder; nothing that they don't say."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from llamapro.checkpoint.discover import list_checkpoints
from llamapro.errors import UserError
from llamapro.expansion.record import RECORD_NAME, ExpansionRecord
from llamapro.export.history import EVALUATION_FOLDER, History, read_history
from llamapro.report.events import events_of, is_whole, proof_text
from llamapro.report.facts import Card, Facts, Proof, SampleGroup, flat, number
from llamapro.report.plots import Plot, Series, is_smoothed
from llamapro.report.tables import Evaluation, read_evaluation, tables_of
from llamapro.run_folder import RunFolder
from llamapro.training.log_line import duration

SHOWN_EVENTS = 200
MARKED_EVENTS = {"resume": False, "skip": True, "rollback": True}
MOST_MARKS = 60
SMOOTHED_NOTE = "Thin lines are single steps, bold ones the mean around them over a fiftieth of the run."
MARKS_NOTE = "Dotted: where the run was resumed; in red, where steps were skipped or rolled back."


@dataclass(frozen=True)
class Curve:
    """A number of each step that is drawn: its name in metrics.jsonl, title and unit."""

    key: str
    title: str
    unit: str
    noisy: bool


CURVES = (
    Curve("replay_kl", "Divergence from the base on replayed text", "KL, nats per token", noisy=True),
    Curve("learning_rate", "Learning rate", "learning rate", noisy=False),
    Curve("gradient_norm", "Gradient norm before clipping", "norm", noisy=True),
    Curve("tokens_per_second_per_gpu", "Throughput", "tokens/s per process", noisy=True),
    Curve("memory_gib", "Memory", "GiB", noisy=False),
)


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run folder say."""

    folder: Path
    history: History
    record: ExpansionRecord | None
    evaluation: Evaluation
    environment: Mapping[str, str]


def read_run(run: Path, evaluation: Path | None = None) -> RunFiles:
    """Read a run folder; what a young or old run lacks is empty.

    Args:
        evaluation: folder of `llamapro evaluate`; None: RUN/evaluation, where there is one.

    Raises:
        UserError: the folder is no run, or `evaluation` holds no results.
        Corrupted: a results file can't be read.
    """
    folder = RunFolder(run)
    if not folder.config_file.is_file() and not folder.metrics_file.is_file():
        raise UserError(
            f"{run} is no run folder: it has neither {folder.config_file.name} nor {folder.metrics_file.name}"
        )
    found = read_evaluation(evaluation or run / EVALUATION_FOLDER)
    if evaluation is not None and found == Evaluation(None, None):
        raise UserError(f"--evaluation {evaluation}: no results of `llamapro evaluate` are there")
    return RunFiles(run, read_history(run), _record(folder), found, _environment(folder.environment_file))


def collect(run: RunFiles, samples: Sequence[SampleGroup] = ()) -> Facts:
    """The page of one run."""
    history, folder = run.history, RunFolder(run.folder)
    plots = tuple(_plots(history))
    return Facts(
        title=run.folder.resolve().name,
        subtitle=subtitle(run),
        cards=tuple(_cards(history, run.record)),
        proof=_proof(history),
        tables=tuple(tables_of(history, run.evaluation)),
        plots=plots,
        plots_note=plots_note(plots),
        samples=tuple(samples),
        events=events_of(history.events[-SHOWN_EVENTS:]),
        earlier_events=max(0, len(history.events) - SHOWN_EVENTS),
        configuration=folder.config_file.read_text("utf-8").strip() if folder.config_file.is_file() else "",
        environment=tuple(run.environment.items()),
    )


def subtitle(run: RunFiles) -> str:
    """What was trained, and on what."""
    sources = ", ".join(run.history.setting("data", "sources") or ())
    base = run.record.base_id if run.record else Path(str(run.history.setting("model", "path") or "")).name
    return " · ".join(part for part in (base, f"trained on {sources}" if sources else "") if part)


def series_of(history: History, key: str) -> Series:
    """A number of each step that has it."""
    return [(float(line["step"]), float(line[key])) for line in history.steps if line.get(key) is not None]


def scores_of(history: History) -> dict[str, list[tuple[float, float]]]:
    """Bits per byte of each held-out set at the steps where it was scored."""
    scored: dict[str, list[tuple[float, float]]] = {}
    for step, scores in history.validations:
        for name, score in scores.items():
            scored.setdefault(name, []).append((step, score.bits_per_byte))
    return scored


def source_names(history: History) -> list[str]:
    """The sources whose loss was recorded."""
    return sorted({key.removeprefix("loss/") for line in history.steps for key in line if key.startswith("loss/")})


def median_of(history: History, key: str) -> float | None:
    """The median of a number over steps; None where it was never recorded."""
    values = [value for _, value in series_of(history, key)]
    return statistics.median(values) if values else None


def plots_note(plots: Sequence[Plot]) -> str:
    """What a reader needs to know about the lines."""
    notes = [SMOOTHED_NOTE] if any(is_smoothed(plot) for plot in plots) else []
    return " ".join([*notes, *([MARKS_NOTE] if any(plot.marks for plot in plots) else [])])


def last_proof(history: History) -> Mapping[str, Any] | None:
    """The newest comparison of the frozen weights."""
    return next((line for line in reversed(history.events) if line["event"] == "proof"), None)


def _record(folder: RunFolder) -> ExpansionRecord | None:
    for listed in list_checkpoints(folder.checkpoints, digests=False):
        path = listed.folder / RECORD_NAME
        if not listed.problem and path.is_file():
            return ExpansionRecord.model_validate_json(path.read_bytes())
    return None


def _cards(history: History, record: ExpansionRecord | None) -> Iterator[Card]:
    for change in history.before_after():
        yield Card(f"{change.name}, bits per byte", number(change.change, "+.1%"), "held-out, against step 0")
    if record is not None:
        new = ", ".join(map(str, record.new_blocks))
        yield Card("blocks", f"{record.base_blocks} → {record.blocks}", f"new: {new}")
    steps = history.setting("schedule", "steps")
    total = f" of {steps:,}" if isinstance(steps, int) else ""
    skipped = sum(line["event"] == "skip" for line in history.events)
    yield Card("optimizer steps", f"{history.last_step:,}{total}", f"{skipped} skipped" if skipped else "")
    yield from _mishaps(history)
    yield Card("tokens", f"{history.tokens:,}", "targets, all processes")
    if history.step_seconds:
        yield Card("time in steps", duration(history.step_seconds), "validation and saves apart")
    if (rate := median_of(history, "tokens_per_second_per_gpu")) is not None:
        yield Card("tokens/s per process", f"{rate:,.0f}", "median over steps")
    if (mfu := median_of(history, "mfu")) is not None:
        yield Card("MFU", f"{mfu:.1%}", "of the FLOPs this job needs")


def _mishaps(history: History) -> Iterator[Card]:
    """What a person who looks only at the top must not miss."""
    if rollbacks := [line for line in history.events if line["event"] == "rollback"]:
        undone = sum(last - first + 1 for first, last in (line["skipped_steps"] for line in rollbacks))
        last_place = rollbacks[-1]["checkpoint"]
        yield Card("rollbacks", str(len(rollbacks)), f"{undone} steps undone, the last to {last_place}")
    if failed := [line for line in history.events if line["event"] == "save failed"]:
        yield Card("failed saves", str(len(failed)), f"the last at step {failed[-1]['step']}: {failed[-1]['reason']}")


def _proof(history: History) -> Proof | None:
    last = last_proof(history)
    return Proof(f"Compared bit for bit: {proof_text(last)}.", is_whole(last)) if last else None


def _plots(history: History) -> Iterator[Plot]:
    sources = source_names(history)
    losses = {"all": "loss"} | {name: f"loss/{name}" for name in sources if len(sources) > 1}
    series = {name: series_of(history, key) for name, key in losses.items()}
    marks = _marks(history)
    yield from plot("loss", "Training loss", "nats per token", series, noisy=True, marks=marks)
    scored = scores_of(history)
    yield from plot("validation", "Held-out text", "bits per byte", scored, markers=True)
    moved = {name: _from_start(points) for name, points in scored.items() if len(points) > 1 and points[0][0] == 0}
    yield from plot("retention", "Held-out text against step 0", "change, %", moved, markers=True)
    for curve in CURVES:
        drawn = {curve.key: series_of(history, curve.key)}
        yield from plot(curve.key, curve.title, curve.unit, drawn, noisy=curve.noisy)


def _from_start(points: Series) -> Series:
    return [(step, 100 * (value / points[0][1] - 1)) for step, value in points]


def _marks(history: History) -> tuple[tuple[float, bool], ...]:
    marked = [line for line in history.events if line["event"] in MARKED_EVENTS and line.get("step") is not None]
    if len(marked) > MOST_MARKS:
        return ()
    return tuple((float(line["step"]), MARKED_EVENTS[line["event"]]) for line in marked)


def plot(key: str, title: str, unit: str, series: Mapping[str, Series], **looks: Any) -> Iterator[Plot]:
    """A plot of the series that have points; none where none has."""
    drawn = {name: points for name, points in series.items() if points}
    if drawn:
        yield Plot(key, title, unit, drawn, **looks)


def _environment(path: Path) -> Mapping[str, str]:
    return flat(orjson.loads(path.read_bytes())) if path.is_file() else {}
