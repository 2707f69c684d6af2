"""The expansion record and config.json of what is exported: the model folder's own, brought up to date."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from llamapro.expansion.families import family_named, parse_block_index
from llamapro.expansion.lineage import is_trained, untrained_base_tensors
from llamapro.expansion.record import CONFIG_KEY, ExpansionRecord, TensorDigest, Trained, compact

DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor as written: safetensors dtype, SHA-256 (64 hexadecimal digits) and fold (16)."""

    dtype: str
    sha256: str
    fold: str


def carried_record(
    record: ExpansionRecord, trained_names: Collection[str], written: Mapping[str, WrittenTensor]
) -> ExpansionRecord:
    """The record of an export.

    Args:
        trained_names: the tensors that the run trained; added to what was trained before.
        written: every tensor as written. Its digests replace the old ones of base tensors, which differ where a dtype
            was converted, and are noted for trained ones. The entries of trained base tensors stay those of the base:
            that is what they left.
    """
    family = family_named(record.family)
    owners = {name: parse_block_index(family, name) for name in trained_names}
    blocks = {block for block in owners.values() if block is not None}
    others = {name for name, block in owners.items() if block is None}
    trained = Trained(
        blocks=tuple(sorted(blocks.union(record.trained.blocks))),
        tensors=tuple(sorted(others.union(record.trained.tensors))),
    )
    updated = record.model_copy(update={"trained": trained})
    digests = {name: tensor.sha256 for name, tensor in written.items() if is_trained(family, trained, name)}
    trained = trained.model_copy(update={"digests": digests})
    base_tensors = dict(record.base_tensors)
    for name in untrained_base_tensors(updated):
        base_tensors[name] = _as_written(base_tensors[name], written[name])
    return updated.model_copy(update={"base_tensors": base_tensors, "trained": trained})


def carried_config(config: Mapping[str, Any], record: ExpansionRecord | None, dtype: str | None) -> str:
    """config.json of an export, as text.

    Args:
        config: of the model folder.
        dtype: safetensors dtype that the floats were converted to, or None where they were not.
    """
    content = dict(config) | {"use_cache": True}
    if dtype is not None:
        content["torch_dtype" if "torch_dtype" in config else "dtype"] = DTYPE_NAMES[dtype]
    if record is not None:
        content[CONFIG_KEY] = compact(record)
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _as_written(digest: TensorDigest, written: WrittenTensor) -> TensorDigest:
    return digest.model_copy(update={"dtype": written.dtype, "sha256": written.sha256, "fold": written.fold})
