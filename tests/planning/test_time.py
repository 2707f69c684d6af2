"""Speed and hours, against the paper's figures and the time model of one H200 done by hand."""

from dataclasses import replace

import pytest

from llamapro.planning.gpus import gpu_named
from llamapro.planning.plan import Choice, Job
from llamapro.planning.shape import DecoderShape, Learning
from llamapro.planning.time import gpu_hours, link_bandwidth, token_time

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
JOB = Job(SHAPE, Learning(frozenset(range(4, 40, 5))), "bf16", 4096, world_size=1, share=48, compiled=True)
H200 = gpu_named("h200")


def chosen(job: Job, stage: int = 1, micro: int = 6, steps: int = 8) -> Choice:
    return Choice(stage, micro, steps, frozenset(), job.memory(stage, micro), fits=True)


def test_the_papers_hours_follow_from_its_speed() -> None:
    assert gpu_hours(80e9, 7852) == pytest.approx(2830, rel=1e-3)


def test_one_h200_by_hand() -> None:
    time = token_time(JOB, chosen(JOB), H200)
    assert 1e6 * time.linears == pytest.approx(47.9, abs=0.2)
    assert 1e6 * time.attention == pytest.approx(13.8, abs=0.2)
    assert 4 <= 1e6 * time.glue <= 5
    assert time.tokens_per_second == pytest.approx(15_000, rel=0.02)
    assert time.communication == 0 and time.update * 48 * 4096 == pytest.approx(0.0114, rel=0.1)


def test_without_compiling_the_glue_takes_three_times_as_long() -> None:
    eager = replace(JOB, compiled=False)
    fused, unfused = (token_time(job, chosen(job), H200) for job in (JOB, eager))
    assert unfused.glue == pytest.approx(3 * fused.glue)
    assert unfused.tokens_per_second == pytest.approx(13_200, rel=0.03)


def test_a_measured_rate_and_another_efficiency_count() -> None:
    measured = replace(H200, bf16_flops=790e12)
    assert 1e6 * token_time(JOB, chosen(JOB), measured, efficiency=1.0).linears == pytest.approx(43.7, abs=0.1)


def test_frozen_weights_in_fp8_take_less_time() -> None:
    fp8 = replace(JOB, precision="fp8-frozen")
    bf16, eight = (token_time(job, chosen(job), H200) for job in (JOB, fp8))
    frozen = 24.285e9 / (989e12 * 0.73)
    assert bf16.linears - eight.linears == pytest.approx(frozen * (1 - 1 / 1.7), rel=1e-3)


def test_blocks_computed_again_cost_what_they_compute() -> None:
    again = replace(chosen(JOB), recomputed=frozenset({4, 5}))
    more = token_time(JOB, again, H200).linears - token_time(JOB, chosen(JOB), H200).linears
    assert more * 989e12 * 0.73 == pytest.approx(JOB.recompute_flops({4, 5}))


def test_gradients_cross_once_a_step_at_stage_1_and_once_a_micro_step_at_stage_2() -> None:
    two = replace(JOB, world_size=2)
    # Half of float32 gradients twice, and of bf16 weights once, at 450 GB/s.
    once = (2 * 1_619_066_880 * 4 + 1_619_066_880 * 2) / 2 / 450e9
    tokens = 8 * 6 * 4096
    assert token_time(two, chosen(two, 1), H200).communication == pytest.approx(once / tokens)
    eight_times = (8 * 2 * 1_619_066_880 * 4 + 1_619_066_880 * 2) / 2 / 450e9
    assert token_time(two, chosen(two, 2), H200).communication == pytest.approx(eight_times / tokens)


def test_what_stage_3_gathers_hides_behind_the_computation_if_it_is_fast_enough() -> None:
    many = replace(JOB, world_size=16)
    slow = replace(gpu_named("l40s"), bf16_flops=1e18, memory_bandwidth=1e15)
    assert token_time(many, chosen(many, 3, micro=8), H200).communication == 0
    gathered = 15 / 16 * ((8_357_482_496 + 36 * 202_383_360 + 2 * 4096 * 32000 / 2) * 2 + 4 * 1_619_066_880)
    time = token_time(many, chosen(many, 3, micro=3), slow)
    hidden = time.linears + time.attention + time.glue
    assert time.communication + hidden == pytest.approx(gathered / 32e9 / (3 * 4096), rel=1e-3)


def test_beyond_one_machine_the_network_counts() -> None:
    assert link_bandwidth(H200, 8) == 450e9
    assert link_bandwidth(H200, 16) == 50e9
    assert link_bandwidth(gpu_named("l4"), 16) == 32e9
