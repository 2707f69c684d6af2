"""`launch/pretrain.py` with one fault planted in one rank: run as a program by `tests.support.jobs`."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from llamapro.engine.environment import prepare_environment
from llamapro.training.startup_signals import retry_on_stop_signals

MEMORY_LEFT = 64 << 20
SLEEP_SECONDS = 600.0


@dataclass(frozen=True)
class Fault:
    """What happens to one rank.

    Attributes:
        step: how many steps after its start, from 1; step_seconds: how long every step takes at least, on all ranks.
        where: "forward", "backward", "step" or "save"; how: a name of `DEEDS`; empty: nothing happens.
        cgroup: folder of the memory control group that a rank joins to be killed by the system.
        save_seconds: how long every rank writes at least.
    """

    rank: int = 0
    step: int = 1
    where: str = "backward"
    how: str = ""
    cgroup: str = ""
    step_seconds: float = 0.0
    save_seconds: float = 0.0


def kill(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(fault: Fault) -> None:
    raise ValueError("this was planted")


def sleep(fault: Fault) -> None:
    time.sleep(SLEEP_SECONDS)


def exhaust_memory(fault: Fault) -> None:
    """Take memory until the process may have no more, which torch reports."""
    import torch

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LEFT, resource.RLIM_INFINITY))
    hoard = []
    while True:
        hoard.append(torch.ones(1 << 22))


def be_killed_for_memory(fault: Fault) -> None:
    """Take memory until the system kills the process."""
    Path(fault.cgroup, "cgroup.procs").write_text(str(os.getpid()))
    hoard = []
    while True:
        hoard.append(bytearray(b"x" * (1 << 22)))


DEEDS: dict[str, Callable[[Fault], None]] = {
    "kill": kill,
    "abort": lambda fault: os.abort(),
    "exception": fail,
    "memory": exhaust_memory,
    "killed for memory": be_killed_for_memory,
    "stop": stop,
    "sleep": sleep,
}


def plant(fault: Fault) -> None:
    """Make the fault happen when its time has come; every rank counts its steps."""
    from llamapro.checkpoint import background
    from llamapro.engine.engine import Engine
    from llamapro.training import loop, saving

    taken = [0]
    run_step = loop.run_step

    def counted(*arguments: Any) -> Any:
        taken[0] += 1
        time.sleep(fault.step_seconds)
        return run_step(*arguments)

    def with_fault(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if taken[0] >= fault.step and int(os.environ["RANK"]) == fault.rank and fault.how:
                DEEDS[fault.how](fault)
            return work(*arguments, **more)

        return call

    def slow(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            time.sleep(fault.save_seconds)
            return work(*arguments)

        return call

    loop.run_step = counted
    background.write_rank_file = slow(background.write_rank_file)
    places: dict[str, tuple[Any, str]] = {
        "forward": (Engine, "forward_loss"),
        "backward": (Engine, "backward"),
        "step": (Engine, "step"),
        # In the thread an error is a failed save and no dead rank.
        "save": (background, "write_rank_file") if fault.how in ("kill", "abort", "stop") else (saving, "stage_save"),
    }
    owner, name = places[fault.where]
    setattr(owner, name, with_fault(getattr(owner, name)))


if __name__ == "__main__":
    retry_on_stop_signals()
    prepare_environment()  # before torch and deepspeed are imported: both read it on import
    plant(Fault(**orjson.loads(os.environ["PLANTED_FAULT"])))
    from llamapro.training.entry import main

    sys.exit(main("pretrain"))
