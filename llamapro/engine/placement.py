"""Which ranks of a job run on which host and device, told at every start."""

import os
import socket
from collections.abc import Sequence

import torch

from llamapro.ranks import Ranks


def describe_placement(ranks: Ranks, host: str | None = None) -> list[str]:
    """Which ranks run where, one line per host: "gpu01: ranks 0-7 on GPU 0-7, NVIDIA H100 80GB HBM3".

    Every rank must call it.

    Args:
        host: this rank's; None: as the machine calls itself.
    """
    own = [host or socket.gethostname(), _physical_gpu(ranks.device), _device_name(ranks.device)]
    places = ranks.all_gather_json(own)
    lines = []
    for name in dict.fromkeys(place[0] for place in places):
        here = [(rank, gpu, device) for rank, (where, gpu, device) in enumerate(places) if where == name]
        members, gpus, devices = zip(*here, strict=True)
        on = f"GPU {_listed(gpus)}, " if "" not in gpus else ""
        numbers = f"rank{'s' if len(members) > 1 else ''} {_listed(members)}"
        lines.append(f"{name}: {numbers} on {on}{', '.join(dict.fromkeys(devices))}")
    return lines


def _physical_gpu(device: torch.device) -> str:
    """The number that the machine gives this rank's GPU; empty on a CPU."""
    if device.type != "cuda":
        return ""
    index = device.index or 0
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    return visible[index] if index < len(visible) else str(index)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU with {threads} thread{'s' if threads != 1 else ''} each"


def _listed(numbers: Sequence[object]) -> str:
    """0, 1, 2 as "0-2"; otherwise one by one."""
    texts = [str(number) for number in numbers]
    if len(texts) > 2 and all(text.isdecimal() for text in texts):
        first, last = int(texts[0]), int(texts[-1])
        if [int(text) for text in texts] == list(range(first, last + 1)):
            return f"{first}-{last}"
    return ", ".join(texts)
