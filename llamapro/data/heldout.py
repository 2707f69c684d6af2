"""Held-out text for validation: the same rows in every run, on every machine."""

import numpy as np

from llamapro.data.batches import Batch, pad_rows
from llamapro.data.dataset import Dataset
from llamapro.data.packing import pack_in_memory
from llamapro.data.permutation import permutation_key, permute
from llamapro.data.rows import assemble_row
from llamapro.data.shard import SplitName
from llamapro.errors import DataError

ORDER_KEY = permutation_key("heldout rows")


def heldout_batches(
    dataset: Dataset, sequence_length: int, sequences: int, rows_per_batch: int, split: SplitName = "heldout"
) -> list[tuple[Batch, tuple[int, ...]]]:
    """The first `sequences` packed rows of the held-out split, or of another, in a fixed order.

    Documents are packed whole, those longer than a row cut; they neither attend to nor predict each other, so a
    document's loss is the same as if it stood alone.

    Args:
        sequences: rows at most; the split may have fewer.
        rows_per_batch: rows of every batch; the last one is filled with rows without loss.

    Returns:
        Batches, each with the UTF-8 bytes of text in each of its rows (0 for rows without loss).

    Raises:
        DataError: the split has no documents.
    """
    documents = dataset.split(split)
    if documents.documents == 0:
        raise DataError(f"{dataset.folder} has no {split} documents; build it with another --heldout")
    plan = pack_in_memory(documents, sequence_length, "bestfit")
    chosen = permute(np.arange(min(sequences, plan.rows)), plan.rows, ORDER_KEY).tolist()
    batches = []
    for low in range(0, len(chosen), rows_per_batch):
        pieces = [plan.pieces(row) for row in chosen[low : low + rows_per_batch]]
        rows = [assemble_row(part, sequence_length, dataset.manifest.pad_id) for part in pieces]
        batch = Batch.from_rows(rows, np.zeros(len(rows), dtype=np.int64), sequence_length)
        text_bytes = [row.text_bytes for row in rows] + [0] * (rows_per_batch - len(rows))
        batches.append((pad_rows(batch, rows_per_batch), tuple(text_bytes)))
    return batches
