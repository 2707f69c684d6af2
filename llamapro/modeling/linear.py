"""The linear layer of frozen blocks: it keeps nothing for the backward pass but a reference to its own weight.

torch's own linear does the same, but DeepSpeed's stage 3 replaces `torch.nn.functional.linear` for the whole process by
one that keeps every input, frozen or not. The reference is to the parameter, not to its data: stage 3 frees the data
after the forward pass and gathers it again before the backward pass of the same module.
"""

from typing import Any

import torch
from torch import nn


class FrozenLinear(nn.Linear):
    """y = x Wᵀ + b with an input gradient and no weight gradient. Made from an `nn.Linear` by `freeze_linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features)."""
        return frozen_linear(input, self.weight, self.bias)


def freeze_linear(linear: nn.Linear) -> None:
    """Turn a linear layer into a `FrozenLinear` in place; names, parameters and hooks stay."""
    linear.__class__ = FrozenLinear


def frozen_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + b, differentiable in x only."""
    output: torch.Tensor = _FrozenLinear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return output


def plain_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + b by torch's own kernel, whatever `torch.nn.functional.linear` has been replaced by."""
    output: torch.Tensor = torch.ops.aten.linear.default(input, weight, bias)
    return output


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return plain_linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return output_gradients[0].matmul(ctx.weight), None, None
