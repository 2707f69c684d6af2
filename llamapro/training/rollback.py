"""Undo what led to a spike: back to the last scheduled checkpoint, on with the text after the spike.

The step and the sample stream don't go back: the steps in between were taken for nothing, as with Megatron-LM's skipped
iterations. So learning rate, planned stages and the text of later steps stay what they are for their step, at any
world size. Checkpoints saved by the clock or at a stop are left out: where a run is interrupted must not decide where
it goes back to.
"""

import math
from dataclasses import replace

from llamapro import console
from llamapro.checkpoint.discover import list_checkpoints, newest_of_every
from llamapro.checkpoint.folder import Checkpoint, check_digest, read_checked_manifest, read_checkpoint
from llamapro.checkpoint.restore import load_checkpoint
from llamapro.errors import CheckFailed, Corrupted
from llamapro.training.agreement import agree
from llamapro.training.progress import Progress, StepOutcome
from llamapro.training.session import Session
from llamapro.training.trainer_state import saved_state


def calls_for_rollback(session: Session, outcome: StepOutcome) -> bool:
    """Whether a step was skipped as a spike, in a run that goes back then; the same on every rank.

    What is not finite is a fault of one step's arithmetic, seen at once: it is skipped and nothing else.
    """
    finite = math.isfinite(outcome.loss) and math.isfinite(outcome.gradient_norm)
    return session.config.guards.spike == "rollback" and bool(outcome.skipped) and finite


def roll_back(session: Session, progress: Progress, outcome: StepOutcome) -> Progress:
    """Restore weights, optimizer and guard history of the last scheduled checkpoint; collective.

    Without one the spike stays what it is already, a skipped step.

    Args:
        progress: after the spike's step.

    Returns:
        The same place in the run, with all steps since the checkpoint counted as skipped.

    Raises:
        CheckFailed: the checkpoint is damaged, or the run came back to it too often.
    """
    checkpoint = _last_scheduled(session)
    if checkpoint is None:
        every = session.config.checkpoint.every_steps
        session.metrics.event("no rollback", step=progress.step, reason=f"no checkpoint of every {every} steps yet")
        console.warning(f"step {progress.step} is only skipped: no checkpoint of every {every} steps to go back to yet")
        return progress
    saved = saved_state(checkpoint)
    assert saved is not None
    session.stop.heartbeat()
    load_checkpoint(checkpoint, session.engine, session.ranks)
    session.guard.roll_back(checkpoint.step, saved.guard)
    session.stop.heartbeat()
    _say(session, progress, checkpoint, saved.progress.sequences, outcome.skipped)
    session.guard.check_limit()
    return replace(progress, skipped=saved.progress.skipped + progress.step - checkpoint.step)


def _last_scheduled(session: Session) -> Checkpoint | None:
    """The newest complete checkpoint of `checkpoint.every_steps`, its bytes checked by all ranks together."""
    root, every, ranks = session.folder.checkpoints, session.config.checkpoint.every_steps, session.ranks
    name = ""
    if ranks.rank == 0:
        complete = [listed for listed in list_checkpoints(root, digests=False) if not listed.problem]
        newest = newest_of_every(complete, every)
        name = newest.name if newest else ""
    name = ranks.broadcast_json(name)
    return agree(ranks, lambda: _open_share(session, name)) if name else None


def _open_share(session: Session, name: str) -> Checkpoint:
    """Read a checkpoint after checking this rank's share of its files."""
    folder, ranks = session.folder.checkpoints.absolute() / name, session.ranks
    try:
        manifest = read_checked_manifest(folder)
        for member in sorted(manifest.files)[ranks.rank :: ranks.world_size]:
            check_digest(folder, manifest, member)
        return read_checkpoint(folder, manifest)
    except Corrupted as error:
        raise CheckFailed(
            f"a spike calls for a rollback, but the checkpoint to go back to is damaged: {error}; started again, the "
            "run continues from its newest valid checkpoint"
        ) from error


def _say(session: Session, progress: Progress, checkpoint: Checkpoint, first: int, reason: str) -> None:
    """Log which steps and which sequences of the sample stream, both ends included, the weights know nothing of."""
    steps, sequences = [checkpoint.step + 1, progress.step], [first, progress.sequences - 1]
    session.metrics.event(
        "rollback",
        step=progress.step,
        checkpoint=checkpoint.folder.name,
        skipped_steps=steps,
        skipped_sequences=sequences,
        reason=reason,
    )
    console.warning(
        f"step {progress.step}: back to the weights of {checkpoint.folder.name}; the updates of steps {steps[0]} to "
        f"{steps[1]} are undone, their sequences {sequences[0]} to {sequences[1]} are skipped"
    )
