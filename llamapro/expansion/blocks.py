"""What each block of a model is: original or added, copied from where, zeroed, trained, of which kind; and all around.

Read from headers, config.json and the record; no tensor is read.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from llamapro.expansion.depth import spelled_out
from llamapro.expansion.families import Family, canonical_names, family_of, parse_block_index, split_block_name
from llamapro.expansion.kinds import is_per_block
from llamapro.expansion.lineage import added_blocks, generations
from llamapro.expansion.plan import count_blocks
from llamapro.expansion.record import ExpansionRecord, Trained, read_record
from llamapro.expansion.source import read_config, refuse_other_weights
from llamapro.files.tensors import TensorFolder

EXPERTS = re.compile(r"(^|\.)experts\.")


@dataclass(frozen=True)
class BlockRow:
    """One block.

    Attributes:
        expansion: the number of the expansion that added it, the oldest being 1; None for an original block.
        base_index: an original block's index in the first base.
        copy_of: the index, in this model, of the block that a block of the last expansion copies.
        kind: what its config entries and its tensors say where blocks differ: "sliding", "sparse"; else empty.
        zeroed: its tensors that the last expansion set to zero, without prefix and index.
        trained: whether it was ever trained, before the last expansion or since.
    """

    index: int
    expansion: int | None
    base_index: int | None
    copy_of: int | None
    kind: str
    zeroed: tuple[str, ...]
    trained: bool
    parameters: int


@dataclass(frozen=True)
class OtherRow:
    """A module outside the blocks: embedding, final norm, head.

    Attributes:
        below: whether it stands below the blocks.
        parameters: none of its own if it is tied to the embedding.
    """

    name: str
    below: bool
    trained: bool
    parameters: int


@dataclass(frozen=True)
class ModelBlocks:
    """A model's blocks and what lies around them, and its record (None for a plain model)."""

    family: str
    model_type: str
    record: ExpansionRecord | None
    blocks: tuple[BlockRow, ...]
    others: tuple[OtherRow, ...]

    @property
    def parameters(self) -> int:
        """Of the whole model; a tied head counts once."""
        return sum(row.parameters for row in self.blocks) + sum(row.parameters for row in self.others)

    @property
    def trainable(self) -> dict[str, tuple[int, ...]]:
        """The blocks that each setting of `model.trainable` stands for, where it depends on the record."""
        if self.record is None:
            return {}
        numbered = enumerate(generations(self.record), start=1)
        found = {"new": added_blocks(self.record), "last-added": self.record.new_blocks}
        return found | {f"expansion-{number}": blocks for number, blocks in numbered}


def describe_blocks(folder: Path) -> ModelBlocks:
    """Read what is known about each block of a model folder. No tensor is read, only headers.

    Raises:
        ModelRefused, Corrupted: the folder can't be read as a model of a supported family.
    """
    config = read_config(folder)
    family = family_of(config)
    refuse_other_weights(folder)
    tensors = TensorFolder.open(folder)
    count = count_blocks(family, tensors, config)
    record = read_record(folder)
    rests: dict[int, list[str]] = defaultdict(list)
    parameters, around = Counter[int](), Counter[str]()
    for stored, name in canonical_names(family, tensors.entries).items():
        size = prod(tensors.entries[stored].shape)
        if parsed := split_block_name(family, name):
            rests[parsed[0]].append(parsed[1])
            parameters[parsed[0]] += size
        else:
            around[module_of(name)] += size
    kinds = _kinds(spelled_out(config, family.depth_rules), [rests[block] for block in range(count)])
    rows = tuple(_row(family, record, block, kinds[block], parameters[block]) for block in range(count))
    return ModelBlocks(family.name, config["model_type"], record, rows, _others(record, around))


def module_of(tensor_name: str) -> str:
    """The module that a tensor belongs to: "self_attn.o_proj.bias" → "self_attn.o_proj"."""
    return re.sub(r"[._](weight|bias)$", "", tensor_name)


def _row(family: Family, record: ExpansionRecord | None, block: int, kind: str, parameters: int) -> BlockRow:
    if record is None:
        return BlockRow(block, None, block, None, kind, (), False, parameters)
    numbered = enumerate(generations(record), start=1)
    expansion = next((number for number, blocks in numbered if block in blocks), None)
    originals = [index for index in range(record.blocks) if index not in added_blocks(record)]
    parsed = filter(None, (split_block_name(family, name) for name in record.zeroed))
    return BlockRow(
        block,
        expansion,
        originals.index(block) if expansion is None else None,
        record.source_of(block) if block in record.new_blocks else None,
        kind,
        tuple(rest for index, rest in parsed if index == block),
        any(_trained_in(family, history, block) for history in _histories(record)),
        parameters,
    )


def _histories(record: ExpansionRecord | None) -> list[Trained]:
    """What was trained before each expansion, and since the last."""
    return [] if record is None else [*(entry.trained for entry in record.lineage), record.trained]


def _trained_in(family: Family, history: Trained, block: int) -> bool:
    """Whether a block was trained, or something in it."""
    return block in history.blocks or any(parse_block_index(family, name) == block for name in history.tensors)


def _others(record: ExpansionRecord | None, sizes: Mapping[str, int]) -> tuple[OtherRow, ...]:
    trained = {module_of(name) for history in _histories(record) for name in history.tensors}
    rows = [OtherRow(name, _is_embedding(name), name in trained, size) for name, size in sizes.items()]
    if not any(map(_is_head, sizes)):
        rows.append(OtherRow("head (tied)", below=False, trained=False, parameters=0))
    return tuple(sorted(rows, key=lambda row: (not row.below, _is_head(row.name))))


def _is_head(module: str) -> bool:
    return "head" in module or "embed_out" in module


def _is_embedding(module: str) -> bool:
    name = module.rpartition(".")[2]
    return not _is_head(module) and ("embed" in name or name in {"wte", "wpe"})


def _kinds(config: Mapping[str, Any], rests: Sequence[Sequence[str]]) -> list[str]:
    """For each block what distinguishes it from others; nothing where all are alike."""
    blocks = len(rests)
    columns = [
        [_entry(field, value) for value in values]
        for field, values in config.items()
        if is_per_block(field, values, blocks) and not any(isinstance(value, list | dict) for value in values)
    ]
    columns.append(["sparse" if any(map(EXPERTS.search, names)) else "dense" for names in rests])
    telling = [column for column in columns if len(set(column)) > 1]
    return [", ".join(dict.fromkeys(column[block] for column in telling)) for block in range(blocks)]


def _entry(field: str, value: Any) -> str:
    return value.removesuffix("_attention") if isinstance(value, str) else f"{field}={value}"
