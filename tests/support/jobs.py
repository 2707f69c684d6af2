"""Training jobs of several ranks, each a process of its own as under srun, with a fault planted in one of them."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from llamapro.engine.ports import free_port
from llamapro.run_folder import RunFolder
from llamapro.training.metrics import read_metrics
from tests.support.faulty_front import Fault
from tests.support.source import ROOT

START_SECONDS = 400.0
FAULTLESS = Fault()


class Job:
    """The ranks of one start of a run: what they said, and how they ended."""

    def __init__(self, values: dict[str, Any], folder: Path, fault: Fault, world_size: int) -> None:
        config = folder / "job.json"
        config.write_bytes(orjson.dumps(values))
        self.run = RunFolder(Path(values["run"]["folder"]))
        self._said = [folder / f"said-{rank}" for rank in range(world_size)]
        shared = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "PYTHONPATH": str(ROOT),
            "PLANTED_FAULT": orjson.dumps(asdict(fault)).decode(),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.support.faulty_front", "--config", str(config)]
        self.ranks = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=said.open("wb"),
                start_new_session=True,
            )
            for rank, said in enumerate(self._said)
        ]

    def said(self, rank: int) -> str:
        """What a rank wrote to standard error."""
        return self._said[rank].read_text(errors="replace")

    def wait_for(self, text: str, rank: int = 0, seconds: float = START_SECONDS) -> None:
        """Wait until a rank says this."""
        end = time.monotonic() + seconds
        while text not in self.said(rank):
            assert time.monotonic() < end, f"{text!r} never came; rank {rank} said:\n{self.said(rank)}"
            assert self.ranks[rank].poll() is None or text in self.said(rank), self.said(rank)
            time.sleep(0.05)

    def codes(self, seconds: float = START_SECONDS) -> list[int]:
        """Wait until all ranks have ended; their exit codes."""
        end = time.monotonic() + seconds
        return [rank.wait(max(0.1, end - time.monotonic())) for rank in self.ranks]

    def first_end(self, seconds: float = START_SECONDS) -> float:
        """Wait until one rank has ended; `time.monotonic()` then."""
        end = time.monotonic() + seconds
        while all(rank.poll() is None for rank in self.ranks):
            assert time.monotonic() < end, "no rank ended\n" + "\n".join(map(self.said, range(len(self.ranks))))
            time.sleep(0.02)
        return time.monotonic()

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send one rank a signal."""
        self.ranks[rank].send_signal(number)

    def end(self) -> None:
        """Leave nothing of it."""
        for rank in self.ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()


@contextmanager
def job(values: dict[str, Any], fault: Fault = FAULTLESS, world_size: int = 2) -> Iterator[Job]:
    """A run's ranks while the block lasts."""
    run = Path(values["run"]["folder"])
    folder = Path(tempfile.mkdtemp(prefix=f"{run.name}-job-", dir=run.parent))
    started = Job(values, folder, fault, world_size)
    try:
        yield started
    finally:
        started.end()


def finished(values: dict[str, Any], world_size: int = 2) -> list[dict[str, Any]]:
    """Start or continue a run without a fault; its metrics."""
    with job(values, world_size=world_size) as done:
        assert done.codes() == [0] * world_size, "\n".join(map(done.said, range(world_size)))
        return read_metrics(done.run.metrics_file)


def processes_of(text: str) -> list[int]:
    """Processes, other than this one, whose command line holds a text."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if text.encode() in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found
