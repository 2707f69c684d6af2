"""Parameter counts equal those of the models that transformers builds."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llamapro.errors import ModelRefused
from llamapro.planning.shape import DecoderShape, Learning

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 16},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"num_key_value_heads": None},
    ],
    ids=str,
)
def test_parameters_are_those_of_the_model_that_transformers_builds(changes: dict[str, Any]) -> None:
    config = LlamaConfig(**{**SIZES, **changes})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shape = DecoderShape.from_config(config.to_dict())
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.block_parameters == sum(parameter.numel() for parameter in model.model.layers[0].parameters())


def test_the_papers_model() -> None:
    sizes = {**SIZES, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 40}
    shape = DecoderShape.from_config({**sizes, "num_attention_heads": 32, "num_key_value_heads": 32})
    assert shape.block_linear_parameters == 202_375_168
    assert shape.block_parameters == 202_383_360
    assert shape.parameters == 8_357_482_496
    assert Learning(frozenset(range(4, 40, 5))).parameters(shape) == 1_619_066_880


def test_a_configuration_without_sizes_is_refused_by_what_it_lacks() -> None:
    with pytest.raises(ModelRefused, match="intermediate_size, num_attention_heads"):
        DecoderShape.from_config({"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 9})


def test_the_backward_pass_ends_at_the_lowest_block_that_learns() -> None:
    shape = DecoderShape.from_config(SIZES).with_blocks(10)
    assert Learning(frozenset({4, 9})).backward_blocks(shape) == 6
    assert Learning(frozenset(), everything=True).backward_blocks(shape) == 10
    assert Learning(frozenset()).backward_blocks(shape) == 0
