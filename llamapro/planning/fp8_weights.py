"""Which weights of a frozen block are held in FP8: decided by their sizes, so that a plan knows what training will do.

Linear layers whose two sizes are multiples of 16, as the matrix units want them. Experts, three-dimensional parameters
that no linear layer multiplies with, stay as they are, and so does the layer that chooses among them: its outputs are
compared with each other, and a rounded one sends a token to another expert.
"""

from typing import Final

from torch import nn
from transformers.pytorch_utils import Conv1D

MULTIPLE: Final = 16
SCALE_BYTES: Final = 4
PLAIN_LINEARS: Final = (nn.Linear, Conv1D)


def fp8_linears(block: nn.Module, classes: tuple[type, ...] = PLAIN_LINEARS) -> list[tuple[str, nn.Module]]:
    """The linear layers of a block whose weights are held in FP8 when the block is frozen, by name.

    Args:
        classes: exactly these count as linear layers; subclasses may compute something else.
    """
    experts = {parameter.shape[0] for parameter in block.parameters() if parameter.ndim == 3}
    return [
        (name, module)
        for name, module in block.named_modules()
        if type(module) in classes and _has_sizes_for_fp8(module) and outputs(module) not in experts
    ]


def outputs(linear: nn.Module) -> int:
    """The number of values that a linear layer gives; GPT-2's keeps its weight transposed."""
    return int(linear.nf if isinstance(linear, Conv1D) else linear.out_features)  # type: ignore[arg-type]


def saved_bytes(block: nn.Module) -> int:
    """How many bytes fewer a frozen block takes in FP8 than in bf16: one per weight, less a scale per output."""
    return sum(_weight(linear).numel() - SCALE_BYTES * outputs(linear) for _, linear in fp8_linears(block))


def _has_sizes_for_fp8(linear: nn.Module) -> bool:
    return all(size % MULTIPLE == 0 for size in _weight(linear).shape)


def _weight(linear: nn.Module) -> nn.Parameter:
    weight = linear.weight
    assert isinstance(weight, nn.Parameter)
    return weight
