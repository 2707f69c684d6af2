"""What is loaded equals what was saved, bit for bit, whatever the number of ranks and the way of cutting."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llamapro.checkpoint.discover import find_checkpoint
from llamapro.checkpoint.folder import open_checkpoint
from llamapro.checkpoint.restore import load_checkpoint
from llamapro.checkpoint.save import save_checkpoint
from llamapro.checkpoint.tensors import CheckpointTensors
from llamapro.errors import CheckFailed, Corrupted
from llamapro.ranks import Ranks
from tests.support.checkpoint import (
    KEYS,
    SHAPES,
    SlicedState,
    gathered,
    on_threads,
    random_values,
    same_values,
    save_solo,
)
from tests.support.pool import WorkerPool

NAME = "model.layers.1.mlp.up_proj.weight"


def save_share(ranks: Ranks, root: Path, cut: str) -> Path:
    state = SlicedState(random_values(3), ranks.rank, ranks.world_size, cut)
    return save_checkpoint(root, 12, state, {"step": 12}, None, ranks)


def load_share(ranks: Ranks, root: Path, cut: str) -> SlicedState:
    checkpoint = find_checkpoint(root, ranks)
    assert checkpoint is not None
    state = SlicedState(None, ranks.rank, ranks.world_size, cut)
    state.optimizer_steps = 0
    load_checkpoint(checkpoint, state, ranks)
    return state


@pytest.mark.parametrize("cuts", [("parameter", "parameter"), ("parameter", "flat"), ("flat", "parameter")])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2), (2, 3), (3, 2), (4, 4), (1, 40)])
def test_loading_at_any_world_size_is_bit_exact(tmp_path: Path, sizes: tuple[int, int], cuts: tuple[str, str]) -> None:
    root = tmp_path / "checkpoints"
    on_threads(sizes[0], lambda ranks: save_share(ranks, root, cuts[0]))
    states = on_threads(sizes[1], lambda ranks: load_share(ranks, root, cuts[1]))
    assert same_values(gathered(states), random_values(3))
    assert not same_values(gathered(states), random_values(4))
    assert {state.optimizer_steps for state in states} == {17}


def save_and_load_with_processes(ranks: Ranks, root: str) -> bool:
    save_share(ranks, Path(root), "flat")
    state = load_share(ranks, Path(root), "parameter")
    fresh = SlicedState(random_values(3), ranks.rank, ranks.world_size, "parameter")
    return all(
        torch.equal(state.slices[name][1][key], fresh.slices[name][1][key]) for name in fresh.slices for key in KEYS
    )


def test_saving_and_loading_over_a_real_process_group(tmp_path: Path, pool: WorkerPool) -> None:
    root = tmp_path / "checkpoints"
    assert pool.run(save_and_load_with_processes, str(root)) == [True, True]
    assert same_values(gathered([load_share(Ranks.solo(), root, "flat")]), random_values(3))


def test_a_slice_reads_only_its_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkpoints"
    on_threads(3, lambda ranks: save_share(ranks, root, "parameter"))
    tensors = CheckpointTensors.open(root / "step-00000012")
    read: list[int] = []
    preadv = os.preadv

    def recorded(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(sum(len(buffer) for buffer in buffers))
        return int(preadv(descriptor, buffers, offset))

    monkeypatch.setattr("os.preadv", recorded)
    whole = random_values(3)[NAME]["exp_avg"].numpy()
    for start in range(35):
        for count in range(36 - start):
            read.clear()
            assert np.array_equal(tensors.read(NAME, "exp_avg", start, count), whole[start : start + count])
            assert sum(read) == 4 * count


def test_read_master_streams_the_whole_parameter(tmp_path: Path) -> None:
    tensors = CheckpointTensors.open(save_solo(tmp_path / "checkpoints", 1, seed=3))
    assert set(tensors.names()) == set(SHAPES) and tensors.shape(NAME) == (5, 7)
    chunks = list(tensors.read_master(NAME, chunk_elements=8))
    assert [len(chunk) for chunk in chunks] == [8, 8, 8, 8, 3]
    assert np.array_equal(np.concatenate(chunks), random_values(3)[NAME]["master"].numpy())


@pytest.mark.parametrize(
    ("request_", "named"),
    [(("nothing", "master", 0, 1), "nothing"), ((NAME, "momentum", 0, 1), "momentum"), ((NAME, "master", 30, 6), "36")],
)
def test_what_is_not_in_the_checkpoint_is_refused_by_name(
    tmp_path: Path, request_: tuple[str, str, int, int], named: str
) -> None:
    tensors = CheckpointTensors.open(save_solo(tmp_path / "checkpoints", 1, seed=3))
    with pytest.raises(Corrupted, match=named):
        tensors.read(*request_)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.2.mlp.up_proj.weight": (2,)}, "does not hold model.layers.2.mlp.up_proj.weight"),
        ({NAME: (7, 5)}, "has shape"),
        ({NAME: None}, "which this run does not train"),
    ],
)
def test_other_trainable_parameters_are_refused_before_anything_is_loaded(
    tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    checkpoint = open_checkpoint(save_solo(tmp_path / "checkpoints", 1, seed=3))
    shapes = {name: shape for name, shape in {**SHAPES, **change}.items() if shape is not None}

    def work(ranks: Ranks) -> SlicedState:
        state = SlicedState(None, ranks.rank, ranks.world_size, "flat", shapes)
        with pytest.raises(CheckFailed, match=message):
            load_checkpoint(checkpoint, state, ranks)
        return state

    states = on_threads(2, work)
    loaded = [tensors["master"].abs().max() for state in states for _, tensors in state.slices.values()]
    assert max(loaded) == 0


def test_reading_a_checkpoint_needs_no_torch() -> None:
    code = "import sys, llamapro.checkpoint.tensors; sys.exit(any(m in sys.modules for m in ('torch', 'deepspeed')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
