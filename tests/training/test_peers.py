"""Signs of life name the rank that is missing, whatever became of it, and tell how it ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from llamapro.errors import CheckFailed, LlamaproError, PeerLost, RetryLater, UserError
from llamapro.run_folder import RunFolder
from llamapro.training import peers as peers_module
from llamapro.training.peers import Peers, Sign, is_lost_peer, told_to_peers
from tests.support.checkpoint import on_threads

INTERVAL = 0.1
LIVES = "import sys, time; print('up', flush=True); time.sleep(60)"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.create()
    return run


def signed(folder: RunFolder, rank: int, **facts: Any) -> Path:
    """The sign of a rank of this very process, with other facts."""
    Peers(folder, rank, 2).give_sign()
    path = folder.rank_sign(rank)
    path.write_text(Sign.model_validate_json(path.read_bytes()).model_copy(update=facts).model_dump_json())
    return path


def peers_of(folder: RunFolder, rank: int = 0) -> Peers:
    return Peers(folder, rank, 2, INTERVAL)


def waiting(folder: RunFolder, rank: int, heartbeats: int = 5, waits: bool = True) -> None:
    signed(folder, rank, heartbeats=heartbeats, waits=waits, stack=("loop.py:1 train", "step.py:57 run_step"))


def test_all_alive_and_waiting_alike_nobody_is_missing(folder: RunFolder) -> None:
    peers = peers_of(folder)
    waiting(folder, 1, heartbeats=0, waits=False)
    assert peers.missing().keys() <= {0, 1} and not any("gone" in text for text in peers.missing().values())


def test_a_rank_behind_the_others_is_named_with_its_place(folder: RunFolder) -> None:
    peers = peers_of(folder)
    peers._count = lambda: 7
    waiting(folder, 1, heartbeats=6)
    assert list(peers.missing()) == [1]
    assert "is alive and keeps the others waiting, in step.py:57 run_step" in peers.missing()[1]


def test_this_rank_may_be_the_one_that_is_waited_for(folder: RunFolder) -> None:
    waiting(folder, 1, heartbeats=0)
    assert list(peers_of(folder).missing()) == [0], "the other one is in a collective, this one is not"


def test_a_rank_that_gives_no_sign_any_more_is_named_as_stopped(folder: RunFolder) -> None:
    waiting(folder, 1)
    old = time.time() - 33
    os.utime(folder.rank_sign(1), (old, old))
    text = peers_of(folder).missing()[1]
    assert "has given no sign of life for 33 s: it is stopped, or its machine is lost" in text
    assert f"process {os.getpid()} on {os.uname().nodename}" in text and "step.py:57 run_step" in text


@pytest.mark.parametrize("content", [None, b"", b"{"])
def test_a_rank_without_a_readable_sign_is_missing(folder: RunFolder, content: bytes | None) -> None:
    if content is not None:
        folder.rank_sign(1).write_bytes(content)
    assert peers_of(folder).missing() == {1: "rank 1 has left no sign of life"}


def test_a_killed_process_is_known_at_once(folder: RunFolder) -> None:
    child = subprocess.Popen([sys.executable, "-c", LIVES], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"up\n"
    started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    path = signed(folder, 1)
    owner = Sign.model_validate_json(path.read_bytes()).owner.model_copy(update={"pid": child.pid, "started": started})
    signed(folder, 1, owner=owner)
    peers = peers_of(folder)
    assert "gone" not in str(peers.missing())
    child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while "gone" not in str(peers.missing()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert f"rank 1 (process {child.pid} on " in peers.missing()[1]
    assert "is gone without a word: killed, by the system if memory ran out" in peers.missing()[1]
    child.wait()


def lost(message: str = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234") -> RuntimeError:
    return RuntimeError(message)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CheckFailed("a frozen weight changed"), CheckFailed),
        (UserError("no such source"), UserError),
        (RetryLater("asked to stop"), PeerLost),
        (ValueError("a bug"), PeerLost),
    ],
)
def test_a_rank_ends_as_the_one_that_it_lost(folder: RunFolder, error: Exception, kind: type[LlamaproError]) -> None:
    """A failed check of one rank is no reason to try the whole job again."""
    with pytest.raises(type(error)), told_to_peers(peers_of(folder, 1)):
        raise error
    with pytest.raises(LlamaproError) as caught, told_to_peers(peers_of(folder)):
        raise lost()
    assert type(caught.value) is kind
    assert str(error) in str(caught.value) and "a peer was lost: rank 1 (process " in str(caught.value)
    assert "Connection closed by peer [127.0.0.1]:1234" in str(caught.value)
    log = folder.rank_log(0).read_text()
    assert "Traceback" in log and "most recent call first" in log and "last stack of rank 1" in log


def test_where_nothing_is_known_of_the_lost_one_nobody_is_blamed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another machine has just lost its power: its signs are not late yet."""
    monkeypatch.setattr(peers_module, "SEARCH_SECONDS", 0.1)
    waiting(folder, 1)
    with pytest.raises(PeerLost) as caught, told_to_peers(peers_of(folder)):
        raise lost("Connection reset by peer [10.0.0.7]:4711")
    assert "a peer was lost: which one is not known yet (Connection reset by peer [10.0.0.7]:4711)" in str(caught.value)


def test_an_error_of_its_own_is_written_to_the_log_and_kept(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="a bug"), told_to_peers(peers_of(folder)):
        raise ValueError("a bug")
    assert "ValueError: a bug" in folder.rank_log(0).read_text()
    sign = Sign.model_validate_json(folder.rank_sign(0).read_bytes())
    assert (sign.end, sign.exit_code) == ("ValueError: a bug", None)


def test_the_last_word_is_not_overwritten(folder: RunFolder) -> None:
    peers = peers_of(folder)
    with peers.giving_signs(lambda: 1):
        peers.give_sign("the end", 1)
        time.sleep(4 * INTERVAL)
        peers.give_sign()
    assert Sign.model_validate_json(folder.rank_sign(0).read_bytes()).end == "the end"


def test_signs_are_given_while_the_main_thread_is_stuck_and_end_with_the_block(folder: RunFolder) -> None:
    path = folder.rank_sign(0)
    peers = peers_of(folder)
    with peers.giving_signs(lambda: 41):
        deadline = time.monotonic() + 5
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        sign = Sign.model_validate_json(path.read_bytes())
    assert sign.heartbeats == 41 and any("test_peers.py" in line for line in sign.stack) and not sign.waits
    time.sleep(2 * INTERVAL)
    assert "signs-of-life" not in {thread.name for thread in threading.enumerate()}


def test_a_run_that_ends_well_leaves_no_sign(folder: RunFolder) -> None:
    with told_to_peers(peers_of(folder)):
        peers_of(folder).give_sign()
    assert not folder.rank_sign(0).exists()


def test_signs_of_an_earlier_start_are_replaced_before_anyone_reads(folder: RunFolder) -> None:
    for rank in range(2):
        signed(folder, rank, end="long ago", exit_code=1)
    for found in on_threads(2, lambda ranks: Peers.meet(folder, ranks, INTERVAL).missing()):
        assert "long ago" not in str(found)


def test_a_disk_without_space_ends_no_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, _: bytes) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", fail)
    peers_of(folder).give_sign()


def test_only_errors_of_communication_are_lost_peers() -> None:
    assert is_lost_peer(lost())
    assert is_lost_peer(RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 12000ms for recv"))
    assert is_lost_peer(RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:2017, remote process exited"))
    assert is_lost_peer(dist.DistNetworkError("reset"))
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(RuntimeError("[enforce fail at alloc_cpu.cpp:121] not enough memory"))
    assert not is_lost_peer(ValueError("gloo"))
