"""Section `batch`: how many sequences one optimizer step sees."""

from typing import Literal

from llamapro.config.base import Count, Section


class BatchConfig(Section):
    """How many sequences one optimizer step sees."""

    global_sequences: Count = 1024
    """Sequences per optimizer step over all ranks. Any number of ranks works; shares may differ by one sequence."""

    micro_sequences: Count | Literal["auto"] = "auto"
    """Sequences per rank in one forward and backward pass; auto: as many as fit in memory. It never changes the result
    beyond rounding: gradients are accumulated up to global_sequences."""
