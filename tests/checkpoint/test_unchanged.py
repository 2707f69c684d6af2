"""What every rank holds for itself: one changed bit on any rank is named on all of them."""

import numpy as np
import pytest
import torch

from llamapro.checkpoint.unchanged import changed_on_any_rank, differing_between_ranks, folds_of
from llamapro.files.digests import FOLD_MASK, fold
from llamapro.ranks import Ranks
from tests.support.checkpoint import on_threads

RANKS = 3


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(33, 48, generator=generator).to(torch.float8_e4m3fn)
    return {"q.codes": codes, "q.scales": torch.rand(33, 1, generator=generator), "k.codes": codes.clone()}


def test_folds_are_those_of_the_bytes() -> None:
    for name, found in folds_of(tensors()).items():
        values = tensors()[name]
        data = values.view(torch.uint8).numpy().tobytes()
        assert found & FOLD_MASK == fold(data, values.element_size()), name
    assert np.array_equal(tensors()["q.codes"].view(torch.uint8), tensors()["k.codes"].view(torch.uint8))


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("name", ["q.codes", "q.scales"])
def test_one_bit_on_one_rank_is_named_on_all(rank: int, name: str) -> None:
    def work(ranks: Ranks) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        held = tensors()
        start = folds_of(held)
        before = changed_on_any_rank(start, folds_of(held), ranks)
        if ranks.rank == rank:
            held[name].view(torch.uint8).view(-1)[17] ^= 1
        now = folds_of(held)
        return before, changed_on_any_rank(start, now, ranks), differing_between_ranks(now, ranks)

    assert on_threads(RANKS, work) == [((), (name,), (name,))] * RANKS


def test_equal_ranks_differ_in_nothing() -> None:
    assert on_threads(RANKS, lambda ranks: differing_between_ranks(folds_of(tensors()), ranks)) == [()] * RANKS
