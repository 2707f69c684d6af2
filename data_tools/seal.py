"""From committed units to one shard: gather its documents, shuffled by a keyed permutation, and write them.

Only the documents' records and the shard's own tokens are in memory: each part's share is read, put in its places and
forgotten.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_tools.chat.scored import scored_spans, without_marks
from data_tools.dedup import KeptShare, dropped_of_shard
from data_tools.parts import RECORD, Share
from data_tools.plan import BuildPlan
from data_tools.work import Work
from llamapro.data.arrays import AnyArray, IntArray
from llamapro.data.manifest import ShardEntry
from llamapro.data.permutation import permutation_key, permute
from llamapro.data.shard import Documents, Shard, ShardFacts, SplitName, TokenizationFacts, write_shard
from llamapro.files.atomic import staged_file
from llamapro.files.digests import xxh3_file
from llamapro.files.manifest import FileEntry


@dataclass(frozen=True)
class SealedShard:
    """A shard that was written.

    Attributes:
        entry: with the file name only.
        file: size and digest of the whole file.
        length_histogram: see `length_histogram`.
    """

    split: SplitName
    entry: ShardEntry
    file: FileEntry
    length_histogram: list[int]


@dataclass(frozen=True)
class _PartFile:
    """A part of a unit: the number of the input file, and the row of it that the unit begins with."""

    path: Path
    unit: int
    file: int
    first_row: int


def shard_name(split: SplitName, shard: int) -> str:
    """The file name of a shard."""
    return f"{split}-{shard:05d}.bin"


def seal_shard(work_folder: Path, split: SplitName, shard: int) -> SealedShard:
    """Write one shard among the sealed ones of the work folder, unless it is there already.

    The order depends on the plan alone: documents in input order, then a permutation keyed by split and shard.
    """
    path = Work(work_folder).sealed(shard_name(split, shard))
    if not path.exists():
        plan, plan_digest, parts = _committed(work_folder)
        shares = _shares(Work(work_folder), plan, parts, plan.bucket(split, shard))
        documents = _collect(plan, parts, shares, permutation_key("seal", split, shard))
        facts = ShardFacts(
            **{name: getattr(plan.tokenizer, name) for name in TokenizationFacts.model_fields},
            split=split,
            shard=shard,
            documents=documents.offsets.size - 1,
            tokens=documents.tokens.size,
            text_bytes=int(documents.text_bytes.sum()),
            plan=plan_digest,
        )
        with staged_file(path) as staging:
            write_shard(staging, facts, documents)
    return _described(path)


def _described(path: Path) -> SealedShard:
    shard = Shard.open(path)
    facts = shard.facts
    entry = ShardEntry(
        file=path.name,
        documents=facts.documents,
        tokens=facts.tokens,
        text_bytes=facts.text_bytes,
        digest=shard.content_digest,
    )
    whole = FileEntry(size=path.stat().st_size, digest=xxh3_file(path))
    return SealedShard(facts.split, entry, whole, length_histogram(shard.lengths()))


def length_histogram(lengths: IntArray) -> list[int]:
    """Documents by length: entry i counts those of 2^i to 2^(i+1) - 1 tokens."""
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1
    return [int(count) for count in np.bincount(exponents[lengths > 0])]


@lru_cache(maxsize=1)
def _committed(work_folder: Path) -> tuple[BuildPlan, str, tuple[_PartFile, ...]]:
    """The plan, its digest and all parts in input order; read once per process, as every shard needs all of them."""
    work = Work(work_folder)
    plan = work.plan()
    parts: list[_PartFile] = []
    rows_before = RowCounter(plan)
    for unit in plan.units:
        entry = work.entry(unit.index)
        assert entry is not None, f"unit {unit.index} is not committed"
        first_row = rows_before.first_row(unit.index, entry.rows)
        parts += [
            _PartFile(work.part(unit.index, number), unit.index, unit.file, first_row)
            for number in range(len(entry.parts))
        ]  # fmt: skip
    return plan, plan.digest(), tuple(parts)


def _shares(work: Work, plan: BuildPlan, parts: Sequence[_PartFile], bucket: int) -> list[Share]:
    """What each part gives to a shard."""
    dropped = dropped_of_shard(plan, work, bucket) if plan.options.dedup == "exact" else {}
    return [
        KeptShare(part.path, bucket, dropped[part.unit]) if part.unit in dropped else Share(part.path, bucket)
        for part in parts
    ]


def _collect(plan: BuildPlan, parts: Sequence[_PartFile], shares: Sequence[Share], key: int) -> Documents:
    """All documents of a shard, in the order of the permutation."""
    found = [share.records() for share in shares]
    records = np.concatenate([np.zeros(0, dtype=RECORD), *found])
    count = records.size
    places = permute(np.arange(count), count, key) if count else np.zeros(0, dtype=np.int64)
    order = np.argsort(places)
    offsets = np.concatenate([[0], np.cumsum(records["tokens"][order], dtype=np.int64)])
    sizes = [len(part) for part in found]
    first_rows = np.repeat([part.first_row for part in parts], sizes).astype(np.int64)
    tokens = _placed(plan, shares, records["tokens"], offsets[:-1][places], int(offsets[-1]))
    loss_offsets, loss_spans = scored_spans(tokens, offsets) if plan.options.marks_scored else (None, None)
    return Documents(
        tokens=without_marks(tokens) if plan.options.marks_scored else tokens,
        offsets=offsets,
        text_bytes=records["text_bytes"][order],
        hashes=records["hash"][order],
        source_files=np.repeat([part.file for part in parts], sizes)[order],
        source_rows=(records["row"].astype(np.int64) + first_rows)[order],
        loss_offsets=loss_offsets,
        loss_spans=loss_spans,
    )


def _placed(plan: BuildPlan, shares: Sequence[Share], lengths: AnyArray, begins: IntArray, total: int) -> AnyArray:
    """The tokens of all documents, each where it begins.

    Args:
        lengths: (documents,) in input order; begins: (documents,) in the shard.
    """
    tokens = np.empty(total, dtype=plan.part_dtype)
    places = zip(lengths.tolist(), begins.tolist(), strict=True)
    for share in shares:
        source, read = share.tokens(), 0
        while read < source.size:
            length, begin = next(places)
            tokens[begin : begin + length] = source[read : read + length]
            read += length
    return tokens


class RowCounter:
    """Where in its file each unit's rows begin: units of one file follow each other."""

    def __init__(self, plan: BuildPlan) -> None:
        self._plan = plan
        self._file = -1
        self._rows = 0

    def first_row(self, unit: int, rows: int) -> int:
        """The first row of the next unit, which has `rows` rows."""
        chosen = self._plan.units[unit]
        if chosen.file != self._file:
            self._file, self._rows = chosen.file, 0
        first = self._rows if chosen.first_row is None else chosen.first_row
        self._rows = first + rows
        return first
