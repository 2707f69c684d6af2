"""Starting a job: one process group with the right timeouts, and nothing compiled."""

import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llamapro.config.engine import EngineConfig
from llamapro.engine.ports import free_port
from llamapro.errors import RetryLater, UserError
from llamapro.ranks import Ranks
from tests.support.engine import Setup, start_engine, train_step
from tests.support.models import save_tiny_llama
from tests.support.pool import WorkerPool


def timeouts() -> list[timedelta]:
    """The timeout of every process group of this process."""
    groups: Any = dist.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def start_over(ranks: Ranks, port: int, extensions: str) -> dict[str, Any]:
    """Start a job from environment variables, in a process whose extensions folder holds a stale lock."""
    from deepspeed.ops.op_builder.builder import OpBuilder  # type: ignore[import-untyped]

    from llamapro.engine.start import start_ranks, stop_ranks

    stop_ranks()
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(port))
        patch.setenv("LOCAL_WORLD_SIZE", str(ranks.world_size))
        patch.setenv("TORCH_EXTENSIONS_DIR", extensions)
        patch.setattr(OpBuilder, "load", lambda *_: pytest.fail("DeepSpeed compiles an op"))
        patch.setattr("llamapro.console.info", told.append)
        started = start_ranks(EngineConfig(startup_timeout_minutes=3.0), local_rank=ranks.rank)
        total = started.sum_integers([started.rank + 1])
        found: dict[str, Any] = {
            "ranks": (started.rank, started.world_size, str(started.device)),
            "total": total,
            "told": told,
        }
        found["timeouts"] = timeouts()
        stop_ranks()
    return {**found, "group": dist.is_initialized()}


def test_ranks_meet_without_compiling_anything(pool: WorkerPool, tmp_path: Path) -> None:
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    results = pool.run(start_over, free_port(), str(tmp_path))
    assert [result["ranks"] for result in results] == [(0, 2, "cpu"), (1, 2, "cpu")]
    for result in results:
        assert result["total"] == [3] and not result["group"]
        assert set(result["timeouts"]) == {timedelta(minutes=3)}
        line, place = result["told"]
        assert "2 ranks on this machine, CPU with 1 thread each, gloo" in line
        assert place == f"{socket.gethostname()}: ranks 0, 1 on the CPU with 1 thread each"
    assert [path.name for path in lock.parent.iterdir()] == ["lock"]


def start_alone(ranks: Ranks, port: int) -> str:
    """Start as one rank of two whose peer never comes."""
    from llamapro.engine.start import start_ranks, stop_ranks

    stop_ranks()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}.items():
            patch.setenv(name, str(value))
        with pytest.raises(RetryLater) as caught:
            start_ranks(EngineConfig(startup_timeout_minutes=0.02))
    return str(caught.value)


def test_a_peer_that_never_comes_is_worth_a_retry(pool: WorkerPool) -> None:
    (message,) = pool.run(start_alone, free_port(), world_size=1)
    assert message.startswith("not all of 2 ranks came to tcp://127.0.0.1:")


def start_without_address(ranks: Ranks) -> str:
    from llamapro.engine.start import start_ranks, stop_ranks

    stop_ranks()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MASTER_ADDR", raising=False)
        patch.setenv("WORLD_SIZE", "4")
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        with pytest.raises(UserError) as caught:
            start_ranks(EngineConfig())
    return str(caught.value)


def test_several_machines_without_a_meeting_point_are_refused(pool: WorkerPool) -> None:
    (message,) = pool.run(start_without_address, world_size=1)
    assert message.startswith("MASTER_ADDR is not set")


def compiled_ops(ranks: Ranks) -> list[str]:
    """What DeepSpeed would compile when left alone."""
    import deepspeed  # type: ignore[import-untyped]
    from deepspeed.ops.op_builder.builder import OpBuilder

    from llamapro.engine.start import stop_ranks

    stop_ranks()
    wanted: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(deepspeed.ops, "__compatible_ops__", raising=False)
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "0")
        patch.setattr(OpBuilder, "load", lambda builder, *_: wanted.append(builder.name))
        deepspeed.init_distributed(dist_backend="gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    return wanted


def test_left_alone_deepspeed_compiles(pool: WorkerPool) -> None:
    """Why the op is switched off; when this fails, DeepSpeed has changed."""
    assert pool.run(compiled_ops, world_size=1) == [["deepspeed_shm_comm"]]


def timeouts_of_a_run(ranks: Ranks, setup: Setup) -> list[list[timedelta]]:
    engine, _ = start_engine(ranks, setup)
    found = [timeouts()]
    train_step(engine, ranks, setup, 0)
    return [*found, timeouts()]


def test_every_group_waits_for_start_up_first_and_for_a_step_later(pool: WorkerPool, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, blocks=6)
    for before, after in pool.run(timeouts_of_a_run, Setup(str(folder), 2)):
        assert len(before) >= 2, "DeepSpeed's own group is missing"
        assert set(before) == {timedelta(minutes=1)}
        assert set(after) == {timedelta(minutes=12)}


def linear_function(ranks: Ranks, setup: Setup) -> tuple[bool, bool]:
    from llamapro.engine.start import stop_ranks

    original = torch.nn.functional.linear
    start_engine(ranks, setup)
    replaced = torch.nn.functional.linear is not original
    stop_ranks()
    return replaced, torch.nn.functional.linear is original


def test_stopping_takes_back_what_stage_3_replaced(pool: WorkerPool, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, blocks=6)
    assert pool.run(linear_function, Setup(str(folder), 3), world_size=1) == [(True, True)]


def output_of_a_run(ranks: Ranks, setup: Setup) -> None:
    engine, _ = start_engine(ranks, setup)
    train_step(engine, ranks, setup, 0)
    engine.close()


def test_deepspeed_says_nothing(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, blocks=6, dtype=torch.bfloat16)
    with WorkerPool() as own:
        for stage in (1, 2, 3):
            own.run(output_of_a_run, Setup(str(folder), stage, "bf16"), world_size=1)
            assert own.output() == ""
