"""Tensors that are read, converted and written chunk by chunk: small stages, and many tensors at a time.

Memory is a few chunks for each thread, whatever the size of a tensor. Threads are enough for all cores: reading,
writing, SHA-256 and the sums of the fold all run without the interpreter's lock.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event, Lock
from typing import TypeVar

from llamapro.files.tensors import RunningDigest, TensorFolder

Advance = Callable[[int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")
# More than this no disk can keep busy.
MOST_THREADS = 8


def in_parallel(work: Callable[[Item, Advance], Result], items: Iterable[Item], advance: Advance) -> list[Result]:
    """Do `work` on every item, on all cores; the results are in the order of the items.

    The first error ends everything and is raised as it is, and so is Ctrl-C: whoever is still at work stops when it
    next reports progress.

    Args:
        work: gets an item, and what to report its progress to, often.
    """
    stopped, lock = Event(), Lock()

    def report(amount: int) -> None:
        if stopped.is_set():
            raise _Stopped
        with lock:
            advance(amount)

    # One more than there are cores, because one or another waits for the disk.
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)) + 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="tensors") as pool:
        futures = [pool.submit(work, item, report) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stopped.set()
            raise
    return [future.result() for future in futures]


def observed(chunks: Iterable[bytes], digest: RunningDigest) -> Iterator[bytes]:
    """Pass chunks on, adding each to a digest."""
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def counted(chunks: Iterable[bytes], advance: Advance, times: int = 1) -> Iterator[bytes]:
    """Pass chunks on, reporting each one's bytes, `times` over, once it was used."""
    for chunk in chunks:
        yield chunk
        advance(len(chunk) * times)


def sha256_of(tensors: TensorFolder, name: str, advance: Advance) -> str:
    """SHA-256 of one tensor's bytes."""
    digest = hashlib.sha256()
    for chunk in counted(tensors.chunks(name), advance):
        digest.update(chunk)
    return digest.hexdigest()


class _Stopped(Exception):
    """Ends work whose result nobody wants any more."""
