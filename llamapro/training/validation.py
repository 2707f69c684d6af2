"""Held-out text scored during a run, by the same code as `llamapro evaluate`."""

from dataclasses import replace

from llamapro import console
from llamapro.data.loader import Batch
from llamapro.evaluation.text import TextScore, evaluate_text
from llamapro.modeling.model import LossOutput
from llamapro.training.progress import Progress
from llamapro.training.retention import base_to_measure, increase_over_base, judge_retention
from llamapro.training.session import Session
from llamapro.training.step import to_device


def measure_base(session: Session, progress: Progress) -> Progress:
    """Score the base on the text that `guards.retention` names, unless that is known; collective.

    Returns:
        The progress, which remembers the loss.

    Raises:
        UserError: the base is not to be had any more.
        StopAsked: a stop was asked for in the middle of it.
    """
    wanted = base_to_measure(session, progress)
    if wanted is None:
        return progress
    with session.engine.evaluating(), session.engine.model.bypassed(wanted.blocks):
        score = _score(session, wanted.set)
    console.info(f"held-out {wanted.set}: loss {score.loss:.4f} nats/token of the base (guards.retention)")
    return replace(progress, base_losses={**progress.base_losses, wanted.key: score.loss})


def validate_if_due(session: Session, progress: Progress) -> Progress:
    """Score the validation sets before the first step, at the interval and after the last step; collective.

    Returns:
        The progress, which remembers that this step is validated, so that a resumed run makes up for a validation
        that was interrupted.

    Raises:
        StopAsked: a stop was asked for in the middle of it.
        CheckFailed: text that must be kept got worse than `guards.retention` allows, and it says to stop.
    """
    step = progress.step
    due = step in (0, session.steps) or step % session.config.validation.every_steps == 0
    if not due or progress.validated == step or not session.validation_sets:
        return progress
    _validate(session, progress)
    return replace(progress, validated=step)


def _validate(session: Session, progress: Progress) -> None:
    step = progress.step
    values: dict[str, float] = {}
    losses: dict[str, float] = {}
    with session.engine.evaluating():
        for name in session.validation_sets:
            score = _score(session, name)
            losses[name] = values[f"validation/{name}/loss"] = score.loss
            values[f"validation/{name}/bits_per_byte"] = score.bits_per_byte
            console.info(
                f"step {step} | held-out {name}: loss {score.loss:.4f} nats/token, "
                f"{score.bits_per_byte:.4f} bits/byte over {score.tokens:,} tokens"
            )
    increase = increase_over_base(session, losses, progress.base_losses)
    session.metrics.step(step, values | increase)
    judge_retention(session, step, increase)


def _score(session: Session, name: str) -> TextScore:
    engine, device = session.engine, session.ranks.device

    def loss(batch: Batch) -> LossOutput:
        inputs, _ = to_device(batch, device)
        return engine.forward_loss(*inputs)

    return evaluate_text(loss, session.validation_sets[name], session.ranks, lambda _rows: session.go_on())
