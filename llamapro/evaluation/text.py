"""Loss and bits per byte on held-out text, the same for a validation in training and for `llamapro evaluate`.

Deterministic: the same rows give the same score in any order and on any number of ranks, up to the model's own
arithmetic. Bits per byte is what models with different tokenizers can be compared by.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from llamapro.data.loader import Batch
from llamapro.errors import DataError
from llamapro.evaluation.intervals import Estimate, ratio_of_sums
from llamapro.ranks import Ranks


class RowLosses(Protocol):
    """What a forward pass says about each row of its batch."""

    @property
    def row_loss_sums(self) -> torch.Tensor:
        """(rows,) sum of the row's token losses, nats."""

    @property
    def row_tokens(self) -> torch.Tensor:
        """(rows,) target tokens of the row."""


@dataclass(frozen=True)
class RowScore:
    """One packed row of text.

    Attributes:
        loss_sum: sum of its token losses, nats.
        tokens: its target tokens.
        utf8_bytes: the bytes of text those tokens stand for; a fraction where a document is cut.
    """

    loss_sum: float
    tokens: int
    utf8_bytes: float


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text; the half widths are those of 95 % confidence intervals over rows.

    Attributes:
        loss: nats per target token.
        bits_per_byte: bits per UTF-8 byte of the text.
        tokens: target tokens.
        bytes: UTF-8 bytes.
        rows: what the rest is computed from, in row order.
    """

    loss: float
    loss_half_width: float | None
    bits_per_byte: float
    bits_per_byte_half_width: float | None
    tokens: int
    bytes: float
    rows: tuple[RowScore, ...]


def evaluate_text(
    loss: Callable[[Batch], RowLosses],
    batches: Iterable[tuple[Batch, Sequence[float]]],
    ranks: Ranks,
    advance: Callable[[int], None] = lambda rows: None,
) -> TextScore:
    """Score a model on this rank's batches; the result is that of all ranks' batches, on every rank.

    Args:
        loss: the model's forward pass; called without autograd.
        batches: batches with the UTF-8 bytes of each of their rows. Every rank must have equally many when the forward
            pass is collective; rows without target tokens don't count.
        advance: told the number of rows done, after each batch.
    """
    return score_rows(evaluate_rows(loss, batches, ranks, advance))


def evaluate_rows(
    loss: Callable[[Batch], RowLosses],
    batches: Iterable[tuple[Batch, Sequence[float]]],
    ranks: Ranks,
    advance: Callable[[int], None] = lambda rows: None,
) -> tuple[RowScore, ...]:
    """What `evaluate_text` makes its score of: the rows of all ranks that have target tokens, in rank order."""
    mine: list[tuple[float, int, float]] = []
    with torch.no_grad():
        for batch, row_bytes in batches:
            output = loss(batch)
            sums, tokens = output.row_loss_sums.double().tolist(), output.row_tokens.tolist()
            mine.extend(zip(sums, tokens, map(float, row_bytes), strict=True))
            advance(len(sums))
    gathered = (RowScore(*row) for part in ranks.all_gather_json(mine) for row in part)
    return tuple(row for row in gathered if row.tokens)


def score_rows(rows: Sequence[RowScore]) -> TextScore:
    """The score of a text from its rows.

    Raises:
        DataError: there is no target token in them.
    """
    if not rows:
        raise DataError("the evaluation text has no target token: it is empty, or every document is one token long")
    tokens, sizes = [float(row.tokens) for row in rows], [row.utf8_bytes for row in rows]
    sums = [row.loss_sum for row in rows]
    loss = ratio_of_sums(sums, tokens)
    bits = ratio_of_sums([total / math.log(2) for total in sums], sizes)
    return TextScore(
        loss=loss.value,
        loss_half_width=loss.half_width,
        bits_per_byte=bits.value,
        bits_per_byte_half_width=bits.half_width,
        tokens=sum(row.tokens for row in rows),
        bytes=math.fsum(sizes),
        rows=tuple(rows),
    )


def relative_change(model: TextScore, base: TextScore) -> Estimate:
    """By which fraction the model's loss is above the base's on the same rows; negative is better.

    The interval is that of the paired difference row by row, far tighter than those of the two losses.
    """
    assert [row.tokens for row in model.rows] == [row.tokens for row in base.rows], "scores of different texts"
    before = [row.loss_sum for row in base.rows]
    after = [row.loss_sum for row in model.rows]
    return ratio_of_sums([new - old for new, old in zip(after, before, strict=True)], before)
