"""The run lock: one owner, named to the second; taken over when the owner is dead or its lease is stale."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from queue import Queue

import pytest

from llamapro.errors import CheckFailed, UserError
from llamapro.files.lock import LOCK_NAME, RunLock

HOLD = (
    "import sys, time; from pathlib import Path; from llamapro.files.lock import RunLock\n"
    "RunLock(Path(sys.argv[1]), 'job-77').acquire(); print('held', flush=True); time.sleep(60)"
)


def edit_lease(folder: Path, **changes: object) -> None:
    path = folder / LOCK_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hold_in_another_process(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_owner_is_refused_with_host_process_and_job(tmp_path: Path) -> None:
    process = hold_in_another_process(tmp_path)
    try:
        with pytest.raises(UserError) as caught:
            RunLock(tmp_path).acquire()
        message = str(caught.value)
        assert socket.gethostname() in message
        assert str(process.pid) in message
        assert "job-77" in message
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("reap", [True, False], ids=["gone", "zombie"])
def test_a_dead_owner_on_this_host_is_replaced_at_once(tmp_path: Path, reap: bool) -> None:
    process = hold_in_another_process(tmp_path)
    process.send_signal(signal.SIGKILL)
    if reap:
        process.wait()
    wait_until(lambda: process.pid not in _running())
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    process.wait()
    assert list(tmp_path.iterdir()) == []


def _running() -> set[int]:
    states = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            states[int(stat.parent.name)] = stat.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return {pid for pid, state in states.items() if state not in "ZX"}


def test_a_reused_process_id_is_not_the_owner(tmp_path: Path) -> None:
    first = RunLock(tmp_path, renew_seconds=100).acquire()
    edit_lease(tmp_path, started=1)
    second = RunLock(tmp_path).acquire()
    second.release()
    first.release()


def test_a_lease_of_another_machine_holds_until_it_is_stale(tmp_path: Path) -> None:
    first = RunLock(tmp_path, "9", renew_seconds=100).acquire()
    edit_lease(tmp_path, host="elsewhere", machine="another boot", pid=1)
    with pytest.raises(UserError, match="process 1 on elsewhere, job 9"):
        RunLock(tmp_path).acquire()
    old = time.time() - 299
    os.utime(tmp_path / LOCK_NAME, (old, old))
    with pytest.raises(UserError, match="elsewhere"):
        RunLock(tmp_path).acquire()
    old = time.time() - 301
    os.utime(tmp_path / LOCK_NAME, (old, old))
    RunLock(tmp_path).acquire().release()
    first.release()


def test_an_unreadable_lease_holds_until_it_is_stale(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_bytes(b"\x00\x00")
    with pytest.raises(UserError, match="unreadable lease"):
        RunLock(tmp_path).acquire()
    old = time.time() - 301
    os.utime(tmp_path / LOCK_NAME, (old, old))
    RunLock(tmp_path).acquire().release()


def test_the_owner_renews_its_lease(tmp_path: Path) -> None:
    with RunLock(tmp_path, renew_seconds=0.02) as lock:
        os.utime(tmp_path / LOCK_NAME, (0, 0))
        wait_until(lambda: (tmp_path / LOCK_NAME).stat().st_mtime > 0)
        lock.check()


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "removed"])
def test_an_owner_that_lost_its_lease_is_told_and_leaves_the_new_one_alone(tmp_path: Path, taken: bool) -> None:
    lock = RunLock(tmp_path, renew_seconds=0.02).acquire()
    if taken:
        edit_lease(tmp_path, token="another", host="thief")
    else:
        (tmp_path / LOCK_NAME).unlink()

    def lost() -> bool:
        try:
            lock.check()
        except CheckFailed as error:
            return ("thief" if taken else "removed") in str(error)
        return False

    wait_until(lost)
    lock.release()
    assert (tmp_path / LOCK_NAME).exists() is taken


def test_release_lets_the_next_one_in(tmp_path: Path) -> None:
    for _ in range(3):
        with RunLock(tmp_path), pytest.raises(UserError):
            RunLock(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []


def _race(folder: Path, start: Barrier, results: "Queue[bool]", finish: Barrier) -> None:
    lock = RunLock(folder)
    start.wait(60)
    try:
        lock.acquire()
        won = True
    except UserError:
        won = False
    results.put(won)
    finish.wait(60)
    if won:
        lock.release()


def test_of_many_takers_of_a_stale_lease_exactly_one_wins(tmp_path: Path) -> None:
    stale = RunLock(tmp_path, renew_seconds=100).acquire()
    edit_lease(tmp_path, machine="another boot")
    old = time.time() - 400
    os.utime(tmp_path / LOCK_NAME, (old, old))
    takers = 4
    context = multiprocessing.get_context("spawn")
    start, finish, results = context.Barrier(takers), context.Barrier(takers), context.Queue()
    processes = [context.Process(target=_race, args=(tmp_path, start, results, finish)) for _ in range(takers)]
    for process in processes:
        process.start()
    wins = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sum(wins) == 1
    stale.release()
