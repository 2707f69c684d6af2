"""The expansion record as the weights in memory must match it.

Usually the record itself: weights are held in the folder's dtype, or in a wider one that represents them exactly. Only
under `model.allow_cast` are they rounded on loading; then the frozen weights must stay what rounding the folder's own
bytes gives, which is computed here from those bytes.
"""

from pathlib import Path

from llamapro.expansion.record import ExpansionRecord, TensorDigest
from llamapro.files.tensors import DTYPE_BYTES, RunningDigest, TensorFolder, cast_chunks
from llamapro.ranks import Ranks
from llamapro.training.model_facts import EXACT_DTYPES

HELD_DTYPE = {"bf16": "BF16", "float32": "F32"}


def record_in_memory(record: ExpansionRecord, folder: Path, precision: str, ranks: Ranks) -> ExpansionRecord:
    """The record whose folds the live base tensors must have; collective.

    Args:
        folder: the model folder that the record describes.
        precision: `engine.precision`.
    """
    held = HELD_DTYPE[precision]
    rounded = [name for name, digest in record.base_tensors.items() if digest.dtype not in EXACT_DTYPES[precision]]
    stored = TensorFolder.open(folder)
    mine = {name: _digest_when_cast(stored, name, held) for name in rounded[ranks.rank :: ranks.world_size]}
    tensors = dict(record.base_tensors)
    for part in ranks.all_gather_json(mine):
        for name, (sha256, fold) in part.items():
            changes = {"dtype": held, "sha256": sha256, "fold": fold}
            tensors[name] = TensorDigest.model_validate({**tensors[name].model_dump(), **changes})
    return record.model_copy(update={"base_tensors": tensors})


def _digest_when_cast(tensors: TensorFolder, name: str, held: str) -> tuple[str, str]:
    digest = RunningDigest(DTYPE_BYTES[held])
    for chunk in cast_chunks(tensors.chunks(name), tensors.entries[name].dtype, held):
        digest.update(chunk)
    return digest.sha256, digest.fold
