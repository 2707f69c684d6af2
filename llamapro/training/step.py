"""One optimizer step: accumulate gradients over the micro-batches, then update, or skip for a named reason.

The loss of a step is the sum over its target tokens divided by their global number, so ranks with short shares and
packed rows of unequal fill weigh every token the same.
"""

from collections.abc import Sequence

import torch

from llamapro.data.loader import Batch
from llamapro.modeling.model import LossOutput
from llamapro.ranks import Ranks
from llamapro.training.progress import StepOutcome, StepWork
from llamapro.training.replay import replay_objective
from llamapro.training.session import Session, StopAsked

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class LossSums:
    """Sums of token losses of one step by source, and of divergences from the base, on the device.

    Read once, after the last micro-batch.
    """

    def __init__(self, source_count: int, device: torch.device) -> None:
        self._sums = torch.zeros(source_count, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(source_count, dtype=torch.float64, device=device)
        self._divergence = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, sources: torch.Tensor, loss: LossOutput) -> None:
        """Add one micro-batch.

        Args:
            sources: (rows,) source number of each row.
        """
        self._sums.index_add_(0, sources, loss.row_loss_sums.double())
        self._tokens.index_add_(0, sources, loss.row_tokens.double())
        if loss.divergence_sum is not None:
            self._divergence += loss.divergence_sum.double()

    def over_ranks(self, ranks: Ranks) -> tuple[list[float], list[float], float]:
        """Loss sums and token counts by source, and the sum of divergences, over all ranks."""
        *both, divergence = ranks.sum([*self._sums.tolist(), *self._tokens.tolist(), float(self._divergence)])
        return both[: len(both) // 2], both[len(both) // 2 :], divergence


def run_step(session: Session, work: StepWork, learning_rate: float) -> StepOutcome:
    """Take one optimizer step; collective.

    Raises:
        StopAsked: a stop was agreed between micro-batches. The gradients so far are dropped: the weights are those
            of the step before.
    """
    engine, ranks, objective = session.engine, session.ranks, replay_objective(session.config, session.facts)
    tokens, *replayed = ranks.sum_integers([work.valid_tokens, *map(objective.targets, work.micro_batches)])
    sums = LossSums(len(session.source_names), ranks.device)
    for batch, targets in zip(work.micro_batches, replayed, strict=True):
        try:
            session.go_on()
        except StopAsked:
            engine.drop_gradients()
            raise
        inputs, sources = to_device(batch, ranks.device)
        loss = engine.forward_loss(*inputs, objective.of(batch, ranks.device) if targets else None)
        sums.add(sources, loss)
        engine.backward(loss.loss_sum, tokens)
    return _update(session, sums, sum(replayed), learning_rate)


def to_device(batch: Batch, device: torch.device) -> tuple[Inputs, torch.Tensor]:
    """A batch as tensors: ((input_ids, labels, position_ids) each (rows, S) and boundaries, sources (rows,))."""
    arrays = (batch.input_ids, batch.labels, batch.position_ids, batch.boundaries)
    ids, labels, positions, boundaries = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
    return (ids, labels, positions, boundaries), torch.from_numpy(batch.sources).to(device)


def _update(session: Session, sums: LossSums, replayed: int, learning_rate: float) -> StepOutcome:
    loss_sums, token_counts, divergence = sums.over_ranks(session.ranks)
    loss = sum(loss_sums) / max(1.0, sum(token_counts))
    objections: list[str] = []

    def veto(gradient_norm: float) -> bool:
        objections.append(session.guard.objection(loss, gradient_norm))
        return bool(objections[-1])

    result = session.engine.step(learning_rate, veto)
    return StepOutcome(
        loss=loss,
        gradient_norm=result.gradient_norm,
        learning_rate=learning_rate,
        tokens=int(sum(token_counts)),
        skipped=objections[-1] if result.skipped else "",
        source_losses=_means(session.source_names, loss_sums, token_counts),
        source_tokens={name: int(n) for name, n in zip(session.source_names, token_counts, strict=True)},
        replay_kl=divergence / replayed if replayed else None,
    )


def _means(names: Sequence[str], sums: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    return {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}
