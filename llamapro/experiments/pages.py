"""An experiment's results as files: JSON, and for people a Markdown table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamapro.evaluation.stored import write_stored
from llamapro.experiments.pictures import draw_ablation, draw_trace
from llamapro.experiments.results import AblationResults, Spread, TraceResults
from llamapro.files.atomic import write_atomic

SPREAD_NOTE = "Means over seeds ± their standard deviation; with one seed the spread is not known."

Table = tuple[list[str], list[list[str]]]


def write_ablation(folder: Path, results: AblationResults) -> None:
    """Write ablation.json, ablation.md and ablation.svg."""
    write_stored(folder / "ablation.json", results)
    write_atomic(folder / "ablation.svg", draw_ablation(results))
    evaluation = results.settings["evaluation"]
    lines = [
        f"# Variants at {results.settings['budget_tokens']:,} tokens",
        _setting(results.settings, results.environment, results.date),
        _markdown(ablation_table(results)),
        f"Domain: change of loss on {_names(evaluation['domain'])}; general: on {_names(evaluation['general'])}, in "
        f"percent of the base's, on held-out text; negative is better. {SPREAD_NOTE}",
        "Seconds are those of the training steps alone. Tokens are targets, without padding.",
        "![change of loss on domain text against general text](ablation.svg)",
        *_failures(results.failed),
    ]
    write_atomic(folder / "ablation.md", "\n\n".join(lines) + "\n")


def ablation_table(results: AblationResults) -> Table:
    """Columns and rows of an ablation's table."""
    benchmarks = list(next(iter(results.rows.values())).benchmarks)
    columns = ["variant", "domain, %", "general, %", *benchmarks, "learning parameters", "tokens", "seconds", "seeds"]
    rows = []
    for name, row in results.rows.items():
        cells = [name, _percent(row.domain), _percent(row.general)]
        cells += [_value(row.benchmarks[benchmark], "+.4f") for benchmark in benchmarks]
        cells += [f"{row.parameters:,}", f"{row.tokens.mean:,.0f}", f"{row.seconds.mean:,.0f}", _listed(row.seeds)]
        rows.append(cells)
    return columns, rows


def write_trace(folder: Path, results: TraceResults) -> None:
    """Write trace.json, trace.md and trace.svg."""
    write_stored(folder / "trace.json", results)
    write_atomic(folder / "trace.svg", draw_trace(results))
    lines = [
        f"# {len(results.tasks)} tasks one after another, {results.settings['tokens_per_task']:,} tokens each",
        _setting(results.settings, results.environment, results.date),
        _markdown(trace_table(results)),
        f"Scores are {results.score}; higher is better. OP: mean score on all tasks after the last; BWT: by how much "
        "the scores have changed since each task was learned (TRACE, arXiv 2310.06762; the sum is divided by the "
        f"number of tasks). {SPREAD_NOTE}",
    ]
    for name, row in results.rows.items():
        matrix = [["the base", *map(_score, results.base)]]
        matrix += [
            [f"after {task}", *map(_score, scores)] for task, scores in zip(results.tasks, row.scores, strict=True)
        ]
        lines += [f"## {name}", _markdown((["score on", *results.tasks], matrix))]
    lines += ["![overall performance and backward transfer after each task](trace.svg)", *_failures(results.failed)]
    write_atomic(folder / "trace.md", "\n\n".join(lines) + "\n")


def trace_table(results: TraceResults) -> Table:
    """Columns and rows of a sequence's table."""
    columns = ["method", "OP", "BWT", "learning parameters", "tokens", "seconds", "seeds"]
    rows = [
        [
            *(name, _value(row.overall, ".4f"), _value(row.transfer, "+.4f"), f"{row.parameters:,}"),
            *(f"{row.tokens.mean:,.0f}", f"{row.seconds.mean:,.0f}", _listed(row.seeds)),
        ]
        for name, row in results.rows.items()
    ]
    return columns, rows


def _markdown(table: Table) -> str:
    columns, rows = table
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def _percent(value: Spread) -> str:
    return _value(Spread(mean=100 * value.mean, deviation=_times(value.deviation, 100)), "+.2f")


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _value(value: Spread, form: str) -> str:
    spread = "" if value.deviation is None else f" ± {value.deviation:{form.removeprefix('+')}}"
    return f"{value.mean:{form}}{spread}"


def _score(value: float) -> str:
    return f"{value:.4f}"


def _names(texts: Mapping[str, Any]) -> str:
    return ", ".join(texts)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _setting(settings: Mapping[str, Any], environment: Mapping[str, Any], date: str) -> str:
    packages = environment["packages"]
    return (
        f"Base {Path(settings['base']).name}; {environment['device']}, {environment['world_size']} × "
        f"{environment['threads_per_rank']} threads on {environment['cores']} cores; {date}, llamapro "
        f"{environment['llamapro']}, torch {packages['torch']}, transformers {packages['transformers']}, deepspeed "
        f"{packages['deepspeed']}."
    )


def _failures(failed: Mapping[str, str]) -> list[str]:
    return [f"Failed and missing: {'; '.join(failed)}."] if failed else []
