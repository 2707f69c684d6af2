"""FLOPs per token: the published numbers of the paper's model, and torch's own counter on a tiny one."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llamapro.modeling.blocks import prepare_blocks
from llamapro.modeling.recompute import recompute_blocks
from llamapro.modeling.trainable import TrainableSet
from llamapro.planning.flops import FlopsPerToken, flops_per_token
from llamapro.planning.shape import DecoderShape, Learning

LLAMA2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
NEW = frozenset(range(4, 40, 5))
GIGA = 1e9


def paper(learning: Learning, blocks: int = 40) -> FlopsPerToken:
    return flops_per_token(DecoderShape.from_config(LLAMA2_7B).with_blocks_of(range(blocks)), learning, 4096)


def test_the_parts_of_the_papers_run() -> None:
    flops = paper(Learning(NEW))
    assert flops.forward_linear / GIGA == pytest.approx(16.452, abs=5e-4)
    assert flops.forward_attention / GIGA == pytest.approx(1.342, abs=5e-4)
    assert flops.input_gradient / GIGA == pytest.approx(14.833, abs=5e-4)
    assert flops.attention_backward / GIGA == pytest.approx(2.416, abs=5e-4)
    assert (flops.attention_backward + flops.attention_recompute) / GIGA == pytest.approx(3.020, abs=5e-4)
    assert flops.weight_gradient / GIGA == pytest.approx(3.238, abs=5e-4)
    assert flops.model / GIGA == pytest.approx(38.281, abs=5e-4)
    assert flops.hardware / GIGA == pytest.approx(38.885, abs=5e-4)


@pytest.mark.parametrize(
    ("learning", "blocks", "gflops"),
    [
        (Learning(frozenset(), everything=True), 40, 53.38),
        (Learning(frozenset(), everything=True), 32, 42.86),
        (Learning(frozenset(range(32, 40))), 40, 25.20 - 8 * 0.5 * 0.03355),
    ],
    ids=["all 40 blocks", "the base, fully trained", "new blocks on top"],
)
def test_other_ways_to_train_the_same_model(learning: Learning, blocks: int, gflops: float) -> None:
    assert paper(learning, blocks).model / GIGA == pytest.approx(gflops, abs=6e-3)


def test_blocks_with_a_window_attend_to_no_more_than_it() -> None:
    sizes = {**LLAMA2_7B, "model_type": "mistral", "num_hidden_layers": 2, "num_key_value_heads": 32}
    flops = [
        flops_per_token(DecoderShape.from_config({**sizes, "sliding_window": window}), Learning(frozenset()), 16)
        for window in (None, 16, 4, 1)
    ]
    # Keys that each of 16 positions sees, on average; half a key less than by counting, as without a window.
    seen = [sum(min(place + 1, window) for place in range(16)) / 16 - 0.5 for window in (16, 16, 4)]
    expected = [2 * 2 * 2 * 4096 * keys for keys in seen]
    measured = [flop.forward_attention for flop in flops]
    assert measured[:2] == expected[:2] and measured[0] > measured[2] > measured[3] > 0
    assert measured[2] == pytest.approx(expected[2], rel=0.15)


def test_nothing_that_learns_costs_a_forward_pass() -> None:
    flops = paper(Learning(frozenset()))
    assert flops.model == flops.hardware == flops.forward


def tiny_config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return LlamaConfig(**{**sizes, **changes, "attn_implementation": "eager"})


def counted(
    config: PretrainedConfig,
    learning: Learning,
    rows: int,
    length: int,
    recomputed: frozenset[int] = frozenset(),
    device: str = "cpu",
) -> float:
    """FLOPs of one forward and backward pass through blocks of all kinds, as torch counts them; sizes are enough."""
    with torch.device(device):
        model = MODELS[type(config)](config)
    for name, parameter in model.named_parameters():
        block = name.removeprefix("model.layers.").partition(".")[0]
        parameter.requires_grad_(learning.everything or (block.isdecimal() and int(block) in learning.blocks))
    prepare_blocks(model.model.layers, TrainableSet(learning.blocks, learning.everything))
    recompute_blocks(model.model.layers, recomputed)
    ids = torch.zeros((rows, length), dtype=torch.int64, device=device)
    mask = torch.zeros((rows, 1, length, length), device=device)  # made here: transformers' own looks at values
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().sum().backward()
    return float(counter.get_total_flops())


MODELS: dict[type, Any] = {LlamaConfig: LlamaForCausalLM, Qwen3MoeConfig: Qwen3MoeForCausalLM}


@pytest.mark.parametrize(
    "learning",
    [Learning(frozenset({2, 4})), Learning(frozenset({1})), Learning(frozenset({0, 4})), Learning(frozenset(), True)],
    ids=["2 and 4", "1", "0 and 4", "everything"],
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"head_dim": 16, "num_key_value_heads": 4}, {"tie_word_embeddings": True}],
    ids=["grouped", "wide heads", "tied head"],
)
def test_torch_counts_the_same(learning: Learning, changes: dict[str, Any]) -> None:
    config, rows, length = tiny_config(**changes), 2, 12
    flops = flops_per_token(DecoderShape.from_config(config.to_dict()), learning, length)
    attention = flops.forward_attention + flops.attention_backward
    # torch counts the whole square of the scores, this project the causal half.
    expected = rows * length * (flops.model + attention)
    assert counted(config, learning, rows, length) == expected


@pytest.mark.parametrize("recomputed", [{3}, {4}, {2, 3, 4}], ids=["frozen", "trainable", "all"])
def test_torch_counts_the_same_with_blocks_computed_again(recomputed: set[int]) -> None:
    config, learning, rows, length = tiny_config(), Learning(frozenset({2, 4})), 2, 12
    flops = flops_per_token(DecoderShape.from_config(config.to_dict()), learning, length, recomputed)
    more = counted(config, learning, rows, length, frozenset(recomputed)) - counted(config, learning, rows, length)
    squares = len(recomputed) * flops.forward_attention / 5
    assert more == rows * length * (flops.block_recompute + squares)
    assert flops.hardware == flops.model + flops.attention_recompute + flops.block_recompute


def test_torch_counts_the_same_of_experts() -> None:
    sizes: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(**sizes, **experts, **heads, attn_implementation="eager", experts_implementation="eager")
    learning, rows, length = Learning(frozenset({1})), 2, 12
    flops = flops_per_token(DecoderShape.from_config(config.to_dict()), learning, length)
    attention = flops.forward_attention + flops.attention_backward
    assert counted(config, learning, rows, length) == rows * length * (flops.model + attention)


def test_torch_counts_the_same_at_full_size() -> None:
    config, learning, length = LlamaConfig(**LLAMA2_7B, attn_implementation="eager"), Learning(NEW), 4096
    flops = paper(learning)
    total = counted(config, learning, 1, length, device="meta") / length
    assert total == flops.model + flops.forward_attention + flops.attention_backward
    again = counted(config, learning, 1, length, frozenset({4, 5}), device="meta") / length
    more = flops_per_token(DecoderShape.from_config(LLAMA2_7B), learning, length, {4, 5}).block_recompute
    assert again - total == more + 2 * flops.forward_attention / 40


def test_what_frozen_weights_do_is_told_apart() -> None:
    flops = paper(Learning(NEW))
    assert flops.linear / GIGA == pytest.approx(34.523, abs=1e-3)
    assert flops.frozen_linear / GIGA == pytest.approx(24.285, abs=1e-3)


def test_a_block_computed_again_ends_before_its_last_linear() -> None:
    shape = DecoderShape.from_config(LLAMA2_7B)
    flops = flops_per_token(shape, Learning(NEW), 4096, {4, 5})
    assert flops.block_recompute == 2 * (2 * (202_375_168 - 4096 * 11008) + 4096 * 4096 * 2)
    sandwich = DecoderShape.from_config({**LLAMA2_7B, "model_type": "olmo2", "num_hidden_layers": 2})
    assert {size.last_matrix for size in sandwich.block_sizes} == {0}
