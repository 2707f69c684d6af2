"""Everything about a dataset that can be checked without its inputs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llamapro.data.arrays import IntArray
from llamapro.data.container import CHECKS_SECTION
from llamapro.data.dataset import SHARDS_FOLDER, Dataset
from llamapro.data.manifest import read_files_manifest
from llamapro.data.shard import Shard
from llamapro.data.splits import is_heldout
from llamapro.errors import Corrupted
from llamapro.files.manifest import check_files


def verify_dataset(folder: Path, advance: Callable[[int], None] = lambda tokens: None) -> list[str]:
    """Read all of a dataset and compare it with its checksums and its own statements.

    Args:
        advance: told the tokens checked, after each shard.

    Returns:
        One sentence per problem, naming file, block and documents; empty when all is well.

    Raises:
        DataError: the folder holds no finished dataset.
        Corrupted: it can't even be opened.
    """
    dataset = Dataset.open(folder)
    problems = [problem for problem in check_files(folder, read_files_manifest(folder)) if _counts(folder, problem)]
    for split in dataset.manifest.splits:
        for shard in dataset.split(split).shards:
            found = list(_damage(shard))
            problems += found or list(_contradictions(shard, dataset.manifest.heldout_fraction))
            advance(shard.facts.tokens)
    return problems


def _counts(folder: Path, problem: str) -> bool:
    """Files beside shards and tokenizer (pack plans, the list of rejects, a reader's notes) are not the dataset's."""
    return "is not in the manifest" not in problem or problem.startswith(str(folder / SHARDS_FOLDER))


def _damage(shard: Shard) -> Iterator[str]:
    container = shard.container
    if container.digest_differs(CHECKS_SECTION):
        yield f"{shard.path}: its table of checksums is damaged"
        return
    for name in container.header.sections:
        blocks = container.damaged_blocks(name) if name != CHECKS_SECTION else []
        for block in blocks:
            start, stop = container.elements_of_block(name, block)
            yield f"{shard.path}: block {block} of {name!r} (elements {start:,} to {stop - 1:,}) is damaged" + (
                _documents(shard, block) if name == "tokens" else ""
            )
        if not blocks and container.digest_differs(name):
            yield f"{shard.path}: section {name!r} differs from its digest"


def _documents(shard: Shard, block: int) -> str:
    try:
        first, last = shard.documents_of_block(block)
    except Corrupted:
        return ""
    files, rows = shard.column("source_files"), shard.column("source_rows")
    first_place, last_place = (f"{index} (input {files[index]}, row {rows[index]})" for index in (first, last))
    return f": documents {first_place} to {last_place}"


def _contradictions(shard: Shard, heldout_fraction: float) -> Iterator[str]:
    facts, offsets = shard.facts, shard.offsets.astype(np.int64)
    tokens = shard.container.array("tokens")
    if offsets[0] != 0 or offsets[-1] != tokens.size or np.any(np.diff(offsets) <= 0):
        yield f"{shard.path}: its document offsets don't follow each other up to its {tokens.size:,} tokens"
        return
    if offsets.size - 1 != facts.documents or tokens.size != facts.tokens:
        yield f"{shard.path}: it holds {offsets.size - 1:,} documents of {tokens.size:,} tokens, its header says others"
    if tokens.size and int(tokens.max()) >= facts.vocab_size:
        yield f"{shard.path}: it holds id {int(tokens.max())}, beyond the vocabulary of {facts.vocab_size}"
    if facts.eos_inserted and np.any(tokens[offsets[1:] - 1] != facts.eos_id):
        yield f"{shard.path}: a document does not end with EOS ({facts.eos_id})"
    if shard.has_loss_spans and not _spans_fit(shard, np.diff(offsets)):
        yield f"{shard.path}: the spans of its documents that are scored don't follow each other within them"
    if np.any(is_heldout(shard.column("hashes"), heldout_fraction) != (facts.split == "heldout")):
        yield f"{shard.path}: it holds documents that by their hash belong to the other split"


def _spans_fit(shard: Shard, lengths: IntArray) -> bool:
    """Whether each document's spans are in order, apart from each other and within it."""
    firsts = shard.container.array("loss_offsets").astype(np.int64)
    spans = shard.container.array("loss_spans").astype(np.int64).reshape(-1, 2)
    if firsts.size != lengths.size + 1 or firsts[0] != 0 or firsts[-1] != len(spans) or np.any(np.diff(firsts) < 0):
        return False
    owners = np.repeat(np.arange(lengths.size), np.diff(firsts))
    same = owners[1:] == owners[:-1]
    return bool(
        np.all(spans[:, 0] < spans[:, 1])
        and np.all(spans[:, 0] >= 0)
        and np.all(spans[:, 1] <= lengths[owners])
        and np.all(spans[1:, 0][same] > spans[:-1, 1][same])
    )
