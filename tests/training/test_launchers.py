"""What the `deepspeed` launcher does to signals, and what ranks that watch for themselves make of it.

Each fault is shown with ranks that have a handler of their own, as any program has that wants to save before it ends;
beside it, ranks under `watch_signals` with the same launcher. When a fault can't be shown any more, DeepSpeed has
changed, and the remedy can be reviewed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.source import ROOT

SECONDS = 60.0
# Each rank writes its process id, then what happened to it; `save` takes a while, as saving does.
COMMON = """
import os, signal, sys, time
from pathlib import Path

def say(name, text):
    folder = Path(os.environ["RANKS_FOLDER"])
    path = folder / f".{name}-{os.environ['RANK']}"
    path.write_text(str(text))
    path.rename(folder / f"{name}-{os.environ['RANK']}")

def save():
    time.sleep(0.5)
    say("saved", time.monotonic())

def stuck_in_a_collective():
    import threading
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""
# Stops at the next step boundary, as programs do whose handler sets a flag.
USUAL = (
    COMMON
    + """
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: asked.append(number))
say("pid", os.getpid())
while not asked:
    time.sleep(0.05)
save()
sys.exit(75)
"""
)
WATCHING = (
    COMMON
    + """
from llamapro.training.signals import watch_signals
with watch_signals(grace_seconds=5, step_timeout_seconds=60) as stop:
    say("pid", os.getpid())
    while not stop.requested:
        stop.heartbeat()
        time.sleep(0.05)
    stop.acknowledge()
    say("reason", stop.reason)
    save()
sys.exit(75)
"""
)
# Rank 0 dies; the other waits for it in a collective, in which no Python handler runs.
USUAL_STUCK = (
    COMMON
    + """
signal.signal(signal.SIGTERM, lambda number, frame: None)
say("pid", os.getpid())
if os.environ["RANK"] == "0":
    time.sleep(1)
    sys.exit(1)
stuck_in_a_collective()
"""
)
WATCHING_STUCK = (
    COMMON
    + """
from llamapro.training.signals import watch_signals
with watch_signals(grace_seconds=1, step_timeout_seconds=60) as stop:
    say("pid", os.getpid())
    if os.environ["RANK"] == "0":
        time.sleep(1)
        os._exit(1)
    stop.heartbeat()
    stuck_in_a_collective()
"""
)


class Job:
    """Two ranks under the launcher: what they wrote, and whether they live."""

    def __init__(self, launcher: "subprocess.Popen[bytes]", folder: Path) -> None:
        self.launcher = launcher
        self._folder = folder

    def said(self, name: str) -> list[str]:
        """What each rank wrote under a name, those that did."""
        return [path.read_text() for path in sorted(self._folder.glob(f"{name}-*"))]

    def living(self) -> list[int]:
        return [int(pid) for pid in self.said("pid") if Path(f"/proc/{pid}/stat").exists() and not zombie(int(pid))]

    def wait_for(self, name: str, count: int = 2) -> list[str]:
        end = time.monotonic() + SECONDS
        while len(self.said(name)) < count and time.monotonic() < end:
            time.sleep(0.05)
        assert len(self.said(name)) == count, f"{name}: {self.said(name)}"
        return self.said(name)

    def wait_until_none_lives(self) -> None:
        end = time.monotonic() + SECONDS
        while self.living() and time.monotonic() < end:
            time.sleep(0.05)
        assert not self.living()


def zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextmanager
def launched(folder: Path, program: str) -> Iterator[Job]:
    """A program with two ranks under `deepspeed`, in a process group of its own; nothing is left of it."""
    (folder / "ranks").mkdir()
    (folder / "program.py").write_text(program)
    port = 20000 + os.getpid() % 10000
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANKS_FOLDER": str(folder / "ranks")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    launcher = subprocess.Popen(
        [*command, str(folder / "program.py")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    job = Job(launcher, folder / "ranks")
    try:
        job.wait_for("pid")
        yield job
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def test_a_terminated_launcher_leaves_the_usual_ranks_running(tmp_path: Path) -> None:
    """Their parent is not the command that was ended, so they can't learn it from that one either."""
    with launched(tmp_path, USUAL) as job:
        parents = [parent_of(pid) for pid in job.living()]
        job.launcher.terminate()
        assert job.launcher.wait(SECONDS) == -signal.SIGTERM
        time.sleep(3)
        assert len(job.living()) == 2 and job.said("saved") == []
        assert [parent_of(pid) for pid in job.living()] == parents and job.launcher.pid not in parents


def test_ranks_that_watch_save_and_end_when_their_launcher_is_gone(tmp_path: Path) -> None:
    """The program that `deepspeed` starts on each host, between itself and the ranks, is still there."""
    with launched(tmp_path, WATCHING) as job:
        job.launcher.terminate()
        assert job.wait_for("reason") == ["the launcher has gone"] * 2
        assert len(job.wait_for("saved")) == 2
        job.wait_until_none_lives()


@pytest.mark.parametrize("program", [USUAL, WATCHING], ids=["usual", "watching"])
def test_after_ctrl_c_the_launcher_never_says_75_though_all_ranks_do(tmp_path: Path, program: str) -> None:
    """So it can't be promised there. Two signals come for one key press; ranks that watch take them for one."""
    with launched(tmp_path, program) as job:
        os.killpg(job.launcher.pid, signal.SIGINT)
        assert job.launcher.wait(SECONDS) in (1, -signal.SIGINT)
        assert len(job.wait_for("saved")) == 2
        job.wait_until_none_lives()


def test_a_dead_rank_ends_the_others_at_once_if_they_watch(tmp_path: Path) -> None:
    with launched(tmp_path, WATCHING_STUCK) as job:
        start = time.monotonic()
        assert job.launcher.wait(SECONDS) == 1
        assert time.monotonic() - start < 15
        job.wait_until_none_lives()


@pytest.mark.slow
def test_a_dead_rank_ends_the_others_after_half_a_minute_each_if_they_do_not(tmp_path: Path) -> None:
    with launched(tmp_path, USUAL_STUCK) as job:
        start = time.monotonic()
        assert job.launcher.wait(SECONDS) == 1
        assert time.monotonic() - start > 25
