"""The family table: supported model types, refusals by name, block indices parsed and never guessed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamapro.errors import ModelRefused
from llamapro.expansion.families import (
    FAMILIES,
    block_tensor_name,
    family_named,
    family_of,
    is_zeroed,
    parse_block_index,
    split_block_name,
    supported_model_types,
)

LLAMA = family_named("llama")


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_supported_types_have_a_family(model_type: str) -> None:
    assert family_of({"model_type": model_type}).name == "llama"


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "Llama", "llama4", "", None])
def test_other_types_are_refused_by_name_with_the_supported_ones(model_type: str | None) -> None:
    with pytest.raises(ModelRefused, match=r"residual stream.*supported: llama, mistral") as caught:
        family_of({"model_type": model_type})
    assert repr(model_type) in str(caught.value)


def test_another_head_is_refused() -> None:
    with pytest.raises(ModelRefused, match="LlamaForSequenceClassification"):
        family_of({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})


def test_a_record_of_an_unknown_family_is_refused() -> None:
    with pytest.raises(ModelRefused, match="'newer'"):
        family_named("newer")


def test_no_model_type_is_declared_twice() -> None:
    assert len(supported_model_types()) == len(set(supported_model_types()))
    assert len({row.name for row in FAMILIES}) == len(FAMILIES)


@given(st.integers(0, 10_000), st.sampled_from(["mlp.down_proj.weight", "mlp.experts.3.w1.weight", "x"]))
def test_names_are_parsed_back(block: int, rest: str) -> None:
    name = block_tensor_name(LLAMA, block, rest)
    assert split_block_name(LLAMA, name) == (block, rest)
    assert parse_block_index(LLAMA, name) == block


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "layers.3.mlp.up_proj.weight",
        "vision.model.layers.3.mlp.up_proj.weight",
        "model.layers.03.mlp.up_proj.weight",
        "model.layers.3",
        "model.layers.x.weight",
        "model.layers.³.weight",
        "modelXlayers.3.weight",
    ],
)
def test_other_names_are_in_no_block(name: str) -> None:
    assert parse_block_index(LLAMA, name) is None


def test_the_zero_rule_matches_whole_names() -> None:
    assert is_zeroed(LLAMA, "self_attn.o_proj.bias")
    assert not is_zeroed(LLAMA, "extra.self_attn.o_proj.weight")
    assert not is_zeroed(LLAMA, "self_attn.o_proj.weight_scale")
