"""The training loop: fetch, micro-steps, step, guards, log, validate, save; everything else is called by name."""

from llamapro import console
from llamapro.data.loader import Prefetcher
from llamapro.errors import RetryLater
from llamapro.training.batches import planned_work
from llamapro.training.log_line import StepMeasures, StepTimer, source_values, step_line
from llamapro.training.progress import Progress, StepOutcome
from llamapro.training.proof import prove_frozen_weights, prove_identity
from llamapro.training.randomness import seed_step
from llamapro.training.saving import Saver
from llamapro.training.schedule import learning_rate
from llamapro.training.session import Session, StopAsked
from llamapro.training.step import run_step
from llamapro.training.validation import validate_if_due


def train(session: Session, progress: Progress) -> Progress:
    """Train until the last step, saving and validating as configured.

    Returns:
        The final progress.

    Raises:
        RetryLater: a stop was asked for; the state is saved, the same command continues.
        CheckFailed: a guard stopped the run.
    """
    saver, timer = Saver(session, progress), StepTimer()
    prove_frozen_weights(session)
    try:
        if progress.step == 0:
            prove_identity(session)
        progress = validate_if_due(session, progress)
        with Prefetcher(planned_work(session, progress)) as fetched:
            timer.restart()
            for work in fetched:
                seed_step(session.config.run.seed, progress.step, session.ranks.rank)
                rate = learning_rate(progress.step, session.steps, session.config.schedule)
                outcome = run_step(session, work, rate)
                progress = progress.after(outcome, session.config.batch.global_sequences)
                _log(session, progress, outcome, timer, fetched.take_wait_seconds())
                session.guard.check_limit()
                progress = validate_if_due(session, progress)
                if saver.due(progress):
                    saver.save(progress)
                timer.restart()
        saver.save(progress)
    except StopAsked as stop:
        saver.save(progress)
        raise RetryLater(f"{stop}: stopped after step {progress.step}; the same command continues from there") from stop
    return progress


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
