"""Adapters by peft in whole runs: the same at every ZeRO stage and world size, resumed exactly, the base untouched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamapro.cli.main import main
from llamapro.expansion.blocks import describe_blocks
from llamapro.expansion.record import read_record
from llamapro.ranks import Ranks
from llamapro.training.loop import train
from llamapro.training.metrics import read_metrics
from tests.support.models import save_tiny_llama
from tests.support.pool import WorkerError, WorkerPool
from tests.support.training import losses, open_run, prepare, run_training, settings, state_digest, trained_weights

RANK, ALPHA = 4, 8.0
STAGE_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("lora"))


def lora_settings(folder: Path, run: str, start: str = "base", blocks: Any = "all", **sections: Any) -> dict[str, Any]:
    lora = {"rank": RANK, "alpha": ALPHA, "blocks": blocks}
    model = {"path": str(folder / start), "trainable": "lora", "lora": lora}
    return settings(folder, run, model=model, **sections)


def at_stage(stage: int) -> dict[str, Any]:
    return {"precision": "float32", "zero_stage": stage}


def run_once(folder: Path, pool: WorkerPool, run: str, *arguments: Any, world_size: int = 1, **sections: Any) -> Path:
    """A run from start to end, or until it is stopped before the step that is given."""
    pool.run(run_training, lora_settings(folder, run, **sections), *arguments, world_size=world_size)
    return folder / run


def finished(folder: Path, pool: WorkerPool, stage: int, world_size: int) -> Path:
    """A run of all adapters, made when a test first asks for it."""
    run = folder / f"run-{stage}-{world_size}"
    return run if run.exists() else run_once(folder, pool, run.name, world_size=world_size, engine=at_stage(stage))


def export(run: Path, model: Path) -> Path:
    out = run.with_name(f"{run.name}-out")
    assert main(["export", str(run), str(out), "--model", str(model)]) == 0
    return out


def by_peft(base: Path, run: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The base loaded by transformers with the run's adapters put on it and merged by peft, knowing no code of ours."""
    masters = trained_weights(run)
    targets = sorted({name.removesuffix(".lora_A.weight") for name in masters if name.endswith(".lora_A.weight")})
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), config)
    adapters = {
        f"base_model.model.{name}": values.view(model.get_parameter(own_name(name)).shape)
        for name, values in masters.items()
    }
    assert set_peft_model_state_dict(model, adapters).unexpected_keys == []
    return model.merge_and_unload()


def own_name(name: str) -> str:
    return "base_model.model." + name.replace(".weight", ".default.weight")


def test_stages_and_world_sizes_give_the_same_losses(folder: Path, pool: WorkerPool) -> None:
    found = {}
    for stage, world_size in [(1, 1), (1, 2), (2, 2), (3, 2)]:
        run = finished(folder, pool, stage, world_size)
        found[stage, world_size] = losses(read_metrics(run / "metrics.jsonl"))
    for other in found.values():
        assert other == pytest.approx(found[1, 1], rel=STAGE_TOLERANCE)
    assert state_digest(folder / "run-2-2") == state_digest(folder / "run-3-2")
    assert all(values.any() for name, values in trained_weights(folder / "run-1-1").items() if "lora_B" in name)


@pytest.fixture(scope="module")
def exported(folder: Path, pool: WorkerPool) -> tuple[Path, Path]:
    """A run on the plain model, and its export."""
    run = run_once(folder, pool, "merged")
    return run, export(run, folder / "base")


def test_the_export_is_what_peft_merges(folder: Path, exported: tuple[Path, Path]) -> None:
    run, out = exported
    merged, found = by_peft(folder / "base", run).state_dict(), load_file(out / "model.safetensors")
    base = load_file(folder / "base" / "model.safetensors")
    assert found.keys() == base.keys() <= merged.keys()
    assert [name for name in found if not torch.equal(found[name], merged[name])] == []
    moved = {name for name in base if not torch.equal(found[name], base[name])}
    assert moved == {name.replace(".lora_A", "") for name in trained_weights(run) if ".lora_A" in name}
    assert len(moved) == 7 * 4


def test_the_exports_logits_are_those_of_the_run(folder: Path, pool: WorkerPool, exported: tuple[Path, Path]) -> None:
    """Of a float32 model; the last validation of the run itself is scored again on what was exported."""
    run, out = exported
    metrics = read_metrics(run / "metrics.jsonl")
    (last,) = [line for line in metrics if line.get("step") == 8 and "validation/law/loss" in line]
    values = settings(folder, "rescored", model={"path": str(out), "trainable": "all"})
    values["schedule"] = {"steps": 1, "learning_rate": 1e-3}
    again = pool.run(run_training, values, world_size=1)[0]
    first = next(line for line in again if "validation/law/loss" in line)
    assert first["step"] == 0
    for name in ("law", "wiki"):
        assert first[f"validation/{name}/loss"] == pytest.approx(last[f"validation/{name}/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "before", "after"), [(1, 1, 2), pytest.param(2, 2, 2, marks=pytest.mark.slow), (3, 2, 1)]
)
def test_stopped_and_continued(folder: Path, pool: WorkerPool, stage: int, before: int, after: int) -> None:
    straight = finished(folder, pool, stage, before)
    stopped = f"stopped-{stage}"
    with pytest.raises(WorkerError, match="RetryLater"):
        run_once(folder, pool, stopped, 5, world_size=before, engine=at_stage(stage))
    run_once(folder, pool, stopped, world_size=after, engine=at_stage(stage))
    expected, found = trained_weights(straight), trained_weights(folder / stopped)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert torch.allclose(found[name], values, rtol=1e-4, atol=1e-5), name
    if before == after:
        assert state_digest(folder / stopped) == state_digest(straight)


def test_an_expanded_models_record_says_what_was_merged(folder: Path, pool: WorkerPool) -> None:
    run = run_once(folder, pool, "above", world_size=2, start="expanded", engine=at_stage(3))
    model, out = folder / "expanded", export(folder / "above", folder / "expanded")
    before, after = read_record(model), read_record(out)
    assert before is not None and after is not None
    proofs = [line for line in read_metrics(run / "metrics.jsonl") if line.get("event") == "proof"]
    assert {(line["equal"], line["total"]) for line in proofs} == {(len(before.base_tensors),) * 2}
    linears = {name.replace(".lora_A", "") for name in trained_weights(run) if ".lora_A" in name}
    assert after.trained.blocks == before.new_blocks
    assert set(after.trained.tensors) == linears & before.base_tensors.keys()
    assert linears <= after.trained.digests.keys()
    assert main(["verify", str(out), "--base", str(folder / "base")]) == 0
    assert [row.trained for row in describe_blocks(out).blocks] == [True] * after.blocks
    untouched, found = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name for name in found if not torch.equal(found[name], untouched[name])} == linears
    damage(out / "model.safetensors", "model.layers.0.input_layernorm.weight")
    assert main(["verify", str(out)]) == 1


def damage(file: Path, name: str) -> None:
    tensors = load_file(file)
    tensors[name][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_new_blocks_alone_and_rebuilt_from_a_delta(folder: Path, pool: WorkerPool) -> None:
    run = run_once(folder, pool, "new", start="expanded", blocks="new", schedule={"steps": 4, "learning_rate": 1e-2})
    model, out = folder / "expanded", export(run, folder / "expanded")
    record = read_record(out)
    assert record is not None and record.trained.blocks == record.new_blocks and record.trained.tensors == ()
    delta, again = folder / "delta", folder / "again"
    assert main(["export", str(run), str(delta), "--model", str(model), "--delta"]) == 0
    assert main(["export", str(delta), str(again), "--base", str(folder / "base")]) == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_weights_that_change_under_adapters_are_found(folder: Path, pool: WorkerPool) -> None:
    """Of a plain model, whose folder stands in for a record."""
    values = lora_settings(folder, "changed", engine=at_stage(2))
    with pytest.raises(WorkerError, match=r"38 of 39 base tensors equal the model folder; different: .*q_proj.weight"):
        pool.run(run_with_a_changed_weight, values, world_size=2)
    metrics = read_metrics(finished(folder, pool, 2, 2) / "metrics.jsonl")
    proof = next(line for line in metrics if line.get("event") == "proof")
    assert proof["equal"] == proof["total"] == 39


def run_with_a_changed_weight(ranks: Ranks, values: dict[str, Any]) -> None:
    session, progress = open_run(ranks, values)
    with torch.no_grad():
        session.engine.model.hf.get_parameter("model.layers.2.self_attn.q_proj.base_layer.weight")[0, 0] += 1
    train(session, progress)


def test_a_folder_that_is_not_the_trained_one_is_refused(
    folder: Path, pool: WorkerPool, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_llama(folder / "other", blocks=4, seed=1)
    run = finished(folder, pool, 1, 1)
    assert main(["export", str(run), str(folder / "wrong"), "--model", str(folder / "other")]) == 1
    assert "holds adapters for another model" in capsys.readouterr().err


def test_a_plain_model_is_pretrained_as_a_whole(folder: Path, pool: WorkerPool) -> None:
    model = {"path": str(folder / "base"), "trainable": "all"}
    for stage in (1, 3):
        values = settings(folder, f"all-{stage}", model=model, engine=at_stage(stage))
        pool.run(run_training, values, world_size=2)
    first, third = (trained_weights(folder / f"all-{stage}") for stage in (1, 3))
    base = load_file(folder / "base" / "model.safetensors")
    assert first.keys() == third.keys() == base.keys()
    for name, values in first.items():
        assert torch.allclose(values, third[name], rtol=1e-4, atol=1e-5), name
        assert not torch.equal(values, base[name].flatten()), name
