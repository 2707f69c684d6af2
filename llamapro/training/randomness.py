"""Random numbers as a function of (seed, step, rank): no generator state is stored, any world size means the same."""

import random

import numpy as np
import torch
import xxhash


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python, numpy and torch for one step of one rank."""
    value = xxhash.xxh3_64_intdigest(f"{seed}/{step}/{rank}".encode())
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.manual_seed(value & (2**63 - 1))
