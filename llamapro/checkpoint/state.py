"""What a checkpoint is made of: named float32 slices, handed over by the engine through one small protocol.

Nothing here knows ZeRO: a slice is a parameter's name, where it starts in the flattened parameter, and its elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

MASTER = "master"
"""Key of the float32 weights; the other keys of a fragment are the optimizer's own, e.g. exp_avg and exp_avg_sq."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous slice of one trainable parameter with its optimizer state.

    Attributes:
        name: the parameter's name in the Hugging Face model.
        start: index of the slice's first element in the flattened parameter.
        shape: of the whole parameter.
        tensors: key ("master", "exp_avg", "exp_avg_sq") to a 1-D float32 tensor; all of one length. Views of live
            state are welcome: they are copied chunk by chunk while they are written.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    tensors: Mapping[str, torch.Tensor]

    @property
    def count(self) -> int:
        """Number of elements in the slice."""
        return int(next(iter(self.tensors.values())).numel())


ReadSlice = Callable[[str, str, int, int], "torch.Tensor"]
"""read(name, key, start, count): a 1-D float32 CPU tensor, whatever fragments the slice was saved in."""


class TrainingState(Protocol):
    """What an engine must offer to be saved and restored."""

    @property
    def optimizer_steps(self) -> int:
        """Updates applied so far (skipped steps do not count)."""

    def fragments(self) -> Iterator[Fragment]:
        """This rank's slices. Over all ranks, every element of every trainable parameter occurs exactly once."""

    def load(self, read: ReadSlice, optimizer_steps: int) -> None:
        """Replace weights, their low-precision copies and optimizer state on this rank. Called on every rank."""
