"""Several runs on one page: their curves over each other, their results side by side, what their settings differ in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import commonpath
from pathlib import Path
from typing import Any

from llamapro.errors import UserError
from llamapro.evaluation.results import Results
from llamapro.export.history import History
from llamapro.report.collect import (
    CURVES,
    RunFiles,
    last_proof,
    median_of,
    plot,
    plots_note,
    read_run,
    scores_of,
    series_of,
    source_names,
    subtitle,
)
from llamapro.report.events import proof_text
from llamapro.report.facts import ABSENT, Cell, Facts, Table, flat, judged, number, with_width
from llamapro.report.plots import Plot, Series
from llamapro.training.log_line import duration

OWN_SETTINGS = frozenset({"run.folder"})  # differ between any two runs
OWN_ENVIRONMENT = frozenset({"host", "commit"})
STEPS, TOKENS = "step", "tokens"
Runs = Mapping[str, RunFiles]


def read_runs(folders: Sequence[Path]) -> dict[str, RunFiles]:
    """Read run folders by the shortest names that tell them apart.

    Raises:
        UserError: a folder is no run, or is named twice.
    """
    names = run_names(folders)
    return {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names; where two have the same, what of their paths is not common to all."""
    places = [folder.resolve() for folder in folders]
    if twice := sorted({str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1}):
        raise UserError(f"{', '.join(twice)}: the same run is named twice; name each run once")
    names = [place.name for place in places]
    if len(set(names)) == len(names):
        return names
    common = commonpath(places)
    return [place.relative_to(common).as_posix() for place in places]


def overlay(runs: Runs) -> Facts:
    """The page of several runs."""
    plots = tuple(_plots(runs))
    return Facts(
        title=" · ".join(runs),
        subtitle=f"{len(runs)} runs compared",
        tables=tuple(_tables(runs)),
        plots=plots,
        plots_note=plots_note(plots),
    )


def _tables(runs: Runs) -> Iterator[Table]:
    yield _table("Runs", runs, _summary(runs), words=True)
    yield from _settings("Settings that differ", runs, OWN_SETTINGS, lambda run: flat(dict(run.history.config), _shown))
    yield from _settings("Environments that differ", runs, OWN_ENVIRONMENT, lambda run: dict(run.environment))
    if scored := _rows(runs, _held_out):
        note = "Bits per byte after training, and by how much they are above those at step 0."
        yield _table("Held-out text", runs, scored, note)
    if texts := _rows(runs, lambda run: _texts(run.evaluation.texts)):
        note = "Bits per byte by llamapro evaluate and the change of the loss against the base, intervals 95 %."
        yield _table("Retention: held-out text", runs, texts, note)
    if benchmarks := _rows(runs, _benchmarks):
        note = "By llamapro evaluate, with the change against the base, intervals 95 %."
        yield _table("Retention: benchmarks", runs, benchmarks, note)


def _table(title: str, runs: Runs, rows: Sequence[tuple[Cell, ...]], note: str = "", *, words: bool = False) -> Table:
    return Table(title, ("", *runs), tuple(rows), note, of_runs=True, of_words=words)


def _summary(runs: Runs) -> list[tuple[Cell, ...]]:
    rows: tuple[tuple[str, Callable[[RunFiles], str]], ...] = (
        ("model and text", subtitle),
        ("blocks", lambda run: f"{run.record.base_blocks} → {run.record.blocks}" if run.record else ""),
        ("optimizer steps", lambda run: f"{run.history.last_step:,}"),
        ("tokens", lambda run: f"{run.history.tokens:,}"),
        ("time in steps", lambda run: duration(run.history.step_seconds)),
        ("tokens/s per process, median", lambda run: _median(run.history, "tokens_per_second_per_gpu", ",.0f")),
        ("MFU, median", lambda run: _median(run.history, "mfu", ".1%")),
        ("resumed", lambda run: _count(run.history, "resume")),
        ("skipped steps", lambda run: _count(run.history, "skip")),
        ("rollbacks", lambda run: _count(run.history, "rollback")),
        ("failed saves", lambda run: _count(run.history, "save failed")),
        ("frozen weights", lambda run: proof_text(proof) if (proof := last_proof(run.history)) else ""),
    )
    shown = [(label, [say(run) for run in runs.values()]) for label, say in rows]
    return [(Cell(label), *(Cell(text or ABSENT) for text in texts)) for label, texts in shown if any(texts)]


def _median(history: History, key: str, form: str) -> str:
    value = median_of(history, key)
    return "" if value is None else f"{value:{form}}"


def _count(history: History, event: str) -> str:
    count = sum(line["event"] == event for line in history.events)
    return str(count) if count else ""


def _settings(
    title: str, runs: Runs, own: frozenset[str], values: Callable[[RunFiles], Mapping[str, str]]
) -> Iterator[Table]:
    found = [values(run) for run in runs.values()]
    keys = [key for key in dict.fromkeys(key for one in found for key in one) if key not in own]
    different = [key for key in keys if len({one.get(key) for one in found}) > 1]
    if different:
        rows = [(Cell(key), *(Cell(one.get(key, ABSENT)) for one in found)) for key in different]
        yield _table(title, runs, rows, "All others are the same." if len(different) < len(keys) else "", words=True)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _rows(runs: Runs, cells: Callable[[RunFiles], Mapping[str, Cell]]) -> list[tuple[Cell, ...]]:
    found = [cells(run) for run in runs.values()]
    names = dict.fromkeys(name for one in found for name in one)
    return [(Cell(name), *(one.get(name, Cell(ABSENT)) for one in found)) for name in names]


def _held_out(run: RunFiles) -> dict[str, Cell]:
    return {
        score.name: Cell(f"{score.after.bits_per_byte:.4f} ({number(score.change, '+.2%')})", judged(score.change))
        for score in run.history.before_after()
    }


def _texts(results: Results | None) -> dict[str, Cell]:
    cells = {}
    for name, score in results.model.sets.items() if results else ():
        text = with_width(score.bits_per_byte, score.bits_per_byte_half_width)
        change = results.changes.get(name) if results else None
        if change:
            by = with_width(change.fraction, change.half_width, "+.2%")
            cells[name] = Cell(f"{text} ({by})", judged(change.fraction, change.half_width))
        else:
            cells[name] = Cell(text)
    return cells


def _benchmarks(run: RunFiles) -> dict[str, Cell]:
    results, cells = run.evaluation.benchmarks, {}
    for name, task in results.model.items() if results else ():
        score, change = task.metrics[task.metric], results.changes.get(name) if results else None
        text = with_width(score.value, score.half_width)
        label = f"{name}, {task.metric.removesuffix(',none')}"
        if change:
            by = with_width(change.difference, change.half_width, "+.4f")
            verdict = judged(change.difference, change.half_width, higher_is_better=score.higher_is_better)
            cells[label] = Cell(f"{text} ({by})", verdict)
        else:
            cells[label] = Cell(text)
    return cells


def _plots(runs: Runs) -> Iterator[Plot]:
    axis = _axis(runs)
    across = {name: _across(run.history, axis) for name, run in runs.items()}

    def lines(read: Callable[[History], Series]) -> dict[str, Series]:
        return {name: across[name](read(run.history)) for name, run in runs.items()}

    loss = lines(lambda history: series_of(history, "loss"))
    yield from plot("loss", "Training loss", "nats per token", loss, noisy=True, across=axis)
    sources = dict.fromkeys(name for run in runs.values() for name in source_names(run.history))
    for index, source in enumerate(sources if len(sources) > 1 else ()):
        series = lines(lambda history, key=f"loss/{source}": series_of(history, key))  # type: ignore[misc]
        yield from plot(f"loss-{index}", f"Training loss: {source}", "nats per token", series, noisy=True, across=axis)
    sets = dict.fromkeys(name for run in runs.values() for name in scores_of(run.history))
    for index, name in enumerate(sets):
        series = lines(lambda history, name=name: scores_of(history).get(name, ()))  # type: ignore[misc]
        yield from plot(f"set-{index}", f"Held-out text: {name}", "bits per byte", series, markers=True, across=axis)
    for curve in CURVES:
        series = lines(lambda history, key=curve.key: series_of(history, key))  # type: ignore[misc]
        yield from plot(curve.key, curve.title, curve.unit, series, noisy=curve.noisy, across=axis)


def _axis(runs: Runs) -> str:
    """Tokens where the runs' steps differ in size, else steps."""
    sizes = set()
    for run in runs.values():
        history = run.history
        sizes.add((history.setting("batch", "global_sequences"), history.setting("data", "sequence_length")))
    counted = all(line.get("tokens") is not None for run in runs.values() for line in run.history.steps)
    return TOKENS if len(sizes) > 1 and counted else STEPS


def _across(history: History, axis: str) -> Callable[[Series], Series]:
    if axis == STEPS:
        return lambda series: series
    tokens = {0.0: 0.0} | {float(line["step"]): float(line["tokens"]) for line in history.steps}
    return lambda series: [(tokens[step], value) for step, value in series if step in tokens]
