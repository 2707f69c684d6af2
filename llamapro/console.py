"""The one place that writes to the terminal: rank-aware, one line per fact in logs, live bars only on a terminal.

Results go to standard output, everything else to standard error, so that output can be piped. Only rank 0 speaks,
except through `report_error`.
"""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from llamapro.errors import (
    EXIT_CHECK_FAILED,
    EXIT_RETRY,
    CheckFailed,
    Corrupted,
    LlamaproError,
    PeerLost,
    RetryLater,
    UserError,
)

LOG_INTERVAL_SECONDS = 30.0
FILE_COLUMNS = 120
# What the machine refuses, whatever the program does: the disk is full, may not be written, or fails.
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def process_rank() -> int:
    """The rank of this process as its launcher states it; 0 outside a launcher."""
    for variable in RANK_VARIABLES:
        if value := os.environ.get(variable):
            return int(value)
    return 0


def info(message: str) -> None:
    """Say one fact to the person watching (standard error, rank 0 only)."""
    if process_rank() == 0:
        _tell(message)


def warning(message: str) -> None:
    """Say something the user should act on (standard error, rank 0 only)."""
    if process_rank() == 0:
        _tell(f"warning: {message}", "yellow")


def _tell(text: str, style: str | None = None) -> None:
    """One line to standard error. A log on a full disk loses lines; that must not end what they tell of."""
    try:
        _stderr().print(text, markup=False, highlight=False, soft_wrap=True, style=style)
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise


def result(text: str) -> None:
    """Print a command's result (standard output, rank 0 only)."""
    if process_rank() == 0:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a result table (standard output, rank 0 only). Cells are shown with `str`; numbers align right."""
    if process_rank() != 0:
        return
    grid = Table(show_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
        grid.add_column(column, justify="right" if numeric else "left", no_wrap=index == 0)
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    # Wider than the usual 80 columns where nothing wraps: in files and pipes.
    out = Console() if sys.stdout.isatty() else Console(width=FILE_COLUMNS)
    out.print(title, markup=False, highlight=False, soft_wrap=True, style="bold")
    out.print(grid)


@contextmanager
def progress(
    description: str, total: int, unit: str = "items", detail: Callable[[], str] = str
) -> Iterator[Callable[[int], None]]:
    """Show the progress of one job; yields `advance(amount)`.

    A live bar with ETA on a terminal; elsewhere one line every 30 s and one at the end, so logs stay readable. Bytes
    come with their speed.

    Args:
        total: the amount at which the job is done, in `unit`.
        unit: "bytes" shows sizes and bytes/s; anything else is printed after the counts.
        detail: what else to show, asked at each advance.
    """
    if process_rank() != 0:
        yield lambda amount: None
    elif _stderr().is_terminal:
        with _live_bar(unit) as bar:
            task = bar.add_task(description, total=total, detail=detail())
            yield lambda amount: bar.update(task, advance=amount, detail=detail())
    else:
        with _logged_progress(description, total, unit, detail) as advance:
            yield advance


def report_error(error: LlamaproError) -> None:
    """Print a user-facing error on standard error: once per job for what all ranks share, else naming the rank."""
    rank = process_rank()
    if rank == 0:
        _tell(f"error: {error}", "red")
    elif not _shared_by_all_ranks(error):
        _tell(f"error on rank {rank}: {error}", "red")


def guarded(work: Callable[[], int], *, debug: bool) -> int:
    """Run `work`; a typed error becomes one message on standard error and the exit code that it stands for.

    Args:
        debug: let the error through with its traceback instead.
    """
    try:
        return work()
    except LlamaproError as error:
        if debug:
            raise
        report_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        warning("interrupted; nothing half-written was kept, the same command starts again or continues")
        return EXIT_RETRY
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if debug or error.errno not in MACHINE_ERRORS:
            raise
        report_error(CheckFailed(_of_the_machine(error)))
        return EXIT_CHECK_FAILED


def _of_the_machine(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror}; nothing half-written counts: put that right and run the same command again"


def _stderr() -> Console:
    return Console(stderr=True)


def _shared_by_all_ranks(error: LlamaproError) -> bool:
    """Usage and configuration errors, agreed stops and guards are raised alike everywhere; the rest may be local."""
    return isinstance(error, UserError | CheckFailed | RetryLater) and not isinstance(error, Corrupted | PeerLost)


def _is_number(cell: object) -> bool:
    text = str(cell).strip().rstrip("%").replace(",", "")
    try:
        float(text)
    except ValueError:
        return text in {"", "-", "–"}
    return True


def _live_bar(unit: str) -> Progress:
    amount: list[ProgressColumn] = [MofNCompleteColumn()]
    if unit == "bytes":
        amount = [DownloadColumn(), TransferSpeedColumn()]
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TextColumn("ETA"), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[detail]}"), console=_stderr())


@contextmanager
def _logged_progress(
    description: str, total: int, unit: str, detail: Callable[[], str]
) -> Iterator[Callable[[int], None]]:
    start = last = time.monotonic()
    done = 0

    def advance(amount: int) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= LOG_INTERVAL_SECONDS and done:
            last = now
            left = (now - start) / done * (total - done)
            speed = _speed(done, now - start, unit)
            info(f"{description}: {done:,} of {total:,} {unit}{speed}, {left:.0f} s left{_after_comma(detail())}")

    yield advance
    seconds = time.monotonic() - start
    info(f"{description}: {done:,} {unit} in {seconds:.1f} s{_speed(done, seconds, unit)}{_after_comma(detail())}")


def _speed(done: int, seconds: float, unit: str) -> str:
    return f", {done / seconds / 1e6:,.0f} MB/s" if unit == "bytes" and seconds > 0 else ""


def _after_comma(detail: str) -> str:
    return detail and f", {detail}"
