"""How fast gradients cross: all-reduce over all ranks and within each host, and single links between hosts.

Rates of all-reduce are what the slowest link carries, 2 (n - 1) / n bytes for each byte of n ranks' result, so that
they compare with a link's own rate whatever n is.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from llamapro.ranks import Ranks

GPU_BYTES = 256 << 20
CPU_BYTES = 4 << 20
ROUNDS = 5


@dataclass(frozen=True)
class Rates:
    """Bytes per second.

    Attributes:
        everywhere: all-reduce over all ranks; 0 for one rank.
        within: all-reduce within each host that has several ranks, by host.
        links: from one host's first rank to the next host's; empty for one host.
    """

    everywhere: float
    within: dict[str, float] = field(default_factory=dict)
    links: dict[tuple[str, str], float] = field(default_factory=dict)


def measure_rates(ranks: Ranks, hosts: Sequence[str]) -> Rates:
    """Measure, one thing after another; the same on every rank.

    Args:
        hosts: by rank.
    """
    if ranks.world_size == 1:
        return Rates(0.0)
    size = GPU_BYTES if ranks.device.type == "cuda" else CPU_BYTES
    data = torch.zeros(size, dtype=torch.uint8, device=ranks.device).view(torch.float32)
    everywhere = min(ranks.all_gather_json(_all_reduce_rate(ranks, data, None, ranks.world_size)))
    names = list(dict.fromkeys(hosts))
    within = {} if len(names) == 1 else _within(ranks, hosts, names, data)
    links = {} if len(names) == 1 else _links(ranks, hosts, names, data)
    return Rates(everywhere, within, links)


def _within(ranks: Ranks, hosts: Sequence[str], names: Sequence[str], data: torch.Tensor) -> dict[str, float]:
    """All hosts at once: they don't share what they use."""
    members = {name: [rank for rank, host in enumerate(hosts) if host == name] for name in names}
    groups = {name: dist.new_group(of) for name, of in members.items() if len(of) > 1}
    own = hosts[ranks.rank]
    count = len(members[own])
    rate = _all_reduce_rate(ranks, data, groups[own], count) if own in groups else _no_rate(ranks)
    rates = ranks.all_gather_json(rate)
    for group in groups.values():
        dist.destroy_process_group(group)
    return {name: rates[members[name][0]] for name in groups}


def _links(
    ranks: Ranks, hosts: Sequence[str], names: Sequence[str], data: torch.Tensor
) -> dict[tuple[str, str], float]:
    """Each host to the next and the last to the first, alone on the network."""
    following = [*names[1:], names[0]] if len(names) > 2 else names[1:]
    links = {}
    for sender, receiver in zip(names, following, strict=False):
        seconds = _send(ranks, data, hosts.index(sender), hosts.index(receiver))
        links[(sender, receiver)] = data.nbytes / seconds
    return links


def _send(ranks: Ranks, data: torch.Tensor, sender: int, receiver: int) -> float:
    """Seconds of one transfer, as the receiver sees it."""

    def transfer() -> None:
        if ranks.rank == sender:
            dist.send(data, receiver)
        elif ranks.rank == receiver:
            dist.recv(data, sender)

    return float(ranks.broadcast_json(_seconds(ranks, transfer), source=receiver))


def _all_reduce_rate(ranks: Ranks, data: torch.Tensor, group: dist.ProcessGroup | None, count: int) -> float:
    seconds = _seconds(ranks, lambda: dist.all_reduce(data, group=group))
    return 2 * (count - 1) / count * data.nbytes / seconds


def _no_rate(ranks: Ranks) -> float:
    """Take part in the barriers of those who measure."""
    _seconds(ranks, lambda: None)
    return 0.0


def _seconds(ranks: Ranks, work: Callable[[], object]) -> float:
    """The shortest of some rounds, after one that is not counted: it connects."""
    shortest = float("inf")
    for round_number in range(ROUNDS + 1):
        ranks.barrier()
        start = time.perf_counter()
        work()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        if round_number:
            shortest = min(shortest, time.perf_counter() - start)
    return max(shortest, 1e-9)
