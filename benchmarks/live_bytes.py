"""Bytes of all tensors alive on the CPU, and the most there were: what `torch.cuda.max_memory_allocated` is on a GPU.

Resident memory can't say it: pages that nobody wrote don't count in it, and freed ones may stay.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """While it is entered, every storage that an operation returns is counted until it is freed.

    Attributes:
        live: bytes now; peak: the most since the beginning or `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now on, once; nothing on the meta device."""
        storage = tensor.untyped_storage()
        if storage.device.type == "meta" or id(storage) in self._known:
            return
        key, size = id(storage), storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._freed(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def reset_peak(self) -> None:
        """From now on the peak is of what follows."""
        self.peak = self.live

    def _freed(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size
