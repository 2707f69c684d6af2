"""Expanded models of any family whose new blocks hold random weights, as if they had been trained."""

from dataclasses import dataclass
from pathlib import Path

import torch

from llamapro.expansion.expand import expand
from llamapro.expansion.record import ExpansionRecord
from llamapro.files.tensors import TensorFolder
from tests.support.expansion import all_tensors
from tests.support.exports import block_of, write_checkpoint
from tests.support.families import TinyFamily


@dataclass(frozen=True)
class TrainedFamily:
    """A base, its expansion, and a checkpoint of "training" its new blocks."""

    base: Path
    model: Path
    checkpoint: Path
    record: ExpansionRecord


def trained_family(row: TinyFamily, root: Path, new_blocks: int = 2) -> TrainedFamily:
    """Every tensor of the new blocks moved by random amounts."""
    base = row.save(root / "base")
    record = expand(str(base), root / "model", new_blocks=new_blocks)
    tensors = all_tensors(root / "model")
    generator = torch.Generator().manual_seed(3)
    masters = {
        name: tensors[name].float() + 0.2 * torch.randn(tensors[name].shape, generator=generator)
        for name in TensorFolder.open(root / "model").entries
        if block_of(record, name) in record.new_blocks and tensors[name].is_floating_point()
    }
    checkpoint = write_checkpoint(root / "run", masters, record)
    return TrainedFamily(base, root / "model", checkpoint, record)
