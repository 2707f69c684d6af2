"""When a run saves, what goes into a checkpoint, and what happens when a save fails.

A save is copied to host memory at its step, written by a thread while training goes on, and committed by all ranks at
the first later step at which all have written. There is one copy, so there is one save at a time.

A failed save (full disk, one rank's I/O error) is aborted on every rank and training goes on; after
`MAX_FAILED_SAVES` in a row the run stops, because nothing would be left of its work.
"""

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from llamapro import console
from llamapro.checkpoint.background import BackgroundSave
from llamapro.checkpoint.discover import prune, scheduled_steps
from llamapro.checkpoint.save import SaveFailed, stage_save
from llamapro.checkpoint.snapshot import SnapshotMemory
from llamapro.errors import CheckFailed, LlamaproError, RetryLater
from llamapro.planning.tables import gib
from llamapro.training.agreement import agree
from llamapro.training.progress import Progress
from llamapro.training.proof import prove_frozen_weights
from llamapro.training.session import Session
from llamapro.training.trainer_state import TrainerState

MAX_FAILED_SAVES = 3


@dataclass(frozen=True)
class _Running:
    """A save that is being written.

    Attributes:
        began: `time.monotonic()` at its beginning; training went on `stalled_seconds` later.
    """

    progress: Progress
    save: BackgroundSave
    began: float
    stalled_seconds: float


class Saver:
    """Saves a run's state at the configured steps and minutes. Every method is called on all ranks alike, but `close`.

    A context manager: whatever ends the run, no thread is left writing.
    """

    def __init__(self, session: Session, restored: Progress) -> None:
        """`restored`: the progress that the run continues from; it is saved already, unless it is none at all."""
        self._session = session
        self._memory = agree(session.ranks, lambda: _snapshot_memory(session))
        self._running: _Running | None = None
        self._last_time = time.monotonic()
        self._saved = restored
        self._failed_in_a_row = 0
        self._last_failure = ""
        self._say_memory()

    def after_step(self, progress: Progress) -> None:
        """Commit the save that every rank has written by now; begin one if it is due.

        A due save waits for the one that is still written instead of being put off: checkpoints are of the steps that
        were asked for, and a disk too slow for them shows as a stall in the log, not as fewer checkpoints.

        Raises:
            CheckFailed: a frozen tensor changed, too many saves failed in a row, or another job has taken the folder.
        """
        late, writing = self._any_rank_late_or_writing()
        session = self._session
        by_step = progress.step % session.config.checkpoint.every_steps == 0
        due = late or by_step or progress.step == session.steps
        if due or not writing:
            self.complete()
        if due:
            self._begin(progress)

    def complete(self) -> None:
        """Wait for the save that is being written, if there is one, and commit it.

        Raises:
            CheckFailed: too many saves failed in a row, or another job has taken the folder.
        """
        running = self._running
        if running is None:
            return
        waited_from = time.monotonic()
        self._session.stop.heartbeat()
        agree(self._session.ranks, self._check_lock)
        self._running = None
        try:
            path = running.save.commit()
        except SaveFailed as error:
            self._count_failure(running.progress, error)
            return
        self._failed_in_a_row = 0
        self._saved = running.progress
        self._prune()
        self._session.stop.heartbeat()
        now = time.monotonic()
        seconds, stalled = now - running.began, running.stalled_seconds + now - waited_from
        step = running.progress.step
        self._session.metrics.event("save", step=step, seconds=round(seconds, 3), stalled_seconds=round(stalled, 3))
        console.info(f"saved {path} in {seconds:.1f} s; training stood still for {stalled:.2f} s of it")

    def save(self, progress: Progress) -> None:
        """Save now and wait for it; it may fail.

        Raises:
            CheckFailed: as `after_step`.
        """
        self.complete()
        if self._is_unsaved(progress):
            self._begin(progress)
            self.complete()

    def finish(self, progress: Progress) -> None:
        """Save the run's last progress. A failed save is tried again at once: no training is left to go on with.

        Raises:
            CheckFailed: as `after_step`.
        """
        self.save(progress)
        while self._is_unsaved(progress):
            self.save(progress)

    def stop(self, progress: Progress, reason: str) -> LlamaproError:
        """Save because a stop was asked for; returns how the run ends: what was saved and where it continues.

        Without any checkpoint a restart would begin afresh and meet the same fault: that is no retry.

        Raises:
            CheckFailed: as `after_step`.
        """
        self.save(progress)
        stopped = f"{reason}: stopped after step {progress.step}"
        if not self._is_unsaved(progress):
            return RetryLater(f"{stopped}; the same command continues from there")
        failed = f"{stopped}, which was not saved ({self._last_failure})"
        if self._saved.step == 0:
            return CheckFailed(f"{failed}; the run has no older checkpoint, so its work is lost")
        return RetryLater(f"{failed}; the same command continues from step {self._saved.step}")

    def close(self) -> None:
        """Give up what is being written, on this rank alone."""
        if self._running is not None:
            self._running.save.cancel()
            self._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_unsaved(self, progress: Progress) -> bool:
        return progress.step > 0 and progress != self._saved

    def _any_rank_late_or_writing(self) -> tuple[bool, bool]:
        """Whether a save is due by the clock, of which only rank 0's counts; whether any rank still writes."""
        session, minutes = self._session, self._session.config.checkpoint.every_minutes
        late = minutes is not None and time.monotonic() - self._last_time >= 60 * minutes
        writing = self._running is not None and not self._running.save.written
        lates, writings = session.ranks.sum_integers([int(late and session.ranks.rank == 0), int(writing)])
        return lates > 0, writings > 0

    def _begin(self, progress: Progress) -> None:
        """Prove the frozen weights, copy the state of this progress and begin to write it."""
        session = self._session
        began = self._last_time = time.monotonic()
        session.stop.heartbeat()
        agree(session.ranks, self._check_lock)
        prove_frozen_weights(session, progress)
        state = TrainerState(
            progress=progress, identity=session.identity, stages=session.stream.stages, guard=session.guard.state()
        ).to_json()
        root, record = session.folder.checkpoints, session.facts.record
        try:
            staged = stage_save(root, progress.step, session.engine, state, record, session.ranks)
        except SaveFailed as error:
            self._count_failure(progress, error)
            return
        save = BackgroundSave(staged, self._memory)
        session.stop.heartbeat()
        self._running = _Running(progress, save, began, time.monotonic() - began)

    def _count_failure(self, progress: Progress, error: SaveFailed) -> None:
        self._failed_in_a_row += 1
        self._last_failure = str(error)
        self._session.metrics.event(
            "save failed", step=progress.step, reason=str(error), in_a_row=self._failed_in_a_row
        )
        console.warning(f"{error} (failure {self._failed_in_a_row} of at most {MAX_FAILED_SAVES} in a row)")
        if self._failed_in_a_row >= MAX_FAILED_SAVES:
            last = f"step {self._saved.step}" if self._saved.step else "none"
            raise CheckFailed(
                f"{MAX_FAILED_SAVES} saves in a row failed, the last because: {error}; newest checkpoint: {last}"
            ) from error

    def _check_lock(self) -> None:
        """A job whose lease another one has taken must not write into the run folder any more."""
        if self._session.lock is not None:
            self._session.lock.check()

    def _prune(self) -> None:
        session, settings = self._session, self._session.config.checkpoint
        if session.ranks.rank == 0:
            spared = scheduled_steps(session.config)
            prune(session.folder.checkpoints, settings.keep, settings.keep_every_steps, spared)

    def _say_memory(self) -> None:
        most = max(self._session.ranks.all_gather_json(self._memory.nbytes))
        kind = "pinned host memory" if self._memory.pinned else "host memory"
        console.info(f"saves are written in the background from {gib(most)} GiB of {kind} per rank")


def _snapshot_memory(session: Session) -> SnapshotMemory:
    """Taken at the start: a machine with too little refuses there, not at the first save."""
    try:
        return SnapshotMemory.for_state(session.engine)
    except RuntimeError as error:
        raise CheckFailed(f"no host memory for the state of a save on rank {session.ranks.rank}: {error}") from error
