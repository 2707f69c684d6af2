"""Stop requests and hangs: a thread reads signals, so that a process stuck in a collective still hears them.

The thread reads the wake-up pipe that the interpreter's own signal handler writes to, whatever the main thread does.
It asks the loop to stop; the loop polls, agrees with the other ranks, acknowledges, saves and exits. When the loop does
not get there in time, or makes no progress at all, the thread writes the stacks of all threads to standard error and
ends the process with exit code 75: the last checkpoint stands, the same command continues from it.
"""

import faulthandler
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from llamapro.errors import EXIT_RETRY
from llamapro.training.startup_signals import STOP_SIGNALS, send_stop_signals_to

if TYPE_CHECKING:
    from llamapro.training.peers import Peers

REPEAT_SECONDS = 5.0
"""A launcher may send several signals for one key press: a second one counts this long after the first."""
POLL_SECONDS = 0.5
STOP_FILE_SECONDS = 1.0
TESTIMONY_SECONDS = 5.0
DEEPSPEED_LAUNCHER = b"deepspeed.launcher.launch"
_QUIT = 0


class StopRequest:
    """What the loop sees: whether to stop, why, and where it reports that it is alive.

    One micro-step of the loop: `heartbeat()`, read `requested`, agree over ranks; when they agree, `acknowledge()`
    on every rank, save, exit.

    Attributes:
        heartbeats: how many there were: equally many on every rank, but for the one that the others wait for.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        """`stop_file`: its existence is a request; only rank 0 should watch it."""
        self._stop_file = stop_file
        self._looked_at = -STOP_FILE_SECONDS
        self._first_request: float | None = None
        self._reason = ""
        self._acknowledged = False
        self._last_heartbeat: float | None = None
        self.heartbeats = 0

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop. Cheap: looks for the stop file at most once a second."""
        if self._first_request is None and self._stop_file is not None:
            now = time.monotonic()
            if now - self._looked_at >= STOP_FILE_SECONDS:
                self._looked_at = now
                if self._stop_file.exists():
                    self.request(f"{self._stop_file} exists")
        return self._first_request is not None

    @property
    def reason(self) -> str:
        """Why, in a few words; empty when nobody asked."""
        return self._reason

    def request(self, reason: str) -> None:
        """Ask the loop to stop; the first reason is kept."""
        if self._first_request is None:
            self._reason = reason
            self._first_request = time.monotonic()

    def heartbeat(self) -> None:
        """The loop made progress. The first call arms the watchdog."""
        self._last_heartbeat = time.monotonic()
        self.heartbeats += 1

    def acknowledge(self) -> None:
        """All ranks agreed to stop and begin to save: the grace period is over, the watchdog starts anew."""
        self._acknowledged = True
        self.heartbeat()

    def overdue(self, grace_seconds: float, step_timeout_seconds: float) -> str:
        """Why the process must be ended now; empty while all is well. For the watching thread."""
        now = time.monotonic()
        if self._first_request is not None and not self._acknowledged and now - self._first_request > grace_seconds:
            return f"asked to stop ({self._reason}), but no step boundary was reached within {grace_seconds:g} s"
        if self._last_heartbeat is not None and now - self._last_heartbeat > step_timeout_seconds:
            return f"no progress for {step_timeout_seconds:g} s (engine.step_timeout_minutes)"
        return ""


@contextmanager
def watch_signals(
    *,
    grace_seconds: float,
    step_timeout_seconds: float,
    stop_file: Path | None = None,
    peers: "Peers | None" = None,
) -> Iterator[StopRequest]:
    """Watch for stop signals, a vanished launcher, the stop file and hangs while the block runs.

    To be entered on the main thread. Signals that the process ignores (nohup) stay ignored. Handlers are restored at
    the end.

    Args:
        grace_seconds: from a request to a forced exit when the loop does not acknowledge it.
        step_timeout_seconds: longest time between two heartbeats.
        stop_file: the run folder's STOP file, on rank 0 only; one that is left from before is deleted.
        peers: the ranks of the job, among which a process that is ended looks for the one that it waited for.
    """
    if stop_file is not None:
        stop_file.unlink(missing_ok=True)
    request = StopRequest(stop_file)
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    former = send_stop_signals_to(writer)
    thread = _Watcher(request, reader, grace_seconds, step_timeout_seconds, peers)
    thread.start()
    try:
        with peers.giving_signs(lambda: request.heartbeats) if peers else nullcontext():
            yield request
    finally:
        former.restore()
        os.write(writer, bytes([_QUIT]))
        thread.join()
        os.close(writer)
        os.close(reader)


class _Watcher(threading.Thread):
    def __init__(
        self,
        request: StopRequest,
        reader: int,
        grace_seconds: float,
        step_timeout_seconds: float,
        peers: "Peers | None",
    ) -> None:
        super().__init__(name="signals", daemon=True)
        self._request = request
        self._reader = reader
        self._grace_seconds = grace_seconds
        self._step_timeout_seconds = step_timeout_seconds
        self._peers = peers
        self._launchers = _launchers()
        self._first_seen: dict[int, float] = {}

    def run(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], POLL_SECONDS)
            for number in os.read(self._reader, 4096) if ready else b"":
                if number == _QUIT:
                    return
                self._on_signal(number)
            if _launchers() != self._launchers:
                self._request.request("the launcher has gone")
            if problem := self._request.overdue(self._grace_seconds, self._step_timeout_seconds):
                _end_process(problem, self._peers)

    def _on_signal(self, number: int) -> None:
        if number not in STOP_SIGNALS:
            return
        name = signal.Signals(number).name
        now = time.monotonic()
        if now - self._first_seen.setdefault(number, now) >= REPEAT_SECONDS:
            _end_process(f"{name} for the second time", self._peers)
        self._request.request(name)


def _launchers() -> list[int]:
    """The process that started this one; and where that is DeepSpeed's launcher of one host, the one that started it.

    The `deepspeed` command itself ends at SIGTERM without telling anyone, and the launcher between stays.
    """
    parent = os.getppid()
    with suppress(OSError):  # it has just gone, or there is no /proc
        process = Path("/proc", str(parent))
        if DEEPSPEED_LAUNCHER in (process / "cmdline").read_bytes().split(b"\0"):
            return [parent, int((process / "stat").read_text().rpartition(")")[2].split()[1])]
    return [parent]


def _end_process(reason: str, peers: "Peers | None") -> NoReturn:
    """Write the reason and all stacks, name the rank that was waited for, then end without any cleanup.

    Cleanup could hang as well, and so could the file system through which the peers are known.
    """
    # Raw writes: the main thread may be stuck holding the lock of sys.stderr.
    rank = os.environ.get("RANK", "0")
    os.write(2, f"rank {rank}: {reason}; ending with 75\n".encode())
    faulthandler.dump_traceback(file=2, all_threads=True)
    if peers is not None:
        testimony = threading.Thread(target=peers.testify, args=(reason,), daemon=True)
        testimony.start()
        testimony.join(TESTIMONY_SECONDS)
    os._exit(EXIT_RETRY)
