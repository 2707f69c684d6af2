"""What a step's numbers say: rates of target tokens, utilization of what is needed and of what is computed."""

import pytest
import torch

from llamapro.planning.flops import FlopsPerToken
from llamapro.ranks import Ranks
from llamapro.training.log_line import StepMeasures, step_line
from llamapro.training.progress import Progress, StepOutcome

FLOPS = FlopsPerToken(
    forward_linear=100.0,
    forward_attention=10.0,
    input_gradient=80.0,
    attention_backward=20.0,
    attention_recompute=5.0,
    weight_gradient=30.0,
    block_recompute=25.0,
)
TWO_RANKS = Ranks(0, 2, 0, torch.device("cpu"))


def values(peak_flops: float | None) -> dict[str, float]:
    """Of a step of two seconds: 900 target tokens on two ranks that computed 500 positions each."""
    measures = StepMeasures(2.0, 0.5, FLOPS, positions=500, peak_flops=peak_flops)
    outcome = StepOutcome(loss=1.0, gradient_norm=0.1, learning_rate=1e-3, tokens=900)
    return measures.values(outcome, Progress(step=1), TWO_RANKS)


def test_padding_counts_in_what_is_computed_and_not_in_what_is_needed() -> None:
    found = values(1e6)
    assert found["tokens_per_second_per_gpu"] == 225
    assert found["mfu"] == pytest.approx(225 * 240 / 1e6)
    assert found["hfu"] == pytest.approx(250 * 270 / 1e6)
    assert found["data_wait_fraction"] == 0.25


def test_the_line_shows_both_or_says_that_no_peak_is_known() -> None:
    line = step_line(1, 8, values(1e6), 60.0, TWO_RANKS.device)
    assert "MFU 5.4%" in line and "HFU 6.8%" in line
    line = step_line(1, 8, values(None), 60.0, TWO_RANKS.device)
    assert "MFU n/a" in line and "HFU" not in line
