"""One work unit: read, tokenize, sort by shard, commit."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.chat.encode import NOTHING_SCORED, ChatEncoder
from data_tools.chat.scored import with_marks
from data_tools.decontaminate import EvaluationIndex, Match, report_line
from data_tools.dedup import digests_name, text_digests, write_digests
from data_tools.encoders import Encoded, Encoder, open_encoder
from data_tools.fim import FimEncoder
from data_tools.parts import RECORD, split, write_part
from data_tools.plan import BuildPlan, InputFile
from data_tools.readers import Blank, Document, Reject, WholeReject, read_unit
from data_tools.work import CONTAMINATION_NAME, ENTRY_NAME, RejectExample, UnitEntry, Work, part_name
from llamapro.data.arrays import AnyArray, IntArray
from llamapro.data.permutation import mix
from llamapro.data.splits import document_hash, is_heldout
from llamapro.errors import DataError
from llamapro.files.atomic import staged_folder

BATCH_TEXT_BYTES = 4 << 20
PART_TEXT_BYTES = 64 << 20
MAX_EXAMPLES = 100
_RECORD_COLUMNS = {"tokens": "lengths", "text_bytes": "text_bytes", "hash": "hashes", "row": "rows"}


@dataclass(frozen=True)
class EncodedBatch:
    """Documents with their ids; arrays by document but for `tokens`, `lengths` in tokens.

    Attributes:
        digests: (documents, 2) see `data_tools.dedup`; None where equal documents are kept.
    """

    tokens: AnyArray
    lengths: IntArray
    text_bytes: IntArray
    hashes: NDArray[np.uint64]
    rows: IntArray
    digests: NDArray[np.uint64] | None


@dataclass
class _Tally:
    """What happened to a unit's rows so far; `report` is the file that lists contaminated documents."""

    report: Path
    rows: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    examples: list[RejectExample] = field(default_factory=list)
    unusable: bool = False
    contaminated: int = 0
    cut: int = 0
    cut_tokens: int = 0

    def reject_all(self, reject: WholeReject) -> None:
        """Forget what was counted: nothing of the unit is used."""
        self.rejects, self.unusable, self.contaminated = Counter({reject.reason: 1}), True, 0
        self.cut = self.cut_tokens = 0
        self.examples = [RejectExample(row=reject.row, reason=f"{reject.reason}: {reject.detail}")]

    def contamination(self, row: int, matches: Sequence[Match]) -> None:
        self.contaminated += 1
        with self.report.open("ab") as file:
            file.writelines(report_line(row, match) for match in matches)

    def reject(self, row: int, reason: str) -> None:
        self.rejects[reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(RejectExample(row=row, reason=reason))


def encode_unit(work_folder: Path, library: str, unit: int) -> UnitEntry:
    """Tokenize one unit and commit it; an unfinished attempt leaves nothing behind that counts.

    Raises:
        DataError: the input can't be read, or was changed since the build began.
    """
    context = _context(work_folder, library)
    work, plan = context.work, context.plan
    parts, documents, tokens, text_bytes = [], 0, 0, 0
    with staged_folder(work.unit_folder(unit), overwrite=True) as staging:
        tally = _Tally(staging / CONTAMINATION_NAME)
        for number, batches in enumerate(_parts(_batches(context, unit, tally))):
            path = staging / part_name(number)
            _write_part(path, number, plan, unit, batches)
            parts.append(path.stat().st_size)
            documents += sum(batch.lengths.size for batch in batches)
            tokens += sum(batch.tokens.size for batch in batches)
            text_bytes += sum(int(batch.text_bytes.sum()) for batch in batches)
        if tally.unusable:
            for path in staging.iterdir():
                path.unlink()
            parts, documents, tokens, text_bytes = [], 0, 0, 0
        _require_unchanged(plan.files[plan.units[unit].file])
        entry = UnitEntry(
            unit=unit,
            rows=tally.rows,
            documents=documents,
            tokens=tokens,
            text_bytes=text_bytes,
            rejects=dict(sorted(tally.rejects.items())),
            examples=tuple(tally.examples),
            unusable=tally.unusable,
            contaminated=tally.contaminated,
            cut=tally.cut,
            cut_tokens=tally.cut_tokens,
            parts=tuple(parts),
        )
        (staging / ENTRY_NAME).write_text(entry.model_dump_json())
    return entry


def _require_unchanged(file: InputFile) -> None:
    status = file.path.stat()
    if (status.st_size, status.st_mtime_ns) != (file.size, file.modified_ns):
        raise DataError(
            f"{file.path} was changed while it was read; restore it as it was and run the same command again, or build "
            "anew from what it is now"
        )


@dataclass(frozen=True)
class _Context:
    """What all units of a build need: `encode` gives ids of texts, by their hashes; `chat` those of conversations."""

    work: Work
    plan: BuildPlan
    encode: Callable[[list[str], NDArray[np.uint64]], Encoded]
    evaluation: EvaluationIndex | None
    chat: ChatEncoder | None


@lru_cache(maxsize=1)
def _context(work_folder: Path, library: str) -> _Context:
    """Loaded once per process: opening a tokenizer can take a second."""
    work = Work(work_folder)
    plan = work.plan()
    path = plan.tokenizer_folder / plan.tokenizer.file
    evaluation = EvaluationIndex(plan.evaluation_files) if plan.evaluation_files else None
    chat = ChatEncoder(path, plan.options.chat.max_tokens) if plan.options.chat else None
    return _Context(work, plan, _text_encoder(plan, open_encoder(path, library)), evaluation, chat)


def _text_encoder(plan: BuildPlan, encoder: Encoder) -> Callable[[list[str], NDArray[np.uint64]], Encoded]:
    if plan.options.fim is None:
        return lambda texts, hashes: encoder.encode(texts)
    fim = FimEncoder(plan.options.fim, encoder)
    return lambda texts, hashes: fim.encode(texts, hashes, ~is_heldout(hashes, plan.options.heldout))


def _batches(context: _Context, unit: int, tally: _Tally) -> Iterator[EncodedBatch]:
    """The unit's documents, encoded about 4 MiB of text at a time; at a `WholeReject` they end."""
    plan = context.plan
    chosen = plan.units[unit]
    waiting: list[Document] = []
    size = 0
    for item in read_unit(chosen, plan.files[chosen.file], plan.options):
        tally.rows = item.row + 1
        if isinstance(item, WholeReject):
            tally.reject_all(item)
            return
        if isinstance(item, Reject):
            tally.reject(item.row, item.reason)
        if isinstance(item, Reject | Blank):
            continue
        if context.evaluation and (matches := context.evaluation.matches(item.text)):
            tally.contamination(item.row, matches)
            if plan.options.contaminated == "drop":
                continue
        waiting.append(item)
        size += len(item.utf8)
        if size >= BATCH_TEXT_BYTES:
            yield _encode(context, waiting, tally)
            waiting, size = [], 0
    if waiting:
        yield _encode(context, waiting, tally)


def _encode(context: _Context, documents: Sequence[Document], tally: _Tally) -> EncodedBatch:
    hashes = np.array([document_hash(document.utf8) for document in documents], dtype=np.uint64)
    if context.chat is not None:
        return _encode_chats(context.plan, context.chat, documents, hashes, tally)
    ids, offsets = context.encode([document.text for document in documents], hashes)
    lengths = np.diff(offsets)
    for index in np.flatnonzero(lengths == 0).tolist():
        tally.reject(documents[index].row, "no tokens")
    kept = np.flatnonzero(lengths > 0)
    facts = context.plan.tokenizer
    _require_known_ids(ids, facts.vocab_size)
    bos = facts.bos_id if facts.bos_inserted else None
    tokens, whole_lengths = frame_documents(ids, lengths[kept], bos, facts.eos_id)
    chosen = [documents[index] for index in kept.tolist()]
    return EncodedBatch(
        tokens=tokens.astype(facts.token_dtype, copy=False),
        lengths=whole_lengths,
        text_bytes=np.array([len(document.utf8) for document in chosen], dtype=np.int64),
        hashes=hashes[kept],
        rows=np.array([document.row for document in chosen], dtype=np.int64),
        digests=text_digests([document.text for document in chosen]) if context.plan.options.dedup == "exact" else None,
    )


def _require_known_ids(ids: NDArray[np.uint32], vocab_size: int) -> None:
    if ids.size and int(ids.max()) >= vocab_size:
        raise DataError(f"the tokenizer gave id {int(ids.max())}, beyond its vocabulary of {vocab_size}")


def _encode_chats(
    plan: BuildPlan, encoder: ChatEncoder, documents: Sequence[Document], hashes: NDArray[np.uint64], tally: _Tally
) -> EncodedBatch:
    """As `_encode`; the text is the template's, with its own BOS and EOS, and its size that of what is scored."""
    chats = encoder.encode([document.text for document in documents], [document.scored for document in documents])
    for document, chat in zip(documents, chats, strict=True):
        if not chat.scored.any():
            tally.reject(document.row, NOTHING_SCORED)
        tally.cut += chat.lost > 0
        tally.cut_tokens += chat.lost
    kept = [index for index, chat in enumerate(chats) if chat.scored.any()]
    ids = np.concatenate([np.zeros(0, dtype=np.uint32), *(chats[index].ids for index in kept)])
    _require_known_ids(ids, plan.tokenizer.vocab_size)
    if plan.options.marks_scored:
        ids = with_marks(ids, np.concatenate([np.zeros(0, dtype=np.bool_), *(chats[i].scored for i in kept)]))
    return EncodedBatch(
        tokens=ids.astype(plan.part_dtype, copy=False),
        lengths=np.array([chats[index].ids.size for index in kept], dtype=np.int64),
        text_bytes=np.array([chats[index].scored_bytes for index in kept], dtype=np.int64),
        hashes=hashes[kept],
        rows=np.array([documents[index].row for index in kept], dtype=np.int64),
        digests=text_digests([documents[index].text for index in kept]) if plan.options.dedup == "exact" else None,
    )


def frame_documents(
    ids: NDArray[np.uint32], lengths: IntArray, bos: int | None, eos: int
) -> tuple[NDArray[np.uint32], IntArray]:
    """Put BOS before each document, where there is one, and EOS after it.

    Args:
        ids: of all documents, one after another; lengths: (documents,).

    Returns:
        The new ids, and (documents,) the new lengths.
    """
    before = 0 if bos is None else 1
    framed = lengths + before + 1
    ends = np.cumsum(framed)
    tokens = np.empty(int(framed.sum()), dtype=np.uint32)
    of_text = np.ones(tokens.size, dtype=np.bool_)
    tokens[ends - 1], of_text[ends - 1] = eos, False
    if bos is not None:
        tokens[ends - framed], of_text[ends - framed] = bos, False
    tokens[of_text] = ids
    return tokens, framed


def _parts(batches: Iterator[EncodedBatch]) -> Iterator[list[EncodedBatch]]:
    """Batches grouped to about 64 MiB of text, or ids, so that memory does not grow with the input file."""
    group: list[EncodedBatch] = []
    size = 0
    for batch in batches:
        group.append(batch)
        size += max(int(batch.text_bytes.sum()), batch.tokens.nbytes)
        if size >= PART_TEXT_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_part(path: Path, number: int, plan: BuildPlan, unit: int, batches: Sequence[EncodedBatch]) -> None:
    """Write documents sorted by shard."""
    columns = {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in _RECORD_COLUMNS.values()}
    records = np.empty(columns["lengths"].size, dtype=RECORD)
    for field_name, name in _RECORD_COLUMNS.items():
        records[field_name] = columns[name]
    buckets = _buckets(plan, unit, columns["hashes"], columns["rows"])
    pieces = [piece for batch in batches for piece in split(batch.tokens, batch.lengths)]
    write_part(path, buckets, sum(plan.shards.values()), records, pieces, plan.part_dtype)
    digests = [batch.digests for batch in batches if batch.digests is not None]
    if digests:
        write_digests(path.with_name(digests_name(number)), plan, np.concatenate(digests), columns["rows"], buckets)


def _buckets(plan: BuildPlan, unit: int, hashes: NDArray[np.uint64], rows: IntArray) -> IntArray:
    """The shard of each document, held-out shards counted after those for training."""
    place = mix(mix(rows.astype(np.uint64)) + np.uint64(unit))
    train = (place % np.uint64(max(1, plan.shards["train"]))).astype(np.int64)
    heldout = (place % np.uint64(max(1, plan.shards["heldout"]))).astype(np.int64) + plan.shards["train"]
    return np.where(is_heldout(hashes, plan.options.heldout), heldout, train)
