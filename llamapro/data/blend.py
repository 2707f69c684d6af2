"""Which source each sample comes from: fixed integer counts per block, at even spacing, computed and never stored.

Within a block, occurrence j of a source with c occurrences stands at (2j + 1) / 2c of the block; samples are in the
order of these places. Counts per source are monotone over blocks, so no sample is skipped or seen twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llamapro.data.arrays import IntArray
from llamapro.errors import DataError

BLOCK_SAMPLES = 1 << 20
_SPACING_BITS = 31
_CACHED_BLOCKS = 4


@dataclass(frozen=True)
class BlockOrder:
    """The order of one block: `sources` (n,) by slot; `occurrences` (n,) how often that source came before in it."""

    sources: NDArray[np.int32]
    occurrences: NDArray[np.int32]


class WeightBlend:
    """Sources in proportion to weights, without end: the same counts in every block.

    Args:
        weights: relative shares; 0 leaves a source out.
        names: of the sources, for messages.
    """

    def __init__(self, weights: Sequence[float], names: Sequence[str], block: int = BLOCK_SAMPLES) -> None:
        self.total: int | None = None
        self._block = block
        self._counts = tuple(_rounded_counts(weights, names, block))

    def block_of(self, sample: int) -> int:
        """The block that holds a sample."""
        return sample // self._block

    def block_start(self, block: int) -> int:
        """The first sample of a block."""
        return block * self._block

    def counts_before(self, block: int) -> IntArray:
        """(sources,) samples of each source before a block."""
        return np.array(self._counts, dtype=np.int64) * block

    def counts_in(self, block: int) -> tuple[int, ...]:
        """(sources,) samples of each source in a block."""
        return self._counts


class RepeatBlend:
    """Each source a fixed number of times in all, in proportion throughout, all ending together.

    Args:
        counts: samples of each source in the whole run.
    """

    def __init__(self, counts: Sequence[int], block: int = BLOCK_SAMPLES) -> None:
        self._counts = np.array(counts, dtype=np.int64)
        self.total: int | None = int(self._counts.sum())
        self._blocks = max(1, -(-self.total // block))

    def block_of(self, sample: int) -> int:
        """The block that holds a sample."""
        low, high = 0, self._blocks
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.block_start(middle) <= sample else (low, middle)
        return low

    def block_start(self, block: int) -> int:
        """The first sample of a block."""
        return int(self.counts_before(block).sum())

    def counts_before(self, block: int) -> IntArray:
        """(sources,) samples of each source before a block: its total, cut at equal parts."""
        return np.array([int(count) * block // self._blocks for count in self._counts], dtype=np.int64)

    def counts_in(self, block: int) -> tuple[int, ...]:
        """(sources,) samples of each source in a block."""
        return tuple((self.counts_before(block + 1) - self.counts_before(block)).tolist())


Blend = WeightBlend | RepeatBlend


def locate(blend: Blend, first: int, count: int) -> tuple[IntArray, IntArray]:
    """For samples first … first+count-1: (count,) the source of each, (count,) how many of that source came before."""
    sources, occurrences = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    while count > 0:
        block = blend.block_of(first)
        slot = first - blend.block_start(block)
        order = block_order(blend.counts_in(block))
        taken = min(count, order.sources.size - slot)
        assert taken > 0, f"sample {first} is beyond the last"
        part = order.sources[slot : slot + taken]
        sources.append(part.astype(np.int64))
        occurrences.append(order.occurrences[slot : slot + taken] + blend.counts_before(block)[part])
        first, count = first + taken, count - taken
    return np.concatenate(sources), np.concatenate(occurrences)


def counts_until(blend: Blend, sample: int) -> IntArray:
    """(sources,) samples of each source before sample number `sample`."""
    block = blend.block_of(sample)
    counts = blend.counts_in(block)
    inside = block_order(counts).sources[: sample - blend.block_start(block)]
    return blend.counts_before(block) + np.bincount(inside, minlength=len(counts))


@lru_cache(maxsize=_CACHED_BLOCKS)
def block_order(counts: tuple[int, ...]) -> BlockOrder:
    """The order of a block with these counts: the same on every machine, as it is computed in integers."""
    sources = np.repeat(np.arange(len(counts)), counts)
    occurrences = np.concatenate([np.arange(count) for count in counts])
    places = ((2 * occurrences + 1) << _SPACING_BITS) // np.array(counts)[sources]
    order = np.argsort(places, kind="stable")
    return BlockOrder(sources[order].astype(np.int32), occurrences[order].astype(np.int32))


def _rounded_counts(weights: Sequence[float], names: Sequence[str], block: int) -> list[int]:
    """Integer counts that add up to `block`, by largest remainder."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact, Fraction(0))
    if total <= 0 or min(exact) < 0:
        raise DataError(f"weights must not be negative and not all zero, got {dict(zip(names, weights, strict=True))}")
    shares = [weight / total * block for weight in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: (counts[index] - shares[index], index))
    for index in by_remainder[: block - sum(counts)]:
        counts[index] += 1
    for name, weight, count in zip(names, weights, counts, strict=True):
        if weight > 0 and count == 0:
            raise DataError(f"source {name}: weight {weight} is less than one sample in {block:,}; raise it or leave "
                            "the source out")  # fmt: skip
    return counts
