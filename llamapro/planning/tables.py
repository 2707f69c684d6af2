"""Plans as table rows."""

import math
from typing import Final

from llamapro.planning.memory import GIB
from llamapro.planning.plan import ZERO_STAGES, Job

MEMORY_COLUMNS: Final = ("item", *(f"ZeRO-{stage}" for stage in ZERO_STAGES))
_ITEMS: Final = ("weights", "gathered", "gradients", "optimizer", "activations", "logits", "total")


def gib(amount: float) -> str:
    """Bytes as GiB with two decimals."""
    return f"{amount / GIB:.2f}" if math.isfinite(amount) else "unknown"


def memory_rows(job: Job, micro_sequences: int) -> list[tuple[str, ...]]:
    """One row per item, one column per ZeRO stage: GiB per rank with this micro-batch."""
    memories = [job.memory(stage, micro_sequences) for stage in ZERO_STAGES]
    return [(item, *(gib(getattr(memory, item)) for memory in memories)) for item in _ITEMS]
