"""Which blocks are computed again in the backward pass, so that activations stay within a number of bytes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockCost:
    """One block of the backward pass, for one micro-batch.

    Attributes:
        block: its id.
        kept: bytes that it keeps when it is computed once.
        entry: bytes of its input, which is all that a block to be computed again keeps.
        flops: of computing it again, per token.
        trainable: its parameters learn.
    """

    block: int
    kept: float
    entry: float
    flops: float
    trainable: bool = False

    @property
    def saved_per_flop(self) -> float:
        """Bytes saved for each FLOP that is spent again."""
        return (self.kept - self.entry) / self.flops


def peak_bytes(costs: Sequence[BlockCost], recomputed: Collection[int]) -> float:
    """The most that activations of all blocks take at any moment.

    Args:
        costs: from the lowest block upward.
    """
    return sum(peak_parts(costs, recomputed))


def peak_parts(costs: Sequence[BlockCost], recomputed: Collection[int]) -> tuple[float, float]:
    """At the moment when activations take most: those of frozen blocks, and those of trainable ones.

    The backward pass goes from the last block down. When a block is computed again, those above it are done, so its own
    bytes come on top of what lies below it only.
    """
    held, most = [0.0, 0.0], [0.0, 0.0]
    for cost in costs:
        again, kind = cost.block in recomputed, int(cost.trainable)
        at_work = list(held)
        at_work[kind] += cost.kept + (cost.entry if again else 0.0)
        most = max(most, at_work, key=sum)
        held[kind] += cost.entry if again else cost.kept
    return most[0], most[1]


def fewest_recomputed(costs: Sequence[BlockCost], budget: float) -> frozenset[int] | None:
    """The blocks to compute again so that `peak_bytes` is within the budget; None when no choice is.

    Blocks that save the most bytes per FLOP come first, of equals the lowest. None is taken that isn't needed. Blocks
    near the end may save least at the peak, because all others are still there when they are computed again: so with
    every block as the highest that may be taken, the choice is made anew, and the one of the fewest FLOPs
    wins, of several the one of the least peak.
    """
    flops = {cost.block: cost.flops for cost in costs}

    def rank(choice: frozenset[int]) -> tuple[float, float, list[int]]:
        return sum(flops[block] for block in choice), peak_bytes(costs, choice), sorted(choice)

    choices = [choice for order in _orders(costs) if (choice := _first_within(costs, order, budget)) is not None]
    return min(choices, key=rank, default=None)


def least_peak_bytes(costs: Sequence[BlockCost]) -> float:
    """The smallest budget that `fewest_recomputed` can meet."""
    return peak_bytes(costs, most_recomputed(costs))


def most_recomputed(costs: Sequence[BlockCost]) -> frozenset[int]:
    """The blocks that bring the least peak."""
    choices = [frozenset(order) for order in _orders(costs)]
    return min(choices, key=lambda choice: (peak_bytes(costs, choice), len(choice)))


def _orders(costs: Sequence[BlockCost]) -> list[list[int]]:
    """For each block as the highest that may be taken, and for none: those that may be, the worthiest first."""
    saving = sorted((cost for cost in costs if cost.kept > cost.entry), key=lambda c: (-c.saved_per_flop, c.block))
    return [[], *([cost.block for cost in saving if cost.block <= highest.block] for highest in costs)]


def _first_within(costs: Sequence[BlockCost], order: Sequence[int], budget: float) -> frozenset[int] | None:
    chosen: list[int] = []
    for block in (None, *order):
        chosen += [] if block is None else [block]
        if peak_bytes(costs, chosen) <= budget:
            return _without_needless(costs, chosen, budget)
    return None


def _without_needless(costs: Sequence[BlockCost], chosen: Sequence[int], budget: float) -> frozenset[int]:
    needed = set(chosen)
    for block in reversed(chosen):
        if peak_bytes(costs, needed - {block}) <= budget:
            needed.remove(block)
    return frozenset(needed)
