"""A small engine-like state that is cut over ranks in two ways, and ranks that are threads."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamapro.checkpoint.save import save_checkpoint
from llamapro.checkpoint.state import Fragment, ReadSlice
from llamapro.expansion.record import ExpansionRecord, TensorDigest
from llamapro.files.digests import fold
from llamapro.ranks import Ranks

KEYS = ("master", "exp_avg", "exp_avg_sq")
SHAPES = {
    "model.layers.1.mlp.up_proj.weight": (5, 7),
    "model.layers.1.input_layernorm.weight": (3,),
    "model.layers.4.mlp.up_proj.weight": (11,),
    "model.layers.4.self_attn.q_proj.weight": (2, 3, 4),
}
Values = dict[str, dict[str, torch.Tensor]]


def random_values(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Values:
    """Whole flattened parameters: name to key to float32 values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {key: torch.randn(torch.Size(shape).numel(), generator=generator) for key in KEYS}
        for name, shape in shapes.items()
    }


@dataclass(frozen=True)
class Part:
    """A `llamapro.checkpoint.state.Fragment` of plain values."""

    name: str
    start: int
    shape: tuple[int, ...]
    tensors: Mapping[str, torch.Tensor]

    @property
    def count(self) -> int:
        return next(iter(self.tensors.values())).numel()


class SlicedState:
    """One rank's share of some parameters.

    Args:
        cut: "parameter" cuts each parameter into ceil(n / world) pieces (ZeRO 3), "flat" cuts their concatenation into
            equal parts (ZeRO 1 and 2), so that most ranks lack most names.
    """

    def __init__(
        self,
        values: Values | None,
        rank: int = 0,
        world_size: int = 1,
        cut: str = "parameter",
        shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    ) -> None:
        self._shapes = dict(shapes)
        self.optimizer_steps = 17
        self.slices: dict[str, tuple[int, dict[str, torch.Tensor]]] = {}
        for name, low, high in _shares(self._shapes, rank, world_size, cut):
            keyed = {key: values[name][key][low:high] if values else torch.zeros(high - low) for key in KEYS}
            self.slices[name] = (low, keyed)

    def fragments(self) -> Iterator[Fragment]:
        for name, (start, tensors) in self.slices.items():
            yield Part(name, start, self._shapes[name], tensors)

    def load(self, read: ReadSlice, optimizer_steps: int) -> None:
        self.optimizer_steps = optimizer_steps
        for name, (start, tensors) in self.slices.items():
            for key, tensor in tensors.items():
                tensor.copy_(read(name, key, start, tensor.numel()))


def gathered(states: Sequence[SlicedState]) -> Values:
    """Whole parameters put together from every rank's slices."""
    whole: Values = {}
    for name, shape in SHAPES.items():
        total = torch.Size(shape).numel()
        whole[name] = {key: torch.full((total,), float("nan")) for key in KEYS}
        for state in states:
            start, tensors = state.slices.get(name, (0, {}))
            for key, tensor in tensors.items():
                whole[name][key][start : start + tensor.numel()] = tensor
    return whole


def same_values(left: Values, right: Values) -> bool:
    """Bitwise equality."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name][key].view(torch.int32), right[name][key].view(torch.int32))
        for name in left
        for key in KEYS
    )


class ThreadRanks(Ranks):
    """Ranks whose collectives meet in one process: for logic; real process groups have their own tests."""

    meeting: "Meeting"

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        rows = self.all_gather_json(list(values))
        totals = [sum(column) & ((1 << 64) - 1) for column in zip(*rows, strict=True)]
        return [total - (1 << 64) if total >= 1 << 63 else total for total in totals]

    def all_gather_json(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, value)


class Meeting:
    """Where the threads of one job exchange values."""

    def __init__(self, world_size: int) -> None:
        self._values: list[Any] = [None] * world_size
        self._barrier = threading.Barrier(world_size, timeout=20)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        everything = list(self._values)
        self._barrier.wait()
        return everything


def on_threads(world_size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Run `work(ranks)` on that many threads; results (or the errors raised) in rank order."""
    meeting = Meeting(world_size)
    results: list[Any] = [None] * world_size

    def serve(rank: int) -> None:
        ranks = ThreadRanks(rank, world_size, rank, torch.device("cpu"))
        object.__setattr__(ranks, "meeting", meeting)
        try:
            results[rank] = work(ranks)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=serve, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def save_solo(root: Path, step: int, seed: int, record: ExpansionRecord | None = None) -> Path:
    """A one-rank checkpoint of `random_values(seed)`."""
    return save_checkpoint(root, step, SlicedState(random_values(seed)), {"step": step}, record, Ranks.solo())


def tiny_record(tensors: Mapping[str, torch.Tensor], dtype: str = "BF16") -> ExpansionRecord:
    """A record of a model of 3 + 2 blocks (new: 1 and 4) whose base tensors are these."""
    digests = {name: _digest(name, tensor, dtype) for name, tensor in tensors.items()}
    return ExpansionRecord(
        tool_version="0",
        base_id="tiny",
        family="llama",
        model_type="llama",
        base_blocks=3,
        blocks=5,
        block_map=(0, 2, 3),
        new_blocks=(1, 4),
        source_blocks=(0, 2),
        zeroed=(),
        base_tensors=digests,
    )


def _digest(name: str, tensor: torch.Tensor, dtype: str) -> TensorDigest:
    size = tensor.element_size()
    data = tensor.flatten().view(torch.uint8).numpy().tobytes()
    return TensorDigest(
        base_name=name,
        source_dtype=dtype,
        dtype=dtype,
        shape=tuple(tensor.shape),
        source_sha256="0" * 64,
        sha256="0" * 64,
        fold=f"{fold(data, size):016x}",
    )


def _shares(
    shapes: Mapping[str, tuple[int, ...]], rank: int, world_size: int, cut: str
) -> Iterator[tuple[str, int, int]]:
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    part = -(-sum(sizes.values()) // world_size)
    begin = 0
    for name, size in sizes.items():
        if cut == "parameter":
            piece = -(-size // world_size)
            low, high = min(size, rank * piece), min(size, (rank + 1) * piece)
        else:
            low, high = (min(size, max(0, edge * part - begin)) for edge in (rank, rank + 1))
        if low < high:
            yield name, low, high
        begin += size
