"""The identity check says yes to a fresh expansion, and no to anything that changes a logit, cached or not."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llamapro.expansion.expand import expand
from llamapro.expansion.identity import identity_difference, probe_logits
from tests.support.expansion import all_tensors, update_json
from tests.support.models import save_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    base = save_tiny_llama(folder / "base", dtype=torch.bfloat16)
    expand(str(base), folder / "model", new_blocks=2)
    return folder


def test_a_fresh_expansion_is_the_identity(folder: Path) -> None:
    assert identity_difference(folder / "model", folder / "base") == []


def test_all_ways_see_the_same_positions(folder: Path) -> None:
    logits = probe_logits(folder / "base")
    whole, prefill, steps = (torch.from_numpy(logits[way]) for way in ("without cache", "prefill", "steps with cache"))
    assert torch.allclose(whole[:, :24], prefill, atol=1e-5)
    assert torch.allclose(whole[:, 24:], steps[:, :8], atol=1e-4)
    assert steps.shape[1] == 16


def test_an_active_copy_is_seen_in_every_way(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    name = "model.layers.2.mlp.down_proj.weight"
    tensors = all_tensors(tmp_path / "model")
    save_file(tensors | {name: torch.full_like(tensors[name], 0.01)}, tmp_path / "model" / "model.safetensors")
    problems = identity_difference(tmp_path / "model", folder / "base")
    assert [problem.split(" differ")[0] for problem in problems] == [
        "logits without cache",
        "logits prefill",
        "logits steps with cache",
    ]


def test_another_vocabulary_and_broken_numbers_are_named(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder / "base", other)
    tensors = all_tensors(other)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300].clone()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    update_json(other / "config.json", {"vocab_size": 300})
    assert "shape" in identity_difference(other, folder / "base")[0]
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert "not finite" in identity_difference(other, other)[0]
