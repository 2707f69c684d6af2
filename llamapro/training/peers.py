"""Signs of life of all ranks: who is gone, who stands still and where, and how a rank ends whose peer was lost.

Every rank writes one small file into the run's `logs` folder every few seconds: how far its loop is, where its main
thread is, and at the end why it ended. So a rank that waits in vain can name the one it waits for, with its last stack,
even if that one is stopped, killed, or on a machine that is gone.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Self

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError

from llamapro.errors import EXIT_CHECK_FAILED, EXIT_USAGE, CheckFailed, LlamaproError, PeerLost, UserError
from llamapro.files.lock import LeaseOwner
from llamapro.ranks import Ranks
from llamapro.run_folder import RunFolder

SIGN_SECONDS = 10.0
LATE_SIGNS = 3
"""A rank is missing when it has given no sign for as many times the interval."""
SEARCH_SECONDS = 2.0
"""The system closes a killed process's connections a moment before the process is gone."""
READ_ATTEMPTS = 5
COMMUNICATION = ("torch/distributed/", "deepspeed/comm/")
# torch reports lost connections and timeouts of both libraries as RuntimeError; the text names the library.
FAULTS_OF_COMMUNICATION = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
STACK_DEPTH = 40


class Sign(BaseModel):
    """What a rank says of itself.

    Attributes:
        heartbeats: of its loop, about one per micro-step.
        waits: its main thread is in a collective.
        stack: of its main thread, innermost call last.
        end: why it ended; empty while it lives.
        exit_code: what it ends with; None where it was an error that nobody expected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: LeaseOwner
    heartbeats: int
    waits: bool
    stack: tuple[str, ...]
    end: str = ""
    exit_code: int | None = None


class Peers:
    """The ranks of one job as their signs show them. Made by `meet`."""

    def __init__(self, folder: RunFolder, rank: int, world_size: int, interval_seconds: float = SIGN_SECONDS) -> None:
        self._folder = folder
        self._rank = rank
        self._world_size = world_size
        self._interval_seconds = interval_seconds
        self._owner = LeaseOwner.this_process(os.environ.get("SLURM_JOB_ID"))
        self._count: Callable[[], int] = lambda: 0
        self._ended = False
        self._writing = threading.Lock()

    @classmethod
    def meet(cls, folder: RunFolder, ranks: Ranks, interval_seconds: float = SIGN_SECONDS) -> Self:
        """Give the first sign; collective, so that no sign of an earlier start is read from then on.

        Raises:
            PeerLost: a rank was lost before all had met.
        """
        peers = cls(folder, ranks.rank, ranks.world_size, interval_seconds)
        folder.logs.mkdir(parents=True, exist_ok=True)
        peers.give_sign()
        try:
            ranks.barrier()
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise PeerLost(
                f"a peer was lost before all ranks had met ({_first_line(error)}); the same command continues from the "
                "last checkpoint"
            ) from error
        return peers

    @contextmanager
    def giving_signs(self, count: Callable[[], int]) -> Iterator[None]:
        """Give signs while the block runs, from a thread of their own: a file system that hangs stops nothing else.

        Args:
            count: heartbeats of the loop so far.
        """
        self._count = count
        over = threading.Event()

        def work() -> None:
            while not over.wait(self._interval_seconds):
                self.give_sign()

        threading.Thread(target=work, name="signs-of-life", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def give_sign(self, end: str = "", exit_code: int | None = None) -> None:
        """Say that this rank lives, or why it ended, which stays its last word."""
        stack = _main_stack()
        with self._writing:
            if self._ended:
                return
            self._ended = bool(end)
            waits = any(part in line for line in stack for part in COMMUNICATION)
            sign = Sign(
                owner=self._owner, heartbeats=self._count(), waits=waits, stack=stack, end=end, exit_code=exit_code
            )
            # Signs are read when something else has failed already: one that can't be written must not end a run.
            with suppress(OSError):
                self._folder.rank_sign(self._rank).write_bytes(sign.model_dump_json().encode())

    def lost(self) -> dict[int, str]:
        """What became of the other ranks that are gone, have ended or give no sign: a sentence by rank."""
        self.give_sign()
        signs = {rank: self._read(rank) for rank in range(self._world_size) if rank != self._rank}
        return {rank: text for rank, sign in signs.items() if (text := self._loss(rank, sign))}

    def missing(self) -> dict[int, str]:
        """What keeps the others waiting: a sentence by rank; empty when all live, are as far, and wait alike."""
        lost = self.lost()  # gives this rank's sign, too
        signs = {rank: sign for rank in range(self._world_size) if (sign := self._read(rank)) is not None}
        return lost or _behind(signs)

    def testify(self, reason: str) -> None:
        """Before this process is ended: write whom it waited for to standard error, and all of it to the rank's log."""
        missing = self.missing()
        report = "\n".join(missing.values()) or "all ranks are alive and wait in the same place"
        os.write(2, f"rank {self._rank}: {report}\n".encode())
        stacks = map(self._last_stack, missing)
        self.write_log("\n".join([reason, report, *stacks]))
        self.give_sign(reason, PeerLost.exit_code)

    def loss(self, error: BaseException) -> LlamaproError:
        """How this rank ends whose peer was lost: as that peer ended if it said so, else to be tried again."""
        lost, deadline = self.lost(), time.monotonic() + SEARCH_SECONDS
        while not lost and time.monotonic() < deadline:
            time.sleep(0.05)
            lost = self.lost()
        cause = "\n".join(lost.values()) or "which one is not known yet"
        stacks = map(self._last_stack, lost)
        self.write_log("\n".join([f"a peer was lost: {cause}", traceback.format_exc(), *stacks]))
        codes = {sign.exit_code for rank in lost if (sign := self._read(rank)) is not None and sign.end}
        kinds: dict[int, type[LlamaproError]] = {EXIT_CHECK_FAILED: CheckFailed, EXIT_USAGE: UserError}
        kind = next((kinds[code] for code in codes if code in kinds), PeerLost)
        retry = "; the same command continues from the last checkpoint" if kind is PeerLost else ""
        return kind(f"a peer was lost: {cause} ({_first_line(error)}){retry}")

    def leave(self) -> None:
        """Take the sign away at the end of a run that ended well."""
        with self._writing:
            self._ended = True
            self._folder.rank_sign(self._rank).unlink(missing_ok=True)

    def write_log(self, text: str) -> None:
        """Append to the rank's log file, with the stacks of all threads."""
        with suppress(OSError), self._folder.rank_log(self._rank).open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} rank {self._rank}: {text}\n")
            log.flush()
            faulthandler.dump_traceback(file=log, all_threads=True)

    def _loss(self, rank: int, sign: Sign | None) -> str:
        if sign is None:
            return f"rank {rank} has left no sign of life"
        if sign.end:
            return f"rank {rank} ({sign.owner}) ended: {sign.end}"
        if sign.owner.is_gone():
            return f"rank {rank} ({sign.owner}) is gone without a word: killed, by the system if memory ran out"
        late = self._age(rank)
        if late > LATE_SIGNS * self._interval_seconds:
            return (
                f"rank {rank} ({sign.owner}) has given no sign of life for {late:.0f} s: it is stopped, or its machine "
                f"is lost; it was last seen in {_place(sign)}"
            )
        return ""

    def _age(self, rank: int) -> float:
        """Seconds since a rank's last sign by the file system's clock, on which this rank has just given its own."""
        times = (self._folder.rank_sign(one).stat().st_mtime for one in (self._rank, rank))
        return next(times) - next(times)

    def _read(self, rank: int) -> Sign | None:
        """A rank's last sign; None when there is none. One that is just being written is waited for."""
        for _ in range(READ_ATTEMPTS):
            try:
                return Sign.model_validate_json(self._folder.rank_sign(rank).read_bytes())
            except ValidationError:
                time.sleep(0.02)
            except OSError:
                break
        return None

    def _last_stack(self, rank: int) -> str:
        sign = self._read(rank)
        lines = sign.stack if sign is not None else ("not known",)
        return "\n".join([f"last stack of rank {rank}, innermost call last:", *(f"  {line}" for line in lines)])


@contextmanager
def told_to_peers(peers: Peers) -> Iterator[None]:
    """While the block runs, an error of this rank is told to the others, and the loss of another one ends this one.

    Raises:
        PeerLost: another rank is gone or did not answer in time.
        LlamaproError: of the kind with which another rank ended on its own.
    """
    try:
        yield
        peers.leave()
    except LlamaproError as error:
        peers.give_sign(str(error), error.exit_code)
        raise
    except Exception as error:
        if is_lost_peer(error):
            loss = peers.loss(error)
            peers.give_sign(str(loss), loss.exit_code)
            raise loss from error
        peers.write_log(traceback.format_exc())
        peers.give_sign(f"{type(error).__name__}: {_first_line(error)}")
        raise


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error came from communication, and not from this rank's own work."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in FAULTS_OF_COMMUNICATION)


def _behind(signs: dict[int, Sign]) -> dict[int, str]:
    """Ranks that live and for which the others wait, if they can be told apart."""
    furthest = max((sign.heartbeats for sign in signs.values()), default=0)
    late = {rank: sign for rank, sign in signs.items() if sign.heartbeats < furthest}
    if not late and any(sign.waits for sign in signs.values()):
        late = {rank: sign for rank, sign in signs.items() if not sign.waits}
    return {
        rank: f"rank {rank} ({sign.owner}) is alive and keeps the others waiting, in {_place(sign)}"
        for rank, sign in late.items()
    }


def _main_stack() -> tuple[str, ...]:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return ()
    summary = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=STACK_DEPTH, lookup_lines=False)
    return tuple(f"{entry.filename}:{entry.lineno} {entry.name}" for entry in reversed(summary))


def _place(sign: Sign) -> str:
    return sign.stack[-1] if sign.stack else "an unknown place"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
