"""A save that is written while training goes on: copied at one step boundary, committed by all ranks at a later one."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from threading import Event

from llamapro.checkpoint.rank_file import write_rank_file
from llamapro.checkpoint.save import StagedSave, commit_save
from llamapro.checkpoint.snapshot import SnapshotMemory
from llamapro.files.manifest import FileEntry


class BackgroundSave:
    """This rank's part in a save: a thread writes its file. The thread takes part in no collective.

    Begun on every rank alike; exactly one of `commit`, on every rank alike, and `cancel` ends it.
    """

    def __init__(self, staged: StagedSave, memory: SnapshotMemory) -> None:
        """Copy the state as it is now and begin to write the copy; the memory is in use until the end."""
        self._staged = staged
        self._cancelled = Event()
        plan = replace(staged.plan, tensors=memory.copy(staged.plan.tensors))
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[FileEntry] = executor.submit(write_rank_file, staged.rank_file, plan, self._cancelled)
        executor.shutdown(wait=False)

    @property
    def written(self) -> bool:
        """Whether this rank is done with writing, successfully or not."""
        return self._written.done()

    def commit(self) -> Path:
        """Wait until every rank has written, then make the checkpoint exist; collective.

        Returns:
            The new checkpoint's folder.

        Raises:
            SaveFailed: on every rank, naming each that failed and why; nothing is left of the save.
        """
        error = self._written.exception()
        return commit_save(self._staged, error if error is not None else self._written.result())

    def cancel(self) -> None:
        """Give up on this rank alone, when the others can't be asked; what is staged is cleared at the next start."""
        self._cancelled.set()
        wait([self._written])
