"""Everything a report shows, gathered from the files of one run folder; nothing is computed that they don't say."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from llamapro.checkpoint.discover import list_checkpoints
from llamapro.errors import UserError
from llamapro.evaluation.results import Results
from llamapro.expansion.record import RECORD_NAME, ExpansionRecord
from llamapro.export.history import History, read_history
from llamapro.report.plots import Plot, Series
from llamapro.run_folder import RunFolder
from llamapro.training.log_line import duration

SAMPLE_NAME = "sample.txt"
SHOWN_EVENTS = 200
_CURVES = (
    ("learning_rate", "Learning rate", "learning rate"),
    ("gradient_norm", "Gradient norm before clipping", "norm"),
    ("tokens_per_second_per_gpu", "Throughput", "tokens/s per process"),
    ("memory_gib", "Memory", "GiB"),
)


@dataclass(frozen=True)
class Card:
    """One number of the summary."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Proof:
    """The last comparison of the frozen weights with the record; `whole` when nothing differed."""

    text: str
    whole: bool


@dataclass(frozen=True)
class Row:
    """A row of a comparison; the verdict ("better", "worse" or "") colours its last cell."""

    cells: tuple[str, ...]
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """A before/after or base/model table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str


@dataclass(frozen=True)
class Event:
    """Something that happened; `details` as name value pairs."""

    time: str
    name: str
    details: str


@dataclass(frozen=True)
class Facts:
    """What the page of one run says."""

    title: str
    subtitle: str
    cards: tuple[Card, ...]
    proof: Proof | None
    comparisons: tuple[Comparison, ...]
    plots: tuple[Plot, ...]
    sample: str
    events: tuple[Event, ...]
    earlier_events: int
    configuration: str
    environment: tuple[tuple[str, str], ...]


def collect(run: Path) -> Facts:
    """Read a run folder; what a young or old run lacks is left out.

    Raises:
        UserError: the folder is no run.
    """
    folder = RunFolder(run)
    if not folder.config_file.is_file() and not folder.metrics_file.is_file():
        raise UserError(
            f"{run} is no run folder: it has neither {folder.config_file.name} nor {folder.metrics_file.name}"
        )
    history = read_history(run)
    record = _record(folder)
    return Facts(
        title=run.resolve().name,
        subtitle=_subtitle(history, record),
        cards=tuple(_cards(history, record)),
        proof=_proof(history),
        comparisons=tuple(_comparisons(history)),
        plots=tuple(_plots(history)),
        sample=_text(run / SAMPLE_NAME),
        events=tuple(_event(line) for line in history.events[-SHOWN_EVENTS:]),
        earlier_events=max(0, len(history.events) - SHOWN_EVENTS),
        configuration=_text(folder.config_file),
        environment=tuple(_environment(folder.environment_file)),
    )


def _record(folder: RunFolder) -> ExpansionRecord | None:
    for listed in list_checkpoints(folder.checkpoints, digests=False):
        path = listed.folder / RECORD_NAME
        if not listed.problem and path.is_file():
            return ExpansionRecord.model_validate_json(path.read_bytes())
    return None


def _subtitle(history: History, record: ExpansionRecord | None) -> str:
    sources = ", ".join(history.setting("data", "sources") or ())
    base = record.base_id if record else Path(str(history.setting("model", "path") or "")).name
    return " · ".join(part for part in (base, f"trained on {sources}" if sources else "") if part)


def _cards(history: History, record: ExpansionRecord | None) -> Iterator[Card]:
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
        yield Card("time in steps", duration(history.step_seconds), "without validation and saves")
    if rates := [value for _, value in _series(history, "tokens_per_second_per_gpu")]:
        yield Card("tokens/s per process", f"{statistics.median(rates):,.0f}", "median over steps")
    if mfu := [value for _, value in _series(history, "mfu")]:
        yield Card("MFU", f"{statistics.median(mfu):.1%}", "of the FLOPs this job needs")
    for change in history.before_after():
        yield Card(f"{change.name}, bits per byte", f"{change.change:+.1%}", "held-out, after against before")


def _mishaps(history: History) -> Iterator[Card]:
    """What a person who looks only at the top must not miss."""
    if rollbacks := [line for line in history.events if line["event"] == "rollback"]:
        undone = sum(last - first + 1 for first, last in (line["skipped_steps"] for line in rollbacks))
        last_place = rollbacks[-1]["checkpoint"]
        yield Card("rollbacks", str(len(rollbacks)), f"{undone} steps undone, the last to {last_place}")
    if failed := [line for line in history.events if line["event"] == "save failed"]:
        yield Card("failed saves", str(len(failed)), f"the last at step {failed[-1]['step']}: {failed[-1]['reason']}")


def _proof(history: History) -> Proof | None:
    proofs = [line for line in history.events if line["event"] == "proof"]
    if not proofs:
        return None
    equal, total = proofs[-1].get("equal", 0), proofs[-1].get("total", 0)
    text = proofs[-1].get("text", f"{equal} of {total} base tensors equal the record")
    return Proof(f"Compared bit for bit: {text}.", equal == total)


def _comparisons(history: History) -> Iterator[Comparison]:
    if scores := history.before_after():
        rows = (
            Row(
                (
                    score.name,
                    f"{score.before.loss:.4f}",
                    f"{score.after.loss:.4f}",
                    f"{score.before.bits_per_byte:.4f}",
                    f"{score.after.bits_per_byte:.4f}",
                    f"{score.change:+.2%}",
                ),
                _verdict(score.change),
            )
            for score in scores
        )
        columns = ("held-out text", "loss before", "after", "bits per byte before", "after", "change")
        last = history.validations[-1][0]
        note = f"Before: step 0, which computes what the base computes. After: step {last}. Loss in nats per token."
        yield Comparison("Before and after", columns, tuple(rows), note)
    if history.evaluation is not None:
        yield _evaluation(history.evaluation)


def _evaluation(results: Results) -> Comparison:
    rows = []
    for name, score in results.model.sets.items():
        change = results.changes.get(name)
        base = results.base.sets.get(name) if results.base else None
        cells = (
            name,
            _with_width(base.bits_per_byte, base.bits_per_byte_half_width) if base else "–",
            _with_width(score.bits_per_byte, score.bits_per_byte_half_width),
            _with_width(change.fraction, change.half_width, "+.2%") if change else "–",
        )
        rows.append(Row(cells, _verdict(change.fraction) if change else ""))
    compared = f" against {results.base.name}" if results.base else ""
    note = f"llamapro evaluate of {results.model.name}{compared}: bits per byte with intervals ({results.intervals})."
    return Comparison("Evaluation", ("text", "base", "model", "change"), tuple(rows), note)


def _with_width(value: float, half_width: float | None, form: str = ".4f") -> str:
    return f"{value:{form}}" + (f" ± {half_width:{form.removeprefix('+')}}" if half_width is not None else "")


def _verdict(change: float) -> str:
    return "better" if change < 0 else "worse" if change > 0 else ""


def _plots(history: History) -> Iterator[Plot]:
    sources = sorted({key for line in history.steps for key in line if key.startswith("loss/")})
    losses = {"all": "loss"} | {key.removeprefix("loss/"): key for key in sources if len(sources) > 1}
    series = {name: _series(history, key) for name, key in losses.items()}
    yield from _plot("loss", "Training loss", "nats per token", series)
    scored: dict[str, list[tuple[float, float]]] = {}
    for step, scores in history.validations:
        for name, score in scores.items():
            scored.setdefault(name, []).append((step, score.bits_per_byte))
    yield from _plot("validation", "Held-out text", "bits per byte", scored, markers=True)
    for key, title, unit in _CURVES:
        yield from _plot(key, title, unit, {key: _series(history, key)})


def _plot(key: str, title: str, unit: str, series: Mapping[str, Series], *, markers: bool = False) -> Iterator[Plot]:
    drawn = {name: points for name, points in series.items() if points}
    if drawn:
        yield Plot(key, title, unit, drawn, markers)


def _series(history: History, key: str) -> Sequence[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in history.steps if line.get(key) is not None]


def _event(line: Mapping[str, Any]) -> Event:
    details = ", ".join(f"{key} {value}" for key, value in line.items() if key not in {"event", "time"})
    return Event(str(line.get("time", "")), str(line["event"]), details)


def _environment(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_file():
        yield from _flat("", orjson.loads(path.read_bytes()))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
