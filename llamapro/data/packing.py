"""Pack plans: which pieces of documents make up each row of `sequence_length` tokens.

`bestfit` fills rows by exact best-fit-decreasing and cuts only documents longer than a row; `concat` cuts the stream of
documents every `sequence_length` tokens, is found by arithmetic and stored nowhere; `document` gives every document its
own rows. Rows never mix shards. A stored plan is a folder, whole or absent, named by the dataset's fingerprint, the
split, the length and the policy; it never goes stale.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from llamapro.data.arrays import IntArray
from llamapro.data.best_fit import best_fit_decreasing
from llamapro.data.container import Container, write_container
from llamapro.data.dataset import PACKS_FOLDER, Dataset, Split
from llamapro.data.rows import RowPieces
from llamapro.data.shard import Shard, SplitName
from llamapro.errors import Corrupted, DataError
from llamapro.files.atomic import commit_folder, remove_tree, staging_path

Policy = Literal["bestfit", "concat", "document"]
PACK_KIND = "pack"
_FINGERPRINT_DIGITS = 16


class ShardRows(Protocol):
    """The rows that one shard gives."""

    @property
    def rows(self) -> int:
        """How many."""

    def pieces(self, row: int) -> RowPieces:
        """What row `row` of this shard is made of."""


@dataclass(frozen=True)
class ConcatRows:
    """Rows cut from the stream of a shard's documents."""

    shard: Shard
    sequence_length: int

    @property
    def rows(self) -> int:
        """How many; the last one may be padded."""
        return -(-self.shard.facts.tokens // self.sequence_length)

    def pieces(self, row: int) -> RowPieces:
        """What row `row` of this shard is made of."""
        start = row * self.sequence_length
        stop = min(start + self.sequence_length, self.shard.facts.tokens)
        offsets = self.shard.offsets
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        last = int(np.searchsorted(offsets, stop, side="left"))
        bounds = offsets[first : last + 1].astype(np.int64)
        begins, ends = np.maximum(bounds[:-1], start), np.minimum(bounds[1:], stop)
        return RowPieces(self.shard, np.arange(first, last), begins - bounds[:-1], ends - begins)


@dataclass(frozen=True)
class RowTable:
    """Rows as arrays: documents and piece starts of all rows, and `row_offsets` (rows + 1,) where each row begins."""

    documents: IntArray
    starts: IntArray
    row_offsets: IntArray


class TableRows:
    """Rows listed in a table.

    Args:
        shard: the shard they read; sequence_length: at which longer documents are cut.
        table: in memory, or the container that holds it.
    """

    def __init__(self, shard: Shard, sequence_length: int, table: RowTable | Container) -> None:
        self._shard = shard
        self._sequence_length = sequence_length
        self._table = table

    @property
    def rows(self) -> int:
        """How many."""
        if isinstance(self._table, RowTable):
            return self._table.row_offsets.size - 1
        return int(self._table.header.facts["rows"])

    def pieces(self, row: int) -> RowPieces:
        """What row `row` of this shard is made of."""
        table = self._loaded()
        first, last = (int(value) for value in table.row_offsets[row : row + 2])
        documents = table.documents[first:last].astype(np.int64)
        starts = table.starts[first:last].astype(np.int64)
        offsets = self._shard.offsets
        left = offsets[documents + 1].astype(np.int64) - offsets[documents] - starts
        return RowPieces(self._shard, documents, starts, np.minimum(left, self._sequence_length))

    def _loaded(self) -> RowTable:
        if isinstance(self._table, Container):
            names = ("documents", "starts", "row_offsets")
            self._table = RowTable(*(self._table.array(name) for name in names))
        return self._table


class PackPlan:
    """The rows of one split at one sequence length.

    Args:
        shard_rows: of each shard, in order.
    """

    def __init__(self, split: Split, sequence_length: int, policy: Policy, shard_rows: list[ShardRows]) -> None:
        self.split = split
        self.sequence_length = sequence_length
        self.policy = policy
        self._shard_rows = shard_rows
        self._bounds = np.cumsum([0, *(part.rows for part in shard_rows)])

    @property
    def rows(self) -> int:
        """Rows in all: the length of one epoch, in sequences."""
        return int(self._bounds[-1])

    @property
    def utilisation(self) -> float:
        """Share of row positions that hold a token; 1 is the best possible."""
        return self.split.tokens / max(1, self.rows * self.sequence_length)

    def pieces(self, row: int) -> RowPieces:
        """What row `row` is made of, 0 ≤ row < rows."""
        assert 0 <= row < self.rows, row
        shard = int(np.searchsorted(self._bounds, row, side="right")) - 1
        return self._shard_rows[shard].pieces(row - int(self._bounds[shard]))


def ensure_pack(
    dataset: Dataset, split: SplitName, sequence_length: int, policy: Policy, fallback_folder: Path | None
) -> PackPlan:
    """The pack plan of a dataset's split: opened where it exists, otherwise made and stored.

    Args:
        sequence_length: tokens per row, at least 2.
        fallback_folder: where to store it when the dataset's folder can't be written to.

    Raises:
        DataError: the split is empty, or no folder can be written to.
    """
    chosen = dataset.split(split)
    if sequence_length < 2:
        raise DataError(f"sequence length {sequence_length} is too short: a row of 1 token has nothing to predict")
    if chosen.documents == 0:
        raise DataError(f"{dataset.folder} has no {split} documents; build it with another --heldout")
    if policy == "concat":
        return PackPlan(chosen, sequence_length, policy, [ConcatRows(s, sequence_length) for s in chosen.shards])
    name = f"{split}-{sequence_length}-{policy}-{dataset.fingerprint[:_FINGERPRINT_DIGITS]}"
    folder = _stored(dataset, name, fallback_folder)
    if folder is None:
        folder = _writable(dataset, fallback_folder) / name
        _write_plan(folder, chosen, sequence_length, policy)
    return PackPlan(chosen, sequence_length, policy, [_open_rows(folder, s, sequence_length) for s in chosen.shards])


def pack_in_memory(split: Split, sequence_length: int, policy: Literal["bestfit", "document"]) -> PackPlan:
    """A pack plan that is stored nowhere, for small splits."""
    tables = (TableRows(shard, sequence_length, row_table(shard, sequence_length, policy)) for shard in split.shards)
    return PackPlan(split, sequence_length, policy, list(tables))


def row_table(shard: Shard, sequence_length: int, policy: Literal["bestfit", "document"]) -> RowTable:
    """Pack the documents of one shard; those longer than a row are cut at multiples of `sequence_length`."""
    lengths = shard.lengths()
    parts = -(-lengths // sequence_length)
    documents = np.repeat(np.arange(lengths.size), parts)
    starts = (np.arange(documents.size) - np.repeat(np.cumsum(parts) - parts, parts)) * sequence_length
    if policy == "document":
        return RowTable(documents, starts, np.arange(documents.size + 1))
    piece_lengths = np.minimum(lengths[documents] - starts, sequence_length)
    rows, count = best_fit_decreasing(piece_lengths, sequence_length)
    order = np.argsort(rows, kind="stable")
    row_offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])
    return RowTable(documents[order], starts[order], row_offsets)


def _stored(dataset: Dataset, name: str, fallback_folder: Path | None) -> Path | None:
    places = [dataset.folder / PACKS_FOLDER, *([fallback_folder] if fallback_folder else [])]
    return next((place / name for place in places if (place / name).is_dir()), None)


def _writable(dataset: Dataset, fallback_folder: Path | None) -> Path:
    if os.access(dataset.folder, os.W_OK):
        return dataset.folder / PACKS_FOLDER
    if fallback_folder is None:
        raise DataError(f"{dataset.folder} can't be written to, so no pack plan can be stored in it; pack it as its "
                        "owner with `llamapro data pack`")  # fmt: skip
    return fallback_folder


def _write_plan(folder: Path, split: Split, sequence_length: int, policy: Literal["bestfit", "document"]) -> None:
    """Write the plan's folder. Runs that start together may each make it: the first to finish puts it in place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = staging_path(folder)
    staging.mkdir()
    try:
        for shard in split.shards:
            _write_rows(staging, shard, sequence_length, policy)
        if not folder.exists():
            commit_folder(staging, folder)
    finally:
        if staging.exists():
            remove_tree(staging)


def _write_rows(folder: Path, shard: Shard, sequence_length: int, policy: Literal["bestfit", "document"]) -> None:
    table = row_table(shard, sequence_length, policy)
    facts = {**_pack_key(shard, sequence_length), "policy": policy, "rows": table.row_offsets.size - 1}
    sections = {
        "documents": table.documents.astype("<u4"),
        "starts": table.starts.astype("<u4"),
        "row_offsets": table.row_offsets.astype("<u8"),
    }
    write_container(folder / _file_name(shard), PACK_KIND, facts, sections)


def _open_rows(folder: Path, shard: Shard, sequence_length: int) -> TableRows:
    container = Container.open(folder / _file_name(shard), PACK_KIND)
    key = _pack_key(shard, sequence_length)
    if {name: container.header.facts.get(name) for name in key} != key:
        raise Corrupted(f"{container.path} is not the pack plan of {shard.path}; delete {folder}, it is made again")
    return TableRows(shard, sequence_length, container)


def _pack_key(shard: Shard, sequence_length: int) -> dict[str, Any]:
    return {"shard_digest": shard.content_digest, "sequence_length": sequence_length}


def _file_name(shard: Shard) -> str:
    return f"pack-{shard.facts.shard:05d}.bin"
