"""The linear layers of frozen blocks: they keep nothing for the backward pass but a reference to their weight.

torch's own linear does the same, but DeepSpeed's stage 3 replaces `torch.nn.functional.linear` for the whole process by
one that keeps every input, frozen or not. The reference is to the parameter, not to its data: stage 3 frees the data
after the forward pass and gathers it again before the backward pass of the same module.
"""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class FrozenLinear(nn.Linear):
    """y = x Wᵀ + b with an input gradient and no weight gradient. Made from an `nn.Linear` by `freeze_linears`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features)."""
        return frozen_linear(input, self.weight, self.bias)


class FrozenConv1D(Conv1D):
    """y = x W + b, as GPT-2 stores it, with an input gradient and no weight gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features)."""
        if torch.compiler.is_compiling():
            return frozen_linear(x, self.weight.t(), self.bias)
        output: torch.Tensor = _FrozenConv1D.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output


_FROZEN_CLASSES: dict[type, type] = {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D}


def freeze_linears(block: nn.Module) -> None:
    """Turn the linear layers of a block into frozen ones in place; names, parameters and hooks stay.

    Subclasses with a forward pass of their own stay as they are.
    """
    for module in block.modules():
        if type(module) in _FROZEN_CLASSES:
            module.__class__ = _FROZEN_CLASSES[type(module)]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer is one that `freeze_linears` turns into a frozen one."""
    return type(module) in _FROZEN_CLASSES


def is_frozen_linear(module: nn.Module) -> bool:
    """Whether a layer was made a frozen one."""
    return type(module) in _FROZEN_CLASSES.values()


def frozen_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + b, differentiable in x only."""
    if torch.compiler.is_compiling():  # the compiler keeps what the backward pass needs, which is the weight
        return plain_linear(input, weight.detach(), None if bias is None else bias.detach())
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
        return _no_view(plain_linear(input, weight, bias))

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return output_gradients[0].matmul(ctx.weight), None, None


class _FrozenConv1D(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return _no_view(torch.addmm(bias, input.reshape(-1, input.shape[-1]), weight).view(*input.shape[:-1], -1))

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return output_gradients[0].matmul(ctx.weight.t()), None, None


def _no_view(output: torch.Tensor) -> torch.Tensor:
    """The same tensor, not known as a view: a view made inside a function must not be changed in place, and OLMo does
    that to its queries, keys and values."""
    result: torch.Tensor = torch.ops.aten._unsafe_view.default(output, output.shape)
    return result
