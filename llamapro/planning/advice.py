"""What to change when a job doesn't fit on its devices: each way is planned and given only if it fits."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from llamapro.planning.plan import Job
from llamapro.planning.shape import Learning

_MOST_RANKS: Final = 1024
_SHORTEST_SEQUENCE: Final = 256
_HIGHEST_STAGE: Final = 3


def ways_out(job: Job, budget: float) -> list[str]:
    """The changes, each alone, that make one sequence per micro-batch fit; empty when none does."""
    ways = (*_recomputing(job, budget), *_more_ranks(job, budget), *_shorter(job, budget), *_fewer_blocks(job, budget))
    return list(ways)


def _recomputing(job: Job, budget: float) -> Iterator[str]:
    if job.activation_memory_gib == "unlimited" and _fits(replace(job, activation_memory_gib="auto"), budget):
        yield "engine.activation_memory_gib: auto, which computes blocks again"


def _more_ranks(job: Job, budget: float) -> Iterator[str]:
    ranks = 2 * job.world_size
    while ranks <= _MOST_RANKS:
        if _fits(replace(job, world_size=ranks), budget):
            yield f"ZeRO-3 over {ranks} GPUs"
            return
        ranks *= 2


def _shorter(job: Job, budget: float) -> Iterator[str]:
    length = job.sequence_length // 2
    while length >= _SHORTEST_SEQUENCE:
        if _fits(replace(job, sequence_length=length), budget):
            yield f"data.sequence_length: {length}"
            return
        length //= 2


def _fewer_blocks(job: Job, budget: float) -> Iterator[str]:
    """Without some of the blocks that learn, as an expansion by fewer blocks is."""
    learning = [] if job.learning.adapter_rank else sorted(job.learning.blocks)
    for count in (len(learning) // 2, len(learning) // 4):
        if count < 1:
            return
        left_out = set(learning) - set(learning[len(learning) // count - 1 :: len(learning) // count][:count])
        kept = [block for block in range(job.shape.blocks) if block not in left_out]
        blocks = frozenset(place for place, block in enumerate(kept) if block in job.learning.blocks)
        if _fits(replace(job, shape=job.shape.with_blocks_of(kept), learning=Learning(blocks)), budget):
            yield f"{len(blocks)} new blocks instead of {len(learning)}"
            return


def _fits(job: Job, budget: float) -> bool:
    return job.recomputed(_HIGHEST_STAGE, 1, budget) is not None
