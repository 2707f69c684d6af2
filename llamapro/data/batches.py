"""Rows of tokens as the model takes them, and each rank's share of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from llamapro.data.arrays import IntArray
from llamapro.data.rows import IGNORED, Row

PADDING_ID = 0


@dataclass(frozen=True)
class Sample:
    """One row of the sample stream.

    Attributes:
        input_ids: (S,); labels: (S,) the target of each position, -100 where there is none; position_ids: (S,).
        source: number of the source it comes from.
        bytes: UTF-8 bytes of the text in it.
    """

    input_ids: IntArray
    labels: IntArray
    position_ids: IntArray
    source: int
    bytes: int


@dataclass(frozen=True)
class Batch:
    """Rows of equal length.

    Attributes:
        input_ids: (rows, S).
        labels: (rows, S) already shifted: the target of each position; -100 at a document's last token, at padding and
            where the next token is not scored.
        position_ids: (rows, S) restart at each document, and at padding.
        sources: (rows,) number of the source each row comes from.
        valid_tokens: targets in all rows.
    """

    input_ids: IntArray
    labels: IntArray
    position_ids: IntArray
    sources: IntArray
    valid_tokens: int

    @classmethod
    def empty_rows(cls, rows: int, sequence_length: int) -> Self:
        """Rows of padding, without any target."""
        positions = np.broadcast_to(np.arange(sequence_length, dtype=np.int64), (rows, sequence_length))
        return cls(
            input_ids=np.full((rows, sequence_length), PADDING_ID, dtype=np.int64),
            labels=np.full((rows, sequence_length), IGNORED, dtype=np.int64),
            position_ids=positions.copy(),
            sources=np.zeros(rows, dtype=np.int64),
            valid_tokens=0,
        )

    @classmethod
    def from_rows(cls, rows: Sequence[Row | Sample], sources: IntArray, sequence_length: int) -> Self:
        """Stack rows; no rows give a batch of none."""
        if not rows:
            return cls.empty_rows(0, sequence_length)
        labels = np.stack([row.labels for row in rows])
        return cls(
            input_ids=np.stack([row.input_ids for row in rows]),
            labels=labels,
            position_ids=np.stack([row.position_ids for row in rows]),
            sources=sources.astype(np.int64),
            valid_tokens=int(np.count_nonzero(labels != IGNORED)),
        )

    def only(self, rows: IntArray) -> "Batch":
        """Some of the rows, by their places."""
        labels = self.labels[rows]
        return Batch(
            input_ids=self.input_ids[rows],
            labels=labels,
            position_ids=self.position_ids[rows],
            sources=self.sources[rows],
            valid_tokens=int(np.count_nonzero(labels != IGNORED)),
        )

    @property
    def rows(self) -> int:
        """How many."""
        return int(self.input_ids.shape[0])

    @property
    def boundaries(self) -> IntArray:
        """(documents + 1,) int32: where each document begins when rows are laid end to end, then the tokens of all."""
        begins = np.ones(self.position_ids.shape, dtype=bool)
        begins[:, 1:] = self.position_ids[:, 1:] != self.position_ids[:, :-1] + 1
        return np.append(np.flatnonzero(begins), self.position_ids.size).astype(np.int32)


def pad_rows(batch: Batch, rows: int) -> Batch:
    """The batch with rows without loss appended until it has `rows`."""
    missing = rows - batch.rows
    assert missing >= 0, f"{batch.rows} rows don't fit into {rows}"
    if missing == 0:
        return batch
    empty = Batch.empty_rows(missing, int(batch.input_ids.shape[1]))
    return Batch(
        input_ids=np.concatenate([batch.input_ids, empty.input_ids]),
        labels=np.concatenate([batch.labels, empty.labels]),
        position_ids=np.concatenate([batch.position_ids, empty.position_ids]),
        sources=np.concatenate([batch.sources, empty.sources]),
        valid_tokens=batch.valid_tokens,
    )


def rank_share(first: int, count: int, rank: int, world_size: int) -> tuple[int, int]:
    """A rank's contiguous part of samples [first, first + count), as (first, count); parts differ by at most one."""
    assert 0 <= rank < world_size
    start, stop = (count * part // world_size for part in (rank, rank + 1))
    return first + start, stop - start
