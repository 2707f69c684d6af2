"""Prove that frozen weights in memory are still the record's, bit for bit, at any ZeRO stage and world size.

Each rank folds the slices it holds (`llamapro.files.digests.fold`); since the fold is a sum over elements, one integer
all-reduce for all tensors together gives the folds of the whole tensors.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import prod

import torch

from llamapro.expansion.lineage import untrained_base_tensors
from llamapro.expansion.record import ExpansionRecord
from llamapro.files.digests import FOLD_MASK, FOLD_ODD, fold
from llamapro.ranks import Ranks

CHUNK_ELEMENTS = 1 << 20
_SIGN = 1 << 63
_NAMED_AT_MOST = 5
_RECORD_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class FrozenProof:
    """Result of comparing live frozen tensors with the record.

    Attributes:
        equal: how many tensors are bit-identical.
        total: how many should be.
        different: one entry per tensor that is not: its name and what is wrong.
        claim: what is proved of the others.
    """

    equal: int
    total: int
    different: tuple[str, ...]
    claim: str = "base tensors equal the record"

    def __str__(self) -> str:
        text = f"{self.equal} of {self.total} {self.claim}"
        if not self.different:
            return text
        more = len(self.different) - _NAMED_AT_MOST
        return f"{text}; different: {', '.join(self.different[:_NAMED_AT_MOST])}" + (f" and {more} more" * (more > 0))


def prove_frozen(
    slices: Iterable[tuple[str, int, torch.Tensor]],
    record: ExpansionRecord,
    ranks: Ranks,
    trainable: Collection[str] = (),
) -> FrozenProof:
    """Compare every base tensor that was never trained with the record. Collective; all ranks get the same result.

    Args:
        slices: this rank's share: tensor name, index of the first element in the flattened tensor, 1-D values. Over
            all ranks each element occurs exactly once. Tensors that are not in the record are passed over.
        trainable: names of the parameters that this run trains; the record itself says which were trained before.
    """
    names = _expected(record, trainable)
    device = ranks.device
    folds = {name: torch.zeros(3, dtype=torch.int64, device=device) for name in names}
    for name, start, values in slices:
        if name in folds:
            stored = _RECORD_DTYPES[record.base_tensors[name].dtype]
            folds[name] += _slice_sums(values, start, stored).to(device)
    flat = torch.stack(list(folds.values())).flatten().tolist() if folds else []
    totals = ranks.sum_integers(flat)
    different = []
    for place, name in enumerate(names):
        problem = _problem(record, name, totals[3 * place : 3 * place + 3])
        if problem:
            different.append(f"{name} ({problem})")
    return FrozenProof(len(names) - len(different), len(names), tuple(different))


def torch_fold(values: torch.Tensor, start: int) -> torch.Tensor:
    """`llamapro.files.digests.fold` of a slice, as a signed 64-bit scalar on the slice's device.

    Args:
        values: 1-D, contiguous.
        start: index of the slice's first element in the flattened tensor.
    """
    if values.device.type == "cpu" and values.numel():
        data = values.view(torch.uint8).numpy().data
        return torch.tensor(_signed(fold(data, values.element_size(), start)))
    return fold_on_device(values, start)


def fold_on_device(values: torch.Tensor, start: int) -> torch.Tensor:
    """`torch_fold` by tensor operations, wherever the slice lies; on a CPU it takes more than ten times as long."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for low in range(0, values.numel(), CHUNK_ELEMENTS):
        bits = _bits(values[low : low + CHUNK_ELEMENTS])
        first = start + low
        weights = torch.arange(first, first + bits.numel(), dtype=torch.int64, device=values.device) * 2 + 1
        total += (bits * weights).sum()
    return total * _signed(FOLD_ODD)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Each element's bits as a non-negative integer (64-bit elements: modulo 2⁶⁴)."""
    size = values.element_size()
    wide = values.view(_INTEGERS[size]).to(torch.int64)
    return wide if size == 8 else wide & ((1 << 8 * size) - 1)


def _slice_sums(values: torch.Tensor, start: int, stored: torch.dtype) -> torch.Tensor:
    """(fold in the stored dtype, number of elements, elements that the stored dtype can't hold) of one slice."""
    values = values.detach().contiguous()
    cast = values.to(stored)
    inexact = (_bits(cast.to(values.dtype)) != _bits(values)).sum() if stored != values.dtype else values.new_zeros(())
    count = torch.tensor(values.numel(), dtype=torch.int64, device=values.device)
    return torch.stack([torch_fold(cast, start), count, inexact.to(torch.int64)])


def _expected(record: ExpansionRecord, trainable: Collection[str]) -> list[str]:
    """Base tensors that neither this run nor an earlier one trains or trained."""
    trains = set(trainable)
    return [name for name in untrained_base_tensors(record) if name not in trains]


def _problem(record: ExpansionRecord, name: str, sums: list[int]) -> str:
    digest = record.base_tensors[name]
    found, count, inexact = sums
    if count != prod(digest.shape):
        return f"{count} of {prod(digest.shape)} elements were looked at"
    if inexact:
        return f"{inexact} elements are not {digest.dtype} values"
    return "" if f"{found & FOLD_MASK:016x}" == digest.fold else "bits differ"


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= _SIGN else value
