"""Saves of real runs on two ranks: written while training goes on, of the step they claim, and what a failure costs."""

import errno
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from llamapro.checkpoint import background
from llamapro.checkpoint.rank_file import write_rank_file
from llamapro.checkpoint.save import save_checkpoint
from llamapro.checkpoint.snapshot import SnapshotMemory
from llamapro.errors import CheckFailed
from llamapro.files.manifest import FileEntry
from llamapro.ranks import Ranks
from llamapro.training.guards import SpikeGuard
from llamapro.training.loop import train
from llamapro.training.metrics import read_metrics
from llamapro.training.progress import Progress, StepOutcome, StepWork
from llamapro.training.saving import Saver
from llamapro.training.session import Session
from llamapro.training.step import run_step
from tests.support.disks import leave_mount_namespace, require_mounts, small_disk
from tests.support.pool import WorkerError, WorkerPool
from tests.support.training import losses, open_run, prepare, run_training, settings, state_digest

SECONDS = 30
RANDOM_KILLS = 50
PROOF = "39 of 39 base tensors equal the record; max |Δlogit| at start 0"
NO_SPACE = r"rank 1: \[Errno 28\] No space left on device"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("saving"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, pool: WorkerPool) -> list[dict[str, Any]]:
    """Eight steps on two ranks, a checkpoint at 4 and at 8."""
    metrics: list[dict[str, Any]] = pool.run(run_training, run_settings(folder, "undisturbed"))[0]
    return metrics


def run_settings(folder: Path, run: str, **checkpoint: Any) -> dict[str, Any]:
    return settings(
        folder,
        run,
        engine={"precision": "float32", "zero_stage": 2},
        checkpoint={"every_steps": 4, "keep": 10, **checkpoint},
        validation={"every_steps": 100},
    )


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("*step-*"))


def events(metrics: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [line for line in metrics if line.get("event") == name]


def test_a_slow_writer_stops_no_step_and_saves_the_step_it_began_with(
    folder: Path, pool: WorkerPool, undisturbed: list[dict[str, Any]]
) -> None:
    values = run_settings(folder, "slow")
    for metrics, seen in pool.run(_train_with_slow_writer, values, str(folder / "at-once")):
        assert seen == {5: [], 6: [], 7: []}, "training went on for three steps before anything was saved"
        assert losses(metrics) == losses(undisturbed)
    saved, at_once = (folder / run / "checkpoints" / "step-00000004" for run in ("slow", "at-once"))
    for name in ("rank-00000.safetensors", "rank-00001.safetensors", "index.json"):
        assert (saved / name).read_bytes() == (at_once / name).read_bytes()
    assert (saved / "state.json").read_bytes() == _of(folder / "undisturbed", 4, "state.json")
    assert _of(folder / "slow", 8, "rank-00000.safetensors") != (saved / "rank-00000.safetensors").read_bytes()
    assert state_digest(folder / "slow") == state_digest(folder / "undisturbed")
    assert re.search(r"saves are written in the background from \d.* GiB of host memory per rank", pool.output())
    assert re.search(r"saved \S+step-00000004 in \d+\.\d s; training stood still for \d+\.\d\d s of it", pool.output())


def test_every_save_says_the_proof_in_one_line(
    folder: Path, pool: WorkerPool, undisturbed: list[dict[str, Any]]
) -> None:
    """What the run began with is said after a resume, too, when it can't be measured any more."""
    first, *later = [event["text"] for event in events(undisturbed, "proof")]
    assert first == PROOF.partition(";")[0] and later == [PROOF, PROOF]
    values = run_settings(folder, "proved")
    with pytest.raises(WorkerError, match="RetryLater"):
        pool.run(run_training, values, 5)
    metrics = pool.run(run_training, values)[0]
    resumed = metrics.index(events(metrics, "resume")[0])
    assert [event["text"] for event in events(metrics[resumed:], "proof")] == [PROOF, PROOF]
    assert PROOF in pool.output()


def test_a_disk_of_one_rank_alone_that_is_really_full(
    folder: Path, pool: WorkerPool, undisturbed: list[dict[str, Any]]
) -> None:
    """Rank 1 sees another, tiny disk where rank 0 sees the staging folder; training goes on until there is room."""
    require_mounts()
    metrics = pool.run(_train_with_own_disk, run_settings(folder, "own-disk", every_steps=2), 2)[0]
    failed = events(metrics, "save failed")
    assert [event["step"] for event in failed] == [2] and re.search(NO_SPACE, failed[0]["reason"])
    assert steps_saved(folder / "own-disk") == [4, 6, 8], "nothing of the failed save is left"
    assert losses(metrics) == losses(undisturbed)
    assert state_digest(folder / "own-disk") == state_digest(folder / "undisturbed")


def test_clocks_that_jump_change_nothing(folder: Path, pool: WorkerPool, undisturbed: list[dict[str, Any]]) -> None:
    """The time of day goes back and forth by years, differently on each rank, while saves are due by the minute."""
    values = run_settings(folder, "jumping", every_minutes=1000.0, every_steps=2)
    for metrics in pool.run(_train_with_jumping_clock, values):
        assert losses(metrics) == losses(undisturbed)
    assert steps_saved(folder / "jumping") == [2, 4, 6, 8]
    assert state_digest(folder / "jumping") == state_digest(folder / "undisturbed")


def test_the_plan_says_how_much_host_memory_all_ranks_take(folder: Path, pool: WorkerPool) -> None:
    both = pool.run(_planned_and_taken_bytes, run_settings(folder, "planned"))
    assert sum(planned for planned, _ in both) == sum(taken for _, taken in both) > 0


def test_a_due_save_waits_for_the_one_that_is_written(folder: Path, pool: WorkerPool) -> None:
    """With a save at every step and a slow disk there is never more than one, and none is left out."""
    most = pool.run(_train_with_counted_writers, run_settings(folder, "every", every_steps=1))
    assert most == [1, 1]
    assert steps_saved(folder / "every") == [1, 2, 3, 4, 5, 6, 7, 8]


def test_failed_saves_of_one_rank_are_counted_and_training_goes_on(
    folder: Path, pool: WorkerPool, undisturbed: list[dict[str, Any]]
) -> None:
    """A success in between begins the count anew; the last step's save is tried again at once."""
    values = run_settings(folder, "failing", every_steps=1)
    metrics = pool.run(_train_on_full_disk, values, [1, 2, 4, 5, 8])[0]
    assert [(line["step"], line["in_a_row"]) for line in events(metrics, "save failed")] == [
        (1, 1),
        (2, 2),
        (4, 1),
        (5, 2),
        (8, 1),
    ]
    assert all(re.search(NO_SPACE, line["reason"]) for line in events(metrics, "save failed"))
    assert steps_saved(folder / "failing") == [3, 6, 7, 8], "nothing of a failed save is left"
    assert losses(metrics) == losses(undisturbed)
    assert state_digest(folder / "failing") == state_digest(folder / "undisturbed")


def test_too_many_failed_saves_in_a_row_stop_the_run(folder: Path, pool: WorkerPool) -> None:
    values = run_settings(folder, "full", every_steps=1)
    said = rf"CheckFailed: 3 saves in a row failed, the last because: .*{NO_SPACE}; newest checkpoint: step 1"
    with pytest.raises(WorkerError, match=said) as caught:
        pool.run(_train_on_full_disk, values, [2, 3, 4, 5, 6, 7, 8])
    assert str(caught.value).count("CheckFailed: 3 saves") == 2, "on both ranks"
    assert steps_saved(folder / "full") == [1]


def test_a_last_save_that_keeps_failing_is_no_success(folder: Path, pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match=r"CheckFailed: 3 saves in a row failed.*newest checkpoint: step 4"):
        pool.run(_train_on_full_disk, run_settings(folder, "unfinished"), [8, 8, 8])
    assert steps_saved(folder / "unfinished") == [4]


def test_a_stop_whose_save_fails_says_so_and_continues_from_the_checkpoint_before(
    folder: Path, pool: WorkerPool, undisturbed: list[dict[str, Any]]
) -> None:
    values = run_settings(folder, "stopped")
    said = rf"RetryLater: the test asks: stopped after step 6, which was not saved \(.*{NO_SPACE}\); .*from step 4"
    with pytest.raises(WorkerError, match=said):
        pool.run(_train_on_full_disk, values, [6], 6)
    metrics = pool.run(run_training, values)[0]
    assert losses(metrics) == losses(undisturbed)
    assert state_digest(folder / "stopped") == state_digest(folder / "undisturbed")


def test_a_stop_that_leaves_no_checkpoint_at_all_is_no_retry(folder: Path, pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match=r"CheckFailed: the test asks: stopped after step 2, which was not saved"):
        pool.run(_train_on_full_disk, run_settings(folder, "lost"), [2], 2)
    assert steps_saved(folder / "lost") == []


@pytest.mark.parametrize("end", ["stop", "guard"])
def test_what_is_being_written_at_a_stop_is_completed_first(folder: Path, pool: WorkerPool, end: str) -> None:
    error, saved = {"stop": ("RetryLater: the test asks", [4, 5]), "guard": ("CheckFailed: only skips", [4])}[end]
    with pytest.raises(WorkerError, match=error):
        pool.run(_train_held_up, run_settings(folder, f"end-{end}"), end)
    assert steps_saved(folder / f"end-{end}") == saved


def test_a_fault_of_one_rank_alone_leaves_no_writer_and_nothing_that_looks_saved(
    folder: Path, pool: WorkerPool
) -> None:
    with pytest.raises(WorkerError, match="ValueError: only here"):
        pool.run(_train_held_up, run_settings(folder, "alone"), "fault")
    assert not list((folder / "alone" / "checkpoints").glob("step-*"))


def test_killed_while_a_save_is_written(folder: Path, pool: WorkerPool, undisturbed: list[dict[str, Any]]) -> None:
    _kill_and_resume(folder, pool, undisturbed, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 2 + RANDOM_KILLS))
def test_killed_at_random_while_saves_are_written(
    folder: Path, pool: WorkerPool, undisturbed: list[dict[str, Any]], seed: int
) -> None:
    _kill_and_resume(folder, pool, undisturbed, seed)


def _kill_and_resume(folder: Path, pool: WorkerPool, undisturbed: list[dict[str, Any]], seed: int) -> None:
    values = run_settings(folder, f"killed-{seed}", every_steps=2)
    with pytest.raises(WorkerError, match="died|did not finish"):
        pool.run(_train_and_die, values, seed)
    metrics = pool.run(run_training, values)[0]
    assert losses(metrics) == losses(undisturbed)
    assert state_digest(folder / f"killed-{seed}") == state_digest(folder / "undisturbed")
    assert steps_saved(folder / f"killed-{seed}")[-1] == 8
    assert events(metrics, "proof")[-1]["text"] == PROOF
    shutil.rmtree(folder / f"killed-{seed}")


def _of(run: Path, step: int, name: str) -> bytes:
    return (run / "checkpoints" / f"step-{step:08d}" / name).read_bytes()


def _planned_and_taken_bytes(ranks: Ranks, values: dict[str, Any]) -> tuple[float, int]:
    session, _ = open_run(ranks, values)
    return session.facts.memory.optimizer, SnapshotMemory.for_state(session.engine).nbytes


def _train_with_slow_writer(
    ranks: Ranks, values: dict[str, Any], at_once: str
) -> tuple[list[dict[str, Any]], dict[int, list[int]]]:
    """Step 4 is saved at once elsewhere, then by the run, whose writer is held up until step 7."""
    session, progress = open_run(ranks, values)
    gate, seen = threading.Event(), {}
    after_step = Saver.after_step

    def watched(saver: Saver, progress: Progress) -> None:
        if progress.step == 4:
            save_checkpoint(Path(at_once) / "checkpoints", 4, session.engine, {}, None, ranks)
        elif 4 < progress.step < 8:
            seen[progress.step] = steps_committed(session)
        if progress.step == 7:
            gate.set()
        after_step(saver, progress)

    with held_up(gate), patch.object(Saver, "after_step", watched):
        train(session, progress)
    session.metrics.close()
    return read_metrics(session.folder.metrics_file), seen


def steps_committed(session: Session) -> list[int]:
    return [int(path.name.split("-")[1]) for path in session.folder.checkpoints.glob("step-*")]


@contextmanager
def held_up(gate: threading.Event) -> Iterator[None]:
    """No rank file is written before the gate is open."""

    def write(*arguments: Any) -> FileEntry:
        assert gate.wait(SECONDS)
        return write_rank_file(*arguments)

    with patch.object(background, "write_rank_file", write):
        yield


@contextmanager
def asked_before(step: int | None) -> Iterator[None]:
    """Rank 0 is asked to stop after this step of a run; None: not at all."""
    taken = [0]

    def step_or_stop(session: Session, work: StepWork, rate: float) -> StepOutcome:
        if taken[0] == step and session.ranks.rank == 0:
            session.stop.request("the test asks")
        taken[0] += 1
        return run_step(session, work, rate)

    with patch("llamapro.training.loop.run_step", step_or_stop):
        yield


def _train_with_counted_writers(ranks: Ranks, values: dict[str, Any]) -> int:
    """The most files that were written at the same time."""
    writing, most = [0], [0]

    def write(*arguments: Any) -> FileEntry:
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        time.sleep(0.2)
        try:
            return write_rank_file(*arguments)
        finally:
            writing[0] -= 1

    with patch.object(background, "write_rank_file", write):
        run_training(ranks, values)
    return most[0]


def _train_on_full_disk(
    ranks: Ranks, values: dict[str, Any], failing: list[int], stop_before_step: int | None = None
) -> list[dict[str, Any]]:
    """Rank 1 can't write the checkpoints of these steps; of a step that is named n times, not the first n times."""
    left = list(failing)

    def write(path: Path, *rest: Any) -> FileEntry:
        entry = write_rank_file(path, *rest)
        found = re.search(r"step-(\d+)", path.parent.name)
        assert found is not None
        if ranks.rank == 1 and int(found[1]) in left:
            left.remove(int(found[1]))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return entry

    with patch.object(background, "write_rank_file", write), asked_before(stop_before_step):
        return run_training(ranks, values)


def _train_with_own_disk(ranks: Ranks, values: dict[str, Any], full_step: int) -> list[dict[str, Any]]:
    """While the checkpoint of one step is written, rank 1 has a disk of a few KiB mounted in its place."""

    def write(path: Path, *rest: Any) -> FileEntry:
        if ranks.rank == 0 or f"step-{full_step:08d}" not in path.parent.name:
            return write_rank_file(path, *rest)
        leave_mount_namespace()
        with small_disk(path.parent, "size=8k"):
            return write_rank_file(path, *rest)

    with patch.object(background, "write_rank_file", write):
        return run_training(ranks, values)


def _train_with_jumping_clock(ranks: Ranks, values: dict[str, Any]) -> list[dict[str, Any]]:
    chance = random.Random(ranks.rank)
    with patch("time.time", lambda: chance.uniform(0.0, 4e9)):
        return run_training(ranks, values)


def _train_held_up(ranks: Ranks, values: dict[str, Any], end: str) -> None:
    """Step 4 is still written when, in step 6, a stop is asked for, the guard stops the run, or rank 1 fails alone."""
    gate, steps = threading.Event(), [0]
    complete, close = Saver.complete, Saver.close

    def let_write(method: Callable[[Saver], None]) -> Callable[[Saver], None]:
        def call(saver: Saver) -> None:
            if saver._running is not None and not gate.is_set():
                assert not list(saver._session.folder.checkpoints.glob("step-*"))
                gate.set()
            method(saver)

        return call

    def check_limit(_: SpikeGuard) -> None:
        steps[0] += 1
        if steps[0] == 6 and end == "guard":
            raise CheckFailed("only skips")
        if steps[0] == 6 and end == "fault" and ranks.rank == 1:
            raise ValueError("only here")

    with ExitStack() as stack:
        stack.enter_context(held_up(gate))
        stack.enter_context(patch.object(SpikeGuard, "check_limit", check_limit))
        stack.enter_context(patch.object(Saver, "complete", let_write(complete)))
        stack.enter_context(patch.object(Saver, "close", let_write(close)))
        stack.enter_context(asked_before(5 if end == "stop" else None))
        run_training(ranks, values)


def _train_and_die(ranks: Ranks, values: dict[str, Any], seed: int) -> None:
    """One rank dies at a random moment after a random save has begun; writing takes a second."""
    chance = random.Random(seed)
    save, rank = chance.randint(1, 4), chance.randrange(ranks.world_size)
    delay, begun = chance.uniform(0.0, 1.5 if save < 4 else 0.9), [0]

    def write(*arguments: Any) -> FileEntry:
        begun[0] += 1
        if (begun[0], ranks.rank) == (save, rank):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        time.sleep(0.5)
        entry = write_rank_file(*arguments)
        time.sleep(0.5)
        return entry

    with patch.object(background, "write_rank_file", write):
        run_training(ranks, values)
