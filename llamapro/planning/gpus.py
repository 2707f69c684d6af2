"""Data-sheet figures of accelerators. An unknown one has no figures, rather than those of another."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from llamapro.errors import UserError

_TERA = 1e12


@dataclass(frozen=True)
class Gpu:
    """One row.

    Attributes:
        name: as people say it, e.g. "h100"; its words must all be in the device's own name.
        bf16_flops: peak dense bf16 rate, FLOP/s, without sparsity, as on the data sheet.
        memory_gib: usable device memory, GiB.
    """

    name: str
    bf16_flops: float
    memory_gib: float


GPUS: Final = (
    Gpu("b300", 2250 * _TERA, 268.0),
    Gpu("b200", 2250 * _TERA, 179.0),
    Gpu("gh200", 989 * _TERA, 95.0),
    Gpu("h200", 989 * _TERA, 140.0),
    Gpu("h200 nvl", 835 * _TERA, 140.0),
    Gpu("h100", 989 * _TERA, 79.0),
    Gpu("h100 pcie", 756 * _TERA, 79.0),
    Gpu("h100 nvl", 835 * _TERA, 93.0),
    Gpu("h800", 989 * _TERA, 79.0),
    Gpu("h20", 148 * _TERA, 95.0),
    Gpu("a100", 312 * _TERA, 79.0),
    Gpu("a100 40gb", 312 * _TERA, 39.0),
    Gpu("a800", 312 * _TERA, 79.0),
    Gpu("a40", 149.7 * _TERA, 44.5),
    Gpu("a30", 165 * _TERA, 23.5),
    Gpu("a10", 125 * _TERA, 22.0),
    Gpu("a10g", 70 * _TERA, 22.0),
    Gpu("l40s", 362 * _TERA, 44.5),
    Gpu("l40", 181 * _TERA, 44.5),
    Gpu("l4", 121 * _TERA, 22.0),
    Gpu("rtx a6000", 154.8 * _TERA, 47.5),
    Gpu("rtx 4090", 165.2 * _TERA, 23.5),
    Gpu("rtx 3090", 71 * _TERA, 23.5),
    Gpu("mi300x", 1307.4 * _TERA, 191.0),
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
