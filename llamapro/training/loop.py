"""The training loop: fetch, micro-steps, step, guards, log, validate, save; everything else is called by name."""

from llamapro import console
from llamapro.data.loader import Prefetcher
from llamapro.errors import CheckFailed
from llamapro.training.batches import planned_work
from llamapro.training.log_line import StepMeasures, StepTimer, source_values, step_line
from llamapro.training.progress import Progress, StepOutcome
from llamapro.training.proof import prove_frozen_weights, prove_identity
from llamapro.training.randomness import seed_step
from llamapro.training.rollback import calls_for_rollback, roll_back
from llamapro.training.saving import Saver
from llamapro.training.schedule import learning_rate
from llamapro.training.session import Session, StopAsked
from llamapro.training.step import run_step
from llamapro.training.validation import measure_base, validate_if_due


def train(session: Session, progress: Progress) -> Progress:
    """Train until the last step, saving and validating as configured.

    Returns:
        The final progress.

    Raises:
        RetryLater: a stop was asked for; the state is saved, the same command continues.
        CheckFailed: a guard stopped the run.
    """
    prove_frozen_weights(session, progress)
    with Saver(session, progress) as saver:
        return _train(session, progress, saver)


def _train(session: Session, progress: Progress, saver: Saver) -> Progress:
    timer = StepTimer()
    try:
        if progress.step == 0:
            progress = prove_identity(session, progress)
        progress = measure_base(session, progress)
        progress = _validate(session, progress, saver)
        with Prefetcher(planned_work(session, progress)) as fetched:
            timer.restart()
            for work in fetched:
                seed_step(session.config.run.seed, progress.step, session.ranks.rank)
                rate = learning_rate(progress.step, session.steps, session.config.schedule)
                outcome = run_step(session, work, rate)
                progress = progress.after(outcome, session.config.batch.global_sequences)
                _log(session, progress, outcome, timer, fetched.take_wait_seconds())
                _check_guard(session, saver)
                if calls_for_rollback(session, outcome):
                    saver.complete()  # which checkpoint is the last must not depend on how fast the disk is
                    progress = roll_back(session, progress, outcome)
                progress = _validate(session, progress, saver)
                saver.after_step(progress)
                timer.restart()
        saver.finish(progress)
    except StopAsked as stop:
        raise saver.stop(progress, str(stop)) from stop
    return progress


def _check_guard(session: Session, saver: Saver) -> None:
    """Stop a run that only skips, on all ranks alike; what is being saved is completed first."""
    try:
        session.guard.check_limit()
    except CheckFailed:
        saver.complete()
        raise


def _validate(session: Session, progress: Progress, saver: Saver) -> Progress:
    """Score held-out text if it is due; before a guard stops the run its work is saved.

    It is saved as not yet validated, so that the same command stops at the same place again.
    """
    try:
        return validate_if_due(session, progress)
    except CheckFailed:
        saver.save(progress)
        raise


def _log(session: Session, progress: Progress, outcome: StepOutcome, timer: StepTimer, wait_seconds: float) -> None:
    facts = session.facts
    measures = StepMeasures(timer.stop(), wait_seconds, facts.flops, facts.positions, facts.device.peak_flops)
    values = measures.values(outcome, progress, session.ranks) | source_values(session.stream, progress)
    session.metrics.step(progress.step, values)
    if outcome.skipped:
        session.metrics.event("skip", step=progress.step, reason=outcome.skipped)
        console.warning(f"step {progress.step} skipped: {outcome.skipped}")
    if progress.step % session.config.logging.every_steps == 0 or progress.step == session.steps:
        left = timer.left(session.steps - progress.step)
        console.info(step_line(progress.step, session.steps, values, left, session.ranks.device))
