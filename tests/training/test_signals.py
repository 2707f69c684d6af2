"""Signals reach a stuck process, stops are polite when they can be and certain when they can't."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llamapro.errors import EXIT_RETRY
from llamapro.training.signals import StopRequest, watch_signals

REPOSITORY = Path(__file__).parents[2]
PREAMBLE = """
import os, sys, threading, time
from pathlib import Path
from llamapro.training import signals
from llamapro.training.signals import watch_signals

def say(text):
    os.write(1, (text + chr(10)).encode())

def wait_for(stop, seconds=10):
    end = time.monotonic() + seconds
    while not stop.requested and time.monotonic() < end:
        stop.heartbeat()
        time.sleep(0.02)

def stuck_in_a_collective():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

"""


@contextmanager
def program(body: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A child that runs `body` and has said "ready" (by which its watch is on)."""
    command = [sys.executable, "-c", PREAMBLE + body, *arguments]
    child = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RANK": "3"},
    )
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line == "ready\n", f"{line}{child.stderr.read() if child.stderr else ''}"
        yield child
    finally:
        child.kill()
        child.wait()


def outcome(child: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = child.communicate(timeout=15)
    return child.returncode, out, err


POLITE = """
with watch_signals(grace_seconds=0.3, step_timeout_seconds=10) as stop:
    say("ready")
    wait_for(stop)
    stop.acknowledge()
    say(stop.reason)
    time.sleep(1.2)
    say("saved")
sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_the_loop_to_stop_and_a_save_may_outlast_the_grace(number: signal.Signals) -> None:
    with program(POLITE) as child:
        child.send_signal(number)
        assert outcome(child) == (EXIT_RETRY, f"{number.name}\nsaved\n", "")


def test_several_signals_at_once_count_as_one() -> None:
    with program(POLITE) as child:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            child.send_signal(number)
        code, out, err = outcome(child)
        assert (code, err) == (EXIT_RETRY, "") and out.endswith("saved\n")


def test_the_same_signal_again_after_a_while_ends_the_process_at_once() -> None:
    with program("signals.REPEAT_SECONDS = 0.2\n" + POLITE) as child:
        child.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        child.send_signal(signal.SIGTERM)
        code, out, err = outcome(child)
        assert code == EXIT_RETRY and "saved" not in out
        assert "rank 3: SIGTERM for the second time; ending with 75" in err and "most recent call first" in err


STUCK = """
with watch_signals(grace_seconds=0.3, step_timeout_seconds=float(sys.argv[1])) as stop:
    say("ready")
    stop.heartbeat()
    stuck_in_a_collective()
"""


def test_a_process_stuck_before_the_boundary_is_ended_with_its_stacks() -> None:
    with program(STUCK, "60") as child:
        time.sleep(0.7)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        code, _, err = outcome(child)
        assert code == EXIT_RETRY
        assert "asked to stop (SIGTERM), but no step boundary was reached within 0.3 s" in err
        assert "in stuck_in_a_collective" in err


def test_the_watchdog_ends_a_process_without_progress() -> None:
    with program(STUCK, "0.4") as child:
        code, _, err = outcome(child)
        assert code == EXIT_RETRY
        assert "no progress for 0.4 s" in err and "in stuck_in_a_collective" in err


def test_the_watchdog_is_quiet_before_the_first_heartbeat_and_while_there_are_more() -> None:
    body = """
with watch_signals(grace_seconds=1, step_timeout_seconds=0.6) as stop:
    say("ready")
    time.sleep(1.3)
    for _ in range(30):
        stop.heartbeat()
        time.sleep(0.05)
say("done")
"""
    with program(body) as child:
        assert outcome(child) == (0, "done\n", "")


def test_a_vanished_launcher_counts_as_a_signal(tmp_path: Path) -> None:
    body = f"""
if os.fork():
    time.sleep(0.4)
    say("ready")
    os._exit(0)
with watch_signals(grace_seconds=5, step_timeout_seconds=10) as stop:
    wait_for(stop)
    stop.acknowledge()
    Path({str(tmp_path / "reason")!r}).write_text(stop.reason)
"""
    with program(body) as child:
        assert outcome(child)[0] == 0
    assert (tmp_path / "reason").read_text() == "the launcher has gone"


def test_a_stop_file_is_a_request_and_an_old_one_is_not(tmp_path: Path) -> None:
    stop_file = tmp_path / "STOP"
    stop_file.touch()
    with watch_signals(grace_seconds=60, step_timeout_seconds=60, stop_file=stop_file) as stop:
        assert not stop.requested and not stop_file.exists()
        stop_file.touch()
        deadline = time.monotonic() + 3
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.05)
        assert stop.requested and stop.reason == f"{stop_file} exists"


def test_the_stop_file_is_looked_for_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    looks = 0

    class Watched(type(tmp_path)):  # type: ignore[misc]
        def exists(self, **_: object) -> bool:
            nonlocal looks
            looks += 1
            return False

    monkeypatch.setattr("time.monotonic", lambda: now)
    stop = StopRequest(Watched(tmp_path / "STOP"))
    for _ in range(50):
        assert not stop.requested
        now += 0.1
    assert looks == 5


def test_handlers_come_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        terminate = signal.getsignal(signal.SIGTERM)
        with watch_signals(grace_seconds=60, step_timeout_seconds=10) as stop:
            assert signal.getsignal(signal.SIGTERM) is not terminate
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
            assert not stop.requested
        assert signal.getsignal(signal.SIGTERM) is terminate
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_watch_ends_with_the_block_even_after_an_error() -> None:
    import threading

    with pytest.raises(RuntimeError), watch_signals(grace_seconds=60, step_timeout_seconds=10):
        raise RuntimeError
    assert "signals" not in {thread.name for thread in threading.enumerate()}


def test_the_first_reason_is_kept() -> None:
    stop = StopRequest()
    stop.request("run.stop_after_minutes")
    stop.request("SIGTERM")
    assert stop.requested and stop.reason == "run.stop_after_minutes"


def test_when_a_process_is_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stop = StopRequest()
    stop.heartbeat()
    now = 9.0
    assert stop.overdue(5, 10) == ""
    stop.request("SIGTERM")
    now = 13.9
    stop.heartbeat()
    assert stop.overdue(5, 10) == ""
    now = 14.1
    assert "no step boundary" in stop.overdue(5, 10)
    stop.acknowledge()
    now = 24.0
    assert stop.overdue(5, 10) == ""
    now = 24.2
    assert "no progress" in stop.overdue(5, 10)
