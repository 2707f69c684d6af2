"""The worker pool: groups of any size one after another, errors with tracebacks, hangs that end."""

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from llamapro.ranks import Ranks
from tests.support.pool import WorkerError, WorkerPool


def total_of_ranks(ranks: Ranks, extra: int) -> tuple[int, int, int]:
    total = torch.tensor([ranks.rank + extra])
    dist.all_reduce(total)
    return int(total.item()), ranks.world_size, os.getpid()


def fail_on_rank_one(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ValueError("the reason")


def hang_on_rank_one(ranks: Ranks) -> None:
    if ranks.rank == 1:
        time.sleep(600)


def die_on_rank_one(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def threads(ranks: Ranks) -> int:
    return torch.get_num_threads()


def test_one_set_of_processes_serves_worlds_of_one_two_and_three(pool: WorkerPool) -> None:
    answers = {size: pool.run(total_of_ranks, 10, world_size=size) for size in (2, 3, 1, 2)}
    for size, results in answers.items():
        assert [(total, world) for total, world, _ in results] == [(10 * size + sum(range(size)), size)] * size
    assert len({pid for results in answers.values() for _, _, pid in results}) == 3


def test_each_worker_computes_on_one_thread(pool: WorkerPool) -> None:
    assert pool.run(threads) == [1, 1]


def test_an_error_comes_back_with_its_traceback_and_the_pool_goes_on(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match=r"(?s)rank 1:.*fail_on_rank_one.*ValueError: the reason"):
        pool.run(fail_on_rank_one)
    assert len(pool.run(total_of_ranks, 0)) == 2


@pytest.mark.parametrize("function", [hang_on_rank_one, die_on_rank_one])
def test_a_lost_worker_ends_the_pool_and_the_next_job_starts_a_new_one(function: Callable[[Ranks], None]) -> None:
    with WorkerPool() as own:
        assert own.run(threads) == [1, 1]
        with pytest.raises(WorkerError, match="rank 1"):
            own.run(function, timeout=1.0)
        assert own.run(threads, world_size=1) == [1]
