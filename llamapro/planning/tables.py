"""Plans as table rows."""

import math
from collections.abc import Collection
from typing import Final

from llamapro.planning.flops import FlopsPerToken
from llamapro.planning.memory import GIB
from llamapro.planning.plan import ZERO_STAGES, Job

MEMORY_COLUMNS: Final = ("item", *(f"ZeRO-{stage}" for stage in ZERO_STAGES))
FLOPS_COLUMNS: Final = ("work", "GFLOP per token")
_SMALL_GIB: Final = 0.1
_ITEMS: Final = {
    "weights": "weights",
    "gathered": "gathered parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "communication": "communication buffers",
    "frozen": "activations, frozen blocks",
    "trainable": "activations, trainable blocks",
    "at_work": "logits, or a block at work",
    "total": "total",
}


def gib(amount: float) -> str:
    """Bytes as GiB with two decimals, less than a tenth of one with two digits."""
    if not math.isfinite(amount):
        return "unknown"
    value = amount / GIB
    return f"{value:.2f}" if value == 0 or value >= _SMALL_GIB else f"{value:.2g}"


def recomputation(job: Job, recomputed: Collection[int]) -> str:
    """Which blocks are computed again in the backward pass, and what it costs."""
    if not recomputed:
        return "no block"
    blocks = job.learning.backward_blocks(job.shape)
    ids = ", ".join(map(str, sorted(recomputed)))
    return f"{len(recomputed)} of {blocks} blocks, +{job.recompute_flops(recomputed) / 1e9:.3g} GFLOP per token ({ids})"


def memory_rows(
    job: Job, micro_sequences: int, recomputed: Collection[int], budget: float | None = None
) -> list[tuple[str, ...]]:
    """One row per item, one column per ZeRO stage: GiB per rank with this micro-batch and these blocks recomputed.

    Args:
        budget: bytes that may be used; with it, the largest micro-batch that fits is added.
    """
    memories = [job.memory(stage, micro_sequences, recomputed) for stage in ZERO_STAGES]
    rows = [(label, *(gib(getattr(memory, item)) for memory in memories)) for item, label in _ITEMS.items()]
    if budget is not None:
        largest = (job.largest_micro_batch(stage, budget) for stage in ZERO_STAGES)
        rows.append(("largest micro-batch", *(str(count) if count else "none" for count in largest)))
    return rows


def flops_rows(flops: FlopsPerToken) -> list[tuple[str, str]]:
    """FLOPs per token by kind."""
    amounts = {
        "forward, linears": flops.forward_linear,
        "forward, attention": flops.forward_attention,
        "input gradients, linears": flops.input_gradient,
        "backward, attention": flops.attention_backward,
        "weight gradients": flops.weight_gradient,
        "model (MFU)": flops.model,
        "attention computed again": flops.attention_recompute,
        "blocks computed again": flops.block_recompute,
        "hardware (HFU)": flops.hardware,
    }
    return [(name, f"{amount / 1e9:.5g}") for name, amount in amounts.items()]
