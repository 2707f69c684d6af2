"""Held-out text scored during a run, by the same code as `llamapro evaluate`."""

from dataclasses import replace

from llamapro import console
from llamapro.data.loader import Batch
from llamapro.evaluation.text import evaluate_text
from llamapro.modeling.model import LossOutput
from llamapro.training.progress import Progress
from llamapro.training.session import Session
from llamapro.training.step import to_device


def validate_if_due(session: Session, progress: Progress) -> Progress:
    """Score the validation sets before the first step, at the interval and after the last step; collective.

    Returns:
        The progress, which remembers that this step is validated, so that a resumed run makes up for a validation
        that was interrupted.

    Raises:
        StopAsked: a stop was asked for in the middle of it.
    """
    step = progress.step
    due = step in (0, session.steps) or step % session.config.validation.every_steps == 0
    if not due or progress.validated == step or not session.validation_sets:
        return progress
    _validate(session, step)
    return replace(progress, validated=step)


def _validate(session: Session, step: int) -> None:
    engine, device = session.engine, session.ranks.device

    def loss(batch: Batch) -> LossOutput:
        inputs, _ = to_device(batch, device)
        return engine.forward_loss(*inputs)

    values: dict[str, float] = {}
    with engine.evaluating():
        for name, batches in session.validation_sets.items():
            score = evaluate_text(loss, batches, session.ranks, lambda _rows: session.go_on())
            values[f"validation/{name}/loss"] = score.loss
            values[f"validation/{name}/bits_per_byte"] = score.bits_per_byte
            console.info(
                f"step {step} | held-out {name}: loss {score.loss:.4f} nats/token, "
                f"{score.bits_per_byte:.4f} bits/byte over {score.tokens:,} tokens"
            )
    session.metrics.step(step, values)
