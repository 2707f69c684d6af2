"""Adapters by peft in whole runs: the same at every ZeRO stage and world size, resumed exactly, the base untouched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamapro.cli.main import main
from llamapro.training.metrics import read_metrics
from tests.support.pool import WorkerPool
from tests.support.training import losses, prepare, run_training, settings, state_digest, trained_weights

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
    pool.run(run_training, lora_settings(folder, run, **sections), *arguments, world_size=world_size)
    return folder / run


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
        run = run_once(folder, pool, f"run-{stage}-{world_size}", world_size=world_size, engine=at_stage(stage))
        found[stage, world_size] = losses(read_metrics(run / "metrics.jsonl"))
    for other in found.values():
        assert other == pytest.approx(found[1, 1], rel=STAGE_TOLERANCE)
    assert state_digest(folder / "run-2-2") == state_digest(folder / "run-3-2")
    assert all(values.any() for name, values in trained_weights(folder / "run-1-1").items() if "lora_B" in name)


def test_the_export_is_what_peft_merges(folder: Path, pool: WorkerPool) -> None:
    run = run_once(folder, pool, "merged")
    out = export(run, folder / "base")
    merged, found = by_peft(folder / "base", run).state_dict(), load_file(out / "model.safetensors")
    base = load_file(folder / "base" / "model.safetensors")
    assert found.keys() == base.keys() <= merged.keys()
    assert [name for name in found if not torch.equal(found[name], merged[name])] == []
    moved = {name for name in base if not torch.equal(found[name], base[name])}
    assert moved == {name.replace(".lora_A", "") for name in trained_weights(run) if ".lora_A" in name}
    assert len(moved) == 7 * 4
