"""The expansion record: everything that is known about how a model was expanded, kept beside its weights.

`expansion.json` holds the whole; config.json holds a compact copy under the key `llamapro`. Everything downstream reads
it; nothing recomputes a layout. `read_record` proves that the two agree.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from llamapro.errors import Corrupted
from llamapro.files.atomic import write_atomic

RECORD_NAME = "expansion.json"
CONFIG_NAME = "config.json"
CONFIG_KEY = "llamapro"
FORMAT_VERSION = 1
# What says nothing about the tensors an expansion produced.
_OUTSIDE_DIGEST: Mapping[str, Any] = {
    "trained": True,
    "tool_version": True,
    "request": True,
    "lineage": {"__all__": {"request": True, "trained": {"strengths": True}}},
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorDigest(_Frozen):
    """One base tensor: what it was and what was written.

    Attributes:
        base_name: its name in the base.
        source_dtype: safetensors dtype in the base; `dtype` is the one written.
        source_sha256: of the base's bytes; `sha256` is of the bytes as written (they differ if a dtype was converted).
        fold: 16 hexadecimal digits, of the elements as written (`files.digests.fold`).
    """

    base_name: str
    source_dtype: str
    dtype: str
    shape: tuple[int, ...]
    source_sha256: str
    sha256: str
    fold: str


class Trained(_Frozen):
    """What was ever trained: block indices and names of other tensors, both in the model that the record is of.

    Attributes:
        digests: SHA-256 of trained tensors as `export` wrote them, by name: what an export proves about its own part.
        strengths: by block, the share of what training made of it that `export` wrote, where that is not all of it.
    """

    blocks: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()
    digests: dict[str, str] = {}
    strengths: dict[str, float] = {}


class ImportanceSummary(_Frozen):
    """What a placement by importance was chosen by; the whole report is `importance.json` beside the record.

    Attributes:
        probe: how the text was named; `probe_sha256`: of its token ids, as written in `ImportanceReport`.
        tokens: target tokens that the losses are means of.
        loss_increase: nats per token, by base block: how much the loss rises when that block is bypassed.
        report_sha256: of importance.json.
    """

    probe: str
    probe_sha256: str
    tokens: int
    loss_increase: tuple[float, ...]
    report_sha256: str


class Request(_Frozen):
    """What an expansion was asked for: with its base, enough to do it again.

    Attributes:
        placement: as on the command line: a name, or base indices separated by commas.
        dtype: "keep", "bf16" or "float32".
        importance: where `placement` is "importance".
    """

    placement: str
    new_blocks: int
    copies_per_group: int
    dtype: str
    importance: ImportanceSummary | None = None


class LineageEntry(_Frozen):
    """An earlier expansion of the same model, oldest first in a record.

    Attributes:
        base_id: of that expansion's base; `base_blocks` and `blocks` are its block counts before and after.
        record_digest: `ExpansionRecord.digest()` of its record.
        new_blocks: where its new blocks are in *this* model.
        trained: what was trained before this expansion, as indices and names in *this* model.
        request: what it was asked for; None in records that don't say.
    """

    base_id: str
    tool_version: str
    base_blocks: int
    blocks: int
    record_digest: str
    new_blocks: tuple[int, ...]
    trained: Trained
    request: Request | None = None


class ExpansionRecord(_Frozen):
    """How a model was expanded.

    Attributes:
        base_id: hub id or folder name of the base; never a local absolute path.
        base_blocks: blocks of the base; `blocks`: of this model.
        block_map: index in this model of each base block.
        new_blocks: indices of the new blocks; `source_blocks`: the base index that each of them copies.
        zeroed: names, in this model, of the tensors of new blocks that were set to zero.
        base_tensors: every tensor outside the new blocks (embedding, norm and head too) by its name in this model.
        trained: what was trained since the expansion.
        lineage: earlier expansions, oldest first.
        request: what the expansion was asked for; None in records that don't say.
    """

    format_version: int = FORMAT_VERSION
    tool_version: str
    base_id: str
    family: str
    model_type: str
    base_blocks: int
    blocks: int
    block_map: tuple[int, ...]
    new_blocks: tuple[int, ...]
    source_blocks: tuple[int, ...]
    zeroed: tuple[str, ...]
    base_tensors: dict[str, TensorDigest]
    trained: Trained = Trained()
    lineage: tuple[LineageEntry, ...] = ()
    request: Request | None = None

    @model_validator(mode="after")
    def _blocks_add_up(self) -> Self:
        if sorted((*self.block_map, *self.new_blocks)) != list(range(self.blocks)):
            raise ValueError("block_map and new_blocks together must name each block once")
        if len(self.block_map) != self.base_blocks or len(self.source_blocks) != len(self.new_blocks):
            raise ValueError("block_map needs one entry per base block, source_blocks one per new block")
        if not all(0 <= source < self.base_blocks for source in self.source_blocks):
            raise ValueError("source_blocks must be indices of base blocks")
        return self

    def digest(self) -> str:
        """SHA-256 of the canonical JSON of all that fixes the tensors: the "base digest" that checkpoints carry.

        Training does not change it, nor does the version of the program that expanded, nor in which words the same
        placement was asked for.
        """
        content = self.model_dump(exclude=_OUTSIDE_DIGEST)
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()

    def source_of(self, block: int) -> int:
        """The index in this model of the block that new block `block` copies."""
        return self.block_map[self.source_blocks[self.new_blocks.index(block)]]

    def untrained_blocks(self) -> tuple[int, ...]:
        """The new blocks that were never trained: they must still be the identity."""
        return tuple(block for block in self.new_blocks if block not in self.trained.blocks)


def compact(record: ExpansionRecord) -> dict[str, Any]:
    """The copy for config.json["llamapro"], JSON values only."""
    return {
        "format_version": record.format_version,
        "base_id": record.base_id,
        "base_blocks": record.base_blocks,
        "new_blocks": list(record.new_blocks),
        "source_blocks": list(record.source_blocks),
        "trained": {"blocks": list(record.trained.blocks), "tensors": list(record.trained.tensors)},
        "record_digest": record.digest(),
    }


def write_record(folder: Path, record: ExpansionRecord) -> None:
    """Write the whole record into a model folder (the compact copy is the config writer's)."""
    write_atomic(folder / RECORD_NAME, orjson.dumps(record.model_dump(), option=orjson.OPT_INDENT_2) + b"\n")


def read_record(folder: Path) -> ExpansionRecord | None:
    """The record of a model folder; None for a model that was never expanded.

    Raises:
        Corrupted: the record can't be read, is newer than this program, is missing although config.json says that
            the model was expanded, or disagrees with the compact copy there.
    """
    copy = _compact_copy(folder / CONFIG_NAME)
    path = folder / RECORD_NAME
    if not path.exists():
        if copy is None:
            return None
        raise Corrupted(
            f"{folder / CONFIG_NAME} says the model was expanded, but {RECORD_NAME} is missing; copy it from the "
            f"original folder, or remove the key {CONFIG_KEY!r} to treat this as a plain model"
        )
    record = _parse(path)
    if copy is None:
        raise Corrupted(
            f"{path} exists, but {CONFIG_NAME} beside it has no key {CONFIG_KEY!r}: they don't belong together"
        )
    if copy != compact(record):
        wrong = [key for key, value in compact(record).items() if copy.get(key) != value] or sorted(copy)
        raise Corrupted(f"{path} disagrees with the copy in {CONFIG_NAME} about {', '.join(wrong)}")
    return record


def _parse(path: Path) -> ExpansionRecord:
    try:
        raw = orjson.loads(path.read_bytes())
        if isinstance(raw, dict) and raw.get("format_version", 0) > FORMAT_VERSION:
            raise Corrupted(
                f"{path} has format version {raw['format_version']}; this program reads up to {FORMAT_VERSION}"
            )
        return ExpansionRecord.model_validate(raw)
    except (OSError, ValueError, TypeError, ValidationError) as error:
        raise Corrupted(f"{path} can't be read: {error}") from error


def _compact_copy(path: Path) -> Any:
    try:
        config = orjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Corrupted(f"{path} can't be read: {error}") from error
    copy = config.get(CONFIG_KEY) if isinstance(config, dict) else None
    if copy is not None and not isinstance(copy, dict):
        raise Corrupted(f"{path}: what stands under {CONFIG_KEY!r} is no copy of a record")
    return copy
