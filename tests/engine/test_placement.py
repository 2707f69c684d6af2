"""Which rank runs where, as it is told at the start."""

import pytest

from llamapro.engine import placement
from llamapro.engine.placement import describe_placement
from llamapro.ranks import Ranks
from tests.support.pool import WorkerPool


def lines(ranks: Ranks, names: list[str], gpus: list[str]) -> list[str]:
    """As if the ranks ran on these hosts, with these GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "_physical_gpu", lambda device: gpus[ranks.rank])
        patch.setattr(placement, "_device_name", lambda device: "H100")
        return describe_placement(ranks, names[ranks.rank])


def test_every_host_has_a_line_with_its_ranks_and_gpus(pool: WorkerPool) -> None:
    for told in pool.run(lines, ["a", "b", "b", "b"], ["3", "0", "1", "2"], world_size=4):
        assert told == ["a: rank 0 on GPU 3, H100", "b: ranks 1-3 on GPU 0-2, H100"]


def test_gaps_are_shown(pool: WorkerPool) -> None:
    (told, _, _) = pool.run(lines, ["a", "b", "a"], ["0", "5", "4"], world_size=3)
    assert told == ["a: ranks 0, 2 on GPU 0, 4, H100", "b: rank 1 on GPU 5, H100"]


def test_without_gpus_threads_are_told(pool: WorkerPool) -> None:
    (told, _) = pool.run(plain)
    assert told == ["here: ranks 0, 1 on the CPU with 1 thread each"]


def plain(ranks: Ranks) -> list[str]:
    return describe_placement(ranks, "here")


def test_a_gpu_has_the_machines_number_not_the_process_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert placement._physical_gpu(torch.device("cuda", 1)) == "6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert placement._physical_gpu(torch.device("cuda", 1)) == "1"
