"""Each way out that is named is one: planned anew, the job fits."""

from dataclasses import replace
from typing import Any

import pytest

from llamapro.planning.advice import ways_out
from llamapro.planning.plan import Job, choose
from llamapro.planning.shape import DecoderShape, Learning

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
JOB = Job(SHAPE, Learning(frozenset(range(4, 40, 5))), "bf16", 4096, world_size=1, share=8)


def fits(job: Job, budget: float) -> bool:
    return choose(job, budget_bytes=budget).fits


def test_more_gpus_are_as_many_as_it_takes() -> None:
    budget = 22 * GIB
    assert not fits(JOB, budget)
    assert ways_out(JOB, budget)[0] == "ZeRO-3 over 4 GPUs"
    assert fits(replace(JOB, world_size=4), budget) and not fits(replace(JOB, world_size=2), budget)


def test_fewer_new_blocks_are_as_many_as_fit() -> None:
    budget = 40 * GIB
    ways = ways_out(JOB, budget)
    assert "4 new blocks instead of 8" in ways
    fewer = SHAPE.with_blocks_of(range(36))
    assert fits(replace(JOB, shape=fewer, learning=Learning(frozenset(range(8, 36, 9)))), budget)


@pytest.mark.parametrize(
    ("way", "change"),
    [
        ("engine.activation_memory_gib: auto", {"activation_memory_gib": "auto"}),
        ("data.sequence_length: 2048", {"sequence_length": 2048}),
    ],
)
def test_settings_that_would_do_are_named(way: str, change: dict[str, Any]) -> None:
    static = JOB.memory(3, 1).static
    unlimited = replace(JOB, activation_memory_gib="unlimited")
    budget = static + JOB.memory(3, 1).at_work + 0.6 * JOB.memory(3, 1).activations
    assert not fits(unlimited, budget)
    assert any(found.startswith(way) for found in ways_out(unlimited, budget))
    assert fits(replace(unlimited, **change), budget)


def test_nothing_is_named_that_would_not_do() -> None:
    assert ways_out(JOB, 1e6) == []
