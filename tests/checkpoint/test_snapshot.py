"""The snapshot holds the state of the moment it was taken, in memory of exactly the state's size."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llamapro.checkpoint.rank_file import plan_rank_file, write_rank_file
from llamapro.checkpoint.snapshot import SnapshotMemory
from tests.support.checkpoint import SlicedState, random_values

ELEMENTS = 3 * (5 * 7 + 3 + 11 + 2 * 3 * 4)


def tensors_of(state: SlicedState) -> list[torch.Tensor]:
    return [tensor for fragment in state.fragments() for tensor in fragment.tensors.values()]


@pytest.mark.parametrize("chunk_elements", [1, 7, ELEMENTS - 1, ELEMENTS, 1 << 24])
def test_all_elements_in_order_whatever_the_chunks(chunk_elements: int) -> None:
    tensors = tensors_of(SlicedState(random_values(3)))
    memory = SnapshotMemory(tensors, chunk_elements)
    assert torch.equal(torch.cat(memory.copy(tensors)), torch.cat(tensors))
    assert memory.nbytes == 4 * ELEMENTS == sum(chunk.nbytes for chunk in memory.copy(tensors))


def test_later_changes_of_the_state_do_not_reach_the_snapshot() -> None:
    state = SlicedState(random_values(3))
    live = tensors_of(state)
    before = torch.cat(live)
    taken = SnapshotMemory.for_state(state).copy(live)
    for tensor in live:
        tensor.mul_(2)
    assert torch.equal(torch.cat(taken), before) and not torch.equal(torch.cat(live), before)


def test_the_next_snapshot_takes_the_same_memory() -> None:
    state = SlicedState(random_values(3))
    memory = SnapshotMemory.for_state(state)
    first = [chunk.data_ptr() for chunk in memory.copy(tensors_of(state))]
    tensors_of(state)[0].mul_(2)
    second = memory.copy(tensors_of(state))
    assert [chunk.data_ptr() for chunk in second] == first
    assert torch.equal(torch.cat(second), torch.cat(tensors_of(state)))


def test_a_file_of_the_snapshot_has_the_bytes_of_a_file_of_the_state(tmp_path: Path) -> None:
    state = SlicedState(random_values(3))
    plan = plan_rank_file("a", list(state.fragments()))
    copy = replace(plan, tensors=SnapshotMemory(tensors_of(state), 50).copy(plan.tensors))
    assert write_rank_file(tmp_path / "live", plan) == write_rank_file(tmp_path / "copy", copy)
    assert (tmp_path / "live").read_bytes() == (tmp_path / "copy").read_bytes()


def test_a_state_of_another_size_is_a_bug() -> None:
    tensors = tensors_of(SlicedState(random_values(3)))
    with pytest.raises(AssertionError, match="do not fill"):
        SnapshotMemory(tensors).copy(tensors[1:])


def test_a_rank_without_a_share_needs_no_memory() -> None:
    memory = SnapshotMemory([])
    assert memory.nbytes == 0 and memory.copy([]) == ()


@pytest.mark.gpu
def test_on_a_gpu_the_memory_is_pinned_and_the_copy_is_done_when_it_returns() -> None:
    live = torch.randn(40_000_000, device="cuda")
    expected = live.cpu()
    memory = SnapshotMemory([live])
    taken = memory.copy([live])
    live.zero_()
    assert memory.pinned and all(chunk.is_pinned() for chunk in taken)
    assert torch.equal(torch.cat(taken), expected)
