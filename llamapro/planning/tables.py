"""Plans as table rows."""

import math
from collections.abc import Collection
from typing import Final

from llamapro.planning.flops import FlopsPerToken
from llamapro.planning.memory import GIB
from llamapro.planning.plan import ZERO_STAGES, Job

MEMORY_COLUMNS: Final = ("item", *(f"ZeRO-{stage}" for stage in ZERO_STAGES))
LEARNING_COLUMNS: Final = ("component", "parameters", "that learn")
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


def learning_rows(job: Job) -> list[tuple[str, str, str]]:
    """Parameters by component, and how many of them learn."""
    shape, learning = job.shape, job.learning
    learns, frozen = learning.trainable(shape), learning.frozen(shape)
    adapters = sum(size.adapters for size in learns)
    own = sum(size.parameters for size in learns) - adapters
    amounts = [
        ("embedding, final norm, head", shape.other_parameters, shape.other_parameters * learning.everything),
        (_blocks(len(frozen), "that don't learn"), sum(size.parameters for size in frozen), 0),
        (_blocks(len(learns), "with adapters" if adapters else "that learn"), own, 0 if adapters else own),
        (_beside(sum(size.linears for size in learns), learning.adapter_rank), adapters, adapters),
    ]
    return [(name, f"{all_of_it:,}", f"{part:,}") for name, all_of_it, part in amounts if all_of_it]


def _blocks(count: int, kind: str) -> str:
    return f"{count} block{'s' if count != 1 else ''} {kind}"


def _beside(linears: int, rank: int) -> str:
    return f"adapters of rank {rank} beside {linears} linears"


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
