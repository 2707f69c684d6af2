"""Cross-entropy from hidden states, a few tokens at a time, so that full-sequence float32 logits never exist.

The head module computes the loss itself: one call of the module, whatever the number of chunks, so that DeepSpeed's
stage 3 gathers its weight once. The forward pass already forms the gradient of each chunk (the loss is a sum, so the
backward pass only scales it): nothing is computed twice, and what is kept is as large as the hidden states.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llamapro.modeling.linear import frozen_linear, plain_linear
from llamapro.modeling.logits import HeadSteps, Step

IGNORED_LABEL = -100
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}
ChunkLoss = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""`chunk_loss`, or the same compiled."""
Beside = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, ...]]
"""Of the states before the projection, its weight and its bias: what else the call of the head that computes the loss
is to compute."""


class LossHead(nn.Linear):
    """The output projection, able to return the loss instead of logits; `make_loss_head` makes it from a linear.

    Attributes:
        steps: what the model computes before and after the projection.
        chunk_loss: computes the loss of some rows of logits.
    """

    steps: HeadSteps
    chunk_loss: ChunkLoss

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, labels: torch.Tensor | None = None, beside: Beside | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Logits, or with labels the loss.

        Args:
            input: (…, hidden) final hidden states.
            labels: (…) int64, the target of each position; -100 where there is none.
            beside: what else to compute with labels.

        Returns:
            (…, vocabulary) logits; with labels the scalar float32 sum of all token losses, differentiable, and the
            (…) float32 token losses, not differentiable, 0 where there is no target; then what `beside` returns.
        """
        states = self.steps.before(input)
        if labels is not None:
            loss = cross_entropy(states, self.weight, self.bias, labels, self.steps.after, self.chunk_loss)
            return loss if beside is None else (*loss, *beside(states, self.weight, self.bias))
        linear = plain_linear if self.weight.requires_grad else frozen_linear
        return self.steps.after(linear(states, self.weight, self.bias))


def make_loss_head(linear: nn.Linear, steps: HeadSteps) -> None:
    """Turn an output projection into a `LossHead` in place; names, parameters and hooks stay."""
    linear.__class__ = LossHead
    linear.steps = steps  # type: ignore[assignment]
    linear.chunk_loss = chunk_loss  # type: ignore[assignment]


def cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    step: Step,
    of_chunk: ChunkLoss,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of `LossHead.forward`. Softmax in float32, also where hidden states and weight are bf16.

    Args:
        step: what makes logits of the projection's result.
        of_chunk: `chunk_loss`, or the same compiled.
    """
    states, targets = hidden.flatten(0, -2), labels.flatten()
    chosen = None
    if states.device.type == "cpu":  # elsewhere selecting would wait for the device and change shapes every batch
        chosen = (targets != IGNORED_LABEL).nonzero().flatten()
        states, targets = states[chosen], targets[chosen]
    loss_sum, losses = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        states, weight, bias, targets, step, of_chunk, torch.is_grad_enabled()
    )
    if chosen is not None:
        losses = losses.new_zeros(labels.numel()).index_copy_(0, chosen, losses)
    return loss_sum, losses.view(labels.shape)


class _Gradients:
    """Gradients of the summed loss, filled chunk by chunk; weight and bias accumulate in float32."""

    def __init__(
        self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needed: tuple[bool, ...]
    ) -> None:
        self.states = torch.empty_like(states) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None

    def add(self, chunk: slice, projected: torch.Tensor, states: torch.Tensor, weight: torch.Tensor) -> None:
        """Add one chunk from the gradient of the projection's result, in the dtype of the states."""
        if self.states is not None:
            torch.mm(projected, weight, out=self.states[chunk])
        if self.weight is not None:
            self.weight += projected.t().mm(states)
        if self.bias is not None:
            self.bias += projected.sum(0, dtype=torch.float32)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        step: Step,
        of_chunk: ChunkLoss,
        with_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needed = tuple(with_gradients and need for need in ctx.needs_input_grad[:3])
        gradients = _Gradients(states, weight, bias, needed)
        losses = torch.empty_like(targets, dtype=torch.float32)
        rows = chunk_rows(states.device, weight.shape[0])
        for low in range(0, len(states), rows):
            chunk = slice(low, low + rows)
            projected = plain_linear(states[chunk], weight, bias)
            losses[chunk], gradient = of_chunk(projected, targets[chunk], step, any(needed))
            if gradient is not None:
                gradients.add(chunk, gradient, states[chunk], weight)
        ctx.save_for_backward(gradients.states, gradients.weight, gradients.bias)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight, bias = ctx.saved_tensors
        scale = output_gradients[0]
        scaled_states = None if states is None else (states.float() * scale).to(states.dtype)
        scaled_weight, scaled_bias = (
            None if total is None else (total * scale).to(ctx.weight_dtype) for total in (weight, bias)
        )
        return scaled_states, scaled_weight, scaled_bias, None, None, None, None


def chunk_loss(
    projected: torch.Tensor, targets: torch.Tensor, step: Step, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Float32 loss of each row of the projection's result, and the gradient of that result, in its dtype.

    Both are 0 where there is no target.
    """
    logits = step(projected)
    scored = targets != IGNORED_LABEL
    columns = targets.clamp(min=0).unsqueeze(1)
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    losses = log_probabilities.gather(1, columns).squeeze(1).neg().masked_fill(~scored, 0.0)
    if not with_gradient:
        return losses, None
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, columns, torch.full_like(columns, -1, dtype=torch.float32))
    gradient.mul_(scored.unsqueeze(1))
    return losses, step.pull_back(logits, gradient).to(projected.dtype)


def chunk_rows(device: torch.device, vocabulary: int) -> int:
    """How many rows of logits are in memory at once."""
    elements = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])
    return max(1, elements // vocabulary)
