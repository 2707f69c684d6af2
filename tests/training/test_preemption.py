"""Stop signals to whole jobs: all ranks save the same step, end with 75, and the next start continues exactly."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from llamapro.errors import EXIT_RETRY
from tests.support.faulty_front import Fault
from tests.support.jobs import Job, finished, job
from tests.support.pool import WorkerPool
from tests.support.training import losses, prepare, run_training, settings, state_digest

ASLEEP_IN_STEP_4 = Fault(0, 4, "forward", "sleep")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("preempted"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, pool: WorkerPool) -> list[dict[str, Any]]:
    metrics: list[dict[str, Any]] = pool.run(run_training, run_settings(folder, "undisturbed"))[0]
    return metrics


def run_settings(folder: Path, run: str, every_steps: int = 100) -> dict[str, Any]:
    engine = {"precision": "float32", "zero_stage": 2}
    checkpoint = {"every_steps": every_steps, "keep": 9}
    return settings(folder, run, engine=engine, checkpoint=checkpoint, validation={"every_steps": 100})


def one_rank_twice(stopped: Job) -> None:
    """As launchers do for one key press."""
    for _ in range(2):
        stopped.signal(1, signal.SIGTERM)
        time.sleep(0.02)


def every_rank(stopped: Job) -> None:
    for rank in range(2):
        stopped.signal(rank, signal.SIGUSR1)


def until_the_end(stopped: Job) -> None:
    """Some hosts hear it late, when the ranks of others have saved or ended already."""
    stopped.signal(0, signal.SIGUSR1)
    stopped.wait_for("stopped after step")
    while stopped.ranks[1].poll() is None:
        stopped.signal(1, signal.SIGUSR1)
        time.sleep(0.005)


@pytest.mark.parametrize("send", [one_rank_twice, until_the_end, pytest.param(every_rank, marks=pytest.mark.slow)])
@pytest.mark.parametrize("saving", [pytest.param(False, marks=pytest.mark.slow), True])
def test_all_ranks_save_one_step_and_the_next_start_continues_exactly(
    folder: Path, undisturbed: list[dict[str, Any]], send: Any, saving: bool
) -> None:
    """With `saving` a save of an earlier step is being written when the signal comes."""
    values = run_settings(folder, f"{send.__name__}-{saving}", every_steps=2 if saving else 100)
    with job(values, Fault(step_seconds=0.4, save_seconds=1.0 if saving else 0.0)) as stopped:
        stopped.wait_for("step 2/8")
        send(stopped)
        assert stopped.codes() == [EXIT_RETRY] * 2, f"{stopped.said(0)}\n{stopped.said(1)}"
        assert "SIG" in stopped.said(0) and "the same command continues from there" in stopped.said(0)
        assert "Traceback" not in stopped.said(0) + stopped.said(1)
        saved = sorted(path.name for path in stopped.run.checkpoints.iterdir())
    check_continues(folder, values, undisturbed)
    assert saved and all(name.startswith("step-0000000") for name in saved), "whole ones only"


@pytest.mark.slow
def test_a_second_signal_while_it_saves_ends_it_at_once_and_harms_nothing(
    folder: Path, undisturbed: list[dict[str, Any]]
) -> None:
    values = run_settings(folder, "again", every_steps=2)
    with job(values, Fault(step_seconds=0.2, save_seconds=9.0)) as stopped:
        stopped.wait_for("saved ")
        stopped.signal(0, signal.SIGTERM)
        time.sleep(6)
        stopped.signal(0, signal.SIGTERM)
        assert stopped.codes() == [EXIT_RETRY] * 2
        assert "SIGTERM for the second time; ending with 75" in stopped.said(0)
        assert "rank 0 (process " in stopped.said(1), "named by the other one"
    check_continues(folder, values, undisturbed)


def test_a_dead_jobs_lease_is_taken_over_and_a_living_ones_is_not(
    folder: Path, undisturbed: list[dict[str, Any]]
) -> None:
    values = run_settings(folder, "owned", every_steps=2)
    with job(values, ASLEEP_IN_STEP_4) as first:
        first.wait_for("step 3/8")
        with job(values, world_size=1) as second:
            assert second.codes() == [EXIT_RETRY]
            assert f"is in use by process {first.ranks[0].pid} on {os.uname().nodename}" in second.said(0)
        assert first.ranks[0].poll() is None
        for rank in range(2):
            first.signal(rank, signal.SIGKILL)
        assert first.codes() == [-9, -9]
    check_continues(folder, values, undisturbed)


def check_continues(folder: Path, values: dict[str, Any], undisturbed: list[dict[str, Any]]) -> None:
    metrics = finished(values)
    assert losses(metrics) == losses(undisturbed)
    assert state_digest(Path(values["run"]["folder"])) == state_digest(folder / "undisturbed")
