"""A copy of this rank's state in host memory, which may be written while training changes the state itself."""

from collections.abc import Sequence

import torch

from llamapro.checkpoint.layout import FLOAT32_BYTES
from llamapro.checkpoint.state import TrainingState

CHUNK_ELEMENTS = 1 << 24
"""64 MiB: torch takes pinned memory in powers of two, so one piece for all could need twice its size."""


class SnapshotMemory:
    """Host memory for exactly one copy of some float32 tensors, taken once and used by every save.

    It is pinned where the tensors are on a GPU: the copy is as fast as the bus, and training stands still only for it.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], chunk_elements: int = CHUNK_ELEMENTS) -> None:
        self._elements = sum(tensor.numel() for tensor in tensors)
        self._chunk_elements = chunk_elements
        self.pinned = any(tensor.is_cuda for tensor in tensors)
        self._chunks = tuple(
            torch.empty(min(chunk_elements, self._elements - low), dtype=torch.float32, pin_memory=self.pinned)
            for low in range(0, self._elements, chunk_elements)
        )

    @classmethod
    def for_state(cls, state: TrainingState) -> "SnapshotMemory":
        """Memory for what this rank saves."""
        return cls([tensor for fragment in state.fragments() for tensor in fragment.tensors.values()])

    @property
    def nbytes(self) -> int:
        """Its size."""
        return FLOAT32_BYTES * self._elements

    def copy(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The elements of all tensors as they are now, one after the other, cut anew; overwrites the copy before.

        Args:
            tensors: 1-D float32, as many elements in all as the memory was made for.
        """
        total = sum(tensor.numel() for tensor in tensors)
        assert total == self._elements, f"{total} elements do not fill memory for {self._elements}"
        position = 0
        for tensor in tensors:
            position = self._copy_one(tensor.detach(), position)
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return self._chunks

    def _copy_one(self, values: torch.Tensor, position: int) -> int:
        """Copy a tensor to the elements from `position`; returns where the next one begins."""
        while values.numel():
            index, low = divmod(position, self._chunk_elements)
            room = self._chunks[index][low : low + values.numel()]
            room.copy_(values[: room.numel()], non_blocking=True)
            values, position = values[room.numel() :], position + room.numel()
        return position
