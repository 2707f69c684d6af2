"""What adapters add to a plan: parameters, FLOPs and kept bytes, against what peft puts on a plain model."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from llamapro.modeling.trainable import Adapters, TrainableSet
from llamapro.planning.activations import kept_bytes
from llamapro.planning.flops import flops_per_token
from llamapro.planning.memory import estimate_memory
from llamapro.planning.plan import Job
from llamapro.planning.shape import DecoderShape, Learning
from llamapro.planning.tables import learning_rows
from llamapro.training.model_facts import learning_of
from tests.modeling.test_kept import kept_by_blocks
from tests.support.modeling import ready_model
from tests.support.models import save_tiny_llama

RANK = 3
BLOCKS = (2, 4)
LEARNING = Learning(frozenset(BLOCKS), adapter_rank=RANK)
CONFIG = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_implementation="eager",
)
ROWS, LENGTH = 2, 12


def with_adapters() -> tuple[LlamaForCausalLM, DecoderShape]:
    """The plain model with adapters by peft alone, and the planner's view of it."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = LlamaForCausalLM(CONFIG)
    inject_adapter_in_model(LoraConfig(r=RANK, target_modules=targets, layers_to_transform=list(BLOCKS)), model)
    return model, DecoderShape.from_config(CONFIG.to_dict()).with_adapters(LEARNING)


def require_gradient(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
    inputs[0].requires_grad_()


def test_parameters_are_those_that_peft_adds() -> None:
    model, shape = with_adapters()
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert LEARNING.parameters(shape) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_torch_counts_the_same_flops() -> None:
    model, shape = with_adapters()
    # As stage 3 has it; elsewhere the lowest block's input needs no gradient, and a little less is computed.
    model.model.layers[BLOCKS[0]].register_forward_pre_hook(require_gradient)
    mask = torch.zeros((ROWS, 1, LENGTH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        ids = torch.zeros((ROWS, LENGTH), dtype=torch.int64)
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().sum().backward()
    flops = flops_per_token(shape, LEARNING, LENGTH)
    attention = flops.forward_attention + flops.attention_backward  # torch counts the whole square of the scores
    assert counter.get_total_flops() == ROWS * LENGTH * (flops.model + attention)


def test_optimizer_and_gradients_are_for_adapters_alone() -> None:
    _, shape = with_adapters()
    sizes = {"precision": "bf16", "zero_stage": 1, "world_size": 1, "micro_tokens": 64, "sequence_length": 64}
    memory = estimate_memory(shape, LEARNING, **sizes)  # type: ignore[arg-type]
    adapters = LEARNING.parameters(shape)
    assert (memory.optimizer, memory.gradients) == (12 * adapters, 4 * adapters)
    assert memory.weights == 2 * shape.parameters


def test_blocks_keep_no_more_than_is_planned(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, blocks=4)
    learning = learning_of(TrainableSet.of_adapters([1, 3], Adapters(RANK, 6.0)))
    model = ready_model(folder, TrainableSet.of_adapters([1, 3], Adapters(RANK, 6.0)))
    shape = DecoderShape.from_config(model.hf.config.to_dict()).with_adapters(learning)
    found = kept_by_blocks(model)
    for block in (2, 3):
        planned = 64 * kept_bytes(shape, block, learning.includes(block), 4, 64)
        assert 0.97 < planned / found[block] < 1.2, block


@pytest.mark.parametrize("learning", [LEARNING, Learning(frozenset(BLOCKS)), Learning(frozenset(), everything=True)])
def test_the_table_of_what_learns_adds_up(learning: Learning) -> None:
    shape = DecoderShape.from_config(CONFIG.to_dict()).with_adapters(learning)
    rows = learning_rows(Job(shape, learning, "bf16", LENGTH, 1, 1))
    every, learns = (sum(int(row[column].replace(",", "")) for row in rows) for column in (1, 2))
    assert (every, learns) == (shape.parameters, learning.parameters(shape))
    assert any(row[0] == "adapters of rank 3 beside 14 linears" for row in rows) == (learning is LEARNING)
