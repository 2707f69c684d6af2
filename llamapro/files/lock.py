"""The run lock: one writer per folder, by a lease file that its owner renews.

The lease names its owner (host, process, job). It is stale when it was not renewed for 5 minutes by the file system's
own clock, so hosts with different clocks agree, or at once when its owner was a process of this host that is gone.
Taking over moves the stale lease away by rename, which only one taker can do, and creates a new one exclusively.
"""

import os
import socket
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from llamapro.errors import CheckFailed, UserError

RENEW_SECONDS = 30.0
STALE_SECONDS = 300.0
LOCK_NAME = "run.lock"
_ATTEMPTS = 5


class LeaseOwner(BaseModel):
    """Who holds a lease.

    Attributes:
        machine: boot and process-id namespace: only within the same one can the process be looked up.
        started: start time of the process in clock ticks since boot: a reused process id is another process.
        token: one random word per lease.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    pid: int
    machine: str
    started: int
    job_id: str | None
    token: str

    @classmethod
    def this_process(cls, job_id: str | None) -> Self:
        """A new owner: this process."""
        started = _start_of(os.getpid())
        assert started is not None
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            started=started,
            job_id=job_id,
            token=uuid.uuid4().hex,
        )

    def is_gone(self) -> bool:
        """Whether the owner was a process that this process could see if it still ran, and does not."""
        return self.machine == _machine() and _start_of(self.pid) != self.started

    def __str__(self) -> str:
        job = f", job {self.job_id}" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job}"


class RunLock:
    """Holds a folder for one process, from `acquire` to `release`; a context manager.

    Args:
        folder: an existing folder; the lease is `run.lock` in it.
        job_id: the scheduler's job, for the message that a second process gets.
        renew_seconds: how often the lease is renewed; `stale_seconds`: how old a lease of another host must be.
    """

    def __init__(
        self,
        folder: Path,
        job_id: str | None = None,
        *,
        renew_seconds: float = RENEW_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self._path = folder / LOCK_NAME
        self._owner = LeaseOwner.this_process(job_id)
        self._renew_seconds = renew_seconds
        self._stale_seconds = stale_seconds
        self._stop = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._renew, name="run-lock", daemon=True)

    def acquire(self) -> Self:
        """Take the lock.

        Raises:
            UserError: another process holds it; names its host, process and job.
        """
        candidate = self._path.with_name(f".{self._path.name}.{self._owner.token}")
        for _ in range(_ATTEMPTS):
            candidate.write_bytes(orjson.dumps(self._owner.model_dump()))
            try:
                os.link(candidate, self._path)
            except FileExistsError:
                self._remove_stale(candidate.stat().st_mtime)
            else:
                self._thread.start()
                return self
            finally:
                candidate.unlink(missing_ok=True)
        raise UserError(f"{self._path} changes hands again and again; is something else starting runs in this folder?")

    def release(self) -> None:
        """Give the lock back, if it is still held."""
        self._stop.set()
        self._thread.join()
        if self._lost is None and _token_of(self._path) == self._owner.token:
            self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Stop a process that lost its lease while it could not renew it: the lease itself is looked at.

        Raises:
            CheckFailed: the lease is another process's, or gone.
        """
        if self._lost is None:
            self._lost = self._loss()
        if self._lost is not None:
            raise CheckFailed(f"this process lost the run lock: {self._lost}; it must not write there any more")

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _remove_stale(self, now: float) -> None:
        """Move a stale lease away, or refuse. `now` is a file time just taken on the same file system."""
        try:
            owner, age = _read(self._path), now - self._path.stat().st_mtime
        except FileNotFoundError:
            return
        gone = owner is not None and owner.is_gone()
        if not gone and age < self._stale_seconds:
            holder = owner or "an unreadable lease"
            raise UserError(
                f"{self._path.parent} is in use by {holder}, last seen {max(age, 0):.0f} s ago; "
                f"stop that run, or wait: a lease that is not renewed for {self._stale_seconds:.0f} s is free again"
            )
        moved = self._path.with_name(f".{self._path.name}.stale-{self._owner.token}")
        try:
            self._path.rename(moved)
        except FileNotFoundError:
            return
        if _token_of(moved) != (owner.token if owner else None):
            # Another process took over in between and its live lease was moved: put it back.
            with suppress(FileExistsError):
                os.link(moved, self._path)
        moved.unlink()

    def _renew(self) -> None:
        while not self._stop.wait(self._renew_seconds):
            self._lost = self._lost or self._loss()
            if self._lost is not None:
                return
            # The file system may be away for a moment; others see the lease age and free it after 5 minutes.
            with suppress(OSError):
                os.utime(self._path)

    def _loss(self) -> str | None:
        """Why the lease is this process's no longer; None while it is, or can't be read for a moment."""
        try:
            holder = _read(self._path)
        except FileNotFoundError:
            return f"{self._path} was removed"
        except OSError:
            return None
        if holder is not None and holder.token == self._owner.token:
            return None
        return f"{self._path} now belongs to {holder or 'an unreadable lease'}"


def _read(path: Path) -> LeaseOwner | None:
    try:
        return LeaseOwner.model_validate_json(path.read_bytes())
    except ValidationError:
        return None


def _token_of(path: Path) -> str | None:
    try:
        owner = _read(path)
    except FileNotFoundError:
        return None
    return owner.token if owner else None


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_of(pid: int) -> int | None:
    """Start time of a running process in clock ticks since boot; None when there is none (or it is a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name in parentheses may hold anything; state and start time are fields 3 and 22.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
