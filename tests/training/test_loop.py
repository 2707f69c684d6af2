"""Whole runs: equal losses at every stage and world size, exact resume, frozen weights, per-source accounting."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamapro.config.root import RunConfig
from llamapro.expansion.record import read_record
from llamapro.planning.memory import GIB
from llamapro.ranks import Ranks
from llamapro.training.preflight import check_facts
from tests.support.pool import WorkerError, WorkerPool
from tests.support.training import losses, open_run, prepare, run_training, settings, state_digest, trained_weights

FLOAT32_TOLERANCE = 1e-6
BF16_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def reference(folder: Path, pool: WorkerPool) -> list[dict[str, Any]]:
    """Eight steps on one rank at stage 1."""
    return run_once(pool, settings(folder, "reference"), world_size=1)


def run_once(pool: WorkerPool, values: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    metrics: list[dict[str, Any]] = pool.run(run_training, values, world_size=world_size)[0]
    return metrics


@pytest.mark.parametrize(("stage", "world_size"), [(1, 2), (2, 2), (3, 2), (3, 1), (2, 3), (3, 3)])
def test_losses_and_weights_do_not_depend_on_stage_or_world_size(
    folder: Path, pool: WorkerPool, reference: list[dict[str, Any]], stage: int, world_size: int
) -> None:
    """7 sequences divide neither 2 nor 3 ranks, nor micro-batches of 2.

    Sums in another order differ in the last bits of float32: 1e-6 relative on losses. Adam's first updates are about
    the sign of the gradient, so single weights whose gradient is almost 0 differ more; tensors are compared as wholes.
    """
    name = f"stage{stage}-world{world_size}"
    values = settings(folder, name, engine={"precision": "float32", "zero_stage": stage})
    found = run_once(pool, values, world_size)
    assert losses(found) == pytest.approx(losses(reference), rel=FLOAT32_TOLERANCE)
    expected = trained_weights(folder / "reference")
    for key, weights in trained_weights(folder / name).items():
        assert (weights - expected[key]).norm() <= 1e-4 * expected[key].norm(), key


def test_stages_2_and_3_are_bitwise_equal(folder: Path, pool: WorkerPool) -> None:
    for stage in (2, 3):
        engine = {"precision": "bf16", "zero_stage": stage}
        run_once(pool, settings(folder, f"bits{stage}", engine=engine, model=_cast(folder)), world_size=2)
    assert state_digest(folder / "bits2") == state_digest(folder / "bits3")


def test_recomputed_blocks_change_nothing(folder: Path, pool: WorkerPool, reference: list[dict[str, Any]]) -> None:
    values = settings(folder, "recomputed")
    needed = check_facts(RunConfig.model_validate(values), "pretrain", 1).memory.activations
    values["engine"] |= {"activation_memory_gib": 0.6 * needed / GIB}
    assert losses(run_once(pool, values, world_size=1)) == losses(reference)
    assert state_digest(folder / "recomputed") == state_digest(folder / "reference")
    assert re.search(r"activations: .* GiB planned; recomputed: \d of \d blocks, \+", pool.output())


def test_bf16_losses_agree_between_stages_and_world_sizes(folder: Path, pool: WorkerPool) -> None:
    found = []
    for stage, world_size in [(1, 2), (3, 2), (1, 1)]:
        values = settings(
            folder,
            f"bf16-{stage}-{world_size}",
            engine={"precision": "bf16", "zero_stage": stage},
            model=_cast(folder),
            schedule={"learning_rate": 1e-3},
        )
        found.append(losses(run_once(pool, values, world_size)))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=BF16_TOLERANCE)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("stop", [0, 3, 5, 7])
def test_stopped_in_mid_accumulation_and_resumed_equals_not_stopped(
    folder: Path, pool: WorkerPool, stage: int, stop: int
) -> None:
    engine = {"precision": "float32", "zero_stage": stage}
    straight, stopped = f"straight{stage}", f"stopped{stage}-{stop}"
    if not (folder / straight).exists():
        run_once(pool, settings(folder, straight, engine=engine), world_size=2)
    values = settings(folder, stopped, engine=engine)
    with pytest.raises(WorkerError, match="RetryLater: the test asks"):
        pool.run(run_training, values, stop, world_size=2)
    metrics = run_once(pool, values, world_size=2)
    expected = pool.run(_metrics, settings(folder, straight), world_size=1)[0]
    assert _without_clock(metrics) == _without_clock(expected)
    assert state_digest(folder / stopped) == state_digest(folder / straight)


def test_resumed_at_another_world_size_and_stage_sees_the_same_sequences_and_losses(
    folder: Path, pool: WorkerPool, reference: list[dict[str, Any]]
) -> None:
    first = settings(folder, "elastic", engine={"precision": "float32", "zero_stage": 3})
    with pytest.raises(WorkerError, match="RetryLater"):
        pool.run(run_training, first, 4, world_size=2)
    second = settings(folder, "elastic", engine={"precision": "float32", "zero_stage": 1})
    metrics = run_once(pool, second, world_size=3)
    assert losses(metrics) == pytest.approx(losses(reference), rel=1e-5)


def test_base_tensors_are_untouched_and_new_blocks_moved(folder: Path, reference: list[dict[str, Any]]) -> None:
    record = read_record(folder / "expanded")
    assert record is not None
    weights = trained_weights(folder / "reference")
    assert {name.split(".")[2] for name in weights} == {str(block) for block in record.new_blocks}
    before = load_file(folder / "expanded" / "model.safetensors")
    for name in weights:
        assert not torch.equal(weights[name], before[name].flatten().float()), f"{name} never moved"
    proofs = [line for line in reference if line.get("event") == "proof"]
    assert proofs and all(proof["equal"] == proof["total"] == len(record.base_tensors) for proof in proofs)


def test_step_0_is_the_base(folder: Path, reference: list[dict[str, Any]]) -> None:
    identity = [line for line in reference if line.get("event") == "identity"]
    assert [line["max_logit_difference"] for line in identity] == [0.0]


def test_a_block_that_is_no_identity_is_refused_before_the_first_step(
    folder: Path, pool: WorkerPool, tmp_path: Path
) -> None:
    with pytest.raises(WorkerError, match=r"CheckFailed: the new blocks 2, 5 change the logits"):
        pool.run(_run_with_broken_identity, settings(folder, str(tmp_path / "broken")), world_size=1)


def test_a_changed_frozen_weight_stops_the_run_and_nothing_is_saved(
    folder: Path, pool: WorkerPool, tmp_path: Path
) -> None:
    values = settings(folder, str(tmp_path / "flipped"))
    with pytest.raises(WorkerError, match=r"CheckFailed: frozen weights changed.*model\.norm\.weight"):
        pool.run(_run_with_flipped_weight, values, world_size=2)
    assert not list((tmp_path / "flipped" / "checkpoints").glob("step-*"))


def test_metrics_have_every_promised_name(reference: list[dict[str, Any]]) -> None:
    names = {"loss", "learning_rate", "gradient_norm", "tokens_per_second_per_gpu", "memory_gib", "data_wait_fraction"}
    step = next(line for line in reference if line.get("step") == 3 and "loss" in line)
    assert names | {"tokens", "loss/law", "loss/wiki"} <= set(step)
    validated = [line["step"] for line in reference if "validation/law/bits_per_byte" in line]
    assert validated == [0, 4, 8]


def test_changed_weights_on_resume_begin_a_new_stage_and_lose_nothing(folder: Path, pool: WorkerPool) -> None:
    values = settings(folder, "restaged")
    with pytest.raises(WorkerError, match="RetryLater"):
        pool.run(run_training, values, 4, world_size=1)
    values["data"]["sources"]["law"]["weight"] = 0.1
    stages = pool.run(_stages_after_resume, values, world_size=1)[0]
    assert [stage[0] for stage in stages] == [0, 28]
    assert stages[1][1] == {"law": 0.1, "wiki": 0.3}
    assert sum(stages[1][2].values()) == 28


def test_start_from_takes_the_weights_and_a_fresh_optimizer(
    folder: Path, pool: WorkerPool, reference: list[dict[str, Any]]
) -> None:
    values = settings(folder, "second", checkpoint={"every_steps": 4, "start_from": str(folder / "reference")})
    metrics = run_once(pool, values, world_size=1)
    assert losses(metrics)[0] < losses(reference)[0]
    assert [line["step"] for line in metrics if "gradient_norm" in line] == list(range(1, 9))


def _cast(folder: Path) -> dict[str, Any]:
    return {"path": str(folder / "expanded"), "allow_cast": True}


def _without_clock(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    clocks = {"tokens_per_second_per_gpu", "memory_gib", "data_wait_fraction", "step_seconds", "time", "seconds"}
    return [{k: v for k, v in line.items() if k not in clocks} for line in metrics if "event" not in line]


def _metrics(ranks: Ranks, values: dict[str, Any]) -> list[dict[str, Any]]:
    from llamapro.training.metrics import read_metrics

    return read_metrics(Path(values["run"]["folder"]) / "metrics.jsonl")


def _run_with_broken_identity(ranks: Ranks, values: dict[str, Any]) -> None:
    from llamapro.training.proof import prove_identity

    session, progress = open_run(ranks, values)
    weight = dict(session.engine.model.trainable_parameters())["model.layers.2.self_attn.o_proj.weight"]
    with torch.no_grad():
        weight[0, 0] = 1.0
    prove_identity(session, progress)


def _run_with_flipped_weight(ranks: Ranks, values: dict[str, Any]) -> None:
    from llamapro.training.progress import Progress
    from llamapro.training.saving import Saver

    session, progress = open_run(ranks, values)
    weight = dict(session.engine.model.hf.named_parameters())["model.norm.weight"]
    with torch.no_grad():
        weight.view(torch.int32)[5] ^= 1
    Saver(session, progress).save(Progress(step=1))


def _stages_after_resume(ranks: Ranks, values: dict[str, Any]) -> list[tuple[int, dict[str, float], dict[str, int]]]:
    session, progress = open_run(ranks, values)
    assert progress.sequences == 28
    return [(stage.from_sequence, dict(stage.weights), dict(stage.taken)) for stage in session.stream.stages]
