"""Divergence of a model's predictions from its base's, a few tokens at a time, as the loss is computed.

KL(base ‖ model) at one position is Σ q (log q - log p) over the vocabulary, q being the base's probabilities; its
gradient with respect to the model's logits is p - q. The forward pass already forms the gradient of each chunk, so full
float32 logits of neither model ever exist.
"""

from functools import partial
from typing import Any, NamedTuple

import torch

from llamapro.modeling.linear import plain_linear
from llamapro.modeling.logits import Step
from llamapro.modeling.loss import IGNORED_LABEL, Beside, chunk_rows

# Logits and probabilities of two models are in memory at once: the loss has those of one.
MODELS = 2


class Replay(NamedTuple):
    """What of a batch is to be predicted as the base predicts it.

    Attributes:
        rows: (k,) int64, at least one of the batch's rows.
        boundaries: (documents + 1,) int32, `document_boundaries` of these rows alone.
        weight: what a nat of KL(base ‖ model) counts against a nat of loss.
        base_blocks: the blocks without which the model is its base.
    """

    rows: torch.Tensor
    boundaries: torch.Tensor
    weight: float
    base_blocks: tuple[int, ...]


def divergence_of_rows(replay: Replay, base_states: torch.Tensor, labels: torch.Tensor, step: Step) -> Beside:
    """What computes, from the batch's final states, the divergence at all targets of the replayed rows.

    Args:
        base_states: (k, S, hidden) final states of the base for the replayed rows, without autograd.
        labels: (rows, S) of the batch.
        step: what makes logits of the projection's result.
    """
    scored = labels.index_select(0, replay.rows) != IGNORED_LABEL
    return partial(_of_rows, rows=replay.rows, base_states=base_states, shares=replay.weight * scored, step=step)


def _of_rows(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor, **others: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return divergence(states.index_select(0, rows), weight, bias, **others)


def divergence(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    base_states: torch.Tensor,
    shares: torch.Tensor,
    step: Step,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ share · KL(base ‖ model) over positions, in nats; softmax in float32.

    Args:
        states: (…, hidden) final states of the model; base_states: of the base, without autograd.
        weight, bias: of the output projection, which both share; frozen.
        shares: (…) float32, what each position counts; 0 leaves it out.
        step: what makes logits of the projection's result.

    Returns:
        The scalar float32 sum, differentiable by `states`, and the scalar sum of the same without shares, over the
        positions that count.
    """
    assert not weight.requires_grad, "the base's head is the model's own, so it must not learn"
    own, base, flat = states.flatten(0, -2), base_states.flatten(0, -2), shares.flatten()
    if own.device.type == "cpu":  # elsewhere selecting would wait for the device and change shapes every batch
        chosen = flat.nonzero().flatten()
        own, base, flat = own[chosen], base[chosen], flat[chosen]
    values: torch.Tensor
    total, values = _ChunkedDivergence.apply(  # type: ignore[no-untyped-call]
        own, weight, bias, base, flat, step, torch.is_grad_enabled()
    )
    return total, values.sum()


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        base_states: torch.Tensor,
        shares: torch.Tensor,
        step: Step,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needed = with_gradient and ctx.needs_input_grad[0]
        gradients = torch.empty_like(states) if needed else None
        values = torch.empty_like(shares)
        rows = max(1, chunk_rows(states.device, weight.shape[0]) // MODELS)
        for low in range(0, len(states), rows):
            chunk = slice(low, low + rows)
            own, base = (plain_linear(part[chunk], weight, bias) for part in (states, base_states))
            values[chunk], gradient = chunk_divergence(own, base, shares[chunk], step, needed)
            if gradients is not None and gradient is not None:
                torch.mm(gradient, weight, out=gradients[chunk])
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(values)
        return (values * shares).sum(), values

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        scaled = None if gradients is None else (gradients.float() * output_gradients[0]).to(gradients.dtype)
        return scaled, None, None, None, None, None, None


def chunk_divergence(
    own: torch.Tensor, base: torch.Tensor, shares: torch.Tensor, step: Step, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Divergence of each row of two projections' results, and its share in the gradient of the first of them.

    Args:
        own, base: (rows, vocabulary); shares: (rows,). Both results are 0 where the share is.
    """
    logits = step(own)
    log_own = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    log_base = torch.log_softmax(step(base), dim=-1, dtype=torch.float32)
    probabilities = log_base.exp()
    values = (probabilities * log_base.sub_(log_own)).sum(-1).masked_fill(shares == 0, 0.0)
    if not with_gradient:
        return values, None
    gradient = log_own.exp_().sub_(probabilities).mul_(shares.unsqueeze(1))
    return values, step.pull_back(logits, gradient).to(own.dtype)
