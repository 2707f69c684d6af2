"""The expansion record as the weights in memory must match it; of a model that was never expanded, its own folder's.

Usually the record itself: weights are held in the folder's dtype, or in a wider one that represents them exactly. Only
under `model.allow_cast` are they rounded on loading; then the frozen weights must stay what rounding the folder's own
bytes gives, which is computed here from those bytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import llamapro
from llamapro.expansion.families import Family
from llamapro.expansion.record import ExpansionRecord, TensorDigest
from llamapro.files.tensors import DTYPE_BYTES, FLOAT_DTYPES, RunningDigest, TensorFolder, cast_chunks
from llamapro.ranks import Ranks

NAMES = {getattr(torch, torch_name): name for name, torch_name in FLOAT_DTYPES.items()}


def record_in_memory(
    record: ExpansionRecord, folder: Path, held: Mapping[str, torch.dtype], ranks: Ranks
) -> ExpansionRecord:
    """The record whose folds the live base tensors must have; collective.

    Args:
        folder: the model folder that the record describes.
        held: the dtype in memory of each stored tensor.
    """
    digests = record.base_tensors
    rounded = {name: NAMES[held[name]] for name in digests.keys() & held.keys() if _rounds(digests[name], held[name])}
    stored = TensorFolder.open(folder)
    own = sorted(rounded)[ranks.rank :: ranks.world_size]
    mine = {name: _digest_when_cast(stored, name, rounded[name]) for name in own}
    tensors = dict(digests)
    for part in ranks.all_gather_json(mine):
        for name, (sha256, fold) in part.items():
            changes = {"dtype": rounded[name], "sha256": sha256, "fold": fold}
            tensors[name] = TensorDigest.model_validate({**tensors[name].model_dump(), **changes})
    return record.model_copy(update={"base_tensors": tensors})


def record_of_plain(
    folder: Path, config: Mapping[str, Any], family: Family, blocks: int, held: Mapping[str, torch.dtype], ranks: Ranks
) -> ExpansionRecord:
    """What the record of a model that was never expanded would say: its tensors are those in its folder; collective.

    Args:
        held: the dtype in memory of each stored tensor, and of others (adapters).
    """
    stored = TensorFolder.open(folder)
    own = sorted(stored.entries.keys() & held.keys())[ranks.rank :: ranks.world_size]
    mine = {name: _digest_when_cast(stored, name, stored.entries[name].dtype) for name in own}
    tensors = {}
    for part in ranks.all_gather_json(mine):
        for name, (sha256, fold) in part.items():
            dtype, shape = stored.entries[name].dtype, stored.entries[name].shape
            tensors[name] = TensorDigest(
                base_name=name,
                source_dtype=dtype,
                dtype=dtype,
                shape=shape,
                source_sha256=sha256,
                sha256=sha256,
                fold=fold,
            )
    return ExpansionRecord(
        tool_version=llamapro.__version__,
        base_id=folder.name,
        family=family.name,
        model_type=config["model_type"],
        base_blocks=blocks,
        blocks=blocks,
        block_map=tuple(range(blocks)),
        new_blocks=(),
        source_blocks=(),
        zeroed=(),
        base_tensors=tensors,
    )


def _rounds(digest: TensorDigest, held: torch.dtype) -> bool:
    """Whether a dtype does not represent the stored one exactly."""
    return torch.promote_types(getattr(torch, FLOAT_DTYPES[digest.dtype]), held) != held


def _digest_when_cast(tensors: TensorFolder, name: str, held: str) -> tuple[str, str]:
    digest = RunningDigest(DTYPE_BYTES[held])
    for chunk in cast_chunks(tensors.chunks(name), tensors.entries[name].dtype, held):
        digest.update(chunk)
    return digest.sha256, digest.fold
