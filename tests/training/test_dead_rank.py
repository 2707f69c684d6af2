"""One rank dies, by whatever cause and wherever: the job ends soon, says which and why, and continues exactly."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llamapro.errors import EXIT_CHECK_FAILED, EXIT_RETRY
from tests.support.faulty_front import Fault
from tests.support.jobs import finished, job, processes_of
from tests.support.pool import WorkerPool
from tests.support.training import losses, prepare, run_training, settings, state_digest

END_SECONDS = 30
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
DEAD_BY = {
    "kill": (-9, "is gone without a word: killed"),
    "abort": (-6, "is gone without a word: killed"),
    "exception": (EXIT_CHECK_FAILED, "ended: ValueError: this was planted"),
    "memory": (EXIT_CHECK_FAILED, "ended: RuntimeError: "),
    "killed for memory": (-9, "is gone without a word: killed, by the system if memory ran out"),
}
PLACES = ("forward", "backward", "step", "save")
QUICK = {("kill", "backward"), ("exception", "step")}
CASES = [
    pytest.param(how, where, marks=() if (how, where) in QUICK else pytest.mark.slow)
    for how in DEAD_BY
    for where in PLACES
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("dead"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, pool: WorkerPool) -> list[dict[str, Any]]:
    metrics: list[dict[str, Any]] = pool.run(run_training, run_settings(folder, "undisturbed"))[0]
    return metrics


def run_settings(folder: Path, run: str) -> dict[str, Any]:
    """Eight steps at stage 3, a checkpoint every second."""
    engine = {"precision": "float32", "zero_stage": 3}
    return settings(folder, run, engine=engine, checkpoint={"every_steps": 2}, validation={"every_steps": 100})


@contextmanager
def small_memory_group(bytes_left: int = 1 << 28) -> Iterator[str]:
    """A control group in which a process may have hardly more memory than it brings along."""
    group = MEMORY_GROUPS / f"llamapro-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(bytes_left))
        yield str(group)
    finally:
        group.rmdir()


@pytest.mark.parametrize(("how", "where"), CASES)
def test_a_dead_rank_ends_the_job_and_is_named_and_the_next_start_continues_exactly(
    folder: Path, undisturbed: list[dict[str, Any]], how: str, where: str
) -> None:
    if how == "killed for memory":
        with small_memory_group() as group:
            check(folder, undisturbed, Fault(1, 5, where, how, cgroup=group))
    else:
        check(folder, undisturbed, Fault(1, 5, where, how))


def check(folder: Path, undisturbed: list[dict[str, Any]], fault: Fault) -> None:
    values = run_settings(folder, f"{fault.how}-{fault.where}".replace(" ", "-"))
    code, cause = DEAD_BY[fault.how]
    with job(values, fault) as died:
        begun = died.first_end()
        assert died.codes(END_SECONDS) == [EXIT_RETRY, code], f"{died.said(0)}\n{died.said(1)}"
        assert time.monotonic() - begun < END_SECONDS
        assert not processes_of(f"{values['run']['folder']}-job")
        said = died.said(0)
        assert "error: a peer was lost: rank 1 (process " in said and cause in said, said
        assert "the same command continues from the last checkpoint" in said and "Traceback" not in said
        log = died.run.rank_log(0).read_text()
        assert "last stack of rank 1" in log and "Thread" in log
        if fault.how in ("exception", "memory"):
            assert "faulty_front.py" in died.run.rank_log(1).read_text()
    metrics = finished(values)
    assert losses(metrics) == losses(undisturbed)
    assert state_digest(died.run.path) == state_digest(folder / "undisturbed")


def test_the_first_rank_that_dies_is_named_by_the_other_one(folder: Path) -> None:
    """Rank 0 is the one that usually speaks, and it holds the run's lock."""
    values = run_settings(folder, "first")
    with job(values, Fault(0, 3, "backward", "kill")) as died:
        assert died.codes() == [-9, EXIT_RETRY], died.said(1)
        assert "error on rank 1: a peer was lost: rank 0 (process " in died.said(1)
    with job(values) as again:
        again.wait_for("step 3/8")
