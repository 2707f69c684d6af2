"""A persistent pool of worker processes for distributed tests: one import of torch and deepspeed, many jobs.

Each job gets its own gloo process group over the first `world_size` workers and runs one top-level function on every
rank. An error on any rank comes back with its traceback; a hang ends the pool, and the next job starts a new one.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START_TIMEOUT_SECONDS = 180.0
COLLECTIVE_TIMEOUT_SECONDS = 60.0
AFTER_FAILURE_SECONDS = 10.0
LOG_TAIL_CHARACTERS = 2000


class WorkerError(AssertionError):
    """A job failed: the traceback of each rank that failed, and the end of its log."""


class WorkerPool:
    """Worker processes that outlive single tests. Use as a context manager, or call `close`."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="llamapro-pool-"))
        self._workers: list[_Worker] = []
        self._jobs = 0

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, function: Callable[..., Any], *arguments: Any, world_size: int = 2, timeout: float = 120.0
    ) -> list[Any]:
        """Run `function(ranks, *arguments)` on every rank of a fresh gloo group; the results in rank order.

        Args:
            function: a function defined at the top level of a module. Its arguments and result must pickle.
            world_size: number of ranks; workers that are missing are started.
            timeout: seconds until the job counts as hung.

        Raises:
            WorkerError: a rank raised, died or did not finish in time.
        """
        while len(self._workers) < world_size:
            self._workers.append(_Worker(self._folder / f"worker-{len(self._workers)}.log"))
        self._jobs += 1
        store = self._folder / f"store-{self._jobs}"
        workers = self._workers[:world_size]
        for rank, worker in enumerate(workers):
            worker.connection.send((function, arguments, rank, world_size, str(store)))
        answers = self._collect(workers, timeout)
        store.unlink(missing_ok=True)
        failures = [text for ok, text in answers if not ok]
        if failures:
            raise WorkerError("\n".join(failures))
        return [value for _, value in answers]

    def output(self) -> str:
        """What all workers have written to their standard streams."""
        return "".join(worker.log_text() for worker in self._workers)

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _collect(self, workers: Sequence["_Worker"], timeout: float) -> list[tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        fresh = [worker.take_fresh() for worker in workers]
        deadline = time.monotonic() + timeout + (START_TIMEOUT_SECONDS if any(fresh) else 0.0)
        pending = {worker.connection: rank for rank, worker in enumerate(workers)}
        broken = False
        while pending and not broken:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            broken = not ready
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    answers[rank] = (False, f"rank {rank} died{workers[rank].log_tail()}")
                    broken = True
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + AFTER_FAILURE_SECONDS)
        for rank in pending.values():
            answers[rank] = (False, f"rank {rank} did not finish in time{workers[rank].log_tail()}")
        if broken:
            self.close()
        return [answers[rank] for rank in range(len(workers))]


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, log: Path) -> None:
        self._log = log
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(log)), daemon=True)
        self._process.start()
        theirs.close()
        self._fresh = True

    def take_fresh(self) -> bool:
        """Whether this is the worker's first job, which also has to import torch and deepspeed."""
        fresh, self._fresh = self._fresh, False
        return fresh

    def log_tail(self) -> str:
        """The end of what this worker wrote to its standard streams."""
        text = self.log_text()
        return f"\n--- end of {self._log} ---\n{text[-LOG_TAIL_CHARACTERS:]}" if text else ""

    def log_text(self) -> str:
        """What this worker has written to its standard streams."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, log: str) -> None:
    """Serve jobs until the other end closes."""
    _redirect_output(log)
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    from llamapro.engine.environment import prepare_environment

    prepare_environment()
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, rank, world_size, store = connection.recv()
        except EOFError:
            return
        connection.send(_run_job(function, arguments, rank, world_size, store))


def _redirect_output(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _run_job(
    function: Callable[..., Any], arguments: Sequence[Any], rank: int, world_size: int, store: str
) -> tuple[bool, Any]:
    import torch
    import torch.distributed as dist

    from llamapro.ranks import Ranks

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.manual_seed(0)  # whatever jobs were before
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS),
        )
        return True, function(Ranks.current("cpu"), *arguments)
    except BaseException:
        return False, f"rank {rank}:\n{traceback.format_exc()}"
    finally:
        _end_job()


def _end_job() -> None:
    """Leave the process as a new one would be, but for its imports."""
    import gc

    import torch

    from llamapro.engine.start import stop_ranks

    gc.collect()
    stop_ranks()
    _reset_deepspeed_counters()
    torch.set_grad_enabled(True)


def _reset_deepspeed_counters() -> None:
    """DeepSpeed numbers modules and parameters per process; ranks with other jobs behind them would disagree."""
    from deepspeed.runtime.zero.parameter_offload import (  # type: ignore[import-untyped]
        FWD_MODULE_STACK,
        DeepSpeedZeRoOffload,
    )
    from deepspeed.runtime.zero.partition_parameters import Init  # type: ignore[import-untyped]

    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    FWD_MODULE_STACK.clear()
    Init.param_id = 0
