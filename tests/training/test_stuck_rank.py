"""A rank that stands still: the others notice in time, write down where everybody was, and name it."""

import signal
from pathlib import Path
from typing import Any

import pytest

from llamapro.errors import EXIT_RETRY
from tests.support.faulty_front import Fault
from tests.support.jobs import finished, job
from tests.support.pool import WorkerPool
from tests.support.training import losses, prepare, run_training, settings, state_digest

STEP_TIMEOUT_SECONDS = 15.0  # far beyond a step, on a busy machine too
SLACK_SECONDS = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("stuck"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, pool: WorkerPool) -> list[dict[str, Any]]:
    metrics: list[dict[str, Any]] = pool.run(run_training, run_settings(folder, "undisturbed"))[0]
    return metrics


def run_settings(folder: Path, run: str, stage: int = 1) -> dict[str, Any]:
    engine = {"precision": "float32", "zero_stage": stage, "step_timeout_minutes": STEP_TIMEOUT_SECONDS / 60}
    return settings(folder, run, engine=engine, checkpoint={"every_steps": 2}, validation={"every_steps": 100})


@pytest.mark.parametrize("where", ["backward", pytest.param("save", marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_with_its_last_stack_and_the_next_start_continues_exactly(
    folder: Path, undisturbed: list[dict[str, Any]], where: str
) -> None:
    values = run_settings(folder, f"stopped-{where}")
    with job(values, Fault(1, 5, where, "stop")) as stuck:
        stuck.wait_for("step 4/8")
        assert stuck.ranks[0].wait(STEP_TIMEOUT_SECONDS + SLACK_SECONDS) == EXIT_RETRY
        assert stuck.ranks[1].poll() is None, "it stands still and can't end by itself"
        said = stuck.said(0)
        assert "rank 0: no progress for 15 s (engine.step_timeout_minutes); ending with 75" in said
        named = f"rank 0: rank 1 (process {stuck.ranks[1].pid} on "
        assert named in said and "has given no sign of life for" in said, said
        assert "most recent call first" in said, "the stacks of the rank that waited"
        log = stuck.run.rank_log(0).read_text()
        assert "last stack of rank 1, innermost call last:" in log and "llamapro/training/loop.py" in log
        # Let go, it finds the others gone and ends by itself, as it ought to.
        stuck.signal(1, signal.SIGCONT)
        assert stuck.ranks[1].wait(STEP_TIMEOUT_SECONDS + SLACK_SECONDS) == EXIT_RETRY
    metrics = finished(values)
    assert losses(metrics) == losses(undisturbed)
    assert state_digest(stuck.run.path) == state_digest(folder / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_that_lives_and_does_not_come_is_told_apart_from_those_that_wait(folder: Path, stage: int) -> None:
    values = run_settings(folder, f"late{stage}", stage)
    with job(values, Fault(1, 5, "forward", "sleep")) as stuck:
        assert stuck.codes() == [EXIT_RETRY, EXIT_RETRY]
        assert "rank 1 (process " in stuck.said(0), stuck.said(0)
        assert "in sleep" in stuck.said(1), "its own stack"
        both = stuck.said(0) + stuck.said(1)
        assert "keeps the others waiting" in both or "ended: no progress for 15 s" in both
