"""The training loop: fetch, micro-steps, step, guards, log, validate, save; everything else is called by name."""

from llamapro import console
from llamapro.data.loader import Prefetcher
from llamapro.errors import RetryLater
from llamapro.training.batches import planned_work
from llamapro.training.log_line import StepMeasures, StepTimer, step_line
from llamapro.training.progress import Progress, StepOutcome
from llamapro.training.proof import prove_frozen_weights, prove_identity
from llamapro.training.randomness import seed_step
from llamapro.training.saving import Saver
from llamapro.training.schedule import learning_rate
from llamapro.training.session import Session
from llamapro.training.step import run_step
from llamapro.training.validation import validate


def train(session: Session, progress: Progress) -> Progress:
    """Train until the last step, saving and validating as configured.

    Returns:
        The final progress.

    Raises:
        RetryLater: a stop was asked for; the state is saved, the same command continues.
        CheckFailed: a guard stopped the run.
    """
    config, facts, ranks = session.config, session.facts, session.ranks
    saver = Saver(session)
    timer = StepTimer()
    prove_frozen_weights(session)
    if progress.step == 0:
        prove_identity(session)
        validate(session, progress)
    work = planned_work(
        session.stream,
        progress.sequences,
        session.steps - progress.step,
        config.batch.global_sequences,
        facts.micro_sequences,
        facts.accumulation_steps,
        ranks,
    )
    with Prefetcher(work) as fetched:
        timer.restart()
        for share in fetched:
            seed_step(config.run.seed, progress.step, ranks.rank)
            outcome = run_step(
                session.engine,
                share,
                ranks,
                learning_rate=learning_rate(progress.step, session.steps, config.schedule),
                source_names=session.source_names,
                guard=session.guard,
                may_continue=session.may_continue,
            )
            if outcome is None:
                saver.save(progress)
                raise RetryLater(f"stopped as asked after step {progress.step}; the same command continues from there")
            progress = progress.after(outcome, config.batch.global_sequences)
            _log(session, progress, outcome, timer, fetched.take_wait_seconds())
            session.guard.check_limit()
            if validate_due(session, progress.step):
                validate(session, progress)
            if saver.due(progress):
                saver.save(progress)
            timer.restart()
    return progress


def validate_due(session: Session, step: int) -> bool:
    """Whether held-out text is scored after this step: at the interval, and after the last step."""
    return step % session.config.validation.every_steps == 0 or step == session.steps


def _log(session: Session, progress: Progress, outcome: StepOutcome, timer: StepTimer, wait_seconds: float) -> None:
    measures = StepMeasures(timer.stop(), wait_seconds, session.facts.flops.model, session.facts.device.peak_flops)
    values = measures.values(outcome, progress, session.ranks)
    session.metrics.step(progress.step, values)
    if outcome.skipped:
        session.metrics.event("skip", step=progress.step, reason=outcome.skipped)
        console.warning(f"step {progress.step} skipped: {outcome.skipped}")
    if progress.step % session.config.logging.every_steps == 0 or progress.step == session.steps:
        left = timer.left(session.steps - progress.step)
        console.info(step_line(progress.step, session.steps, values, left, session.ranks.device))
