"""verify: every breach is found and named, and what the record lists as trained is exempt, and only that."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llamapro.errors import CheckFailed, Corrupted, ModelRefused
from llamapro.expansion.expand import expand
from llamapro.expansion.record import ExpansionRecord, Trained, compact, read_record, write_record
from llamapro.expansion.verify import VerifyReport, verify
from tests.support.expansion import all_tensors, flip_bit, tensor_span, update_json
from tests.support.models import save_tiny_llama

NEW_BLOCK, SOURCE_BLOCK = 2, 1


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` (4 blocks, two shards) and `model` (new blocks 2 and 5)."""
    folder = tmp_path_factory.mktemp("pristine")
    base = save_tiny_llama(folder / "base", max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    record = expand(str(base), folder / "model", new_blocks=2, base_id="org/base")
    assert record.new_blocks == (NEW_BLOCK, 5)
    return folder


@pytest.fixture
def pair(pristine: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(pristine, tmp_path / "pair")
    return tmp_path / "pair" / "model", tmp_path / "pair" / "base"


def rewrite(model: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = all_tensors(model) | changes
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, model / "model.safetensors", {"format": "pt"})


def set_record(model: Path, record: ExpansionRecord) -> None:
    write_record(model, record)
    update_json(model / "config.json", {"llamapro": compact(record)})


def record_of(model: Path) -> ExpansionRecord:
    record = read_record(model)
    assert record is not None
    return record


def problems_by_rule(report: VerifyReport) -> dict[str, tuple[str, ...]]:
    return {result.rule.split()[0]: result.problems for result in report.rules if result.problems}


def test_a_fresh_expansion_holds_and_the_counts_are_right(pair: tuple[Path, Path]) -> None:
    model, base = pair
    report = verify(model, base)
    assert report.problems == ()
    tensors, base_tensors = len(all_tensors(model)), len(all_tensors(base))
    fields = len(json.loads((base / "config.json").read_text()))
    assert [result.covered for result in report.rules] == [
        *(1, tensors),  # config.json, names
        *(tensors, 6, 2, 4, fields),  # loading, cache slots, kinds of new and of original blocks, config.json
        *(base_tensors, 4, 2 * 7, base_tensors),  # contents
    ]


@settings(max_examples=25)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_found_by_name(pristine: Path, data: st.DataObject) -> None:
    model = pristine / "model"
    name = data.draw(st.sampled_from(sorted(all_tensors(model))))
    _, start, end = tensor_span(model, name)
    byte = data.draw(st.integers(0, end - start - 1))
    flip_bit(model, name, byte)
    try:
        (problem,) = verify(model, None).problems
        assert problem.startswith(f"{name} ")
    finally:
        flip_bit(model, name, byte)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.mlp.up_proj.weight", "differs from the base"),
        ("model.embed_tokens.weight", "differs from the base"),
        ("lm_head.weight", "differs from the base"),
        (f"model.layers.{NEW_BLOCK}.mlp.down_proj.weight", "is not zero"),
        (f"model.layers.{NEW_BLOCK}.self_attn.o_proj.weight", "is not zero"),
        (f"model.layers.{NEW_BLOCK}.input_layernorm.weight", "differs from the block it copies"),
    ],
)
def test_each_kind_of_change_says_what_is_wrong(pair: tuple[Path, Path], name: str, words: str) -> None:
    flip_bit(pair[0], name, 5)
    (problem,) = verify(pair[0], None).problems
    assert problem.startswith(name)
    assert words in problem


def test_minus_zero_is_not_zero(pair: tuple[Path, Path]) -> None:
    name = f"model.layers.{NEW_BLOCK}.mlp.down_proj.weight"
    rewrite(pair[0], {name: torch.full_like(all_tensors(pair[0])[name], -0.0)})
    assert problems_by_rule(verify(pair[0], None)) == {
        "declared": (f"{name} is not zero, so its new block is not the identity",)
    }


def test_a_missing_an_added_and_a_reshaped_tensor_are_named(pair: tuple[Path, Path]) -> None:
    model, _ = pair
    reshaped = "model.layers.3.mlp.up_proj.weight"
    tensors = all_tensors(model)
    changes = {"model.norm.weight": None, "extra": torch.ones(1), reshaped: tensors[reshaped].T.contiguous()}
    rewrite(model, changes)
    problems = "\n".join(problems_by_rule(verify(model, None))["tensor"])
    assert "model.norm.weight is missing" in problems
    assert "extra is in the files, but not in the record" in problems
    assert f"{reshaped} is ('F32', (32, 88))" in problems


def test_a_zero_too_many_and_a_tensor_too_many_in_a_new_block_are_named(pair: tuple[Path, Path]) -> None:
    model, _ = pair
    name = f"model.layers.{NEW_BLOCK}.self_attn.q_proj.weight"
    rewrite(model, {name: torch.zeros_like(all_tensors(model)[name])})
    assert problems_by_rule(verify(model, None)) == {"all": (f"{name} differs from the block it copies (SHA-256)",)}
    extra = f"model.layers.{NEW_BLOCK}.self_attn.o_proj.bias"
    rewrite(model, {extra: torch.zeros(32)})
    assert f"{extra} is in the files, but not in the record" in verify(model, None).problems


def test_another_dtype_is_named(pair: tuple[Path, Path]) -> None:
    model, _ = pair
    rewrite(model, {"model.norm.weight": all_tensors(model)["model.norm.weight"].bfloat16()})
    assert "model.norm.weight is ('BF16'" in verify(model, None).problems[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 7}, "num_hidden_layers is 7, the record says 6"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types has 4 entries"),
    ],
)
def test_a_config_that_does_not_fit_is_named(pair: tuple[Path, Path], changes: dict[str, object], words: str) -> None:
    update_json(pair[0] / "config.json", changes)
    (problem,) = verify(pair[0], None).problems
    assert words in problem


def test_a_record_whose_rule_disagrees_with_the_family_is_named(pair: tuple[Path, Path]) -> None:
    model, _ = pair
    record = record_of(model)
    forgotten = f"model.layers.{NEW_BLOCK}.mlp.down_proj.weight"
    kept = tuple(name for name in record.zeroed if name != forgotten)
    set_record(model, record.model_copy(update={"zeroed": kept}))
    assert any(problem.startswith(f"{forgotten}: the record and the rule") for problem in verify(model, None).problems)


def test_a_trained_new_block_is_exempt_and_nothing_else(pair: tuple[Path, Path]) -> None:
    model, base = pair
    trained_name = f"model.layers.{NEW_BLOCK}.mlp.down_proj.weight"
    flip_bit(model, trained_name, 7)
    assert verify(model, base).problems
    record = record_of(model)
    set_record(model, record.model_copy(update={"trained": Trained(blocks=(NEW_BLOCK,))}))
    report = verify(model, base)
    assert report.problems == ()
    assert [result.covered for result in report.rules][-3:-1] == [2, 7]
    flip_bit(model, "model.layers.5.mlp.down_proj.weight")
    flip_bit(model, f"model.layers.{SOURCE_BLOCK}.mlp.down_proj.weight")
    assert len(verify(model, base).problems) == 2


def test_a_trained_base_block_or_tensor_is_exempt(pair: tuple[Path, Path]) -> None:
    model, base = pair
    for name in (f"model.layers.{SOURCE_BLOCK}.mlp.up_proj.weight", "lm_head.weight"):
        flip_bit(model, name)
    trained = Trained(blocks=(SOURCE_BLOCK,), tensors=("lm_head.weight",))
    set_record(model, record_of(model).model_copy(update={"trained": trained}))
    report = verify(model, base)
    assert report.problems == (), "the untrained copy still equals what its source was"
    assert report.rules[-4].covered == len(all_tensors(base)) - 9 - 1


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "lm_head.weight"])
def test_another_base_is_found_by_name(pair: tuple[Path, Path], name: str) -> None:
    model, base = pair
    flip_bit(base, name, 9)
    assert verify(model, None).problems == ()
    assert verify(model, base).problems == (f"base tensor {name} differs from the one that was expanded (SHA-256)",)


def test_a_base_with_other_tensors_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, base = pair
    smaller = save_tiny_llama(tmp_path / "smaller", blocks=3, dtype=torch.bfloat16)
    problems = "\n".join(verify(model, smaller).problems)
    assert "base tensor model.layers.3.mlp.up_proj.weight is not in" in problems
    assert "base tensor model.layers.2.mlp.up_proj.weight is BF16 (88, 32), the record says F32 (88, 32)" in problems
    expand(str(smaller), tmp_path / "other", new_blocks=1)
    assert "has tensor model.layers.3" in "\n".join(verify(tmp_path / "other", base).problems)


def test_a_converted_base_is_compared_after_conversion(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, base = pair
    model = tmp_path / "bf16"
    expand(str(base), model, new_blocks=1, dtype="bf16")
    report = verify(model, base)
    assert report.problems == ()
    assert "converted to another dtype" in report.rules[-1].rule
    record = record_of(model)
    name = "model.layers.0.mlp.up_proj.weight"
    wrong = record.base_tensors[name].model_copy(update={"sha256": "0" * 64})
    set_record(model, record.model_copy(update={"base_tensors": {**record.base_tensors, name: wrong}}))
    assert f"base tensor {name} converted to BF16 differs from what was written" in verify(model, base).problems


def test_what_has_no_record_or_no_readable_files_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, base = pair
    with pytest.raises(CheckFailed, match=r"has no expansion\.json"):
        verify(base, None)
    with pytest.raises(ModelRefused):
        verify(model, tmp_path)
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(Corrupted, match=r"model\.safetensors"):
        verify(model, None)
