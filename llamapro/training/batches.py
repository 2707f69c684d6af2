"""Which sequences a rank reads for a step: arithmetic on the sample stream, nothing stored."""

from collections.abc import Callable, Iterator
from functools import partial

from llamapro.data.loader import SampleStream, rank_share
from llamapro.ranks import Ranks
from llamapro.training.progress import Progress, StepWork
from llamapro.training.session import Session


def planned_work(session: Session, progress: Progress) -> Iterator[Callable[[], StepWork]]:
    """The work of all steps that are left, as functions to be called by a prefetching thread."""
    facts, sequences = session.facts, session.config.batch.global_sequences
    for index in range(session.steps - progress.step):
        first = progress.sequences + index * sequences
        micro, micro_batches = facts.micro_sequences, facts.accumulation_steps
        yield partial(step_work, session.stream, first, sequences, micro, micro_batches, session.ranks)


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
