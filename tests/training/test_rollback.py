"""Runs with an injected fault: a spike takes them back to the last scheduled checkpoint, what is not finite is skipped.

Losses of chosen steps are multiplied on their way out of the model, on the last rank only: all ranks must decide alike.
"""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro.checkpoint.folder import Checkpoint, open_checkpoint
from llamapro.checkpoint.layout import folder_name
from llamapro.modeling.model import LossOutput
from llamapro.ranks import Ranks
from llamapro.training.batches import step_work
from llamapro.training.loop import train
from llamapro.training.metrics import read_metrics
from llamapro.training.progress import Progress
from llamapro.training.randomness import seed_step
from llamapro.training.saving import Saver
from llamapro.training.schedule import learning_rate
from llamapro.training.step import run_step
from llamapro.training.trainer_state import saved_state
from tests.support.data import flip_bit
from tests.support.pool import WorkerError, WorkerPool
from tests.support.training import losses, open_run, prepare, settings, state_digest

SPIKE = 1e6
# The first checkpoint is that of step 3, so these go back to 3 and to 6.
SPIKES = {5: SPIKE, 8: SPIKE}
STAGES = pytest.mark.parametrize("stage", [1, 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("rollback"))


def faulty(folder: Path, name: str, stage: int = 1, keep: int = 9, **guards: Any) -> dict[str, Any]:
    """Eight steps, a checkpoint every third. Spikes are far beyond what a curve of few steps does by itself."""
    rules = {"spike": "rollback", "spike_sigma": 1000.0, "spike_window_steps": 4, "max_skipped_in_a_row": 2}
    return settings(
        folder,
        name,
        engine={"precision": "float32", "zero_stage": stage},
        checkpoint={"every_steps": 3, "keep": keep},
        guards={**rules, **guards},
    )


def train_with_faults(
    ranks: Ranks, values: dict[str, Any], factors: dict[int, float], stop_in_step: int = 0, only_gradient: bool = False
) -> list[dict[str, Any]]:
    """Start or continue a run; returns metrics.jsonl. A pool job.

    Args:
        factors: what the loss is multiplied by, by step.
        stop_in_step: ask to stop after this step's first micro-batch.
        only_gradient: the loss that is reported stays as it was.
    """
    session, progress = open_run(ranks, values)
    forward, micro_batches, taken = session.engine.forward_loss, session.facts.accumulation_steps, 0

    def forward_loss(*inputs: Any) -> LossOutput:
        nonlocal taken
        output = forward(*inputs)
        if not torch.is_grad_enabled():
            return output
        step = progress.step + taken // micro_batches + 1
        taken += 1
        if step == stop_in_step and ranks.rank == 0:
            session.stop.request("the test asks")
        if step not in factors or ranks.rank != ranks.world_size - 1:
            return output
        rows = output.row_loss_sums if only_gradient else output.row_loss_sums * factors[step]
        return LossOutput(output.loss_sum * factors[step], rows, output.row_tokens)

    session.engine.forward_loss = forward_loss  # type: ignore[method-assign]
    try:
        train(session, progress)
    finally:
        session.metrics.close()
    return read_metrics(session.folder.metrics_file)


def checkpoint(folder: Path, name: str, step: int) -> Checkpoint:
    return open_checkpoint(folder / name / "checkpoints" / folder_name(step))


def progress_at(folder: Path, name: str, step: int) -> Progress:
    saved = saved_state(checkpoint(folder, name, step))
    assert saved is not None
    return saved.progress


def curve(metrics: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    names = ("step", "loss", "gradient_norm", "learning_rate", "sequences", "loss/law", "loss/wiki")
    return [tuple(line.get(name) for name in names) for line in metrics if "gradient_norm" in line]


def events(metrics: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [line for line in metrics if line.get("event") == name]


@pytest.fixture(scope="module")
def straight(folder: Path, pool: WorkerPool) -> dict[int, list[dict[str, Any]]]:
    """Metrics of an uninterrupted run on two ranks with both spikes, by ZeRO stage."""
    return {
        stage: pool.run(train_with_faults, faulty(folder, f"straight{stage}", stage), SPIKES, world_size=2)[0]
        for stage in (1, 3)
    }


@STAGES
def test_a_spike_undoes_the_updates_since_the_last_checkpoint(
    folder: Path, straight: dict[int, list[dict[str, Any]]], stage: int
) -> None:
    name = f"straight{stage}"
    said = [
        (event["step"], event["checkpoint"], event["skipped_steps"], event["skipped_sequences"])
        for event in events(straight[stage], "rollback")
    ]
    assert said == [(5, "step-00000003", [4, 5], [21, 34]), (8, "step-00000006", [7, 8], [42, 55])]
    assert state_digest(folder / name, 8) == state_digest(folder / name, 6) != state_digest(folder / name, 3)
    assert [checkpoint(folder, name, step).state.optimizer_steps for step in (3, 6, 8)] == [3, 4, 4]
    assert [progress_at(folder, name, step).skipped for step in (3, 6, 8)] == [0, 2, 4]
    assert [progress_at(folder, name, step).sequences for step in (3, 6, 8)] == [21, 42, 56]


def one_step_from(ranks: Ranks, values: dict[str, Any], step: int, sequences: int) -> None:
    """Take one step by hand from the newest checkpoint, as that step and on the sequences from that one on; save."""
    session, progress = open_run(ranks, values)
    batch, facts = session.config.batch.global_sequences, session.facts
    work = step_work(session.stream, sequences, batch, facts.micro_sequences, facts.accumulation_steps, ranks)
    seed_step(session.config.run.seed, step - 1, ranks.rank)
    outcome = run_step(session, work, learning_rate(step - 1, session.steps, session.config.schedule))
    before = replace(progress, step=step - 1, sequences=sequences)
    Saver(session, progress).save(before.after(outcome, batch))
    session.metrics.close()


@STAGES
def test_after_a_rollback_training_goes_on_from_the_checkpoint_with_the_text_after_the_spike(
    folder: Path, pool: WorkerPool, straight: dict[int, list[dict[str, Any]]], stage: int
) -> None:
    name = f"by-hand{stage}"
    target = folder / name / "checkpoints"
    target.mkdir(parents=True)
    shutil.copytree(folder / f"straight{stage}" / "checkpoints" / folder_name(3), target / folder_name(3))
    pool.run(one_step_from, faulty(folder, name, stage), 6, 35, world_size=2)
    assert state_digest(folder / name, 6) == state_digest(folder / f"straight{stage}", 6)


@STAGES
@pytest.mark.parametrize("stop", [5, 6, 8])  # between checkpoint and spike, after the rollback, before the next spike
def test_interrupted_and_resumed_gives_the_same_bits(
    folder: Path, pool: WorkerPool, straight: dict[int, list[dict[str, Any]]], stage: int, stop: int
) -> None:
    """Only one checkpoint is kept: the one saved at the stop must not push out the one to go back to."""
    values = faulty(folder, f"stopped{stage}-{stop}", stage, keep=1)
    with pytest.raises(WorkerError, match="RetryLater: the test asks"):
        pool.run(train_with_faults, values, SPIKES, stop, world_size=2)
    assert (folder / f"stopped{stage}-{stop}" / "checkpoints" / folder_name(stop - 1)).is_dir()
    metrics = pool.run(train_with_faults, values, SPIKES, world_size=2)[0]
    assert curve(metrics) == curve(straight[stage])
    assert state_digest(folder / f"stopped{stage}-{stop}") == state_digest(folder / f"straight{stage}")
    assert progress_at(folder, f"stopped{stage}-{stop}", 8) == progress_at(folder, f"straight{stage}", 8)


def test_resumed_at_another_world_size_the_same_sequences_are_skipped(
    folder: Path, pool: WorkerPool, straight: dict[int, list[dict[str, Any]]]
) -> None:
    values = faulty(folder, "elastic", 3)
    with pytest.raises(WorkerError, match="RetryLater"):
        pool.run(train_with_faults, values, SPIKES, 6, world_size=2)
    metrics = pool.run(train_with_faults, faulty(folder, "elastic", 1), SPIKES, world_size=1)[0]
    facts = [[event[key] for event in events(metrics, "rollback")] for key in ("skipped_steps", "skipped_sequences")]
    assert facts == [[[4, 5], [7, 8]], [[21, 34], [42, 55]]]
    ordinary = [step - 1 for step in range(1, 9) if step not in SPIKES]
    expected = [losses(straight[3])[index] for index in ordinary]
    assert [losses(metrics)[index] for index in ordinary] == pytest.approx(expected, rel=1e-5)


def test_before_the_first_checkpoint_a_spike_is_only_skipped_and_that_is_said(folder: Path, pool: WorkerPool) -> None:
    metrics = pool.run(train_with_faults, faulty(folder, "early"), {3: SPIKE}, world_size=2)[0]
    (said,) = events(metrics, "no rollback")
    assert said["step"] == 3 and "no checkpoint of every 3 steps yet" in said["reason"]
    assert len(events(metrics, "skip")) == 1 and not events(metrics, "rollback")
    assert "step 3 is only skipped: no checkpoint of every 3 steps to go back to yet" in pool.output()
    assert checkpoint(folder, "early", 3).state.optimizer_steps == 2
    assert progress_at(folder, "early", 3).skipped == 1


def test_going_back_to_the_same_checkpoint_again_and_again_stops_the_run(folder: Path, pool: WorkerPool) -> None:
    """In `straight`, under the same limit of 2, a checkpoint lies between the two spikes."""
    with pytest.raises(
        WorkerError, match="CheckFailed: 2 times the run went back to the checkpoint of step 3, the las"
    ):
        pool.run(train_with_faults, faulty(folder, "endless"), {5: SPIKE, 6: SPIKE}, world_size=2)
    assert not (folder / "endless" / "checkpoints" / folder_name(6)).exists()


def test_a_damaged_checkpoint_is_not_gone_back_to(folder: Path, pool: WorkerPool) -> None:
    values = faulty(folder, "damaged")
    with pytest.raises(WorkerError, match="RetryLater"):
        pool.run(train_with_faults, values, SPIKES, 5, world_size=2)
    member = folder / "damaged" / "checkpoints" / folder_name(3) / "rank-00001.safetensors"
    flip_bit(member, member.stat().st_size - 1)
    with pytest.raises(
        WorkerError, match=r"CheckFailed: a spike calls for a rollback.*rank-00001\.safetensors differs"
    ):
        pool.run(train_with_faults, values, SPIKES, world_size=2)


@STAGES
@pytest.mark.parametrize("only_gradient", [False, True])
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(
    folder: Path, pool: WorkerPool, stage: int, only_gradient: bool
) -> None:
    name = f"nan{stage}-{only_gradient}"
    values = faulty(folder, name, stage)
    values["checkpoint"]["every_steps"] = 1
    metrics = pool.run(train_with_faults, values, {4: math.nan}, 0, only_gradient, world_size=2)[0]
    (skip,) = events(metrics, "skip")
    assert (skip["step"], skip["reason"]) == (4, "gradient norm is inf" if only_gradient else "loss is nan")
    assert f"step 4 skipped: {skip['reason']}" in pool.output()
    assert not events(metrics, "rollback") and not events(metrics, "no rollback")
    assert state_digest(folder / name, 4) == state_digest(folder / name, 3) != state_digest(folder / name, 5)
    assert checkpoint(folder, name, 4).state.optimizer_steps == 3


@STAGES
def test_a_run_that_is_not_finite_any_more_stops(folder: Path, pool: WorkerPool, stage: int) -> None:
    values = faulty(folder, f"lost{stage}", stage)
    with pytest.raises(
        WorkerError, match="CheckFailed: 2 steps in a row were skipped, the last time because: loss is n"
    ):
        pool.run(train_with_faults, values, {4: math.nan, 5: math.nan}, world_size=2)
    assert len(events(read_metrics(folder / f"lost{stage}" / "metrics.jsonl"), "skip")) == 2
