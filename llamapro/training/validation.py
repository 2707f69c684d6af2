"""Held-out text scored during a run, by the same code as `llamapro evaluate`."""

from llamapro import console
from llamapro.data.loader import Batch
from llamapro.evaluation.text import evaluate_text
from llamapro.modeling.model import LossOutput
from llamapro.training.progress import Progress
from llamapro.training.session import Session
from llamapro.training.step import to_device


def validate(session: Session, progress: Progress) -> None:
    """Score every validation set, if there is any, with the model as it is; log loss and bits per byte of each."""
    engine, device = session.engine, session.ranks.device
    if not session.validation_sets:
        return

    def loss(batch: Batch) -> LossOutput:
        inputs, _ = to_device(batch, device)
        return engine.forward_loss(*inputs)

    values: dict[str, float] = {}
    with engine.evaluating():
        for name, batches in session.validation_sets.items():
            score = evaluate_text(loss, batches, session.ranks)
            values[f"validation/{name}/loss"] = score.loss
            values[f"validation/{name}/bits_per_byte"] = score.bits_per_byte
            console.info(
                f"step {progress.step} | held-out {name}: loss {score.loss:.4f} nats/token, "
                f"{score.bits_per_byte:.4f} bits/byte over {score.tokens:,} tokens"
            )
    session.metrics.step(progress.step, values)
