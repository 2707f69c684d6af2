"""One optimizer step: accumulate gradients over the micro-batches, then update, or skip for a named reason.

The loss of a step is the sum over its target tokens divided by their global number, so ranks with short shares and
packed rows of unequal fill weigh every token the same.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from llamapro.data.loader import Batch
from llamapro.engine.engine import Engine
from llamapro.modeling.model import LossOutput
from llamapro.ranks import Ranks
from llamapro.training.progress import StepOutcome, StepWork


class StepGuard(Protocol):
    """Decides whether an update may be applied, from the step's loss and gradient norm."""

    def objection(self, loss: float, gradient_norm: float) -> str:
        """Why this update must be skipped; empty when it may be applied."""


class LossSums:
    """Sums of token losses of one step by source, on the device: read once, after the last micro-batch."""

    def __init__(self, source_count: int, device: torch.device) -> None:
        self._sums = torch.zeros(source_count, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(source_count, dtype=torch.float64, device=device)

    def add(self, sources: torch.Tensor, loss: LossOutput) -> None:
        """Add one micro-batch.

        Args:
            sources: (rows,) source number of each row.
        """
        self._sums.index_add_(0, sources, loss.row_loss_sums.double())
        self._tokens.index_add_(0, sources, loss.row_tokens.double())

    def over_ranks(self, ranks: Ranks) -> tuple[list[float], list[float]]:
        """Loss sums and token counts by source, over all ranks."""
        both = ranks.sum([*self._sums.tolist(), *self._tokens.tolist()])
        return both[: len(both) // 2], both[len(both) // 2 :]


def run_step(
    engine: Engine,
    work: StepWork,
    ranks: Ranks,
    *,
    learning_rate: float,
    source_names: Sequence[str],
    guard: StepGuard,
    may_continue: Callable[[], bool],
) -> StepOutcome | None:
    """Take one optimizer step.

    Args:
        may_continue: asked before each micro-batch, collectively: the same answer on every rank.

    Returns:
        What it did, or None when a stop was agreed between micro-batches: the gradients so far are dropped and the
        weights are those of the step before.
    """
    (tokens,) = ranks.sum_integers([work.valid_tokens])
    sums = LossSums(len(source_names), ranks.device)
    for batch in work.micro_batches:
        if not may_continue():
            engine.drop_gradients()
            return None
        inputs, sources = to_device(batch, ranks.device)
        loss = engine.forward_loss(*inputs)
        sums.add(sources, loss)
        engine.backward(loss.loss_sum, tokens)
    return _update(engine, sums, ranks, learning_rate, source_names, guard)


def to_device(
    batch: Batch, device: torch.device
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A batch as tensors: ((input_ids, labels, position_ids) each (rows, S), sources (rows,))."""
    arrays = (batch.input_ids, batch.labels, batch.position_ids)
    inputs, labels, positions = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
    return (inputs, labels, positions), torch.from_numpy(batch.sources).to(device)


def _update(
    engine: Engine,
    sums: LossSums,
    ranks: Ranks,
    learning_rate: float,
    source_names: Sequence[str],
    guard: StepGuard,
) -> StepOutcome:
    loss_sums, token_counts = sums.over_ranks(ranks)
    loss = sum(loss_sums) / max(1.0, sum(token_counts))
    objections: list[str] = []

    def veto(gradient_norm: float) -> bool:
        objections.append(guard.objection(loss, gradient_norm))
        return bool(objections[-1])

    result = engine.step(learning_rate, veto)
    by_source = zip(source_names, loss_sums, token_counts, strict=True)
    return StepOutcome(
        loss=loss,
        gradient_norm=result.gradient_norm,
        learning_rate=learning_rate,
        tokens=int(sum(token_counts)),
        skipped=objections[-1] if result.skipped else "",
        source_losses={name: total / count for name, total, count in by_source if count},
    )
