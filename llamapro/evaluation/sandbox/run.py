"""A Python program in a sandbox: bubblewrap with every namespace unshared, and resource limits.

The program sees a read-only system tree, an empty private /tmp and nothing else: no network, no other process, no
environment, no home, no project, no way to a further user namespace. What comes back is one verdict, from the exit
status that the parent reads; nothing the program writes is read. Where the boundary can't be made there is no verdict:
`SandboxRefused`.

What it is not: a program that is written against this very module can find the agreed status in its interpreter's
memory and report a success it does not have. It still can't leave the sandbox.
"""

import json
import os
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path

from llamapro.errors import UserError
from llamapro.evaluation.sandbox import guest

NOBODY = 65534
STATUSES = range(3, 120)  # no status of the shell's, of Python's or of a signal
SYSTEM_LINKS = ("bin", "sbin", "lib", "lib32", "lib64")
DEVICES = ("null", "zero", "random", "urandom")
NAMESPACES = ("user", "ipc", "pid", "net", "uts", "cgroup")
SYSTEM_PYTHON = Path("/usr/bin/python3")


class SandboxRefused(UserError):
    """No boundary can be made on this machine; says why, and what to do."""


class Verdict(Enum):
    """How a program ended."""

    PASSED = "passed"
    FAILED = "failed"
    TIMED_OUT = "timed out"


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of the wall clock, for all its processes.
        cpu_seconds, memory_bytes, file_bytes, open_files: of each process, of its address space, of each file.
        processes: threads count too.
        disk_bytes: of /tmp, which lies in memory.
    """

    seconds: float = 15.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 64 << 20
    open_files: int = 64
    processes: int = 64
    disk_bytes: int = 64 << 20


def run_program(program: str, limits: Limits | None = None) -> Verdict:
    """Run a program's text to its end; `PASSED` if it got there without an exception.

    Raises:
        SandboxRefused: bubblewrap is missing or can't be started, or no interpreter can be read by the guest's user.
    """
    limits = limits or Limits()
    command = [*_bubblewrap(limits), "--", str(guest_python()), *GUEST]
    try:
        return run_guest(command, program, limits, guest_user())
    except OSError as error:
        raise SandboxRefused(f"generated programs can't be run: {command[0]} can't be started ({error})") from error


GUEST = ("-I", "-S", "-B", "-c", Path(guest.__file__).read_text())


def run_guest(command: Sequence[str], program: str, limits: Limits, user: int | None = None) -> Verdict:
    """Give a program to `command`, the guest behind whatever boundary, and judge by its exit status alone."""
    status = secrets.choice(STATUSES)
    order = json.dumps({"limits": _resource_limits(limits), "program": program, "status": status})
    identity = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
        **identity,  # type: ignore[call-overload]
    )
    try:
        process.communicate(order.encode(), timeout=limits.seconds)
    except subprocess.TimeoutExpired:
        return Verdict.TIMED_OUT
    finally:
        process.kill()  # bubblewrap's death is that of everything inside
        process.wait()
    return Verdict.PASSED if process.returncode == status else Verdict.FAILED


def guest_user() -> int | None:
    """The user a program runs as: limits on processes don't bind root, so root's programs are nobody's."""
    return NOBODY if os.geteuid() == 0 else None


@cache
def guest_python() -> Path:
    """The interpreter of programs: the one that runs this, or the system's where the guest's user can't read that.

    Raises:
        SandboxRefused: neither can be read.
    """
    own = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (own, SYSTEM_PYTHON):
        if python.exists() and (guest_user() is None or _everybody_may_read(python.resolve())):
            return python
    raise SandboxRefused(
        f"generated programs run as nobody when root evaluates, and nobody can read {own}; install a system-wide "
        f"{SYSTEM_PYTHON} (Debian: apt install python3), or evaluate as an ordinary user"
    )


def _everybody_may_read(path: Path) -> bool:
    return all(place.stat().st_mode & stat.S_IXOTH for place in (path, *path.parents))


def _bubblewrap(limits: Limits) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxRefused(
            "generated programs run only behind bubblewrap, and bwrap is not installed (Debian: apt install bubblewrap)"
        )
    command = [program, "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL", "--disable-userns"]
    command += [f"--unshare-{kind}" for kind in NAMESPACES]
    command += ["--ro-bind", "/usr", "/usr"]
    for name in SYSTEM_LINKS:
        command += _system_folder(Path("/") / name)
    prefix = guest_python().resolve().parent.parent
    if not prefix.is_relative_to("/usr"):
        command += ["--ro-bind", str(prefix), str(prefix)]
    for device in DEVICES:
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    return [*command, "--size", str(limits.disk_bytes), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]


def _system_folder(folder: Path) -> list[str]:
    if folder.is_symlink():
        return ["--symlink", os.readlink(folder), str(folder)]
    return ["--ro-bind", str(folder), str(folder)] if folder.is_dir() else []


def _resource_limits(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_CPU": limits.cpu_seconds,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_CORE": 0,
    }
