"""The planner's bytes are those that are really alive, in processes of their own, on one rank and on two."""

from pathlib import Path

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from benchmarks.memory import GPU_CASES, report, run

CASES = ({"ranks": 1, "stage": 1}, {"ranks": 1, "stage": 1, "budget": 0.5}, {"ranks": 2, "stage": 3})


def test_every_tensor_is_counted_while_it_lives() -> None:
    with LiveBytes() as counter:
        first = torch.ones(1000)
        view = first[10:].view(-1)
        second = torch.zeros(500, dtype=torch.float64)
        assert counter.live == 4000 + 4000
        del first
        assert counter.live == 8000  # a view still holds it
        del view
        assert counter.live == 4000
        counter.reset_peak()
        (second + 1).sum()
    assert counter.peak == 4000 + 4000 + 8 and counter.live == 4000


def test_plans_are_within_a_tenth_of_what_a_step_takes(tmp_path: Path) -> None:
    found = run(tmp_path, "tiny", "cpu", CASES)
    for case in found["cases"]:
        assert case["ratio"] == pytest.approx(1, abs=0.1), case
    whole, limited, _ = found["cases"]
    assert limited["recomputed"] and limited["measured_bytes"] < whole["measured_bytes"]
    page = report(found)
    assert "planned / measured" in page and page.count("| bf16 |") == len(CASES)


@pytest.mark.gpu
def test_plans_are_within_a_tenth_of_what_a_gpu_allocates(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for case in run(tmp_path, "1b", "cuda", GPU_CASES)["cases"]:
        assert case["ratio"] == pytest.approx(1, abs=0.1), case
