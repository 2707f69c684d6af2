"""What will be measured, and everything that can be refused before a model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from llamapro.errors import UserError
from llamapro.evaluation.benchmarks.programs import RUNS_PROGRAMS
from llamapro.evaluation.benchmarks.suite import Benchmark
from llamapro.evaluation.benchmarks.tasks import Tasks
from llamapro.evaluation.sandbox.probes import require_sandbox


@dataclass(frozen=True)
class Line:
    """A benchmark and the single tasks it consists of."""

    benchmark: Benchmark
    leaves: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What will be measured; `absent` are benchmarks of the suite that the archive does not have."""

    tasks: Tasks
    lines: tuple[Line, ...]
    absent: tuple[str, ...]


def plan_benchmarks(
    tasks: Tasks, suite: Sequence[Benchmark], named: Sequence[Benchmark], *, run_programs: bool
) -> Plan:
    """Look every benchmark up.

    Args:
        tasks: those there are.
        suite: benchmarks that may be absent from the archive.
        named: benchmarks that may not.
        run_programs: whether programs that the model writes may be run.

    Raises:
        UserError: a task is unknown, has no items in the archive, or runs programs without being allowed to.
        SandboxRefused: programs are to be run, and there is no boundary.
    """
    lines = [Line(benchmark, tuple(tasks.leaves(benchmark.name))) for benchmark in (*suite, *named)]
    for line in lines:
        for leaf in line.leaves:
            tasks.require_no_open_door(leaf)
    absent = [line.benchmark for line in lines if not _has_items(tasks, line)]
    if refused := [benchmark.name for benchmark in absent if benchmark in named]:
        raise UserError(f"--tasks {refused[0]!r}: the archive has no items of it; leave --task-data out to use the hub")
    lines = [line for line in lines if line.benchmark not in absent]
    _require_programs_allowed(lines, run_programs)
    return Plan(tasks, tuple(lines), tuple(benchmark.name for benchmark in absent))


def _has_items(tasks: Tasks, line: Line) -> bool:
    return tasks.archive is None or all(tasks.offline(leaf) for leaf in line.leaves)


def _require_programs_allowed(lines: Sequence[Line], allowed: bool) -> None:
    programs = [line.benchmark.name for line in lines if set(line.leaves) & set(RUNS_PROGRAMS)]
    if programs and not allowed:
        raise UserError(f"{', '.join(programs)}: programs that the model writes are run; allow it with --run-programs")
    if programs:
        require_sandbox()
