"""Stopped and resumed equals not stopped, bit for bit: numbers, text, weights, moments, steps, hyper-parameters."""

from pathlib import Path
from typing import Any

import pytest

from llamapro.training.metrics import read_metrics
from tests.support.pool import WorkerPool
from tests.support.resumes import Outcome, outcome, require_same, stop
from tests.support.training import prepare, settings

SEVERAL_EPOCHS = 16
Straight = dict[tuple[int, int], Outcome]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def straight() -> Straight:
    """Outcomes of runs that were not stopped, by stage and world size; filled by the tests."""
    return {}


def run_settings(folder: Path, run: str, stage: int) -> dict[str, Any]:
    """Eight steps, the first two of them warm-up; four micro-batches of accumulation on one rank, two on two."""
    schedule = {"warmup_fraction": 0.25}
    return settings(folder, run, engine={"precision": "float32", "zero_stage": stage}, schedule=schedule)


QUICK = {(1, 1, 1), (3, 1, 7), (2, 2, 0), (3, 2, 3)}
CASES = [
    pytest.param(stage, world_size, before, marks=() if (stage, world_size, before) in QUICK else pytest.mark.slow)
    for stage in (1, 2, 3)
    for world_size in (1, 2)
    for before in (0, 1, 3, 7)
]


@pytest.mark.parametrize(("stage", "world_size", "before"), CASES)
def test_stopped_in_a_steps_accumulation(
    folder: Path, pool: WorkerPool, straight: Straight, stage: int, world_size: int, before: int
) -> None:
    """In the first step (nothing is saved yet), in mid-warm-up, in the middle, in the last step."""
    case = (stage, world_size)
    if case not in straight:
        straight[case] = outcome(pool, run_settings(folder, f"straight-{stage}-{world_size}", stage), world_size)
    assert len(straight[case].groups) == 2 and len(straight[case].rows) == 8
    values = run_settings(folder, f"stopped-{stage}-{world_size}-{before}", stage)
    stop(pool, values, world_size, before)
    require_same(outcome(pool, values, world_size), straight[case], first_step=before + 1)


@pytest.mark.parametrize("times", [2, pytest.param(7, marks=pytest.mark.slow)])
def test_stopped_again_and_again(folder: Path, pool: WorkerPool, straight: Straight, times: int) -> None:
    if (2, 2) not in straight:
        straight[2, 2] = outcome(pool, run_settings(folder, "straight-2-2", 2), 2)
    values = run_settings(folder, f"stopped-{times}-times", 2)
    for n in range(times):
        # Steps are counted anew at each start: the stop comes in the second step after it.
        stop(pool, values, 2, 1)
        assert (folder / f"stopped-{times}-times" / "checkpoints" / f"step-{n + 1:08d}").is_dir()
    require_same(outcome(pool, values, 2), straight[2, 2], first_step=times + 1)


def test_stopped_at_the_border_of_an_epoch_and_in_the_next_one(folder: Path, pool: WorkerPool) -> None:
    """Repeats that the steps go through several times; the text of the second pass is in another order."""
    outcomes: list[Outcome] = []
    for run in ("passes", "passes-stopped"):
        values = settings(folder, run, batch={"global_sequences": 8}, validation={"every_steps": 100, "sequences": 5})
        values["data"]["sources"] = {"wiki": {"path": str(folder / "wiki"), "repeat": 3.0}}
        values["schedule"] = {"steps": "auto", "learning_rate": 1e-2}
        if outcomes:
            steps = len(outcomes[0].rows)
            stop(pool, values, 1, steps // 3)
        outcomes.append(outcome(pool, values, 1))
    first, second = outcomes
    seen = [row for rows in first.rows.values() for row in rows]
    assert len(set(seen)) < len(seen), "some text is read again"
    require_same(second, first, first_step=len(first.rows) // 3 + 1)


def test_every_start_and_every_save_is_proved(folder: Path, pool: WorkerPool) -> None:
    """The base in memory is the record's: at the first start, at each save, and at the next start."""
    values = run_settings(folder, "proved", 3)
    stop(pool, values, 2, 5)
    events = [line for line in read_metrics(folder / "proved" / "metrics.jsonl") if line.get("event") == "proof"]
    assert len(events) == 3, "at the start, at step 4, at the stop"
    outcome(pool, values, 2)
    events = [line for line in read_metrics(folder / "proved" / "metrics.jsonl") if line.get("event") == "proof"]
    assert len(events) == 5
    assert {(line["equal"], line["total"]) for line in events} == {(39, 39)}
