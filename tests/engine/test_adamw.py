"""Our AdamW against the textbook, its clip factor, its veto, and which parameters decay."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamapro.config.optimizer import OptimizerConfig
from llamapro.engine.adamw import AdamW, clip_factor, decay_groups

SETTINGS = OptimizerConfig(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def made(values: torch.Tensor) -> tuple[AdamW, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(values.clone())
    optimizer = AdamW([{"params": [parameter], "weight_decay": 0.1}], SETTINGS, fused=False)
    optimizer.make_state([parameter])
    return optimizer, parameter


def test_updates_follow_the_paper() -> None:
    values = torch.linspace(-1, 1, 17)
    optimizer, parameter = made(values)
    expected, first, second = values.double(), torch.zeros(17).double(), torch.zeros(17).double()
    for step in range(1, 6):
        gradient = torch.cos(values * step)
        parameter.grad = gradient.clone()
        optimizer.set_learning_rate(0.01 * step)
        optimizer.gradient_factor = lambda: 0.5
        optimizer.step()
        half = 0.5 * gradient.double()
        first = 0.9 * first + 0.1 * half
        second = 0.95 * second + 0.05 * half.square()
        update = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        expected = expected * (1 - 0.01 * step * 0.1) - 0.01 * step * update
    assert torch.allclose(parameter.double(), expected, rtol=1e-6, atol=1e-6)
    assert optimizer.steps == 5


def test_a_vetoed_step_changes_nothing() -> None:
    optimizer, parameter = made(torch.ones(5))
    parameter.grad = torch.ones(5)
    optimizer.set_learning_rate(0.1)
    optimizer.gradient_factor = lambda: None
    optimizer.step()
    assert torch.equal(parameter, torch.ones(5)) and optimizer.steps == 0
    assert not any(optimizer.state[parameter][key].any() for key in ("exp_avg", "exp_avg_sq"))


def test_the_step_count_can_be_restored() -> None:
    optimizer, parameter = made(torch.ones(5))
    optimizer.steps = 12
    parameter.grad = torch.ones(5)
    optimizer.step()
    assert optimizer.steps == 13


def test_only_matrices_decay_whatever_stage_3_made_of_them() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
    cut = torch.nn.Parameter(torch.empty(0))
    cut.ds_shape = torch.Size((4, 4))  # type: ignore[attr-defined]
    decayed, plain = decay_groups([matrix, vector, cut], SETTINGS)
    assert [id(value) for value in decayed["params"]] == [id(matrix), id(cut)] and decayed["weight_decay"] == 0.1
    assert plain["params"] == [vector] and plain["weight_decay"] == 0.0
    assert len(decay_groups([vector], SETTINGS)) == 1


@given(norm=st.floats(0, 1e30), limit=st.floats(1e-6, 1e6))
def test_a_clipped_norm_is_the_limit_to_16_bits(norm: float, limit: float) -> None:
    clipped = norm * clip_factor(norm, limit)
    assert clipped == norm if norm <= limit else clipped == pytest.approx(limit, rel=2**-15)
    assert clip_factor(norm, None) == 1.0


@given(norm=st.floats(1.01, 1e6))
def test_the_last_bits_of_the_norm_rarely_reach_the_factor(norm: float) -> None:
    """Of the factors in the norm's neighbourhood of a float32 rounding there are at most two."""
    near = {clip_factor(norm * (1 + delta * 2**-24), 1.0) for delta in (-1.0, -0.5, 0.0, 0.5, 1.0)}
    assert len(near) <= 2
    assert all(math.frexp(factor)[0] * 2**17 == int(math.frexp(factor)[0] * 2**17) for factor in near)
