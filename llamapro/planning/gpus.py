"""Data-sheet figures of accelerators. An unknown one has no figures, rather than those of another."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from llamapro.errors import UserError

_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """One row.

    Attributes:
        name: as people say it, e.g. "h100"; its words must all be in the device's own name.
        bf16_flops: peak dense bf16 rate, FLOP/s, without sparsity, as on the data sheet.
        memory_gib: usable device memory, GiB.
        memory_bandwidth: of the device memory, bytes per second.
        link_bandwidth: to other GPUs of the same machine, bytes per second in one direction: NVLink, or PCIe.
    """

    name: str
    bf16_flops: float
    memory_gib: float
    memory_bandwidth: float
    link_bandwidth: float


GPUS: Final = (
    Gpu("b300", 2250 * _TERA, 268.0, 8 * _TERA, 900 * _GIGA),
    Gpu("b200", 2250 * _TERA, 179.0, 8 * _TERA, 900 * _GIGA),
    Gpu("gh200", 989 * _TERA, 95.0, 4 * _TERA, 450 * _GIGA),
    Gpu("h200", 989 * _TERA, 140.0, 4.8 * _TERA, 450 * _GIGA),
    Gpu("h200 nvl", 835 * _TERA, 140.0, 4.8 * _TERA, 450 * _GIGA),
    Gpu("h100", 989 * _TERA, 79.0, 3.35 * _TERA, 450 * _GIGA),
    Gpu("h100 pcie", 756 * _TERA, 79.0, 2 * _TERA, 64 * _GIGA),
    Gpu("h100 nvl", 835 * _TERA, 93.0, 3.9 * _TERA, 300 * _GIGA),
    Gpu("h800", 989 * _TERA, 79.0, 3.35 * _TERA, 200 * _GIGA),
    Gpu("h20", 148 * _TERA, 95.0, 4 * _TERA, 450 * _GIGA),
    Gpu("a100", 312 * _TERA, 79.0, 2.039 * _TERA, 300 * _GIGA),
    Gpu("a100 40gb", 312 * _TERA, 39.0, 1.555 * _TERA, 300 * _GIGA),
    Gpu("a800", 312 * _TERA, 79.0, 2.039 * _TERA, 200 * _GIGA),
    Gpu("a40", 149.7 * _TERA, 44.5, 0.696 * _TERA, 32 * _GIGA),
    Gpu("a30", 165 * _TERA, 23.5, 0.933 * _TERA, 32 * _GIGA),
    Gpu("a10", 125 * _TERA, 22.0, 0.6 * _TERA, 32 * _GIGA),
    Gpu("a10g", 70 * _TERA, 22.0, 0.6 * _TERA, 32 * _GIGA),
    Gpu("l40s", 362 * _TERA, 44.5, 0.864 * _TERA, 32 * _GIGA),
    Gpu("l40", 181 * _TERA, 44.5, 0.864 * _TERA, 32 * _GIGA),
    Gpu("l4", 121 * _TERA, 22.0, 0.3 * _TERA, 32 * _GIGA),
    Gpu("rtx a6000", 154.8 * _TERA, 47.5, 0.768 * _TERA, 32 * _GIGA),
    Gpu("rtx 4090", 165.2 * _TERA, 23.5, 1.008 * _TERA, 32 * _GIGA),
    Gpu("rtx 3090", 71 * _TERA, 23.5, 0.936 * _TERA, 32 * _GIGA),
    Gpu("mi300x", 1307.4 * _TERA, 191.0, 5.3 * _TERA, 448 * _GIGA),
)


def find_gpu(device_name: str) -> Gpu | None:
    """The row of a device by the name that its driver reports, e.g. "NVIDIA H100 80GB HBM3"; None if unknown.

    Whole words are compared: an L40S is no L4. Of several rows that match, the one with the most words counts.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    matching = [gpu for gpu in GPUS if set(gpu.name.split()) <= words]
    return max(matching, key=lambda gpu: len(gpu.name.split()), default=None)


def gpu_named(name: str) -> Gpu:
    """The row that a user names, e.g. "h100".

    Raises:
        UserError: there is no such row; names the nearest.
    """
    gpu = find_gpu(name)
    if gpu is None:
        names = [row.name for row in GPUS]
        nearest = get_close_matches(name.lower(), names, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"--gpu {name!r} is not in the table{hint} (known: {', '.join(names)})")
    return gpu


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 rate of a device in FLOP/s; None if unknown (CPUs too), and MFU is then not stated."""
    gpu = find_gpu(device_name)
    return gpu.bf16_flops if gpu else None
