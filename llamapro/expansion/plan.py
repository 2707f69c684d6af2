"""What an expansion will write: for every tensor of the base, its new name, its copies and its zeroed copies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from llamapro.errors import Corrupted, ModelRefused
from llamapro.expansion.families import Family, block_tensor_name, is_zeroed, parse_block_index, split_block_name
from llamapro.expansion.layout import Layout
from llamapro.files.tensors import DTYPE_BYTES, FLOAT_DTYPES, PlannedTensor, TensorEntry, TensorFolder

WRITTEN_DTYPES = {"keep": None, "bf16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the base and all that is written from it.

    Attributes:
        source: where its bytes are.
        dtype: the one written.
        name: in the expanded model.
        copies: tensors of new blocks that get the same bytes.
        zeros: tensors of new blocks that are zero by the family's rule.
    """

    source: TensorEntry
    dtype: str
    name: str
    copies: tuple[str, ...]
    zeros: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as written, once."""
        return prod(self.source.shape) * DTYPE_BYTES[self.dtype]

    @property
    def outputs(self) -> list[PlannedTensor]:
        """Everything that is written."""
        return [PlannedTensor(name, self.dtype, self.source.shape) for name in (self.name, *self.copies, *self.zeros)]


def count_blocks(family: Family, tensors: TensorFolder, config: Mapping[str, Any]) -> int:
    """The number of blocks, on which config.json and the tensors must agree.

    Raises:
        ModelRefused: a block lacks a tensor that the zero rule needs, or the weights are quantized.
        Corrupted: config and tensors disagree.
    """
    blocks = config.get("num_hidden_layers")
    if type(blocks) is not int or blocks < 1:
        raise Corrupted(
            f"{tensors.folder}: config.json says num_hidden_layers: {blocks!r}, which is no number of blocks"
        )
    found = {index for name in tensors.entries if (index := parse_block_index(family, name)) is not None}
    if different := sorted(found ^ set(range(blocks))):
        fault = "which config.json does not count" if different[0] in found else "of which there are no tensors"
        raise Corrupted(
            f"{tensors.folder}: config.json says {blocks} blocks, but there is block {different[0]}, {fault}"
        )
    for name, entry in tensors.entries.items():
        if entry.dtype not in FLOAT_DTYPES:
            raise ModelRefused(f"{tensors.folder}: tensor {name} is {entry.dtype}: start from the unquantized model")
    names = (block_tensor_name(family, index, rest) for index in range(blocks) for rest in family.zeroed)
    if missing := next((name for name in names if name not in tensors.entries), None):
        raise ModelRefused(
            f"{tensors.folder} has no tensor {missing}; without it a copied block can't be made inactive"
        )
    return blocks


def plan_tensors(family: Family, tensors: TensorFolder, layout: Layout, dtype: str) -> list[TensorPlan]:
    """Everything to write, the tensors outside blocks first, then block by block.

    Args:
        dtype: a key of `WRITTEN_DTYPES`.
    """
    target = WRITTEN_DTYPES[dtype]
    plans = [_plan(family, entry, layout, target or entry.dtype) for entry in tensors.entries.values()]
    return sorted(plans, key=lambda plan: _position(family, plan.source.name))


def output_tensors(family: Family, plans: Sequence[TensorPlan]) -> list[PlannedTensor]:
    """Everything to write in the order in which it fills shards: outside blocks first, then block by block."""
    return sorted(
        (tensor for plan in plans for tensor in plan.outputs), key=lambda tensor: _position(family, tensor.name)
    )


def _plan(family: Family, entry: TensorEntry, layout: Layout, dtype: str) -> TensorPlan:
    parsed = split_block_name(family, entry.name)
    if parsed is None:
        return TensorPlan(entry, dtype, entry.name, (), ())
    block, rest = parsed
    names = tuple(block_tensor_name(family, copy, rest) for copy in layout.copies_of(block))
    zeroed = is_zeroed(family, rest)
    new_name = block_tensor_name(family, layout.block_map[block], rest)
    return TensorPlan(entry, dtype, new_name, () if zeroed else names, names if zeroed else ())


def _position(family: Family, name: str) -> int:
    block = parse_block_index(family, name)
    return -1 if block is None else block
