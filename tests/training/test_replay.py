"""objective.replay_kl in whole runs: the same at every stage and world size, through stops, and it holds the base."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from llamapro.config.root import RunConfig
from llamapro.errors import ConfigError
from llamapro.modeling.model import LanguageModel
from llamapro.planning.memory import GIB
from llamapro.planning.run_job import beyond_plan
from llamapro.ranks import Ranks
from llamapro.training.mock_step import mock_step
from llamapro.training.preflight import check_facts
from tests.support.pool import WorkerError, WorkerPool
from tests.support.training import (
    SEQUENCE_LENGTH,
    losses,
    prepare,
    run_training,
    settings,
    state_digest,
    trained_weights,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("replay"))


def replaying(folder: Path, run: str, stage: int = 1, weight: float = 2.0, **sections: Any) -> dict[str, Any]:
    engine = {"precision": "float32", "zero_stage": stage}
    return settings(folder, run, engine=engine, objective={"replay_kl": weight, "sets": ["wiki"]}, **sections)


def divergences(metrics: list[dict[str, Any]]) -> list[float]:
    return [line["replay_kl"] for line in metrics if "replay_kl" in line]


@pytest.fixture(scope="module")
def reference(folder: Path, pool: WorkerPool) -> list[dict[str, Any]]:
    metrics: list[dict[str, Any]] = pool.run(run_training, replaying(folder, "reference"), world_size=1)[0]
    return metrics


@pytest.mark.parametrize(("stage", "world_size"), [(1, 2), (2, 2), (3, 2)])
def test_losses_and_divergences_do_not_depend_on_stage_or_world_size(
    folder: Path, pool: WorkerPool, reference: list[dict[str, Any]], stage: int, world_size: int
) -> None:
    """Of 7 sequences in micro-batches of 2 some ranks have none of wiki while others do.

    A sum divided by the wrong number of tokens would give other weights at another world size.
    """
    name = f"stage{stage}-{world_size}"
    metrics = pool.run(run_training, replaying(folder, name, stage), world_size=world_size)[0]
    assert losses(metrics) == pytest.approx(losses(reference), rel=1e-6)
    assert divergences(metrics) == pytest.approx(divergences(reference), rel=1e-4, abs=1e-7)
    expected = trained_weights(folder / "reference")
    for key, weights in trained_weights(folder / name).items():
        assert (weights - expected[key]).norm() <= 1e-4 * expected[key].norm(), key


def test_it_begins_at_the_base_and_holds_the_model_near_it(
    folder: Path, pool: WorkerPool, reference: list[dict[str, Any]]
) -> None:
    """With a weight of almost nothing the same run drifts further, as it does without."""
    loose = pool.run(run_training, replaying(folder, "loose", weight=1e-9), world_size=1)[0]
    assert divergences(reference)[0] == pytest.approx(0.0, abs=1e-7)
    assert 0 < divergences(reference)[-1] < 0.8 * divergences(loose)[-1]
    plain = pool.run(run_training, settings(folder, "plain"), world_size=1)[0]
    assert losses(loose) == pytest.approx(losses(plain), rel=1e-5) and divergences(plain) == []


@pytest.mark.parametrize("stage", [2, 3])
def test_stopped_and_resumed_equals_not_stopped(folder: Path, pool: WorkerPool, stage: int) -> None:
    values = replaying(folder, f"resumed{stage}", stage)
    with pytest.raises(WorkerError, match="RetryLater"):
        pool.run(run_training, values, 5)
    metrics = pool.run(run_training, values)[0]
    straight = pool.run(run_training, replaying(folder, f"straight{stage}", stage))[0]
    assert divergences(metrics) == divergences(straight) and losses(metrics) == losses(straight)
    assert state_digest(folder / f"resumed{stage}") == state_digest(folder / f"straight{stage}")


def test_the_plan_says_what_it_leaves_out_and_the_step_of_the_dry_run_takes_it(folder: Path, pool: WorkerPool) -> None:
    values = replaying(folder, "planned")
    plain = settings(folder, "planned")
    assert [pool.run(_base_passes_of_dry_run, each, world_size=1) for each in (values, plain)] == [[2], [0]]
    config = RunConfig.model_validate(values)
    job = check_facts(config, "pretrain", 1).job
    said = beyond_plan(config, job, micro_sequences=2)
    states = 3 * 2 * SEQUENCE_LENGTH * 32 * 4 / GIB
    assert "of wiki" in said and f"{job.flops().forward / 1e9:.3g} GFLOP" in said and f"{states:.2g} GiB" in said
    assert beyond_plan(RunConfig.model_validate(plain), job, micro_sequences=2) == ""


def _base_passes_of_dry_run(ranks: Ranks, values: dict[str, Any]) -> int:
    config = RunConfig.model_validate(values)
    facts = check_facts(config, "pretrain", ranks.world_size)
    with patch.object(LanguageModel, "bypassed", autospec=True, side_effect=LanguageModel.bypassed) as bypassed:
        mock_step(config, facts, ranks)
    return bypassed.call_count


def test_models_whose_base_learns_or_is_not_there_are_refused(folder: Path) -> None:
    for model, words in (
        ({"path": str(folder / "expanded"), "trainable": "all"}, "must not learn"),
        ({"path": str(folder / "base"), "trainable": "all"}, "never expanded"),
    ):
        values = replaying(folder, "x", model=model)
        with pytest.raises(ConfigError, match=rf"objective\.replay_kl: .*{words}"):
            check_facts(RunConfig.model_validate(values), "pretrain", 1)
