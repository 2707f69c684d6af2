"""What each block adds: the increase of the loss when the block is bypassed, its residual stream passed straight on.

For the new blocks of an expanded model this is their contribution; with all of them bypassed the model is its base.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

from llamapro.data.loader import Batch
from llamapro.evaluation.text import RowLosses, TextScore, evaluate_text
from llamapro.ranks import Ranks


def block_contributions(
    loss: Callable[[Batch], RowLosses],
    bypassed: Callable[[Iterable[int]], AbstractContextManager[object]],
    blocks: Sequence[int],
    batches: Sequence[tuple[Batch, Sequence[float]]],
    ranks: Ranks,
    advance: Callable[[int], None] = lambda rows: None,
) -> tuple[TextScore, dict[int, float]]:
    """The score with every block in place, and per block how many nats per token the loss rises without it.

    Args:
        loss: the model's forward pass.
        bypassed: makes the model skip some blocks while the context lasts (`LanguageModel.bypassed`).
        blocks: ids of the blocks to leave out, one at a time.
        advance: told the number of rows done; `1 + len(blocks)` passes over the batches in all.
    """
    whole = evaluate_text(loss, batches, ranks, advance)
    increases = {}
    for block in blocks:
        with bypassed((block,)):
            increases[block] = evaluate_text(loss, batches, ranks, advance).loss - whole.loss
    return whole, increases
