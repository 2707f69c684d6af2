"""The processes of one job: who I am, and the few small collectives that everything above the model needs.

Objects cross ranks as JSON in byte tensors, never as pickles.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. With `world_size` 1 and no process group every collective is the identity."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @classmethod
    def solo(cls, device: torch.device | str = "cpu") -> "Ranks":
        """A job of one process, without a process group."""
        return cls(rank=0, world_size=1, local_rank=0, device=torch.device(device))

    @classmethod
    def current(cls, device: torch.device | str) -> "Ranks":
        """The ranks of the initialized process group."""
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, torch.device(device))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank."""
        return self.sum_integers([int(flag)])[0] > 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in float64; the same list on every rank."""
        if self.world_size == 1:
            return [float(value) for value in values]
        totals = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return [float(value) for value in totals.tolist()]

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        """Element-wise sum over ranks of signed 64-bit integers, modulo 2⁶⁴."""
        if self.world_size == 1:
            return list(values)
        totals = torch.tensor(list(values), dtype=torch.int64, device=self.device)
        dist.all_reduce(totals)
        return [int(value) for value in totals.tolist()]

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Values must be JSON."""
        if self.world_size == 1:
            return [value]
        payload = orjson.dumps(value)
        sizes = [0] * self.world_size
        sizes[self.rank] = len(payload)
        sizes = self.sum_integers(sizes)
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        gathered = [torch.empty_like(mine, device=self.device) for _ in sizes]
        dist.all_gather(gathered, mine.to(self.device))
        pairs = zip(gathered, sizes, strict=True)
        return [orjson.loads(tensor[:size].cpu().numpy().tobytes()) for tensor, size in pairs]

    def broadcast_json(self, value: Any, source: int = 0) -> Any:
        """The value of rank `source`, on every rank. Other ranks may pass anything."""
        return self.all_gather_json(value if self.rank == source else None)[source]
