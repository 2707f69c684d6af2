"""DeepSpeed's traps: each fault is shown here as it is without our remedy, beside what we do instead.

When a fault can't be shown any more, DeepSpeed has changed, and the remedy can be reviewed. What building under its
context does to buffers is in tests/modeling/test_zero_stages.py, in which precision gradients are added up in
test_engine.py, and what launchers do to signals in tests/training/test_launchers.py.
"""

import dataclasses
import functools
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.constants import default_pg_timeout  # type: ignore[import-untyped]
from deepspeed.runtime.config import DeepSpeedConfig  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from transformers import LlamaConfig, LlamaForCausalLM

from llamapro.engine.configuration import strategy
from llamapro.modeling.trainable import TrainableSet
from llamapro.ranks import Ranks
from tests.support.engine import (
    LEARNING_RATE,
    Setup,
    accumulate,
    global_rows,
    joined,
    local_state,
    rank_batches,
    start_engine,
    train_step,
)
from tests.support.modeling import packed_rows, plain_model, ready_model
from tests.support.models import save_tiny_llama
from tests.support.pool import WorkerPool
from tests.support.source import ROOT

BLOCKS, LOWEST, FROZEN_BLOCKS = 6, 2, 2
TENSORS_OF_A_BLOCK = 9
# Of 6 rows of 64 tokens: q, k, v, o, gate and up take 32 float32 values, down 88.
INPUTS_OF_LINEARS = 6 * 64 * 4 * (6 * 32 + 88)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model of six blocks for each precision."""
    dtypes = {"float32": torch.float32, "bf16": torch.bfloat16}
    return {
        name: str(save_tiny_llama(tmp_path_factory.mktemp(name), blocks=BLOCKS, dtype=dtype))
        for name, dtype in dtypes.items()
    }


@contextmanager
def without_fetching_by_block() -> Iterator[None]:
    """DeepSpeed's own way at stage 3: each linear is gathered by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llamapro.engine.engine.fetch_by_block", lambda *_: None)
        yield


def test_rotary_frequencies_in_bf16_are_another_model(folders: dict[str, str]) -> None:
    """What `zero.Init` as a context makes of them, at the far end of a row."""
    folder = Path(folders["float32"])
    rows = packed_rows([[250]])
    plain = plain_model(folder)
    expected = plain(input_ids=rows[0]).logits
    ours = ready_model(folder, TrainableSet.of([2, 4])).logits(rows[0], rows[2])
    assert (ours - expected).abs().max() < 1e-4
    plain.model.rotary_emb.inv_freq = plain.model.rotary_emb.inv_freq.bfloat16().float()
    assert (plain(input_ids=rows[0]).logits - expected).abs().max() > 0.05


class TestFetching:
    """Stage 3 gathers whole blocks at once, and lets go of them."""

    def test_what_stays_gathered_after_backward_are_the_prefix_blocks(
        self, pool: WorkerPool, folders: dict[str, str]
    ) -> None:
        """Their backward pass, which would let go of them, never comes; the step does it. The others are gone."""
        setup = Setup(folders["bf16"], 3, "bf16")
        prefix = [f"model.layers.{block}." for block in range(LOWEST)]
        for after_backward, after_step in pool.run(gathered, setup):
            assert len(after_backward) == LOWEST * TENSORS_OF_A_BLOCK and after_step == []
            assert all(name.startswith(tuple(prefix)) for name in after_backward)

    def test_with_nothing_kept_for_later_use_nothing_stays_gathered(
        self, pool: WorkerPool, folders: dict[str, str]
    ) -> None:
        """The overlay for who has no memory for them."""
        at_once = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
        setup = Setup(folders["bf16"], 3, "bf16", overlay={"zero_optimization": at_once})
        assert pool.run(gathered, setup) == [([], []), ([], [])]

    def test_a_block_is_one_gathering_and_would_be_many(self, pool: WorkerPool, folders: dict[str, str]) -> None:
        """Counted without prefetching, which on a tiny model hides it. Once each for 6 blocks, embedding, final norm
        and head on the way there; on the way back for the 4 blocks from the lowest that learns, norm and head."""
        alone = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
        setup = Setup(folders["bf16"], 3, "bf16", overlay={"zero_optimization": alone})
        assert pool.run(gatherings, setup, True) == [(6 + 3, 4 + 2)] * 2
        for forward, backward in pool.run(gatherings, setup, False):
            assert forward == BLOCKS * TENSORS_OF_A_BLOCK + 3
            assert backward >= 4 * TENSORS_OF_A_BLOCK

    def test_the_settings_hold_a_block_of_seven_billion_parameters_and_its_norms(self) -> None:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))
        block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
        values = strategy(3)["zero_optimization"]
        assert block == 202_383_360 <= values["stage3_prefetch_bucket_size"]
        assert model.model.norm.weight.numel() <= values["stage3_param_persistence_threshold"] < 4096 * 4096
        assert values["stage3_max_live_parameters"] >= 4 * block <= values["stage3_max_reuse_distance"]
        assert not values["stage3_gather_16bit_weights_on_model_save"] and values["zero_hpz_partition_size"] == 1
        assert not any(values[name] for name in values if name.startswith("zero_quantized"))

    def test_weights_read_beside_their_module_are_empty(self, pool: WorkerPool, folders: dict[str, str]) -> None:
        """So the loss is computed by the head itself, which is gathered when it is called."""
        for shape, loss in pool.run(head_and_loss, Setup(folders["float32"], 3)):
            assert shape == (0,) and np.isfinite(loss)


def gathered(ranks: Ranks, setup: Setup) -> tuple[list[str], list[str]]:
    """Names of the parameters that are whole after backward, and after the step."""
    engine, model = start_engine(ranks, setup)
    found = []
    for act in (lambda: accumulate(engine, ranks, setup, 0), lambda: engine.step(LEARNING_RATE)):
        act()
        names = [name for name, value in model.hf.named_parameters() if value.ds_status.name == "AVAILABLE"]  # type: ignore[attr-defined]
        found.append(names)
    engine.close()
    return found[0], found[1]


def gatherings(ranks: Ranks, setup: Setup, by_block: bool) -> tuple[int, int]:
    """All-gathers of a forward and of a backward pass once the order of modules is known."""
    from contextlib import nullcontext

    from deepspeed.comm import comm

    calls = [0]
    with nullcontext() if by_block else without_fetching_by_block(), pytest.MonkeyPatch.context() as patch:
        engine, _ = start_engine(ranks, setup)
        for step in range(2):
            train_step(engine, ranks, setup, step)
        patch.setattr(comm, "all_gather_into_tensor", counted(comm.all_gather_into_tensor, calls))
        output = engine.forward_loss(*next(rank_batches(2, ranks, setup)))
        forward = calls[0]
        engine.backward(output.loss_sum, 300)
        engine.close()
    return forward, calls[0] - forward


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """The function, which also counts its calls."""

    @functools.wraps(function)
    def counting(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        return function(*arguments, **named)

    return counting


def head_and_loss(ranks: Ranks, setup: Setup) -> tuple[tuple[int, ...], float]:
    engine, model = start_engine(ranks, setup)
    found = tuple(model.head.weight.shape), engine.forward_loss(*global_rows(0)).loss_sum.item()
    engine.close()
    return found


class TestCompiling:
    """Compiled together with stage 3's hooks a block is many graphs; by itself it is one (test_compiled.py)."""

    def test_blocks_compiled_with_their_hooks_break_at_stage_3_only(
        self, pool: WorkerPool, folders: dict[str, str]
    ) -> None:
        first, third = (pool.run(breaks_with_hooks, Setup(folders["float32"], stage))[0] for stage in (1, 3))
        assert first == 0 and third >= 2


def breaks_with_hooks(ranks: Ranks, setup: Setup) -> int:
    """Where torch's tracer has to stop in blocks that are compiled as modules, the usual way."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    engine, model = start_engine(ranks, setup)
    for block in model.blocks:
        block.compile(backend="eager")
    accumulate(engine, ranks, setup, 0, micro_batches=1)
    engine.drop_gradients()
    engine.close()
    torch._dynamo.reset()
    return sum(counters["graph_break"].values())


class TestBuildLock:
    """A build that was killed leaves a lock, for which every later start would wait, without a message."""

    def test_left_alone_deepspeed_waits_for_a_lock_that_nobody_holds(self, pool: WorkerPool, tmp_path: Path) -> None:
        """That we start past such a lock is shown in test_start.py."""
        lock = tmp_path / "deepspeed_shm_comm" / "lock"
        lock.parent.mkdir()
        lock.touch()
        assert pool.run(waits_for, str(tmp_path), world_size=1) == [[str(lock)]]


def waits_for(ranks: Ranks, extensions: str) -> list[str]:
    """The lock files that DeepSpeed's own start waits for."""
    import deepspeed  # type: ignore[import-untyped]
    from torch.utils.file_baton import FileBaton

    from llamapro.engine.start import stop_ranks

    class Waits(Exception):
        pass

    def wait(baton: FileBaton) -> None:
        found.append(baton.lock_file_path)
        raise Waits

    stop_ranks()
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(deepspeed.ops, "__compatible_ops__", raising=False)
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCH_EXTENSIONS_DIR": extensions}
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(FileBaton, "wait", wait)
        with pytest.raises(Waits):
            deepspeed.init_distributed(dist_backend="gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    return found


class TestAccumulation:
    """Stages differ in their optimizer and in when they reduce; our engine drives all of them."""

    @pytest.mark.parametrize(
        ("precision", "stage", "kind"),
        [
            ("bf16", 1, "BF16_Optimizer"),
            ("bf16", 2, "DeepSpeedZeroOptimizer"),
            ("float32", 1, "DeepSpeedZeroOptimizer"),
            ("bf16", 3, "DeepSpeedZeroOptimizer_Stage3"),
        ],
    )
    def test_the_classes_that_state_and_dropping_are_written_for(
        self, pool: WorkerPool, folders: dict[str, str], precision: str, stage: int, kind: str
    ) -> None:
        """Stage 1 in bf16 with float32 sums is a class of its own; NamedState and drop_gradients tell them apart."""
        assert pool.run(optimizer_kind, Setup(folders[precision], stage, precision)) == [kind] * 2

    @pytest.mark.parametrize("precision", ["bf16", "float32"])
    def test_stage_1_reduces_once_a_step_and_stage_2_at_every_micro_batch(
        self, pool: WorkerPool, folders: dict[str, str], precision: str
    ) -> None:
        """Why `auto` prefers stage 1. The results are the same: see test_engine.py."""
        first, second = (pool.run(reductions, Setup(folders[precision], stage, precision))[0] for stage in (1, 2))
        assert first == [0, 0, 1] and second == [1, 1, 1]

    def test_coalesced_reduction_adds_up_in_bf16(self, pool: WorkerPool, folders: dict[str, str]) -> None:
        """DeepSpeed's offer to reduce once a step at stages 2 and 3, which we never take."""
        base = dataclasses.replace(Setup(folders["bf16"], 2, "bf16"), betas=(0.0, 0.95), clip=None)
        errors = {}
        for coalesced in (False, True):
            results = pool.run(gradients_of_parts, base, coalesced)
            whole, *parts = [joined([states[index] for states in results]) for index in range(len(results[0]))]
            keys = [key for key in whole if key[1] == "exp_avg"]
            total = {key: sum(part[key].astype(np.float64) for part in parts) for key in keys}
            error = sum(float(np.square(whole[key] - total[key]).sum()) for key in keys)
            errors[coalesced] = (error / sum(float(np.square(total[key]).sum()) for key in keys)) ** 0.5
        assert errors[False] <= 1e-6 and errors[True] >= 1e-4


def optimizer_kind(ranks: Ranks, setup: Setup) -> str:
    engine, _ = start_engine(ranks, setup)
    engine.close()
    return type(engine._deepspeed.optimizer).__name__


def reductions(ranks: Ranks, setup: Setup) -> list[int]:
    """All-reduces during each micro-batch of a step."""
    from deepspeed.comm import comm

    calls = [0]
    found = []
    engine, _ = start_engine(ranks, setup)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "all_reduce", counted(comm.all_reduce, calls))
        patch.setattr("deepspeed.comm.all_reduce", comm.all_reduce)
        for rows in rank_batches(0, ranks, setup):
            before = calls[0]
            engine.backward(engine.forward_loss(*rows).loss_sum, 300)
            found.append(calls[0] - before)
    engine.step(LEARNING_RATE)
    engine.close()
    return found


def gradients_of_parts(ranks: Ranks, setup: Setup, coalesced: bool) -> list[Any]:
    """The state after a step over all micro-batches, then over each alone; with β₁ = 0 exp_avg is the gradient."""
    from contextlib import nullcontext

    engine, _ = start_engine(ranks, setup)
    inner = engine._deepspeed
    parts = [None, *[(rank, index) for rank in range(ranks.world_size) for index in range(setup.accumulation)]]
    states = []
    for part in parts:
        with inner.coalesce_grad_reduction() if coalesced else nullcontext():
            for index, rows in enumerate(rank_batches(0, ranks, setup)):
                loss = engine.forward_loss(*rows).loss_sum
                engine.backward(loss if part in (None, (ranks.rank, index)) else loss * 0.0, 300)
        engine.step(0.0)
        states.append(local_state(engine))
    engine.close()
    return states


class TestState:
    """DeepSpeed's public access to optimizer state is for stage 3 alone, and for later than the first step."""

    @pytest.mark.parametrize(("precision", "stage"), [("float32", 1), ("bf16", 1), ("bf16", 2), ("bf16", 3)])
    def test_public_access_fails_where_ours_gives_everything(
        self, pool: WorkerPool, folders: dict[str, str], precision: str, stage: int
    ) -> None:
        for weights, moments, torchs_own, ours in pool.run(read_state, Setup(folders[precision], stage, precision)):
            if stage != 3:
                assert "only defined for ZeRO-3" in weights and "only defined for ZeRO-3" in moments
            else:
                assert weights == "fine" and moments == "KeyError: 'exp_avg'"
            assert torchs_own == "KeyError: 'exp_avg'"
            assert ours == [("exp_avg", "exp_avg_sq", "master")]


def read_state(ranks: Ranks, setup: Setup) -> tuple[str, str, str, list[tuple[str, ...]]]:
    """What reading state before the first step gives: publicly, of torch's optimizer as it is, and as we start it."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    from llamapro.engine.adamw import AdamW

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "make_state", lambda *_: None)
        engine, model = start_engine(ranks, setup)
        parameter = model.trainable_parameters()[0][1]
        weights = outcome(lambda: safe_get_local_fp32_param(parameter))
        moments = outcome(lambda: safe_get_local_optimizer_state(parameter, "exp_avg"))
        torchs_own = outcome(lambda: list(engine.fragments()))
        engine.close()
    engine, _ = start_engine(ranks, setup)
    keys = sorted({tuple(sorted(part.tensors)) for part in engine.fragments()})
    engine.close()
    return weights, moments, torchs_own, keys


def outcome(call: Callable[[], Any]) -> str:
    """ "fine", or the error."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


@pytest.mark.parametrize(("precision", "stage"), [("float32", 2), ("bf16", 1), ("bf16", 3)])
def test_a_step_at_rate_zero_is_no_skipped_step(
    pool: WorkerPool, folders: dict[str, str], precision: str, stage: int
) -> None:
    """The gradient norm is known only inside DeepSpeed's step, and nothing there skips it: hence the veto."""
    for found in pool.run(steps_that_should_do_nothing, Setup(folders[precision], stage, precision)):
        assert not same_values(found["before"], found["rate zero"]) and found["counted"] == 2
        assert same_values(found["before again"], found["vetoed"]) and found["counted after veto"] == 1
        assert found["norm before the step"] != found["norm in the step"]


def steps_that_should_do_nothing(ranks: Ranks, setup: Setup) -> dict[str, Any]:
    found: dict[str, Any] = {}
    engine, _ = start_engine(ranks, setup)
    train_step(engine, ranks, setup, 0)
    found["before"] = local_state(engine)
    accumulate(engine, ranks, setup, 1)
    found["norm before the step"] = float(engine._deepspeed.get_global_grad_norm() or 0.0) * ranks.world_size
    found["norm in the step"] = engine.step(0.0).gradient_norm
    found["rate zero"], found["counted"] = local_state(engine), engine.optimizer_steps
    engine.close()
    engine, _ = start_engine(ranks, setup)
    train_step(engine, ranks, setup, 0)
    found["before again"] = local_state(engine)
    accumulate(engine, ranks, setup, 1)
    assert engine.step(LEARNING_RATE, lambda norm: True).skipped
    found["vetoed"], found["counted after veto"] = local_state(engine), engine.optimizer_steps
    engine.close()
    return found


def same_values(first: list[Any], second: list[Any]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(np.array_equal(one[3][key], other[3][key]) for one, other in pairs for key in one[3])


def test_frozen_linears_and_prefix_keep_less_and_change_no_bit(pool: WorkerPool, folders: dict[str, str]) -> None:
    """At stage 3, with evaluations between the steps; without them DeepSpeed's linears keep every input."""
    setup = Setup(folders["float32"], 3)
    for plain, ours in zip(
        pool.run(train_and_weigh, setup, False), pool.run(train_and_weigh, setup, True), strict=True
    ):
        assert ours["losses"] == plain["losses"] and same_values(ours["state"], plain["state"])
        assert plain["kept"] - ours["kept"] == INPUTS_OF_LINEARS * FROZEN_BLOCKS


def train_and_weigh(ranks: Ranks, setup: Setup, ours: bool) -> dict[str, Any]:
    """Losses and state of three steps, an evaluation before each, and the bytes besides weights that a pass keeps."""
    with pytest.MonkeyPatch.context() as patch:
        if not ours:
            patch.setattr("llamapro.modeling.blocks.freeze_linears", lambda block: None)
            patch.setattr("llamapro.modeling.blocks.parameters_beside_linears", lambda block: [])
        engine, model = start_engine(ranks, setup)
        losses = []
        for step in range(3):
            with engine.evaluating():
                engine.forward_loss(*global_rows(9))
            losses.append(train_step(engine, ranks, setup, step)[0])
        state = local_state(engine)
        kept = [0]

        def weigh(tensor: torch.Tensor) -> torch.Tensor:
            weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
            kept[0] += 0 if tensor.untyped_storage().data_ptr() in weights else tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
            engine.forward_loss(*global_rows(0))
        engine.close()
    return {"losses": losses, "state": state, "kept": kept[0]}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_group_of_frozen_parameters_fails(pool: WorkerPool, folders: dict[str, str], stage: int) -> None:
    """So only what learns reaches the optimizer."""
    for message in pool.run(start_with_frozen_group, Setup(folders["bf16"], stage, "bf16")):
        assert message.startswith(("ValueError", "IndexError"))


def start_with_frozen_group(ranks: Ranks, setup: Setup) -> str:
    from llamapro.engine import engine as module

    ordinary = module.decay_groups

    def with_frozen(parameters: Any, settings: Any) -> list[dict[str, Any]]:
        frozen = [torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16), requires_grad=False)]
        return [*ordinary(parameters, settings), {"params": frozen, "weight_decay": 0.0}]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "decay_groups", with_frozen)
        return outcome(lambda: train_step(start_engine(ranks, setup)[0], ranks, setup, 0))


def test_what_deepspeed_takes_for_granted_is_not_what_we_set() -> None:
    """Defaults that changed in 2026: gradients are clipped at 1, and collectives are given up after ten minutes."""
    silent = DeepSpeedConfig({"train_batch_size": 1})
    assert silent.gradient_clipping == 1.0 and default_pg_timeout.total_seconds() == 600
    assert all(strategy(stage)["gradient_clipping"] == 0.0 for stage in (1, 2, 3))


@pytest.mark.parametrize("faulty", ["0.18.10", "0.19.3", "0.19.5", "0.19.7"])
def test_releases_with_faults_that_nothing_here_can_mend_are_excluded(faulty: str) -> None:
    """A lost micro-batch in bf16; recomputing frozen blocks at stage 3; a race of reductions; one of gatherings."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (deepspeed,) = (one for one in map(Requirement, needed) if one.name == "deepspeed")
    assert faulty not in deepspeed.specifier and version("deepspeed") in deepspeed.specifier
