"""What a run with adapters trained, as an export sees it: the linears' own weights with the adapters merged into them.

One weight at a time is held whole, in float32, with what is added to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from llamapro.checkpoint.tensors import CHUNK_ELEMENTS, CheckpointTensors, Float32Array
from llamapro.errors import CheckFailed
from llamapro.evaluation.model_digest import model_digest
from llamapro.expansion.families import family_named, parse_block_index
from llamapro.expansion.record import ExpansionRecord
from llamapro.export.carry import trained_record
from llamapro.export.source import TrainedSource
from llamapro.export.tensors import MASTER_DTYPE, TrainedTensors, base_chunks, untouched_digests
from llamapro.files.tensors import TensorFolder, cast_chunks
from llamapro.modeling.lora import AdapterTensors, adapter_tensors, merged_weight, require_peft
from llamapro.modeling.trainable import Adapters
from llamapro.training.resume import RunIdentity
from llamapro.training.trainer_state import saved_state


def trained_tensors(source: TrainedSource, model: TensorFolder) -> TrainedTensors:
    """The tensors that a run trained, by their names in the model folder.

    Raises:
        CheckFailed: a model without a record is not the one that the adapters were trained beside.
        UserError: peft, which merges adapters, is missing.
    """
    tensors = CheckpointTensors(source.checkpoint)
    if not adapter_tensors(tensors.names()):
        return tensors
    require_peft()
    identity = _identity(source)
    _require_same_base(source, identity)
    return MergedTensors(tensors, _adapters(identity), model, untouched_digests(source.record))


def record_after(record: ExpansionRecord | None, trained: TrainedTensors) -> ExpansionRecord | None:
    """The record with what the run trained: beside adapters a block's other tensors stay the base's.

    A new block is exempt from its rule as soon as anything in it was trained, so that is listed as a whole.
    """
    if record is None:
        return None
    names = trained.names()
    if not isinstance(trained, MergedTensors):
        return trained_record(record, names)
    family, new = family_named(record.family), set(record.new_blocks)
    inside = [name for name in names if parse_block_index(family, name) in new]
    beside = set(names).difference(inside).union(record.trained.tensors)
    updated = trained_record(record, inside)
    listed = updated.trained.model_copy(update={"tensors": tuple(sorted(beside))})
    return updated.model_copy(update={"trained": listed})


@dataclass(frozen=True)
class MergedTensors:
    """Float32 weights with adapters merged into them, read like a checkpoint's own tensors.

    Attributes:
        untouched: SHA-256 of the weights in the model folder that must still be the base's.
    """

    checkpoint: CheckpointTensors
    adapters: Adapters
    model: TensorFolder
    untouched: dict[str, str]

    def names(self) -> tuple[str, ...]:
        """The weights that have adapters."""
        return tuple(self._beside())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that a weight must have."""
        a, b = self._beside()[name]
        inside, outside = self.checkpoint.shape(a)[1], self.checkpoint.shape(b)[0]
        return (inside, outside) if self.adapters.transposed else (outside, inside)

    def read_master(self, name: str, chunk_elements: int = CHUNK_ELEMENTS) -> Iterator[Float32Array]:
        """A weight with its adapter, flattened, in consecutive chunks of at most `chunk_elements`."""
        entry = self.model.entries[name]
        stored = base_chunks(self.model, name, self.untouched.get(name))
        data = bytearray().join(cast_chunks(stored, entry.dtype, MASTER_DTYPE))
        weight = torch.frombuffer(data, dtype=torch.float32).view(entry.shape)
        a, b = (self._whole(matrix) for matrix in self._beside()[name])
        merged = merged_weight(weight, a, b, self.adapters).flatten()
        yield from (chunk.numpy() for chunk in torch.split(merged, chunk_elements))

    def _beside(self) -> dict[str, AdapterTensors]:
        return adapter_tensors(self.checkpoint.names())

    def _whole(self, matrix: str) -> torch.Tensor:
        shape = self.checkpoint.shape(matrix)
        return torch.from_numpy(np.concatenate(list(self.checkpoint.read_master(matrix)))).view(shape)


def _identity(source: TrainedSource) -> RunIdentity:
    state = saved_state(source.checkpoint)
    assert state is not None, "there is a checkpoint"
    return state.identity


def _adapters(identity: RunIdentity) -> Adapters:
    assert identity.adapters is not None, "adapters were saved, and the run had none"
    return Adapters(**identity.adapters.model_dump())


def _require_same_base(source: TrainedSource, identity: RunIdentity) -> None:
    """Without a record nothing else says that these are the weights that the adapters go with."""
    if source.record is None and model_digest(source.model) != identity.model:
        raise CheckFailed(
            f"{source.checkpoint.folder} holds adapters for another model than {source.model}, or for what it was "
            "before it changed; pass the folder that was trained as --model"
        )
