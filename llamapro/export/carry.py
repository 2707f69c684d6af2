"""The expansion record and config.json of what is exported: the model folder's own, brought up to date."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from llamapro.expansion.families import family_named, parse_block_index
from llamapro.expansion.lineage import is_trained, untrained_base_tensors
from llamapro.expansion.record import CONFIG_KEY, ExpansionRecord, TensorDigest, compact
from llamapro.expansion.strength import Strengths

DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor as written: safetensors dtype, SHA-256 (64 hexadecimal digits) and fold (16)."""

    dtype: str
    sha256: str
    fold: str


def trained_record(record: ExpansionRecord, trained_names: Collection[str]) -> ExpansionRecord:
    """The record with these tensors added to what was trained before."""
    family = family_named(record.family)
    owners = {name: parse_block_index(family, name) for name in trained_names}
    blocks = {block for block in owners.values() if block is not None}
    others = {name for name, block in owners.items() if block is None}
    # What training goes on with is whole again, whatever share of something earlier it began with.
    strengths = {block: share for block, share in record.trained.strengths.items() if int(block) not in blocks}
    trained = record.trained.model_copy(
        update={
            "blocks": tuple(sorted(blocks.union(record.trained.blocks))),
            "tensors": tuple(sorted(others.union(record.trained.tensors))),
            "strengths": strengths,
        }
    )
    return record.model_copy(update={"trained": trained})


def carried_record(
    record: ExpansionRecord,
    scaled_names: Collection[str],
    written: Mapping[str, WrittenTensor],
    strengths: Strengths,
) -> ExpansionRecord:
    """The record of an export.

    Args:
        record: of the model folder, with what the run trained (`trained_record`).
        scaled_names: the tensors that are not written as training left them; they count as trained too.
        written: every tensor as written. Its digests replace the old ones of base tensors, which differ where a dtype
            was converted, and are noted for trained ones. The entries of trained base tensors stay those of the base:
            that is what they left.
        strengths: of the blocks of `scaled_names`.
    """
    family = family_named(record.family)
    updated = trained_record(record, scaled_names)
    digests = {name: tensor.sha256 for name, tensor in written.items() if is_trained(family, updated.trained, name)}
    before = record.trained.strengths
    shares = {str(block): strength * before.get(str(block), 1.0) for block, strength in sorted(strengths.items())}
    trained = updated.trained.model_copy(update={"digests": digests, "strengths": before | shares})
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
