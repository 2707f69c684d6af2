"""Training steps: the same at every ZeRO stage and world size, exact in scaling, nothing skipped silently."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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
    whole_parameters,
)
from tests.support.modeling import IGNORED, plain_loss, plain_model
from tests.support.models import save_tiny_llama
from tests.support.pool import WorkerPool

STEPS = 8
FLOAT32_TOLERANCE = 1e-6
BF16_TOLERANCE = 1e-4
CLASSES = [("float32", 1), ("float32", 2), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
"""Precision and stage of each way in which DeepSpeed accumulates gradients."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model of six blocks for each precision."""
    dtypes = {"float32": torch.float32, "bf16": torch.bfloat16}
    return {
        name: str(save_tiny_llama(tmp_path_factory.mktemp(name), blocks=6, dtype=dtype))
        for name, dtype in dtypes.items()
    }


def train(ranks: Ranks, setup: Setup, steps: int) -> dict[str, Any]:
    """Losses and gradient norms of some steps, and the state after them."""
    engine, model = start_engine(ranks, setup)
    before = whole_parameters(model)
    outcomes = [train_step(engine, ranks, setup, step) for step in range(steps)]
    after = whole_parameters(model)
    changed = sorted(name for name in after if not np.array_equal(after[name], before[name]))
    gradients_left = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    result = {
        "losses": [loss for loss, _ in outcomes],
        "norms": [step.gradient_norm for _, step in outcomes],
        "state": local_state(engine),
        "changed": changed,
        "trainable": sorted(name for name, _ in model.trainable_parameters()),
        "steps": engine.optimizer_steps,
        "gradients_left": gradients_left,
    }
    engine.close()
    return result


def relative(found: list[float], reference: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(found, reference, strict=True))


class TestStages:
    """Eight steps of six sequences, whatever the stage and however many ranks share them."""

    @pytest.mark.parametrize(("precision", "tolerance"), [("float32", FLOAT32_TOLERANCE), ("bf16", BF16_TOLERANCE)])
    def test_stages_and_world_sizes_agree(
        self, pool: WorkerPool, folders: dict[str, str], precision: str, tolerance: float
    ) -> None:
        """Stages 2 and 3 bitwise. Others sum gradients in another order: the last bit in float32, and in bf16 what
        that makes of rounding weights and activations to 8 bits."""
        base = Setup(folders[precision], 1, precision, clip=0.3)
        runs = {
            (stage, world): pool.run(
                train, dataclasses.replace(base, stage=stage, accumulation=6 // world), STEPS, world_size=world
            )
            for stage, world in [(1, 2), (2, 2), (3, 2), (1, 1), (3, 3)]
        }
        reference = runs[1, 1][0]
        for (stage, world), results in runs.items():
            for result in results:
                assert result["losses"] == results[0]["losses"] and result["norms"] == results[0]["norms"]
            assert relative(results[0]["losses"], reference["losses"]) <= tolerance, (stage, world)
        assert runs[2, 2][0]["losses"] == runs[3, 2][0]["losses"]
        assert relative(runs[2, 2][0]["norms"], runs[3, 2][0]["norms"]) <= FLOAT32_TOLERANCE
        assert min(reference["norms"]) > 0.3, "nothing was clipped"
        second, third = (joined([result["state"] for result in runs[stage, 2]]) for stage in (2, 3))
        assert second.keys() == third.keys()
        assert all(np.array_equal(second[key], third[key]) for key in second)

    def test_three_ranks_that_do_not_divide_the_batch(self, pool: WorkerPool, folders: dict[str, str]) -> None:
        """Six sequences on three ranks in micro-batches of three: each rank gets rows without loss."""
        base = Setup(folders["float32"], 3)
        (alone,) = pool.run(train, dataclasses.replace(base, accumulation=6), 3, world_size=1)
        three = pool.run(train, dataclasses.replace(base, micro=3, accumulation=1), 3, world_size=3)
        assert relative(three[0]["losses"], alone["losses"]) <= FLOAT32_TOLERANCE
        assert relative(three[0]["norms"], alone["norms"]) <= 1e-5

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_exactly_the_trainable_parameters_change(
        self, pool: WorkerPool, folders: dict[str, str], stage: int
    ) -> None:
        for result in pool.run(train, Setup(folders["float32"], stage), 2):
            assert result["changed"] == result["trainable"]
            assert len(result["trainable"]) == 2 * 9
            assert result["steps"] == 2
            assert not result["gradients_left"]

    def test_everything_can_learn(self, pool: WorkerPool, folders: dict[str, str]) -> None:
        setups = [Setup(folders["float32"], stage, blocks=()) for stage in (1, 3)]
        first, third = (pool.run(train, setup, 3)[0] for setup in setups)
        assert first["changed"] == first["trainable"] == third["changed"]
        assert relative(third["losses"], first["losses"]) <= FLOAT32_TOLERANCE


class TestScaling:
    """The gradient is that of the mean loss over all target tokens of the step."""

    @pytest.mark.parametrize(("stage", "clip"), [(1, None), (2, 1e-3), (3, None)])
    def test_norm_and_first_update_equal_plain_torch(
        self, pool: WorkerPool, folders: dict[str, str], stage: int, clip: float | None
    ) -> None:
        """Adam's first update hides the gradient's size, so the moment shows clipping and the norm the scale."""
        folder = folders["float32"]
        results = pool.run(train, Setup(folder, stage, clip=clip), 1)
        plain = plain_model(Path(folder))
        rows = global_rows(0)
        lengths = [spans_of(row) for row in rows[2].tolist()]
        (plain_loss(plain, rows, lengths) / (rows[1] != IGNORED).sum()).backward()  # type: ignore[no-untyped-call]
        gradients = {
            name: value.grad.detach().double()
            for name, value in plain.named_parameters()
            if name in results[0]["trainable"] and value.grad is not None
        }
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        assert results[0]["norms"][0] == pytest.approx(norm, rel=1e-5)
        state = joined([result["state"] for result in results])
        scale = 1.0 if clip is None else clip / norm
        for name, gradient in gradients.items():
            moment = torch.from_numpy(state[name, "exp_avg"]).double()
            expected = 0.1 * scale * gradient.flatten()
            assert (moment - expected).norm() <= 1e-4 * expected.norm() + 1e-12, name

    @pytest.mark.parametrize("stage", [2, 3])
    def test_three_micro_batches_of_one_equal_one_of_three(
        self, pool: WorkerPool, folders: dict[str, str], stage: int
    ) -> None:
        base = Setup(folders["float32"], stage)
        many = pool.run(train, base, 2)[0]
        one = pool.run(train, dataclasses.replace(base, micro=3, accumulation=1), 2)[0]
        assert relative(many["losses"], one["losses"]) <= FLOAT32_TOLERANCE
        assert relative(many["norms"], one["norms"]) <= 1e-5

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_gradients_are_added_up_and_sent_in_float32(
        self, pool: WorkerPool, folders: dict[str, str], stage: int
    ) -> None:
        assert sum_error(pool, Setup(folders["bf16"], stage, "bf16")) <= 1e-6

    @pytest.mark.parametrize(
        ("stage", "fault"),
        [(2, {"data_types": {"grad_accum_dtype": "bf16"}}), (3, {"data_types": {"grad_accum_dtype": "bf16"}})]
        + [(stage, {"communication_data_type": "bf16"}) for stage in (1, 2, 3)],
    )
    def test_without_our_settings_deepspeed_adds_up_in_bf16(
        self, pool: WorkerPool, folders: dict[str, str], stage: int, fault: dict[str, Any]
    ) -> None:
        """Why ds_configs say float32; when this fails, DeepSpeed has changed."""
        assert sum_error(pool, Setup(folders["bf16"], stage, "bf16", overlay=fault)) >= 1e-4

    def test_weights_decay_only_in_matrices(self, pool: WorkerPool, folders: dict[str, str]) -> None:
        results = pool.run(decay_only, Setup(folders["float32"], 3))
        for name, before, after in results[0]:
            factor = 1 - 0.1 * LEARNING_RATE if before.ndim == 2 else 1.0
            assert np.allclose(after, before * np.float32(factor), rtol=1e-6, atol=0), name


def sum_error(pool: WorkerPool, setup: Setup) -> float:
    """How far a step's gradient is from the sum of what each micro-batch of each rank contributes alone."""
    setup = dataclasses.replace(setup, betas=(0.0, 0.95), clip=None)
    results = pool.run(gradients_of_parts, setup)
    whole, *parts = [joined([states[index] for states in results]) for index in range(len(results[0]))]
    error = norm = 0.0
    for key in whole:
        if key[1] == "exp_avg":
            total = sum(part[key].astype(np.float64) for part in parts)
            error += float(np.square(whole[key] - total).sum())
            norm += float(np.square(total).sum())
    return math.sqrt(error / norm)


def gradients_of_parts(ranks: Ranks, setup: Setup) -> list[Any]:
    """The state after a step over everything, then over each part alone; with β₁ = 0 exp_avg is the gradient."""
    from llamapro.engine import configuration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configuration, "FIXED", {})
        engine, _ = start_engine(ranks, setup)
    parts = [None, *itertools.product(range(ranks.world_size), range(setup.accumulation))]
    states = []
    for part in parts:
        for index, rows in enumerate(rank_batches(0, ranks, setup)):
            loss = engine.forward_loss(*rows).loss_sum
            engine.backward(loss if part in (None, (ranks.rank, index)) else loss * 0.0, 300)
        engine.step(0.0)
        states.append(local_state(engine))
    engine.close()
    return states


def spans_of(positions: list[int]) -> list[int]:
    """Lengths of the documents of a row, from where its positions restart."""
    starts = [index for index, position in enumerate(positions) if position == 0]
    return [end - start for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]


def decay_only(ranks: Ranks, setup: Setup) -> list[tuple[str, Any, Any]]:
    """A step on rows without any target: the gradient is zero and only the decay acts."""
    engine, model = start_engine(ranks, setup)
    names = [name for name, _ in model.trainable_parameters()]
    before = whole_parameters(model)
    inputs, labels, positions = global_rows(0)
    for _ in range(setup.accumulation):
        engine.backward(engine.forward_loss(inputs[:1], torch.full_like(labels[:1], IGNORED), positions[:1])[0], 0)
    assert engine.step(LEARNING_RATE).gradient_norm == 0
    after = whole_parameters(model)
    engine.close()
    return [(name, before[name], after[name]) for name in names]


def vetoed_step(ranks: Ranks, setup: Setup, first: bool) -> dict[str, Any]:
    """State around a vetoed step, then the losses of going on, against never having taken it."""
    engine, _ = start_engine(ranks, setup)
    if not first:
        train_step(engine, ranks, setup, 0)
    before, steps_before = local_state(engine), engine.optimizer_steps
    asked: list[float] = []
    accumulate(engine, ranks, setup, 1)
    result = engine.step(LEARNING_RATE, lambda norm: asked.append(norm) or True)  # type: ignore[func-returns-value]
    after, steps_after = local_state(engine), engine.optimizer_steps
    following = train_step(engine, ranks, setup, 2)
    engine.close()
    undisturbed, _ = start_engine(ranks, setup)
    if not first:
        train_step(undisturbed, ranks, setup, 0)
    expected = train_step(undisturbed, ranks, setup, 2)
    undisturbed.close()
    return locals() | {"engine": None, "undisturbed": None, "ranks": None, "_": None}


class TestVeto:
    """A skipped step leaves no trace."""

    @pytest.mark.parametrize(
        ("precision", "stage", "first"),
        [("float32", 1, True), ("float32", 2, False), ("bf16", 1, False), ("bf16", 2, True), ("bf16", 3, False)],
    )
    def test_a_vetoed_step_changes_nothing(
        self, pool: WorkerPool, folders: dict[str, str], precision: str, stage: int, first: bool
    ) -> None:
        for found in pool.run(vetoed_step, Setup(folders[precision], stage, precision), first):
            assert found["result"].skipped and found["asked"] == [found["result"].gradient_norm]
            assert found["steps_after"] == found["steps_before"] == (0 if first else 1)
            assert_same_state(found["before"], found["after"])
            assert found["following"] == found["expected"]

    @pytest.mark.parametrize(("precision", "stage"), CLASSES)
    def test_a_gradient_that_is_not_finite_is_reported_and_never_applied(
        self, pool: WorkerPool, folders: dict[str, str], precision: str, stage: int
    ) -> None:
        for found in pool.run(poisoned_step, Setup(folders[precision], stage, precision)):
            assert found["result"].skipped and found["result"].gradient_norm == math.inf
            assert found["asked"] == [math.inf]
            assert_same_state(found["before"], found["after"])
            assert not found["next"].skipped and math.isfinite(found["next"].gradient_norm)

    @pytest.mark.parametrize(("precision", "stage"), CLASSES)
    def test_dropped_micro_batches_leave_no_trace(
        self, pool: WorkerPool, folders: dict[str, str], precision: str, stage: int
    ) -> None:
        for dropped, plain in pool.run(dropped_step, Setup(folders[precision], stage, precision)):
            assert dropped == plain


def assert_same_state(first: list[Any], second: list[Any]) -> None:
    assert [part[:3] for part in first] == [part[:3] for part in second]
    for one, other in zip(first, second, strict=True):
        assert all(np.array_equal(one[3][key], other[3][key]) for key in one[3])


def poisoned_step(ranks: Ranks, setup: Setup) -> dict[str, Any]:
    """One micro-batch of rank 1 has a loss that is not a number."""
    engine, _ = start_engine(ranks, setup)
    train_step(engine, ranks, setup, 0)
    before = local_state(engine)
    inputs, labels, positions = global_rows(1)
    for index in range(setup.accumulation):
        loss = engine.forward_loss(inputs[:1], labels[:1], positions[:1]).loss_sum
        engine.backward(loss * math.nan if (ranks.rank, index) == (1, 1) else loss, 60)
    asked: list[float] = []
    result = engine.step(LEARNING_RATE, lambda norm: bool(asked.append(norm)))  # type: ignore[func-returns-value]
    after = local_state(engine)
    _, following = train_step(engine, ranks, setup, 2)
    engine.close()
    return {"before": before, "after": after, "asked": asked, "result": result, "next": following}


def dropped_step(ranks: Ranks, setup: Setup) -> tuple[Any, Any]:
    """Two steps with an abandoned accumulation between them, and without it."""
    outcomes = []
    for disturbed in (True, False):
        engine, _ = start_engine(ranks, setup)
        first = train_step(engine, ranks, setup, 0)
        if disturbed:
            accumulate(engine, ranks, setup, 1, micro_batches=2)
            engine.drop_gradients()
        outcomes.append((first, train_step(engine, ranks, setup, 2), train_step(engine, ranks, setup, 3)))
        engine.close()
    return outcomes[0], outcomes[1]


class TestFetching:
    """Stage 3 gathers whole blocks, and lets go of them."""

    def test_nothing_is_left_gathered_after_a_step(self, pool: WorkerPool, folders: dict[str, str]) -> None:
        for after_backward, after_step in pool.run(gathered_parameters, Setup(folders["bf16"], 3, "bf16")):
            assert after_step == []
            assert all(name.startswith(("model.layers.0.", "model.layers.1.", "lm_head")) for name in after_backward)

    def test_without_an_input_gradient_the_lowest_block_fails(self, pool: WorkerPool, folders: dict[str, str]) -> None:
        """Why the lowest block that learns is treated apart; when this fails, DeepSpeed has changed."""
        for message in pool.run(fetch_lowest_as_any_other, Setup(folders["float32"], 3)):
            assert "size" in message


def gathered_parameters(ranks: Ranks, setup: Setup) -> tuple[list[str], list[str]]:
    """Names of the parameters that are whole after backward, and after the step."""
    engine, model = start_engine(ranks, setup)
    found = []
    for act in (lambda: accumulate(engine, ranks, setup, 0), lambda: engine.step(LEARNING_RATE)):
        act()
        names = [name for name, value in model.hf.named_parameters() if value.ds_status.name == "AVAILABLE"]  # type: ignore[attr-defined]
        found.append(names)
    engine.close()
    return found[0], found[1]


def fetch_lowest_as_any_other(ranks: Ranks, setup: Setup) -> str:
    from llamapro.engine import partition

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "_with_input_gradient", lambda *_: None)
        engine, _ = start_engine(ranks, setup)
        with pytest.raises(RuntimeError) as caught:
            accumulate(engine, ranks, setup, 0)
    return str(caught.value)


class TestEvaluation:
    """Scoring between steps."""

    def test_evaluation_between_steps_changes_nothing(self, pool: WorkerPool, folders: dict[str, str]) -> None:
        for outcomes in pool.run(evaluated_between, Setup(folders["float32"], 3)):
            assert outcomes[0] == outcomes[1]


def evaluated_between(ranks: Ranks, setup: Setup) -> list[Any]:
    """Losses of three steps with and without evaluations between them."""
    outcomes = []
    for evaluated in (True, False):
        engine, model = start_engine(ranks, setup)
        losses = []
        for step in range(3):
            if evaluated:
                with engine.evaluating():
                    output = engine.forward_loss(*global_rows(9))
                    with model.bypassed(setup.blocks):
                        bypassed = engine.forward_loss(*global_rows(9))
                assert not output.loss_sum.requires_grad
                assert not torch.equal(output.loss_sum, bypassed.loss_sum) or step == 0
            losses.append(train_step(engine, ranks, setup, step))
        assert model.training
        outcomes.append(losses)
        engine.close()
    return outcomes
