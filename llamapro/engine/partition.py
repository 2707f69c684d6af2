"""ZeRO stage 3: cutting modules into parts while the model is built, and fetching whole blocks at a time.

Never `zero.Init` as a context, nor transformers' own DeepSpeed hook: both turn the rotary frequencies into bf16, and
the model is no longer the base. Modules are filled first and cut afterwards, one by one, so that no rank ever holds
the whole model.
"""

from collections.abc import Callable
from typing import Any

import deepspeed  # type: ignore[import-untyped]
import torch
from deepspeed.utils import set_z3_leaf_module  # type: ignore[import-untyped]
from torch import nn

from llamapro.engine.start import join_deepspeed


def stage3_partitioner(configuration: dict[str, Any]) -> Callable[[nn.Module], None]:
    """A function that cuts all parameters of a filled module over the ranks. Collective, also with rank 0's values.

    Args:
        configuration: the one the engine will be started with.
    """
    join_deepspeed()

    def partition(module: nn.Module) -> None:
        deepspeed.zero.Init(module=module, config_dict_or_path=configuration)

    return partition


def fetch_by_block(blocks: nn.ModuleList, lowest_trainable: int | None) -> None:
    """Let stage 3 gather each block at once instead of linear by linear.

    The input of the lowest block that learns needs no gradient, so the hook that gathers a block again for its
    backward pass would never fire there, and the backward pass would fail on empty weights. It is given a gradient
    that nobody reads. (Leaving that block to be gathered linear by linear also works, but sums gradients in another
    order than stage 2 does.)
    """
    for block in blocks:
        set_z3_leaf_module(block, True)
    if lowest_trainable is not None:
        blocks[lowest_trainable].register_forward_pre_hook(_with_input_gradient, prepend=True)


def _with_input_gradient(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    hidden_states, *others = arguments
    if hidden_states.requires_grad or not torch.is_grad_enabled():
        return None
    return (hidden_states.detach().requires_grad_(), *others)
