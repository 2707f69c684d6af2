"""Which sequences a rank reads for a step: arithmetic on the sample stream, nothing stored."""

from collections.abc import Callable, Iterator

from llamapro.data.loader import SampleStream, rank_share
from llamapro.ranks import Ranks
from llamapro.training.progress import StepWork


def step_work(
    stream: SampleStream, first: int, sequences: int, micro: int, micro_batches: int, ranks: Ranks
) -> StepWork:
    """This rank's share of sequences [first, first + sequences), as `micro_batches` batches of `micro` rows.

    A rank whose share is short gets rows without loss, so that every rank runs the same number of micro-batches.
    """
    start, count = rank_share(first, sequences, ranks.rank, ranks.world_size)
    batches = []
    for low in range(0, micro * micro_batches, micro):
        rows = max(0, min(micro, count - low))
        batches.append(stream.batch(start + low, rows, pad_to=micro))
    return StepWork(tuple(batches))


def planned_work(
    stream: SampleStream, first: int, steps: int, sequences: int, micro: int, micro_batches: int, ranks: Ranks
) -> Iterator[Callable[[], StepWork]]:
    """The work of the next `steps` steps, as functions to be called by a prefetching thread."""
    for index in range(steps):
        begin = first + index * sequences
        yield lambda begin=begin: step_work(stream, begin, sequences, micro, micro_batches, ranks)  # type: ignore[misc]
