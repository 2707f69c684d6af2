"""Whole runs of mixtures of experts, whose experts are stored one by one and trained as one parameter."""

import re
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro.expansion.record import ExpansionRecord, read_record
from llamapro.expansion.verify import verify
from llamapro.export.export import export
from llamapro.files.tensors import TensorFolder
from llamapro.ranks import Ranks
from llamapro.training.progress import Progress
from llamapro.training.proof import prove_frozen_weights
from tests.support.expansion import all_tensors, flip_bit, logits
from tests.support.exports import files_of
from tests.support.families import TINY_FAMILIES
from tests.support.models import tiny_tokenizer
from tests.support.pool import WorkerError, WorkerPool
from tests.support.training import (
    losses,
    open_run,
    prepare_around_base,
    run_training,
    settings,
    state_digest,
    trained_weights,
)

TINY = {family.name: family for family in TINY_FAMILIES}
SHORT: dict[str, dict[str, Any]] = {
    "schedule": {"steps": 4, "learning_rate": 1e-3},
    "checkpoint": {"every_steps": 2},
    "validation": {"every_steps": 4, "sequences": 2},
}


def base_and_data(name: str, folder: Path) -> Path:
    TINY[name].save(folder / "base", vocab_size=320, max_position_embeddings=256)
    tiny_tokenizer().save_pretrained(folder / "base")
    return prepare_around_base(folder)


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture in every block, under names of its own; and one of sparse and dense blocks."""
    return base_and_data(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def runs(folder: Path, pool: WorkerPool) -> dict[int, list[float]]:
    """The losses of four steps on two ranks, at each stage."""
    return {stage: run_short(pool, folder, f"stage{stage}", stage, 2) for stage in (1, 2, 3)}


def short_settings(folder: Path, name: str, stage: int, **sections: Any) -> dict[str, Any]:
    engine = {"precision": "float32", "zero_stage": stage, **sections.pop("engine", {})}
    return settings(folder, name, engine=engine, **{**SHORT, **sections})


def run_short(pool: WorkerPool, folder: Path, name: str, stage: int, world_size: int, **sections: Any) -> list[float]:
    """The losses of a run whose every proof found every base tensor as it is stored."""
    values = short_settings(folder, name, stage, **sections)
    metrics: list[dict[str, Any]] = pool.run(run_training, values, world_size=world_size)[0]
    proofs = [line for line in metrics if line.get("event") == "proof"]
    assert proofs and all(line["equal"] == line["total"] == len(record_of(folder).base_tensors) for line in proofs)
    return losses(metrics)


def record_of(folder: Path) -> ExpansionRecord:
    record = read_record(folder / "expanded")
    assert record is not None
    return record


def test_every_stage_trains_the_same_and_saves_every_stored_tensor_of_the_new_blocks(
    folder: Path, runs: dict[int, list[float]]
) -> None:
    assert runs[2] == runs[3] and state_digest(folder / "stage2") == state_digest(folder / "stage3")
    assert runs[1] == pytest.approx(runs[2], rel=1e-6)
    stored = TensorFolder.open(folder / "expanded").entries
    trained = trained_weights(folder / "stage3")
    assert trained.keys() == stored.keys() - record_of(folder).base_tensors.keys()
    assert any(".experts.3." in name for name in trained)
    before = all_tensors(folder / "expanded")
    still = [name for name, values in trained.items() if torch.equal(values, before[name].flatten())]
    assert not [name for name in still if "down_proj" in name or ".w2." in name], "a zero matrix never moved"


def test_another_stage_and_world_size_continues(folder: Path, pool: WorkerPool, runs: dict[int, list[float]]) -> None:
    with pytest.raises(WorkerError, match="RetryLater"):
        pool.run(run_training, short_settings(folder, "elastic", 3), 2, world_size=2)
    assert run_short(pool, folder, "elastic", 1, 1) == pytest.approx(runs[3], rel=1e-5)


@pytest.mark.usefixtures("runs")
def test_an_export_is_verified_and_is_what_plain_transformers_makes_of_the_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    export(folder / "stage3", tmp_path / "full", model=folder / "expanded")
    assert verify(tmp_path / "full", folder / "base").problems == ()
    exported, trained = all_tensors(tmp_path / "full"), trained_weights(folder / "stage3")
    for name, tensor in all_tensors(folder / "expanded").items():
        expected = trained[name].view(tensor.shape) if name in trained else tensor
        assert torch.equal(exported[name], expected), name
    found, base = logits(tmp_path / "full", cached=False), logits(folder / "base", cached=False)
    assert found.isfinite().all() and 0 < (found - base).abs().max() < 1
    export(folder / "stage3", tmp_path / "delta", model=folder / "expanded", delta=True)
    assert all_tensors(tmp_path / "delta/tensors").keys() == trained.keys()
    export(tmp_path / "delta", tmp_path / "rebuilt", base=str(folder / "base"))
    assert files_of(tmp_path / "rebuilt") == files_of(tmp_path / "full")


def test_where_everything_learns_everything_is_saved_and_exported(
    folder: Path, pool: WorkerPool, tmp_path: Path
) -> None:
    found = {}
    for stage in (2, 3):
        model = {"path": str(folder / "expanded"), "trainable": "all"}
        values = short_settings(folder, f"all{stage}", stage, model=model)
        found[stage] = losses(pool.run(run_training, values, world_size=2)[0])
    assert found[2] == found[3]
    trained = trained_weights(folder / "all3")
    assert trained.keys() == all_tensors(folder / "expanded").keys()
    export(folder / "all3", tmp_path / "full", model=folder / "expanded")
    for name, tensor in all_tensors(tmp_path / "full").items():
        assert torch.equal(tensor.flatten(), trained[name]), name
    assert verify(tmp_path / "full", folder / "base").problems == ()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_bit_that_flips_in_one_frozen_expert_in_memory_is_found_and_named(
    folder: Path, pool: WorkerPool, stage: int
) -> None:
    expected = next(name for name in sorted(record_of(folder).base_tensors) if ".experts.1." in name)
    with pytest.raises(WorkerError, match=rf"CheckFailed.*: {re.escape(expected)} \(bits differ\); nothing"):
        pool.run(_flip_in_memory, short_settings(folder, f"flipped{stage}", stage), expected, world_size=2)


def test_a_bit_that_flips_in_one_expert_on_disk_is_found_and_named(
    folder: Path, pool: WorkerPool, tmp_path: Path
) -> None:
    shutil.copytree(folder / "expanded", tmp_path / "expanded")
    name = next(name for name in sorted(record_of(folder).base_tensors) if ".experts.2." in name)
    flip_bit(tmp_path / "expanded", name, byte=5)
    values = short_settings(folder, "damaged", 3, model={"path": str(tmp_path / "expanded")})
    with pytest.raises(WorkerError, match=rf"{re.escape(name)} differ from the expansion record"):
        pool.run(run_training, values, world_size=2)


def test_stored_buffers_are_proved_also_where_the_parameters_are_rounded(pool: WorkerPool, tmp_path: Path) -> None:
    """Router biases stay float32 in bf16; all else is proved against the rounded bytes."""
    folder = base_and_data("deepseek_v3", tmp_path)
    assert any(name.endswith("e_score_correction_bias") for name in record_of(folder).base_tensors)
    cast = {"path": str(folder / "expanded"), "allow_cast": True}
    run_short(pool, folder, "bf16", 3, 2, engine={"precision": "bf16"}, model=cast)


def _flip_in_memory(ranks: Ranks, values: dict[str, Any], name: str) -> None:
    """Flip the lowest bit of the middle of a stored tensor, on the rank that holds it."""
    session, _ = open_run(ranks, values)
    entry = TensorFolder.open(Path(values["model"]["path"])).entries[name]
    middle = prod(entry.shape) // 2
    for stored, start, part in session.engine.frozen_slices():
        if stored == name and start <= middle < start + part.numel():
            part.view(torch.int32)[middle - start] ^= 1
    prove_frozen_weights(session, Progress())
