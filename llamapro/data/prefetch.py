"""Work done ahead by one background thread, in order; the time spent waiting for it is measured."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")
DEFAULT_DEPTH = 2


class Prefetcher(Generic[T]):
    """Iterates over the results of `work` while one thread computes the next ones; a context manager.

    An error in the work is raised where its result would have come.

    Args:
        work: functions, called in order in the thread.
        depth: results computed ahead at most.
    """

    def __init__(self, work: Iterator[Callable[[], T]], depth: int = DEFAULT_DEPTH) -> None:
        self._work = work
        self._depth = depth
        self._pending: deque[Future[T]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._wait_seconds = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        self._fill()
        if not self._pending:
            raise StopIteration
        start = time.perf_counter()
        result = self._pending.popleft().result()
        self._wait_seconds += time.perf_counter() - start
        self._fill()
        return result

    def take_wait_seconds(self) -> float:
        """Seconds that the consumer waited for results since this was last asked."""
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        return seconds

    def _fill(self) -> None:
        while len(self._pending) < self._depth:
            task = next(self._work, None)
            if task is None:
                return
            self._pending.append(self._thread.submit(task))
