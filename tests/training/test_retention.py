"""The retention gate: held-out text against the base, measured once, at every stage, through stops and resumes."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import load_file, save_file

from llamapro.config.root import RunConfig
from llamapro.errors import ConfigError
from llamapro.export.export import export
from llamapro.modeling.model import LanguageModel
from llamapro.ranks import Ranks
from llamapro.training.metrics import read_metrics
from llamapro.training.preflight import check_facts
from llamapro.training.tokenizer import model_tokenizer_identity
from tests.support.datasets import write_dataset
from tests.support.models import save_tiny_llama
from tests.support.pool import WorkerError, WorkerPool
from tests.support.training import losses, prepare_around_base, run_training, settings, state_digest

INCREASE = "validation/wiki/increase_over_base"
HEAD = "lm_head.weight"
FEW_IDS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that knows next to nothing, so that what is learned makes it worse on all other text."""
    folder = tmp_path_factory.mktemp("retention")
    weights = save_tiny_llama(folder / "base") / "model.safetensors"
    save_file(load_file(weights) | {HEAD: 0.2 * load_file(weights)[HEAD]}, weights, {"format": "pt"})
    prepare_around_base(folder)
    write_dataset(folder / "few", model_tokenizer_identity(folder / "expanded"), train=120, vocabulary=FEW_IDS)
    return folder


def drifting(folder: Path, run: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run that learns that few ids ever occur, so that it gets worse on wiki, which has many."""
    values = settings(folder, run, **sections)
    values["data"]["sources"] |= {
        "law": {"path": str(folder / "few"), "weight": 0.99},
        "wiki": {"path": str(folder / "wiki"), "weight": 0.01},
    }
    return values


def guarded(folder: Path, run: str, bound: float, action: str, **sections: dict[str, Any]) -> dict[str, Any]:
    guard = {"retention": {"set": "wiki", "max_increase_fraction": bound, "action": action}}
    return drifting(folder, run, guards=guard, **sections)


def increases(metrics: list[dict[str, Any]]) -> dict[int, float]:
    return {line["step"]: line[INCREASE] for line in metrics if INCREASE in line}


def held_out(metrics: list[dict[str, Any]]) -> dict[int, float]:
    key = "validation/wiki/loss"
    return {line["step"]: line[key] for line in metrics if key in line}


def events(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in metrics if line.get("event") == "retention"]


@pytest.mark.parametrize("stage", [2, 3])
def test_increase_is_that_over_the_base_and_a_warning_changes_nothing(
    folder: Path, pool: WorkerPool, stage: int
) -> None:
    """Before the first step an expanded model is its base, so that validation is what a base scores."""
    engine = {"precision": "float32", "zero_stage": stage}
    plain = drifting(folder, f"plain{stage}", engine=engine)
    values = guarded(folder, f"warned{stage}", 1e-6, "warn", engine=engine)
    metrics = pool.run(run_training, values)[0]
    scores = held_out(metrics)
    assert increases(metrics) == {step: pytest.approx(loss / scores[0] - 1) for step, loss in scores.items()}
    assert increases(metrics)[0] == 0.0 and increases(metrics)[8] > 0.001
    assert [event["step"] for event in events(metrics)] == [step for step, x in increases(metrics).items() if x > 1e-6]
    assert held_out(pool.run(run_training, plain)[0]) == scores


@pytest.mark.parametrize("stage", [2, 3])
def test_a_stop_saves_and_ends_the_run_at_the_first_validation_beyond_the_bound(
    folder: Path, pool: WorkerPool, stage: int
) -> None:
    """Unchanged it stops there again, with no step taken; with a higher bound it goes on as if never stopped."""
    sections: dict[str, dict[str, Any]] = {
        "engine": {"precision": "float32", "zero_stage": stage},
        "validation": {"every_steps": 3},
        "checkpoint": {"every_steps": 2},
    }
    run = f"stopped{stage}"
    values = guarded(folder, run, 1e-6, "stop", **sections)
    for _ in range(2):
        with pytest.raises(WorkerError, match=r"CheckFailed: step 3: held-out wiki is \+\d+\.\d\d% .* the run stops"):
            pool.run(run_training, values)
        saved = sorted(path.name for path in (folder / run / "checkpoints").glob("step-*"))
        assert saved == ["step-00000002", "step-00000003"]
        lines = read_metrics(folder / run / "metrics.jsonl")
        assert len(losses(lines)) == 3 and list(increases(lines)) == [0, 3]
    metrics = pool.run(run_training, guarded(folder, run, 1e9, "stop", **sections))[0]
    straight = pool.run(run_training, guarded(folder, f"straight{stage}", 1e9, "stop", **sections))[0]
    assert losses(metrics) == losses(straight) and increases(metrics) == increases(straight)
    assert state_digest(folder / run) == state_digest(folder / f"straight{stage}")


def test_text_within_the_bound_passes_silently(folder: Path, pool: WorkerPool) -> None:
    metrics = pool.run(run_training, guarded(folder, "kept", 1e9, "stop"))[0]
    assert len(increases(metrics)) == 3 and events(metrics) == []


def test_base_is_measured_once_and_remembered_through_a_resume(folder: Path, pool: WorkerPool) -> None:
    values = guarded(folder, "resumed", 1e-6, "warn")
    with pytest.raises(WorkerError, match="RetryLater"):
        pool.run(run_training, values, 5)
    uses, metrics = pool.run(_bypasses_of_training, values)[0]
    assert uses == 0
    straight = pool.run(run_training, guarded(folder, "straight", 1e-6, "warn"))[0]
    assert increases(metrics) == increases(straight)


def _bypasses_of_training(ranks: Ranks, values: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    with patch.object(LanguageModel, "bypassed", autospec=True, side_effect=LanguageModel.bypassed) as bypassed:
        metrics = run_training(ranks, values)
    return bypassed.call_count, metrics


def test_a_model_trained_before_is_held_against_its_base_not_against_its_start(folder: Path, pool: WorkerPool) -> None:
    """Also by a guard that a resumed run gets only later."""
    first = held_out(pool.run(run_training, drifting(folder, "first"))[0])
    export(folder / "first", folder / "first-exported", model=folder / "expanded")
    model = {"path": str(folder / "first-exported")}
    values = guarded(folder, "second", 1e9, "stop", model=model)
    without = {**values, "guards": {}}
    with pytest.raises(WorkerError, match="RetryLater"):
        pool.run(run_training, without, 5)
    metrics = pool.run(run_training, values)[0]
    scores = held_out(metrics)
    assert scores[0] == pytest.approx(first[8], rel=1e-6) and scores[0] != first[0]
    assert increases(metrics) == {8: pytest.approx(scores[8] / first[0] - 1)}


def test_where_everything_learns_the_base_is_that_of_the_start(folder: Path, pool: WorkerPool) -> None:
    everything = {"path": str(folder / "expanded"), "trainable": "all"}
    values = guarded(folder, "everything", 1e9, "stop", model=everything)
    metrics = pool.run(run_training, values)[0]
    scores = held_out(metrics)
    assert increases(metrics) == {step: pytest.approx(loss / scores[0] - 1) for step, loss in scores.items()}
    late = guarded(folder, "late", 1e9, "stop", model=everything)
    with pytest.raises(WorkerError, match="RetryLater"):
        pool.run(run_training, {**late, "guards": {}}, 5)
    with pytest.raises(WorkerError, match="UserError: guards.retention compares wiki with the base"):
        pool.run(run_training, late)


def problems(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check_facts(RunConfig.model_validate(values), "pretrain", 1)
    return "\n".join(caught.value.problems)


def test_a_run_without_a_base_or_without_text_to_compare_is_refused_before_the_start(folder: Path) -> None:
    plain = {"path": str(folder / "base"), "trainable": "all"}
    assert "guards.retention: the model was never expanded" in problems(guarded(folder, "x", 0.1, "warn", model=plain))
    moved = {"path": str(folder / "expanded"), "trainable": "all"}
    start = {"start_from": str(folder / "wiki")}
    found = problems(guarded(folder, "x", 0.1, "warn", model=moved, checkpoint=start))
    assert "guards.retention: weights of the base itself learn here" in found
    write_dataset(folder / "unscored", model_tokenizer_identity(folder / "expanded"), heldout=0)
    values = guarded(folder, "x", 0.1, "warn")
    values["data"]["sources"]["wiki"]["path"] = str(folder / "unscored")
    assert "guards.retention.set: wiki has no held-out documents" in problems(values)
