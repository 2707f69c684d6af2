"""What training changes, and what it must not, as named slices: the same at every ZeRO stage and world size.

DeepSpeed keeps float32 weights and optimizer state in flat partitions. Where a parameter lies in them is known from
`_hp_mapping` (stages 1 and 2) and from `grad_position` (stage 3, where the last parts are padded).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import nn

from llamapro.engine.adamw import MOMENTS, AdamW, full_shape
from llamapro.modeling.stored_parts import StoredParts
from llamapro.ranks import Ranks

MASTER = "master"

ReadSlice = Callable[[str, str, int, int], torch.Tensor]
"""read(name, key, start, count): a 1-D float32 tensor."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous slice of one trainable tensor with its optimizer state.

    Attributes:
        name: the tensor's: of a parameter in the Hugging Face model, or of a stored tensor.
        start: index of the slice's first element in the flattened tensor.
        shape: of the whole tensor.
        tensors: "master", "exp_avg" and "exp_avg_sq": 1-D float32 views of the live state, all of one length.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    tensors: Mapping[str, torch.Tensor]

    @property
    def count(self) -> int:
        """Number of elements in the slice."""
        return int(self.tensors[MASTER].numel())


@dataclass(frozen=True)
class Placement:
    """Where a slice of a parameter lies in a flat partition of this rank.

    Attributes:
        start: index of the slice's first element in the flattened parameter.
        count: number of elements, padding excluded.
        partition: the flat float32 partition.
        offset: index of the slice's first element in the partition.
    """

    start: int
    count: int
    partition: torch.Tensor
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The slice of a flat tensor that is laid out like the partition."""
        return flat.detach().narrow(0, self.offset, self.count)


class NamedState:
    """The trained state of this rank by parameter name."""

    def __init__(
        self, zero_optimizer: Any, optimizer: AdamW, trainable: Sequence[tuple[str, nn.Parameter]], zero_stage: int
    ) -> None:
        self._zero_optimizer = zero_optimizer
        self._optimizer = optimizer
        self._trainable = list(trainable)
        self._stage3 = zero_stage == 3
        optimizer.make_state(self._partitions())

    def fragments(self) -> Iterator[Fragment]:
        """This rank's slices; over all ranks every element of every trainable parameter occurs exactly once."""
        for name, parameter in self._trainable:
            place = self._place(parameter)
            if place is not None:
                state = self._optimizer.state[place.partition]
                flats = {MASTER: place.partition, **{key: state[key] for key in MOMENTS}}
                tensors = {key: place.of(flat) for key, flat in flats.items()}
                yield Fragment(name, place.start, full_shape(parameter), tensors)

    def load(self, read: ReadSlice, optimizer_steps: int) -> None:
        """Replace float32 weights, optimizer state and the low-precision copies; collective."""
        for fragment in self.fragments():
            for key, tensor in fragment.tensors.items():
                tensor.copy_(read(fragment.name, key, fragment.start, fragment.count))
        self._optimizer.steps = optimizer_steps
        self._refresh_low_precision()

    def _place(self, parameter: nn.Parameter) -> Placement | None:
        """Where this rank's slice of a parameter lies; None when it holds none of it."""
        return self._stage3_place(parameter) if self._stage3 else self._replicated_place(parameter)

    def _stage3_place(self, parameter: Any) -> Placement | None:
        zero = self._zero_optimizer
        group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        start = padded * parameter.ds_zero_partition_rank
        count = min(padded, parameter.ds_numel - start)
        return Placement(start, count, zero.fp32_partitioned_groups_flat[group], offset) if count > 0 else None

    def _replicated_place(self, parameter: Any) -> Placement | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Placement(low.start, low.numel, self._partitions()[mapping.param_group_index], high.start)

    def _partitions(self) -> list[torch.Tensor]:
        """The flat float32 partitions of this rank, under the name each of DeepSpeed's three optimizers has."""
        zero = self._zero_optimizer
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        partitions: list[torch.Tensor] = next(getattr(zero, name) for name in names if hasattr(zero, name))
        return partitions

    def _refresh_low_precision(self) -> None:
        zero = self._zero_optimizer
        if not self._stage3:
            zero.update_lp_params()
            return
        # Small parameters are whole on every rank once they were used, and those DeepSpeed would not gather again.
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def of_stored_tensors(fragment: Fragment, stored: StoredParts) -> Iterator[Fragment]:
    """A slice of a parameter as slices of the stored tensors that the parameter is made of."""
    for cut in stored.cuts(fragment.name, fragment.start, fragment.count):
        tensors = {key: values[cut.low : cut.high] for key, values in fragment.tensors.items()}
        yield Fragment(cut.part.name, cut.start, cut.part.shape, tensors)


def reader_of_parameters(read: ReadSlice, stored: StoredParts) -> ReadSlice:
    """Read slices of parameters where slices of stored tensors can be read."""

    def read_parameter(name: str, key: str, start: int, count: int) -> torch.Tensor:
        values = torch.empty(count)
        for cut in stored.cuts(name, start, count):
            values[cut.low : cut.high] = read(cut.part.name, key, cut.start, cut.high - cut.low)
        return values

    return read_parameter


def frozen_slices(frozen: Sequence[tuple[str, torch.Tensor]], ranks: Ranks) -> Iterator[tuple[str, int, torch.Tensor]]:
    """The live values of frozen parameters and buffers: (name, index of the first element, 1-D tensor).

    Over all ranks each element occurs exactly once: a part of its own where stage 3 cut the parameter, else an equal
    share of the copy that every rank holds.
    """
    for name, parameter in frozen:
        count = prod(full_shape(parameter))
        cut = parameter.numel() != count  # small ones are whole on every rank once they were used
        part = parameter.ds_tensor.numel() if cut else ceil(count / ranks.world_size)  # type: ignore[attr-defined]
        start = part * ranks.rank
        own = max(0, min(part, count - start))
        if own and cut:
            yield name, start, parameter.ds_tensor.detach().flatten()[:own]  # type: ignore[attr-defined]
        elif own:
            yield name, start, parameter.detach().flatten()[start : start + own]
