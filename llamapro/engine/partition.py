"""ZeRO stage 3: cutting modules into parts while the model is built, and fetching whole blocks at a time.

Never `zero.Init` as a context, nor transformers' own DeepSpeed hook: both turn the rotary frequencies into bf16, and
the model is no longer the base. Modules are filled first and cut afterwards, one by one, so that no rank ever holds
the whole model.
"""

from collections.abc import Callable
from typing import Any

import deepspeed  # type: ignore[import-untyped]
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

    The lowest block that learns is left out: its input needs no gradient, so the hook that would gather the block
    again for the backward pass never fires, and the backward pass fails on empty weights.
    """
    for index, block in enumerate(blocks):
        set_z3_leaf_module(block, index != lowest_trainable)
