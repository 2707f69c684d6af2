"""What this rank computes on, as far as planning must know it: asked before any process group exists."""

import os
from dataclasses import dataclass

import psutil
import torch

from llamapro.planning.gpus import peak_flops
from llamapro.planning.memory import DeviceKind
from llamapro.planning.plan import CPU_MICRO_TOKENS

CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """One rank's share of the machine.

    Attributes:
        name: as the driver reports it, or "cpu".
        memory_bytes: of the GPU, or this rank's equal share of the machine's memory.
        peak_flops: peak dense bf16 rate, FLOP/s; None if unknown.
        most_micro_tokens: micro-batches larger than this gain nothing; None: no such bound.
    """

    name: str
    memory_bytes: int
    peak_flops: float | None
    most_micro_tokens: int | None

    @property
    def kind(self) -> DeviceKind:
        """As torch calls it."""
        return "cpu" if self.name == CPU else "cuda"


def present_device(world_size: int) -> Device:
    """The device of this rank: a GPU where there is one, unless the environment chooses the CPU."""
    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
        return Device(properties.name, properties.total_memory, peak_flops(properties.name), None)
    return cpu_device(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def cpu_device(ranks_here: int) -> Device:
    """The CPU, shared by so many ranks."""
    return Device(CPU, psutil.virtual_memory().total // max(1, ranks_here), None, CPU_MICRO_TOKENS)
