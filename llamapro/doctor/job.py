"""The hosts of a job together: the same versions and GPUs, one clock, one run folder, links that are equally fast.

Whatever is amiss names the host: the one that differs from most.
"""

import os
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from llamapro.doctor.bandwidth import Rates, measure_rates
from llamapro.doctor.finding import FAILED, NOTE, OK, Finding, State, failures
from llamapro.doctor.machine import check_machine
from llamapro.doctor.packages import check_packages, versions
from llamapro.ranks import Ranks

CLOCK_ROUNDS: Final = 5
CLOCK_NOTE_SECONDS: Final = 1.0
CLOCK_FAILED_SECONDS: Final = 30.0
"""Certificates, `make` and people who read logs mind; the run lock goes by the file system's clock."""
FOLDER_WAIT_SECONDS: Final = 15.0
"""Network file systems show a new file this late at worst: they remember that it wasn't there."""
SLOW_FRACTION: Final = 0.5


def check_job(ranks: Ranks, folder: Path, host: str) -> list[Finding]:
    """Everything about the hosts of a job; the same list on every rank.

    Args:
        folder: where the run will write, as every host names it.
        host: this rank's.
    """
    hosts = ranks.all_gather_json(host)
    found = [_layout(hosts), *check_names(hosts, ranks.all_gather_json(ranks.local_rank))]
    found += _alike(ranks, hosts)
    found += _machines(ranks, hosts, folder)
    found.append(judge_clocks(_clock_offsets(ranks, hosts)))
    found.append(_shared_folder(ranks, hosts, folder))
    return found + judge_rates(measure_rates(ranks, hosts))


def first_ranks(hosts: Sequence[str]) -> dict[str, int]:
    """The first rank of each host, in rank order. `hosts`: by rank."""
    return {host: hosts.index(host) for host in dict.fromkeys(hosts)}


def differing(values: Mapping[str, str]) -> dict[str, str]:
    """The hosts whose value is not the most common one; of two values that are equally common, the first host's."""
    if len(set(values.values())) < 2:
        return {}
    common, _ = Counter(values.values()).most_common(1)[0]
    return {host: value for host, value in values.items() if value != common}


def judge_alike(what: str, values: Mapping[str, str]) -> Finding:
    """Whether all hosts have the same. `values`: by host."""
    odd = differing(values)
    if not odd:
        return Finding(what, OK, f"{next(iter(values.values()))} on every host")
    usual = next(value for host, value in values.items() if host not in odd)
    there = ", ".join(f"{value} on {host}" for host, value in odd.items())
    return Finding(what, FAILED, f"{there}, and {usual} on the other{'s' if len(values) - len(odd) > 1 else ''}")


def check_names(hosts: Sequence[str], local_ranks: Sequence[int]) -> list[Finding]:
    """Hosts are told apart by name, so no two may share one. Both by rank."""
    seen = Counter(zip(hosts, local_ranks, strict=True))
    twice = sorted({host for (host, _), count in seen.items() if count > 1})
    return [Finding("host names", FAILED, f"several hosts call themselves {name}") for name in twice]


def judge_clocks(offsets: Mapping[str, float]) -> Finding:
    """Whether the hosts' clocks agree. `offsets`: seconds ahead of the first host's, by host."""
    middle = statistics.median(offsets.values()) if len(offsets) > 2 else 0.0
    host, worst = max(((host, offset - middle) for host, offset in offsets.items()), key=lambda item: abs(item[1]))
    if abs(worst) < CLOCK_NOTE_SECONDS:
        return Finding("clocks", OK, f"within {max(abs(worst), 0.001):.3f} s")
    state: State = FAILED if abs(worst) >= CLOCK_FAILED_SECONDS else NOTE
    direction = "ahead" if worst > 0 else "behind"
    return Finding("clocks", state, f"{host} is {abs(worst):.1f} s {direction}; let NTP or chrony set it")


def judge_rates(rates: Rates) -> list[Finding]:
    """What was measured, and which host is slower than half of the others' median."""
    found = [_rate("all-reduce, all ranks", rates.everywhere)] if rates.everywhere else []
    if rates.within:
        slow = slower(rates.within)
        shown = ", ".join(f"{host} {_gigabytes(rate)}" for host, rate in rates.within.items())
        found.append(Finding("all-reduce within a host", FAILED if slow else OK, _with_slow(shown, slow)))
    if rates.links:
        ends = best_link(rates.links)
        slow = slower(ends) if len(ends) > 2 else []
        shown = ", ".join(f"{a} → {b} {_gigabytes(rate)}" for (a, b), rate in rates.links.items())
        found.append(Finding("between hosts", FAILED if slow else OK, _with_slow(shown, slow)))
    return found


def best_link(links: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """The faster of each host's links: a slow link alone doesn't say which of its ends is slow."""
    best: dict[str, float] = {}
    for pair, rate in links.items():
        for host in pair:
            best[host] = max(best.get(host, 0.0), rate)
    return best


def slower(rates: Mapping[str, float]) -> list[str]:
    """Hosts below half of the median."""
    limit = SLOW_FRACTION * statistics.median(rates.values())
    return [host for host, rate in rates.items() if rate < limit]


def _layout(hosts: Sequence[str]) -> Finding:
    counts = Counter(hosts)
    shown = ", ".join(f"{host} {count}" for host, count in counts.items())
    return Finding("ranks per host", OK if len(set(counts.values())) == 1 else NOTE, shown)


def _alike(ranks: Ranks, hosts: Sequence[str]) -> list[Finding]:
    """Versions and devices of every host; where all agree on all versions, one line."""
    everywhere = ranks.all_gather_json({**versions(), **_devices()})
    by_host = {host: everywhere[rank] for host, rank in first_ranks(hosts).items()}
    names = dict.fromkeys(name for facts in by_host.values() for name in facts)
    judged = [
        judge_alike(name, {host: facts.get(name, "missing") for host, facts in by_host.items()}) for name in names
    ]
    return failures(judged) or [Finding("versions and devices", OK, f"{len(judged)} the same on every host")]


def _devices() -> dict[str, str]:
    found = {"CUDA": str(torch.version.cuda)}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def _machines(ranks: Ranks, hosts: Sequence[str], folder: Path) -> list[Finding]:
    """What is amiss on single hosts."""
    own = first_ranks(hosts)[hosts[ranks.rank]] == ranks.rank
    amiss = failures([*check_packages(), *check_machine(folder)]) if own else []
    reports = ranks.all_gather_json([[finding.what, finding.found] for finding in amiss])
    return [
        Finding(what, FAILED, f"{host}: {text}")
        for host, rank in first_ranks(hosts).items()
        for what, text in reports[rank]
    ]


def _clock_offsets(ranks: Ranks, hosts: Sequence[str]) -> dict[str, float]:
    """Seconds that each host's clock is ahead of the first's; all read it when a barrier opens, the best of some."""
    offsets: list[list[float]] = []
    for _ in range(CLOCK_ROUNDS):
        ranks.barrier()
        times = ranks.all_gather_json(time.time())
        offsets.append([each - times[0] for each in times])
    middle = [statistics.median(each) for each in zip(*offsets, strict=True)]
    return {host: middle[rank] for host, rank in first_ranks(hosts).items()}


def _shared_folder(ranks: Ranks, hosts: Sequence[str], folder: Path) -> Finding:
    """Each host writes a file of its own; every other must see it."""
    word = ranks.broadcast_json(uuid.uuid4().hex)
    firsts = first_ranks(hosts)
    own = firsts[hosts[ranks.rank]] == ranks.rank
    mine = folder / f".doctor-{word}-{ranks.rank}"
    failure = _write(mine, word) if own else ""
    failed = {hosts[rank]: why for rank, why in enumerate(ranks.all_gather_json(failure)) if why}
    expected = {host: folder / f".doctor-{word}-{rank}" for host, rank in firsts.items() if host not in failed}
    unseen = _unseen(expected) if own else []
    reports = ranks.all_gather_json(unseen)
    if own and not failure:
        mine.unlink(missing_ok=True)
    return judge_folder(folder, failed, {host: reports[rank] for host, rank in firsts.items()})


def judge_folder(folder: Path, failed: Mapping[str, str], unseen: Mapping[str, Sequence[str]]) -> Finding:
    """Whether all hosts share the folder.

    Args:
        failed: why a host can't write in it.
        unseen: by host, the hosts whose files it doesn't see.
    """
    what = f"folder {folder}"
    if failed:
        return Finding(what, FAILED, "; ".join(f"{host} can't write there: {why}" for host, why in failed.items()))
    blind = {host: others for host, others in unseen.items() if others}
    if not blind:
        return Finding(what, OK, "every host sees what the others write" if len(unseen) > 1 else "can be written")
    alone = [host for host, others in blind.items() if len(others) == len(unseen) - 1]
    named = alone if 0 < len(alone) < len(unseen) - 1 else list(blind)
    told = "; ".join(f"{host} does not see what {' and '.join(blind[host])} wrote" for host in named)
    return Finding(what, FAILED, f"{told}; put the run on a file system that all hosts share")


def _write(file: Path, text: str) -> str:
    """Why it could not be written; empty when it was."""
    try:
        with file.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _unseen(expected: Mapping[str, Path]) -> list[str]:
    """The hosts whose files can't be seen, after waiting for a slow file system."""
    end = time.monotonic() + FOLDER_WAIT_SECONDS
    while True:
        missing = [host for host, path in expected.items() if not path.is_file()]
        if not missing or time.monotonic() > end:
            return missing
        time.sleep(0.2)


def _rate(what: str, rate: float) -> Finding:
    return Finding(what, OK, _gigabytes(rate))


def _with_slow(shown: str, slow: Sequence[str]) -> str:
    return f"{shown}; less than half of the others: {', '.join(slow)}" if slow else shown


def _gigabytes(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"
