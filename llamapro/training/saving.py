"""When a run saves, what goes into a checkpoint, and what happens when a save fails.

A failed save (full disk, one rank's I/O error) is aborted on every rank and training goes on; after
`MAX_FAILED_SAVES` in a row the run stops, because nothing would be left of its work.
"""

import time

from llamapro import console
from llamapro.checkpoint.discover import prune
from llamapro.checkpoint.save import SaveFailed, save_checkpoint
from llamapro.errors import CheckFailed
from llamapro.training.agreement import agree
from llamapro.training.progress import Progress
from llamapro.training.proof import prove_frozen_weights
from llamapro.training.session import Session
from llamapro.training.trainer_state import TrainerState

MAX_FAILED_SAVES = 3


class Saver:
    """Saves a run's state at the configured steps and minutes."""

    def __init__(self, session: Session, restored: Progress) -> None:
        """`restored`: the progress that the run continues from; it is saved already."""
        self._session = session
        self._last_time = time.monotonic()
        self._saved = restored
        self._failed_in_a_row = 0

    def due(self, progress: Progress) -> bool:
        """Whether to save now: the same answer on every rank, although only rank 0's clock counts."""
        session, settings = self._session, self._session.config.checkpoint
        last = progress.step == session.steps
        late = settings.every_minutes is not None and time.monotonic() - self._last_time >= 60 * settings.every_minutes
        by_step = progress.step % settings.every_steps == 0
        return last or by_step or session.ranks.any(late and session.ranks.rank == 0)

    def save(self, progress: Progress) -> None:
        """Prove the frozen weights, commit a checkpoint of this progress, delete what is not kept.

        Raises:
            CheckFailed: a frozen tensor changed, too many saves failed in a row, or another job has taken the folder.
        """
        if progress == self._saved or progress.step == 0:
            return
        self._session.stop.heartbeat()
        agree(self._session.ranks, self._check_lock)
        prove_frozen_weights(self._session)
        try:
            self._commit(progress)
        except SaveFailed as error:
            self._failed_in_a_row += 1
            self._session.metrics.event("save failed", step=progress.step, reason=str(error))
            console.warning(f"{error} (failure {self._failed_in_a_row} of at most {MAX_FAILED_SAVES} in a row)")
            if self._failed_in_a_row >= MAX_FAILED_SAVES:
                raise CheckFailed(f"{MAX_FAILED_SAVES} saves in a row failed, the last because: {error}") from error
            return
        self._session.stop.heartbeat()
        self._failed_in_a_row = 0
        self._saved = progress
        self._last_time = time.monotonic()

    def _check_lock(self) -> None:
        """A job whose lease another one has taken must not write into the run folder any more."""
        if self._session.lock is not None:
            self._session.lock.check()

    def _commit(self, progress: Progress) -> None:
        session = self._session
        start = time.monotonic()
        state = TrainerState(
            progress=progress, identity=session.identity, stages=session.stream.stages, guard=session.guard.state()
        )
        root, record = session.folder.checkpoints, session.facts.record
        path = save_checkpoint(root, progress.step, session.engine, state.to_json(), record, session.ranks)
        settings = session.config.checkpoint
        if session.ranks.rank == 0:
            rolls_back = session.config.guards.spike == "rollback"
            prune(root, settings.keep, settings.keep_every_steps, settings.every_steps if rolls_back else None)
        seconds = time.monotonic() - start
        session.metrics.event("save", step=progress.step, seconds=round(seconds, 3))
        console.info(f"saved {path} in {seconds:.1f} s")
