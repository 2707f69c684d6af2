"""What is trained, as data: blocks by their index in the decoder's own list, never names by substring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamapro.errors import ModelRefused

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters (LoRA, arXiv 2106.09685): beside a linear W, alpha / rank · B A is added to what it computes.

    Attributes:
        rank: rows of A, columns of B.
        transposed: the model holds its matrices as (in_features, out_features).
    """

    rank: int
    alpha: float
    transposed: bool = False


@dataclass(frozen=True)
class TrainableSet:
    """The parameters that learn.

    Attributes:
        blocks: indices into the decoder's list of blocks; ignored when `everything` is set.
        everything: every parameter learns: all blocks, embedding, final norm and head.
        adapters: they alone learn, beside every linear of `blocks`; None: the parameters of `blocks` do.
    """

    blocks: frozenset[int]
    everything: bool = False
    adapters: Adapters | None = None

    @classmethod
    def of(cls, blocks: Iterable[int]) -> TrainableSet:
        """Exactly these blocks."""
        return cls(frozenset(blocks))

    @classmethod
    def all(cls) -> TrainableSet:
        """Every parameter."""
        return cls(frozenset(), everything=True)

    @classmethod
    def of_adapters(cls, blocks: Iterable[int], adapters: Adapters) -> TrainableSet:
        """Adapters on exactly these blocks."""
        return cls(frozenset(blocks), adapters=adapters)

    @property
    def lowest(self) -> int | None:
        """The lowest block that learns: blocks below it need no backward pass. None when nothing learns."""
        if self.everything:
            return 0
        return min(self.blocks, default=None)

    def includes(self, block: int | None) -> bool:
        """Whether the parameters of a block learn; None stands for everything outside the blocks."""
        return self.everything or (block is not None and block in self.blocks)


def block_index(parameter_name: str, decoder_prefix: str) -> int | None:
    """The block that a parameter belongs to, or None when it lies outside the decoder's list.

    Args:
        decoder_prefix: the name of the decoder's list with its closing dot, for example "model.layers.".
    """
    if not parameter_name.startswith(decoder_prefix):
        return None
    index = parameter_name[len(decoder_prefix) :].partition(".")[0]
    return int(index) if index.isdecimal() else None


def mark_trainable(model: nn.Module, trainable: TrainableSet, decoder_prefix: str) -> list[tuple[str, nn.Parameter]]:
    """Set `requires_grad` of every parameter, and return those that learn with their names, in the model's order.

    A parameter under two names (tied embeddings) is returned once. Parameters that transformers itself doesn't train
    (the biases that balance experts, which no gradient reaches) never learn. Adapters come later (`lora`): beside them
    nothing learns.

    Raises:
        ModelRefused: the set names a block that the model doesn't have.
    """
    names = dict(model.named_parameters())
    owners = {name: block_index(name, decoder_prefix) for name in names}
    absent = sorted(trainable.blocks - {block for block in owners.values() if block is not None})
    if absent:
        blocks = 1 + max((block for block in owners.values() if block is not None), default=-1)
        raise ModelRefused(f"trainable blocks {absent} are not in the model, which has blocks 0 to {blocks - 1}")
    for name, parameter in names.items():
        learns = trainable.adapters is None and trainable.includes(owners[name])
        parameter.requires_grad_(parameter.requires_grad and learns)
    return [(name, parameter) for name, parameter in names.items() if parameter.requires_grad]
