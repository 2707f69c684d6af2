"""From committed units to one shard: gather its documents, shuffle them by a keyed permutation, write."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.encode import PART_KIND, gather
from data_tools.plan import BuildPlan
from data_tools.work import Work
from llamapro.data.arrays import AnyArray, IntArray
from llamapro.data.container import Container
from llamapro.data.manifest import ShardEntry
from llamapro.data.permutation import permutation_key, permute
from llamapro.data.shard import Documents, ShardFacts, SplitName, TokenizationFacts, write_shard

_COLUMNS = ("text_bytes", "hashes", "rows")


@dataclass(frozen=True)
class SealedShard:
    """A shard that was written: `entry` with the file name only, `length_histogram` see `length_histogram`."""

    split: SplitName
    entry: ShardEntry
    length_histogram: list[int]


def shard_name(split: SplitName, shard: int) -> str:
    """The file name of a shard."""
    return f"{split}-{shard:05d}.bin"


def seal_shard(work_folder: Path, staging: Path, split: SplitName, shard: int) -> SealedShard:
    """Write one shard into the staging folder.

    The order depends on the plan alone: documents in input order, then a permutation keyed by split and shard.
    """
    work = Work(work_folder)
    plan = work.plan()
    documents = _shuffled(_collect(work, plan, plan.bucket(split, shard)), permutation_key("seal", split, shard))
    facts = ShardFacts(
        **{name: getattr(plan.tokenizer, name) for name in TokenizationFacts.model_fields},
        split=split,
        shard=shard,
        documents=documents.offsets.size - 1,
        tokens=documents.tokens.size,
        text_bytes=int(documents.text_bytes.sum()),
        plan=plan.digest(),
    )
    name = shard_name(split, shard)
    digest = write_shard(staging / name, facts, documents)
    entry = ShardEntry(
        file=name, documents=facts.documents, tokens=facts.tokens, text_bytes=facts.text_bytes, digest=digest
    )
    return SealedShard(split, entry, length_histogram(np.diff(documents.offsets)))


def length_histogram(lengths: IntArray) -> list[int]:
    """Documents by length: entry i counts those of 2^i to 2^(i+1) - 1 tokens."""
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1
    return [int(count) for count in np.bincount(exponents[lengths > 0])]


def _collect(work: Work, plan: BuildPlan, bucket: int) -> Documents:
    """All documents of a shard in input order."""
    tokens: list[AnyArray] = [np.zeros(0, dtype=plan.tokenizer.token_dtype)]
    lengths: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    files: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    columns: dict[str, list[AnyArray]] = {name: [np.zeros(0, dtype=np.uint64)] for name in _COLUMNS}
    rows_before = RowCounter(plan)
    for unit in plan.units:
        entry = work.entry(unit.index)
        assert entry is not None, f"unit {unit.index} is not committed"
        first_row = rows_before.first_row(unit.index, entry.rows)
        for number in range(len(entry.parts)):
            part = Container.open(work.part(unit.index, number), PART_KIND)
            low, high = np.searchsorted(part.array("buckets"), [bucket, bucket + 1]).tolist()
            offsets = part.array("offsets")[low : high + 1].astype(np.int64)
            part.check("tokens", int(offsets[0]), int(offsets[-1]))
            tokens.append(part.unchecked("tokens")[offsets[0] : offsets[-1]])
            lengths.append(np.diff(offsets))
            files.append(np.full(high - low, unit.file, dtype=np.int64))
            for name in _COLUMNS:
                columns[name].append(part.array(name)[low:high].astype(np.uint64))
            columns["rows"][-1] += np.uint64(first_row)
    return Documents(
        tokens=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]),
        text_bytes=np.concatenate(columns["text_bytes"]),
        hashes=np.concatenate(columns["hashes"]),
        source_files=np.concatenate(files),
        source_rows=np.concatenate(columns["rows"]),
    )


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


def _shuffled(documents: Documents, key: int) -> Documents:
    count = documents.offsets.size - 1
    if count == 0:
        return documents
    order = np.argsort(permute(np.arange(count), count, key))
    lengths = np.diff(documents.offsets)[order]
    return Documents(
        tokens=gather(documents.tokens, documents.offsets[:-1][order], lengths),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        text_bytes=documents.text_bytes[order],
        hashes=documents.hashes[order],
        source_files=documents.source_files[order],
        source_rows=documents.source_rows[order],
    )
