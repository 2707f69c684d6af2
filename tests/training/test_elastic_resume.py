"""Resumed at another world size or ZeRO stage: the same state bit for bit, the same text, losses within rounding."""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamapro.checkpoint.folder import open_checkpoint
from llamapro.checkpoint.layout import folder_name
from llamapro.checkpoint.tensors import CheckpointTensors
from llamapro.engine.adamw import MOMENTS
from llamapro.ranks import Ranks
from tests.support.pool import WorkerPool
from tests.support.resumes import Outcome, outcome, stop
from tests.support.training import losses, open_run, prepare, settings

STOP = 4
RELATIVE_TOLERANCE = 1e-4
"""Another order of float32 sums: 1e-6 is seen here; resumes that lose something differ by 1e-3 and more."""
Array = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("elastic"))


@pytest.fixture(scope="module")
def straight(folder: Path, pool: WorkerPool) -> dict[tuple[int, int], Outcome]:
    """Outcomes of runs that were not stopped, by stage and world size; filled by the tests."""
    return {}


def run_settings(folder: Path, run: str, stage: int) -> dict[str, Any]:
    """Eight sequences per step and micro-batches of one: accumulation changes with the number of ranks."""
    return settings(
        folder,
        run,
        engine={"precision": "float32", "zero_stage": stage},
        batch={"global_sequences": 8, "micro_sequences": 1},
        optimizer={"weight_decay": 0.5},
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((3, 2), (1, 1)),
        ((1, 1), (3, 2)),
        pytest.param((2, 2), (2, 1), marks=pytest.mark.slow),
        pytest.param((2, 1), (2, 2), marks=pytest.mark.slow),
        pytest.param((3, 2), (3, 4), marks=pytest.mark.slow),
        pytest.param((2, 2), (2, 4), marks=pytest.mark.slow),
        pytest.param((3, 4), (3, 2), marks=pytest.mark.slow),
        pytest.param((3, 2), (1, 2), marks=pytest.mark.slow),
        pytest.param((1, 2), (3, 2), marks=pytest.mark.slow),
    ],
    ids=lambda case: f"zero{case[0]}x{case[1]}",
)
def test_resumed_elsewhere(
    folder: Path,
    pool: WorkerPool,
    straight: dict[tuple[int, int], Outcome],
    before: tuple[int, int],
    after: tuple[int, int],
) -> None:
    if before not in straight:
        straight[before] = outcome(pool, run_settings(folder, f"straight-{before}", before[0]), before[1])
    expected = straight[before]
    run = f"{before}-{after}"
    stop(pool, run_settings(folder, run, before[0]), before[1], STOP)
    values = run_settings(folder, run, after[0])
    require_loaded_as_saved(pool, values, after[1])
    found = outcome(pool, values, after[1])
    assert found.rows == {step: rows for step, rows in expected.rows.items() if step > STOP}
    assert losses(found.numbers)[:STOP] == losses(expected.numbers)[:STOP]
    assert losses(found.numbers) == pytest.approx(losses(expected.numbers), rel=RELATIVE_TOLERANCE)
    for name in ("learning_rate", "sequences", "tokens"):
        values_of = [[line.get(name) for line in one.numbers] for one in (found, expected)]
        assert values_of[0] == values_of[1], name
    assert found.groups == expected.groups and found.optimizer_steps == expected.optimizer_steps


def require_loaded_as_saved(pool: WorkerPool, values: dict[str, Any], world_size: int) -> None:
    """That the ranks together hold exactly the checkpoint, in its order, before they train."""
    checkpoint = open_checkpoint(Path(values["run"]["folder"]) / "checkpoints" / folder_name(STOP))
    saved, loaded = CheckpointTensors(checkpoint), pool.run(_loaded, values, world_size=world_size)
    names = {name for slices, _ in loaded for name, _, _ in slices}
    assert names == set(saved.names())
    for name in names:
        for key in ("master", *MOMENTS):
            whole = saved.read(name, key, 0, prod(saved.shape(name)))
            parts = [(start, part) for slices, _ in loaded for (one, start, which), part in slices.items()
                     if (one, which) == (name, key)]  # fmt: skip
            assert sum(len(part) for _, part in parts) == len(whole)
            for start, part in parts:
                assert np.array_equal(part.view(np.int32), whole[start : start + len(part)].view(np.int32))
    steps = {count for _, counts in loaded for count in counts}
    assert steps == {checkpoint.state.optimizer_steps}, "every partition counts for itself, and from the same number"


def _loaded(ranks: Ranks, values: dict[str, Any]) -> tuple[dict[tuple[str, int, str], Array], list[int]]:
    session, progress = open_run(ranks, values)
    assert progress.step == STOP
    slices = {
        (fragment.name, fragment.start, key): tensor.detach().numpy().copy()
        for fragment in session.engine.fragments()
        for key, tensor in fragment.tensors.items()
    }
    states = session.engine._optimizer.state.values()
    assert len({state["step"].data_ptr() for state in states}) == len(states), "no two share a counter"
    session.metrics.close()
    return slices, [int(state["step"]) for state in states]
