"""Which tokens are scored, in the work in progress: a mark in the highest bit of a token's 32.

So everything that moves documents about moves what is scored with them; a sealed shard has spans instead.
"""

import numpy as np
from numpy.typing import NDArray

from llamapro.data.arrays import AnyArray, BoolArray, IntArray

SCORED = np.uint32(1 << 31)


def with_marks(ids: AnyArray, scored: BoolArray) -> NDArray[np.uint32]:
    """(tokens,) ids, those marked that are scored."""
    return ids.astype(np.uint32) | np.where(scored, SCORED, np.uint32(0))


def without_marks(marked: AnyArray) -> NDArray[np.uint32]:
    """(tokens,) ids alone."""
    ids: NDArray[np.uint32] = marked & ~SCORED
    return ids


def scored_spans(marked: AnyArray, offsets: IntArray) -> tuple[IntArray, IntArray]:
    """What is scored of documents that follow one another.

    Args:
        marked: (tokens,) ids with marks; offsets: (documents + 1,) where each begins; none is empty.

    Returns:
        (documents + 1,) first span of each document, and (2 × spans,) start and stop of each span, in tokens from its
        document's start: as `llamapro.data.shard.Documents` has them.
    """
    scored = (marked & SCORED) != 0
    apart = np.zeros(scored.size + 1, dtype=np.bool_)
    apart[offsets] = True
    before, after = np.append(False, scored[:-1])[: scored.size], np.append(scored[1:], False)[: scored.size]
    starts = np.flatnonzero(scored & (apart[:-1] | ~before))
    stops = np.flatnonzero(scored & (apart[1:] | ~after)) + 1
    begins = offsets[np.searchsorted(offsets, starts, side="right") - 1] if starts.size else starts
    spans = np.stack([starts - begins, stops - begins], axis=1).reshape(-1)
    return np.searchsorted(starts, offsets).astype(np.int64), spans.astype(np.int64)
