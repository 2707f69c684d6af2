"""Memory by hand for the paper's model, and torch's own account of what a block keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llamapro.modeling.loss import CHUNK_ELEMENTS
from llamapro.planning.activations import (
    frozen_block_bytes,
    fused_frozen_block_bytes,
    fused_trainable_block_bytes,
    trainable_block_bytes,
)
from llamapro.planning.buffers import Buffers
from llamapro.planning.memory import LOGIT_CHUNK_ELEMENTS, Memory, block_costs, estimate_memory
from llamapro.planning.shape import DecoderShape, Learning

SHAPE = DecoderShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    }
)
NEW = Learning(frozenset(range(4, 40, 5)))
GIGA = 1e9


def paper(zero_stage: int, world_size: int, precision: str = "bf16", **more: Any) -> Memory:
    choices: dict[str, Any] = {"micro_tokens": 4096, "sequence_length": 4096, **more}
    return estimate_memory(SHAPE, NEW, precision=precision, zero_stage=zero_stage, world_size=world_size, **choices)


def test_the_papers_model_on_one_device() -> None:
    memory = paper(1, 1)
    assert memory.weights / GIGA == pytest.approx(16.71, abs=0.01)
    assert memory.gradients / GIGA == pytest.approx(6.48, abs=0.01)
    assert memory.optimizer / GIGA == pytest.approx(19.43, abs=0.01)
    assert memory.static / GIGA == pytest.approx(42.6, abs=0.05)


@pytest.mark.parametrize(
    ("stage", "static"),
    [
        (1, 16.715 + 6.476 + 19.429 / 16),
        (2, 16.715 + (6.476 + 19.429) / 16),
        (3, (16.715 + 6.476 + 19.429) / 16),
    ],
)
def test_what_each_stage_splits_over_16_devices(stage: int, static: float) -> None:
    memory = paper(stage, 16)
    assert (memory.static - memory.gathered - memory.communication) / GIGA == pytest.approx(static, abs=0.01)


def test_only_stage_3_on_several_devices_gathers_as_much_as_deepspeed_is_told() -> None:
    assert paper(3, 16).gathered == 2 * 1_000_000_000
    assert paper(3, 16, buffers=Buffers(1, gathered=10**12)).gathered == paper(1, 1).weights
    assert paper(3, 1).gathered == paper(2, 16).gathered == 0


def test_buffers_are_as_large_as_deepspeed_is_told() -> None:
    assert [paper(stage, 1).communication for stage in (1, 2, 3)] == [0, 2 * 10**8, 4 * 10**8]
    assert [paper(stage, 16).communication for stage in (1, 2, 3)] == [0, 6 * 10**8, 8 * 10**8]
    # In float32 stage 1 has a bucket too, and only stage 3 copies what is on its way.
    assert [paper(stage, 16, "float32").communication for stage in (1, 2, 3)] == [4 * 10**8, 4 * 10**8, 8 * 10**8]
    huge = Buffers(10**10)
    assert paper(2, 1, buffers=huge).communication == 2 * 10**10
    assert paper(2, 1, buffers=huge, device="cpu").communication == 2 * 1_619_066_880
    overlay = {"zero_optimization": {"reduce_bucket_size": 5_000_000, "stage3_max_live_parameters": 7.0}}
    assert Buffers.of(3, overlay) == Buffers(5_000_000, 7)
    assert Buffers.of(2, overlay) == Buffers(5_000_000)


def test_float32_doubles_weights_and_nothing_that_already_is() -> None:
    assert paper(1, 1, "float32").weights == 2 * paper(1, 1).weights
    assert paper(1, 1, "float32").optimizer == paper(1, 1).optimizer


def test_what_blocks_keep_with_fused_kernels() -> None:
    assert fused_frozen_block_bytes(SHAPE, 2) == 93_312
    assert fused_trainable_block_bytes(SHAPE, 2) == 131_712


def kept(shape: DecoderShape, learning: Learning, sequence_length: int) -> dict[int, float]:
    """Bytes per token by block."""
    return {cost.block: cost.kept for cost in block_costs(shape, learning, 2, 1, sequence_length)}


def test_prefix_blocks_keep_nothing() -> None:
    frozen, trainable = (round(what(SHAPE, 2)) for what in (frozen_block_bytes, trainable_block_bytes))
    assert (frozen, trainable) == (131_720, 186_504)
    assert kept(SHAPE, NEW, 4096) == {block: trainable if block in NEW.blocks else frozen for block in range(4, 40)}
    assert kept(SHAPE, Learning(frozenset()), 4096) == {}
    assert paper(1, 1).activations == 4096 * (28 * frozen + 8 * trainable)


def test_attention_without_a_fused_kernel_keeps_its_scores_in_every_block_of_the_backward_pass() -> None:
    unseen = tuple(replace(size, kept={}) for size in SHAPE.block_sizes)
    scoring, fused = (replace(SHAPE, block_sizes=unseen, scores_kept=scores) for scores in (True, False))
    more = sum(kept(scoring, NEW, 1000).values()) - sum(kept(fused, NEW, 1000).values())
    assert more == 36 * 32 * 1000 * (4 + 2 * 2 + 1)


def test_where_the_models_code_could_not_be_seen_a_gated_block_stands_for_it() -> None:
    unseen = replace(SHAPE, block_sizes=tuple(replace(size, kept={}) for size in SHAPE.block_sizes))
    assert kept(unseen, NEW, 4096) == kept(SHAPE, NEW, 4096)


def test_a_recomputed_block_keeps_its_input() -> None:
    whole, one = paper(1, 1), paper(1, 1, recomputed={4})
    assert whole.activations - one.activations == 4096 * (186_504 - 2 * 4096)
    assert whole.static == one.static


def test_activations_are_told_by_kind_of_block() -> None:
    whole, one = paper(1, 1), paper(1, 1, recomputed={4})
    assert (whole.frozen, whole.trainable) == (4096 * 28 * 131_720, 4096 * 8 * 186_504)
    assert one.frozen == whole.frozen and whole.trainable - one.trainable == 4096 * (186_504 - 8192)


def test_compiled_blocks_keep_the_inputs_of_fused_kernels() -> None:
    fused = paper(1, 1, fused=True)
    assert (fused.frozen, fused.trainable) == (4096 * 28 * 93_312, 4096 * 8 * 131_712)
    assert fused.activations / GIGA == pytest.approx(15.0, abs=0.05)


def test_six_sequences_fit_on_an_h200() -> None:
    six, seven = (paper(1, 1, fused=True, micro_tokens=count * 4096).total for count in (6, 7))
    assert 42.6 + 6 * 15.0 <= six / GIGA <= 42.6 + 6 * 15.0 + 5
    assert six < 0.9 * 143_771 * (1 << 20) < seven


def test_logits_are_bounded_by_the_loss_working_in_chunks() -> None:
    assert LOGIT_CHUNK_ELEMENTS == CHUNK_ELEMENTS
    per_token = (3 * 4096 + 2 * 128) * 2
    assert paper(1, 1, micro_tokens=10).logits == 10 * (32000 * 4 * 3 + per_token)
    for device, elements in CHUNK_ELEMENTS.items():
        many: Any = paper(1, 1, micro_tokens=100_000, device=device).logits
        assert many == elements // 32000 * 32000 * 4 * 3 + 100_000 * per_token


def test_the_loss_and_a_block_at_work_are_never_there_together() -> None:
    memory = paper(1, 1, micro_tokens=12 * 4096)
    assert memory.block_at_work == 12 * 4096 * (3 * 11008 + 2 * 4096 + 2 * 128) * 2 > memory.logits
    assert memory.total == memory.static + memory.activations + memory.block_at_work
    assert paper(1, 1, micro_tokens=64).at_work == paper(1, 1, micro_tokens=64).logits


def test_a_short_micro_batch_may_take_less_than_the_optimizer_step() -> None:
    memory = paper(3, 1, micro_tokens=16)
    assert memory.update == 4 * 1_619_066_880 and memory.total == memory.static + memory.update
    assert paper(1, 1, micro_tokens=16, device="cpu").update == 2 * 4 * 1_619_066_880
    assert paper(1, 1).update == 0


def saved_bytes_per_token(trainable: bool) -> tuple[float, DecoderShape]:
    """Bytes of the distinct activations that a transformers block really saves, frozen linears' inputs apart."""
    sizes: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attn_implementation": "sdpa",
    }
    config = LlamaConfig(**sizes)
    rows, length = 2, 64
    block = LlamaDecoderLayer(config, 0).to(torch.bfloat16).requires_grad_(trainable)
    hidden = torch.randn(rows, length, 64, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(length).expand(rows, -1)
    rotary = LlamaRotaryEmbedding(config)(hidden, positions)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*rotary, *block.parameters())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = block(hidden, position_embeddings=rotary)
    assert result.requires_grad
    return sum(saved.values()) / (rows * length), DecoderShape.from_config(config.to_dict())


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_a_real_block_keeps_what_is_planned(trainable: bool) -> None:
    measured, shape = saved_bytes_per_token(trainable)
    planned = (trainable_block_bytes if trainable else frozen_block_bytes)(shape, 2)
    assert measured == planned
