"""Prove that what every rank holds for itself is the same on all of them, and stays what it was at the start.

For tensors that no file has, so that no record can say what they should be: weights put into FP8 when they were read.
"""

from collections.abc import Mapping

import torch

from llamapro.checkpoint.frozen import torch_fold
from llamapro.ranks import Ranks

Folds = dict[str, int]


def folds_of(tensors: Mapping[str, torch.Tensor]) -> Folds:
    """The fold (`llamapro.files.digests.fold`) of each tensor as this rank holds it, in 64 signed bits."""
    return {name: int(torch_fold(tensor.detach().flatten(), 0)) for name, tensor in tensors.items()}


def changed_on_any_rank(before: Mapping[str, int], now: Mapping[str, int], ranks: Ranks) -> tuple[str, ...]:
    """The names whose fold is another one on at least one rank; collective, and the same on every rank."""
    mine = [name for name, fold in before.items() if now[name] != fold]
    return tuple(sorted({name for names in ranks.all_gather_json(mine) for name in names}))


def differing_between_ranks(folds: Mapping[str, int], ranks: Ranks) -> tuple[str, ...]:
    """The names whose fold is not that of rank 0 everywhere; collective, and the same on every rank."""
    first: Mapping[str, int] = ranks.broadcast_json(dict(folds))
    return changed_on_any_rank(first, folds, ranks)
