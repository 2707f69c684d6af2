"""Compiled blocks under DeepSpeed: the same training within rounding, at every stage, in whole graphs.

Graphs are captured and differentiated as always, but not turned into machine code; tests/modeling does that.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamapro.modeling.compiled import BLOCKS, NOTHING, CompileChoice, compile_model
from llamapro.ranks import Ranks
from tests.support.engine import Setup, joined, local_state, rank_batches, start_engine, train_step
from tests.support.models import save_tiny_llama
from tests.support.pool import WorkerPool

STEPS = 3


# Nothing stays longer than it is needed, however small the model is.
AT_ONCE = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def train(ranks: Ranks, setup: Setup, parts: str) -> dict[str, Any]:
    """Losses and gradient norms of some steps, the state after them, graphs and their breaks, and what stayed
    gathered."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    real = torch.compile
    torch.compile = lambda function, **options: real(function, backend="aot_eager", **options)
    try:
        engine, model = start_engine(ranks, setup)
        compile_model(model, CompileChoice(parts, "test"))
        outcomes = [train_step(engine, ranks, setup, step) for step in range(STEPS)]
    finally:
        torch.compile = real
    statuses = [getattr(parameter, "ds_status", None) for parameter in model.parameters()]
    result = {
        "numbers": [(loss, step.gradient_norm) for loss, step in outcomes],
        "state": local_state(engine),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": dict(counters["graph_break"]),
        "gathered": sum(status is not None and status.name == "AVAILABLE" for status in statuses),
    }
    engine.close()
    torch._dynamo.reset()
    return result


@pytest.mark.parametrize(("stage", "adapter_rank"), [(1, 0), (2, 0), (3, 0), (1, 4), (3, 4)])
def test_training_is_the_same_within_rounding(tmp_path: Path, pool: WorkerPool, stage: int, adapter_rank: int) -> None:
    setup = Setup(str(save_tiny_llama(tmp_path, blocks=6)), stage, adapter_rank=adapter_rank)
    reference = pool.run(train, setup, NOTHING, world_size=2)
    found = pool.run(train, setup, BLOCKS, world_size=2)
    for result, expected in zip(found, reference, strict=True):
        np.testing.assert_allclose(result["numbers"], expected["numbers"], rtol=1e-5)
        assert expected["graphs"] == 0 < result["graphs"] <= 5 and not result["breaks"]
        assert result["gathered"] == expected["gathered"] == 0
    ours, theirs = (joined([result["state"] for result in results]) for results in (found, reference))
    for key, values in ours.items():
        np.testing.assert_allclose(values, theirs[key], rtol=1e-4, atol=1e-5)


def weights_kept(ranks: Ranks, setup: Setup, by_reference: bool) -> tuple[int, int]:
    """How many gathered weights there were in a forward pass, and how many are still there after it."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from llamapro.modeling import blocks as blocks_module

    torch._dynamo.reset()
    real, reference = torch.compile, blocks_module.KeptByReference
    torch.compile = lambda function, **options: real(function, backend="aot_eager", **options)
    if not by_reference:
        blocks_module.KeptByReference = lambda parameters: nullcontext()
    seen: list[StorageWeakRef] = []
    try:
        engine, model = start_engine(ranks, setup)
        compile_model(model, CompileChoice(BLOCKS, "test"))
        train_step(engine, ranks, setup, 0)

        def remember(block: torch.nn.Module, *_: Any) -> None:
            gathered = [parameter for parameter in block.parameters() if parameter.numel()]
            seen.extend(StorageWeakRef(parameter.untyped_storage()) for parameter in gathered)

        for block in model.blocks:
            block.register_forward_pre_hook(remember)
        output = engine.forward_loss(*next(rank_batches(0, ranks, setup)))
        left = sum(not storage.expired() for storage in seen)
        engine.backward(output.loss_sum, 1)
        engine.drop_gradients()
    finally:
        torch.compile, blocks_module.KeptByReference = real, reference
    engine.close()
    torch._dynamo.reset()
    return len(seen), left


def test_at_stage_3_compiled_blocks_let_gathered_weights_go_after_the_forward_pass(
    tmp_path: Path, pool: WorkerPool
) -> None:
    setup = Setup(str(save_tiny_llama(tmp_path, blocks=6)), 3, overlay={"zero_optimization": AT_ONCE})
    (seen, left), _ = pool.run(weights_kept, setup, True, world_size=2)
    (_, left_otherwise), _ = pool.run(weights_kept, setup, False, world_size=2)
    assert seen >= 6 * 7
    assert left == 0 < left_otherwise
