"""Adapters at stage 3: the weights beside them are let go after the forward pass, and may be computed with again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from llamapro.modeling.recompute import recompute_blocks
from llamapro.ranks import Ranks
from tests.support.engine import Setup, joined, local_state, rank_batches, start_engine, train_step
from tests.support.models import save_tiny_llama
from tests.support.pool import WorkerPool

AT_ONCE = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def weights_kept(ranks: Ranks, setup: Setup) -> tuple[int, int]:
    """How many gathered weights of linears there were in a forward pass, and how many are still there after it."""
    engine, model = start_engine(ranks, setup)
    seen: list[StorageWeakRef] = []

    def remember(block: torch.nn.Module, *_: object) -> None:
        gathered = [parameter for name, parameter in block.named_parameters() if "base_layer" in name]
        seen.extend(StorageWeakRef(parameter.untyped_storage()) for parameter in gathered if parameter.numel())

    for block in model.blocks:
        block.register_forward_pre_hook(remember)
    output = engine.forward_loss(*next(rank_batches(0, ranks, setup)))
    left = sum(not storage.expired() for storage in seen)
    engine.backward(output.loss_sum, 1)
    engine.drop_gradients()
    engine.close()
    return len(seen), left


def test_weights_beside_adapters_go_after_the_forward_pass(tmp_path: Path, pool: WorkerPool) -> None:
    overlay = {"zero_optimization": AT_ONCE}
    setup = Setup(str(save_tiny_llama(tmp_path, blocks=6)), 3, overlay=overlay, adapter_rank=4)
    (seen, left), _ = pool.run(weights_kept, setup, world_size=2)
    assert (seen, left) == (7 * len(setup.blocks), 0)


def train(ranks: Ranks, setup: Setup, recomputed: tuple[int, ...]) -> list[object]:
    engine, model = start_engine(ranks, setup)
    recompute_blocks(model.blocks, recomputed)
    for step in range(3):
        train_step(engine, ranks, setup, step)
    state = local_state(engine)
    engine.close()
    return state


@pytest.mark.parametrize("stage", [2, 3])
def test_blocks_computed_again_train_the_same_bit_for_bit(tmp_path: Path, pool: WorkerPool, stage: int) -> None:
    setup = Setup(str(save_tiny_llama(tmp_path, blocks=6)), stage, adapter_rank=4, precision="bf16")
    first, again = (joined(pool.run(train, setup, blocks, world_size=2)) for blocks in ((), (2, 3, 4)))
    assert first.keys() == again.keys()
    for key, values in first.items():
        np.testing.assert_array_equal(values, again[key])
