"""`auto` takes the lowest stage that fits, then the micro-batch that pads least."""

from dataclasses import replace

import pytest

from llamapro.errors import UserError
from llamapro.planning.plan import Job, choose, usable_bytes
from llamapro.planning.recompute import least_peak_bytes
from llamapro.planning.shape import DecoderShape, Learning
from llamapro.planning.tables import gib

GIB = 1 << 30
SHAPE = DecoderShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    }
)


def job(world_size: int = 16, share: int = 64) -> Job:
    return Job(SHAPE, Learning(frozenset(range(4, 40, 5))), "bf16", 4096, world_size, share)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_lowest_stage_that_fits_is_taken(stage: int) -> None:
    needed = job().memory(stage, 1).total
    assert choose(job(), budget_bytes=needed).zero_stage == stage
    assert choose(job(), budget_bytes=needed - 1).zero_stage == min(3, stage + 1)


def test_a_plan_that_does_not_fit_says_so() -> None:
    choice = choose(job(), budget_bytes=GIB)
    assert (choice.zero_stage, choice.micro_sequences, choice.fits) == (3, 1, False)


def test_a_given_stage_and_micro_batch_are_kept() -> None:
    choice = choose(job(), budget_bytes=80 * GIB, zero_stage=3, micro_sequences=5)
    assert (choice.zero_stage, choice.micro_sequences, choice.accumulation_steps) == (3, 5, 13)


def test_a_given_micro_batch_moves_the_stage() -> None:
    budget = job().memory(2, 3).total
    assert choose(job(), budget_bytes=budget, micro_sequences=3).zero_stage == 2
    assert choose(job(), budget_bytes=budget, micro_sequences=1).zero_stage == 1


def test_the_largest_micro_batch_that_pads_nothing_is_taken() -> None:
    budget = job().memory(1, 6).total
    choice = choose(job(share=64), budget_bytes=budget)
    assert (choice.micro_sequences, choice.accumulation_steps) == (4, 16)
    choice = choose(job(share=7), budget_bytes=budget)
    assert choice.micro_sequences * choice.accumulation_steps == 7


def test_the_micro_batch_never_exceeds_the_share_nor_the_bound() -> None:
    assert choose(job(share=3), budget_bytes=1e15).micro_sequences == 3
    assert choose(job(share=8), budget_bytes=1e15, most_micro_tokens=2 * 4096).micro_sequences == 2
    assert choose(job(share=8), budget_bytes=1e15, most_micro_tokens=1).micro_sequences == 1


def test_unknown_memory_takes_the_smallest() -> None:
    choice = choose(job(), budget_bytes=None)
    assert (choice.zero_stage, choice.micro_sequences, choice.fits) == (1, 1, True)


def test_nothing_is_recomputed_as_long_as_a_stage_fits_without() -> None:
    for stage in (1, 2, 3):
        assert not choose(job(), budget_bytes=job().memory(stage, 1).total).recomputed


def test_when_no_stage_fits_the_fewest_blocks_that_make_one_fit_are_recomputed() -> None:
    needed = job().memory(3, 1).total
    choice = choose(job(), budget_bytes=needed - GIB)
    assert (choice.zero_stage, choice.micro_sequences, choice.fits) == (3, 1, True)
    assert choice.recomputed == {4, 9}  # of 0.76 GB each; those that learn keep most, and the lowest come first
    assert needed - 2 * GIB < choice.memory.total <= needed - GIB
    assert job().recompute_flops(choice.recomputed) == 2 * (2 * (202_375_168 - 4096 * 11008) + 2 * 4096 * 4096)


def test_unlimited_recomputes_nothing_even_when_nothing_fits() -> None:
    unlimited = replace(job(), activation_memory_gib="unlimited")
    choice = choose(unlimited, budget_bytes=job().memory(3, 1).total - GIB)
    assert not choice.recomputed and not choice.fits


def test_a_stated_number_holds_for_activations_whatever_the_device_has() -> None:
    limited = replace(job(), activation_memory_gib=10.0)
    choice = choose(limited, budget_bytes=None)
    assert choice.zero_stage == 1 and choice.fits
    assert 9 * GIB < choice.memory.activations <= 10 * GIB
    assert choice.memory.static == job().memory(1, 1).static


def test_the_micro_batch_is_the_largest_that_needs_no_recomputation() -> None:
    enough = job().memory(1, 2).activations / GIB
    choice = choose(replace(job(), activation_memory_gib=enough), budget_bytes=1e15)
    assert (choice.micro_sequences, choice.recomputed) == (2, frozenset())


def test_a_given_micro_batch_is_kept_within_the_number() -> None:
    choice = choose(replace(job(), activation_memory_gib=10.0), budget_bytes=1e15, micro_sequences=4)
    assert choice.micro_sequences == 4 and len(choice.recomputed) > 20
    assert choice.memory.activations <= 10 * GIB


def test_less_than_a_block_at_work_is_refused_with_numbers() -> None:
    least = least_peak_bytes(job().costs(1)) / GIB
    with pytest.raises(UserError, match=rf"engine.activation_memory_gib: 0.5 GiB .* give at least {least:.3g}"):
        choose(replace(job(), activation_memory_gib=0.5), budget_bytes=1e15)
    choice = choose(replace(job(), activation_memory_gib=least * 1.0001), budget_bytes=1e15)
    assert len(choice.recomputed) >= 35 and choice.memory.activations <= least * 1.0001 * GIB


def test_some_memory_is_kept_free() -> None:
    assert usable_bytes(80 * GIB) == pytest.approx(72 * GIB)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_largest_micro_batch_is_the_last_that_fits(stage: int) -> None:
    planned = job(share=40)
    budget = planned.memory(stage, 3).total
    assert planned.largest_micro_batch(stage, budget) == 3
    assert planned.largest_micro_batch(stage, budget - 1) == 2
    assert planned.largest_micro_batch(stage, 1e15) == 40
    assert planned.largest_micro_batch(stage, GIB) == 0


def test_buffers_count_when_a_stage_is_chosen() -> None:
    large = replace(job(), overlay={"zero_optimization": {"reduce_bucket_size": 500_000_000}})
    budget = job().memory(2, 1).total
    assert choose(job(), budget_bytes=budget).zero_stage == 2
    assert choose(large, budget_bytes=budget).zero_stage == 3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_compiled_blocks_make_room(stage: int) -> None:
    compiled = replace(job(), compiled=True)
    assert compiled.memory(stage, 1).activations == 4096 * (28 * 93_312 + 8 * 131_712)
    assert compiled.memory(stage, 1).activations < job().memory(stage, 1).activations


def test_a_number_that_only_compiled_blocks_keep_within_is_not_refused() -> None:
    compiled = replace(job(), compiled=True)
    least = least_peak_bytes(compiled.costs(1)) / GIB * 1.0001
    assert choose(replace(compiled, activation_memory_gib=least), budget_bytes=1e15).zero_stage == 1
    with pytest.raises(UserError, match="engine.activation_memory_gib"):
        choose(replace(job(), activation_memory_gib=least), budget_bytes=1e15)


def test_small_amounts_are_not_said_to_be_nothing() -> None:
    assert [gib(amount * GIB) for amount in (0, 0.0123, 0.5, 96.5, float("inf"))] == [
        "0.00",
        "0.012",
        "0.50",
        "96.50",
        "unknown",
    ]
