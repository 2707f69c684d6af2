"""Worker processes: N spawned processes run the same functions a single one would, in any order."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import ParamSpec, TypeVar

from llamapro.errors import RetryLater

P = ParamSpec("P")
R = TypeVar("R")


class WorkerPool:
    """Runs functions in worker processes.

    Args:
        executor: that owns them.
    """

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def run_all(self, calls: Sequence[Callable[[], R]], done: Callable[[R], None]) -> None:
        """Run all calls; `done` gets each result in this process, in order of completion.

        Args:
            calls: picklable, e.g. `functools.partial` of a module's function.

        Raises:
            RetryLater: a worker process was killed.
        """
        waiting: list[Future[R]] = [self._executor.submit(call) for call in calls]
        try:
            for future in as_completed(waiting):
                done(future.result())
        except BrokenProcessPool as error:
            raise RetryLater(
                "a worker process was killed, perhaps for want of memory; what is finished is kept: run the same "
                "command again, with fewer --workers if memory was short"
            ) from error


@contextmanager
def worker_pool(workers: int) -> Iterator[WorkerPool]:
    """Start worker processes; on an error or Ctrl-C they finish what they are at and nothing more."""
    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        yield WorkerPool(executor)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def _start_worker() -> None:
    # The processes are the parallelism: each tokenizer library uses one thread, and is imported after this.
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent can't tell its workers; without this they would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
